"""The table: one element of each operation's tile, written in TileLang at given coordinates."""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import reduce

from gdn_ir.backends.base import Kernel
from gdn_ir.backends.linearize import infix, paren
from gdn_ir.nodes import FUNCTIONS, At, Node, Op, Rows, Slot, Tile, Turn, base

At_ = Mapping[str, str]                                    # a tile axis -> the text of a coordinate along it
Element = Callable[[Node, At_], str]
DTYPES = {"f32": "float32", "tf32": "float32", "tf32x3": "float32", "real": "float32", "bf16": "bfloat16", "f16": "float16",
          "int": "int32"}
CALLS = {"exp": "T.exp", "log": "T.log", "rsqrt": "T.rsqrt", "sigmoid": "T.sigmoid", "min": "T.min", "max": "T.max",
         "and": "T.And"}


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


def where(n: Node, at: At_, k: Kernel, first: str = "t0", rows: str = "rows") -> tuple[str, str]:
    """A LOAD's or STORE's element: the indices of its tensor, and the condition under which it exists ("" where always).
    first and rows: the chunk's first token, and how many it has."""
    indices, inside = [], []
    for term in n["index"]:
        match term:
            case Tile(axis):
                indices.append(place(axis, at, k))
                if k.padded(axis):
                    inside.append(f"{indices[-1]} < {k.extents[base(axis)]}")
            case At(grid, share):
                indices.append("n" if grid == "N" else f"i_{share or grid}")
            case Rows(_, axis, single):
                indices.append(first if single else f"{first} + {at[axis]}")
                if not single:
                    inside.append(f"{at[axis]} < {rows}")
            case Slot():
                indices.append("slot")
            case Turn(scan):
                indices.append(f"i_{scan}")
    condition = reduce(lambda a, b: f"T.And({a}, {b})", inside) if inside else ""
    return f"{n['tensor'].name}_[{', '.join(indices)}]", condition


def load(l: Element, n: Node, at: At_, k: Kernel) -> str:
    text, inside = where(n, at, k)
    return f"T.if_then_else({inside}, {text}, 0.0)" if inside else text


RULES: dict[Op, Callable[[Element, Node, At_, Kernel], str]] = {
    Op.CONST: const, Op.PARAM: lambda l, n, at, k: n["name"], Op.INDEX: lambda l, n, at, k: place(n["axis"], at, k),
    Op.VALID: lambda l, n, at, k: "rows" if base(n["axis"]) in k.tokens else str(k.extents[base(n["axis"])]),
    Op.ELEM: elem, Op.CAST: cast, Op.SELECT: select, Op.BROADCAST: lambda l, n, at, k: l(n.args[0], at), Op.TWIN: twin,
    Op.LOAD: load,
}
