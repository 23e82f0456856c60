"""Steps of exact algebra: a value computed another way. How a triangular solve is done, and where its scales go."""
from __future__ import annotations

import math
from functools import reduce
from operator import add

from gdn_ir.analysis import needs
from gdn_ir.build import as_node, dot, elem, eye, tri_solve
from gdn_ir.nodes import Node, Op, make, twin
from gdn_ir.program import Program, ScanView
from gdn_ir.rewrite import constant
from gdn_ir.schedules.pipeline import IllegalStep, Pipeline, find, put, refuse, replace_node, step
from gdn_ir.schedules.terms import addends, total
from gdn_ir.split import linear
from gdn_ir.verify import verify


def _solve(step: str, pipeline: Pipeline, name: str) -> tuple[int, Program, Node]:
    i, node = find(pipeline, name, step)
    if node.op is not Op.TRI_SOLVE:
        raise refuse(step, pipeline[i], node, f"{name} is not a triangular solve")
    return i, pipeline[i], node


@step
def invert(pipeline: Pipeline, name: str, inverse: str) -> Pipeline:
    """u = (I + M)^-1 r, as the explicit inverse (called `inverse`) and a product with it; a transposed solve as a product with
    the same inverse, transposed."""
    i, p, u = _solve("invert", pipeline, name)
    m, r = u.args
    a = u["axis"]
    inv = tri_solve(m, eye(a), a)
    transposed = dict(u.attr).get("transpose")
    new = dot(inv, r, over=a).twin(a) if transposed else dot(inv, r.twin(a), over=twin(a))
    q = replace_node(p, u, new)
    return put(pipeline, i, q.with_note(inv, inverse, like=new))


