"""The step `chain`: sums of tiles one addend after another, so that a block holds less at once.

    chain       (a + b) + (c + d) = ((a + b) + c) + d: what is added need not be held
"""
from __future__ import annotations

from gdn_ir.nodes import Node
from gdn_ir.program import uses
from gdn_ir.schedules.pipeline import Pipeline, named, put, step
from gdn_ir.schedules.terms import factors, is_elem, multiply, total


@step
def chain(pipeline: Pipeline, kernel: str) -> Pipeline:
    """In one kernel, (a + b) + (c + d) of tiles -> ((a + b) + c) + d: each is added as soon as it is there. What
    multiplies rows takes the signs."""
    at = named(pipeline, kernel, "chain")
    p = pipeline[at]
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
            new = total(positive(sign, memo[x]) for sign, x in flat(old))
        memo[old] = new
        return new
    return put(pipeline, at, p.rebuild(change))
