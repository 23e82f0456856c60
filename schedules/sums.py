"""Steps that rearrange sums and products, so that there are fewer of them or they suit the machine. The backward needs them:
what reverse mode derives multiplies more than it must.

    factor      dot(e * x, y) = e * dot(x, y), e along rows of x: operands are then as they lie in memory, and equal
    regroup     (a * b + c * d) * D = (a * D) * b + (c * D) * d, where a * D and c * D are computed anyway
    exchange    sum_V(x * dot(a, S)) = sum_K(a * dot(x, S)), where dot(x, S) is computed anyway: saves a product
    symmetric   P k + P^T k = (P + P^T) k: saves a product
    peel        the addends of a value that need no carry, as a value of their own
    turn        a product with a transposed tile, the tile computed lying the other way from its parts
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import reduce

from gdn_ir.analysis import needs
from gdn_ir.build import broadcast, dot, reduce_sum
from gdn_ir.nodes import Node, Op, base, make, twin
from gdn_ir.program import Program, toposort
from gdn_ir.rewrite import constant as constant_of
from gdn_ir.rewrite import simplify
from gdn_ir.schedules.pipeline import Pipeline, find, put, refuse, replace_node, step
from gdn_ir.verify import verify

Term = tuple[int, tuple[Node, ...]]                        # a sign, and factors
Nodes = Mapping[Node, None]                                # all there are, in the program's order: emitted code depends on it


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
    return tuple(_everywhere(p, lambda n, _: _factor(n)) for p in pipeline)


# ---- regroup ----------------------------------------------------------------------------------------------------------------


@step
def regroup(pipeline: Pipeline) -> Pipeline:
    """(a * b + c * d) * D -> (a * D) * b + (c * D) * d, where the program has a * D and c * D already. So a decay's gradient
    uses the gradients of what it decays."""
    return tuple(_everywhere(p, _regrouped) for p in pipeline)


def _everywhere(p: Program, rule: Callable[[Node, Nodes], Node | None]) -> Program:
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
    return tuple(_exchange(p) for p in pipeline)


def _exchange(p: Program) -> Program:
    for d in [n for n in p.nodes() if n.op is Op.DOT]:
        nodes = dict.fromkeys(p.nodes())
        if d in nodes:
            def change(old: Node, args: tuple[Node, ...], d: Node = d, nodes: Nodes = nodes) -> Node | None:
                return _exchanged(old, d, nodes) if args == old.args else None
            new = simplify(p.rebuild(change))
            if d not in set(new.nodes()):
                p = new
    return p


def _exchanged(n: Node, d: Node, nodes: Nodes) -> Node | None:
    """A sum without the product d in it, if n is a sum that can be had from another product."""
    if n.op is not Op.REDUCE or n["fn"] != "sum" or n["over"] not in d.axes:
        return None
    axis, done, parts = n["over"], False, []
    for sign, fs in _terms(n.args[0], axis, d):
        new = _swapped(fs, axis, d, nodes)
        done = done or new is not None
        if new is None:
            inside = [f for f in fs if axis in f.axes]
            new = multiply([reduce_sum(multiply(inside), axis), *(f for f in fs if axis not in f.axes)])
        parts.append((sign, broadcast(new, n.axes)))
    return total(parts) if done else None


def _terms(n: Node, axis: str, d: Node) -> list[Term]:
    """A value as a sum of products, multiplied out where the product d is in one of its addends."""
    if is_elem(n, "neg"):
        return [(-s, fs) for s, fs in _terms(n.args[0], axis, d)]
    if is_elem(n, "add", "sub") and d in set(_near(n)) and all(x.axes == n.axes for x in n.args):
        second = -1 if n["fn"] == "sub" else 1
        return [*_terms(n.args[0], axis, d), *((s * second, fs) for s, fs in _terms(n.args[1], axis, d))]
    if is_elem(n, "mul"):
        return [(s * t, a + b) for s, a in _terms(n.args[0], axis, d) for t, b in _terms(n.args[1], axis, d)]
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
    return tuple(_everywhere(p, lambda n, _: _merged(n)) for p in pipeline)


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


# ---- peel, turn -------------------------------------------------------------------------------------------------------------


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


__all__ = ["addends", "factors", "lying"]
