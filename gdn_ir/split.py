"""Splitting a tile axis over the grid: each block owns some of its coordinates."""
from __future__ import annotations

from dataclasses import replace

from gdn_ir.nodes import IRError, Node, Op
from gdn_ir.program import Program
from gdn_ir.verify import verify


def split(program: Program, axis: str) -> Program:
    """The program with `axis` tiled over the grid (its grid axis is called axis + "#"). Legal iff the axis is parallel: no
    value sums along it, and every store covers it."""
    def refuse(node: Node, why: str) -> IRError:
        return IRError(f"split {axis}: {why}\n  in {program.describe(node)}")
    for n in program.nodes():
        contracted = {Op.DOT: "over", Op.REDUCE: "over", Op.CUMSUM: "axis", Op.TRI_SOLVE: "axis"}.get(n.op)
        if contracted and n[contracted] == axis:
            raise refuse(n, "it is summed over")
        if n.op is Op.STORE and axis not in n.args[0].axes:
            raise refuse(n, "every tile would write this")
    return verify(replace(program, grid=(*program.grid, axis + "#")))
