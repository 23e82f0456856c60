"""Runs a plan of roles as a machine would: in any order that its synchronisation allows, and finds what it fails to order.

Roles are interleaved step by step. A product or a bulk copy touches memory some time between its issue and its completion; what
threads write is not seen by the asynchronous proxy before their fence. Each access is checked against vector clocks: it must
come after whatever it conflicts with because of synchronisation, not because of luck. So one run finds a missing wait, however
it happened to be interleaved; and what is read must be the value that the reader means.
"""
from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from gdn_ir.schedules.events import Access, Step
from gdn_ir.schedules.protocol import ASYNC, Op, Plan

Clock = dict[str, int]
Choose = Callable[[list[str]], str]


class Fault(AssertionError):
    """A race, a stale read, a write that is not visible, a deadlock or a miscounted barrier."""


@dataclass
class Cell:
    """One slot of a ring, or registers. holds: (value, chunk); by: who wrote it, and when; fenced: when that became visible to
    the asynchronous proxy (None: not yet); reads: when each actor last read it."""
    holds: tuple[str, int] | None = None
    by: tuple[str, int] | None = None
    proxy: str = "threads"
    fenced: tuple[str, int] | None = None
    reads: Clock = field(default_factory=dict)


@dataclass
class Phases:
    """A barrier's slot: phases that have ended, arrivals and copies missing in this one; what is known to who arrived, and to
    who saw a phase end."""
    ended: int = 0
    arrived: int = 0
    copies: int = 0
    arriving: Clock = field(default_factory=dict)
    seen: Clock = field(default_factory=dict)


@dataclass
class Flight:
    """What the tensor cores or the copy engine are at."""
    name: str
    role: str
    step: Step
    chunk: int
    clock: Clock
    landed: bool = False


def join(into: Clock, other: Clock) -> None:
    for actor, time in other.items():
        into[actor] = max(into.get(actor, 0), time)


def apart(role: str) -> str:
    """The warps of a role, as each other knows them: what they have done is known once a barrier has seen them all."""
    return f"{role}'s warps"


def unrolled(ops: tuple[Op, ...], chunks: int) -> Iterator[tuple[Op, int]]:
    """What a role does, with the chunk that each step is of."""
    def early(x: Op) -> bool:
        return isinstance(x, Step) and x.event.early
    yield from ((x, 0) for x in ops if early(x) and chunks)
    for c in range(chunks):
        yield from ((x, c - x.late + early(x)) for x in ops if x.late <= c < chunks - early(x))
    if chunks:
        yield from ((x, chunks - 1) for x in ops if x.late)


