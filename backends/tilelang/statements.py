"""How statements are written in TileLang: each a loop over the elements of its tile, or a call of its own for products."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from gdn_ir.backends.base import Kernel
from gdn_ir.backends.linearize import Assign, Loop, Stmt, Style, Write, listed, paren
from gdn_ir.backends.printer import Printer
from gdn_ir.backends.tilelang.rules import DTYPES, RULES, counts, guarded, region, several, where
from gdn_ir.nodes import Node, Op
from gdn_ir.program import ScanView, uses


@dataclass(frozen=True)
class Target:
    """How TileLang's tiles are written for a machine. tile: where they lie; product: where a product's sums do, and a carried
    matrix; loop: over the elements of a tile; lone: over those of a tile with one axis; threads: whether blocks have them;
    ring: the most chunks that are loaded ahead."""
    tile: str
    product: str
    loop: str
    lone: str
    threads: bool
    ring: int


C = Target("T.alloc_local", "T.alloc_local", "T.grid", "T.serial", threads=False, ring=0)
SM_90 = Target("T.alloc_shared", "T.alloc_fragment", "T.Parallel", "T.Parallel", threads=True, ring=8)
# TileLang 0.1.15 cannot print what a deeper ring of cp.async waits for, where the number of chunks is known only at the call
SM_80 = Target("T.alloc_shared", "T.alloc_fragment", "T.Parallel", "T.Parallel", threads=True, ring=1)

OPERANDS = frozenset({Op.DOT, Op.TRI_SOLVE})
C_STYLE = Style(OPERANDS, masks=False, sums=True)
CUDA_STYLE = Style(OPERANDS | {Op.CUMSUM}, masks=False, rows=True, loads=True, sums=True, rounded=frozenset({"tf32"}))


def coordinate(axis: str) -> str:
    """C -> C, C' -> C_: the name of a coordinate."""
    return axis.replace("'", "_")


