"""Where the values of roles lie in TileLang's text, and their barriers: in registers, in rings, which slot, whose part.

Rings that the tensor cores read lie as those want it. One that registers read or write lying across (ldmatrix, stmatrix, both
transposing) is a buffer for each slot, for TileLang 0.1.15 drops the offset of a slice there, and its registers' layout is
given, for inference picks an order that forbids them.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from gdn_ir.backends.base import Kernel
from gdn_ir.backends.linearize import listed
from gdn_ir.backends.tilelang.emit import TileLangPrinter
from gdn_ir.backends.tilelang.statements import SM_90
from gdn_ir.nodes import IRError, Node, Op, stored_axes
from gdn_ir.program import ScanView
from gdn_ir.schedules.events import Laid, Step, padding, untwinned
from gdn_ir.schedules.protocol import Plan, Sync, derive
from gdn_ir.schedules.roles import Role

PART = "part"                                              # of what a role's copies split: the one of the threads at hand


@dataclass(frozen=True)
class Lies:
    """Where a ring's cell lies. buffers: one with all slots, or (apart) one for each; order: of a slot's dimensions."""
    buffers: tuple[str, ...]
    slots: int
    order: tuple[str, ...]
    apart: bool

    def slot(self, i: int, c: str) -> str:
        return self.buffers[i] if self.apart else f"{self.buffers[0]}[{c} % {self.slots}, {', '.join(':' for _ in self.order)}]"

    def element(self, i: int, c: str, at: Mapping[str, str]) -> str:
        slot = [] if self.apart else [f"{c} % {self.slots}"]
        return f"{self.buffers[i]}[{', '.join([*slot, *([at[a] for a in self.order] or ['0'])])}]"


class RolePlaces(TileLangPrinter):
    """A printer that knows where a role's values and barriers lie. c: the chunk at hand, as text; role, part: whose turn it is,
    and which part of a split axis; shared: the first of the warpgroups that have this text, if they are several; registers:
    (name, order of axes) of this role's cells; rings: where those of all lie; places: of each barrier the array that it is in,
    and its first slot there, if that has others."""

    def __init__(self, kernel: Kernel) -> None:
        assert kernel.options.roles is not None
        super().__init__(replace(kernel, program=untwinned(kernel.program)), SM_90)
        self.roles = kernel.options.roles
        self.laid = Laid(self.kernel.program, self.roles)
        self.plan: Plan = derive(self.laid)
        self.scan: ScanView = self.laid.scan
        self.c = ""                                        # the chunk at hand, as text
        self.role, self.instance = self.roles.roles[0], ""
        self.part = 0                                      # of an axis in parts: the one at hand
        self.shared: int | None = None
        self.registers: dict[str, tuple[str, tuple[str, ...]]] = {}    # cell -> name, order of axes
        self.rings: dict[str, Lies] = {}                   # by cell
        self.called: list[str] = []                        # macros (warps.py)
        self.whole_matrix = False                          # whether what is written above a diagonal does not matter
        self.buffers_of_role: list[str] = []               # lines that make more registers for the role at hand
        self.taken = 0                                     # bytes of shared memory
        self.places = dict(self.placed_barriers())

    def placed_barriers(self) -> Iterator[tuple[str, tuple[str, int | None]]]:
        """Barriers of a value's parts are one array, the slots of each beside each other."""
        for name, b in self.plan.barriers.items():
            channel, end = name.rsplit("_", 1)
            cells = self.plan.rings.get(channel, (0, ()))[1]
            value = self.value_of(cells[0]) if cells else ""
            if cells and self.laid.split(value) > 1:
                part = int(cells[0][len(value) + 1:])
                yield name, (f"{channel.rsplit('_', 1)[0]}_{end}", part * b.slots)
            else:
                yield name, (name, None)

    def at_barrier(self, barrier: str) -> str:
        """A barrier's slot for the chunk at hand."""
        slots, (name, first) = self.plan.barriers[barrier].slots, self.places[barrier]
        at = f"{self.c} % {slots}"
        if first is not None and self.shared is not None:
            at = f"{PART} * {slots} + {at}"
        return f"{name}[{f'{first} + ' if first and self.shared is None else ''}{at}]"

    def value_of(self, cell: str) -> str:
        """The value in a ring's cell."""
        return next(a.value for ss in self.laid.steps.values() for s in ss for a in s.writes if a.ring and a.cell == cell)

    def alike(self, r: Role) -> bool:
        """Whether copies of a role are one text: each is a warpgroup, and they do the same, but each with its parts, which lie
        apart from each other and which it only reads into registers or writes from there."""
        def plain(x: Step | Sync) -> object:
            return x.event if isinstance(x, Step) else replace(x, barrier=self.places[x.barrier][0] if x.barrier else "")
        names = self.laid.instances(r)
        steps = self.laid.steps[names[0]]
        touched = {a.value for s in steps for a in (*s.reads, *s.writes) if a.ring}
        moves = any(s.event.do in ("load", "store") for s in steps)
        same = len({tuple(map(plain, self.plan.ops[n])) for n in names}) == 1
        return len(names) > 1 and r.warps == 4 and same and not moves \
            and all(self.crosses(v) for v in touched if self.laid.split(v) > 1)

    # -- tiles

    def size(self, r: Role, axis: str) -> int:
        """The extent of an axis, as a role has it."""
        return self.kernel.tile(axis) // self.laid.axes.get(axis, 1)

    def ordered(self, node: Node, r: Role) -> tuple[str, ...]:
        """A tile's axes as registers have them: the rows of products first."""
        return tuple(sorted(node.axes, key=lambda a: (a != r.rows, a)))

    def shape(self, order: tuple[str, ...], r: Role) -> list[str]:
        return [str(self.size(r, a)) for a in order]

    def value(self, name: str) -> Node:
        return self.laid.value(name)

    def order_of(self, name: str) -> tuple[str, ...]:
        """How a ring has a value's axes: as the tensor that it comes from or goes to, else as its producer's registers, which
        have what is joined transposed, if no tensor is made of it."""
        node = self.value(name)
        if (self.joined(name) and name not in self.stored()) or name in self.laid.matrices.values():
            return self.ordered(node, self.laid.owner[name])[::-1]
        store = next((s for s in self.laid.stores.values() if self.laid.held.get(s.args[0]) == name), None)
        memory = node if node.op is Op.LOAD else store
        return stored_axes(memory["index"]) if memory is not None else self.ordered(node, self.laid.owner[name])

    def allocate_shared(self, name: str, shape: list[str], dtype: str) -> None:
        self.taken += math.prod(map(int, shape)) * (4 if dtype == "float32" else 2)
        self.buffers[name] = f'T.alloc_shared({listed(shape)}, "{dtype}")'

    def crosses(self, name: str) -> bool:
        """Whether registers read or write a ring lying across."""
        moved = [r for r in self.roles.roles for e in r.events if e.do == "read" and e.value == name]
        alone = self.joined(name) or name in self.laid.passed
        moved += [self.laid.owner[name]] if self.value(name).op is not Op.LOAD and not alone else []
        return any(self.ordered(self.value(name), r) != self.order_of(name) for r in moved)

    def multiplied(self, r: Role, name: str) -> bool:
        """Whether a role multiplies what it has of a value in registers: rows come first there, however a ring has them."""
        def behind(n: Node) -> str:
            return self.laid.held[n] if n in self.laid.held else behind(n.args[padding(n)]) if n.args else ""
        products = [self.laid.named[e.value] for e in r.events if e.do == "issue"]
        return any(r.rows in a.axes and behind(a) == name for p in products for a in p.args)

    def joined(self, name: str) -> bool:
        return any(e.do == "join" and e.value == name for e in self.laid.owner[name].events)

    def stored(self) -> set[str]:
        """The values that tensors are made of."""
        return {self.laid.held.get(s.args[0], "") for s in self.laid.stores.values()}

    def cell(self, name: str) -> str:
        return f"{self.instance}:{self.laid.homes.get(name, name)}"

    def ring_of(self, name: str) -> Lies:
        """Where a value that another role makes lies, or the part of it that is at hand."""
        found = self.rings[f"{name}_{self.part}" if self.laid.split(name) > 1 else name]
        if len(found.buffers) > 1:
            raise IRError(f"roles: {self.instance} uses {name} where it lies, but its slots are apart: it needs `read {name}`")
        return found
