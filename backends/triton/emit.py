"""Prints a kernel as Triton: header, helpers, signature, where this block works, then the statements."""
from __future__ import annotations

import re
from dataclasses import replace

from gdn_ir.backends.base import Kernel, Source, heads
from gdn_ir.backends.linearize import Assign, Loop, Write
from gdn_ir.backends.printer import Printer
from gdn_ir.backends.triton.rules import DTYPES, RULES, load, pointer
from gdn_ir.backends.triton.runtime import HELPERS, NEEDS
from gdn_ir.backends.memory import coordinate
from gdn_ir.follow import TOGETHER
from gdn_ir.nodes import At, Node, Op, Part, Tensor, base
from gdn_ir.program import ScanView


def signature(kernel: Kernel) -> list[str]:
    return [*(f"{t.name}_ptr" for t in kernel.tensors()), *(["cu_ptr"] if kernel.varlen else []), *kernel.program.params(),
            "T", "N", *heads(kernel)]


class TritonPrinter(Printer):
    def __init__(self, kernel: Kernel) -> None:
        own = {"tl", "triton", "n", "slot", "t0", "first", "length", "pid", "start", "trips", "middle", "away"}
        super().__init__(kernel, RULES, own | set(signature(kernel)) | {f"i_{h}" for h in heads(kernel)} | set(HELPERS))
        self.slots |= bool(kernel.turns or kernel.counts or kernel.awaits or kernel.clears)

    def source(self) -> Source:
        k = self.kernel
        self.put(0, "@triton.jit(do_not_specialize=[" + ", ".join(repr(s) for s in ("T", "N", *heads(k))) + "])")
        self.put(0, f"def {k.name}({', '.join(signature(k))}):")
        self.prologue()
        self.block(self.linear.body, 1)
        if k.beside and not k.parallel:                    # a serial block takes as long as its kernel: it would wait too early
            self.last_waits("tl.program_id(0)")
        body = self.text()
        used = [h for h in HELPERS if re.search(rf"\b{h}\(", body)]
        used = [h for h in HELPERS if h in used or any(h in NEEDS.get(u, ()) for u in used)]
        header = k.header(f"launched with {k.options}")
        helpers = "".join(HELPERS[h] + "\n" for h in reversed(used))
        return Source(k.name, f"{header}import triton\nimport triton.language as tl\n\n{helpers}\n{body}")

    def prologue(self) -> None:
        """Which tile, head, sequence and chunk this block owns."""
        k, grid = self.kernel, self.kernel.program.grid
        chunk = k.span(k.parallel) if k.parallel else 0    # or a segment of them
        self.put(1, "pid = tl.program_id(0)")
        if k.leads:
            self.put(1, "start_follower()")
        if k.beside and k.parallel:
            self.last_waits("pid")
            ways = {backwards for _, _, backwards in k.awaits}
            if len(ways) == 2 and not k.options.around:
                self.put(1, "middle, away = tl.num_programs(0) // 2, pid // 2  # outwards, for that is where the scans meet")
                self.put(1, "pid = tl.where(pid % 2 == 0, middle + away, middle - 1 - away)")
            elif True in ways and not k.options.around and k.turns:            # points that take turns in their order
                each = " * ".join(a for a in grid if a != "N")
                self.put(1, f"pid = tl.num_programs(0) - ({each}) - pid // ({each}) * ({each}) + pid % ({each})")
            elif True in ways and not k.options.around:
                self.put(1, "pid = tl.num_programs(0) - 1 - pid  # in the order of the scan, which goes backwards")
        for a in reversed([g for g in grid if g != "N"]):
            if a.endswith("#"):
                axis, tile = a[:-1], k.tile(a[:-1])
                count = -(-k.extents[base(axis)] // tile)
                self.put(1, f"start = (pid % {count}) * {tile}")
                self.put(1, f"pid = pid // {count}")
            else:
                self.put(1, f"i_{a} = pid % {a}")
                self.put(1, f"pid = pid // {a}")
        for h, a in self.shared_heads():
            self.put(1, f"i_{h} = i_{a} // ({a} // {h})")
        around = k.options.around and k.parallel is not None
        if around and k.varlen:                            # sequences of one length have as many slots
            tiles = {a: str(-(-k.extents[base(a[:-1])] // k.tile(a[:-1]))) for a in grid if a.endswith("#")}
            self.put(1, f"each = tl.num_programs(0) // ({' * '.join(tiles.get(a, a) for a in grid)})")
            self.put(1, "pid = tl.where(pid < each * N, pid % N * each + pid // N, pid)  # sequences in turn")
        if k.parallel and k.varlen:
            find = "locate_or_tail" if k.owns_tail else "locate"
            self.put(1, f"n, first, length = {find}(pid, cu_ptr, T, N, {chunk})")
            self.put(1, f"i_{k.parallel.axis} = (pid - first // {chunk} - n).to(tl.int32)")
            self.put(1, f"if i_{k.parallel.axis} < 0 or i_{k.parallel.axis} * {chunk} >= length:")
            self.put(2, "return")
        elif k.parallel and around:
            self.put(1, f"i_{k.parallel.axis} = pid // N")
            self.put(1, "n = (pid % N).to(tl.int64)  # sequences in turn")
            self.put(1, "first, length = n * T, T")
        elif k.parallel:
            self.put(1, f"i_{k.parallel.axis} = pid % tl.cdiv(T, {chunk})")
            self.put(1, f"n = (pid // tl.cdiv(T, {chunk})).to(tl.int64)")
            self.put(1, "first, length = n * T, T")
        else:
            self.put(1, "n = pid.to(tl.int64)")
            self.put(1, "first, length = bounds(n, cu_ptr, T)" if k.varlen else "first, length = n * T, T")
        if around and k.parallel:
            i = f"i_{k.parallel.axis}"
            self.put(1, f"middle, away = tl.cdiv(length, {chunk}) // 2, {i} // 2  # outwards, for that is where scans meet")
            self.put(1, f"{i} = tl.where({i} % 2 == 0, middle + away, middle - 1 - away)")
        swept = [a for store in k.sweeps for a in store.args[0].axes]
        for axis in sorted({a if a in k.splits else base(a) for n in k.program.nodes() for a in n.axes} | {*swept}):
            a, split = coordinate(k, axis), "start + " if axis in k.splits else ""
            self.put(1, f"{a} = {split}tl.arange(0, {k.tile(axis)})")
            if k.padded(axis):
                self.put(1, f"in_{a} = {a} < {k.extents[base(axis)]}")
        if k.parallel:
            self.reached(k.parallel, 1)
        if k.owns_tail:
            self.put(1, "if n == N:  # rows that no sequence owns")
            self.clear([*k.sweeps, *(s for s in k.row_outputs if not any(s in scan.effects for scan in k.groups))], 2)
            for scan in k.groups:
                own = [s for s in k.row_outputs if s in scan.effects]
                if own:
                    self.put(2, self.members(scan))
                    self.clear(own, 3)
            self.put(2, "return")
        if k.clears:
            self.put(1, f"tl.store({self.place(k.clears)}, 0)")
        asked = k.parallel.asked() if k.parallel else None
        if asked:
            self.put(1, f"if {load(self.linear, asked)} == 0.0:")
            self.put(2, "return")
        for counts, enough, _ in k.awaits:
            self.put(1, f"await_count({self.place(counts, k.parallel)}, {enough})")

    def last_waits(self, block: str) -> None:
        self.put(1, f"if {block} == tl.num_programs(0) - 1:  # so that this kernel does not end before the one that it follows")
        self.put(2, "wait_for_followed()")

    def place(self, counts: Tensor, scan: ScanView | None = None) -> str:
        """Where a chunk's count lies, as text; with the scan over chunks, that of the first of those counted as one."""
        at = f"(slot - i_{scan.axis} % {TOGETHER})" if scan else "slot"
        for d in counts.dims[1:]:
            at = f"({at} * {d} + i_{d})"
        return f"{counts.name}_ptr + {at}"

    def clear(self, stores: list[Node], depth: int) -> None:
        for store in stores:
            parts = [t.axis for t in store["index"] if isinstance(t, Part)]
            for axis in parts:
                self.put(depth, f"for part_{axis} in range({self.count(axis)}):")
            depth += len(parts)
            text, mask = pointer(self.linear, store, store.args[0].axes)
            self.put(depth, f"tl.store({text}, 0.0, mask={mask})" if mask else f"tl.store({text}, 0.0)")
            depth -= len(parts)

    def reached(self, scan: ScanView, depth: int) -> None:
        """At the start of an iteration: of a segment its slot, of a chunk all that is its own."""
        if scan.axis in self.outer:
            self.put(depth, f"slot_{scan.axis} = first // {self.span(scan)} + n + {self.trip(scan)}")
        if scan.axis == scan.chain[-1]:
            self.chunk(scan, depth)

    def chunk(self, scan: ScanView, depth: int) -> None:
        """At the start of a chunk: its first token, its slot, which of its rows exist."""
        size, at = self.kernel.extents[scan.tile], self.trip(scan)
        if self.rows:
            self.put(depth, f"t0 = first + {at} * {size}")
        if self.slots:
            self.put(depth, f"slot = first // {size} + n + {at}")
        if self.rows and not self.single:
            self.put(depth, f"rows = length - {at} * {size}")
            self.put(depth, f"in_{scan.tile} = {scan.tile} < rows")

    # -- statements

    def statement(self, s: Assign | Write, depth: int) -> None:
        if isinstance(s, Assign) or not s.node["sum"]:
            super().statement(s, depth)
            return
        k, n = self.kernel, s.node                         # a part of a sum, added to those of the points before
        ((axis, group),) = ((t.grid, t.share) for t in n["index"] if isinstance(t, At) and t.share)
        count, (text, mask) = k.turns[n["tensor"].name], pointer(self.linear, n, n.args[0].axes)
        at, member = f"slot * {group} + i_{group}", f"i_{axis} % ({axis} // {group})"
        for t in n["index"]:
            if isinstance(t, Part):
                at = f"({at}) * {self.count(t.axis)} + part_{t.axis}"
        self.put(depth, f"await_count({count.name}_ptr + {at}, {member})")
        earlier = f"tl.load({text}, mask={mask + ' & ' if mask else ''}({member} > 0), other=0.0).to(tl.float32)"
        value = n.args[0].args[0] if n.args[0].op is Op.CAST else n.args[0]
        total = f"({self.linear.text(value)} + {earlier}).to({DTYPES[n.args[0].type.dtype]})"
        self.put(depth, f"tl.store({text}, {total}" + (f", mask={mask})" if mask else ")"))
        self.put(depth, f"count_stored({count.name}_ptr + {at}, 1, rows > 0)")

    def loop(self, s: Loop, depth: int) -> None:
        scan, text = s.scan, self.linear.text
        for name, start in zip(s.carries, s.starts, strict=True):
            self.put(depth, f"{name} = {text(start)}")
        if scan.group:
            self.put(depth, self.members(scan))
        elif scan.parts:
            self.put(depth, f"for part_{scan.parts} in range({self.count(scan.parts)}):")
        elif scan.reverse:
            trips = self.trips(scan)
            if scan.recent:                                # its last are the sequence's first
                self.put(depth, f"trips = tl.minimum({trips}, ({text(scan.recent[0])}).to(tl.int32))")
                trips = "trips"
            self.put(depth, f"for turn in range(0, {trips}):")
            self.put(depth + 1, f"i_{scan.axis} = {trips} - 1 - turn")
        elif scan.recent:
            self.put(depth, f"trips = {self.trips(scan)}")
            self.put(depth, f"for i_{scan.axis} in range(tl.maximum(0, trips - ({text(scan.recent[0])}).to(tl.int32)), trips):")
        else:
            self.put(depth, f"for i_{scan.axis} in range(0, {self.trips(scan)}):")
        if not scan.group and not scan.parts:
            self.reached(scan, depth + 1)
        self.block(s.body, depth + 1)
        if self.kernel.counts and s.scan.axis == s.scan.chain[0] and not s.scan.group:
            at, last = f"i_{s.scan.axis}", f"{self.trips(s.scan)} - 1"
            done = f"{at} % {TOGETHER} == 0" if s.scan.reverse else f"({at} % {TOGETHER} == {TOGETHER - 1}) | ({at} == {last})"
            self.put(depth + 1, f"count_stored({self.place(self.kernel.counts, s.scan)}, {self.kernel.columns}, {done})")
        if s.carries:
            self.say(scan.nexts[0], depth + 1)
            self.put(depth + 1, f"{', '.join(s.carries)} = {', '.join(text(x) for x in scan.nexts)}")

    def members(self, scan: ScanView) -> str:
        """The head of the loop over a group."""
        each = self.size_of_group(scan)
        return f"for i_{scan.axis} in range(i_{scan.group} * {each}, (i_{scan.group} + 1) * {each}):"

    def count(self, axis: str) -> int:
        """How many parts a tile axis has."""
        return self.kernel.extents[axis] // self.kernel.tile(axis)

    def trips(self, scan: ScanView) -> str:
        """How often a scan runs: it ends with the sequence."""
        size, at = self.span(scan), scan.chain.index(scan.axis)
        whole = f"tl.cdiv(length, {size})" if size > 1 else "length"
        if at == 0:
            return whole
        most, around = self.kernel.extents[scan.axis], replace(scan, axis=scan.chain[at - 1])
        trips = f"tl.minimum({most}, {whole} - {self.trip(around)} * {most})"
        idle = " | ".join(f"({x})" if len(scan.idle) > 1 else x for x in self.idle(scan))
        return f"tl.where({idle}, 0, {trips})" if idle else trips


def emit(kernel: Kernel) -> Source:
    return TritonPrinter(kernel).source()
