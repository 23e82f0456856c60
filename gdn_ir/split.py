"""Splitting a tile axis over the grid: each block owns some of its coordinates.

Where nothing sums along the axis (V in the forward) the blocks are independent. Where something does (V in the backward:
the gradients of q, k, the decay and beta), each block has a partial sum; that is legal iff all that is done to it up to
the stores is linear, and the stores then sum over the blocks. Several kernels share such sums through memory (`parts`).
"""
from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace

from gdn_ir.build import zeros
from gdn_ir.nodes import RUNS_ALONG, At, IRError, Member, Members, Node, Op, Part, Rows, Slot, Tensor, Term, Tile, make
from gdn_ir.program import Note, Program, ScanView, only, substitute, toposort
from gdn_ir.verify import verify

WHOLE, PART, SUM = "whole", "part", "partial sum"          # the same in every block; the block's own; to be summed over blocks


def split(program: Program, axis: str, partial: Container[str] = ()) -> Program:
    """The program with `axis` tiled over the grid (its grid axis is called axis + "#"). partial: tensors of which a block reads
    its own partial sum. Raises IRError naming the node where a partial sum would enter something that is not linear, or every
    block would write the same whole value."""
    grid = axis + "#"
    kind = _kinds(program, axis, partial)

    def change(old: Node, args: tuple[Node, ...]) -> Node | None:
        if old.op is not Op.STORE or kind[old.args[0]] == PART:
            return None
        if kind[old.args[0]] == WHOLE:
            raise _refuse(program, axis, old, "every tile would write this")
        return old.but(args, sum=(*old["sum"], grid))
    result = program.rebuild(change)
    return verify(replace(result, grid=(*program.grid, grid)))


def parts(pipeline: tuple[Program, ...], axis: str, tiles: Mapping[str, int]) -> tuple[Program, ...]:
    """The pipeline with `axis` tiled over the grid in the kernels named in `tiles` (extents of their tiles), and no store of
    chunks summed over tiles: each block stores its part in float32, in a tensor with one more dimension. A kernel with the same
    tiles reads its own parts; others read sums of them, in order; outputs are summed by one more kernel, called tiles. Raises
    IRError as `split` does, or where sums are over tiles of two sizes."""
    grid = axis + "#"
    made: dict[str, Tensor] = {}
    sums: dict[int, str] = {}                              # sizes of tiles that are summed over, and a kernel of each
    done: list[Program] = []
    totals: list[Node] = []
    notes: dict[Node, Note] = {}
    for p in pipeline:
        tile = tiles.get(p.name)
        own = tile in sums
        q = split(p, axis, made if own else ()) if tile else p

        def change(old: Node, args: tuple[Node, ...], own: bool = own, tile: int | None = tile, p: Program = p) -> Node | None:
            if old.op is Op.LOAD and old["tensor"].name in made:
                index = _widened(old["index"], At(grid) if own else Members())
                return old.but(args, tensor=made[old["tensor"].name], index=index)
            if not tile or old.op is not Op.STORE or old["sum"] != (grid,) or not isinstance(old["index"][0], Rows | Slot):
                return None
            t = old["tensor"]
            sums.setdefault(tile, p.name)
            part = Tensor(f"{t.name}_tiles", _dims(t, old["index"], grid), "f32", temp=True)
            if t.temp:
                made[t.name] = part
            else:
                total = make(Op.LOAD, (), tensor=part, index=_widened(old["index"], Members()))
                totals.append(make(Op.STORE, (total,), tensor=t, index=old["index"], sum=()))
                notes[total] = Note(t.name, p.lines_of(old.args[0]))
            return old.but(args, tensor=part, index=_widened(old["index"], At(grid)), sum=())
        done.append(verify(q.rebuild(change)))
    if len(sums) > 1:
        raise IRError(f"split {axis}: tiles that are summed over must have one size, got " +
                      ", ".join(f"{tile} in {name}" for tile, name in sums.items()))
    if totals:
        scan = next(ScanView.of(r) for p in pipeline for r in p.roots if r.op is Op.SCAN)
        root = scan.with_parts(carries=(), inits=(), nexts=(), effects=tuple(totals), reverse=False)
        done.append(verify(Program("tiles", pipeline[0].grid, (root,), only(notes, (root,)))))
    return tuple(done)


