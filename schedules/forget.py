"""What a segment does to a state, from its last chunks alone, where those before them have faded: decided for each segment and
head on the device.

    fade        of each chunk, the logarithm of a bound of the norm of its transition
    reach       of each segment, how many chunks from its end have to be looked at, and the whole bound
    transition  zero where all has faded
    offset      from zero, over the chunks within reach

Of a scan in reverse a segment's end is where that scan leaves it: its first chunks are looked at. An adjoint's transition is
the transpose of the state's, so that the same bounds hold.

A chunk's transition is exp(total) times the product of its tokens' I - beta k k^T, whose norms are max(1, |1 - beta |k|^2|):
not over 1 where keys are normalised, but a caller's may not be, and then a far state can grow however strong the decay.
"""
from __future__ import annotations

from dataclasses import replace

from gdn_ir.build import elem, index, log, maximum, reduce_sum, select, zeros
from gdn_ir.nodes import At, IRError, Node, Op, Slot, Tensor, Term, make
from gdn_ir.program import Program, ScanView, only
from gdn_ir.schedules.partition import parallel
from gdn_ir.schedules.pipeline import IllegalStep, Pipeline, put, refuse, replace_node, step
from gdn_ir.schedules.segments import OUTER
from gdn_ir.schedules.within import inner_scan, of_chunks, slot_of

FADED = 20                 # e^-20 is 2e-9: below what float32 keeps of a sum


@step
def forget(pipeline: Pipeline, name: str, least: int = FADED) -> Pipeline:
    """Leave out of a segment's transition and offset what moves its end by a factor under e^-least. Legal iff the scan that
    carries `name` is cut into segments, and the decay's sum `total`, the products of keys `kk` and `beta` are at hand: in a
    kernel of all chunks at once that stores total, or in the transition itself; then the bounds are made in a kernel `fade`."""
    places = {n: i for n in (f"P_{name}", f"B_{name}") for i, p in enumerate(pipeline) if n in p.written()}
    if len(places) < 2:
        raise IllegalStep(f"forget: {name} is not cut into segments with a transition; there are "
                          f"{', '.join(p.name for p in pipeline)}")
    sums = [i for i, p in enumerate(pipeline) if parallel(p) and "total" in p.written() and not ScanView.of(p.roots[0]).where]
    tensor = Tensor("fade", ("X", "HV"), "f32", temp=True)
    if not sums:
        first, made = min(places.values()), _fade(pipeline[places[f"P_{name}"]], tensor)
        pipeline, places = (*pipeline[:first], made, *pipeline[first:]), {n: j + 1 for n, j in places.items()}
    elif tensor.name not in pipeline[sums[0]].written():   # of another scan's segments: a transpose is of the same norm
        i, before = sums[0], pipeline[sums[0]]
        scan = ScanView.of(before.roots[0])
        fade, where = _bound(before)
        stores = (*scan.effects, make(Op.STORE, (fade,), tensor=tensor, index=where, sum=()))
        pipeline = put(pipeline, i, replace(before, roots=(scan.with_parts(effects=stores),)).with_note(fade, "fade"))
    at = places[f"P_{name}"]
    reach, bound, within = _reach(pipeline[at], tensor, least)
    alive = elem("gt", bound, -float(least))
    for j in places.values():
        p = pipeline[j]
        inner = inner_scan(p)
        if j == at:
            cut = inner.with_parts(inits=(select(alive, inner.inits[0], 0.0),), recent=(select(alive, within, 0.0),))
        else:
            cut = inner.with_parts(recent=(within,))
        pipeline = put(pipeline, j, replace_node(p, inner.node, cut))
    return (*pipeline[:at], reach, *pipeline[at:])


def _bound(p: Program) -> tuple[Node, tuple[Term, ...]]:
    """The logarithm of a bound of the norm of a chunk's transition, and where it is kept."""
    store = next(e for e in ScanView.of(p.roots[0]).effects if e["tensor"].name == "total")
    kk, beta = _named(p, "kk"), _named(p, "beta")
    norms = reduce_sum(select(elem("eq", index("C"), index("C'")), kk, 0.0), "C'")
    return store.args[0] + _growth(beta, norms), store["index"]


def _growth(beta: Node, norms: Node) -> Node:
    """The same without the decay. norms: of a chunk's keys, squared."""
    along = 1.0 - beta * norms                             # what a token does to the part of the state along its key
    return reduce_sum(log(maximum(1.0, maximum(along, -along))), "C")


def _named(p: Program, name: str) -> Node:
    try:
        return p.named(name)
    except IRError as e:
        raise IllegalStep(f"forget: {e}") from e


def _fade(cut: Program, tensor: Tensor) -> Program:
    """The kernel that makes these bounds from what the transition of segments is made of, with one pass over the keys."""
    total, kk, beta = (_named(cut, n) for n in ("total", "kk", "beta"))
    k = kk.args[0]
    if kk.op is not Op.DOT or kk.args[1] is not k.twin("C"):
        raise refuse("forget", cut, kk, "kk is not the product of the keys and themselves")
    fade = total + _growth(beta, reduce_sum(k * k, kk["over"]))
    store = make(Op.STORE, (fade,), tensor=tensor, index=slot_of(cut), sum=())
    return of_chunks("fade", cut.with_note(fade, "fade", like=total), (store,))


def _reach(cut: Program, fade: Tensor, least: int) -> tuple[Program, Node, Node]:
    """The kernel that goes back from each segment's end until all has faded, against the direction of its scan; and its loads:
    of the bound so far and of how many chunks that took."""
    outer, inner = ScanView.of(cut.roots[0]), inner_scan(cut)
    grid = tuple(g for g in cut.grid if g != "N")
    chunk = make(Op.LOAD, (), tensor=fade, index=slot_of(cut))
    index = (Slot((OUTER,), inner.tile, inner.chain[1:]), *map(At, grid))
    names, prefix = ("bound", "within"), cut.name.removesuffix("transition")
    bound, within = (make(Op.CARRY, name=n, scan=inner.axis, axes=()) for n in names)
    more = elem("gt", bound, -float(least))
    nexts = (select(more, bound + chunk, bound), select(more, within + 1.0, within))
    back = inner.with_parts(carries=names, inits=(zeros(), zeros()), nexts=nexts, effects=(), reverse=not inner.reverse,
                            idle=(), recent=())
    kept = [Tensor(prefix + n, (OUTER, *grid), "f32", temp=True) for n in names]
    stores = tuple(make(Op.STORE, (make(Op.FINAL, (back,), i=i),), tensor=t, index=index, sum=()) for i, t in enumerate(kept))
    root = outer.with_parts(effects=stores)
    loads = [make(Op.LOAD, (), tensor=t, index=index) for t in kept]
    return Program(f"{prefix}reach", cut.grid, (root,), only(cut.notes, (root,))), loads[0], loads[1]
