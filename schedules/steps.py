"""The steps a plan is made of: each a legality-checked function from a pipeline of programs to a pipeline of programs.

A pipeline is a tuple of programs run in order, each one kernel; it starts as the traced program alone. A step names
values of the user's program ("u", "o"), does nothing but what exact algebra allows, and refuses with the node's name
and line. What guides a partition is each node's set of carries: one that needs none can be hoisted out of the scan
into a kernel that runs all chunks at once; one that feeds none can be sunk into such a kernel, given saved states.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

from gdn_ir.analysis import needs
from gdn_ir.build import cast, dot, elem, eye, floordiv, index, product, select, tri_solve
from gdn_ir.nodes import REAL, At, IRError, Node, Op, Rows, Slot, Tensor, Term, Tile, make, twin
from gdn_ir.program import Note, Program, ScanView, only, substitute, toposort
from gdn_ir.rewrite import simplify
from gdn_ir.verify import verify

Pipeline = tuple[Program, ...]
Step = Callable[..., Pipeline]
STEPS: dict[str, Step] = {}


class IllegalStep(IRError):
    """A schedule's step that this program does not allow; names the step, the node, its line and why."""


def step(fn: Step) -> Step:
    STEPS[fn.__name__] = fn
    return fn


def apply(program: Program, steps: tuple[tuple[str | int, ...], ...]) -> Pipeline:
    """Run the steps in order; every program is simplified and verified after each."""
    pipeline: Pipeline = (simplify(program),)
    for name, *args in steps:
        if name not in STEPS:
            raise IllegalStep(f"no step {name!r}; there are {', '.join(STEPS)}")
        wanted = inspect.signature(STEPS[str(name)])
        try:
            wanted.bind(pipeline, *args)
        except TypeError:
            names = ", ".join(list(wanted.parameters)[1:])
            raise IllegalStep(f"{name}: got {len(args)} arguments, {args}; accepts ({names})") from None
        pipeline = tuple(simplify(p) for p in STEPS[str(name)](pipeline, *args))
    return pipeline


def find(pipeline: Pipeline, name: str, step: str) -> tuple[int, Node]:
    """The program (the last that has it) and the node of a named value."""
    for i in reversed(range(len(pipeline))):
        try:
            return i, pipeline[i].named(name)
        except IRError:
            continue
    raise IllegalStep(f"{step}: no kernel has a value named {name!r}")


def refuse(step: str, program: Program, node: Node, why: str) -> IllegalStep:
    return IllegalStep(f"{step}: {why}\n  in {program.describe(node)}")


def only_scan(step: str, program: Program) -> ScanView:
    scans = [r for r in program.roots if r.op is Op.SCAN]
    if len(scans) != 1 or len(ScanView.of(scans[0]).chain) != 1:
        raise IllegalStep(f"{step}: {program.name} must have one scan over chunks, it has {len(scans)} (or nested ones)")
    return ScanView.of(scans[0])


def replace_node(program: Program, old: Node, new: Node) -> Program:
    """`new` wherever `old` was, under its name."""
    result = program.rebuild(lambda n, args: new if n is old else None)
    return result.with_note(new, program.name_of(old) or "") if new in set(result.nodes()) else result


# ---- algebra ------------------------------------------------------------------------------------------------------------


def _solve(step: str, pipeline: Pipeline, name: str) -> tuple[int, Program, Node]:
    i, node = find(pipeline, name, step)
    if node.op is not Op.TRI_SOLVE:
        raise refuse(step, pipeline[i], node, f"{name} is not a triangular solve")
    return i, pipeline[i], node


def _set(pipeline: Pipeline, i: int, program: Program) -> Pipeline:
    return (*pipeline[:i], verify(program), *pipeline[i + 1:])


@step
def invert(pipeline: Pipeline, name: str, inverse: str) -> Pipeline:
    """u = (I + M)^-1 r, as the explicit inverse (called `inverse`) and a product with it."""
    i, p, u = _solve("invert", pipeline, name)
    m, r = u.args
    a = u["axis"]
    inv = tri_solve(m, eye(a), a)
    new = dot(inv, r.twin(a), over=twin(a))
    q = replace_node(p, u, new)
    return _set(pipeline, i, q.with_note(inv, inverse, like=new))


