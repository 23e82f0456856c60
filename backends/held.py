"""What a block holds while values are placed one after another."""
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from gdn_ir.backends.base import Kernel
from gdn_ir.nodes import Node, Op
from gdn_ir.program import toposort

FREE = (Op.CONST, Op.PARAM, Op.INDEX, Op.VALID)            # written wherever used, however often


class Held:
    """What a block's registers hold while values are placed one after another, in bytes."""

    def __init__(self, kernel: Kernel, users: Mapping[Node, list[Node]]) -> None:
        self.kernel, self._users, self._done = kernel, users, set[Node]()

    def place(self, node: Node) -> None:
        self._done |= set(toposort([node]))

    def after(self, node: Node) -> int:
        """How much is held once a value is placed: all that is placed then and that something later takes, but for products,
        whose operands lie in shared memory."""
        done = self._done | set(toposort([node]))
        return sum(self.size(n) for n in done if any(u not in done and u.op is not Op.DOT for u in self.takers(n)))

    def takers(self, node: Node) -> Iterator[Node]:
        """Who takes a value, itself or as what costs nothing more to hold."""
        for u in self._users.get(node, []):
            if self._thin(u):
                yield from self.takers(u)
            else:
                yield u

    def _thin(self, n: Node) -> bool:
        return n.op in (Op.TWIN, Op.BROADCAST) or (n.op is Op.CAST and width(n) >= width(n.args[0]))

    def size(self, n: Node) -> int:
        if not n.axes or n.op in FREE or self._thin(n) or n.op in (Op.STORE, Op.SCAN):
            return 0
        return math.prod(self.kernel.tile(a) for a in n.axes) * width(n)


def width(n: Node) -> int:
    """Bytes of an element."""
    return {"bool": 0, "bf16": 2, "f16": 2, "f64": 8}.get(str(n.type.dtype), 4)
