"""Steps that take sums of products from other products that are there, so that a block holds less at once.

    trade       sum_C'(P * dot(q, k)) = sum_K(q * dot(P, k)), where dot(P, k) is computed anyway, P a product of tiles: saves
                products, and tiles that would be held until their sums are made. (P is then as rounded as products' operands.)
    collect     x * sum_K(q * a) + y * sum_K(q * b) = sum_K(q * (x * a + y * b)), where x * a + y * b is there anyway
    in_parts    dot(P, k) = dot(high, k) + dot(low, k), high P as it is rounded and low what that leaves: for what is traded
    diagonal    dot(A, x) = dot(A, high) + low, of an inverse A, whose diagonal is 1: what rounding x takes is not lost
"""
from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

from gdn_ir.build import cast, dot, eye, reduce_sum
from gdn_ir.nodes import REAL, Node, Op, base, twin
from gdn_ir.program import Program, ScanView, substitute, toposort
from gdn_ir.rewrite import constant, simplify
from gdn_ir.schedules.given import inverse_left
from gdn_ir.schedules.pipeline import IllegalStep, Pipeline, named, put, refuse, replace_node, step
from gdn_ir.schedules.sums import Nodes, by_other_products, everywhere, terms_along, without_products
from gdn_ir.schedules.terms import Term, addends, factors, is_elem, multiply, straight, total

# ---- trade ------------------------------------------------------------------------------------------------------------------


@step
def trade(pipeline: Pipeline, kernel: str) -> Pipeline:
    """In one kernel, sum_C'(P * dot(q, k, over K)) -> sum_K(q * dot(P, k, over C')), where the kernel has a product of k with
    the factors of P that lie along C': as `exchange`, with what multiplies rows taken out of all products first. Each of those
    products is then added up, and to what needs it, as soon as it is there, and no tile [C, C'] but P is held."""
    at = named(pipeline, kernel, "trade")
    p = everywhere(pipeline[at], lambda n, _: _rows_out(n))
    return put(pipeline, at, without_products(p, _traded))


def _rows_out(n: Node) -> Node | None:
    """dot(x * e, y) -> e * dot(x, y), e along rows of x alone, wherever it stands among the factors."""
    if n.op is Op.DOT:
        for i, x in enumerate(n.args):
            sign, fs = factors(x)
            rows = [f for f in fs if f.axes and n["over"] not in f.axes and set(f.axes) < set(x.axes)]
            rest = [f for f in fs if f not in rows]
            if rows and rest and multiply(rest).axes == x.axes:
                made = n.but(tuple(multiply(rest) if j == i else y for j, y in enumerate(n.args)))
                return multiply([made if sign > 0 else -made, *rows])
    return None


def _traded(n: Node, d: Node, nodes: Nodes) -> Node | None:
    """A sum over C' (or C) without the product d in it, if n is one that can be had from other products."""
    return by_other_products(n, d, _unmasked, lambda fs, axis: _instead(fs, axis, d, nodes) if d in fs else None)


def _unmasked(n: Node, axis: str, d: Node) -> list[Term]:
    """A value as a sum of products, without a mask around it outside of which each of them is zero anyway."""
    if is_elem(n, "neg"):
        return [(-s, fs) for s, fs in _unmasked(n.args[0], axis, d)]
    if n.op is Op.SELECT and constant(n.args[2]) == 0.0:
        inside = terms_along(n.args[1], axis, d)
        if all(any(_zero_outside(f, n.args[0]) for f in fs) for _, fs in inside):
            return inside
    return terms_along(n, axis, d)


def _zero_outside(f: Node, mask: Node) -> bool:
    """Whether a factor is exp(-inf) where a mask is false."""
    x = f.args[0] if is_elem(f, "exp") else f
    return x is not f and x.op is Op.SELECT and x.args[0] is mask and constant(x.args[2]) == -math.inf


def _instead(fs: tuple[Node, ...], axis: str, d: Node, nodes: Nodes) -> tuple[int, Node] | None:
    """The sum along an axis of these factors, d among them, from another product: of one of d's operands with as many of the
    other factors as there are."""
    rest = Counter(f for f in fs if f is not d)
    best: tuple[int, Node, Node, Counter[Node]] | None = None
    for there in (m for m in nodes if m.op is Op.DOT and m["over"] == axis and m is not d):
        for (x, S), (a, own) in itertools.product((there.args, there.args[::-1]), (d.args, d.args[::-1])):
            sign, gs = factors(x)
            have = Counter(gs)
            left = rest - have
            if S is own and have <= rest and a.axes == there.axes and all(axis not in f.axes for f in left) \
                    and (best is None or have.total() > best[3].total()):
                best = sign, a, there, have
    if best is None or fs.count(d) != 1:
        return None
    sign, a, there, have = best
    return sign, multiply([reduce_sum(a * there, d["over"]), *(rest - have).elements()])


