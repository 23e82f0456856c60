"""What a backend is, and the kernel it is given: one program with its extents, dtypes and options decided."""
from __future__ import annotations

import hashlib
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch

from gdn_ir.artifacts import Built
from gdn_ir.nodes import At, Member, Members, Node, Op, Slot, Tensor, base
from gdn_ir.program import Program, ScanView, token_chains
from gdn_ir.schedules.schedule import KernelOptions

TORCH = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64}
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}        # bytes that one block can use
STORED = {**TORCH, "int": torch.int32}                     # what temporaries may be of: counts too, which start at zero


@dataclass(frozen=True)
class Reason:
    """Why a backend declines."""
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Kernel:
    """One kernel: a program in machine numbers, guarded against padding.

    extents: sizes of the axes fixed at compile time (C, K, V). tiles: extents of the tiles over them, larger where an axis is
    padded, smaller where it is split over the grid. varlen: sequences are found through cu_seqlens, else all have length T.
    counts: of a scan that is followed, where it counts a chunk's columns that are stored; awaits: of its follower, those counts
    of each scan that it follows, how high they must be, and whether the scan goes backwards; clears: of a kernel before such a
    scan, the counts that it sets to zero (`gdn_ir.follow`). beside: whether it may start while the kernel before it runs;
    leads: whether the one after it may. sweeps: stores whose rows past the last sequence it clears: another kernel's, or its
    own, where it is roles. turns: for each tensor that several blocks store their part of a sum in, how many have: they add it
    one after another, in the order of the grid.
    """
    name: str
    program: Program
    extents: Mapping[str, int]
    tiles: Mapping[str, int]
    options: KernelOptions
    varlen: bool
    origin: str = ""                           # schedule and instance, for the header of the emitted source
    counts: Tensor | None = None
    awaits: tuple[tuple[Tensor, int, bool], ...] = ()
    clears: Tensor | None = None
    beside: bool = False
    leads: bool = False
    sweeps: tuple[Node, ...] = ()
    turns: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def parallel(self) -> ScanView | None:
        """The scan over chunks, if it carries nothing: its chunks go to the grid."""
        scans = [r for r in self.program.roots if r.op is Op.SCAN]
        return ScanView.of(scans[0]) if len(self.program.roots) == 1 and scans and not scans[0]["carries"] else None

    @cached_property
    def chunk(self) -> int:
        """Tokens of a chunk; 1 where nothing is cut into chunks."""
        return next((self.extents[a] for a in self.tokens), 1)

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """The tile axes that tokens are cut into."""
        return tuple(token_chains(self.program.nodes()))

    @cached_property
    def row_outputs(self) -> tuple[Node, ...]:
        """Stores of outputs that have a row for each token."""
        stores = (n for n in self.program.nodes() if n.op is Op.STORE)
        return tuple(n for n in stores if not n["tensor"].temp and n["tensor"].dims[:1] == ("T",))

    @cached_property
    def groups(self) -> tuple[ScanView, ...]:
        """The scans over the members of a grid point's group."""
        return tuple(view for s in self.program.scans() if (view := ScanView.of(s)).group)

    @cached_property
    def gathers(self) -> tuple[str, str] | None:
        """The grid axis that a kernel of roles stores sums over, and the one whose points are its groups: a block takes the
        members of a group one after another."""
        found = {(t.grid, t.share) for n in self.program.nodes() if self.options.roles and n.op is Op.STORE and n["sum"]
                 for t in n["index"] if isinstance(t, At) and t.share and n["sum"] == (t.grid,)}
        return next(((grid, str(share)) for grid, share in found), None) if len(found) == 1 else None

    def owner(self, axis: str) -> str:
        """The grid axis whose points have blocks of their own: of what a block gathers, the groups."""
        return self.gathers[1] if self.gathers and axis == self.gathers[0] else axis

    @cached_property
    def owns_tail(self) -> bool:
        """Whether this kernel itself writes zeros to the rows past the last sequence: one that runs all chunks at once, or one
        of roles that was told to."""
        alone = self.parallel is not None and len(self.parallel.chain) == 1
        return self.varlen and (bool(self.row_outputs or self.sweeps) if alone else bool(self.options.roles and self.sweeps))

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """Tile axes that are split over the grid."""
        return tuple(a[:-1] for a in self.program.grid if a.endswith("#"))

    @property
    def columns(self) -> int:
        """Those of V that a block owns."""
        return self.tile("V") if "V" in self.splits else self.extents["V"]

    @cached_property
    def changes(self) -> frozenset[str]:
        """The names of the tensors that it writes, counts and rows past the last sequence among them."""
        more = (t.name for t in (self.counts, self.clears, *self.turns.values()) if t)
        return frozenset((*self.program.written(), *(s["tensor"].name for s in self.sweeps), *more))

    @cached_property
    def segments(self) -> dict[str, int]:
        """Dimensions with a place for each segment of chunks, and the tokens of a segment."""
        slots = {t.chain[-1]: t for n in self.program.nodes() if n.op in (Op.LOAD, Op.STORE) for t in n["index"]
                 if isinstance(t, Slot) and t.inner}
        return {d: math.prod((self.extents[a] for a in t.inner), start=self.extents[t.tile]) for d, t in slots.items()}

    def span(self, scan: ScanView) -> int:
        """Tokens that one iteration of a scan covers."""
        inner = scan.chain[scan.chain.index(scan.axis) + 1:]
        return math.prod((self.extents[a] for a in inner), start=self.extents[scan.tile])

    def tile(self, axis: str) -> int:
        """The extent of a tile; a twin may be split over the grid by itself."""
        return self.tiles.get(axis, self.tiles.get(base(axis), self.extents[base(axis)]))

    def padded(self, axis: str) -> bool:
        """Whether a tile can reach past the end of an axis of fixed extent."""
        return self.extents[base(axis)] % self.tile(axis) != 0

    def tensors(self) -> tuple[Tensor, ...]:
        swept = {n["tensor"].name: n["tensor"] for n in self.sweeps if n["tensor"].name not in self.program.tensors()}
        more = [*swept.values(), *(t for t in (self.clears, *(counts for counts, _, _ in self.awaits), self.counts) if t)]
        return (*self.program.tensors().values(), *more, *self.turns.values())

    def header(self, *more: str) -> str:
        """What stands above an emitted source, as comments: where it came from, and what else a backend has to say."""
        lines = (f"{self.name}: emitted by gdn-ir", *self.origin.splitlines(), *more)
        return "".join(f"# {part}\n" for line in lines for part in textwrap.wrap(line, 120, subsequent_indent="    "))