@step
def merge(pipeline: Pipeline, inverse: str, size: int, block: int, dtype: str = "tf32") -> Pipeline:
    """The inverse of I + M from those of its diagonal blocks, joined two by two up to `size` rows, by products whose operands
    are rounded to `dtype` (`gdn_ir.inverse.doubled` says how)."""
    _, p, inv = _solve("merge", pipeline, inverse)
    m, r = inv.args
    a = inv["axis"]
    if r is not eye(a) or inv["block"]:
        raise refuse("merge", p, inv, f"{inverse} is not the inverse of a whole I + M; invert the solve first")
    if block < 1 or size % block or (size // block) & (size // block - 1):
        raise refuse("merge", p, inv, f"blocks of {block} do not double up to {size} rows")
    x = tri_solve(m, r, a, merges=(block, size, dtype))
    return tuple(verify(replace_node(q, inv, x)) if inv in set(q.nodes()) else q for q in pipeline)


@step
def absorb(pipeline: Pipeline, name: str, scaled: str) -> Pipeline:
    """u = dot(X, e * y), e on the contracted axis alone, as dot(X * e, y): the scale goes into X, now called `scaled`."""
    i, u = find(pipeline, name, "absorb")
    p = pipeline[i]
    if u.op is not Op.DOT:
        raise refuse("absorb", p, u, f"{name} is not a product")
    x, y = u.args
    turned = y["axis"] if y.op is Op.TWIN else None
    inner = y.args[0] if turned else y
    along = (twin(u["over"]),) if turned else (u["over"],)
    if inner.op is Op.ELEM and inner["fn"] == "mul":
        for e, rest in (inner.args, inner.args[::-1]):
            if e.axes == along and set(rest.axes) == set(inner.axes):
                e, rest = (n.twin(turned) if turned else n for n in (e, rest))
                new = x * e
                q = replace_node(p, u, dot(new, rest, u["over"]))
                return put(pipeline, i, q.with_note(new, scaled, like=u))
    raise refuse("absorb", p, u, f"{name}'s right operand is not scaled along {u['over']}")


@step
def base_two(pipeline: Pipeline, name: str) -> Pipeline:
    """exp(x) = exp2(x / ln 2), where x is linear in the elements and the end of a running sum, called `name`: its terms are
    scaled, once, and no x is; hardware has exp2 alone."""
    i, total = find(pipeline, name, "base_two")
    p = pipeline[i]
    if total.op is not Op.CUMSUM:
        raise refuse("base_two", p, total, f"{name} is not a running sum")
    (terms,) = total.args
    scale = 1.0 / math.log(2.0)
    scaled = terms * scale
    memo: dict[Node, Node | None] = {total: total.but((scaled,))}
    summed = {total}                                       # what has the sum in it
    changed = False

    def linear(n: Node) -> Node | None:
        if n not in memo:
            if n.op is Op.REDUCE and n.args == (terms,) and dict(n.attr).get("fn", "sum") == "sum":
                memo[n] = n.but((scaled,))
                summed.add(n)
            elif n.op in (Op.TWIN, Op.BROADCAST) or (n.op is Op.ELEM and n["fn"] in ("add", "sub", "neg")):
                args = [linear(a) for a in n.args]
                memo[n] = n.but(tuple(a for a in args if a is not None)) if None not in args else None
            elif n.op is Op.SELECT:
                yes, no = (linear(a) for a in n.args[1:])
                memo[n] = n.but((n.args[0], yes, no)) if yes is not None and no is not None else None
            elif n.const is not None:
                memo[n] = as_node(n.const * scale)
            else:
                memo[n] = None
            if memo[n] is not None and summed & set(n.args):
                summed.add(n)
        return memo[n]

    def change(old: Node, args: tuple[Node, ...]) -> Node | None:
        nonlocal changed
        x = linear(old.args[0]) if old.op is Op.ELEM and old["fn"] == "exp" else None
        if x is None or old.args[0] not in summed:
            return None
        changed = True
        return elem("exp2", x)
    names = {n: p.name_of(n) for n in p.nodes()}
    q = p.rebuild(change)
    if not changed:
        raise refuse("base_two", p, total, f"no exponential is of a sum of {name}'s elements")
    for old, new in memo.items():
        if new is not None and names.get(old):
            q = q.with_note(new, str(names[old]), like=old)
    return put(pipeline, i, q)


@step
def distribute(pipeline: Pipeline, name: str, constant: str, slope: str) -> Pipeline:
    """u, affine in a carry S, as constant + slope S: neither part needs a carry, so both can be hoisted."""
    i, u = find(pipeline, name, "distribute")
    p = pipeline[i]
    depends = needs(p)
    if len(depends[u]) != 1:
        raise refuse("distribute", p, u, f"{name} must depend on one carry, it depends on {sorted(depends[u]) or 'none'}")
    const, (x, carry, over) = _affine(p, u, depends)
    new = const + dot(x, carry, over=over) if const is not None else dot(x, carry, over=over)
    q = replace_node(p, u, new)
    q = q.with_note(x, slope, like=new)
    return put(pipeline, i, q.with_note(const, constant, like=new) if const is not None else q)


Affine = tuple[Node | None, tuple[Node, Node, str]]


def _affine(p: Program, n: Node, depends: dict[Node, frozenset[str]]) -> Affine:
    """n as c + dot(x, carry): derived by pushing every operation through the sum."""
    def part(n: Node) -> tuple[Node | None, tuple[Node, Node, str] | None]:
        if not depends.get(n):
            return n, None
        if n.op is Op.DOT and n.args[1].op is Op.CARRY and not depends[n.args[0]]:
            return None, (n.args[0], n.args[1], n["over"])
        if n.op is Op.TRI_SOLVE and not depends[n.args[0]]:
            c, s = part(n.args[1])
            return (c if c is None else tri_solve(n.args[0], c, n["axis"], n["block"]),
                    s and (tri_solve(n.args[0], s[0], n["axis"], n["block"]), s[1], s[2]))
        if n.op is Op.TWIN:
            c, s = part(n.args[0])
            return c and c.twin(n["axis"]), s and (s[0].twin(n["axis"]), s[1], s[2])
        if n.op is Op.DOT and not depends[n.args[0]]:
            c, s = part(n.args[1])
            if s and n["over"] in s[0].axes:
                return c and dot(n.args[0], c, n["over"]), (dot(n.args[0], s[0], n["over"]), s[1], s[2])
        if n.op is Op.ELEM and n["fn"] in ("add", "sub"):
            (c, s), (d, t) = part(n.args[0]), part(n.args[1])
            if s is None or t is None:
                sign = n["fn"] == "sub" and t is not None
                slope = s or t
                assert slope is not None
                const = c if d is None else (-d if n["fn"] == "sub" else d) if c is None else elem(n["fn"], c, d)
                return const, (-slope[0], slope[1], slope[2]) if sign else slope
        if n.op is Op.ELEM and n["fn"] == "mul":
            for a, b in (n.args, n.args[::-1]):
                if not depends[a]:
                    c, s = part(b)
                    if s and set(a.axes) <= set(s[0].axes):
                        return c and a * c, (a * s[0], s[1], s[2])
        raise refuse("distribute", p, n, f"is not affine in {', '.join(sorted(depends[n]))} by the rules this step knows")
    const, slope = part(n)
    assert slope is not None
    return const, slope


@step
def accumulate(pipeline: Pipeline, carried: str) -> Pipeline:
    """x + dot(a, b) + dot(c, d), in whatever order a carry's next value has it, as (x + dot(a, b)) + dot(c, d): each product
    can then be added onto what there is before it."""
    for i, p in reversed([*enumerate(pipeline)]):          # as `find` does: the last that has it
        for scan in (ScanView.of(s) for s in p.scans() if carried in s["carries"]):
            last = scan.nexts[scan.carries.index(carried)]
            parts = addends(last)
            products = [x for sign, x in parts if x.op is Op.DOT and sign > 0]
            rest = [part for part in parts if part[1] not in products]
            if products and rest:
                return put(pipeline, i, replace_node(p, last, reduce(add, products, total(rest))))
    raise IllegalStep(f"accumulate: no scan carries {carried!r}, a sum of products and of something else")


@step
def move_scales(pipeline: Pipeline) -> Pipeline:
    """dot(x * e, y, over C) -> dot(x, e * y, over C), e on C alone: a loaded x then feeds the product as it lies in memory."""
    def change(old: Node, args: tuple[Node, ...]) -> Node | None:
        if old.op is Op.DOT and args[0].op is Op.ELEM and args[0]["fn"] == "mul":
            for x, e in (args[0].args, args[0].args[::-1]):
                if x.op is Op.LOAD and e.axes == (old["over"],):
                    return dot(x, e * args[1], old["over"])
        return None
    return tuple(verify(p.rebuild(change)) for p in pipeline)


@step
def scale_last(pipeline: Pipeline, name: str = "scale") -> Pipeline:
    """What is linear in a runtime number of that name, multiplied by it where it leaves the pipeline, and nowhere before: a
    derived backward's gradients, of outputs alone. What kernels carry and hand to each other lacks that factor then, which
    rounding would otherwise see: a bf16 times a scale that is no power of two is no bf16."""
    linear_in = _scaled(pipeline, name)
    if not any(linear_in.values()):
        raise IllegalStep(f"scale_last: nothing is multiplied by {name}")

    def without(p: Program, found: set[Node]) -> Program:
        def change(old: Node, args: tuple[Node, ...]) -> Node | None:
            if old not in found or old.op in (Op.LOAD, Op.CARRY, Op.FINAL):
                return None
            if old.op is Op.PARAM:
                return as_node(1.0)
            if old.op is Op.STORE:
                return None if old["tensor"].temp else old.but((make(Op.PARAM, name=name) * args[0], *args[1:]))
            if not linear(old, [i for i, a in enumerate(old.args) if a in found]):
                raise refuse("scale_last", p, old, f"is not linear in {name}")
            return None
        for scan in map(ScanView.of, p.scans()):
            for carry, init in zip(scan.carry_nodes(), scan.inits, strict=False):
                if carry in found and init not in found and constant(init) != 0.0:
                    raise refuse("scale_last", p, init, f"{carry['name']} starts with what is not multiplied by {name}")
        return verify(p.rebuild(change))
    return tuple(without(p, found) if found else p for p, found in linear_in.items())


def _scaled(pipeline: Pipeline, name: str) -> dict[Program, set[Node]]:
    """Of each program what depends on a runtime number of that name, in whatever kernel before it."""
    tensors, carries, count = set[str](), set[tuple[str, str]](), -1        # carries by kernel: names are of a scan alone
    found = dict[Program, set[Node]]()
    while count != (count := len(tensors) + len(carries)) or not found:
        for p in pipeline:
            here = found[p] = set()
            for n in p.nodes():
                inside = ScanView.of(n.args[0] if n.op is Op.FINAL else n) if n.op in (Op.SCAN, Op.FINAL) else None
                if inside:
                    each = zip(inside.carries, inside.inits, inside.nexts, strict=True)
                    carries |= {(p.name, c) for c, *xs in each if {*xs} & here}
                if (n["name"] == name if n.op is Op.PARAM else (p.name, n["name"]) in carries if n.op is Op.CARRY else
                        (p.name, inside.carries[n["i"]]) in carries if inside and n.op is Op.FINAL else
                        n["tensor"].name in tensors if n.op is Op.LOAD else
                        n.args[0] in here if n.op is Op.STORE else not inside and any(a in here for a in n.args)):
                    here.add(n)
                    tensors |= {n["tensor"].name} if n.op is Op.STORE and n["tensor"].temp else set()
    return found
