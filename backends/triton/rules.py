"""The table: how each operation of the language is written in Triton."""
from __future__ import annotations

import math
from typing import Any

from gdn_ir.backends.linearize import Linear, Table, infix, paren
from gdn_ir.backends.memory import address, coordinate, index_suffix, members
from gdn_ir.build import eye
from gdn_ir.nodes import FUNCTIONS, Node, Op, base

DTYPES = {"f64": "tl.float64", "f32": "tl.float32", "tf32": "tl.float32", "tf32x3": "tl.float32", "real": "tl.float32",
          "bf16": "tl.bfloat16", "f16": "tl.float16", "int": "tl.int32"}
CALLS = {"exp": "tl.exp", "exp2": "tl.exp2", "log": "tl.log", "rsqrt": "tl.rsqrt", "sigmoid": "tl.sigmoid",
         "softplus": "softplus", "min": "tl.minimum", "max": "tl.maximum"}
PRECISION = {"f32": "ieee", "tf32": "tf32", "tf32x3": "tf32x3"}


def operand(l: Linear, x: Node, to: tuple[str, ...]) -> str:
    """The value indexed to stand among values over the axes `to`."""
    suffix = index_suffix(x.axes, to)
    return paren(l.text(x)) + suffix if suffix else l.text(x)


def const(l: Linear, n: Node) -> str:
    value = n["value"]
    if math.isinf(value):
        return 'float("-inf")' if value < 0 else 'float("inf")'
    return repr(value)


def elem(l: Linear, n: Node) -> str:
    fn = FUNCTIONS[n["fn"]]
    whole = any(a.type.dtype == "int" for a in n.args)
    args = [str(int(a["value"])) if whole and a.const is not None else operand(l, a, n.axes) for a in n.args]
    if fn.arity == 2 and fn.symbol:
        return infix(fn.symbol, *args)
    return f"-{paren(args[0])}" if n["fn"] == "neg" else f"{CALLS[n['fn']]}({', '.join(args)})"


def cast(l: Linear, n: Node) -> str:
    (x,) = n.args
    if x.const is not None or DTYPES[x.type.dtype] == DTYPES[n["dtype"]]:
        return l.text(x)
    return f"{paren(l.text(x))}.to({DTYPES[n['dtype']]})"


def shape(l: Linear, axes: tuple[str, ...]) -> str:
    return "[" + ", ".join(str(l.kernel.tile(a)) for a in axes) + "]"


def broadcast(l: Linear, n: Node) -> str:
    (x,) = n.args
    if x.const is not None:
        return f"tl.full({shape(l, n.axes)}, {const(l, x)}, tl.float32)"
    return f"tl.broadcast_to({operand(l, x, n.axes)}, {shape(l, n.axes)})"


def select(l: Linear, n: Node) -> str:
    return f"tl.where({', '.join(operand(l, a, n.axes) for a in n.args)})"


def dot(l: Linear, n: Node) -> str:
    over = n["over"]
    a, b = n.args if n.axes[0] in n.args[0].axes else n.args[::-1]
    left = l.text(a) if a.axes[1] == over else f"tl.trans({l.text(a)})"
    right = l.text(b) if b.axes[0] == over else f"tl.trans({l.text(b)})"
    how = PRECISION.get(a.type.dtype)
    return f"tl.dot({left}, {right}" + (f', input_precision="{how}")' if how else ")")


def reduce(l: Linear, n: Node) -> str:
    (x,) = n.args
    return f"tl.{n['fn']}({l.text(x)}, axis={x.axes.index(n['over'])})"


def cumsum(l: Linear, n: Node) -> str:
    reverse = ", reverse=True" if n["reverse"] else ""
    return f"tl.cumsum({l.text(n.args[0])}, axis={n.axes.index(n['axis'])}{reverse})"


def twin(l: Linear, n: Node) -> str:
    (x,) = n.args
    swap = {n["axis"]: n["axis"] + "'", n["axis"] + "'": n["axis"]}
    kept = tuple(swap.get(a, a) for a in x.axes) == n.axes
    return l.text(x) if kept else f"tl.trans({l.text(x)})"


def tri_solve(l: Linear, n: Node) -> str:
    m, r = n.args
    size = l.kernel.tile(n["axis"])
    plain = r.args[0] if r.op is Op.CAST else r
    merges: Any = dict(n.attr).get("merges")
    if merges:
        block, whole, dtype = merges
        return f'inverse_of_{whole // block}({l.text(m)}, {block}, "{"ieee" if dtype == "f32" else dtype}")'
    if n["block"] and plain is eye(n["axis"]):
        return f"inverse_of_blocks({l.text(m)}, {size}, {n['block']})"
    return f"solve_rows({l.text(m)}, {l.text(r)}, {size}, {n['block'] or size})"


def pointer(l: Linear, n: Node, axes: tuple[str, ...]) -> tuple[str, str]:
    """The tile's pointers, and its mask ("" where all of it exists)."""
    at = address(l.kernel, n)
    text = f"{n['tensor'].name}_ptr + {at.start}"
    for axis, stride in at.strides:
        place = coordinate(l.kernel, axis) + index_suffix((axis,), axes)
        text += f" + {place}" if stride == "1" else f" + {place} * ({stride})" if " " in stride else f" + {place} * {stride}"
    mask = " & ".join(f"in_{coordinate(l.kernel, a)}{index_suffix((a,), axes)}" for a in at.bounds)
    return text, mask


def load(l: Linear, n: Node) -> str:
    text, mask = pointer(l, n, n.axes)
    several = members(l.kernel, n)
    if several:
        return f"load_sum({text}, {mask or 'None'}, {several[0]}, {several[1]})"
    return f"tl.load({text}, mask={mask}, other=0.0)" if mask else f"tl.load({text})"


def store(l: Linear, n: Node) -> str:
    text, mask = pointer(l, n, n.args[0].axes)
    return f"tl.store({text}, {l.text(n.args[0])}" + (f", mask={mask})" if mask else ")")


RULES: Table = {
    Op.CONST: const, Op.PARAM: lambda l, n: n["name"], Op.INDEX: lambda l, n: coordinate(l.kernel, n["axis"]),
    Op.VALID: lambda l, n: "rows" if base(n["axis"]) in l.tokens else str(l.kernel.extents[base(n["axis"])]),
    Op.ELEM: elem, Op.CAST: cast, Op.SELECT: select, Op.BROADCAST: broadcast, Op.DOT: dot, Op.REDUCE: reduce,
    Op.CUMSUM: cumsum, Op.TWIN: twin, Op.TRI_SOLVE: tri_solve, Op.LOAD: load, Op.STORE: store,
}
