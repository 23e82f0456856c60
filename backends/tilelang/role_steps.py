"""How the steps of roles that compute are written in TileLang: products, values element by element, sums."""
from __future__ import annotations

from collections.abc import Mapping

from gdn_ir.backends.linearize import listed
from gdn_ir.backends.tilelang import warps
from gdn_ir.backends.tilelang.role_copies import RoleCopies
from gdn_ir.backends.tilelang.rules import DTYPES, RULES, where
from gdn_ir.backends.tilelang.statements import coordinate
from gdn_ir.nodes import IRError, Node, Op
from gdn_ir.schedules.events import Step, padding
from gdn_ir.schedules.protocol import Sync
from gdn_ir.schedules.roles import Event


class RoleSteps(RoleCopies):
    """Writes one step of one role."""

    # -- elements

    def element(self, node: Node, at: Mapping[str, str]) -> str:
        name = self.laid.held.get(node)
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
        running = self.laid.held[n] if n.op is Op.CUMSUM else self.laid.running(n)
        plain = not dict(n.attr).get("reverse") and dict(n.attr).get("fn", "sum") == "sum"
        if n.op is Op.REDUCE and not running and plain and self.role.warps == 1 and self.size(self.role, over) == warps.SIZE:
            self.sum_apart(s, depth)
            return
        mine = Event("compute", running) in self.role.events
        if self.role.warps != 1 or n.axes not in ((), (over,)) or self.size(self.role, over) != warps.SIZE or not plain \
                or not running or not (mine or n.op is Op.REDUCE):
            raise IRError(f"roles: {self.instance}: {s.event}: one warp sums {warps.SIZE} tokens, running, first to last")
        lies = self.rings[running]
        if n.op is Op.REDUCE:
            text, _ = self.registers[self.cell(s.event.value)]
            self.put(depth, f"{text}[0] = {lies.element(0, self.c, {over: str(warps.SIZE - 1)})}")
            return
        here = self.here(n.axes)
        self.put(self.over_rows(n, depth), f"{lies.element(0, self.c, here)} = {self.element(n.args[0], here)}")
        self.call("running_sum", depth, lies.buffers[0], self.turn_of(running))

    def sum_apart(self, s: Step, depth: int) -> None:
        """A sum of 64 numbers that nobody has summed running: by way of memory of its own, which is no ring. That all lanes
        have read it before the next chunk's is written, an arrival after it sees to."""
        mine = self.plan.ops[self.instance]
        if not any(isinstance(x, Sync) and x.kind == "arrive" for x in mine[mine.index(s):]):
            raise IRError(f"roles: {self.instance}: {s.event}: the role must arrive somewhere after it, which keeps its warp "
                          "together")
        terms, place = s.node.args[0], self.linear.fresh(f"{s.event.value}_terms")
        self.allocate_shared(place, ["1", str(warps.SIZE)], "float32")
        term = self.element(terms, self.here(terms.axes))
        self.put(self.over_rows(terms, depth), f"{place}[0, {coordinate(terms.axes[0])}] = {term}")
        self.call("running_sum", depth, place, "0")
        self.put(depth, f"{self.registers[self.cell(s.event.value)][0]}[0] = {place}[0, {warps.SIZE - 1}]")

    def row_sums(self, s: Step, depth: int) -> None:
        """Sums along rows of a tile, which some lanes of a warp have together. (Rings have zeros for rows past the end.)"""
        n = s.node
        tile, over = n.args[0], n["over"]
        order = (*n.axes, over)
        if n["fn"] != "sum" or len(tile.axes) != 2 or self.ordered(tile, self.role) != order:
            raise IRError(f"roles: {self.instance}: {s.event}: a role sums along rows, not down columns")
        name, shape = self.linear.fresh(f"{s.event.value}_tile"), listed(self.shape(order, self.role))
        self.buffers_of_role.append(f'{name} = T.alloc_fragment({shape}, "float32")')
        at = ", ".join(map(coordinate, order))
        self.put(self.loops(order, depth), f"{name}[{at}] = {self.element(tile, self.here(order))}")
        kept, ring = self.registers.get(self.cell(s.event.value)), next((a.cell for a in s.writes if a.ring), None)
        sums = kept[0] if kept else self.linear.fresh(f"{s.event.value}_sums")
        if not kept:
            self.buffers_of_role.append(f'{sums} = T.alloc_fragment({listed(self.shape(n.axes, self.role))}, "float32")')
        self.put(depth, f"T.reduce_sum({name}, {sums}, dim=1)")
        if ring:
            here = self.here(n.axes)
            self.put(self.over_rows(n, depth), f"{self.rings[ring].element(0, self.c, here)} = {sums}[{coordinate(n.axes[0])}]")

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
        """The inverse, its columns scaled or as they are, rounded to bfloat16: transposed, or upright if it is stored."""
        inverse, factor, matrix = self.joint(s)
        stored = s.event.value in self.stored()
        if not (factor or stored):
            raise IRError(f"roles: {self.instance}: {s.event}: warps join what is multiplied with its columns scaled")
        macro = f"join_{'scaled_' if factor else ''}upright" if stored else "join_blocks"
        self.call(macro, depth, *(x for cell in (matrix, inverse, factor, s.event.value) if cell
                                  for x in (self.rings[cell].buffers[0], self.turn_of(cell))), str(self.role.warps))

    def joint(self, s: Step) -> tuple[str, str, str]:
        """Of what is joined: the inverse, the scale of its columns ("": none), and the matrix, where they lie."""
        n = s.node.args[0] if s.node.op is Op.CAST else s.node
        inverses, rounded = set(self.laid.matrices.values()), s.node.type.dtype == "bf16"
        if self.laid.held.get(n) in inverses and rounded:
            return self.laid.held[n], "", s.reads[-1].cell
        for x, factor in (n.args, n.args[::-1]) if n.op is Op.ELEM and n["fn"] == "mul" else ():
            bare = factor
            while bare not in self.laid.held and bare.op in (Op.TWIN, Op.CAST):
                bare = bare.args[0]
            if self.laid.held.get(x) in inverses and factor.axes == x.axes[1:] and bare in self.laid.held and rounded:
                return self.laid.held[x], self.laid.held[bare], s.reads[-1].cell
        raise IRError(f"roles: {self.instance}: {s.event}: warps join an inverse, its columns scaled by what lies in a ring or "
                      "not at all, in bf16")


def zero(node: Node) -> str:
    """In a value's own dtype: no cast hides in a choice."""
    return "0.0" if node.type.dtype == "f32" else f'T.cast(0.0, "{DTYPES[node.type.dtype]}")'


def below(condition: Node) -> bool:
    """Whether it holds wherever the row is greater than the column."""
    rows, columns = ((a.args[0] if a.op in (Op.TWIN, Op.BROADCAST) else a) for a in condition.args) \
        if condition.op is Op.ELEM and condition["fn"] in ("gt", "ge") else (condition, condition)
    return rows.op is Op.INDEX and columns.op is Op.INDEX and not condition.args[0].axes[0].endswith("'")
