"""Rewrites: exact algebra over the reals, one small rule each, applied until none fits.

Each rule keeps value and type of what it matches; tests check each on random programs that contain its pattern.
"""
from __future__ import annotations

import math
from collections.abc import Callable

import torch

from gdn_ir.build import broadcast, elem, exp, select
from gdn_ir.interp import elementwise
from gdn_ir.nodes import Node, Op, make
from gdn_ir.program import Program
from gdn_ir.verify import verify

Rule = Callable[[Node], Node | None]
SIMPLIFY: dict[str, Rule] = {}


def rule(fn: Rule) -> Rule:
    SIMPLIFY[fn.__name__] = fn
    return fn


def simplify(program: Program, rules: dict[str, Rule] | None = None) -> Program:
    """The program with every rule applied wherever it fits, arguments first."""
    table = SIMPLIFY if rules is None else rules

    def change(old: Node, args: tuple[Node, ...]) -> Node | None:
        node = old if args == old.args else old.but(args)
        return fixpoint(node, table)
    return verify(program.rebuild(change))


def fixpoint(node: Node, table: dict[str, Rule]) -> Node:
    changed = True
    while changed:
        changed = False
        for fits in table.values():
            new = fits(node)
            if new is not None and new is not node:
                assert new.axes == node.axes, (node, new)
                node, changed = new, True
    return node


def _is(n: Node, fn: str) -> bool:
    return n.op is Op.ELEM and n["fn"] == fn


def constant(n: Node) -> float | None:
    """The number a node holds everywhere, if it is a constant spread over axes."""
    if n.op is Op.BROADCAST:
        return constant(n.args[0])
    return n.const


def _like(value: float, n: Node) -> Node:
    return broadcast(value, n.axes)


def _other(n: Node, fn: str, value: float) -> Node | None:
    """x, if n is fn(x, value) or fn(value, x)."""
    if _is(n, fn):
        for a, b in (n.args, n.args[::-1]):
            if constant(b) == value:
                return a
    return None


@rule
def add_zero(n: Node) -> Node | None:
    """x + 0 -> x"""
    x = _other(n, "add", 0.0)
    return None if x is None else broadcast(x, n.axes)


@rule
def sub_zero(n: Node) -> Node | None:
    """x - 0 -> x"""
    return broadcast(n.args[0], n.axes) if _is(n, "sub") and constant(n.args[1]) == 0.0 else None


@rule
def sub_self(n: Node) -> Node | None:
    """x - x -> 0"""
    return _like(0.0, n) if _is(n, "sub") and n.args[0] is n.args[1] else None


@rule
def mul_one(n: Node) -> Node | None:
    """x * 1 -> x"""
    x = _other(n, "mul", 1.0)
    return None if x is None else broadcast(x, n.axes)


@rule
def mul_zero(n: Node) -> Node | None:
    """x * 0 -> 0 (over the reals there is no infinity to spoil it)"""
    return None if _other(n, "mul", 0.0) is None else _like(0.0, n)


@rule
def fold(n: Node) -> Node | None:
    """A function of constants -> its value"""
    if n.op is not Op.ELEM or any(constant(a) is None for a in n.args) or n.type.dtype == "bool":
        return None
    value = float(elementwise(n["fn"], *(torch.tensor(constant(a), dtype=torch.float64) for a in n.args)))
    return None if math.isnan(value) else _like(value, n)


@rule
def sum_of_zeros(n: Node) -> Node | None:
    """cumsum(0), sum(0), dot(0, x), solve(M, 0) -> 0"""
    linear = n.op is Op.CUMSUM or (n.op is Op.REDUCE and n["fn"] == "sum")
    if (linear and constant(n.args[0]) == 0.0) or (n.op is Op.TRI_SOLVE and constant(n.args[1]) == 0.0) \
            or (n.op is Op.DOT and 0.0 in (constant(n.args[0]), constant(n.args[1]))):
        return _like(0.0, n)
    return None


@rule
def solve_without_matrix(n: Node) -> Node | None:
    """solve(0, r) -> r"""
    return n.args[1] if n.op is Op.TRI_SOLVE and constant(n.args[0]) == 0.0 else None