@dataclass(frozen=True)
class Source:
    """Emitted text. `hash` covers what runs, not its comments: the key of a measurement."""
    kernel: str
    text: str

    @property
    def digest(self) -> str:
        body = "\n".join(line for line in self.text.splitlines() if not line.lstrip().startswith("#"))
        return hashlib.sha256(body.encode()).hexdigest()

    @property
    def hash(self) -> str:
        return self.digest[:16]


class Call:
    """Runtime sizes of one call. tokens: rows of packed tensors; length: T of each sequence (dense) or all tokens (varlen).
    memo: what was worked out from these sizes, shared by the calls of one variant that have them."""
    __slots__ = ("cu_seqlens", "heads", "length", "memo", "sequences", "tokens")

    def __init__(self, sequences: int, tokens: int, length: int, heads: Mapping[str, int],
                 cu_seqlens: torch.Tensor | None = None, memo: dict[Any, Any] | None = None) -> None:
        self.sequences, self.tokens, self.length, self.heads, self.cu_seqlens = sequences, tokens, length, heads, cu_seqlens
        self.memo = {} if memo is None else memo

    def bounded(self, cu_seqlens: torch.Tensor | None) -> Call:
        """The same sizes, with these boundaries."""
        return Call(self.sequences, self.tokens, self.length, self.heads, cu_seqlens, self.memo)

    def slots(self, chunk: int) -> int:
        """Places for chunks, one for each chunk of each sequence (a few stay empty)."""
        return self.tokens // chunk + self.sequences

    def shape(self, kernel: Kernel, tensor: Tensor) -> tuple[int, ...]:
        """The extents of a tensor in this call."""
        known = {"T": self.tokens, "N": self.sequences, "X": self.slots(kernel.chunk), **self.heads,
                 **{d: self.slots(span) for d, span in kernel.segments.items()}, **self.groups(tensor)}
        return tuple(known[d] if d in known else kernel.extents[base(d)] for d in tensor.layout)

    def groups(self, tensor: Tensor) -> dict[str, int]:
        """How many members each group of a tensor has, by that dimension's name."""
        return {tensor.layout[0]: self.heads[tensor.members[0]] // self.heads[tensor.members[1]]} if tensor.members else {}


def blocks(kernel: Kernel, call: Call) -> int:
    """How many blocks a call takes: tiles of split axes, heads, then chunks or segments (where they run at once) or
    sequences."""
    found: int | None = call.memo.get(kernel.name)
    if found is None:
        found = call.memo[kernel.name] = _blocks(kernel, call)
    return found


def _blocks(kernel: Kernel, call: Call) -> int:
    span = kernel.span(kernel.parallel) if kernel.parallel else 0
    if not span:
        found = call.sequences
    elif kernel.varlen:
        found = call.slots(span) + kernel.owns_tail        # the tail may need one more
    else:
        found = call.sequences * -(-call.length // span)
    for a in kernel.program.grid:
        if a.endswith("#"):
            found *= -(-kernel.extents[base(a[:-1])] // kernel.tile(a[:-1]))
        elif a != "N":
            found *= call.heads[kernel.owner(a)]
    return found


Launch = Callable[[Mapping[str, torch.Tensor], Mapping[str, float], Call], "dict[str, torch.Tensor] | None"]


def heads(kernel: Kernel) -> tuple[str, ...]:
    """The sizes of head dimensions that a kernel takes at run time: grid axes and the dimensions that share them."""
    found = {a: None for a in kernel.program.grid if a != "N" and not a.endswith("#")}
    for n in (*kernel.program.nodes(), *kernel.sweeps):
        if n.op in (Op.LOAD, Op.STORE):
            found |= {t.share: None for t in n["index"] if isinstance(t, At) and t.share} | dict.fromkeys(n["tensor"].members)
            found |= {d: None for t, d in zip(n["index"], n["tensor"].dims, strict=True)
                      if isinstance(t, Member | Members) and t.grid}
    return tuple(found)


def clear_tail(x: torch.Tensor, call: Call) -> None:
    """Zero the rows of a packed tensor past the last sequence, without reading cu_seqlens on the host or compiling anything."""
    assert call.cu_seqlens is not None
    owned = torch.arange(call.tokens, device=x.device) < call.cu_seqlens[-1]
    x.view(call.tokens, x.numel() // max(1, call.tokens)).masked_fill_(~owned[:, None], 0.0)


class Backend(Protocol):
    """Turns kernels into callables. It knows tiles; it never asks what program it serves.

    functional: its callables return what they write, and torch can differentiate them; others write into the memory they are
    given. splits_grid: an axis can be tiled over the grid (where the whole grid runs at once there is no point). sweeps: a
    kernel of its can clear rows of another's outputs (`Kernel.sweeps`). in_turn: blocks of its can add to what others stored.
    loads_once: a block reads each element of a tensor once, before it stores what is made of it. (What roles read goes through
    rings, and does so too.)
    by_address: what `join` gives reads nothing of a tensor but its address and device, so that it need not be given views.
    """
    name: str
    functional: bool
    splits_grid: bool
    sweeps: bool
    in_turn: bool
    loads_once: bool

    @property
    def by_address(self) -> bool: ...

    def supports(self, kernel: Kernel, arch: str) -> Reason | None:
        """None if this kernel can be emitted for the architecture, else why not."""

    def tile(self, axis: str, extent: int, arch: str) -> int:
        """The extent of the tile that holds a whole axis (a power of two, where the target needs one)."""

    def products(self, io: str, arch: str) -> str:
        """The dtype that products' operands take when the schedule leaves it to the inputs' dtype."""

    def reads_tf32(self, arch: str) -> bool:
        """Whether its products of float32 are tf32 at best, so that better ones must be made of several."""

    def joins(self, options: KernelOptions, block: int, size: int) -> bool:
        """Whether it makes an inverse of `size` rows from those of blocks itself, in a kernel with these options."""

    def emit(self, kernel: Kernel, arch: str) -> Source:
        """The source, readable on its own."""

    def compile(self, kernel: Kernel, source: Source, arch: str) -> Launch:
        """A callable over (memory, params, sizes) that launches the kernel; what it is built from is obtained from a pack, the
        cache, or `build` (artifacts.py)."""

    def join(self, kernels: Sequence[Kernel], launches: Sequence[Launch]) -> Launch:
        """What runs a pipeline's launches in order and holds its temporaries, on the device of the tensors that it is given
        (not called where `functional`)."""

    def recipe(self, kernel: Kernel, source: Source, arch: str) -> dict[str, Any]:
        """Everything that decides what a compiled kernel does, but the toolchain's versions; JSON. Equal recipes are one
        binary."""

    def toolchain(self, arch: str) -> dict[str, str] | None:
        """Versions of all that `build` runs, by name; None where some of it is not installed."""

    def build(self, kernel: Kernel, source: Source, arch: str) -> Built | None:
        """Compile, for an architecture that need not be here; None where there is nothing to compile."""

    def generated(self, kernel: Kernel, source: Source, arch: str) -> str:
        """What the toolchain makes of a source: PTX, CUDA or C, and what else it has to show."""

    def clear_tail(self, x: torch.Tensor, call: Call) -> None:
        """Zero the rows of an output that no sequence owns (not called where `functional`, nor for a kernel that
        `owns_tail`)."""

    def version(self) -> str:
        """The toolchain's name and version, which results carry."""