class Statements(Printer):
    def __init__(self, kernel: Kernel, target: Target, reserved: set[str]) -> None:
        super().__init__(kernel, {}, reserved, CUDA_STYLE if target.threads else C_STYLE)
        self.target = target
        self.buffers: dict[str, str] = {}
        self.length = "length" if kernel.varlen else "L"   # a second name for an argument would rename it
        self.whole = False                                 # whether the chunk at hand is known to have all of its rows
        self.summed: set[Node] = set()                     # products whose sums are gathered in a carry
        self.users = uses(kernel.program.nodes())
        self.others: dict[str, str] = {}

    def chunk(self, scan: ScanView, depth: int) -> None:
        size, at = self.kernel.extents[scan.tile], self.trip(scan)
        self.put(depth, f"t0 = first + {at} * {size}" if size > 1 else f"t0 = first + {at}")
        if self.slots:
            self.put(depth, f"slot = T.truncdiv(first, {size}) + n + {at}")
        if not self.single and not self.whole:
            self.put(depth, f"rows = {self.length} - {at} * {size}")

    def element(self, node: Node, at: Mapping[str, str]) -> str:
        """One element of a value, as an expression."""
        name = self.linear.names.get(node)
        if name:
            return f"{name}[{', '.join(at[a] for a in node.axes) or '0'}]"
        return self.expression(node, at)

    def expression(self, node: Node, at: Mapping[str, str]) -> str:
        """The same, whether or not the value has a name."""
        if self.whole and node.op is Op.SELECT and guarded(node.args[0], self.kernel):
            return self.element(node.args[1], at)
        return RULES[node.op](self.element, node, at, self.kernel)

    def here(self, axes: tuple[str, ...]) -> dict[str, str]:
        return {a: coordinate(a) for a in axes}

    def bind(self, name: str, value: str) -> None:
        """Give a number a name. Threads keep it in a variable: TVM would write its divisions out again wherever it is used."""
        if self.target.threads:
            self.buffers[name] = 'T.alloc_var("int32")'
        self.put(2, f"{name} = {value}")

    # -- tiles

    def allocate(self, name: str, node: Node, product: bool = False) -> None:
        sums = product or (self.target.threads and self.plain(node))
        where = "T.alloc_local" if not node.axes else self.target.product if sums else self.target.tile
        shape = listed([str(self.kernel.tile(a)) for a in node.axes] or ["1"])
        self.buffers[name] = f'{where}({shape}, "{DTYPES[node.type.dtype]}")'

    def beside(self, wanted: str) -> str:
        """The name of one more tile that a value needs: the same one, however often its statement is written."""
        if wanted not in self.others:
            self.others[wanted] = self.linear.fresh(wanted)
        return self.others[wanted]

    def plain(self, node: Node) -> bool:
        """Whether a matrix is computed and used element by element, so that threads can keep it as they keep products' sums."""
        if len(node.axes) != 2 or node.op not in (Op.ELEM, Op.SELECT, Op.CAST) or node in self.linear.operands:
            return False

        same = (Op.ELEM, Op.SELECT, Op.CAST, Op.STORE)

        def alike(n: Node) -> bool:
            return all(u.op in same and (self.named(u) or alike(u)) for u in self.users.get(n, []))
        return alike(node)

    def crossed(self, node: Node) -> bool:
        """Whether something sums along a value, or reads it lying across: then threads need what others hold."""
        def across(u: Node) -> bool:
            return u.op in (Op.REDUCE, Op.CUMSUM) or (u.op is Op.TWIN and {u["axis"], u["axis"] + "'"} <= set(u.axes))
        return any(across(u) or (not self.named(u) and self.crossed(u)) for u in self.users.get(node, []))

    def named(self, node: Node) -> bool:
        return bool(self.linear.names.get(node)) or node.op is Op.STORE

    def over(self, axes: tuple[str, ...], depth: int, serial: str = "") -> int:
        """Open loops over the coordinates of a tile; returns the depth inside."""
        if axes:
            names, extents = ", ".join(coordinate(a) for a in axes), ", ".join(str(self.kernel.tile(a)) for a in axes)
            self.put(depth, f"for {names} in {serial or (self.target.loop if len(axes) > 1 else self.target.lone)}({extents}):")
        return depth + bool(axes)

    def copy(self, name: str, value: Node, depth: int) -> None:
        inside, here = self.over(value.axes, depth), self.here(value.axes)
        self.put(inside, f"{name}[{', '.join(here.values()) or '0'}] = {self.element(value, here)}")

    def fill(self, name: str, n: Node, depth: int) -> None:
        """A tile from an expression of its elements; of a tile in memory, those that exist, and zeros."""
        if n.op is Op.LOAD and several(n):
            self.total(name, n, depth)
            return
        source = n.args[0] if n.op is Op.CAST and n.args[0].op is Op.LOAD and n.args[0] not in self.linear.names else n
        if self.whole and self.copied(n):
            self.put(depth, f"T.copy({region(n, self.kernel)}, {name})")
            return
        inside, here = self.over(n.axes, depth), self.here(n.axes)
        target = f"{name}[{', '.join(here.values()) or '0'}]"
        text, condition = where(source, here, self.kernel, self.whole) if source.op is Op.LOAD else ("", "")
        if not condition:
            self.put(inside, f"{target} = {self.expression(n, here)}")
            return
        cast = n.op is Op.CAST and DTYPES[n.type.dtype] != DTYPES[source.type.dtype]
        self.put(inside, f"if {condition}:")
        self.put(inside + 1, f"{target} = " + (f'T.cast({text}, "{DTYPES[n.type.dtype]}")' if cast else text))
        self.put(inside, "else:")
        self.put(inside + 1, f"{target} = 0.0")

    def total(self, name: str, n: Node, depth: int) -> None:
        """A tile that is the sum of several in memory, added in order."""
        inside, here = self.over(n.axes, depth), self.here(n.axes)
        target = f"{name}[{', '.join(here.values()) or '0'}]"
        text, condition = where(n, here, self.kernel, self.whole)
        self.put(inside, f"{target} = 0.0")
        if condition:
            self.put(inside, f"if {condition}:")
        deepest = inside + bool(condition)
        self.put(deepest, f"for i in T.serial({' * '.join(counts(n, self.kernel))}):")
        self.put(deepest + 1, f"{target} += {text}")

    def copied(self, n: Node) -> bool:
        """Whether a whole chunk's tile is a box of its tensor, as the copy engines take it: in one piece, in the same order."""
        return n.op is Op.LOAD and bool(n.axes) and bool(region(n, self.kernel))

    # -- statements

    def statement(self, s: Assign | Write, depth: int) -> None:
        if isinstance(s, Write):
            value = s.node.args[0]
            inside = self.over(value.axes, depth)
            text, condition = where(s.node, self.here(value.axes), self.kernel, self.whole)
            if condition:
                self.put(inside, f"if {condition}:")
            self.put(inside + bool(condition), f"{text} = {self.element(value, self.here(value.axes))}")
            return
        name, n = s.name, s.node
        if n in self.summed:
            return
        self.allocate(name, n, n.op is Op.DOT and not self.staged(n))
        write = {Op.DOT: self.dot, Op.REDUCE: self.reduce, Op.CUMSUM: self.cumsum, Op.TRI_SOLVE: self.tri_solve}.get(n.op)
        if write:
            write(name, n, depth)
        else:
            self.fill(name, n, depth)

    def operand(self, node: Node) -> tuple[str, tuple[str, ...]]:
        """The buffer behind a product's operand, and its axes in the order of the buffer's dimensions."""
        if node in self.linear.names and self.linear.names[node]:
            return self.linear.names[node], node.axes
        name, axes = self.operand(node.args[0])
        a = node["axis"] if node.op is Op.TWIN else ""
        swap = {a: a + "'", a + "'": a} if a else {}
        return name, tuple(swap.get(x, x) for x in axes)

    def dot(self, name: str, n: Node, depth: int) -> None:
        sums = name
        if self.target.threads and self.staged(n):         # the sums of one product, multiplied again or read by other threads
            sums = self.beside(f"{name}_sums")
            self.allocate(sums, n, product=True)
        self.put(depth, f"T.clear({sums})")
        self.put(depth, self.gemm(n, sums))
        if sums != name:
            self.put(depth, f"T.copy({sums}, {name})")

    def staged(self, n: Node) -> bool:
        """Whether a product's sums are wanted in memory."""
        return n in self.linear.operands or (self.target.threads and self.crossed(n))

    def gemm(self, n: Node, sums: str) -> str:
        """The product, added to what `sums` holds."""
        a, b = n.args if n.axes[0] in n.args[0].axes else n.args[::-1]
        (left, rows), (right, columns) = self.operand(a), self.operand(b)
        flags = ", transpose_A=True" if rows[0] == n["over"] else ""
        flags += ", transpose_B=True" if columns[1] == n["over"] else ""
        return f"T.gemm({left}, {right}, {sums}{flags})"

    def reduce(self, name: str, n: Node, depth: int) -> None:
        here, x = self.here(n.axes), n.args[0]
        sums = name
        if self.whole and n.axes:                          # shared memory that is cleared, TileLang would take for a copy ahead
            sums = self.beside(f"{name}_sums")
            self.allocate(sums, n, product=True)
        target = f"{sums}[{', '.join(here.values()) or '0'}]"
        inside = self.over(n.axes, depth)
        self.put(inside, f"{target} = " + ("0.0" if n["fn"] == "sum" else '-T.infinity("float32")'))
        if self.target.threads:                            # a loop of its own: within one, TileLang lets only its threads meet
            inside = self.over(n.axes, depth)
        last = self.over((n["over"],), inside, serial="T.serial")
        value = self.element(x, self.here(x.axes))
        self.put(last, f"{target} += {value}" if n["fn"] == "sum" else f"{target} = T.max({target}, {value})")
        if sums != name:
            self.put(depth, f"T.copy({sums}, {name})")

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
        """Forward substitution, row after row (backward for the transposed solve); in all diagonal blocks at once."""
        axis, size = n["axis"], self.kernel.tile(n["axis"])
        (m, order), rest = self.operand(n.args[0]), tuple(a for a in n.axes if a != axis)
        inside, here = self.over(n.axes, depth), self.here(n.axes)
        self.put(inside, f"{name}[{', '.join(here.values())}] = {self.element(n.args[1], here)}")
        flipped, block = bool(dict(n.attr).get("transpose")), n["block"] or size
        if flipped and block != size:
            raise NotImplementedError("the transposed solve in blocks")
        first = "" if block == size else f"b * {block} + "     # of the block's rows
        row = f"{size - 2} - i" if flipped else f"{first}i + 1"
        known = f"{row} + 1 + j" if flipped else f"{first}j"

        def cell(at: str) -> str:
            return f"{name}[{', '.join(at if a == axis else coordinate(a) for a in n.axes)}]"
        term = f"{m}[{', '.join((known if flipped else row) if a == axis else (row if flipped else known) for a in order)}]"
        extents = [*([str(size // block)] if first else []), *(str(self.kernel.tile(a)) for a in rest)]
        names = [*(["b"] if first else []), *(coordinate(a) for a in rest)]
        self.put(depth, f"for i in T.serial({block - 1}):")
        if not self.target.threads:
            self.put(depth + 1, f"for {', '.join([*names[:bool(first)], 'j'])} in " +
                     (f"T.grid({extents[0]}, i + 1):" if first else "T.serial(i + 1):"))
            deepest = self.over(rest, depth + 2)
            self.put(deepest, f"{cell(row)} -= {term} * {cell(known)}")
            return
        sums = self.beside(f"{name}_known")                # a thread adds up in registers, and rows change only in between
        self.buffers[sums] = f'{self.target.product}({listed(extents)}, "{DTYPES[n.type.dtype]}")'
        loop, cells = f"for {', '.join(names)} in T.Parallel({', '.join(extents)}):", ", ".join(names)
        self.put(depth + 1, loop)
        self.put(depth + 2, f"{sums}[{cells}] = 0.0")
        self.put(depth + 1, loop)
        self.put(depth + 2, "for j in T.serial(i + 1):")
        self.put(depth + 3, f"{sums}[{cells}] += {term} * {cell(known)}")
        self.put(depth + 1, loop)
        self.put(depth + 2, f"{cell(row)} -= {sums}[{cells}]")

    # -- loops

    def loop(self, s: Loop, depth: int) -> None:
        for name, start in zip(s.carries, s.starts, strict=True):
            self.allocate(name, start, product=len(start.axes) > 1)
            self.copy(name, start, depth)
        if self.target.threads:
            self.gather(s)
        scan, span = s.scan, self.span(s.scan)
        if self.ring(s):
            self.pipelined(s, depth)
            return
        chunks = f"T.ceildiv({self.length}, {span})" if span > 1 else self.length
        at = scan.chain.index(scan.axis) if not scan.group else 0
        if at:                                             # it ends with the sequence
            most, around = self.kernel.extents[scan.axis], replace(scan, axis=scan.chain[at - 1])
            chunks = f"T.min({most}, {chunks} - {self.trip(around)} * {most})"
        trips = chunks
        self.each(s, f"T.serial({trips})", trips, depth)

    def ring(self, s: Loop) -> int:
        """How many chunks are loaded ahead: none unless this is the one scan over chunks, and loads boxes alone."""
        tiles = [x.node for x in s.body if isinstance(x, Assign) and x.node.op is Op.LOAD and x.node.axes]
        sums = any(isinstance(x, Assign) and x.node.op is Op.CUMSUM for x in s.body)       # T.cumsum counts on all threads
        fits = tiles and all(self.copied(t) for t in tiles) and not sums and len(s.scan.chain) == 1
        return min(self.kernel.options.num_stages, self.target.ring) if fits else 0

    def pipelined(self, s: Loop, depth: int) -> None:
        """The chunks that are whole, their tiles copied ahead; and the last one, if it is not, element by element."""
        span = self.span(s.scan)
        full = f"T.truncdiv({self.length}, {span})"

        def ragged() -> None:
            self.put(depth, f"if T.truncmod({self.length}, {span}) > 0:")
            self.put(depth + 1, f"i_{s.scan.axis} = {full}")
            with self.apart(s):
                self.said = ""
                self.iteration(s, depth + 1)
        if s.scan.reverse:
            ragged()
        self.whole = True
        self.each(s, f"T.Pipelined({full}, num_stages={self.ring(s)})", full, depth)
        self.whole = False
        if not s.scan.reverse:
            ragged()

    @contextmanager
    def apart(self, s: Loop) -> Iterator[None]:
        """Tiles that a pipelined loop rotates through its ring have no other use: here they go by other names."""
        names = dict(self.linear.names)
        for x in s.body:
            if isinstance(x, Assign) and self.copied(x.node):
                x.name = self.linear.names[x.node] = self.beside(f"{x.name}_last")
        yield
        self.linear.names.update(names)
        for x in s.body:
            if isinstance(x, Assign):
                x.name = names[x.node]

    def each(self, s: Loop, trips: str, count: str, depth: int) -> None:
        self.put(depth, f"for {'turn' if s.scan.reverse else f'i_{s.scan.axis}'} in {trips}:")
        if s.scan.reverse:
            self.put(depth + 1, f"i_{s.scan.axis} = {count} - 1 - turn")
        self.iteration(s, depth + 1)

    def iteration(self, s: Loop, depth: int) -> None:
        if s.scan.axis == s.scan.chain[-1]:
            self.chunk(s.scan, depth)
        self.block(asked_first(s.body) if self.target.threads else s.body, depth)
        if s.carries:
            self.say(s.scan.nexts[0], depth)
            self.step(s, depth)

    def gather(self, s: Loop) -> None:
        """Note the product of S = x + dot(...), S the one carry: its sums need no place of their own."""
        found = self.gathered(s)
        if found:
            self.summed.add(found[1])

    def gathered(self, s: Loop) -> tuple[Node, Node] | None:
        """x and the product, if the one carry's next value is x + product and nothing else reads the product."""
        if len(s.carries) == 1 and s.scan.nexts[0].op is Op.ELEM and s.scan.nexts[0]["fn"] == "add":
            args = s.scan.nexts[0].args
            for x, product in (args, args[::-1]):
                once = product.op is Op.DOT and len(self.users[product]) == 1 and product not in self.linear.operands
                if once and x is not product and x.axes == product.axes and not self.turns(x) \
                        and any(isinstance(b, Assign) and b.node is product for b in s.body):
                    return x, product
        return None

    def step(self, s: Loop, depth: int) -> None:
        """All carries take their next values at once: by way of copies, unless there is one and each of its elements depends
        on no other of them."""
        found = self.gathered(s) if self.target.threads else None
        if found:
            self.copy(s.carries[0], found[0], depth)
            self.put(depth, self.gemm(found[1], s.carries[0]))
            return
        targets = s.carries
        if len(s.carries) > 1 or any(self.turns(x) for x in s.scan.nexts):
            targets = [self.beside(f"{c}_next") for c in s.carries]
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


def asked_first(body: list[Stmt]) -> list[Stmt]:
    """The statements of a chunk, loads before the rest: what takes longest is asked for first."""
    loads = [s for s in body if isinstance(s, Assign) and s.node.op is Op.LOAD and not s.node.args]
    return [*loads, *(s for s in body if s not in loads)]
