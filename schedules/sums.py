"""Steps that rearrange sums and products, so that there are fewer of them. The backward needs them: what reverse mode derives
multiplies more than it must.

    factor      dot(e * x, y) = e * dot(x, y), e along rows of x: operands are then as they lie in memory, and equal
    regroup     (a * b + c * d) * D = (a * D) * b + (c * D) * d, where a * D and c * D are computed anyway
    exchange    sum_V(x * dot(a, S)) = sum_K(a * dot(x, S)), where dot(x, S) is computed anyway: saves a product
    symmetric   P k + P^T k = (P + P^T) k: saves a product
    share       a * b * c and b * d * a as (a * b) * c and (a * b) * d: a block holds fewer tiles at once
"""
from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Union

from gdn_ir.build import broadcast, dot, reduce_sum
from gdn_ir.nodes import Node, Op, base, make
from gdn_ir.program import Program
from gdn_ir.rewrite import simplify
from gdn_ir.schedules.pipeline import Pipeline, named, put, step
from gdn_ir.schedules.terms import Term, addends, factors, is_elem, multiply, total
from gdn_ir.verify import verify

Nodes = Mapping[Node, None]                                # all there are, in the program's order: emitted code depends on it


# ---- factor -----------------------------------------------------------------------------------------------------------------


def _factor(n: Node) -> Node | None:
    if n.op is not Op.DOT:
        return None
    for i, x in enumerate(n.args):
        def again(rest: Node, i: int = i) -> Node:
            return n.but(tuple(rest if j == i else y for j, y in enumerate(n.args)))
        if is_elem(x, "neg"):
            return -again(x.args[0])
        if is_elem(x, "mul"):
            for e, rest in (x.args, x.args[::-1]):
                if n["over"] not in e.axes and rest.axes == x.axes and set(e.axes) < set(x.axes):
                    return e * again(rest)
    return None


@step
def factor(pipeline: Pipeline) -> Pipeline:
    """dot(e * x, y) -> e * dot(x, y), e a number or along the free axis of x alone."""
    return tuple(everywhere(p, lambda n, _: _factor(n)) for p in pipeline)


# ---- regroup ----------------------------------------------------------------------------------------------------------------


@step
def regroup(pipeline: Pipeline) -> Pipeline:
    """(a * b + c * d) * D -> (a * D) * b + (c * D) * d, where the program has a * D and c * D already. So a decay's gradient
    uses the gradients of what it decays."""
    return tuple(everywhere(p, _regrouped) for p in pipeline)


def everywhere(p: Program, rule: Callable[[Node, Nodes], Node | None]) -> Program:
    """The program with a rule, told of all nodes there are, applied until it fits nowhere."""
    while True:
        nodes = dict.fromkeys(p.nodes())

        def change(old: Node, args: tuple[Node, ...], nodes: Nodes = nodes) -> Node | None:
            return rule(old, nodes) if args == old.args else None
        new = simplify(p.rebuild(change))
        if new == p:
            return verify(p)
        p = new


def _regrouped(n: Node, nodes: Nodes) -> Node | None:
    if not is_elem(n, "mul"):
        return None
    for x, D in (n.args, n.args[::-1]):
        parts = addends(x)
        if len(parts) < 2 or D.axes != n.axes:
            continue
        made = [_part_of(sign, part, D, n, nodes) for sign, part in parts]
        if all(made):
            return total([m for m in made if m])
    return None


def _part_of(sign: int, part: Node, D: Node, whole: Node, nodes: Nodes) -> tuple[int, Node] | None:
    """part * D as (a product that exists, D among its factors) * the rest."""
    s, fs = factors(part)
    wanted = Counter([*fs, D])
    best: tuple[int, Node, Counter[Node]] | None = None
    for m in (m for m in nodes if is_elem(m, "mul") and m.axes == whole.axes):
        t, gs = factors(m)
        have = Counter(gs)
        if D in have and have < wanted and (best is None or have.total() > best[2].total()):
            best = (t, m, have)
    if best is None:
        return None
    t, m, have = best
    return sign * s * t, m * multiply((wanted - have).elements())


