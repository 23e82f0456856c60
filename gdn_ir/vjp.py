"""The derivative of each operation: `VJP` maps an op to a rule from a node and its adjoint to the adjoints of its arguments
(None where there is none). A triangular solve is differentiated whole: its inner loop never is."""
from __future__ import annotations

import math
from collections.abc import Callable

from gdn_ir.build import broadcast, cumsum, dot, elem, reduce_sum, select, sigmoid, strict_lower, tri_solve
from gdn_ir.nodes import IRError, Node, Op, make

Rule = Callable[[Node, Node], "tuple[Node | None, ...]"]
VJP: dict[Op, Rule] = {}


def fit(a: Node, axes: tuple[str, ...]) -> Node:
    """An adjoint over exactly `axes`: summed over what was repeated, repeated where it is the same."""
    for axis in a.axes:
        if axis not in axes:
            a = reduce_sum(a, axis)
    return broadcast(a, axes)


def rule(op: Op) -> Callable[[Rule], Rule]:
    def register(fn: Rule) -> Rule:
        VJP[op] = fn
        return fn
    return register


ELEMENTWISE: dict[str, Callable[..., tuple[Node | None, ...]]] = {
    "add": lambda n, a, x, y: (a, a),
    "sub": lambda n, a, x, y: (a, -a),
    "mul": lambda n, a, x, y: (a * y, a * x),
    "div": lambda n, a, x, y: (a / y, -(a * n / y)),
    "neg": lambda n, a, x: (-a,),
    "min": lambda n, a, x, y: (select(elem("le", x, y), a, 0.0), select(elem("le", x, y), 0.0, a)),
    "max": lambda n, a, x, y: (select(elem("ge", x, y), a, 0.0), select(elem("ge", x, y), 0.0, a)),
    "exp": lambda n, a, x: (a * n,),
    "exp2": lambda n, a, x: (a * n * math.log(2.0),),
    "log": lambda n, a, x: (a / x,),
    "rsqrt": lambda n, a, x: (-0.5 * a * n * n * n,),
    "sigmoid": lambda n, a, x: (a * n * (1.0 - n),),
    "softplus": lambda n, a, x: (a * sigmoid(x),),
}


@rule(Op.ELEM)
def _elem(n: Node, a: Node) -> tuple[Node | None, ...]:
    if n["fn"] not in ELEMENTWISE:
        return (None,) * len(n.args)                       # comparisons and whole numbers: flat almost everywhere
    return ELEMENTWISE[n["fn"]](n, a, *n.args)


@rule(Op.CAST)
def _cast(n: Node, a: Node) -> tuple[Node | None, ...]:
    return (a,)


@rule(Op.BROADCAST)
def _broadcast(n: Node, a: Node) -> tuple[Node | None, ...]:
    return (a,)


@rule(Op.SELECT)
def _select(n: Node, a: Node) -> tuple[Node | None, ...]:
    return None, select(n.args[0], a, 0.0), select(n.args[0], 0.0, a)


@rule(Op.REDUCE)
def _reduce(n: Node, a: Node) -> tuple[Node | None, ...]:
    if n["fn"] != "sum":
        raise IRError(f"no derivative of a {n['fn']} along an axis")
    return (a,)


@rule(Op.CUMSUM)
def _cumsum(n: Node, a: Node) -> tuple[Node | None, ...]:
    return (cumsum(broadcast(a, n.axes), n["axis"], reverse=not n["reverse"]),)


@rule(Op.TWIN)
def _twin(n: Node, a: Node) -> tuple[Node | None, ...]:
    return (make(Op.TWIN, (a,), axis=n["axis"]),)


@rule(Op.DOT)
def _dot(n: Node, a: Node) -> tuple[Node | None, ...]:
    a = broadcast(a, n.axes)

    def against(x: Node, y: Node) -> Node:
        free = [axis for axis in y.axes if axis not in x.axes]
        return dot(a, y, over=free[0]) if free else a * y
    x, y = n.args
    return against(x, y), against(y, x)


@rule(Op.TRI_SOLVE)
def _tri_solve(n: Node, a: Node) -> tuple[Node | None, ...]:
    (m, r), axis = n.args, n["axis"]
    if n["block"] or dict(n.attr).get("transpose") or axis + "'" in r.axes:
        raise IRError("only a whole solve has a derivative here; differentiate before the schedule rewrites it")
    back = tri_solve(m, broadcast(a, n.axes), axis, transpose=True)
    rest = [x for x in r.axes if x != axis]
    u = n.twin(axis)
    outer = dot(back, u, over=rest[0]) if rest else back * u
    return -strict_lower(fit(outer, m.axes), axis), back

