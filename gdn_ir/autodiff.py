"""Reverse mode over the language: the backward program is derived from the forward one, never written.

One rule for each operation (gdn_ir/vjp.py). A scan becomes two: it runs once more, keeping the carries that enter each
iteration, and then a scan in the opposite direction carries their adjoints, computes the body's values again from what was
kept, and writes the gradients of what the body loads. Inside an outer scan both run within its reverse iteration, so that
only the outer carries are kept for a whole sequence. The adjoint of a value named x is named d_x, the copy of u in the scan
that runs again u_again, and each adjoint is noted with the line of the value it belongs to: plans and emitted code speak of
the backward in the forward's words.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from gdn_ir.build import zeros
from gdn_ir.nodes import At, IRError, Node, Op, Rows, Slot, Tensor, Term, Tile, Turn, make, term_scans
from gdn_ir.program import Note, Program, ScanView, only, spread, substitute
from gdn_ir.prune import prune
from gdn_ir.rewrite import simplify
from gdn_ir.verify import verify
from gdn_ir.vjp import VJP, fit

Adjoints = dict[Node, Node]


def backward(program: Program, wrt: Iterable[str] | None = None) -> Program:
    """The program of the gradients. It reads what `program` reads and `d_<name>` for each tensor that writes, and writes
    `d_<name>` for each tensor in `wrt` (all that are read, by default). Raises IRError naming a node without a derivative."""
    wrt = tuple(program.read() if wrt is None else wrt)
    for name in wrt:
        if name not in program.read():
            raise IRError(f"wrt: got {name!r}; {program.name} reads {', '.join(program.read())}")
    d = _Backward(program, frozenset(wrt))
    stores = [r for r in program.roots if r.op is Op.STORE]
    seeds: dict[Node, Node] = {}
    for s in stores:
        _add(seeds, s.args[0], _load_gradient(s))
    effects: list[Node] = []
    leaves = d.pull(seeds, [r for r in program.roots if r.op is Op.SCAN], effects)
    effects += d.stores(leaves, None)
    missing = [n for n in wrt if n not in d.written]
    if missing:
        raise IRError(f"wrt: the loads of {', '.join(missing)} in {program.name} reach no output")
    roots = tuple(effects)
    found = prune(simplify(verify(Program(f"{program.name}_backward", program.grid, roots, d.named(roots)))))
    return replace(found, forward=program)


class _Backward:
    def __init__(self, program: Program, wrt: frozenset[str]) -> None:
        self.program, self.wrt = program, wrt
        self.written: set[str] = set()
        self.notes: dict[Node, Note] = dict(program.notes)
        self.adjoints: dict[Node, str] = {}                # the names that adjoints take, if no other value has them

    # -- one level: values outside of the scans below it

    def pull(self, seeds: Adjoints, scans: Iterable[Node], effects: list[Node]) -> Adjoints:
        """Adjoints of the leaves (loads and carries) of a level, from those of its outputs; scans on the way are reversed,
        and what they do is appended to `effects`."""
        adjoint = dict(seeds)
        order = _level([*seeds, *scans])
        varies = _differentiable(order)
        for n in reversed(order):
            if n.op is Op.SCAN:
                finals = [adjoint.get(make(Op.FINAL, (n,), i=i)) for i in range(len(n["carries"]))]
                for init, a in zip(ScanView.of(n).inits, self.reverse(n, finals, effects), strict=True):
                    _add(adjoint, init, a)
            elif n in adjoint and n.op not in (Op.LOAD, Op.CARRY, Op.FINAL) and n in varies:
                if n.op not in VJP:
                    raise IRError(f"autodiff: no derivative of {self.program.describe(n)}")
                try:
                    pulled = VJP[n.op](n, adjoint[n])
                except IRError as e:
                    raise IRError(f"autodiff: {e}\n  in {self.program.describe(n)}") from e
                self.called(n, adjoint[n])
                for x, part in zip(n.args, pulled, strict=True):
                    if part is not None and x in varies:
                        part = fit(part, x.axes)
                        self.written_at(part, n)
                        _add(adjoint, x, part)
                        self.written_at(adjoint[x], n)
        return {n: adjoint.get(n, zeros(*n.axes)) for n in order if n.op in (Op.LOAD, Op.CARRY)}

    # -- names and lines

    def written_at(self, part: Node, value: Node) -> None:
        """Note that an adjoint comes from the line of a value."""
        if value in self.notes and self.notes[value].lines and part not in self.notes and part.op is not Op.CONST:
            self.notes[part] = Note(None, self.notes[value].lines)
            spread(self.notes, part, self.notes[part], stop=set())

    def called(self, value: Node, adjoint: Node) -> None:
        name = self.notes[value].name if value in self.notes else None
        if name and adjoint.op is not Op.CONST:
            self.adjoints.setdefault(adjoint, f"d_{name}")

    def copied(self, memo: Mapping[Node, Node], suffix: str) -> None:
        """Note copies of values as what they are copies of; names take a suffix."""
        for old, new in memo.items():
            if new is not old and old in self.notes:
                name = self.notes[old].name
                self.notes[new] = Note(name and name + suffix, self.notes[old].lines)

    def named(self, roots: tuple[Node, ...]) -> dict[Node, Note]:
        """The notes of the nodes under the roots, each name given once: to values first, then to gradients that are stored."""
        notes = only(self.notes, roots)
        taken = {note.name for note in notes.values() if note.name}
        everything = only(dict.fromkeys(self.adjoints, Note()), roots)
        for n in everything:
            name = self.adjoints[n]
            old = notes.get(n, Note())
            if old.name is None and name not in taken:
                taken.add(name)
                notes[n] = Note(name, old.lines)
        return notes

    # -- a scan: run it again keeping its carries, then run it backwards

    def reverse(self, node: Node, finals: list[Node | None], effects: list[Node]) -> list[Node]:
        """Adjoints of a scan's inits, from those of its final carries."""
        view = ScanView.of(node)
        carries = {c["name"]: c for c in view.carry_nodes()}
        again, saved = self.keep(view, carries)
        if again is not None:
            effects.append(again)
        body = substitute(view.nexts + view.effects, saved)
        self.copied(body, "")
        entering = [make(Op.CARRY, name=f"d_{name}", scan=view.axis, axes=x.axes)
                    for name, x in zip(view.carries, view.inits, strict=True)]
        self.notes |= {c: Note(c["name"], self.program.lines_of(x)) for c, x in zip(entering, view.nexts, strict=True)}
        seeds: Adjoints = {}
        for x, a in zip(view.nexts, entering, strict=True):
            _add(seeds, body[x], a)
        inner = []
        for e in view.effects:
            if e.op is Op.STORE:
                _add(seeds, body[e].args[0], _load_gradient(e))
            else:
                inner.append(body[e])
        inside: list[Node] = []
        leaves = self.pull(seeds, inner, inside)
        kept = set(saved.values())
        inside += self.stores({n: a for n, a in leaves.items() if n not in kept}, view)
        nexts = [leaves.get(saved[carries[name]], zeros(*x.axes)) if name in carries else zeros(*x.axes)
                 for name, x in zip(view.carries, view.inits, strict=True)]
        inits = [zeros(*x.axes) if a is None else a for x, a in zip(view.inits, finals, strict=True)]
        back = make(Op.SCAN, (*inits, *nexts, *inside), axis=view.axis, chain=view.chain, tile=view.tile,
                    carries=tuple(f"d_{name}" for name in view.carries), reverse=not view.reverse)
        effects.append(back)
        return [make(Op.FINAL, (back,), i=i) for i in range(len(inits))]

    def keep(self, view: ScanView, carries: dict[str, Node]) -> tuple[Node | None, dict[Node, Node]]:
        """The scan once more, storing each carry as it enters; and the loads that stand for the carries afterwards."""
        if not carries:
            return None, {}
        fresh = {c: c.but(name=f"{name}_again") for name, c in carries.items()}
        outer = view.axis == view.chain[0]
        # a whole sequence of them for the outermost scan, one scan's worth inside another's iteration
        where: Term = Slot((view.axis,) if len(view.chain) > 1 else view.chain, view.tile) if outer else Turn(view.axis)
        grid = tuple(g for g in self.program.grid if not (outer and g == "N"))
        places, saves = {}, []
        for name, c in carries.items():
            # X': as many as an inner scan over X has iterations, where X is one place for every chunk there is
            tensor = Tensor(f"{name}_kept", ("X" if outer else f"{view.axis}'", *grid, *c.axes), "f32", temp=True)
            index = (where, *(At(g) for g in grid), *(Tile(a) for a in c.axes))
            saves.append(make(Op.STORE, (fresh[c],), tensor=tensor, index=index, sum=()))
            places[c] = (tensor, index)
        nexts = substitute(view.nexts, fresh)
        self.copied(nexts, "_again")
        again = view.with_parts(carries=tuple(f"{name}_again" for name in view.carries),
                                nexts=tuple(_without_stores(nexts[x]) for x in view.nexts), effects=tuple(saves))
        return again, {c: make(Op.LOAD, (again,), tensor=t, index=index) for c, (t, index) in places.items()}

    def stores(self, leaves: Adjoints, view: ScanView | None) -> list[Node]:
        """Stores of the gradients of the loads of one level, summed over the grid points that share a load."""
        found = []
        for n, a in leaves.items():
            if n.op is not Op.LOAD or n["tensor"].name not in self.wrt or n["tensor"].temp:
                continue
            t, index = n["tensor"], n["index"]
            if view is not None and view.axis not in term_scans(index):
                raise IRError(f"autodiff: a load that every iteration of scan {view.axis} shares needs a carried gradient, "
                              f"which is not derived\n  in {self.program.describe(n)}")
            if t.name in self.written:
                raise IRError(f"autodiff: {t.name} is loaded in two ways; only one gradient can be written\n"
                              f"  in {self.program.describe(n)}")
            self.written.add(t.name)
            a = fit(a, n.axes)
            if a.op is not Op.CONST:                       # its name is the tensor's, whatever else would have that name
                self.adjoints = {x: name for x, name in self.adjoints.items() if name != f"d_{t.name}"} | {a: f"d_{t.name}"}
            own = {x.grid for x in index if isinstance(x, At) and x.share is None}
            own |= {"N"} if any(isinstance(x, Rows | Slot) for x in index) else set()
            found.append(make(Op.STORE, (a,), tensor=replace(t, name=f"d_{t.name}"), index=index,
                              sum=tuple(g for g in self.program.grid if g not in own)))
        return found


