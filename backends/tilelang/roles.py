"""Prints a kernel of cooperating roles as TileLang: what each does in a chunk, in the order of its plan (protocol.py).

Every synchronisation printed here is an operation of the plan. TileLang adds none: its pass that places barriers is off (it
would put them into roles), and what a warp writes to shared memory others of its role read only behind a barrier of the plan.
A product's rows fill the four warps of one warpgroup: TileLang would fence twice the registers of a product over two.

A warpgroup is a row of the block's threads, so that copies of a role, a warpgroup each, can be one text: which part of a value
is theirs they know by their row. A block then has less code, for whose instructions its warps wait (docs/performance-log.md).
"""
from __future__ import annotations

from functools import lru_cache
from itertools import groupby

from gdn_ir.backends.base import SHARED, Kernel, Reason
from gdn_ir.backends.linearize import listed
from gdn_ir.backends.printer import INDENT
from gdn_ir.backends.tilelang import warps
from gdn_ir.backends.tilelang.role_copies import across
from gdn_ir.backends.tilelang.role_places import PART, Lies
from gdn_ir.backends.tilelang.role_steps import RoleSteps
from gdn_ir.backends.tilelang.rules import DTYPES, where
from gdn_ir.backends.tilelang.statements import coordinate
from gdn_ir.nodes import IRError, Node, Op
from gdn_ir.program import Program, ScanView, substitute, toposort
from gdn_ir.schedules.execute import Fault, execute
from gdn_ir.schedules.events import Laid, Step
from gdn_ir.schedules.protocol import Sync, derive
from gdn_ir.schedules.roles import REGISTERS, Role, Roles

ROWS = 64                                                  # of a product of one warpgroup
RESERVED = 1024                                            # bytes of shared memory that each block takes for itself


def supports(kernel: Kernel, arch: str) -> Reason | None:
    """Why a kernel's role schedule cannot be printed, if so."""
    if arch != "sm_90":
        return Reason(f"roles are printed for sm_90, not for {arch}")
    scans = [s for s in kernel.program.scans() if not kernel.parallel or s is not kernel.parallel.node]
    if len(scans) != 1 or "idle" in dict(scans[0].attr):
        return Reason("roles: one scan a kernel, whose iterations come one after another and always run; its segments, or what "
                      "else a block takes, may run at once")
    if kernel.gathers and scans[0]["carries"]:
        return Reason("roles: a block that takes several members of a group carries nothing")
    try:
        printer = RolePrinter(kernel)
        printer.check()
        seen(kernel.program, printer.roles)
    except IRError as e:
        return Reason(str(e))
    except Fault as e:
        return Reason(f"roles: {e}")
    return None


@lru_cache(maxsize=64)
def seen(program: Program, roles: Roles) -> None:
    """Whoever wrote the order of events: what it computes is seen before it runs. (Once, for a tuner varies what is around a
    scan by the hundred.) Raises Fault."""
    execute(derive(Laid(program, roles)), 4, seeds=1)


