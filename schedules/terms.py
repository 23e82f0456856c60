"""Values as sums of signed terms and as products of factors: what the steps that rearrange them look at."""
from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

from gdn_ir.nodes import Node, Op, make, twin

Term = tuple[int, tuple[Node, ...]]                        # a sign, and factors


def is_elem(n: Node, *fns: str) -> bool:
    return n.op is Op.ELEM and n["fn"] in fns


def addends(n: Node) -> list[tuple[int, Node]]:
    """The signed parts of a sum, looked for under twins too."""
    if is_elem(n, "add", "sub"):
        second = -1 if n["fn"] == "sub" else 1
        found = [*addends(n.args[0]), *((s * second, x) for s, x in addends(n.args[1]))]
        return found if all(x.axes == n.axes for _, x in found) else [(1, n)]
    if is_elem(n, "neg"):
        return [(-s, x) for s, x in addends(n.args[0])]
    if n.op is Op.TWIN:
        return [(s, n.but((x,))) for s, x in addends(n.args[0])] if is_elem(n.args[0], "add", "sub", "neg") else [(1, n)]
    return [(1, n)]


def total(parts: Iterable[tuple[int, Node]]) -> Node:
    """The sum of signed parts (at least one)."""
    ordered = sorted(parts, key=lambda p: -p[0])           # a part to add before those to subtract
    sign, result = ordered[0]
    result = result if sign > 0 else -result
    for sign, x in ordered[1:]:
        result = result + x if sign > 0 else result - x
    return result


def factors(n: Node) -> Term:
    """A product's sign and factors; anything else is its own factor."""
    if is_elem(n, "neg"):
        sign, fs = factors(n.args[0])
        return -sign, fs
    if is_elem(n, "mul"):
        (s, a), (t, b) = factors(n.args[0]), factors(n.args[1])
        return s * t, a + b
    return 1, (n,)


def multiply(xs: Iterable[Node]) -> Node:
    return reduce(lambda a, b: a * b, xs)


def straight(n: Node) -> Node:
    """The twin of a product as a product of twins, dot(x, y).twin = dot(x.twin, y.twin), where it is summed over that axis; any
    other value as it is."""
    if n.op is not Op.TWIN or n.args[0].op is not Op.DOT:
        return n
    (product,) = n.args
    axis, over = n["axis"], product["over"]
    if over not in {axis, twin(axis)}:
        return n
    return make(Op.DOT, tuple(x.twin(axis) for x in product.args), over=twin(over))
