"""An inverse made of blocks, written out in products."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gdn_ir.build import cast, elem, floordiv, index, product, select, tri_solve
from gdn_ir.nodes import Node, Op, twin
from gdn_ir.program import Program
from gdn_ir.verify import verify


def doubled(program: Program, kept: Callable[[int, int], bool] = lambda block, size: False) -> Program:
    """The program with each inverse that is made of blocks written out: [[A, 0], [-B X A, B]] of blocks A and B, over and over.
    kept: for blocks of so many rows, and so many in all, whether a backend makes the inverse itself.

    Products only ever join two finished blocks. (The product (I - M)(I + M^2)... is exact on paper and ruinous in float32; this
    is not it.)"""
    def change(old: Node, args: tuple[Node, ...]) -> Node | None:
        merges: Any = dict(old.attr).get("merges") if old.op is Op.TRI_SOLVE else None
        if not merges or kept(*merges[:2]):
            return None
        (m, r), a, (block, size, dtype) = args, old["axis"], merges

        def times(x: Node, y: Node) -> Node:
            return cast(product(cast(x, dtype), cast(y, dtype), a), old.type.dtype)
        row, col = index(a), index(twin(a))
        x = tri_solve(m, r, a, block=block) if block > 1 else r
        while block < size:
            same = elem("eq", floordiv(row, 2 * block), floordiv(col, 2 * block))
            below = elem("gt", floordiv(row, block), floordiv(col, block))
            x = x - times(times(x, select(elem("and", same, below), m, 0.0)), x)
            block *= 2
        return x
    made = program.rebuild(change)
    return program if made.roots == program.roots else verify(made)
