"""Sequences cut into segments of chunks that are scanned all at once: exact, for what a segment does to the state is affine.

    transition  P of each segment: the product of its chunks' transitions
    offset      B of each segment: what it ends with when it starts from zero
    compose     S' = P S + B from segment to segment: with what state each of them starts
    scan        as before, but each segment from its own start, all at once
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from gdn_ir.build import cast, dot, zeros
from gdn_ir.nodes import REAL, At, IRError, Node, Op, Rows, Slot, Tensor, Term, Tile, make, twin
from gdn_ir.program import Note, Program, ScanView, only, substitute, toposort
from gdn_ir.rewrite import constant
from gdn_ir.schedules.pipeline import IllegalStep, Pipeline, put, refuse, step
from gdn_ir.transition import transition

OUTER = "Y"                                                # the scan over segments


@step
def segment(pipeline: Pipeline, name: str, chunks: int, dtype: str = "tf32x3", prefix: str = "") -> Pipeline:
    """Cut the scan that carries `name` into segments of that many chunks (the last of a sequence may be shorter), in four
    kernels. Legal iff it carries nothing else and each iteration's carry is affine in the one before. Products that compose
    segments have operands of `dtype`; what is handed between the kernels is float32. prefix: of the names of the three
    before the scan. A scan in reverse goes through its segments from the last to the first."""
    i, p, view = _carrying(pipeline, name)
    if len(view.chain) > 1 or view.group:
        raise refuse("segment", p, view.node, f"{name} must be carried by one scan over chunks")
    if not isinstance(chunks, int) or chunks < 2:
        raise refuse("segment", p, view.node, f"a segment must have 2 chunks or more, got {chunks}")
    if len(p.roots) != 1 + sum(r.op is Op.STORE for r in p.roots):
        raise refuse("segment", p, view.node, "another scan runs beside it")
    try:
        t = transition(p, view, f"P_{name}")
    except IRError as e:
        raise IllegalStep(f"segment: {e}") from e
    made = [f"{prefix}{x}" for x in ("transition", "offset", "compose")]
    if twice := {p.name for p in pipeline} & set(made):
        raise refuse("segment", p, view.node, f"there is a kernel {', '.join(sorted(twice))} already: name these by a `prefix`")
    cut = Cut(p, view)
    init, (carry,) = view.inits[0], view.carry_nodes()
    moves = t.step is not t.carry                          # P is not the identity
    P, from_P = cut.memory(f"P_{name}", t.carry.axes)
    B, from_B = cut.memory(f"B_{name}", carry.axes)
    entering, start = cut.memory(f"{name}_in", carry.axes)

    # what the last segment to be scanned does to the state matters to its end alone; what the first does to zero, not at all
    first, last = ("last", "first") if view.reverse else ("first", "last")
    ended = any(x.op is Op.FINAL for x in toposort(r for r in p.roots if r is not view.node))
    unread = () if ended else (last,)
    still = (*((first,) if constant(init) == 0.0 else ()), *unread)
    derived = view.with_parts(carries=(t.carry["name"],), inits=(t.init,), nexts=(t.step,), effects=(), idle=still)
    from_zero = view.with_parts(inits=(zeros(*carry.axes),), effects=(), idle=unread)
    before = [cut.at_once(f"{prefix}offset", from_zero, B)]
    if moves:
        before.insert(0, cut.at_once(f"{prefix}transition", derived, P, t.notes))

    S = make(Op.CARRY, name=name, scan=OUTER, axes=carry.axes)
    moved = S
    if moves and t.mixed:
        moved = cast(dot(cast(from_P, dtype), cast(S.twin(t.mixed), dtype), over=twin(t.mixed)), REAL)
    elif moves:
        moved = from_P * S
    enters = make(Op.STORE, (S,), tensor=entering, index=start["index"], sum=())
    composed = cut.outer((enters,), carries=(name,), inits=(init,), nexts=(moved + from_B,))
    ends = {make(Op.FINAL, (view.node,), i=0): make(Op.FINAL, (composed,), i=0)}
    rest = tuple(r for r in p.roots if r is not view.node)
    after = substitute(rest, ends)
    notes = {S: p.notes[carry]} if carry in p.notes else {}
    compose = cut.program(f"{prefix}compose", (composed, *(after[r] for r in rest)), notes)

    inner = cut.inside(view.with_parts(inits=(start,)))
    return put(pipeline, i, *before, compose, cut.program(p.name, (cut.outer((inner,)),)))


def segments(steps: Iterable[tuple[str | int, ...]]) -> int | None:
    """Chunks of a segment in a plan of these steps; None where it cuts none. All that are cut are cut alike."""
    found = {int(s[2]) for s in steps if s[0] == "segment"}
    if len(found) > 1:
        raise IllegalStep(f"segment: all scans of a plan must be cut alike, got segments of "
                          f"{' and '.join(map(str, sorted(found)))} chunks")
    return next(iter(found), None)


def _carrying(pipeline: Pipeline, name: str) -> tuple[int, Program, ScanView]:
    for i, p in enumerate(pipeline):
        for root in p.roots:
            if root.op is Op.SCAN and name in root["carries"]:
                return i, p, ScanView.of(root)
    raise IllegalStep(f"segment: no kernel's scan carries a value named {name!r}")


class Cut:
    """The parts of a program whose scan over chunks is to run inside one over segments."""

    def __init__(self, program: Program, view: ScanView) -> None:
        self.p, self.view = program, view
        self.chain = (OUTER, *view.chain)

    def memory(self, name: str, axes: tuple[str, ...]) -> tuple[Tensor, Node]:
        """A float32 tile for each segment, and the load of it."""
        grid = tuple(g for g in self.p.grid if g != "N")
        index: tuple[Term, ...] = (Slot((OUTER,), self.view.tile, self.view.chain), *map(At, grid), *map(Tile, axes))
        tensor = Tensor(name, (OUTER, *grid, *axes), "f32", temp=True)
        return tensor, make(Op.LOAD, (), tensor=tensor, index=index)

    def outer(self, effects: tuple[Node, ...], carries: tuple[str, ...] = (), inits: tuple[Node, ...] = (),
              nexts: tuple[Node, ...] = ()) -> Node:
        """The scan over segments."""
        return make(Op.SCAN, (*inits, *nexts, *effects), axis=OUTER, chain=self.chain, tile=self.view.tile, carries=carries,
                    reverse=self.view.reverse and bool(carries))

    def inside(self, scan: Node) -> Node:
        """A scan over chunks, as it runs over those of a segment."""
        def change(old: Node, args: tuple[Node, ...]) -> Node | None:
            if old.op is Op.SCAN:
                return old.but(args, chain=self.chain)
            if old.op not in (Op.LOAD, Op.STORE):
                return None
            index = tuple(replace(t, chain=self.chain) if isinstance(t, Rows | Slot) and t.chain == self.view.chain else t
                          for t in old["index"])
            return old.but(args, index=index)
        cut = replace(self.p, roots=(scan,)).rebuild(change)
        self.p = replace(self.p, notes={**self.p.notes, **cut.notes})
        return cut.roots[0]

    def at_once(self, kernel: str, scan: Node, tensor: Tensor, notes: dict[Node, Note] | None = None) -> Program:
        """A kernel of all segments at once, which stores what the scan ends with."""
        self.p = replace(self.p, notes={**self.p.notes, **(notes or {})})
        end = make(Op.FINAL, (self.inside(scan),), i=0)
        index = self.memory(tensor.name, end.axes)[1]["index"]
        return self.program(kernel, (self.outer((make(Op.STORE, (end,), tensor=tensor, index=index, sum=()),)),))

    def program(self, name: str, roots: tuple[Node, ...], notes: dict[Node, Note] | None = None) -> Program:
        return Program(name, self.p.grid, roots, only({**self.p.notes, **(notes or {})}, roots))