@rule
def twin_of_twin(n: Node) -> Node | None:
    """twin(twin(x)) -> x; the twin of what has neither axis is itself"""
    if n.op is not Op.TWIN:
        return None
    (x,) = n.args
    if n["axis"] not in x.axes and n["axis"] + "'" not in x.axes:
        return x
    if constant(x) is not None:
        return _like(constant(x) or 0.0, n)
    return x.args[0] if x.op is Op.TWIN and x["axis"] == n["axis"] else None


@rule
def twin_of_index(n: Node) -> Node | None:
    """twin(index(C)) -> index(C')"""
    if n.op is Op.TWIN and n.args[0].op is Op.INDEX:
        return make(Op.INDEX, axis=n.axes[0])
    return None


@rule
def broadcast_of_broadcast(n: Node) -> Node | None:
    """broadcast(broadcast(x)) -> broadcast(x)"""
    if n.op is not Op.BROADCAST:
        return None
    (x,) = n.args
    return broadcast(x.args[0], n.axes) if x.op is Op.BROADCAST else x if x.axes == n.axes else None


@rule
def implicit_broadcast(n: Node) -> Node | None:
    """f(broadcast(x), y) -> f(x, y), where the other arguments have the axes already"""
    if n.op not in (Op.ELEM, Op.SELECT):
        return None
    for i, a in enumerate(n.args):
        if a.op is Op.BROADCAST:
            args = (*n.args[:i], a.args[0], *n.args[i + 1:])
            if tuple(sorted({x for b in args for x in b.axes})) == n.axes:
                return n.but(args)
    return None


@rule
def same_branches(n: Node) -> Node | None:
    """select(c, x, x) -> x"""
    return broadcast(n.args[1], n.axes) if n.op is Op.SELECT and n.args[1] is n.args[2] else None


@rule
def masked_exp_of_constant(n: Node) -> Node | None:
    """exp(select(c, a, b)), a and b constants -> select(c, exp(a), exp(b))"""
    if _is(n, "exp") and n.args[0].op is Op.SELECT:
        c, a, b = n.args[0].args
        if constant(a) is not None and constant(b) is not None:
            return select(c, fixpoint(exp(a), SIMPLIFY), fixpoint(exp(b), SIMPLIFY))
    return None


@rule
def mul_by_mask(n: Node) -> Node | None:
    """select(c, 1, 0) * x -> select(c, x, 0)"""
    if _is(n, "mul"):
        for m, x in (n.args, n.args[::-1]):
            if m.op is Op.SELECT and constant(m.args[1]) == 1.0 and constant(m.args[2]) == 0.0:
                return broadcast(select(m.args[0], x, 0.0), n.axes)
    return None


@rule
def masks_meet(n: Node) -> Node | None:
    """select(i > j, x * select(i >= j, y, 0), 0): the outer mask implies the inner -> select(i > j, x * y, 0). Not through exp:
    its argument's mask keeps it finite, which a derivative of the select would need."""
    if n.op is not Op.SELECT or not _is(n.args[0], "gt"):
        return None
    inside = _unmask(n.args[1], elem("ge", *n.args[0].args))
    return None if inside is n.args[1] or not set(n.axes) >= set(inside.axes) else \
        broadcast(select(n.args[0], inside, n.args[2]), n.axes)


def _unmask(x: Node, implied: Node) -> Node:
    if x.op is Op.SELECT and x.args[0] is implied and x.type.axes == x.args[1].type.axes:
        return x.args[1]
    if _is(x, "mul"):
        args = tuple(_unmask(a, implied) for a in x.args)
        return x if args == x.args else elem(x["fn"], *args)
    return x


@rule
def cast_of_cast(n: Node) -> Node | None:
    """cast(cast(x)) -> x, when the inner cast widened and the outer returns"""
    if n.op is Op.CAST and n.args[0].op is Op.CAST:
        x = n.args[0].args[0]
        narrow, wide = n["dtype"], n.args[0]["dtype"]
        if x.type.dtype == narrow and narrow in ("bf16", "f16") and wide in ("f32", "f64"):
            return x
    return None


