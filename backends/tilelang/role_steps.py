"""How the steps of roles are written in TileLang: loads and stores by TMA, products, values element by element."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from gdn_ir.backends.linearize import listed
from gdn_ir.backends.tilelang import warps
from gdn_ir.backends.tilelang.role_places import PART, Lies, RolePlaces
from gdn_ir.backends.tilelang.rules import DTYPES, RULES, point, slot, where
from gdn_ir.backends.tilelang.statements import coordinate
from gdn_ir.nodes import At, IRError, Node, Op, Rows, Slot, Tile, base
from gdn_ir.schedules.events import Step, padding
from gdn_ir.schedules.roles import Event


class RoleSteps(RolePlaces):
    """Writes one step of one role."""

    # -- elements

    def element(self, node: Node, at: Mapping[str, str]) -> str:
        name = self.laid.held.get(node)
        if node in self.chosen:
            return self.chosen[node]
        if name is None:
            return self.element_fetched(node, at) if self.is_fetched(node) else self.expression(node, at)
        cell = self.cell(name)
        if cell in self.registers:
            text, order = self.registers[cell]
            return f"{text}[{', '.join(at[a] for a in order) or '0'}]"
        return self.ring_of(name).element(0, self.c, at)

    def expression(self, node: Node, at: Mapping[str, str]) -> str:
        """A choice between values that are at hand is no branch: then TileLang computes several elements at once. Of what
        nobody reads above its diagonal, no choice is made between the two sides of that."""
        if self.whole_matrix and node.op is Op.SELECT and below(node.args[0]):
            return self.element(node.args[1], at)
        if node.op is Op.SELECT and not self.loads(node):
            return f"T.Select({', '.join(self.element(a, at) for a in node.args)})"
        if node.op not in RULES:                           # a product, a sum, a solve: somebody's event
            raise self.missing(node)
        return super().expression(node, at)

    def missing(self, node: Node) -> IRError:
        made = next((name for name, n in self.laid.named.items() if n is node), "")
        what = made or self.kernel.program.describe(node)
        return IRError(f"roles: {self.instance} reads {what}, which no event of any role makes")

    def is_fetched(self, node: Node) -> bool:
        """Whether this role computes of registers what a tensor has there."""
        return (self.role.name, node) in self.laid.fetched

    def element_fetched(self, node: Node, at: Mapping[str, str]) -> str:
        if not node.axes:
            return f"{self.fetched(node)}[0]"
        row = at[node.axes[0]]
        return f"T.Select({row} < rows, {self.fetched(node)}[{row}], {zero(node)})"

    def fetched(self, node: Node) -> str:
        """The registers that this role has fetched a tensor's elements to."""
        return self.registers[self.laid.fetches(self.instance, self.laid.fetched[self.role.name, node]).cell][0]

    def loads(self, node: Node) -> bool:
        """Whether an expression reads a tensor."""
        if node.op is Op.LOAD:
            return not self.is_fetched(node)
        return any(self.loads(a) for a in node.args if a not in self.laid.held)

    # -- statements

    def event(self, s: Step, fenced: bool, depth: int) -> None:
        if s.part is not None:
            self.part = s.part
        match s.event.do:
            case "load":
                self.slotted(self.rings[s.writes[0].cell], depth, lambda i, d: self.load(s, i, fenced, d))
            case "store" if s.engine == "threads":
                self.store_elements(s, depth)
            case "store":
                self.slotted(self.rings[s.reads[0].cell], depth, lambda i, d: self.store(s, i, d))
            case "fetch":
                self.fetch(s, depth, int(s.event.early))
            case "read":
                self.move(s.writes[0].cell, s.reads[0].cell, depth, True)
            case "write":
                self.move(s.reads[0].cell, s.writes[0].cell, depth, False)
            case "issue":
                self.issue(s, depth)
            case "solve":
                self.solve(s, depth)
            case "join":
                self.join(s, depth)
            case _:
                self.compute(s, depth)

    def slotted(self, ring: Lies, depth: int, write: Callable[[int, int], None]) -> None:
        """What is done with a ring's slot; written once for each where slots are buffers of their own."""
        count = len(ring.buffers)
        for i in range(count):
            if count > 1:                                  # no elif: it nests, and Python has 20 levels
                self.put(depth, "else:" if count == 2 and i == 1 else f"if {self.c} % {count} == {i}:")
            write(i, depth + (count > 1))

    def parted(self, cell: str, depth: int, write: Callable[[str, int], None]) -> None:
        """What is done with a ring's slot, if one text stands for all copies with each of theirs."""
        if self.shared is None:
            self.slotted(self.rings[cell], depth, lambda i, d: write(self.rings[cell].slot(i, self.c), d))
            return
        name = self.value_of(cell)
        for p in range(self.role.copies):
            mine = self.rings[f"{name}_{p}"]
            self.put(depth, "else:" if self.role.copies == 2 and p else f"if {PART} == {p}:")
            self.slotted(mine, depth + 1, lambda i, d, mine=mine: write(mine.slot(i, self.c), d))       # type: ignore[misc]

    def box(self, n: Node) -> str:
        """The box of a tensor that a whole chunk's tile is."""
        parts = []
        for term in n["index"]:
            match term:
                case Tile(axis):
                    first = int(self.start(axis))          # who loads or stores has a text of its own
                    tile = "start + " if base(axis) in self.kernel.splits else ""
                    parts.append(f"{tile}{first}:{tile}{first + self.size(self.role, axis)}")
                case At(grid, share):
                    parts.append(point(grid, share, self.kernel))
                case Rows(_, axis, False):
                    parts.append(f"t0:t0 + {self.kernel.tile(axis)}")
                case Slot(chain, _, inner):
                    parts.append(slot(chain, inner))
                case _:
                    raise IRError(f"roles: {n['tensor'].name} is no box of its tensor: {term}")
        return f"{n['tensor'].name}_[{', '.join(parts)}]"

    def start(self, axis: str) -> int | str:
        """Where a part begins; as text where one text stands for all."""
        if axis not in self.laid.axes:
            return 0
        size = self.size(self.role, axis)
        return self.part * size if self.shared is None else f"{PART} * {size}"

    def in_memory(self, axes: tuple[str, ...]) -> dict[str, str]:
        """Coordinates along whole axes, of a part."""
        return {a: f"{coordinate(a)} + {self.start(a)}" if self.start(a) else coordinate(a) for a in axes}

    def from_memory(self, n: Node) -> str:
        return where(n, self.in_memory(n.axes), self.kernel)[0] if n.op is Op.LOAD else self.element(n, self.here(n.axes))

    def row_by_row(self, n: Node, order: tuple[str, ...], depth: int) -> tuple[int, str]:
        """Where a chunk is not whole: the head of a loop over its rows, of a condition that one is there, and its place."""
        self.put(depth, "else:")
        inside = self.rows_of(order, depth + 1)
        text, condition = where(n, self.in_memory(order), self.kernel)
        self.put(inside, f"if {condition}:")
        return inside, text

    def load(self, s: Step, i: int, fenced: bool, depth: int) -> None:
        """By TMA where the chunk is whole; where the sequence ends in it, its rows and zeros."""
        cell = s.writes[0].cell
        ring = self.rings[cell]
        to = ring.element(i, self.c, self.here(ring.order))
        barrier = self.at_barrier(next(f"{name}_full" for name, (_, cells) in self.plan.rings.items() if cell in cells))
        slot = ring.slot(i, self.c)
        if s.ragged:
            self.put(depth, f"if rows >= {self.kernel.chunk}:")
        self.put(depth + s.ragged, f"T.tma_copy({self.box(s.node)}, {slot}, barrier={barrier})")
        if not s.ragged:                                   # however many rows a chunk has
            return
        inside, text = self.row_by_row(s.node, ring.order, depth)
        self.put(inside + 1, f"{to} = {text}")
        self.put(inside, "else:")
        self.put(inside + 1, f"{to} = 0.0")
        if fenced:
            self.put(depth + 1, "T.fence_proxy_async()")

    def store(self, s: Step, i: int, depth: int) -> None:
        """By TMA where the chunk is whole, else row by row to the end of the sequence. T.copy waits until the slot is read."""
        ring = self.rings[s.reads[0].cell]
        if s.node["sum"]:                                  # after the last member of a group
            self.put(depth, f"if {self.member()} == members - 1:")
            depth += 1
        whole = not s.ragged                               # however many rows a chunk has
        if not whole:
            self.put(depth, f"if rows >= {self.kernel.chunk}:")
        self.put(depth + (not whole), f"T.copy({ring.slot(i, self.c)}, {self.box(s.node)})")
        if whole:
            return
        inside, text = self.row_by_row(s.node, ring.order, depth)
        self.put(inside + 1, f"{text} = {ring.element(i, self.c, self.here(ring.order))}")

    def member(self) -> str:
        """Which of a group's members is at hand."""
        return f"T.truncmod({self.c}, members)"

    def store_elements(self, s: Step, depth: int) -> None:
        """What a role's threads have in registers, each its part; whole chunks without asking of each row whether it is one."""
        value = s.node.args[0]
        text, condition = where(s.node, self.in_memory(value.axes), self.kernel)
        if condition and len(value.axes) > 1:
            self.put(depth, f"if rows >= {self.kernel.chunk}:")
            self.put(self.over_rows(value, depth + 1), f"{text} = {self.element(value, self.here(value.axes))}")
            self.put(depth, "else:")
        inside = self.over_rows(value, depth + bool(condition and len(value.axes) > 1))
        if condition:
            self.put(inside, f"if {condition}:")
        self.put(inside + bool(condition), f"{text} = {self.element(value, self.here(value.axes))}")

    def move(self, registers: str, ring: str, depth: int, read: bool) -> None:
        """From a ring to registers, or back. Where they lie across, but a product wants them as its rows are, by way of a name
        for the same registers that says so."""
        (text, order), lies = self.registers[registers], self.rings[ring]

        def copied(name: str) -> None:
            self.parted(ring, depth, lambda slot, d: self.put(d, f"T.copy({f'{slot}, {name}' if read else f'{name}, {slot}'})"))
        if not lies.apart or order == lies.order:
            copied(text)
            return
        name, shape = self.linear.fresh(f"{text}_across"), listed(self.shape(lies.order, self.role))
        kind = DTYPES[self.value(self.value_of(ring)).type.dtype]
        self.buffers_of_role += [f'{name} = T.alloc_fragment({shape}, "{kind}")', across(name, shape)]
        here, there = (f"{n}[{', '.join(map(coordinate, o))}]" for n, o in ((text, order), (name, lies.order)))
        if read:
            copied(name)
        self.put(self.loops(order, depth), f"{here} = {there}" if read else f"{there} = {here}")
        if not read:
            copied(name)

    def loops(self, order: tuple[str, ...], depth: int) -> int:
        if order:
            names, sizes = ", ".join(coordinate(a) for a in order), ", ".join(self.shape(order, self.role))
            self.put(depth, f"for {names} in T.Parallel({sizes}):")
        return depth + bool(order)

    def rows_of(self, order: tuple[str, ...], depth: int) -> int:
        """The same a row at a time: short code, for what few chunks need."""
        self.put(depth, f"for {coordinate(order[0])} in T.serial({self.size(self.role, order[0])}):")
        return self.loops(order[1:], depth + 1)

    def over_rows(self, n: Node, depth: int) -> int:
        return self.loops(self.ordered(n, self.role), depth)

    def fetch(self, s: Step, depth: int, ahead: int) -> None:
        """Of so many chunks ahead; of the chunk at hand where that is the first. No row is left out, for then what is loaded
        would be waited for at once, to choose between that and a zero: of those past the sequence's end the last is loaded."""
        to, back = self.fetched(s.node), self.scan.reverse
        if not s.node.axes:
            ahead_ = f"T.min({ahead}, chunks - 1 - i_{self.scan.axis})"
            text, _ = where(s.node, {}, self.kernel, place_of=f"slot {'-' if back else '+'} {ahead_}" if ahead else "")
            self.put(depth, f"{to}[0] = {text}")
            return
        (axis,) = s.node.axes
        row = f"{coordinate(axis)} {'-' if back else '+'} {ahead * self.kernel.chunk}" if ahead else coordinate(axis)
        # backwards the next chunk is whole, or there is none
        row = f"T.max({row}, first - t0)" if ahead and back else f"T.min({row}, rows - 1)"
        text, _ = where(s.node, {axis: row}, self.kernel)
        self.put(self.loops(s.node.axes, depth), f"{to}[{coordinate(axis)}] = {text}")

    def compute(self, s: Step, depth: int) -> None:
        """A value, element by element: into registers, its ring, or both; a matrix goes to its ring by way of registers. A sum
        over tokens is made of such values in its ring."""
        n, here = s.node, self.here(s.node.axes)
        if n.op is Op.REDUCE and len(n.args[0].axes) > 1:
            self.row_sums(s, depth)
            return
        if n.op in (Op.CUMSUM, Op.REDUCE):
            self.sum(s, depth)
            return
        if s.event.value in self.laid.matrices:
            self.matrix(s, depth)
            return
        ring = next((a for a in s.writes if a.ring), None)
        lies = self.rings[ring.cell] if ring else None
        kept = self.registers.get(self.cell(s.event.value))
        if kept is not None:
            text, order = kept
            to = f"{text}[{', '.join(here[a] for a in order) or '0'}]"
            if lies is not None and any(a.ahead < 0 for a in s.reads):
                self.put(depth, f"if {self.member()} > 0:")
                before = f'T.cast({lies.element(0, self.c, here)}, "float32")'
                sum_ = f'T.cast({before} + {self.element(n.args[0], here)}, "{DTYPES[n.type.dtype]}")'
                self.put(self.over_rows(n, depth + 1), f"{to} = {sum_}")
                self.put(depth, "else:")
            self.fill_with(n, to, depth + any(a.ahead < 0 for a in s.reads))
            if ring is not None and lies is not None and lies.apart:
                self.parted(ring.cell, depth, lambda slot, d: self.put(d, f"T.copy({text}, {slot})"))
            elif lies is not None:
                self.put(self.over_rows(n, depth), f"{lies.element(0, self.c, here)} = {self.element(n, here)}")
        elif lies is not None:
            self.fill_with(n, lies.element(0, self.c, here), depth)

    def fill_with(self, n: Node, to: str, depth: int) -> None:
        """`to`, an element, from the expression of a value."""
        here = self.here(n.axes)
        if n.op is Op.LOAD and n.axes and not self.is_fetched(n):
            text, condition = where(n, self.in_memory(n.axes), self.kernel)
            inside = self.over_rows(n, depth)
            self.put(inside, f"{to} = T.if_then_else({condition}, {text}, 0.0)" if condition else f"{to} = {text}")
            return
        masked = padding(n)
        self.ready(n, to, depth)
        value = self.element_fetched(n, here) if self.is_fetched(n) else self.expression(n.args[1] if masked else n, here)
        self.put(self.over_rows(n, depth), f"{to} = {value}")
        if masked:                                         # of few chunks, and then for all threads
            self.put(depth, f"if rows < {self.kernel.chunk}:")
            condition = self.element(n.args[0], here)
            self.put(self.over_rows(n, depth + 1), f"{to} = T.if_then_else({condition}, {to}, 0.0)")
        elif (axis := self.ends(n)):
            self.put(depth, f"if rows < {self.kernel.chunk}:")
            self.put(self.over_rows(n, depth + 1), f"{to} = T.if_then_else({coordinate(axis)} < rows, {to}, 0.0)")

    def ends(self, n: Node) -> str:
        """The axis along which a value must be zeros from the end of the sequence on, for a product takes it lying across."""
        products = [self.laid.named[e.value] for r in self.roles.roles for e in r.events if e.do == "issue"]
        return n.axes[0] if any(self.laid.held.get(n) in self.laid.across(p) for p in products) else ""

    def ready(self, n: Node, to: str, depth: int) -> None:
        """Of an eager role: what a choice within a matrix would read from shared memory is computed before it."""
        self.chosen = {}
        if not self.role.eager or len(n.axes) != 2 or self.whole_matrix:
            return

        def walk(x: Node) -> Iterator[Node]:
            for a in () if x in self.laid.held else x.args:
                if x.op is Op.SELECT and a.op is Op.ELEM and a.type == x.type and a not in self.laid.held:
                    yield a
                yield from walk(a)
        for x in dict.fromkeys(walk(n)):
            if x.axes == n.axes and x.type.dtype == "f32":
                text = to
                if n.type != x.type:
                    name = self.linear.fresh("apart")
                    shape = listed(self.shape(self.ordered(x, self.role), self.role))
                    self.buffers_of_role.append(f'{name} = T.alloc_fragment({shape}, "float32")')
                    text = f"{name}[{', '.join(coordinate(a) for a in self.ordered(x, self.role))}]"
                self.put(self.over_rows(x, depth), f"{text} = {self.element(x, self.here(x.axes))}")
                self.chosen[x] = text
                return

    def issue(self, s: Step, depth: int) -> None:
        node = s.node
        left, right = node.args if self.role.rows in node.args[0].axes else node.args[::-1]
        lie = self.laid.across(node)
        (a, rows), (b, columns) = self.operand_of(left, lie), self.operand_of(right, lie)
        flags = ", transpose_A=True" if rows[0] == node["over"] else ""
        flags += ", transpose_B=True" if columns[1] == node["over"] else ""
        flags += "" if s.event.value in self.laid.onto else ", clear_accum=True"
        self.put(depth, f"T.wgmma_gemm({a}, {b}, {self.registers[s.writes[0].cell][0]}{flags})")

    def operand_of(self, node: Node, lie: set[str]) -> tuple[str, tuple[str, ...]]:
        """The registers or the ring's slot behind an operand, and its axes in the order of dimensions. lie: what is read lying
        across."""
        name = self.laid.held.get(node)
        if name is None:
            if node.op is not Op.TWIN and not (node.op is Op.CAST and node["dtype"] in ("f32", "real")) and not padding(node):
                raise self.missing(node)
            text, axes = self.operand_of(node.args[1] if padding(node) else node.args[0], lie)
            a = node["axis"] if node.op is Op.TWIN else ""
            swap = {a: a + "'", a + "'": a} if a else {}
            return text, tuple(swap.get(x, x) for x in axes)
        if self.cell(name) in self.registers and name not in lie:
            return self.registers[self.cell(name)]
        lies = self.ring_of(name)
        return lies.slot(0, self.c), lies.order

    # -- what the threads of a warp do together

    def call(self, macro: str, depth: int, *arguments: str) -> None:
        self.called.append(macro)
        self.put(depth, f"{macro}({', '.join(arguments)})")

    def turn_of(self, cell: str) -> str:
        return f"{self.c} % {self.rings[cell].slots}"

    def sum(self, s: Step, depth: int) -> None:
        """A running sum of 64 tokens, or its last element."""
        n, over = s.node, s.node["axis" if s.node.op is Op.CUMSUM else "over"]
        running = next((name for x, name in self.laid.held.items() if x.op is Op.CUMSUM and x.args == n.args), "")
        plain = not dict(n.attr).get("reverse") and dict(n.attr).get("fn", "sum") == "sum"
        if self.role.warps != 1 or n.axes not in ((), (over,)) or self.size(self.role, over) != warps.SIZE or not plain \
                or not running or Event("compute", running) not in self.role.events:
            raise IRError(f"roles: {self.instance}: {s.event}: one warp sums {warps.SIZE} tokens, running, first to last")
        lies = self.rings[running]
        if n.op is Op.REDUCE:
            text, _ = self.registers[self.cell(s.event.value)]
            self.put(depth, f"{text}[0] = {lies.element(0, self.c, {over: str(warps.SIZE - 1)})}")
            return
        here = self.here(n.axes)
        self.put(self.over_rows(n, depth), f"{lies.element(0, self.c, here)} = {self.element(n.args[0], here)}")
        self.call("running_sum", depth, lies.buffers[0], self.turn_of(running))

    def row_sums(self, s: Step, depth: int) -> None:
        """Sums along rows of a tile, which some lanes of a warp have together. (Rings have zeros for rows past the end.)"""
        n = s.node
        tile, over = n.args[0], n["over"]
        order = (*n.axes, over)
        if n["fn"] != "sum" or len(tile.axes) != 2 or self.ordered(tile, self.role) != order:
            raise IRError(f"roles: {self.instance}: {s.event}: a role sums along rows, not down columns")
        if s.event.value in self.laid.rings:
            raise IRError(f"roles: {self.instance}: {s.event}: a sum of rows stays in its role's registers; it has a ring")
        name, shape = self.linear.fresh(f"{s.event.value}_tile"), listed(self.shape(order, self.role))
        self.buffers_of_role.append(f'{name} = T.alloc_fragment({shape}, "float32")')
        at = ", ".join(map(coordinate, order))
        self.put(self.loops(order, depth), f"{name}[{at}] = {self.element(tile, self.here(order))}")
        self.put(depth, f"T.reduce_sum({name}, {self.registers[self.cell(s.event.value)][0]}, dim=1)")

    def matrix(self, s: Step, depth: int) -> None:
        """What is inverted: its blocks, for products; those on the diagonal as they are. Above it nobody reads."""
        n, here, name = s.node, self.here(s.node.axes), s.event.value
        (text, order), (row, column) = self.registers[self.cell(name)], (coordinate(a) for a in n.axes)
        at, lies = f"{text}[{', '.join(here[a] for a in order)}]", self.rings[name]
        self.whole_matrix = True
        self.fill_with(n, at, depth)
        self.whole_matrix = False
        self.put(self.over_rows(n, depth), f'{lies.element(0, self.c, here)} = T.cast({at}, "float16")')
        inside = self.over_rows(n, depth)
        self.put(inside, f"if {row} // {warps.SOLVED} == {column} // {warps.SOLVED}:")
        self.put(inside + 1, f"{lies.buffers[1]}[{self.turn_of(name)}, {row}, {column} % {warps.SOLVED}] = {at}")

    def solve(self, s: Step, depth: int) -> None:
        (block, size, dtype), matrix = s.node["merges"], s.reads[0].cell
        if self.role.warps > 2 or (block, size, dtype) != (warps.BLOCK, warps.SIZE, "f16"):
            raise IRError(f"roles: {self.instance}: {s.event}: one or two warps solve blocks of {warps.BLOCK} of "
                          f"{warps.SIZE} rows, for products in f16")
        whole, blocks = self.rings[matrix].buffers
        self.call("invert_blocks", depth, blocks, whole, self.turn_of(matrix),
                  self.rings[s.event.value].buffers[0], self.turn_of(s.event.value), str(self.role.warps))

    def join(self, s: Step, depth: int) -> None:
        """The inverse's columns scaled, and rounded to bfloat16."""
        inverse, factor, matrix = self.joint(s)
        self.call("join_blocks", depth, *(x for cell in (matrix, inverse, factor, s.event.value)
                                          for x in (self.rings[cell].buffers[0], self.turn_of(cell))), str(self.role.warps))

    def joint(self, s: Step) -> tuple[str, str, str]:
        """Of what is joined: the inverse, the scale of its columns, and the matrix, where they lie."""
        n = s.node.args[0] if s.node.op is Op.CAST else s.node
        inverses = set(self.laid.matrices.values())
        for x, factor in (n.args, n.args[::-1]) if n.op is Op.ELEM and n["fn"] == "mul" else ():
            bare = factor
            while bare not in self.laid.held and bare.op in (Op.TWIN, Op.CAST):
                bare = bare.args[0]
            if self.laid.held.get(x) in inverses and factor.axes == x.axes[1:] and bare in self.laid.held \
                    and s.node.type.dtype == "bf16":
                return self.laid.held[x], self.laid.held[bare], s.reads[-1].cell
        raise IRError(f"roles: {self.instance}: {s.event}: warps join an inverse, its columns scaled by what lies in a ring, "
                      "in bf16")


# where an element of 16 x 8 blocks, transposed, lies: its thread, and its place among the registers of that
ACROSS = ("lambda c, r: r // 16 * 32 + r % 8 * 4 + c % 8 // 2", "lambda c, r: c // 8 * 4 + r % 16 // 8 * 2 + c % 2")


def across(name: str, shape: str) -> str:
    """A line that says that a tile lies in registers so."""
    return f"T.annotate_layout({{{name}: T.Fragment({shape}, forward_thread_fn={ACROSS[0]}, forward_index_fn={ACROSS[1]})}})"


def zero(node: Node) -> str:
    """In a value's own dtype: no cast hides in a choice."""
    return "0.0" if node.type.dtype == "f32" else f'T.cast(0.0, "{DTYPES[node.type.dtype]}")'


def below(condition: Node) -> bool:
    """Whether it holds wherever the row is greater than the column."""
    rows, columns = ((a.args[0] if a.op in (Op.TWIN, Op.BROADCAST) else a) for a in condition.args) \
        if condition.op is Op.ELEM and condition["fn"] in ("gt", "ge") else (condition, condition)
    return rows.op is Op.INDEX and columns.op is Op.INDEX and not condition.args[0].axes[0].endswith("'")