class RolePrinter(RoleSteps):
    imports = ("import tilelang", "import tilelang.language as T")

    @property
    def threads(self) -> str:
        return listed(["128", str(len(self.roles.warpgroups()))])

    def check(self) -> None:
        """Raises IRError where a product has no form here."""
        for r in self.roles.roles:
            if r.rows and r.rows not in self.kernel.extents:
                raise IRError(f"roles: {r.name}.rows: got {r.rows!r}; accepts {', '.join(self.kernel.extents)}")
            products = [e.value for e in r.events if e.do == "issue"]
            if products and (r.warps != 4 or self.size(r, r.rows) != ROWS):
                raise IRError(f"roles: {r.name} issues products: it must have 4 warps and {ROWS} rows ({r.rows} by copies), "
                              f"not {r.warps} and {self.size(r, r.rows)}")
            for s in self.laid.steps[self.laid.instances(r)[0]]:
                if s.event.early and self.kernel.gathers:
                    raise IRError(f"roles: {r.name}: {s}: what comes next may be another member's")
                if s.late and self.placed(s):              # the place that is printed is of the chunk at hand
                    raise IRError(f"roles: {r.name}: {s}: only what touches no tensor, and masks no row, can be late")
        self.source()
        room = (SHARED["sm_90"] + RESERVED) // self.roles.blocks - RESERVED
        if self.taken > room:
            raise IRError(f"roles: their rings take {self.taken} bytes of shared memory; a block has {room}: lower the depth "
                          "of one")

    # -- the kernel

    def about(self) -> tuple[str, ...]:
        each = (f"{r.name} ({r.warps * r.copies} warp{'s' * (r.warps * r.copies > 1)})" for r in self.roles.roles)
        return f"roles: {', '.join(each)}, by tilelang",

    def macros(self) -> list[str]:
        return warps.texts(self.called)

    def turn(self, scan: ScanView) -> int:
        """Of a segment its place; a block that has none has no chunks."""
        self.bind(f"slot_{scan.axis}", f"T.truncdiv(first, {self.span(scan)}) + n + i_{scan.axis}")
        return 2

    def trip(self, scan: ScanView) -> str:
        """Roles count chunks as they come, backwards too: by that they know slots and parities."""
        at, counter = super().trip(scan), f"i_{scan.axis}"
        if self.kernel.gathers and scan.axis == self.scan.axis:
            return f"T.truncdiv({counter}, members)".join(at.rsplit(counter, 1))
        return at if not scan.reverse else f"(chunks - 1 - {counter})".join(at.rsplit(counter, 1))

    def tail(self, chunk: int) -> None:
        """Whose blocks have none is no matter: who stores clears what lies behind (`clear`)."""

    def chunk(self, scan: ScanView, depth: int) -> None:
        super().chunk(scan, depth)
        if self.kernel.gathers and scan.axis == self.scan.axis:
            member, group = self.kernel.gathers
            self.put(depth, f"i_{member} = i_{group} * members + T.truncmod(i_{scan.axis}, members)")

    def work(self, depth: int) -> None:
        chunks = f"T.ceildiv({self.length}, {self.kernel.chunk})"
        if scan := self.kernel.parallel:
            most, at = self.kernel.extents[self.scan.axis], f"i_{scan.axis}"
            chunks = f"T.min({most}, {chunks} - {at} * {most})"
            chunks = f"T.if_then_else({at} >= 0, T.max({chunks}, 0), 0)" if self.kernel.varlen else chunks
        if self.kernel.gathers:                            # each for all members, before the next
            self.bind("members", f"T.truncdiv({', '.join(self.kernel.gathers)})")
            chunks = f"members * {chunks}"
        if self.roles.blocks > 1:
            self.put(depth, f"T.annotate_min_blocks_per_sm({self.roles.blocks})")
        self.put(depth, f"chunks = {chunks}")
        self.buffers["chunks"] = 'T.alloc_var("int32")'
        self.taken = 0
        for slots, cells in self.plan.rings.values():
            for cell in cells:
                self.lay(cell, slots)
        for name in dict.fromkeys(name for name, _ in self.places.values()):
            mine = [b for x, b in self.plan.barriers.items() if self.places[x][0] == name]
            self.buffers[name] = f"T.alloc_barrier([{', '.join(str(b.arrivals) for b in mine for _ in range(b.slots))}])"
        self.put(depth, "tx = T.get_thread_binding(0)")
        self.put(depth, "warpgroup = T.get_thread_binding(1)")
        groups = self.roles.warpgroups()
        instances = [(r, name, i) for r in self.roles.roles for i, name in enumerate(self.laid.instances(r))]
        g = 0
        while g < len(groups):
            group, first = groups[g], g
            g += group[0].copies if self.alike(group[0]) else 1
            self.put(depth, ("else:" if g == len(groups) else f"elif warpgroup < {g}:") if first else f"if warpgroup < {g}:")
            equal = REGISTERS // (32 * self.roles.warps * self.roles.blocks)
            if self.roles.blocks == 1 or group[0].registers != equal:
                self.put(depth + 1, f"T.set_max_nreg({group[0].registers}, {int(group[0].registers >= equal)})")
            last = 0
            for i, r in enumerate(group):
                last += 32 * r.warps
                if len(group) > 1:
                    self.put(depth + 1, ("if" if i == 0 else "elif") + f" tx < {last}:" if i + 1 < len(group) else "else:")
                self.shared = first if self.alike(r) else None
                self.do(*instances.pop(0), depth + 1 + (len(group) > 1))
            del instances[:g - first - 1]

    def lay(self, cell: str, slots: int) -> None:
        """Shared memory for a cell of a ring."""
        name = self.value_of(cell)
        order, kind = self.order_of(name), DTYPES[self.value(name).type.dtype]
        if name in {*self.laid.matrices, *self.laid.matrices.values()}:
            made = {"": ("matrix", "float16"), "_blocks": ("blocks", "float32")} if name in self.laid.matrices else \
                {"": ("inverses", "float16")}
            names = {f"{cell}_ring{more}": self.linear.fresh(f"{cell}_ring{more}") for more in made}
            for text, (width, dtype) in zip(names.values(), made.values(), strict=True):
                self.allocate_shared(text, [str(slots), str(warps.SIZE), str(warps.WIDTHS[width])], dtype)
            self.rings[cell] = Lies(tuple(names.values()), slots, order, False)
            return
        shape = self.shape(order, self.laid.owner[name]) or ["1"]
        apart, ring = self.crosses(name), self.laid.rings[name]
        near = f"{ring.values[0]}_" if ring.near and name != ring.values[0] else ""      # TileLang lays buffers out by name
        texts = [self.linear.fresh(f"{near}{cell}_ring{i if apart else ''}") for i in range(slots if apart else 1)]
        for text in texts:
            self.allocate_shared(text, shape if apart else [str(slots), *shape], kind)
        if apart:
            self.put(2, f"T.annotate_layout({{{', '.join(f'{t}: tilelang.layout.make_swizzled_layout({t})' for t in texts)}}})")
        elif self.joined(name) and name in self.stored():
            self.put(2, f"T.annotate_layout({{{texts[0]}: tilelang.layout.make_swizzled_layout({texts[0]})}})")
        self.rings[cell] = Lies(tuple(texts), slots, order, apart)

    def do(self, r: Role, instance: str, copy: int, depth: int) -> None:
        """A role, from its registers to its last store."""
        self.put(depth, f"# {instance if self.shared is None else r.name}")
        self.role, self.instance, self.part, self.registers, self.said = r, instance, copy, {}, ""
        if self.shared is not None:
            self.put(depth, f"{PART} = warpgroup - {self.shared}")
        ops, steps = self.plan.ops[instance], self.laid.steps[instance]
        fetches = [s for s in steps if s.event.do == "fetch"]
        for s in fetches:
            text = self.linear.fresh(f"next_{s.event.value}" if s.event.early else s.event.value)
            self.registers[s.writes[0].cell] = text, s.node.axes
            where_ = "T.alloc_fragment" if s.node.axes else "T.alloc_local"
            self.put(depth, f'{text} = {where_}({listed(self.shape(s.node.axes, r) or ["1"])}, "{DTYPES[s.node.type.dtype]}")')
        for a in {a.cell: a for s in steps for a in (*s.reads, *s.writes) if not a.ring}.values():
            if a.cell not in self.registers:
                self.allocate_registers(a.cell, a.value, depth)
        for s in steps:                                    # matrices that only pass through registers
            if s.event.do == "compute" and self.cell(s.event.value) not in self.registers and len(s.node.axes) == 2:
                self.allocate_registers(self.cell(s.event.value), s.event.value, depth)
        carries = [c for c in self.scan.carry_nodes() if self.laid.owner[c["name"]] is r]
        for c in carries:
            start = self.scan.inits[self.scan.carries.index(c["name"])]
            self.put(self.over_rows(c, depth), f"{self.element(c, self.here(c.axes))} = {self.from_memory(start)}")
        for s in steps:                                    # above an inverse's diagonal nothing is ever written
            if s.event.do == "join":
                lies = self.rings[s.event.value]
                names = ", ".join(map(coordinate, lies.order))
                self.put(depth, f"for i, {names} in T.Parallel({', '.join([str(lies.slots), *self.shape(lies.order, r)])}):")
                self.put(depth + 1, f"{lies.buffers[0]}[i, {names}] = 0.0")
        top = len(self.lines)
        self.buffers_of_role = []
        self.put(depth, f"for i_{self.scan.axis} in T.serial(chunks):")
        if any(self.placed(s) for s in steps):
            self.chunk(self.scan, depth + 1)
        here = f"i_{self.scan.axis}"
        first = [s for s in fetches if s.event.early]      # nobody was there to fetch what the first chunk needs
        if first:
            self.put(depth + 1, f"if {here} == 0:")
            for s in first:
                self.fetch(s, depth + 2, 0)
        for late, run in groupby(ops, key=lambda x: x.late):
            self.c = f"({here} - 1)" if late else here
            if late:
                self.put(depth + 1, f"if {here} > 0:")
            self.run(list(run), depth + 1 + late)
        behind = [x for x in ops if x.late]
        if behind:
            self.c = "(chunks - 1)"
            self.put(depth, "if chunks > 0:")
            self.run(behind, depth + 1)
        self.lines[top:top] = [f"{INDENT * depth}{line}" for line in self.buffers_of_role]
        if self.kernel.owns_tail:
            swept = {s["tensor"].name for s in self.kernel.sweeps}
            self.clear([s for s in steps if s.event.do == "store" and s.node["tensor"].name in swept], depth)
        for c in carries:
            for store, last in self.leaves():
                if last["i"] == self.scan.carries.index(c["name"]):
                    self.say(c, depth)
                    to, _ = where(store, self.in_memory(c.axes), self.kernel)
                    value = substitute([store.args[0]], {last: c})[store.args[0]]
                    self.put(self.over_rows(c, depth), f"{to} = {self.element(value, self.here(c.axes))}")

    def leaves(self) -> list[tuple[Node, Node]]:
        """What is stored behind the scan, and the carry's last value that each store is of."""
        stores = [n for n in self.kernel.program.roots if n.op is Op.STORE]
        lasts = [[n for n in toposort([s.args[0]]) if n.op is Op.FINAL] for s in stores]
        for store, found in zip(stores, lasts, strict=True):
            if len(found) != 1 or found[0].axes != store.args[0].axes:
                raise IRError(f"roles: {store['tensor'].name} is stored behind the scan, and is not of one carry's last value, "
                              "element by element")
        return [(store, last) for store, (last,) in zip(stores, lasts, strict=True)]

    def clear(self, stores: list[Step], depth: int) -> None:
        """Rows that no sequence owns come back as zeros: of as many as a chunk has, the blocks of each sequence take turns; or
        those of blocks behind the last sequence's."""
        if not stores:
            return
        chunk = self.kernel.chunk
        self.put(depth, "tail = T.min(T.max(cu[N], 0), L)")
        if self.kernel.parallel:
            span = self.kernel.span(self.kernel.parallel)
            self.put(depth, f"behind = pid - T.truncdiv(tail, {span}) - N")
            left = f"T.max(T.min(T.ceildiv(L - tail - behind * {span}, {chunk}), {span // chunk}), 0)"
            self.put(depth, f"for i in T.serial(T.if_then_else(behind >= 0, {left}, 0)):")
            self.put(depth + 1, f"beyond = behind * {span} + i * {chunk}")
        else:
            self.put(depth, f"for i in T.serial(T.truncdiv(T.ceildiv(L - tail, {chunk}) + N - 1 - n, N)):")
            self.put(depth + 1, f"beyond = (n + i * N) * {chunk}")
        for s in stores:
            self.part = s.part or 0
            order = tuple(sorted(s.node.args[0].axes, key=lambda a: a not in self.kernel.tokens))
            text, inside = where(s.node, self.in_memory(order), self.kernel, first="tail + beyond", rows="L - tail - beyond")
            deepest = self.rows_of(order, depth + 1)
            self.put(deepest, f"if {inside}:")
            self.put(deepest + 1, f"{text} = 0.0")

    def allocate_registers(self, cell: str, name: str, depth: int) -> None:
        node, r = self.value(name), self.role
        moved = name in self.laid.rings and self.crosses(name) and not self.multiplied(r, name)
        order = self.order_of(name) if moved else self.ordered(node, r)
        apart = r.copies > 1 and self.shared is None
        text = self.linear.fresh(self.laid.homes.get(name, name) + (f"_{self.part}" if apart else ""))
        self.registers[cell] = text, order
        where_ = "T.alloc_fragment" if order else "T.alloc_local"
        self.put(depth, f'{text} = {where_}({listed(self.shape(order, r) or ["1"])}, "{DTYPES[node.type.dtype]}")')
        if moved:
            self.put(depth, across(text, listed(self.shape(order, r))))

    def placed(self, s: Step) -> bool:
        """Whether a step must know its chunk's place, or where its sequence ends."""
        def walk(n: Node) -> bool:
            return n.op in (Op.LOAD, Op.VALID) or any(walk(a) for a in n.args if a not in self.laid.held)
        return s.event.do in ("load", "store", "fetch") or (s.event.do == "compute" and walk(s.node))

    # -- synchronisation

    def run(self, ops: list[Step | Sync], depth: int) -> None:
        """Operations of a plan in order; arrivals in a row are one lane's."""
        rest = list(ops)
        while rest:
            x = rest.pop(0)
            if isinstance(x, Step):
                self.say(x.node.args[0] if x.node.op is Op.STORE else x.node, depth)
                fences = []
                while x.event.do == "load" and rest and isinstance(rest[0], Sync) and rest[0].kind == "fence":
                    fences.append(rest.pop(0))
                self.event(x, bool(fences), depth)
            elif x.kind == "wait":
                self.put(depth, f"T.barrier_wait({self.at_barrier(x.barrier)}, {self.parity(x)})")
            elif x.kind == "fence":
                self.put(depth, "T.fence_proxy_async()")
            elif x.kind == "drain" and x.engine == "tensor":
                self.put(depth, f"T.wait_wgmma({x.most})")
            elif x.kind == "arrive":
                self.put(depth, "T.sync_warp()")
                self.put(depth, "if tx % 32 == 0:")
                self.put(depth + 1, f"T.barrier_arrive({self.at_barrier(x.barrier)})")
                while rest and isinstance(y := rest[0], Sync) and y.kind == "arrive":
                    self.put(depth + 1, f"T.barrier_arrive({self.at_barrier(y.barrier)})")
                    rest.pop(0)

    def parity(self, x: Sync) -> str:
        turn = f"{self.c} // {self.plan.barriers[x.barrier].slots}"
        return f"({turn} + {x.flip}) % 2" if x.flip else f"{turn} % 2"


__all__ = ["RolePrinter", "supports"]
