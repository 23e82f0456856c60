"""The table: one element of each operation's tile, written in TileLang at given coordinates."""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import reduce

from gdn_ir.backends.base import Kernel
from gdn_ir.backends.linearize import infix, paren
from gdn_ir.nodes import FUNCTIONS, At, Members, Node, Op, Rows, Slot, Tensor, Tile, Turn, base

At_ = Mapping[str, str]                                    # a tile axis -> the text of a coordinate along it
Element = Callable[[Node, At_], str]
DTYPES = {"f32": "float32", "tf32": "float32", "tf32x3": "float32", "real": "float32", "bf16": "bfloat16", "f16": "float16",
          "int": "int32"}
CALLS = {"exp": "T.exp", "exp2": "T.exp2", "log": "T.log", "rsqrt": "T.rsqrt", "sigmoid": "T.sigmoid", "min": "T.min",
         "max": "T.max", "and": "T.And"}


def const(l: Element, n: Node, at: At_, k: Kernel) -> str:
    value = n["value"]
    return ("-" if value < 0 else "") + 'T.infinity("float32")' if math.isinf(value) else repr(value)


def elem(l: Element, n: Node, at: At_, k: Kernel) -> str:
    fn, whole = FUNCTIONS[n["fn"]], any(a.type.dtype == "int" for a in n.args)
    args = [str(int(a["value"])) if whole and a.const is not None else l(a, at) for a in n.args]
    if n["fn"] == "softplus":
        return f"(T.max({args[0]}, 0.0) + T.log(1.0 + T.exp(-T.abs({args[0]}))))"
    if n["fn"] in CALLS:
        return f"{CALLS[n['fn']]}({', '.join(args)})"
    return f"-{paren(args[0])}" if n["fn"] == "neg" else infix(str(fn.symbol), *args)


def cast(l: Element, n: Node, at: At_, k: Kernel) -> str:
    (x,) = n.args
    if n["dtype"] == "tf32":                               # to the nearest of 10 bits; matrix units would cut the rest off
        return f'T.reinterpret((T.reinterpret({l(x, at)}, "int32") + 4096) & -8192, "float32")'
    same = x.const is not None or DTYPES[x.type.dtype] == DTYPES[n["dtype"]]
    return l(x, at) if same else f'T.cast({l(x, at)}, "{DTYPES[n["dtype"]]}")'


def select(l: Element, n: Node, at: At_, k: Kernel) -> str:
    return f"T.if_then_else({', '.join(l(a, at) for a in n.args)})"


def twin(l: Element, n: Node, at: At_, k: Kernel) -> str:
    a = n["axis"]
    swap = {a: a + "'", a + "'": a}
    return l(n.args[0], {x: at[swap.get(x, x)] for x in n.args[0].axes})


def place(axis: str, at: At_, k: Kernel) -> str:
    """The coordinate along the whole of an axis, of which a block may own a part."""
    return f"start + {at[axis]}" if base(axis) in k.splits else at[axis]


def guarded(condition: Node, k: Kernel) -> bool:
    """Whether a condition holds in every chunk that has all of its rows."""
    return condition.op is Op.ELEM and condition["fn"] == "lt" and condition.args[0].op is Op.INDEX \
        and condition.args[1].op is Op.VALID and base(condition.args[0]["axis"]) in k.tokens


def region(n: Node, k: Kernel) -> str:
    """The box of a LOAD's tensor that a whole chunk's tile is, "" if it is none: padded, or in another order of axes."""
    box, order = [], []
    for term in n["index"]:
        match term:
            case Tile(axis):
                order.append(axis)
                box.append(f"start:start + {k.tile(axis)}" if base(axis) in k.splits else f"0:{k.tile(axis)}")
            case At(grid, share):
                box.append(point(grid, share, k))
            case Rows(_, axis, False):
                order.append(axis)
                box.append(f"t0:t0 + {k.tile(axis)}")
            case Slot(chain, _, inner):
                box.append(slot(chain, inner))
            case Turn(scan):
                box.append(f"i_{scan}")
            case _:
                return ""
    return "" if tuple(order) != n.axes or any(k.padded(a) for a in order) \
        else f"{n['tensor'].name}_[{', '.join(members_first(n, box))}]"


