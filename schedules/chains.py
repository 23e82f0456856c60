"""The step `chain`: sums of tiles one addend after another, so that a block holds less at once."""
from __future__ import annotations

from gdn_ir.nodes import Node, Op, twin
from gdn_ir.program import uses
from gdn_ir.schedules.pipeline import Pipeline, named, put, step
from gdn_ir.schedules.sums import everywhere
from gdn_ir.schedules.terms import factors, is_elem, multiply, total


@step
def chain(pipeline: Pipeline, kernel: str) -> Pipeline:
    """In one kernel, (a + b) + (c + d) of tiles -> ((a + b) + c) + d, also under twins: each is added as soon as it is there;
    products last, which are added where they are made. What multiplies rows takes the signs."""
    at = named(pipeline, kernel, "chain")
    p = everywhere(pipeline[at], lambda n, _: _twin_inside(n))
    users = uses(p.nodes())
    once = {n for n, us in users.items() if len(us) == 1}

    def flat(n: Node) -> list[tuple[int, Node]]:
        """As `addends`, but what something else takes too is one."""
        if not is_elem(n, "add", "sub"):
            return [(1, n)]
        second = -1 if n["fn"] == "sub" else 1
        return [(s * t, x) for s, a in ((1, n.args[0]), (second, n.args[1])) for t, x in (flat(a) if a in once else [(1, a)])]
    inner = {x for n in p.nodes() if is_elem(n, "add", "sub") for x in n.args if x in once}

    def positive(sign: int, x: Node) -> tuple[int, Node]:
        """-(e * x) as (-e) * x, e along rows: a product is added to it, and not it taken away from a product."""
        t, fs = factors(x)
        row = next((f for f in fs if f.axes != x.axes), None)
        if sign * t > 0 or row is None:
            return sign, x
        rest = list(fs)
        rest.remove(row)                                   # once: it may be there twice
        return 1, multiply([-row, *rest])
    memo: dict[Node, Node] = {}

    def change(old: Node, args: tuple[Node, ...]) -> Node:
        new = old if args == old.args else old.but(args)
        if is_elem(old, "add", "sub") and len(old.axes) > 1 and old not in inner:
            new = total(positive(sign, memo[x]) for sign, x in sorted(flat(old), key=lambda term: _product(term[1])))
        memo[old] = new
        return new
    return put(pipeline, at, p.rebuild(change))


def _product(n: Node) -> bool:
    return n.op is Op.DOT or (n.op is Op.TWIN and _product(n.args[0]))


def _twin_inside(n: Node) -> Node | None:
    """The twin of a sum of tiles as the sum of their twins."""
    x = n.args[0] if n.op is Op.TWIN else n
    if x is n or len(x.axes) < 2 or not is_elem(x, "add", "sub", "neg", "mul"):
        return None
    axis, both = n["axis"], {n["axis"], twin(n["axis"])}
    if any(both <= {*y.axes} for y in x.args):             # a tile that would lie the other way
        return None
    return x.but(tuple(y.twin(axis) if both & {*y.axes} else y for y in x.args))
