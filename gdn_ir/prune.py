"""Dead code: what a program computes and nobody reads. Stores to temporaries that nothing loads, carries that reach neither
an effect nor what a scan hands on, scans left without effects."""
from __future__ import annotations

from gdn_ir.nodes import Node, Op, make
from gdn_ir.program import Program, ScanView, toposort
from gdn_ir.verify import verify


def prune(program: Program) -> Program:
    """The program without what does not reach a store into a tensor that is no temporary."""
    while True:
        smaller = _once(program)
        if smaller == program:
            return verify(program)
        program = smaller


def _once(program: Program) -> Program:
    read = set(program.read())
    finals = {(n.args[0], n["i"]) for n in program.nodes() if n.op is Op.FINAL}
    renamed: dict[Node, dict[int, int]] = {}               # of a scan: the new numbers of the carries that stay

    def dead(effect: Node) -> bool:
        if effect.op is Op.STORE:
            t = effect["tensor"]
            return bool(t.temp) and not t.left and t.name not in read
        return not ScanView.of(effect).effects and not any(scan is effect for scan, _ in finals)

    def change(old: Node, args: tuple[Node, ...]) -> Node | None:
        if old.op is Op.SCAN:
            return _scan(old, args)
        if old.op is Op.FINAL and old.args[0] in renamed:
            return make(Op.FINAL, args, i=renamed[old.args[0]][old["i"]])
        return None

    def _scan(old: Node, args: tuple[Node, ...]) -> Node:
        view, new = ScanView.of(old), ScanView.of(old.but(args))
        effects = [(e, f) for e, f in zip(view.effects, new.effects, strict=True) if not dead(e)]
        live = {i for i in range(len(view.carries)) if (old, i) in finals}
        reached: list[Node] = [e for e, _ in effects]
        while True:
            found = {c["name"] for c in toposort([*reached, *(view.nexts[i] for i in live)]) if c.op is Op.CARRY}
            more = {i for i, name in enumerate(view.carries) if name in found}
            if more <= live:
                break
            live |= more
        kept = sorted(live)
        renamed[old] = {i: j for j, i in enumerate(kept)}
        return new.with_parts(carries=tuple(view.carries[i] for i in kept), inits=tuple(new.inits[i] for i in kept),
                              nexts=tuple(new.nexts[i] for i in kept), effects=tuple(f for _, f in effects))
    result = program.rebuild(change)
    roots = tuple(new for old, new in zip(program.roots, result.roots, strict=True) if not dead(old))
    return Program(result.name, result.grid, roots, {n: note for n, note in result.notes.items() if n in set(toposort(roots))})