# ---- exchange ---------------------------------------------------------------------------------------------------------------


@step
def exchange(pipeline: Pipeline) -> Pipeline:
    """sum_V(x * dot(a, S, over K)) -> sum_K(a * dot(x, S, over V)), where the program has dot(x, S, over V) already and nothing
    reads dot(a, S) afterwards: that product is gone."""
    return tuple(without_products(p, _exchanged) for p in pipeline)


def without_products(p: Program, rule: Callable[[Node, Node, Nodes], Node | None]) -> Program:
    """The program without each product that no sum needs any more, once `rule` (sum, product, nodes) makes these of others."""
    for d in [n for n in p.nodes() if n.op is Op.DOT]:
        nodes = dict.fromkeys(p.nodes())
        if d in nodes:
            def change(old: Node, args: tuple[Node, ...], d: Node = d, nodes: Nodes = nodes) -> Node | None:
                return rule(old, d, nodes) if args == old.args else None
            new = simplify(p.rebuild(change))
            if d not in set(new.nodes()):
                p = new
    return p


def _exchanged(n: Node, d: Node, nodes: Nodes) -> Node | None:
    """A sum without the product d in it, if n is a sum that can be had from another product."""
    def other(fs: tuple[Node, ...], axis: str) -> tuple[int, Node] | None:
        new = _swapped(fs, axis, d, nodes)
        return None if new is None else (1, new)
    return by_other_products(n, d, terms_along, other)


def by_other_products(n: Node, d: Node, terms: Callable[[Node, str, Node], list[Term]],
                      other: Callable[[tuple[Node, ...], str], tuple[int, Node] | None]) -> Node | None:
    """A sum along an axis of the product d, as the sum of its `terms`, if one of these can be had from `other` products."""
    if n.op is not Op.REDUCE or n["fn"] != "sum" or n["over"] not in d.axes:
        return None
    axis, done, parts = n["over"], False, []
    for sign, fs in terms(n.args[0], axis, d):
        found = other(fs, axis)
        done = done or found is not None
        if found is None:
            inside = [f for f in fs if axis in f.axes]
            found = 1, multiply([reduce_sum(multiply(inside), axis), *(f for f in fs if axis not in f.axes)])
        parts.append((sign * found[0], broadcast(found[1], n.axes)))
    return total(parts) if done else None


def terms_along(n: Node, axis: str, d: Node) -> list[Term]:
    """A value as a sum of products, multiplied out where the product d is in one of its addends."""
    if is_elem(n, "neg"):
        return [(-s, fs) for s, fs in terms_along(n.args[0], axis, d)]
    if is_elem(n, "add", "sub") and d in set(_near(n)) and all(x.axes == n.axes for x in n.args):
        second = -1 if n["fn"] == "sub" else 1
        return [*terms_along(n.args[0], axis, d), *((s * second, fs) for s, fs in terms_along(n.args[1], axis, d))]
    if is_elem(n, "mul"):
        return [(s * t, a + b) for s, a in terms_along(n.args[0], axis, d) for t, b in terms_along(n.args[1], axis, d)]
    return [(1, (n,))]


def _near(x: Node) -> Iterable[Node]:
    """The operands of a tree of sums and products."""
    if is_elem(x, "add", "sub", "mul", "neg"):
        for a in x.args:
            yield from _near(a)
    else:
        yield x


def _swapped(fs: tuple[Node, ...], axis: str, d: Node, nodes: Nodes) -> Node | None:
    inside = [f for f in fs if axis in f.axes and f is not d]
    if fs.count(d) != 1 or len(inside) != 1:
        return None
    for a, S in (d.args, d.args[::-1]):
        if axis in a.axes or axis not in S.axes:
            continue
        x = inside[0]
        for there in (make(Op.DOT, pair, over=axis) for pair in ((x, S), (S, x)) if axis in x.axes):
            if there in nodes and there.axes == a.axes:
                return multiply([reduce_sum(a * there, d["over"]), *(f for f in fs if f is not d and f is not x)])
    return None