# ---- collect ----------------------------------------------------------------------------------------------------------------


@step
def collect(pipeline: Pipeline, kernel: str) -> Pipeline:
    """In one kernel, x * sum_K(q * a) + y * sum_K(q * b) -> sum_K(q * (x * a + y * b)), where x * a + y * b is a part of a sum
    of tiles that it has anyway: that is added first then, and a and b need not be held apart."""
    at = named(pipeline, kernel, "collect")
    p = everywhere(pipeline[at], lambda n, _: _common(n) or _twin_inside(n))
    while new := _collected(p):
        p = simplify(new)
    return put(pipeline, at, p)


def _common(n: Node) -> Node | None:
    """x * e + y * e -> e * (x + y), for tiles x and y and all that multiplies rows of both."""
    if not is_elem(n, "add", "sub") or len(n.axes) != 2:
        return None
    (s, a), (t, b) = (factors(x) for x in n.args)
    same = Counter(f for f in a if f.axes != n.axes) & Counter(b)
    rest = [list((Counter(fs) - same).elements()) for fs in (a, b)]
    if not same or any(all(f.axes != n.axes for f in fs) for fs in rest):
        return None
    x, y = multiply(rest[0]), multiply(rest[1])
    return multiply([total([(s, x), (t * (-1 if n["fn"] == "sub" else 1), y)]), *same.elements()])


def _twin_inside(n: Node) -> Node | None:
    """The twin of a sum, of tiles or along them, as that of what is twinned."""
    x = n.args[0] if n.op is Op.TWIN else n
    if x is n or not (is_elem(x, "add", "sub", "neg", "mul") or x.op is Op.REDUCE):
        return None
    axis, both = n["axis"], {n["axis"], twin(n["axis"])}
    if any(both <= {*y.axes} for y in x.args):             # a tile that would lie the other way
        return None
    return x.but(tuple(y.twin(axis) if both & {*y.axes} else y for y in x.args))


def _collected(p: Program) -> Program | None:
    """The program with the sums of the parts of one sum of tiles made one, for every sum along rows that has them so."""
    adds = [n for n in p.nodes() if is_elem(n, "add", "sub")]
    inner = {x for n in p.nodes() if is_elem(n, "add", "sub", "neg") for x in n.args}
    scaled = inner | {x for n in p.nodes() if is_elem(n, "mul") for x in n.args}
    rows = {n: _expanded(n) for n in adds if len(n.axes) == 1 and n not in scaled}
    for tile in (n for n in adds if len(n.axes) == 2 and n not in inner):
        parts = [(s * t, fs) for s, x in addends(tile) for t, fs in [factors(x)]]
        for q in dict.fromkeys(q for terms in rows.values() for _, fs in terms for q in _sums_with(fs, tile)):
            groups = [_alike(parts, terms, q, tile) for terms in rows.values()]
            group = max(groups, key=len, default=())
            if len(group) < 2:
                continue
            own = total([(parts[i][0], multiply(parts[i][1])) for i in group])
            rest = [(s, multiply(fs)) for i, (s, fs) in enumerate(parts) if i not in group]
            table = {tile: total([(1, own), *rest])} if rest else {}
            own = own if rest else tile
            for (n, terms), found in zip(rows.items(), groups, strict=True):
                if set(found) == set(group):
                    table[n] = _with_one(terms, [parts[i] for i in group], q, own)
            memo = substitute(p.roots, table)
            notes = {memo.get(n, n): note for n, note in p.notes.items()}
            return replace(p, roots=tuple(memo[r] for r in p.roots), notes=notes)
    return None


def _sums_with(fs: tuple[Node, ...], tile: Node) -> list[Node]:
    """What tiles are multiplied with in the sums among some factors, of tiles like this one."""
    sums = [f.args[0] for f in fs if f.op is Op.REDUCE and f["fn"] == "sum" and f.args[0].axes == tile.axes]
    return [q for x in sums if is_elem(x, "mul") for q in x.args]


def _place(terms: list[Term], part: Term, q: Node) -> tuple[int, int, Counter[Node], str] | None:
    """Of a part of a sum of tiles: which of the terms has the sum of q * its tile, by what more than that part's other factors
    this is multiplied, and along which axis it is."""
    sign, fs = part
    for i, (s, gs) in enumerate(terms):
        for f in gs:
            if f.op is Op.REDUCE and f["fn"] == "sum" and is_elem(f.args[0], "mul") and q in f.args[0].args:
                x = f.args[0].args[1] if f.args[0].args[0] is q else f.args[0].args[0]
                others, more = Counter(fs) - Counter([x]), Counter(gs) - Counter([f])
                if x in fs and others <= more and f["over"] in x.axes:
                    return i, s * sign, more - others, f["over"]
    return None


