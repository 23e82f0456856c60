"""Steps that make of a kernel of all chunks at once one that roles can run.

    products_last    a + dot(p, q) + b = (a + b) + dot(p, q): products are added onto what is there before them
    rows_after       sums along the rows of tiles are stored, and what is made of such alone goes to a kernel after it
    made_again       which makes what inputs' rows give again, so that it need not be kept until then
    walk             a block takes several chunks of a sequence, one after another, and carries nothing
"""
from __future__ import annotations

from dataclasses import replace
from functools import reduce
from operator import add

from gdn_ir.build import reduce_sum
from gdn_ir.nodes import Node, Op, make
from gdn_ir.program import Note, Program, ScanView, only, substitute, toposort, uses
from gdn_ir.schedules.partition import chunks_at_once, parallel, place_of
from gdn_ir.schedules.pipeline import IllegalStep, Pipeline, named, put, refuse, replace_node, step
from gdn_ir.schedules.segments import Cut
from gdn_ir.schedules.terms import is_elem, straight, total
from gdn_ir.verify import verify


def _at_once(pipeline: Pipeline, kernel: str, name: str) -> tuple[int, Program, ScanView]:
    """The kernel of that name, which runs all chunks at once, and its scan."""
    at = named(pipeline, kernel, name)
    p = pipeline[at]
    if not parallel(p) or len(ScanView.of(p.roots[0]).chain) > 1 or len(p.scans()) > 1:
        raise IllegalStep(f"{name}: {kernel} must be one scan, which runs all chunks at once")
    return at, p, ScanView.of(p.roots[0])


@step
def products_last(pipeline: Pipeline, kernel: str) -> Pipeline:
    """In one kernel, sums of tiles with their products last, each along its rows: dot(p, q).twin is a product of twins."""
    at = named(pipeline, kernel, "products_last")
    p = pipeline[at]
    once = {n for n, us in uses(p.nodes()).items() if len(us) == 1}
    inner = {x for n in p.nodes() if is_elem(n, "add") for x in n.args if x in once}

    def flat(n: Node) -> list[Node]:
        return [x for a in n.args for x in (flat(a) if a in once else [a])] if is_elem(n, "add") else [n]

    memo: dict[Node, Node] = {}

    def change(old: Node, args: tuple[Node, ...]) -> Node:
        new = old if args == old.args else old.but(args)
        if is_elem(old, "add") and len(old.axes) > 1 and old not in inner:
            parts = [straight(memo[x]) for x in flat(old)]
            products = [x for x in parts if x.op is Op.DOT]
            rest = [(1, x) for x in parts if x.op is not Op.DOT]
            new = reduce(add, products, total(rest)) if products and rest else new
        memo[old] = new
        return new
    return put(pipeline, at, p.rebuild(change))


@step
def rows_after(pipeline: Pipeline, kernel: str, after: str) -> Pipeline:
    """In one kernel that runs all chunks at once, store each sum along the rows of a tile (row0, row1, ...; of a whole tile
    along its last axis first); outputs that are made of such sums and of rows alone are stored by a kernel `after` it."""
    at, p, scan = _at_once(pipeline, kernel, "rows_after")
    whole = {n: reduce_sum(reduce_sum(n.args[0].args[0], n["over"]), n.args[0]["over"]) for n in p.nodes()
             if _sums(n) and not n.axes and _sums(n.args[0]) and len(n.args[0].args[0].axes) == 2
             and n["over"] == n.args[0].args[0].axes[-1]}
    p = p.rebuild(lambda n, args: whole.get(n))
    scan = ScanView.of(p.roots[0])
    sums = [n for n in p.nodes() if _sums(n) and len(n.args[0].axes) > 1]
    table, saves = {}, []
    for i, n in enumerate(sums):
        tensor, where = place_of(scan, f"row{i}", n.axes, "f32")
        saves.append(make(Op.STORE, (n,), tensor=tensor, index=where, sum=()))
        table[n] = make(Op.LOAD, (), tensor=tensor, index=where)
    memo = substitute(scan.effects, table)
    late = [e for e in scan.effects if all(len(n.axes) < 2 for n in toposort([memo[e]]))]
    if not sums or not late:
        raise refuse("rows_after", p, scan.node, "nothing that it stores is made of sums along rows alone")
    out = chunks_at_once(scan, tuple(memo[e] for e in late))
    notes = {memo[n]: note for n, note in p.notes.items() if n in memo}
    rest = scan.with_parts(effects=(*saves, *(e for e in scan.effects if e not in late)))
    origins = {s: Note(None, p.lines_of(s.args[0])) for s in saves}
    first = replace(p, roots=(rest,), notes=only({**p.notes, **origins}, (rest,)))
    return put(pipeline, at, first, Program(after, p.grid, (out,), only(notes, (out,))))


def _sums(n: Node) -> bool:
    return n.op is Op.REDUCE and n["fn"] == "sum"


@step
def made_again(pipeline: Pipeline, kernel: str, tensor: str) -> Pipeline:
    """In one kernel, compute what it reads of a temporary from what that was made of. Legal iff it was, element by element, of
    rows of inputs as its own are."""
    at = named(pipeline, kernel, "made_again")
    p = pipeline[at]
    loads = [n for n in p.nodes() if n.op is Op.LOAD and n["tensor"].name == tensor]
    stores = [n for q in pipeline[:at] for n in q.nodes() if n.op is Op.STORE and n["tensor"].name == tensor]
    if len(loads) != 1 or len(stores) != 1:
        raise IllegalStep(f"made_again: got {tensor!r}; accepts a temporary that {kernel} reads, of "
                          f"{', '.join(sorted(t.name for t in p.tensors().values() if t.temp and t.name in p.read()))}")
    (load,), (store,), table = loads, stores, {}
    for n in toposort(store.args):
        same = n.op is Op.LOAD and (n["tensor"].dims, n["index"]) == (store["tensor"].dims, store["index"])
        if same and not n["tensor"].temp:
            table[n] = n.but(index=load["index"])
        elif n.op not in (Op.ELEM, Op.CAST, Op.SELECT, Op.CONST, Op.PARAM):
            raise refuse("made_again", p, load, f"{tensor} is not made of inputs' rows alone")
    return put(pipeline, at, verify(replace_node(p, load, substitute(store.args, table)[store.args[0]])))


@step
def walk(pipeline: Pipeline, kernel: str, chunks: int) -> Pipeline:
    """A kernel that runs all chunks at once, in blocks that take so many chunks of a sequence, in order (the last of a sequence
    may be fewer): what is loaded for one is asked for during the one before."""
    at, p, scan = _at_once(pipeline, kernel, "walk")
    if not isinstance(chunks, int) or chunks < 1:
        raise refuse("walk", p, scan.node, f"a block must take a chunk or more, got {chunks}")
    cut = Cut(p, scan)
    return put(pipeline, at, cut.program(kernel, (cut.outer((cut.inside(scan.node),)),)))