def in_turn(program: Program, axis: str) -> Program:
    """The program, of all chunks at once, with a loop over parts of `axis` in each chunk: a block holds a part of each tile at
    a time. What does not lie along the axis is computed once, sums along it are carried from part to part, and what needs those
    comes after the loop. Raises IRError where a part would need such a sum, for that would be known too late."""
    scan = axis + "#"
    outer = ScanView.of(program.roots[0])
    parts, sums, late = set[Node](), dict[Node, Node](), set[Node]()
    memo: dict[Node, Node] = {}
    for n in toposort(outer.effects):
        if n.op is Op.SCAN:
            raise _refuse(program, axis, n, "a loop over parts holds no other")
        along = n.op in (Op.LOAD, Op.STORE) and any(isinstance(t, Tile) and t.axis == axis for t in n["index"])
        index = {"index": tuple(Part(axis, scan) if t == Tile(axis) else t for t in n["index"])} if along else {}
        memo[n] = n.but(tuple(memo[a] for a in n.args), **index)
        late |= {n} if any(a in sums or a in late for a in n.args) else set()
        if along or any(a in parts for a in n.args):
            if n in late:
                raise _refuse(program, axis, n, f"it needs a sum along all of {axis}")
            if RUNS_ALONG.get(n.op) and n[RUNS_ALONG[n.op]] == axis:
                if n.op is not Op.DOT and (n.op is not Op.REDUCE or n["fn"] != "sum"):
                    raise _refuse(program, axis, n, f"it runs along {axis}")
                sums[n] = make(Op.CARRY, name=f"{scan}{len(sums)}", scan=scan, axes=n.axes)
            elif axis in n.axes or n.op is Op.STORE:
                parts.add(n)
            else:
                raise _refuse(program, axis, n, f"it has lost {axis}")
    own = [e for e in outer.effects if e in parts]
    nexts = [carry + memo[n] for n, carry in sums.items()]
    loop = make(Op.SCAN, (*(zeros(*n.axes) for n in sums), *nexts, *(memo[e] for e in own)), axis=scan, chain=(scan,), tile="",
                carries=tuple(carry["name"] for carry in sums.values()), reverse=False)
    after = {n: make(Op.FINAL, (loop,), i=i) for i, n in enumerate(sums)}
    table = substitute([e for e in outer.effects if e not in parts], after)
    rest = sorted((e for e in outer.effects if e not in parts), key=lambda e: e in late)
    before = [table[e] for e in rest if e not in late]
    root = outer.with_parts(effects=(*before, loop, *(table[e] for e in rest if e in late)))
    notes = {(memo[n] if n in parts else table.get(n, memo[n])): note for n, note in program.notes.items() if n in memo}
    return verify(replace(program, roots=(root,), notes=only(notes, (root,))))


def _place(index: tuple[Term, ...]) -> int:
    """Where the dimension of tiles goes: after that of heads, so that several heads' parts lie one after another."""
    return 1 + max(i for i, t in enumerate(index) if isinstance(t, At | Member | Members | Rows | Slot))


def _widened(index: tuple[Term, ...], term: Term) -> tuple[Term, ...]:
    at = _place(index)
    return (*index[:at], term, *index[at:])


def _dims(tensor: Tensor, index: tuple[Term, ...], dim: str) -> tuple[str, ...]:
    at = _place(index)
    return (*tensor.dims[:at], dim, *tensor.dims[at:])


def _refuse(program: Program, axis: str, node: Node, why: str) -> IRError:
    return IRError(f"split {axis}: {why}\n  in {program.describe(node)}")


def _kinds(program: Program, axis: str, partial: Container[str]) -> dict[Node, str]:
    """What each value is in one block. Raises IRError where a partial sum is not used linearly."""
    kind: dict[Node, str] = {}
    for n in program.nodes():
        sums = [i for i, a in enumerate(n.args) if kind[a] == SUM]
        kind[n] = PART if axis in n.axes else SUM if n.op is Op.LOAD and n["tensor"].name in partial else WHOLE
        over = RUNS_ALONG.get(n.op)
        if over and n[over] == axis:
            if n.op not in (Op.DOT, Op.REDUCE) or (n.op is Op.REDUCE and n["fn"] != "sum"):
                raise _refuse(program, axis, n, f"it runs along {axis}")
            if sums:
                raise _refuse(program, axis, n, "it multiplies a partial sum by what only a block has")
            kind[n] = SUM
        elif sums and n.op is Op.SCAN:
            raise _refuse(program, axis, n, f"it carries a partial sum over {axis}")
        elif sums and n.op not in (Op.STORE, Op.LOAD):
            if kind[n] == PART or not linear(n, sums):
                partial = program.describe(n.args[sums[0]])
                raise _refuse(program, axis, n, f"it is not linear in a partial sum over {axis}, {partial}")
            kind[n] = SUM
    return kind


def linear(n: Node, sums: list[int]) -> bool:
    """Whether a node is linear in the arguments `sums` together."""
    every = len(sums) == len(n.args)
    match n.op:
        case Op.BROADCAST | Op.CAST | Op.TWIN | Op.CUMSUM:
            return True
        case Op.REDUCE:
            return bool(n["fn"] == "sum")
        case Op.DOT:
            return len(sums) == 1
        case Op.TRI_SOLVE:
            return sums == [1]
        case Op.SELECT:
            return 0 not in sums and all(i in sums or _zero(n.args[i]) for i in (1, 2))
        case Op.ELEM:
            return {"add": every, "sub": every, "neg": True, "mul": len(sums) == 1, "div": sums == [0]}.get(n["fn"], False)
    return False


def _zero(n: Node) -> bool:
    return n.const == 0.0 or (n.op is Op.BROADCAST and _zero(n.args[0]))