def members_first(n: Node, indices: list[str]) -> list[str]:
    """Indices of a tensor, by its dimensions, as they are where its memory has the members of groups apart."""
    tensor: Tensor = n["tensor"]
    if not tensor.members:
        return indices
    i, size = tensor.dims.index(tensor.members[0]), "T.truncdiv({}, {})".format(*tensor.members)
    return [f"T.truncmod({indices[i]}, {size})", *indices[:i], f"T.truncdiv({indices[i]}, {size})", *indices[i + 1:]]


def several(n: Node) -> bool:
    """Whether a LOAD is the sum of several places."""
    return any(isinstance(t, Members) for t in n["index"])


def counts(n: Node, k: Kernel) -> list[str]:
    """Of a LOAD of several places: how many there are, by dimension."""
    return [f"T.truncdiv({dim}, {t.grid})" if t.grid else str(k.extents[dim])
            for t, dim in zip(n["index"], n["tensor"].dims, strict=True) if isinstance(t, Members)]


def point(grid: str, share: str | None, k: Kernel) -> str:
    """Where on a grid axis a block is."""
    if grid.endswith("#"):
        return f"T.truncdiv(start, {k.tile(grid[:-1])})"
    return "n" if grid == "N" else f"i_{share or grid}"


def slot(chain: tuple[str, ...], inner: tuple[str, ...]) -> str:
    """The place of a chunk, or of a segment of them."""
    return f"slot_{chain[-1]}" if inner else "slot"


def where(n: Node, at: At_, k: Kernel, whole: bool = False, first: str = "t0", rows: str = "rows", place_of: str = "") \
        -> tuple[str, str]:
    """A LOAD's or STORE's element: the indices of its tensor, and the condition under which it exists ("" where always).
    whole: whether the chunk has all of its rows; first and rows: its first token, and how many it has; place_of: its slot,
    where that is not the one at hand. Of several places, the i-th."""
    indices, inside, members = [], [], counts(n, k)
    for term in n["index"]:
        match term:
            case Tile(axis):
                indices.append(place(axis, at, k))
                if k.padded(axis):
                    inside.append(f"{indices[-1]} < {k.extents[base(axis)]}")
            case At(grid, share):
                indices.append(point(grid, share, k))
            case Rows(_, axis, single):
                indices.append(first if single else f"{first} + {at[axis]}")
                if not single and not whole:
                    inside.append(f"{at[axis]} < {rows}")
            case Slot(chain, _, inner):
                indices.append(place_of or slot(chain, inner))
            case Turn(scan):
                indices.append(f"i_{scan}")
            case Members(grid) if grid:
                indices.append(f"i_{grid} * {members[0]} + {'i' if len(members) == 1 else f'T.truncdiv(i, {members[1]})'}")
            case Members():
                indices.append("i" if len(members) == 1 else f"T.truncmod(i, {members[-1]})")
    condition = reduce(lambda a, b: f"T.And({a}, {b})", inside) if inside else ""
    return f"{n['tensor'].name}_[{', '.join(members_first(n, indices))}]", condition


def load(l: Element, n: Node, at: At_, k: Kernel) -> str:
    text, inside = where(n, at, k)
    return f"T.if_then_else({inside}, {text}, 0.0)" if inside else text


RULES: dict[Op, Callable[[Element, Node, At_, Kernel], str]] = {
    Op.CONST: const, Op.PARAM: lambda l, n, at, k: n["name"], Op.INDEX: lambda l, n, at, k: place(n["axis"], at, k),
    Op.VALID: lambda l, n, at, k: "rows" if base(n["axis"]) in k.tokens else str(k.extents[base(n["axis"])]),
    Op.ELEM: elem, Op.CAST: cast, Op.SELECT: select, Op.BROADCAST: lambda l, n, at, k: l(n.args[0], at), Op.TWIN: twin,
    Op.LOAD: load,
}
