"""Prints a kernel as TileLang: sizes, where a block works, then the statements, each a loop over the elements of its tile."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gdn_ir.backends.base import Kernel, Source, heads
from gdn_ir.backends.linearize import Assign, Loop, Write, listed, paren
from gdn_ir.backends.printer import INDENT, Printer
from gdn_ir.backends.tilelang.rules import DTYPES, RULES, where
from gdn_ir.nodes import Node, Op, Tensor, base
from gdn_ir.program import ScanView

SIZES = {"T": "tokens", "N": "sequences", "X": "slots"}    # of tensors' dimensions that are known at the call


@dataclass(frozen=True)
class Target:
    """How TileLang's tiles are written for a machine. tile: where they lie; product: where a product's sums do, and a carried
    matrix; loop: over the elements of a tile; lone: over those of a tile with one axis; threads: whether blocks have them."""
    tile: str
    product: str
    loop: str
    lone: str
    threads: bool


C = Target("T.alloc_local", "T.alloc_local", "T.grid", "T.serial", threads=False)
CUDA = Target("T.alloc_shared", "T.alloc_fragment", "T.Parallel", "T.Parallel", threads=True)


def coordinate(axis: str) -> str:
    """C -> C, C' -> C_: the name of a coordinate."""
    return axis.replace("'", "_")


def dimensions(kernel: Kernel, tensor: Tensor) -> list[str]:
    return [str(kernel.extents[base(d)]) if base(d) in kernel.extents else SIZES.get(d, d) for d in tensor.dims]


def symbols(kernel: Kernel) -> list[str]:
    """Sizes of dimensions that are known at the call."""
    found = {d: None for t in kernel.tensors() for d in dimensions(kernel, t) if not d.isdigit()}
    return [*found, *(["boundaries"] if kernel.varlen else [])]


def numbers(kernel: Kernel) -> list[str]:
    """Whole numbers a launch passes: L is the length of each sequence (dense) or of all (packed), N how many there are; and
    which blocks to run."""
    return ["L", "N", *(h for h in heads(kernel) if h not in symbols(kernel)), "block0", "blocks"]


def signature(kernel: Kernel) -> list[str]:
    return [*(f"{t.name}_" for t in kernel.tensors()), *(["cu"] if kernel.varlen else []), *kernel.program.params(),
            *numbers(kernel)]


