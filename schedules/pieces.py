"""Steps that take a value apart, so that its pieces can be placed.

    peel        the addends of a value that need no carry, as a value of their own, which can then be hoisted
    turn        a product with a transposed tile, the tile computed lying the other way from its parts
"""
from __future__ import annotations

from collections.abc import Callable

from gdn_ir.analysis import needs
from gdn_ir.build import broadcast, dot
from gdn_ir.nodes import Node, Op, base, make, twin
from gdn_ir.program import toposort
from gdn_ir.rewrite import constant as constant_of
from gdn_ir.schedules.pipeline import Pipeline, find, put, refuse, replace_node, step
from gdn_ir.schedules.terms import is_elem, total


@step
def peel(pipeline: Pipeline, name: str, constant: str, without: str = "") -> Pipeline:
    """A value's addends that need no carry (or, with `without`, do not read that tensor), as one value (called `constant`),
    which can then be hoisted. Looked for under what is linear too: sums, masks, scales."""
    i, value = find(pipeline, name, "peel")
    p = pipeline[i]
    depends = dict(needs(p))
    if without:
        depends = {}
        for n in p.nodes():
            own = {without} if n.op is Op.LOAD and n["tensor"].name == without else frozenset[str]()
            depends[n] = frozenset(own).union(*(depends[a] for a in n.args))

    def serial(n: Node) -> bool:
        if n not in depends:
            for a in n.args:
                serial(a)
            depends[n] = frozenset[str]().union(*(depends[a] for a in n.args))
        return bool(depends[n])
    parts = spread(value, serial)
    free = [x for x in parts if not serial(x[1])]
    rest = [x for x in parts if serial(x[1])]
    if not free or not rest:
        what = f"reads {without}" if without else "needs a carry"
        raise refuse("peel", p, value, f"{name} is not a sum of what {what} and what does not")
    const = broadcast(total(free), value.axes)
    new = const + total(rest)
    return put(pipeline, i, replace_node(p, value, new).with_note(const, constant, like=value))


def spread(n: Node, serial: Callable[[Node], bool]) -> list[tuple[int, Node]]:
    """A value as two addends (or one), one that needs no carry and one that does: linear operations are applied to each."""
    def two(parts: list[tuple[int, Node]]) -> list[tuple[int, Node]]:
        groups = [[x for x in parts if serial(x[1]) == s] for s in (False, True)]
        return [(1, total(g)) if len(g) > 1 else g[0] for g in groups if g]
    if not serial(n):
        return [(1, n)]
    if is_elem(n, "add", "sub"):
        second = -1 if n["fn"] == "sub" else 1
        parts = [*spread(n.args[0], serial), *((s * second, x) for s, x in spread(n.args[1], serial))]
        return two([(s, broadcast(x, n.axes)) for s, x in parts])
    at = None
    if is_elem(n, "neg") or n.op in (Op.TWIN, Op.BROADCAST) or (n.op is Op.REDUCE and n["fn"] == "sum"):
        at = 0
    elif is_elem(n, "mul") and serial(n.args[0]) != serial(n.args[1]):
        at = 0 if serial(n.args[0]) else 1
    elif n.op is Op.SELECT and constant_of(n.args[2]) == 0.0 and not serial(n.args[0]):
        at = 1
    if at is None:
        return [(1, n)]
    parts = spread(n.args[at], serial)
    return [(s, n.but((*n.args[:at], x, *n.args[at + 1:]))) for s, x in parts] if len(parts) > 1 else [(1, n)]


@step
def turn(pipeline: Pipeline, name: str) -> Pipeline:
    """In a value, dot(x, y, over C) with a computed x on [C, C'] -> dot(x^T, y, over C'), x^T computed from its own parts
    lying the other way: no product has to take a tile transposed that was just computed."""
    i, value = find(pipeline, name, "turn")
    p = pipeline[i]
    memo: dict[Node, Node] = {}
    for old in toposort([value]):
        if any(a not in memo for a in old.args):
            continue
        args = tuple(memo[a] for a in old.args)
        memo[old] = _turned(old) or (old if args == old.args else old.but(args)) if old.op is not Op.SCAN else old
    if memo[value] is value:
        raise refuse("turn", p, value, f"{name} has no product with a computed tile that lies across")
    return put(pipeline, i, replace_node(p, value, memo[value]))


def _turned(n: Node) -> Node | None:
    """TWIN of a tree around such products, without the twin."""
    if n.op is not Op.TWIN:
        return None
    axis, found = n["axis"], False

    def up(x: Node) -> Node:
        nonlocal found
        if x.op is Op.ELEM and twin(axis) in x.axes:
            return x.but(tuple(up(a) for a in x.args))
        if x.op is Op.DOT and x["over"] == axis:
            for m, y in (x.args, x.args[::-1]):
                if m.axes == (axis, twin(axis)) and m.op is not Op.LOAD and twin(axis) not in y.axes:
                    found = True
                    return dot(lying(m, axis), y.twin(axis), over=twin(axis))
        return x.twin(axis) if twin(axis) in x.axes else x
    turned = up(n.args[0])
    return turned if found else None


def lying(n: Node, axis: str) -> Node:
    """n with `axis` and its twin exchanged, in every part of it."""
    t = twin(axis)
    if axis not in n.axes and t not in n.axes:
        return n
    if n.op is Op.INDEX:
        return make(Op.INDEX, axis=twin(n["axis"]))
    if n.op is Op.TWIN and n["axis"] == axis:
        return n.args[0]
    if n.op in (Op.ELEM, Op.SELECT) or (n.op is Op.DOT and base(n["over"]) != axis):
        return n.but(tuple(lying(a, axis) for a in n.args))
    return n.twin(axis)
