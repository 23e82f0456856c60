"""Splitting a tile axis over the grid: each block owns some of its coordinates.

Where nothing sums along the axis (V in the forward) the blocks are independent. Where something does (V in the backward:
the gradients of q, k, the decay and beta), each block has a partial sum; that is legal iff all that is done to it up to
the stores is linear, and the stores then sum over the blocks.
"""
from __future__ import annotations

from dataclasses import replace

from gdn_ir.nodes import IRError, Node, Op
from gdn_ir.program import Program
from gdn_ir.verify import verify

WHOLE, PART, SUM = "whole", "part", "partial sum"          # the same in every block; the block's own; to be summed over blocks


def split(program: Program, axis: str) -> Program:
    """The program with `axis` tiled over the grid (its grid axis is called axis + "#"). Raises IRError naming the node
    where a partial sum would enter something that is not linear, or every block would write the same whole value."""
    grid = axis + "#"
    kind = _kinds(program, axis)

    def change(old: Node, args: tuple[Node, ...]) -> Node | None:
        if old.op is not Op.STORE or kind[old.args[0]] == PART:
            return None
        if kind[old.args[0]] == WHOLE:
            raise _refuse(program, axis, old, "every tile would write this")
        return old.but(args, sum=(*old["sum"], grid))
    result = program.rebuild(change)
    return verify(replace(result, grid=(*program.grid, grid)))


def _refuse(program: Program, axis: str, node: Node, why: str) -> IRError:
    return IRError(f"split {axis}: {why}\n  in {program.describe(node)}")


def _kinds(program: Program, axis: str) -> dict[Node, str]:
    """What each value is in one block. Raises IRError where a partial sum is not used linearly."""
    kind: dict[Node, str] = {}
    for n in program.nodes():
        sums = [i for i, a in enumerate(n.args) if kind[a] == SUM]
        kind[n] = PART if axis in n.axes else WHOLE
        over = {Op.DOT: "over", Op.REDUCE: "over", Op.CUMSUM: "axis", Op.TRI_SOLVE: "axis"}.get(n.op)
        if over and n[over] == axis:
            if n.op not in (Op.DOT, Op.REDUCE) or (n.op is Op.REDUCE and n["fn"] != "sum"):
                raise _refuse(program, axis, n, f"it runs along {axis}")
            if sums:
                raise _refuse(program, axis, n, "it multiplies a partial sum by what only a block has")
            kind[n] = SUM
        elif sums and n.op is Op.SCAN:
            raise _refuse(program, axis, n, f"it carries a partial sum over {axis}")
        elif sums and n.op not in (Op.STORE, Op.LOAD):
            if kind[n] == PART or not _linear(n, sums, kind):
                partial = program.describe(n.args[sums[0]])
                raise _refuse(program, axis, n, f"it is not linear in a partial sum over {axis}, {partial}")
            kind[n] = SUM
    return kind


def _linear(n: Node, sums: list[int], kind: dict[Node, str]) -> bool:
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


