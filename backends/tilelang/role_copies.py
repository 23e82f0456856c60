"""How steps of roles that copy are written in TileLang: between tensors, rings and registers, by TMA or by threads."""
from __future__ import annotations

import math
from collections.abc import Callable

from gdn_ir.backends.linearize import listed
from gdn_ir.backends.tilelang.role_places import PART, Lies, RolePlaces
from gdn_ir.backends.tilelang.rules import DTYPES, members_first, point, slot, where
from gdn_ir.backends.tilelang.statements import coordinate
from gdn_ir.nodes import At, IRError, Node, Op, Rows, Slot, Tile, base
from gdn_ir.schedules.events import Step

TOGETHER = 256                                             # elements of a strip: of two bytes, 16 for each thread of a warp


class RoleCopies(RolePlaces):
    """Writes the steps that move what is there already."""

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
        return f"{n['tensor'].name}_[{', '.join(members_first(n, parts))}]"

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

    def in_strips(self, n: Node, ring: Lies, i: int, depth: int) -> tuple[int, str, str, str]:
        """Where a chunk is not whole: the head of a loop over strips of its rows, each one copy of a warp's; an element's
        place in the ring and in memory, and the condition that its row is there."""
        self.put(depth, "else:")
        rows, *rest = self.shape(ring.order, self.role)
        strip = math.gcd(int(rows), max(TOGETHER // math.prod(map(int, rest)), 1))
        rolled = 'annotations={"pragma_unroll_factor": 1}' # nvcc would unroll it, and spill the addresses of all strips
        self.put(depth + 1, f"for strip in T.unroll({int(rows) // strip}, {rolled}):")
        self.put(depth + 2, f"for {', '.join(map(coordinate, ring.order))} in T.Parallel({', '.join([str(strip), *rest])}):")
        row = {ring.order[0]: f"strip * {strip} + {coordinate(ring.order[0])}"}
        text, there = where(n, self.in_memory(ring.order) | row, self.kernel)
        return depth + 3, ring.element(i, self.c, self.here(ring.order) | row), text, there

    def load(self, s: Step, i: int, fenced: bool, depth: int) -> None:
        """By TMA where the chunk is whole; where the sequence ends in it, its rows and zeros."""
        cell = s.writes[0].cell
        ring = self.rings[cell]
        barrier = self.at_barrier(next(f"{name}_full" for name, (_, cells) in self.plan.rings.items() if cell in cells))
        slot = ring.slot(i, self.c)
        if s.ragged:
            self.put(depth, f"if rows >= {self.kernel.chunk}:")
        self.put(depth + s.ragged, f"T.tma_copy({self.box(s.node)}, {slot}, barrier={barrier})")
        if not s.ragged:                                   # however many rows a chunk has
            return
        inside, to, text, there = self.in_strips(s.node, ring, i, depth)
        zero = f'T.cast(0, "{DTYPES[self.value(s.writes[0].value).type.dtype]}")'
        self.put(inside, f"{to} = T.if_then_else({there}, {text}, {zero})")
        if fenced:
            self.put(depth + 1, "T.fence_proxy_async()")

    def store(self, s: Step, i: int, depth: int) -> None:
        """By TMA where the chunk is whole, else to the end of the sequence by threads. T.copy waits until the slot is read."""
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
        inside, held, text, there = self.in_strips(s.node, ring, i, depth)
        self.put(inside, f"if {there}:")
        self.put(inside + 1, f"{text} = {held}")

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

    def fetched(self, node: Node) -> str:
        """The registers that this role has fetched a tensor's elements to."""
        return self.registers[self.laid.fetches(self.instance, self.laid.fetched[self.role.name, node]).cell][0]

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


# where an element of 16 x 8 blocks, transposed, lies: its thread, and its place among the registers of that
ACROSS = ("lambda c, r: r // 16 * 32 + r % 8 * 4 + c % 8 // 2", "lambda c, r: c // 8 * 4 + r % 16 // 8 * 2 + c % 2")


def across(name: str, shape: str) -> str:
    """A line that says that a tile lies in registers so."""
    return f"T.annotate_layout({{{name}: T.Fragment({shape}, forward_thread_fn={ACROSS[0]}, forward_index_fn={ACROSS[1]})}})"