def _level(roots: Iterable[Node]) -> list[Node]:
    """The nodes of one level, arguments first; of a scan only what starts it belongs to the level."""
    order: dict[Node, None] = {}

    def visit(n: Node) -> None:
        if n in order:
            return
        for a in (ScanView.of(n).inits if n.op is Op.SCAN else () if n.op is Op.LOAD else n.args):
            visit(a)
        order[n] = None
    for r in roots:
        visit(r)
    return list(order)


def _differentiable(order: list[Node]) -> set[Node]:
    """Nodes that depend on a load, a carry or a scan."""
    found: set[Node] = set()
    for n in order:
        if n.op in (Op.LOAD, Op.CARRY, Op.SCAN, Op.FINAL) or any(a in found for a in n.args):
            found.add(n)
    return found


def _without_stores(node: Node) -> Node:
    """A value, with the scans beneath it rid of what they store."""
    memo: dict[Node, Node] = {}

    def visit(n: Node) -> Node:
        if n not in memo:
            args = tuple(visit(a) for a in n.args)
            new = n if args == n.args else n.but(args)
            memo[n] = ScanView.of(new).with_parts(effects=()) if n.op is Op.SCAN else new
        return memo[n]
    return visit(node)


def _load_gradient(store: Node) -> Node:
    t: Tensor = store["tensor"]
    return make(Op.LOAD, (), tensor=replace(t, name=f"d_{t.name}"), index=store["index"])


def _add(table: Adjoints, node: Node, value: Node) -> None:
    table[node] = table[node] + value if node in table else value
