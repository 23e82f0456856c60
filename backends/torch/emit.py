"""Prints a kernel as torch: sizes, which chunks and heads there are, then the statements, for all of the grid at once."""
from __future__ import annotations

from dataclasses import replace

from gdn_ir.backends.base import Kernel, Source, heads
from gdn_ir.backends.linearize import Loop, listed, paren
from gdn_ir.backends.printer import Printer
from gdn_ir.backends.torch.rules import DTYPES, RULES, aligned, load, number
from gdn_ir.nodes import Node, Op, base
from gdn_ir.program import ScanView


def signature(kernel: Kernel) -> list[str]:
    return [*(f"{t.name}_" for t in kernel.tensors()), *(["cu"] if kernel.varlen else []), *kernel.program.params(),
            "T", "N", *heads(kernel)]


class TorchPrinter(Printer):
    def __init__(self, kernel: Kernel) -> None:
        self.batch = list(kernel.program.grid)
        if kernel.parallel:
            self.batch.insert(self.batch.index("N") + 1, kernel.parallel.axis)
        own = {"torch", "n", "t", "rows", "slot", "first", "length", "longest", "batch", "member", "cu", "run", "tokens"}
        super().__init__(kernel, RULES, own | set(signature(kernel)) | {f"i_{a}" for a in (*self.batch, *heads(kernel))})
        double = any(n.type.dtype == "f64" for n in kernel.program.nodes())
        self.linear.rest = DTYPES["f64" if double else "f32"]
        self.any = f"{kernel.tensors()[0].name}_"

    def source(self) -> Source:
        k = self.kernel
        self.put(0, f"def {k.name}({', '.join(signature(k))}):")
        self.prologue()
        self.block(self.linear.body, 1)
        imports = "import torch\n\nfrom gdn_ir.backends.torch import runtime as run\n"
        return Source(k.name, f"{k.header()}{imports}\n\n{self.text()}")

    def prologue(self) -> None:
        """The coordinates of the grid, one batch dimension each, and of the tile's axes."""
        k, rank = self.kernel, len(self.batch)
        self.put(1, f"n, first, length, longest = run.bounds({'cu' if k.varlen else 'None'}, T, N, {rank}, {self.any}.device)")
        if self.rows or self.slots or self.outer:
            self.put(1, f"tokens = {'T' if k.varlen else 'N * T'}")
        sizes = {"N": "N"}
        for i, a in enumerate(self.batch):
            if a == "N":
                continue
            sizes[a] = self.trips(k.parallel) if k.parallel and a == k.parallel.axis else a
            shape = f".reshape(-1, {', '.join(['1'] * (rank - 1 - i))})" if i < rank - 1 else ""
            self.put(1, f"i_{a} = torch.arange({sizes[a]}, device=n.device){shape}")
        for h, grid in self.shared_heads():
            self.put(1, f"i_{h} = i_{grid} // ({grid} // {h})")
        self.put(1, f"batch = {listed([sizes[a] for a in self.batch])}")
        counted = {base(n["axis"]) for n in k.program.nodes() if n.op is Op.INDEX} | {t.tile for t in self.rows if not t.single}
        for a in sorted(counted):
            self.put(1, f"{a} = torch.arange({k.tile(a)}, device=n.device)")
        if k.parallel:
            self.reached(k.parallel, 1)
            self.left_out(k.parallel)

    def left_out(self, scan: ScanView) -> None:
        """Chunks that do not run have no rows, so that nothing of them is stored."""
        asked = scan.asked()
        if asked:
            self.put(1, f"rows = torch.where({load(self.linear, asked)} == 0, 0, rows)")
            if self.rows and not self.single:
                self.put(1, f"in_{scan.tile} = {scan.tile} < rows[..., None]")

    def reached(self, scan: ScanView, depth: int) -> None:
        """At the start of an iteration: of a segment its slot and whether there is one, of a chunk all that is its own."""
        if scan.axis in self.outer:
            size, at = self.span(scan), self.trip(scan)
            self.put(depth, f"in_{scan.axis} = length > {at} * {size}")
            self.put(depth, f"slot_{scan.axis} = (first // {size} + n + {at}).clamp(max=tokens // {size} + N - 1)")
        if scan.axis == scan.chain[-1]:
            self.chunk(scan, depth)

    def chunk(self, scan: ScanView, depth: int) -> None:
        """At the start of a chunk: its tokens, its slot, which of its rows exist."""
        size, at = self.kernel.extents[scan.tile], self.trip(scan)
        self.put(depth, f"rows = length - {at} * {size}")
        if self.single:
            self.put(depth, f"t = (first + {at} * {size}).clamp(max=tokens - 1)")
        elif self.rows:
            column = f"{at}[..., None]" if self.kernel.parallel else at
            self.put(depth, f"t = (first[..., None] + {column} * {size} + {scan.tile}).clamp(max=tokens - 1)")
            self.put(depth, f"in_{scan.tile} = {scan.tile} < rows[..., None]")
        if self.slots:
            self.put(depth, f"slot = (first // {size} + n + {at}).clamp(max=tokens // {size} + N - 1)")

    def loop(self, s: Loop, depth: int) -> None:
        scan = s.scan
        for name, start in zip(s.carries, s.starts, strict=True):
            self.put(depth, f"{name} = {self.tensor(start)}")
        if scan.group:
            self.put(depth, f"for member in range{self.size_of_group(scan)}:")
            self.put(depth + 1, f"i_{scan.axis} = i_{scan.group} * {self.size_of_group(scan)} + member")
        else:
            trips = self.trips(scan)
            self.put(depth, f"for i_{scan.axis} in {f'reversed(range({trips}))' if scan.reverse else f'range({trips})'}:")
            self.reached(scan, depth + 1)
        self.block(s.body, depth + 1)
        if s.carries:
            self.say(scan.nexts[0], depth + 1)
            self.put(depth + 1, f"{', '.join(s.carries)} = {', '.join(self.step(s, scan, i) for i in range(len(s.carries)))}")

    def tensor(self, node: Node) -> str:
        """The value, as a tensor even where it is a number."""
        text = self.linear.text(node)
        return f"torch.tensor({text}, dtype={self.linear.rest}, device=n.device)" if number(node) else text

    def step(self, s: Loop, scan: ScanView, i: int) -> str:
        """The next value of a carry; a sequence that has ended keeps the one it has."""
        node = scan.nexts[i]
        text = self.tensor(node)
        inner = not scan.group and scan.axis != scan.chain[0]
        if not (self.kernel.varlen or inner) or scan.group or text == s.carries[i]:
            return text
        live = f"length > {self.trip(scan)} * {self.span(scan)}"
        rest = [f"~({y})" for y in self.idle(scan)]
        if scan.recent and scan.reverse:                   # its last are the first of the sequence's
            rest.append(f"(i_{scan.axis} < {paren(self.linear.text(scan.recent[0]))})")
        elif scan.recent:
            most, around = self.kernel.extents[scan.axis], replace(scan, axis=scan.chain[scan.chain.index(scan.axis) - 1])
            end = f"(-(-length // {self.span(scan)})).clamp(max=({self.trip(around)} + 1) * {most})"
            rest += [f"({self.trip(scan)} >= {end} - {paren(self.linear.text(scan.recent[0]))})"]
        live = " & ".join(f"({x})" for x in (live, *rest)) if rest else live
        return f"torch.where({aligned(live, (), node.axes)}, {text}, {s.carries[i]})"

    def trips(self, scan: ScanView) -> str:
        if scan.axis != scan.chain[0]:
            return str(self.kernel.extents[scan.axis])
        return f"-(-longest // {self.span(scan)})"


def emit(kernel: Kernel) -> Source:
    return TorchPrinter(kernel).source()


__all__ = ["emit", "number", "signature"]
