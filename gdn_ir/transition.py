"""What an iteration of a scan does to its carry, where that is affine: S' = P S + B. P is derived, as the body's derivative in
the carry: the same body without the addends that need no carry.

Along an axis of the carry that the body contracts (K, of a state [K, V]), P is a matrix: it lies on the axis and its twin. An
axis along which the body only scales stays as it is; one along which nothing differs (V) is gone: its columns move alike.
"""
from __future__ import annotations

from dataclasses import dataclass

from gdn_ir.build import broadcast, eye, select
from gdn_ir.nodes import RUNS_ALONG, IRError, Node, Op, base, make, twin
from gdn_ir.program import Note, Program, ScanView, spread, toposort


@dataclass(frozen=True)
class Transition:
    """carry: what stands for P in the body; init: the identity; step: P after one iteration, the same node as `carry` where an
    iteration leaves the carry as it is but for B. mixed: the axis along which P is a matrix, if there is one. notes: of nodes
    that are new."""
    carry: Node
    init: Node
    step: Node
    mixed: str | None
    notes: dict[Node, Note]


def transition(program: Program, view: ScanView, name: str) -> Transition:
    """The transition of the one carry of a scan, P being carried as `name`. Raises IRError naming the node in which the carry
    does not enter affinely, or along an axis that P cannot have."""
    if len(view.carries) != 1 or not view.carry_nodes():
        raise IRError(f"transition: the scan over {view.axis} must carry one value, it carries "
                      f"{', '.join(view.carries) or 'none'}\n  in {program.describe(view.node)}")
    (carry,) = view.carry_nodes()
    d = _Derived(program, carry)
    extra = (twin(d.mixed),) if d.mixed else ()
    p = make(Op.CARRY, name=name, scan=view.axis, axes=d.over(carry.axes))
    init = broadcast(eye(d.mixed) if d.mixed else 1.0, (*p.axes, *extra))
    step = d.derive(view.nexts[0], p)
    return Transition(p, init, step, d.mixed, d.notes)


class _Derived:
    """Finds which axes P has when it is made; `derive` then makes it."""

    def __init__(self, program: Program, carry: Node) -> None:
        self.program, self.root = program, carry
        self.serial: set[Node] = set()                     # what depends on the carry
        self.notes: dict[Node, Note] = {}
        mixed: dict[str, Node] = {}
        scaled: set[str] = set()
        for n in program.nodes():
            inside = [a for a in n.args if a in self.serial]
            if n is not carry and (not inside or n.op in (Op.SCAN, Op.FINAL, Op.STORE)):
                continue
            self.serial.add(n)
            for a in carry.axes:
                if twin(a) in n.axes or (n.op is Op.TWIN and n["axis"] == base(a)):
                    raise self.refuse(n, f"it lies on {twin(a)}, which the transition needs for itself")
            if n.op in RUNS_ALONG and n[RUNS_ALONG[n.op]] in carry.axes:
                mixed[n[RUNS_ALONG[n.op]]] = n
            if n.op is not Op.ELEM or n["fn"] not in ("add", "sub"):
                scaled |= {x for a in n.args if a not in self.serial for x in a.axes}
        if len(mixed) > 1:
            raise self.refuse(list(mixed.values())[1], f"the transition would be a matrix along {' and '.join(mixed)}")
        self.mixed = next(iter(mixed), None)
        self.gone = {a for a in carry.axes if a not in mixed and a not in scaled}

    def refuse(self, n: Node, why: str) -> IRError:
        return IRError(f"transition: {why}\n  in {self.program.describe(n)}")

    def over(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        """The axes of what takes the place of a value that depends on the carry."""
        extra = {twin(self.mixed)} if self.mixed else set[str]()
        return tuple(sorted({a for a in axes if a not in self.gone} | extra))

    def derive(self, end: Node, p: Node) -> Node:
        memo = {self.root: p}
        for n in toposort([end]):
            if n in self.serial and n is not self.root:
                memo[n] = broadcast(self.linear(n, memo), self.over(n.axes))
                note = self.program.notes.get(n)
                if note:
                    self.notes[memo[n]] = Note(note.name and f"{p['name']}_{note.name}", note.lines)
                    spread(self.notes, memo[n], note, stop=set(memo.values()) | set(n.args))
        return memo[end] if end in memo else broadcast(0.0, p.axes)

    def linear(self, n: Node, memo: dict[Node, Node]) -> Node:
        """The part of a value that is linear in the carry, over what stands for its arguments."""
        at = [i for i, a in enumerate(n.args) if a in self.serial]
        parts = tuple(memo.get(a, a) for a in n.args)
        alone = at[0] if len(at) == 1 else None
        match n.op:
            case Op.BROADCAST:
                return broadcast(parts[0], self.over(n.axes))
            case Op.CAST | Op.TWIN | Op.CUMSUM:
                return n.but(parts)
            case Op.REDUCE if n["fn"] == "sum":
                return n.but(parts)
            case Op.DOT if alone is not None:
                return n.but(parts)
            case Op.TRI_SOLVE if alone == 1:
                return n.but(parts)
            case Op.SELECT if 0 not in at:
                return select(parts[0], *(x if i in at else 0.0 for i, x in enumerate(parts) if i))
            case Op.ELEM if n["fn"] in ("add", "sub"):
                if alone is None:
                    return n.but(parts)
                return -parts[1] if n["fn"] == "sub" and alone == 1 else parts[alone]
            case Op.ELEM if n["fn"] == "neg" or (n["fn"] == "mul" and alone is not None) or (n["fn"] == "div" and alone == 0):
                return n.but(parts)
        raise self.refuse(n, f"it is not affine in {self.root['name']}, which the scan carries")