class Machine:
    def __init__(self, plan: Plan, chunks: int, ragged: bool) -> None:
        short = range(1) if plan.reverse else range(chunks - 1 - plan.several, chunks)
        self.plan, self.short = plan, short if ragged else range(0)
        self.programs = {role: list(unrolled(ops, chunks)) for role, ops in plan.ops.items()}
        self.at = dict.fromkeys(self.programs, 0)
        self.clocks: dict[str, Clock] = {role: {role: 1} for role in self.programs}
        self.cells: dict[tuple[str, int], Cell] = {}
        self.barriers = {(name, i): Phases() for name, b in plan.barriers.items() for i in range(b.slots)}
        self.flights: dict[str, list[Flight]] = {role: [] for role in self.programs}
        self.depth = {cell: slots for slots, cells in plan.rings.values() for cell in cells}
        self.full = {cell: f"{name}_full" for name, (_, cells) in plan.rings.items() for cell in cells}
        for role, ops in plan.ops.items():                 # a carry holds its first value
            for x in ops:
                for a in x.writes if isinstance(x, Step) else ():
                    if a.ahead:
                        self.cells[a.cell, 0] = Cell((a.value, 0), (role, 0))

    # -- memory

    def knows(self, clock: Clock, what: tuple[str, int] | None) -> bool:
        return what is None or clock.get(what[0], 0) >= what[1]

    def cell(self, a: Access, chunk: int) -> Cell:
        return self.cells.setdefault((a.cell, chunk % self.depth[a.cell] if a.ring else 0), Cell())

    def beside(self, a: Access, chunk: int, role: str) -> bool:
        """Whether a role's warps read what others of them wrote."""
        by = self.cell(a, chunk).by
        return a.ring and not a.own and by is not None and by[0] == role

    def touch(self, actor: str, clock: Clock, step: Step, chunk: int, proxy: str, role: str) -> None:
        clock[actor] = clock.get(actor, 0) + 1
        for a in step.reads:
            c = self.cell(a, chunk)
            beside = self.beside(a, chunk, role)
            if not self.knows(clock, (apart(role), c.by[1]) if beside and c.by else c.by):
                raise Fault(f"race: {actor} reads {a.cell} in chunk {chunk} ({step}) while {c.by} may still write it")
            if c.holds != (a.value, chunk + a.ahead) and chunk + a.ahead >= 0:
                found = "nothing yet: it is made or waited for too late" if c.holds is None else \
                    f"{c.holds}, of another chunk: what makes that comes too early" if c.holds[0] == a.value else f"{c.holds}"
                raise Fault(f"stale: {actor} reads {a.cell} in chunk {chunk} ({step}) and finds {found}")
            if a.ring and proxy in ASYNC and c.proxy == "threads" and (c.fenced is None or not self.knows(clock, c.fenced)):
                raise Fault(f"not visible: {actor} reads {a.cell} in chunk {chunk} ({step}) without a fence after its write")
            c.reads[apart(role) if beside and proxy == "threads" else actor] = clock[actor]
        for a in step.writes:
            c = self.cell(a, chunk)
            if not all(self.knows(clock, x) for x in [c.by, *c.reads.items()]):
                raise Fault(f"race: {actor} writes {a.cell} in chunk {chunk} ({step}) while it may still be used")
            c.holds, c.by, c.proxy, c.fenced, c.reads = (a.value, chunk + a.ahead), (actor, clock[actor]), proxy, None, {}

    # -- barriers

    def count(self, name: str, slot: int, clock: Clock, arrivals: int, copies: int = 0) -> None:
        b = self.barriers[name, slot]
        b.copies += copies
        for _ in range(arrivals or 1):
            b.arrived += bool(arrivals)
            join(b.arriving, clock)
            if b.arrived == self.plan.barriers[name].arrivals and not b.copies:
                b.ended, b.arrived = b.ended + 1, 0
                join(b.seen, b.arriving)

    def passes(self, role: str) -> bool:
        if self.at[role] == len(self.programs[role]):
            return False
        x, chunk = self.programs[role][self.at[role]]
        if isinstance(x, Step) or x.kind not in ("wait", "drain"):
            return True
        if x.kind == "drain":
            return all(f.landed for f in self.waited(role, x.engine, x.most))
        slots = self.plan.barriers[x.barrier].slots
        return self.barriers[x.barrier, chunk % slots].ended % 2 != (chunk // slots + x.flip) % 2

    def waited(self, role: str, engine: str, most: int) -> list[Flight]:
        mine = [f for f in self.flights[role] if f.step.engine == engine and not (engine == "copy" and f.step.writes)]
        return mine[:len(mine) - most] if most else mine

    # -- steps

    def advance(self, role: str) -> None:
        x, chunk = self.programs[role][self.at[role]]
        self.at[role] += 1
        clock = self.clocks[role]
        if isinstance(x, Step):
            if x.engine == "tensor" or (x.engine == "copy" and not (x.ragged and chunk in self.short)):
                name = f"{role}'s {x} {chunk}" + ("" if x.part is None else f" part {x.part}")
                self.flights[role].append(Flight(name, role, x, chunk, dict(clock)))
                for a in x.writes if x.engine == "copy" else ():
                    self.count(self.full[a.cell], chunk % self.depth[a.cell], {}, 0, 1)
            else:
                self.touch(role, clock, x, chunk, "threads", role)
        elif x.kind == "wait":
            join(clock, self.barriers[x.barrier, chunk % self.plan.barriers[x.barrier].slots].seen)
        elif x.kind == "arrive":
            mine = {**clock, apart(role): clock[role]}
            self.count(x.barrier, chunk % self.plan.barriers[x.barrier].slots, mine, self.plan.warps[role])
        elif x.kind == "fence" and (not x.ragged or chunk in self.short):
            clock[role] += 1
            for c in self.cells.values():
                if c.by is not None and c.by[0] == role and c.fenced is None:
                    c.fenced = (role, clock[role])
        elif x.kind == "drain":
            for f in self.waited(role, x.engine, x.most):
                join(clock, f.clock)
                self.flights[role].remove(f)
                for a in f.step.reads:                     # each warp waits for its own part of a product
                    if self.beside(a, f.chunk, role):
                        self.cell(a, f.chunk).reads[apart(role)] = clock[role]
        clock[role] += 1

    def land(self, f: Flight) -> None:
        for a in f.step.writes if f.step.engine == "tensor" else ():       # products are added onto the same sum in order
            by = self.cell(a, f.chunk).by
            for before in self.flights[f.role]:
                if by is not None and before.landed and before.name == by[0]:
                    join(f.clock, before.clock)
        self.touch(f.name, f.clock, f.step, f.chunk, f.step.engine, f.role)
        f.landed = True
        if f.step.engine == "copy" and f.step.writes:
            self.flights[f.role].remove(f)
            for a in f.step.writes:
                self.count(self.full[a.cell], f.chunk % self.depth[a.cell], f.clock, 0, -1)

    def landable(self) -> dict[str, Flight]:
        """Products of a role land in order; copies in any."""
        found: dict[str, Flight] = {}
        for flights in self.flights.values():
            products = [f for f in flights if f.step.engine == "tensor" and not f.landed]
            copies = [f for f in flights if f.step.engine == "copy" and not f.landed]
            found |= {f.name: f for f in [*copies, *products[:1]]}
        return found

    def run(self, choose: Choose) -> None:
        while True:
            flights, ready = self.landable(), [r for r in self.programs if self.passes(r)]
            if not flights and not ready:
                break
            name = choose([*ready, *flights])
            if name in flights:
                self.land(flights[name])
            else:
                self.advance(name)
        stuck = {r: str(p[self.at[r]][0]) for r, p in self.programs.items() if self.at[r] < len(p)}
        if stuck:
            raise Fault("deadlock: " + "; ".join(f"{r} at {x}" for r, x in stuck.items()))
        for (name, slot), b in self.barriers.items():
            if b.arrived or b.copies:
                raise Fault(f"count: {b.arrived} arrivals at {name}[{slot}] end no phase")


def orders(plan: Plan, seeds: int) -> Iterator[Choose]:
    """Adversarial orders (each role, copies and products as early or as late as can be), then random ones."""
    roles = list(plan.ops)
    for role in [*roles, ""]:
        for early in (True, False):
            def preferred(names: list[str], role: str = role, early: bool = early) -> str:
                mine = [n for n in names if (n == role if role else n not in plan.ops)]
                rest = [n for n in names if n not in mine]
                return (mine or rest)[-1] if early else (rest or mine)[-1]
            yield preferred
    for seed in range(seeds):
        yield random.Random(seed).choice


def execute(plan: Plan, chunks: int, ragged: bool = False, seeds: int = 4) -> None:
    """Run under adversarial orders and `seeds` random ones. Raises Fault at the first thing that goes wrong."""
    for choose in orders(plan, seeds):
        Machine(plan, chunks, ragged).run(choose)
