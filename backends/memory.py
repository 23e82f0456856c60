"""Addresses and masks, shared by the printers: where a load or store lies, as text over names that a printer defines.

The names: `t0` the first token of the chunk, `slot` its place among all chunks, `n` the sequence, `i_HV` a grid axis,
`i_H` a grid axis shared by heads, `C`, `K`, `V` the coordinates along tile axes; `slot_Y` a segment's place among all segments.
"""
from __future__ import annotations

from dataclasses import dataclass

from gdn_ir.backends.base import Kernel
from gdn_ir.nodes import At, IRError, Member, Members, Node, Part, Rows, Slot, Tensor, Tile, Turn, base


@dataclass(frozen=True)
class Address:
    """start: element offset of the tile (scalar text). strides: for each tile axis, in the order of the value's axes, its
    stride as text. bounds: the axes whose coordinates must be checked."""
    start: str
    strides: tuple[tuple[str, str], ...]
    bounds: tuple[str, ...]


def size(kernel: Kernel, dim: str) -> str | int:
    """The size of a tensor's dimension: a number where it is fixed at compile time, a runtime name where not."""
    return kernel.extents.get(base(dim), dim)


def product(factors: list[str | int]) -> str:
    """A product as text, its numbers multiplied out."""
    number, names = 1, []
    for f in factors:
        if isinstance(f, int):
            number *= f
        else:
            names.append(f)
    return " * ".join(names + ([str(number)] if number != 1 or not names else []))


def stride(kernel: Kernel, tensor: Tensor, position: int) -> list[str | int]:
    """How far apart places along a dimension are, as factors. Sequences of a dense batch lie one after another."""
    inner = tensor.dims[position + 1:]
    return [x for d in inner for x in (["N", "T"] if d == "T" and not kernel.varlen else [size(kernel, d)])]


def address(kernel: Kernel, node: Node) -> Address:
    """Where the tile of a LOAD or STORE lies in its tensor (contiguous, last dimension fastest)."""
    tensor: Tensor = node["tensor"]
    if tensor.members:
        raise IRError(f"{tensor.name}: members of its groups lie apart, which roles alone read and write")
    terms: list[str] = []
    strides: dict[str, str] = {}
    bounds: list[str] = []
    for i, term in enumerate(node["index"]):
        step = stride(kernel, tensor, i)
        scalar: str | None = None
        match term:
            case Tile(axis):
                strides[axis] = product(step)
                if isinstance(term, Part):                 # where its part starts
                    step, scalar = [kernel.tile(axis), *step], f"part_{axis}"
                if kernel.padded(axis):
                    bounds.append(axis)
            case At(grid, share):
                scalar = "n" if grid == "N" else number(kernel, grid) if grid.endswith("#") else f"i_{share or grid}"
            case Rows(_, axis, single):
                scalar = "t0"
                if not single:
                    strides[axis] = product(step)
                    bounds.append(axis)
            case Slot(chain, _, inner):
                scalar = f"slot_{chain[-1]}" if inner else "slot"
            case Turn(scan):
                scalar = f"i_{scan}"
            case Member(grid, scan, own):
                scalar = f"i_{grid if own else scan}"
            case Members(grid) if grid:                    # the first of them
                scalar = f"i_{grid} * ({tensor.dims[i]} // {grid})"
        if scalar is not None:
            factor = product(step)
            terms.append(scalar if factor == "1" else f"{scalar} * ({factor})" if " " in factor else f"{scalar} * {factor}")
    axes = node.axes if node.axes else node.args[0].axes if node.args else ()
    order = tuple(sorted(strides)) if not axes else axes
    return Address(" + ".join(terms) or "0", tuple((a, strides[a]) for a in order), tuple(a for a in order if a in bounds))


def members(kernel: Kernel, node: Node) -> tuple[str, str] | None:
    """Of a load that sums several places: how far they lie apart, and how many there are, as text. (Several dimensions of them
    lie one in another, next to each other.)"""
    dims, step, counts = node["tensor"].dims, "", []
    for i, term in enumerate(node["index"]):
        if isinstance(term, Members):
            step = product(stride(kernel, node["tensor"], i))
            counts.append(f"{dims[i]} // {term.grid}" if term.grid else str(size(kernel, dims[i])))
    return (step, " * ".join(counts)) if counts else None


def number(kernel: Kernel, grid: str) -> str:
    """Which tile of a split axis a block owns, as text."""
    return f"(start // {kernel.tile(grid[:-1])})"


def coordinate(kernel: Kernel, axis: str) -> str:
    """The name of the coordinates along an axis. A twin has those of its base, unless it alone is split over the grid."""
    return axis.replace("'", "_") if axis in kernel.splits else base(axis)


def index_suffix(axes: tuple[str, ...], to: tuple[str, ...]) -> str:
    """How a value over `axes` is indexed to stand among values over `to`: "[:, None]"; nothing where they agree."""
    if axes == to or not axes:
        return ""
    return "[" + ", ".join(":" if a in axes else "None" for a in to) + "]"