class TileLangPrinter(Printer):
    def __init__(self, kernel: Kernel, target: Target) -> None:
        own = {"T", "n", "slot", "t0", "first", "length", "rows", "pid", "start", "low", "high", "middle", "tail", "beyond",
               "cu", "block", "i", "j", "turn"}
        own |= set(symbols(kernel)) | set(numbers(kernel)) | {f"{t.name}_" for t in kernel.tensors()}
        own |= {f"i_{h}" for h in heads(kernel)} | {coordinate(a) for n in kernel.program.nodes() for a in n.axes}
        named = {Op.DOT, Op.TRI_SOLVE} | ({Op.CUMSUM} if target.threads else set())
        super().__init__(kernel, {}, own, frozenset(named), masks=False)
        self.target = target
        self.buffers: list[str] = []
        self.length = "length" if kernel.varlen else "L"   # a second name for an argument would rename it

    def source(self) -> Source:
        k = self.kernel
        inside = self.prologue()
        body, self.lines = self.lines, []
        self.block(self.linear.body, inside)
        shapes = {f"{t.name}_": f'T.Tensor({listed(dimensions(k, t))}, "{DTYPES[t.dtype]}")' for t in k.tensors()}
        shapes |= {"cu": 'T.Tensor((boundaries,), "int32")'}
        kinds = shapes | {p: "T.float32" for p in k.program.params()}
        arguments = [f"{name}: {kinds.get(name, 'T.int32')}" for name in signature(k)]
        names = symbols(k)
        threads = f", threads={32 * k.options.num_warps}" if self.target.threads else ""
        lines = ["import tilelang.language as T", "",
                 f'{", ".join(names)} = T.dynamic("{", ".join(names)}")', "", "", "@T.prim_func", f"def {k.name}(",
                 *(f"{INDENT}{a}," for a in arguments), "):",
                 f"{INDENT}with T.Kernel(blocks{threads}) as block:",
                 *(INDENT * 2 + b for b in self.buffers), *body, *self.lines]
        return Source(k.name, k.header() + "\n".join(lines) + "\n")

    # -- where a block works

    def prologue(self) -> int:
        """The tile, head, sequence and chunk of this block; returns the depth at which its work is written."""
        k, grid, chunk = self.kernel, self.kernel.program.grid, self.kernel.chunk
        left = "block + block0"
        for a in reversed([g for g in grid if g != "N"]):
            count = str(-(-k.extents[a[:-1]] // k.tile(a[:-1]))) if a.endswith("#") else a
            at = f"T.truncmod({left}, {count})"
            self.put(2, f"start = {at} * {k.tile(a[:-1])}" if a.endswith("#") else f"i_{a} = {at}")
            left = f"T.truncdiv({left}, {count})"
        self.put(2, f"pid = {left}")
        for h, a in self.shared_heads():
            self.put(2, f"i_{h} = T.truncdiv(i_{a}, T.truncdiv({a}, {h}))")
        if k.parallel and k.varlen:
            self.locate(chunk)
        elif k.parallel:
            chunks = f"T.max(T.ceildiv(L, {chunk}), 1)"    # TVM refuses what it thinks could divide by zero
            self.put(2, f"i_{k.parallel.axis} = T.truncmod(pid, {chunks})")
            self.put(2, f"n = T.truncdiv(pid, {chunks})")
        else:
            self.put(2, "n = pid")
        self.bounds()
        if k.parallel:
            turn = f"i_{k.parallel.axis}"
            if k.varlen:
                self.tail(chunk)
                self.put(2, f"{turn} = pid - T.truncdiv(first, {chunk}) - n")
                self.put(2, f"if T.And({turn} >= 0, {turn} * {chunk} < length):")
            self.chunk(k.parallel, 2 + k.varlen)
        return 2 + bool(k.parallel and k.varlen)

    def tail(self, chunk: int) -> None:
        """Slots past those of the last sequence are of the rows that no sequence owns, which come back as zeros."""
        if not self.kernel.owns_tail:
            return
        self.put(2, "tail = T.min(T.max(cu[N], 0), L)")
        self.put(2, f"beyond = pid - T.truncdiv(tail, {chunk}) - N")
        self.put(2, "if beyond >= 0:")
        for store in self.kernel.row_outputs:
            axes = store.args[0].axes
            text, inside = where(store, self.here(axes), self.kernel, first=f"tail + beyond * {chunk}",
                                 rows=f"L - tail - beyond * {chunk}")
            deepest = self.over(axes, 3)
            self.put(deepest, f"if {inside}:")
            self.put(deepest + 1, f"{text} = 0.0")

    def bounds(self) -> None:
        if not self.kernel.varlen:
            self.put(2, "first = n * L")
            return
        self.put(2, "first = T.min(T.max(cu[n], 0), L)")
        self.put(2, "length = T.min(T.max(cu[n + 1], first), L) - first")

    def locate(self, chunk: int) -> None:
        """The sequence n that owns a chunk slot: by binary search, for sequence n owns the slots from cu[n] // chunk + n on."""
        self.buffers += [f'{x} = T.alloc_local((1,), "int32")' for x in ("low", "high")]
        self.put(2, "low[0] = 0")
        self.put(2, "high[0] = N")
        self.put(2, "while high[0] - low[0] > 1:")
        self.put(3, "middle = T.truncdiv(low[0] + high[0], 2)")
        self.put(3, f"if T.truncdiv(cu[middle], {chunk}) + middle <= pid:")
        self.put(4, "low[0] = middle")
        self.put(3, "else:")
        self.put(4, "high[0] = middle")
        self.put(2, "n = low[0]")

    def chunk(self, scan: ScanView, depth: int) -> None:
        size, at = self.kernel.extents[scan.tile], self.trip(scan)
        self.put(depth, f"t0 = first + {at} * {size}" if size > 1 else f"t0 = first + {at}")
        if self.slots:
            self.put(depth, f"slot = T.truncdiv(first, {size}) + n + {at}")
        if not self.single:
            self.put(depth, f"rows = {self.length} - {at} * {size}")

    # -- statements

    def element(self, node: Node, at: Mapping[str, str]) -> str:
        """One element of a value, as an expression."""
        name = self.linear.names.get(node)
        if name:
            return f"{name}[{', '.join(at[a] for a in node.axes) or '0'}]"
        return RULES[node.op](self.element, node, at, self.kernel)

    def here(self, axes: tuple[str, ...]) -> dict[str, str]:
        return {a: coordinate(a) for a in axes}

    def allocate(self, name: str, node: Node, product: bool = False) -> None:
        where = "T.alloc_local" if not node.axes else self.target.product if product else self.target.tile
        shape = listed([str(self.kernel.tile(a)) for a in node.axes] or ["1"])
        self.buffers.append(f'{name} = {where}({shape}, "{DTYPES[node.type.dtype]}")')

    def over(self, axes: tuple[str, ...], depth: int, serial: str = "") -> int:
        """Open loops over the coordinates of a tile; returns the depth inside."""
        if axes:
            names, extents = ", ".join(coordinate(a) for a in axes), ", ".join(str(self.kernel.tile(a)) for a in axes)
            self.put(depth, f"for {names} in {serial or (self.target.loop if len(axes) > 1 else self.target.lone)}({extents}):")
        return depth + bool(axes)

    def statement(self, s: Assign | Write, depth: int) -> None:
        if isinstance(s, Write):
            value = s.node.args[0]
            inside = self.over(value.axes, depth)
            text, condition = where(s.node, self.here(value.axes), self.kernel)
            if condition:
                self.put(inside, f"if {condition}:")
            self.put(inside + bool(condition), f"{text} = {self.element(value, self.here(value.axes))}")
            return
        name, n = s.name, s.node
        self.allocate(name, n, n.op is Op.DOT and n not in self.linear.operands)
        write = {Op.DOT: self.dot, Op.REDUCE: self.reduce, Op.CUMSUM: self.cumsum, Op.TRI_SOLVE: self.tri_solve}.get(n.op)
        if write:
            write(name, n, depth)
        else:
            self.fill(name, n, depth)

    def fill(self, name: str, n: Node, depth: int) -> None:
        """A tile from an expression of its elements; of a tile in memory, those that exist, and zeros."""
        inside, here = self.over(n.axes, depth), self.here(n.axes)
        target = f"{name}[{', '.join(here.values()) or '0'}]"
        source = n.args[0] if n.op is Op.CAST and n.args[0].op is Op.LOAD and n.args[0] not in self.linear.names else n
        text, condition = where(source, here, self.kernel) if source.op is Op.LOAD else ("", "")
        if not condition:
            self.put(inside, f"{target} = {RULES[n.op](self.element, n, here, self.kernel)}")
            return
        cast = n.op is Op.CAST and DTYPES[n.type.dtype] != DTYPES[source.type.dtype]
        self.put(inside, f"if {condition}:")
        self.put(inside + 1, f"{target} = " + (f'T.cast({text}, "{DTYPES[n.type.dtype]}")' if cast else text))
        self.put(inside, "else:")
        self.put(inside + 1, f"{target} = 0.0")

    def operand(self, node: Node) -> tuple[str, tuple[str, ...]]:
        """The buffer behind a product's operand, and its axes in the order of the buffer's dimensions."""
        if node in self.linear.names and self.linear.names[node]:
            return self.linear.names[node], node.axes
        name, axes = self.operand(node.args[0])
        a = node["axis"] if node.op is Op.TWIN else ""
        swap = {a: a + "'", a + "'": a} if a else {}
        return name, tuple(swap.get(x, x) for x in axes)

    def dot(self, name: str, n: Node, depth: int) -> None:
        a, b = n.args if n.axes[0] in n.args[0].axes else n.args[::-1]
        (left, rows), (right, columns) = self.operand(a), self.operand(b)
        flags = ", transpose_A=True" if rows[0] == n["over"] else ""
        flags += ", transpose_B=True" if columns[1] == n["over"] else ""
        sums = name
        if self.target.threads and n in self.linear.operands:        # the sums of one product, multiplied again
            sums = self.linear.fresh(f"{name}_sums")
            self.allocate(sums, n, product=True)
        self.put(depth, f"T.clear({sums})")
        self.put(depth, f"T.gemm({left}, {right}, {sums}{flags})")
        if sums != name:
            self.put(depth, f"T.copy({sums}, {name})")

    def reduce(self, name: str, n: Node, depth: int) -> None:
        here, x = self.here(n.axes), n.args[0]
        target = f"{name}[{', '.join(here.values()) or '0'}]"
        inside = self.over(n.axes, depth)
        self.put(inside, f"{target} = " + ("0.0" if n["fn"] == "sum" else '-T.infinity("float32")'))
        last = self.over((n["over"],), inside, serial="T.serial")
        value = self.element(x, self.here(x.axes))
        self.put(last, f"{target} += {value}" if n["fn"] == "sum" else f"{target} = T.max({target}, {value})")

    def cumsum(self, name: str, n: Node, depth: int) -> None:
        axis, last = n["axis"], self.kernel.tile(n["axis"]) - 1
        if self.target.threads:
            (source, order), reverse = self.operand(n.args[0]), ", reverse=True" if n["reverse"] else ""
            self.put(depth, f"T.cumsum({source}, {name}, dim={order.index(axis)}{reverse})")
            return
        inside = self.over(tuple(a for a in n.axes if a != axis), depth)
        here = self.here(n.axes)
        c, first = coordinate(axis), str(last) if n["reverse"] else "0"

        def cell(at: str) -> str:
            return f"{name}[{', '.join({**here, axis: at}[a] for a in n.axes)}]"
        self.put(inside, f"{cell(first)} = {self.element(n.args[0], {**here, axis: first})}")
        self.put(inside, f"for {c} in T.serial({last}):")
        to, source = (f"{last - 1} - {c}", f"{last} - {c}") if n["reverse"] else (f"{c} + 1", c)
        self.put(inside + 1, f"{cell(to)} = {cell(source)} + {paren(self.element(n.args[0], {**here, axis: to}))}")

    def tri_solve(self, name: str, n: Node, depth: int) -> None:
        """Forward substitution, row after row (backward for the transposed solve)."""
        axis, size = n["axis"], self.kernel.tile(n["axis"])
        (m, order), rest = self.operand(n.args[0]), tuple(a for a in n.axes if a != axis)
        inside, here = self.over(n.axes, depth), self.here(n.axes)
        self.put(inside, f"{name}[{', '.join(here.values())}] = {self.element(n.args[1], here)}")
        flipped = bool(dict(n.attr).get("transpose"))
        block = n["block"] or size
        self.put(depth, f"for i in T.serial({size - 1}):")
        row = f"{size - 2} - i" if flipped else "i + 1"
        known = f"{row} + 1 + j" if flipped else "j" if block == size else f"T.truncdiv({row}, {block}) * {block} + j"
        count = "i + 1" if block == size else f"T.truncmod({row}, {block})"
        if flipped and block != size:
            raise NotImplementedError("the transposed solve in blocks")
        if self.target.threads:                            # a thread owns a column, and waits for no other
            deepest = self.over(rest, depth + 1) + 1
            self.put(deepest - 1, f"for j in T.serial({count}):")
        else:
            self.put(depth + 1, f"for j in T.serial({count}):")
            deepest = self.over(rest, depth + 2)

        def cell(at: str) -> str:
            return f"{name}[{', '.join(at if a == axis else coordinate(a) for a in n.axes)}]"
        i, j = (known, row) if flipped else (row, known)
        at = ", ".join(i if a == axis else j for a in order)
        self.put(deepest, f"{cell(row)} -= {m}[{at}] * {cell(known)}")

    def loop(self, s: Loop, depth: int) -> None:
        scan = s.scan
        for name, start in zip(s.carries, s.starts, strict=True):
            self.allocate(name, start, product=len(start.axes) > 1)
            self.copy(name, start, depth)
        outermost = scan.axis == scan.chain[0]
        span = self.span(scan)
        chunks = f"T.ceildiv({self.length}, {span})" if span > 1 else self.length
        trips = chunks if outermost else str(self.kernel.extents[scan.axis])
        counter = "turn" if scan.reverse else f"i_{scan.axis}"
        self.put(depth, f"for {counter} in T.serial({trips}):")
        if scan.reverse:
            self.put(depth + 1, f"i_{scan.axis} = {trips} - 1 - turn")
        if scan.axis == scan.chain[-1]:
            self.chunk(scan, depth + 1)
        self.block(s.body, depth + 1)
        if s.carries:
            self.say(scan.nexts[0], depth + 1)
            self.step(s, depth + 1)

    def step(self, s: Loop, depth: int) -> None:
        """All carries take their next values at once: by way of copies, unless there is one and each of its elements depends
        on no other of them."""
        targets = s.carries
        if len(s.carries) > 1 or any(self.turns(x) for x in s.scan.nexts):
            targets = [self.linear.fresh(f"{c}_next") for c in s.carries]
            for name, x in zip(targets, s.scan.nexts, strict=True):
                self.allocate(name, x, product=len(x.axes) > 1)
        for name, x in zip(targets, s.scan.nexts, strict=True):
            if self.linear.names.get(x) != name:
                self.copy(name, x, depth)
        for name, new, x in zip(s.carries, targets, s.scan.nexts, strict=True):
            if name != new:
                inside, here = self.over(x.axes, depth), ", ".join(self.here(x.axes).values()) or "0"
                self.put(inside, f"{name}[{here}] = {new}[{here}]")

    def turns(self, node: Node) -> bool:
        """Whether an expression written in place reads a tile under other names of its axes."""
        if self.linear.names.get(node):
            return False
        return node.op is Op.TWIN or any(self.turns(a) for a in node.args)

    def copy(self, name: str, value: Node, depth: int) -> None:
        inside, here = self.over(value.axes, depth), self.here(value.axes)
        self.put(inside, f"{name}[{', '.join(here.values()) or '0'}] = {self.element(value, here)}")


def emit(kernel: Kernel, target: Target) -> Source:
    return TileLangPrinter(kernel, target).source()


__all__ = ["C", "Target", "emit"]
