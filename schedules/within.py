"""What the transition and the offset of a segment need of each chunk alone (its inverse), computed before them for all chunks
within reach at once. The scan that runs again need not read it: it can make its own, of all chunks.

Chunks in these kernels are counted through their segment; in one of all chunks at once, through their sequence.
"""
from __future__ import annotations

from dataclasses import replace

from gdn_ir.analysis import needs
from gdn_ir.build import elem, select
from gdn_ir.nodes import At, Node, Op, Rows, Slot, Tensor, Term, make
from gdn_ir.program import Program, ScanView
from gdn_ir.schedules.partition import place_of
from gdn_ir.schedules.pipeline import IllegalStep, Pipeline, put, refuse, step
from gdn_ir.schedules.segments import OUTER
from gdn_ir.verify import verify


def inner_scan(cut: Program) -> ScanView:
    """The scan over the chunks of a segment."""
    return next(ScanView.of(s) for s in cut.scans() if s["axis"] != OUTER)


def slot_of(cut: Program) -> tuple[Term, ...]:
    """Where a number of each chunk lies, as that scan says it."""
    inner = inner_scan(cut)
    return (Slot(inner.chain, inner.tile), *map(At, (g for g in cut.grid if g != "N")))


def of_chunks(kernel: str, cut: Program, effects: tuple[Node, ...], where: tuple[Node, ...] = ()) -> Program:
    """A kernel of all chunks at once with effects that could stand in that scan and need no carry. where: a load that says
    which chunks run, if not all do."""
    inner = inner_scan(cut)
    body = inner.with_parts(carries=(), inits=(), nexts=(), effects=effects, reverse=False, idle=(), recent=(), where=where)

    def through_sequence(old: Node, args: tuple[Node, ...]) -> Node | None:
        if old.op is Op.SCAN:
            return old.but(args, chain=inner.chain[1:])
        if old.op not in (Op.LOAD, Op.STORE):
            return None
        index = tuple(replace(t, chain=inner.chain[1:]) if isinstance(t, Rows | Slot) and t.chain == inner.chain else t
                      for t in old["index"])
        return old.but(args, index=index)
    return verify(replace(cut, roots=(body,)).rebuild(through_sequence, kernel))


@step
def hoist_within(pipeline: Pipeline, names: str, dtypes: str, kernel: str) -> Pipeline:
    """Compute values (names, comma-separated, and what each is stored as) that the transition and the offset of segments need
    in a kernel of all chunks within reach at once. Legal iff `forget` found these, and no value needs a carry."""
    wanted = list(zip(names.split(","), dtypes.split(","), strict=False))
    readers = [i for i, p in enumerate(pipeline) if any(ScanView.of(s).recent for s in p.scans())]
    reach = [i for i, p in enumerate(pipeline) if any("within" in s["carries"] for s in p.scans())]
    if not readers or names.count(",") != dtypes.count(","):
        raise IllegalStep(f"hoist_within: got {names} as {dtypes}; accepts a dtype for each name, after the step forget")
    if len(reach) != 1 or any(mark_of(pipeline[reach[0]]).name in p.written() for p in pipeline):
        raise IllegalStep("hoist_within: accepts a plan that cuts one scan into segments, and is used once")
    if any(p.name == kernel for p in pipeline):
        raise IllegalStep(f"hoist_within: there is a kernel {kernel} already")
    cut, taken = pipeline[readers[0]], {t for p in pipeline for t in p.tensors()}
    if twice := taken & set(names.split(",")):
        raise IllegalStep(f"hoist_within: there is a tensor {', '.join(sorted(twice))} already")
    found: dict[str, Node] = {}
    stores: dict[str, Node] = {}
    for i in readers:
        p = pipeline[i]
        table: dict[Node, Node] = {}
        for name, dtype in wanted:
            value = p.named(name)
            if needed := needs(p)[value]:
                raise refuse("hoist_within", p, value, f"{name} needs {', '.join(sorted(needed))}, which the scan carries")
            if found.setdefault(name, value) is not value:
                raise refuse("hoist_within", p, value, f"{cut.name} computes another {name}")
            tensor, index = place_of(inner_scan(p), name, value.axes, dtype)
            stores[name] = make(Op.STORE, (value,), tensor=tensor, index=index, sum=())
            table[value] = make(Op.LOAD, (), tensor=tensor, index=index)
        p = p.rebuild(lambda n, args, table=table: table.get(n))       # type: ignore[misc]
        for load, (name, _) in zip(table.values(), wanted, strict=True):
            p = p.with_note(load, name) if load in set(p.nodes()) else p
        pipeline = put(pipeline, i, p)
    marked = _marked(pipeline[reach[0]])
    mark = make(Op.LOAD, (), tensor=mark_of(marked), index=slot_of(cut))
    first = readers[0]
    before = of_chunks(kernel, cut, tuple(stores.values()), (mark,))
    return (*put(pipeline, reach[0], marked)[:first], before, *pipeline[first:])


def mark_of(reach: Program) -> Tensor:
    """Where it says of each chunk whether it is within reach."""
    grid = tuple(g for g in reach.grid if g != "N")
    return Tensor(f"{reach.name.removesuffix('reach')}near", ("X", *grid), "f32", temp=True)


def _marked(p: Program) -> Program:
    """The kernel reach, marking the chunks that it has counted: in a second scan, for a store among the loads of the first
    would keep each from being read ahead."""
    outer, inner = ScanView.of(p.roots[0]), inner_scan(p)
    counted = make(Op.FINAL, (inner.node,), i=inner.carries.index("within"))
    left = make(Op.CARRY, name="left", scan=inner.axis, axes=())
    mark = make(Op.STORE, (select(elem("gt", left, 0.0), 1.0, 0.0),), tensor=mark_of(p), index=slot_of(p), sum=())
    again = inner.with_parts(carries=("left",), inits=(counted,), nexts=(left - 1.0,), effects=(mark,))
    told = outer.with_parts(effects=(*outer.effects, again))
    return p.rebuild(lambda n, args: told if n is outer.node else None)
