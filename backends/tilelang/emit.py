"""Prints a kernel as TileLang: its arguments, where a block works, and then its statements (statements.py)."""
from __future__ import annotations

from gdn_ir.backends.base import Kernel, Source, heads
from gdn_ir.backends.linearize import listed
from gdn_ir.backends.printer import INDENT
from gdn_ir.backends.tilelang.rules import DTYPES, where
from gdn_ir.backends.tilelang.statements import Statements, Target, coordinate
from gdn_ir.nodes import Tensor, base
from gdn_ir.program import ScanView

SIZES = {"T": "tokens", "N": "sequences", "X": "slots"}    # of tensors' dimensions that are known at the call


def dimensions(kernel: Kernel, tensor: Tensor) -> list[str]:
    known = SIZES | {d: f"slots_{d}" for d in kernel.segments}             # X is an axis too, where it is one of two scans'
    return [known[d] if d in known else str(kernel.extents.get(base(d), d)).replace("/", "_of_") for d in tensor.layout]


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


class TileLangPrinter(Statements):
    imports: tuple[str, ...] = ("import tilelang.language as T",)

    def __init__(self, kernel: Kernel, target: Target) -> None:
        own = {"T", "n", "slot", "t0", "first", "length", "rows", "pid", "start", "low", "high", "middle", "tail", "beyond",
               "cu", "block", "b", "i", "j", "turn", "members"}
        own |= set(symbols(kernel)) | set(numbers(kernel)) | {f"{t.name}_" for t in kernel.tensors()}
        own |= {f"i_{h}" for h in heads(kernel)} | {coordinate(a) for n in kernel.program.nodes() for a in n.axes}
        super().__init__(kernel, target, own)

    def source(self) -> Source:
        k = self.kernel
        inside = self.prologue()
        body, self.lines = self.lines, []
        self.work(inside)
        shapes = {f"{t.name}_": f'T.Tensor({listed(dimensions(k, t))}, "{DTYPES[t.dtype]}")' for t in k.tensors()}
        shapes |= {"cu": 'T.Tensor((boundaries,), "int32")'}
        kinds = shapes | {p: "T.float32" for p in k.program.params()}
        arguments = [f"{name}: {kinds.get(name, 'T.int32')}" for name in signature(k)]
        names = symbols(k)
        threads = f", threads={self.threads}" if self.target.threads else ""
        lines = [*self.imports, "",
                 f'{", ".join(names)} = T.dynamic("{", ".join(names)}")', "", *self.macros(), "", "@T.prim_func",
                 f"def {k.name}(",
                 *(f"{INDENT}{a}," for a in arguments), "):",
                 f"{INDENT}with T.Kernel(blocks{threads}) as block:",
                 *(f"{INDENT * 2}{name} = {where}" for name, where in self.buffers.items()), *body, *self.lines]
        return Source(k.name, k.header(*self.about()) + "\n".join(lines) + "\n")

    @property
    def threads(self) -> int | str:
        return 32 * self.kernel.options.num_warps

    def about(self) -> tuple[str, ...]:
        """What stands above the text besides where it comes from."""
        return ()

    def macros(self) -> list[str]:
        """Lines of what the kernel's text calls."""
        return []

    def work(self, depth: int) -> None:
        """What a block does, from where it works on."""
        self.block(self.linear.body, depth)

    # -- where a block works

    def prologue(self) -> int:
        """The tile, head, sequence and chunk of this block; returns the depth at which its work is written."""
        k, grid = self.kernel, self.kernel.program.grid
        span = k.span(k.parallel) if k.parallel else 0     # tokens of a chunk, or of a segment of them
        left = "block + block0"
        for a in reversed([g for g in grid if g != "N"]):
            owner = k.owner(a)
            count = str(-(-k.extents[a[:-1]] // k.tile(a[:-1]))) if a.endswith("#") else owner
            at = f"T.truncmod({left}, {count})"
            if a.endswith("#"):
                self.put(2, f"start = {at} * {k.tile(a[:-1])}")            # no variable: it is seen to be a multiple
            else:
                self.bind(f"i_{owner}", at)
            left = f"T.truncdiv({left}, {count})"
        self.bind("pid", left)
        for h, a in (x for x in self.shared_heads() if k.owner(x[1]) == x[1]):
            self.bind(f"i_{h}", f"T.truncdiv(i_{a}, T.truncdiv({a}, {h}))")
        if k.parallel and k.varlen:
            self.locate(span)
        elif k.parallel:
            chunks = f"T.max(T.ceildiv(L, {span}), 1)"     # TVM refuses what it thinks could divide by zero
            self.bind(f"i_{k.parallel.axis}", f"T.truncmod(pid, {chunks})")
            self.bind("n", f"T.truncdiv(pid, {chunks})")
        else:
            self.bind("n", "pid")
        self.bounds()
        if not k.parallel:
            return 2
        if k.varlen:
            self.tail(span)
            self.bind(f"i_{k.parallel.axis}", f"pid - T.truncdiv(first, {span}) - n")
        return self.turn(k.parallel)

    def turn(self, scan: ScanView) -> int:
        """The chunk of a block that has one, if it has; returns the depth at which its work is written."""
        if self.kernel.varlen:
            at = f"i_{scan.axis}"
            self.put(2, f"if T.And({at} >= 0, {at} * {self.span(scan)} < length):")
        self.chunk(scan, 2 + self.kernel.varlen)
        return 2 + self.kernel.varlen

    def tail(self, chunk: int) -> None:
        """Slots past those of the last sequence are of the rows that no sequence owns, which come back as zeros."""
        if not self.kernel.owns_tail:
            return
        self.bind("tail", "T.min(T.max(cu[N], 0), L)")
        self.bind("beyond", f"pid - T.truncdiv(tail, {chunk}) - N")
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
            self.bind("first", "n * L")
            return
        self.bind("first", "T.min(T.max(cu[n], 0), L)")
        self.bind("length", "T.min(T.max(cu[n + 1], first), L) - first")

    def locate(self, chunk: int) -> None:
        """The sequence n that owns a chunk slot: by binary search, for sequence n owns the slots from cu[n] // chunk + n on."""
        self.buffers |= {x: 'T.alloc_local((1,), "int32")' for x in ("low", "high")}
        self.put(2, "low[0] = 0")
        self.put(2, "high[0] = N")
        self.put(2, "while high[0] - low[0] > 1:")
        self.put(3, "middle = T.truncdiv(low[0] + high[0], 2)")
        self.put(3, f"if T.truncdiv(cu[middle], {chunk}) + middle <= pid:")
        self.put(4, "low[0] = middle")
        self.put(3, "else:")
        self.put(4, "high[0] = middle")
        self.bind("n", "low[0]")


def emit(kernel: Kernel, target: Target) -> Source:
    return TileLangPrinter(kernel, target).source()


__all__ = ["emit"]