# ---- symmetric --------------------------------------------------------------------------------------------------------------


@step
def symmetric(pipeline: Pipeline) -> Pipeline:
    """dot(P, k, over C') + dot(P^T, k, over C') -> dot(P + P^T, k, over C')."""
    return tuple(everywhere(p, lambda n, _: _merged(n)) for p in pipeline)


def _merged(n: Node) -> Node | None:
    if not is_elem(n, "add"):
        return None
    parts = addends(n)
    for i, (s, x) in enumerate(parts):
        if x.op is not Op.DOT or not x["over"].endswith("'"):
            continue
        for P, k in (x.args, x.args[::-1]):
            t, a = x["over"], base(x["over"])
            if P.axes != (a, t):
                continue
            lying = [make(Op.TWIN, (make(Op.DOT, pair, over=a),), axis=a)
                     for y in (k.args[0] if k.op is Op.TWIN else k.twin(a),) for pair in ((P, y), (y, P))]
            for j, (other, y) in enumerate(parts):
                if other == s and y in lying:
                    rest = [part for m, part in enumerate(parts) if m not in (i, j)]
                    return total([(s, dot(P + P.twin(a), k, over=t)), *rest])
    return None


# ---- share ------------------------------------------------------------------------------------------------------------------


@step
def share(pipeline: Pipeline, kernel: str) -> Pipeline:
    """What elementwise products of a kernel's tiles have in common is multiplied once: the two factors that most of them share,
    as one factor, until no two products share two. What scales rows comes last. Saves what would be held until the last of the
    products is made."""
    at = named(pipeline, kernel, "share")
    p = pipeline[at]
    used = {a for n in p.nodes() if not is_elem(n, "mul", "neg") for a in n.args}
    terms = {n: factors(n) for n in p.nodes() if n in used and is_elem(n, "mul", "neg") and len(n.axes) > 1}
    signs, parts = {n: s for n, (s, _) in terms.items()}, {n: list[Factor](fs) for n, (_, fs) in terms.items()}
    taken = set[Node]()
    while best := _shared(parts):
        for n, fs in parts.items():
            if set(best) <= set(fs):
                rest = list(fs)
                for f in best:
                    rest.remove(f)
                parts[n] = [best, *rest]
                taken.add(n)
    memo: dict[Node, Node] = {}

    def made(f: Factor) -> Node:
        return memo[f] if isinstance(f, Node) else made(f[0]) * made(f[1])

    def change(old: Node, args: tuple[Node, ...]) -> Node:
        new = old if args == old.args else old.but(args)
        if old in taken:
            new = multiply(made(f) for f in parts[old])
            new = new if signs[old] > 0 else -new
        memo[old] = new
        return new
    return put(pipeline, at, p.rebuild(change))


Factor = Union[Node, "tuple[Factor, Factor]"]              # a factor of a product, or two of them as one


def _axes(f: Factor) -> tuple[str, ...]:
    return f.axes if isinstance(f, Node) else _axes(f[0])


def _shared(products: Mapping[Node, list[Factor]]) -> tuple[Factor, Factor] | None:
    """The two factors, tiles both where that can be, that most products share; None where no two do."""
    found: dict[tuple[Factor, Factor], int] = {}
    for n, fs in products.items():
        for a, b in itertools.combinations(dict.fromkeys(fs), 2):
            pair = (a, b) if _axes(a) == n.axes else (b, a)
            if _axes(pair[0]) == n.axes:
                key = next((k for k in (pair, pair[::-1]) if k in found), pair)
                found[key] = found.get(key, 0) + 1
    several = [(count, _axes(a) == _axes(b), (a, b)) for (a, b), count in found.items() if count > 1]
    return max(several, key=lambda x: x[:2])[2] if several else None