def _alike(parts: list[Term], terms: list[Term], q: Node, tile: Node) -> tuple[int, ...]:
    """The most parts whose sums with q are all multiplied by the same."""
    places = [_place(terms, part, q) for part in parts]
    groups = [tuple(j for j, other in enumerate(places) if other and place and other[1:] == place[1:]) for place in places]
    return max(groups, key=len, default=())


def _with_one(terms: list[Term], parts: list[Term], q: Node, own: Node) -> Node:
    """A sum along rows in which the terms of some parts are one: of the parts' sum."""
    places = [place for part in parts if (place := _place(terms, part, q))]
    gone, (_, sign, more, over) = {i for i, *_ in places}, places[0]
    left = [(s, multiply(fs)) for i, (s, fs) in enumerate(terms) if i not in gone]
    return total([*left, (sign, multiply([reduce_sum(q * own, over), *more.elements()]))])


def _expanded(n: Node) -> list[Term]:
    """A value along rows, multiplied out."""
    if is_elem(n, "neg"):
        return [(-s, fs) for s, fs in _expanded(n.args[0])]
    if is_elem(n, "add", "sub") and all(x.axes == n.axes for x in n.args):
        second = -1 if n["fn"] == "sub" else 1
        return [*_expanded(n.args[0]), *((s * second, fs) for s, fs in _expanded(n.args[1]))]
    if is_elem(n, "mul"):
        return [(s * t, a + b) for s, a in _expanded(n.args[0]) for t, b in _expanded(n.args[1])]
    return [(1, (n,))]


# ---- in_parts ---------------------------------------------------------------------------------------------------------------


@step
def in_parts(pipeline: Pipeline, kernel: str, dtype: str, carried: str = "") -> Pipeline:
    """In one kernel, products take each tile that it computes of products in two parts, rounded to dtype and what that leaves:
    they have twice its digits then. What is loaded has no more than it was stored with. carried: only those that are added to
    what becomes that carry's next value."""
    at = named(pipeline, kernel, "in_parts")
    scans = [ScanView.of(s) for s in pipeline[at].scans() if carried in s["carries"]]
    if carried and not scans:
        raise IllegalStep(f"in_parts: no scan of {kernel} carries {carried!r}")
    some = {x for scan in scans for _, x in addends(scan.nexts[scan.carries.index(carried)])}

    def parts(x: Node) -> list[Node]:
        if x.op is Op.TWIN:
            return [y.twin(x["axis"]) for y in parts(x.args[0])]
        if all(n.op is not Op.DOT for n in toposort([x])):
            return [x]
        high = cast(cast(x, dtype), REAL)
        return [high, x - high]

    def change(old: Node, args: tuple[Node, ...]) -> Node | None:
        if is_elem(old, "add") and old.args[1].op is Op.DOT and args[1].op is not Op.DOT:
            return total([(1, args[0]), *addends(args[1])])    # each added onto what is there
        if old.op is not Op.DOT or (carried and old not in some):
            return None
        products = [dot(x, y, old["over"]) for x, y in itertools.product(*map(parts, args))]
        return total([(1, x) for x in products[:3]])       # of two in parts, not low times low
    return put(pipeline, at, pipeline[at].rebuild(change))


# ---- diagonal ---------------------------------------------------------------------------------------------------------------


@step
def diagonal(pipeline: Pipeline, kernel: str, name: str, dtype: str) -> Pipeline:
    """In one kernel, the value of that name, a product of an inverse A = (I + M)^-1 and x, as dot(A, high) + low, high x as it
    is rounded to dtype and low what that leaves. A's diagonal, which is 1, takes low as it is; what the rest of A would make of
    it is smaller, and left out."""
    at = named(pipeline, kernel, "diagonal")
    p = pipeline[at]
    u = p.named(name)
    product = straight(u)
    inverses = {n["tensor"].name for q in pipeline for n in q.nodes() if n.op is Op.STORE and _inverse(_itself(n.args[0]))}
    left = _itself(product.args[0])
    read = left.op is Op.LOAD and (left["tensor"].name in inverses or inverse_left(pipeline, left["tensor"]))
    if product.op is not Op.DOT or not (_inverse(left) or read):
        raise refuse("diagonal", p, u, f"{name} is not the product of an inverse")
    A, turned = product.args
    x = turned.twin(base(product["over"]))
    high = cast(cast(x, dtype), REAL)
    new = dot(A, high.twin(base(product["over"])), product["over"])
    return put(pipeline, at, replace_node(p, u, x - high + new))


def _itself(n: Node) -> Node:
    """What a value is but for its dtype and the names of its axes."""
    while n.op in (Op.CAST, Op.TWIN):
        (n,) = n.args
    return n


def _inverse(n: Node) -> bool:
    """Whether a value is the inverse of I + M, M strictly lower."""
    return n.op is Op.TRI_SOLVE and n.args[1] is eye(n["axis"])
