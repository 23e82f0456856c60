"""Steps for what a backward reads of its forward instead of computing it again.

    leave       what a forward's kernels hand to each other is left to the caller, in memory that the caller gives
    given       a backward reads a value that the forward left; what only led to it is dead and falls away

The two meet in names, dtypes and places alone: either may be planned without the other, as long as chunks are as large.
"""
from __future__ import annotations

from dataclasses import replace

from gdn_ir.build import eye, tri_solve
from gdn_ir.nodes import LEFT, IRError, Node, Op, Tensor, make
from gdn_ir.program import Program, ScanView, substitute
from gdn_ir.rewrite import simplify
from gdn_ir.schedules.partition import place_of, scan_of
from gdn_ir.schedules.pipeline import IllegalStep, Pipeline, refuse, replace_node, step
from gdn_ir.verify import verify


@step
def leave(pipeline: Pipeline, *tensors: str) -> Pipeline:
    """Leave temporaries of these names to the caller."""
    def change(old: Node, args: tuple[Node, ...]) -> Node | None:
        if old.op in (Op.LOAD, Op.STORE) and old["tensor"].name in tensors:
            return old.but(args, tensor=replace(old["tensor"], temp=LEFT))
        return None
    there = {t.name for p in pipeline for t in p.tensors().values() if t.temp}
    missing = [n for n in tensors if n not in there]
    if missing:
        raise IllegalStep(f"leave: no kernel has a temporary named {missing[0]!r}; there are {', '.join(sorted(there))}")
    return tuple(verify(p.rebuild(change)) for p in pipeline)


@step
def given(pipeline: Pipeline, name: str, dtype: str = "io", solves: str = "") -> Pipeline:
    """Read a value that the forward left, in `dtype`, wherever a kernel computes it: what the forward calls `name`; what it
    carries by that name, as it enters each chunk; or, with `solves`, the inverse that solves for the value of that name. Legal
    iff it is what the forward computes, once what the forward carries is read back. Where no kernel computes it, there is
    nothing to do."""
    forward = next((p.forward for p in pipeline if p.forward), None)
    if forward is None:
        raise IllegalStep(f"given: {pipeline[0].name} is no backward, to which a forward could leave {name}")
    forward = simplify(forward)
    scans = [ScanView.of(r) for r in forward.roots if r.op is Op.SCAN]
    if len(scans) != 1 or len(scans[0].chain) != 1:
        raise IllegalStep(f"given: {forward.name} is not one scan over chunks")
    if name in scans[0].carries:
        return _entering(pipeline, forward, scans[0], name, dtype)
    try:
        want = forward.named(solves or name)
    except IRError as e:
        raise IllegalStep(f"given: {e}") from e
    if solves:
        if want.op is not Op.TRI_SOLVE:
            raise refuse("given", forward, want, f"{solves} is not a triangular solve")
        want = tri_solve(want.args[0], eye(want["axis"]), want["axis"])
    found = []
    for p in pipeline:
        values = [n for n, note in p.notes.items() if note.name == name and n in set(p.nodes()) and n.op is not Op.LOAD]
        for value in values:
            if _read_back(p, scans[0], want) is not value:
                raise refuse("given", p, value, f"it is not what {forward.name} computes as {solves or name}")
            tensor, where = place_of(scan_of("given", p, value), name, value.axes, dtype, LEFT)
            p = replace_node(p, value, make(Op.LOAD, (), tensor=tensor, index=where))
        found.append(verify(p))
    return tuple(found)


def inverse_left(pipeline: Pipeline, tensor: Tensor) -> bool:
    """Whether a tensor is an inverse that the forward left: by a name of which the forward has no value, `given` reads nothing
    else."""
    forward = next((simplify(p.forward) for p in pipeline if p.forward), None)
    stored = any(tensor.name in p.written() for p in pipeline)
    if forward is None or not tensor.left or stored:
        return False
    carries = {c for r in forward.scans() for c in r["carries"]}
    return tensor.name not in carries | {note.name for note in forward.notes.values()}


def _read_back(p: Program, scan: ScanView, value: Node) -> Node:
    """A value of the forward as the backward computes it: of the carries that it reads."""
    loads = {n["tensor"].name: n for n in p.nodes() if n.op is Op.LOAD and n["tensor"].temp}
    kept = {c: loads.get(c["name"], loads.get(f"{c['name']}_kept", c)) for c in scan.carry_nodes()}
    return substitute([value], kept)[value]


def _entering(pipeline: Pipeline, forward: Program, scan: ScanView, name: str, dtype: str) -> Pipeline:
    """The pipeline with a carry of the forward read from what that left. A kernel that ran the forward's scan again and keeps
    nothing else is gone. Legal iff its scan is the forward's."""
    kept = f"{name}_kept"
    at = next((i for i, p in enumerate(pipeline) if kept in p.written()), None)
    if at is None:
        return pipeline
    p = pipeline[at]
    store = next(n for n in p.nodes() if n.op is Op.STORE and n["tensor"].name == kept)
    again = scan_of("given", p, store)
    mine = {c["name"]: c for c in scan.carry_nodes()}
    turns = dict(zip(again.carries, scan.carries, strict=False))
    renamed = substitute((*again.nexts, store.args[0]), {c: mine[turns[c["name"]]] for c in again.carry_nodes()})
    same = [renamed[x] for x in again.nexts] == list(scan.nexts) and again.inits == scan.inits
    if not same or again.reverse != scan.reverse or renamed[store.args[0]] is not mine[name]:
        raise refuse("given", p, store.args[0], f"{p.name} does not carry {name} as {forward.name} does")
    tensor, where = place_of(scan, name, mine[name].axes, dtype, LEFT)
    load = make(Op.LOAD, (), tensor=tensor, index=where)

    def change(old: Node, args: tuple[Node, ...]) -> Node | None:
        return load if old.op is Op.LOAD and old["tensor"].name == kept else None
    left = again.with_parts(effects=tuple(e for e in again.effects if e is not store))
    rest = () if len(p.roots) == 1 and len(again.effects) == 1 else \
        (p.rebuild(lambda n, args: left if n is again.node else None),)
    return tuple(verify(q.rebuild(change)) for q in (*pipeline[:at], *rest, *pipeline[at + 1:]))