@step
def merge(pipeline: Pipeline, inverse: str, size: int, block: int, dtype: str = "tf32") -> Pipeline:
    """The inverse of I + M from those of its diagonal blocks, doubled by [[A, 0], [-B X A, B]] up to `size` rows.

    Products only ever join two finished blocks. (The product (I - M)(I + M^2)... is exact on paper and ruinous in
    float32; this is not it.) The products' operands are rounded to `dtype`.
    """
    i, p, inv = _solve("merge", pipeline, inverse)
    m, r = inv.args
    a = inv["axis"]
    if r is not eye(a) or inv["block"]:
        raise refuse("merge", p, inv, f"{inverse} is not the inverse of a whole I + M; invert the solve first")
    if block < 1 or size % block or (size // block) & (size // block - 1):
        raise refuse("merge", p, inv, f"blocks of {block} do not double up to {size} rows")

    def times(x: Node, y: Node) -> Node:
        return cast(product(cast(x, dtype), cast(y, dtype), a), REAL)
    row, col = index(a), index(twin(a))
    x = tri_solve(m, r, a, block=block) if block > 1 else r
    while block < size:
        same = elem("eq", floordiv(row, 2 * block), floordiv(col, 2 * block))
        below = elem("gt", floordiv(row, block), floordiv(col, block))
        corner = select(elem("and", same, below), m, 0.0)
        x = x - times(times(x, corner), x)
        block *= 2
    return _set(pipeline, i, replace_node(p, inv, x))


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
                return _set(pipeline, i, q.with_note(new, scaled, like=u))
    raise refuse("absorb", p, u, f"{name}'s right operand is not scaled along {u['over']}")


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
    return _set(pipeline, i, q.with_note(const, constant, like=new) if const is not None else q)


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
def move_scales(pipeline: Pipeline) -> Pipeline:
    """dot(x * e, y, over C) -> dot(x, e * y, over C), e on C alone: a loaded x then feeds the product as it lies in memory."""
    def change(old: Node, args: tuple[Node, ...]) -> Node | None:
        if old.op is Op.DOT and args[0].op is Op.ELEM and args[0]["fn"] == "mul":
            for x, e in (args[0].args, args[0].args[::-1]):
                if x.op is Op.LOAD and e.axes == (old["over"],):
                    return dot(x, e * args[1], old["over"])
        return None
    return tuple(verify(p.rebuild(change)) for p in pipeline)


# ---- partition into kernels -------------------------------------------------------------------------------------------------


def _temp(scan: ScanView, name: str, axes: tuple[str, ...], dtype: str) -> tuple[Tensor, tuple[Term, ...]]:
    """Memory for one value of each chunk: a row a token where it lies on the tokens' axis, a slot a chunk where not."""
    on_tokens = scan.tile in axes
    first: Term = Rows(scan.chain, scan.tile) if on_tokens else Slot(scan.chain, scan.tile)
    rest = tuple(a for a in axes if not (on_tokens and a == scan.tile))
    return (Tensor(name, ("T" if on_tokens else "X", "HV", *rest), dtype, temp=True),
            (first, At("HV"), *(Tile(a) for a in rest)))


@step
def hoist(pipeline: Pipeline, name: str, dtype: str = "io", kernel: str = "") -> Pipeline:
    """Compute a value of the scan in a kernel of its own, all chunks at once, and store it. Legal iff it needs no carry.

    Values hoisted into the same `kernel` share it.
    """
    i, value = find(pipeline, name, "hoist")
    p, kernel = pipeline[i], kernel or name
    scan = only_scan("hoist", p)
    if not scan.carries:
        raise refuse("hoist", p, value, f"{name} is in a kernel that runs all chunks at once already")
    needed = needs(p)[value]
    if needed:
        raise refuse("hoist", p, value, f"{name} needs {', '.join(sorted(needed))}, which the scan carries")
    tensor, where = _temp(scan, f"{name}_kept" if name in p.tensors() else name, value.axes, dtype)
    store = make(Op.STORE, (value,), tensor=tensor, index=where, sum=())
    load = make(Op.LOAD, (), tensor=tensor, index=where)
    rest = replace_node(p, value, load)
    for j, earlier in enumerate(pipeline[:i]):
        if earlier.name == kernel:
            view = only_scan("hoist", earlier)
            joined = replace(earlier, roots=(view.with_parts(effects=(*view.effects, store)),),
                             notes={**p.notes, **earlier.notes})
            return _set(_set(pipeline, j, joined), i, rest)
    body = scan.with_parts(carries=(), inits=(), nexts=(), effects=(store,))
    before = Program(kernel, p.grid, (body,), only(p.notes, (body,)))
    return (*pipeline[:i], verify(before), verify(rest), *pipeline[i + 1:])


@step
def sink(pipeline: Pipeline, output: str, keep: str = "", kernel: str = "", dtype: str = "io") -> Pipeline:
    """Store an output from a later kernel, all chunks at once, from states saved by the scan (and the values named in
    `keep`, comma-separated; what is not kept is computed again). Legal iff the output feeds no carry."""
    i, value = find(pipeline, output, "sink")
    p = pipeline[i]
    scan = only_scan("sink", p)
    if value in set(toposort(scan.nexts)):
        raise refuse("sink", p, value, f"{output} feeds {', '.join(scan.carries)}")
    stores = tuple(e for e in scan.effects if e.op is Op.STORE and e.args[0] is value)
    if not stores:
        raise refuse("sink", p, value, f"{output} is not stored, so there is nothing to sink")
    table: dict[Node, Node] = {}
    saves: list[Node] = []
    kept = [p.named(k) for k in keep.split(",") if k]
    for node in (*kept, *(c for c in scan.carry_nodes())):
        name = node["name"] if node.op is Op.CARRY else p.name_of(node) or ""
        tensor, where = _temp(scan, f"{name}_kept" if name in p.tensors() else name, node.axes, dtype)
        saves.append(make(Op.STORE, (node,), tensor=tensor, index=where, sum=()))
        table[node] = make(Op.LOAD, (), tensor=tensor, index=where)
    memo = substitute(stores, table)
    used = set(toposort(memo[s] for s in stores))
    saves = [s for s, node in zip(saves, table, strict=True) if table[node] in used]
    out = scan.with_parts(carries=(), inits=(), nexts=(), effects=tuple(memo[s] for s in stores))
    notes = {memo[n]: note for n, note in p.notes.items() if n in memo}
    after = Program(kernel or output, p.grid, (out,), only(notes, (out,)))
    body = scan.with_parts(effects=(*(e for e in scan.effects if e not in stores), *saves))
    origins = {s: Note(None, p.lines_of(s.args[0])) for s in saves}
    rest = replace(p, notes={**p.notes, **origins}).rebuild(lambda n, args: body if n is scan.node else None)
    return (*pipeline[:i], verify(rest), verify(after), *pipeline[i + 1:])


@step
def name_kernel(pipeline: Pipeline, value: str, kernel: str) -> Pipeline:
    """Call the kernel that computes a value by another name."""
    i, _ = find(pipeline, value, "name_kernel")
    return _set(pipeline, i, replace(pipeline[i], name=kernel))


__all__ = ["STEPS", "IllegalStep", "Pipeline", "apply"]
