"""What every printer shares: lines of text, the program's line above each statement, names of chunks and axes."""
from __future__ import annotations

from gdn_ir.backends.base import Kernel
from gdn_ir.backends.linearize import Assign, Linear, PLAIN, Loop, Stmt, Style, Table, Write
from gdn_ir.backends.memory import coordinate
from gdn_ir.nodes import At, Node, Op, Rows, Slot
from gdn_ir.program import ScanView

INDENT = "    "


class Printer:
    """Walks the linearizer's statements. A backend says how a loop is written (`loop`) and what stands before the first
    statement; its table of rules says the rest. reserved: names that the backend uses itself."""

    def __init__(self, kernel: Kernel, table: Table, reserved: set[str], style: Style = PLAIN) -> None:
        self.kernel = kernel
        self.axes = sorted({coordinate(kernel, a) for n in kernel.program.nodes() for a in n.axes})
        names = reserved | set(self.axes) | {f"in_{a}" for a in self.axes}
        self.linear = Linear(kernel, table, frozenset(names), style)
        self.lines: list[str] = []
        self.said = ""
        memory = [n for n in kernel.program.nodes() if n.op in (Op.LOAD, Op.STORE)]
        self.terms = [t for n in memory for t in n["index"]]
        self.slots = any(isinstance(t, Slot) and not t.inner for t in self.terms)
        self.outer = {t.chain[-1] for t in self.terms if isinstance(t, Slot) and t.inner}        # scans over segments
        self.rows = [t for t in self.terms if isinstance(t, Rows)]
        self.single = any(t.single for t in self.rows)

    def put(self, depth: int, text: str) -> None:
        self.lines.append(INDENT * depth + text)

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    def say(self, node: Node, depth: int) -> None:
        """The line of the user's program behind the next statements, when it changes."""
        where = self.linear.lines(node)
        text = f"# {where[0]}  {where[0].text}" if where else ""
        if text and text != self.said:
            self.put(depth, text[:150])
            self.said = text

    def block(self, body: list[Stmt], depth: int) -> None:
        for s in body:
            if isinstance(s, Loop):
                self.loop(s, depth)
            else:
                self.say(s.node.args[0] if isinstance(s, Write) else s.node, depth)
                self.statement(s, depth)

    def statement(self, s: Assign | Write, depth: int) -> None:
        text = self.linear.expression(s.node)
        self.put(depth, text if isinstance(s, Write) else f"{s.name} = {text}")

    def loop(self, s: Loop, depth: int) -> None:
        raise NotImplementedError

    # -- where a chunk is

    def shared_heads(self) -> list[tuple[str, str]]:
        """(dimension, the grid axis that indexes it), for each dimension that several grid points share."""
        terms = (*self.terms, *(t for store in self.kernel.sweeps for t in store["index"]))
        return list(dict.fromkeys((t.share, t.grid) for t in terms if isinstance(t, At) and t.share))

    def size_of_group(self, scan: ScanView) -> str:
        """How many members a scan over those of a group steps through, as text."""
        return f"({scan.axis} // {scan.group})"

    def trip(self, scan: ScanView) -> str:
        """The number of the chunk that nested scans have reached, as text (of the segment, for a scan over those)."""
        outer, *inner = scan.chain[:scan.chain.index(scan.axis) + 1]
        at = f"i_{outer}"
        for a in inner:
            at = f"({at} * {self.kernel.extents[a]} + i_{a})"
        return at

    def idle(self, scan: ScanView) -> list[str]:
        """When an inner scan does not run, as texts: in the first, the last iteration of the one around it."""
        if not scan.idle:
            return []
        outer = scan.chain[0]
        span = self.kernel.extents[scan.axis] * self.span(scan)
        texts = {"first": f"i_{outer} == 0", "last": f"(i_{outer} + 1) * {span} >= length"}
        return [texts[x] for x in scan.idle]

    def span(self, scan: ScanView) -> int:
        """Tokens that one iteration of a scan covers."""
        return self.kernel.span(scan)
