"""What must be synchronised, derived from the steps of roles: barriers, their parities and counts, fences, waits for products.

A ring of n slots has two barriers a slot. The value of chunk c lies in slot c % n, and chunks are counted without end, so the
parity of a phase is c // n % 2: who reads waits for `full` with that parity; who writes waits for `free` with the other one,
which a fresh barrier passes. Every warp of a role arrives once a chunk, after its last access, so a count is a number of warps.
A turn is a ring that holds nothing. A role whose warps read what others of them wrote is its own reader: the same two barriers
let its warps run apart from each other.

A write by threads that the asynchronous proxy (tensor cores, copy engine) is to read is followed by a fence of the writers
before they arrive. A tile that is loaded in one piece needs none, but one that a sequence ends in is written by threads.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gdn_ir.nodes import IRError
from gdn_ir.schedules.events import Access, IllegalRoles, Laid, Step

ASYNC = ("tensor", "copy")


class Deadlock(IRError):
    """A schedule whose roles wait for each other; the message is the cycle."""


@dataclass(frozen=True)
class Barrier:
    """slots: how many of it; arrivals: that end a phase."""
    slots: int
    arrivals: int


@dataclass(frozen=True)
class Sync:
    """kind: "wait" and "arrive" at a barrier, in the slot of the chunk (late: of the one before); "fence": what the role wrote
    becomes visible to the asynchronous proxy (ragged: needed where a sequence ends in the chunk); "drain": at most `most`
    products are left running (of the copy engine: of its reads). flip: added to the parity that is waited for."""
    kind: str
    barrier: str = ""
    flip: int = 0
    late: bool = False
    ragged: bool = False
    most: int = 0
    engine: str = ""

    def __str__(self) -> str:
        return " ".join(x for x in (self.kind, self.barrier, f"{self.engine} {self.most}" if self.kind == "drain" else "",
                                    "ragged" if self.ragged else "", "late" if self.late else "") if x)


Op = Step | Sync


@dataclass(frozen=True)
class Plan:
    """ops: what each role does in a chunk, in order; warps: of each; rings: channel -> (slots, its cells). reverse: whether the
    last chunk, which may be short, comes first; several: whether each chunk comes once for each member of a group."""
    ops: Mapping[str, tuple[Op, ...]]
    warps: Mapping[str, int]
    barriers: Mapping[str, Barrier]
    rings: Mapping[str, tuple[int, tuple[str, ...]]]
    reverse: bool = False
    several: bool = False


@dataclass(frozen=True)
class Channel:
    """Where a ring is written and read: by role, the first step that touches it and the one that has finished with it."""
    name: str
    depth: int
    writers: Mapping[str, tuple[int, int]]
    readers: Mapping[str, tuple[int, int]]


def derive(laid: Laid) -> Plan:
    """The plan of a role schedule. Raises Deadlock, or IllegalRoles where a ring has not one producer, or nobody reads it."""
    plan = wire(laid)
    live(plan)
    return plan


def wire(laid: Laid) -> Plan:
    """The same, live or not."""
    steps = laid.steps
    warps = {name: r.warps for r in laid.roles.roles for name in laid.instances(r)}
    before: dict[tuple[str, int], list[Sync]] = {}
    after: dict[tuple[str, int], list[Sync]] = {}
    barriers: dict[str, Barrier] = {}
    rings: dict[str, tuple[int, tuple[str, ...]]] = {}
    written = [a for ss in steps.values() for s in ss for a in s.writes if a.ring]
    cells = {name: tuple(dict.fromkeys(a.cell for a in written if in_ring(a, laid) == name))
             for name in dict.fromkeys(in_ring(a, laid) for a in written)}
    for ch in (*channels(laid, cells), *turns(laid)):
        if len(ch.writers) != 1 or not ch.readers or (ch.name not in cells and set(ch.writers) & set(ch.readers)):
            raise IllegalRoles(f"ring {ch.name}: written by {', '.join(ch.writers)}, read by {', '.join(ch.readers) or 'none'};"
                               " accepts one role that writes and others that read")
        ((writer, (first, last)),) = ch.writers.items()
        full, free = f"{ch.name}_full", f"{ch.name}_free"
        barriers[full] = Barrier(ch.depth, warps[writer])
        barriers[free] = Barrier(ch.depth, sum(warps[r] for r in ch.readers))
        late = steps[writer][first].late
        before.setdefault((writer, first), []).append(Sync("wait", free, 1, late))
        if ch.name in cells:
            rings[ch.name] = (ch.depth, cells[ch.name])
            mine = cells[ch.name]
            by_threads = all(s.engine == "threads" for s in steps[writer] for a in s.writes if a.cell in mine)
            short = by_threads or any(s.ragged for s in steps[writer] for a in s.writes if a.cell in mine)
            engines = {s.engine for r in ch.readers for s in steps[r] for a in s.reads if a.cell in mine}
            if short and engines & ({"tensor", "copy"} if by_threads else {"tensor"}):          # a tail is stored by threads
                after.setdefault((writer, last), []).append(Sync("fence", late=steps[writer][last].late,
                                                                 ragged=not by_threads))
        after.setdefault((writer, last), []).append(Sync("arrive", full, 0, steps[writer][last].late))
        for reader, (first, last) in ch.readers.items():
            before.setdefault((reader, first), []).append(Sync("wait", full, 0, steps[reader][first].late))
            after.setdefault((reader, last), []).append(Sync("arrive", free, 0, steps[reader][last].late))
    ops = {role: tuple(laid_out(ss, role, before, after)) for role, ss in steps.items()}
    return Plan(ops, warps, barriers, rings, laid.scan.reverse, any(s["sum"] for s in laid.stores.values()))


def in_ring(a: Access, laid: Laid) -> str:
    """The channel of a ring's cell: called after the first of the values that cross together."""
    first = laid.rings[a.value].values[0]
    return first + a.cell[len(a.value):]


def channels(laid: Laid, cells: Mapping[str, tuple[str, ...]]) -> Iterator[Channel]:
    for name, mine in cells.items():
        writers: dict[str, tuple[int, int]] = {}
        readers: dict[str, tuple[int, int]] = {}
        for role, steps in laid.steps.items():
            def in_order(j: int, steps: tuple[Step, ...] = steps) -> tuple[bool, int]:
                return steps[j].late, j                    # of one chunk
            for i, s in enumerate(steps):
                for table, accesses in ((writers, s.writes), (readers, s.reads)):
                    if any(a.ring and a.cell in mine and not a.own for a in accesses):
                        first, last = table.get(role, (i, i))
                        table[role] = min(first, i, key=in_order), max(last, done(steps, i), key=in_order)
        yield Channel(name, next(laid.rings[a.value].depth for ss in laid.steps.values() for s in ss for a in s.writes
                                 if a.ring and a.cell == mine[0]), writers, readers)


def turns(laid: Laid) -> Iterator[Channel]:
    for i, t in enumerate(laid.roles.turns):
        at = []
        for role, event in ((t.first, t.after), (t.second, t.before)):
            where = [j for j, s in enumerate(laid.steps.get(role, ())) if s.event == event]
            if not where:
                raise IllegalRoles(f"turns: {role} has no event {event}")
            at.append({role: (where[0], where[0])})
        yield Channel(f"turn{i}", t.depth, *at)


def done(steps: tuple[Step, ...], i: int) -> int:
    """The step after which what step i touches is finished: of a product, the one that completes it or a later one."""
    if steps[i].event.do != "issue":
        return i
    issued = {s.event.value: j for j, s in enumerate(steps) if s.event.do == "issue"}
    return next(j for j, s in enumerate(steps) if j > i and s.event.do == "complete" and issued[s.event.value] >= i)


def laid_out(steps: tuple[Step, ...], role: str, before: Mapping[tuple[str, int], list[Sync]],
             after: Mapping[tuple[str, int], list[Sync]]) -> Iterator[Op]:
    running: list[str] = []
    for i, s in enumerate(steps):
        yield from before.get((role, i), ())
        if s.event.do == "complete":
            left = running[running.index(s.event.value) + 1:] if s.event.value in running else running
            running = left
            yield Sync("drain", most=len(left), engine="tensor")
        else:
            yield s
        if s.event.do == "issue":
            running.append(s.event.value)
        if s.event.do == "store" and s.engine == "copy":
            yield Sync("drain", late=s.late, engine="copy")
        mine = after.get((role, i), ())                    # one fence serves all that follow it
        yield from dict.fromkeys(x for x in mine if x.kind == "fence")
        yield from (x for x in mine if x.kind != "fence")


# ---- liveness -----------------------------------------------------------------------------------------------------------

Place = tuple[str, int]


def edges(plan: Plan) -> Iterator[tuple[Place, Place, int]]:
    """(what must come first, what waits for it, how many iterations later): a role's own order, and its waits."""
    arrivals = {(x.barrier, role, i): x for role, ops in plan.ops.items() for i, x in enumerate(ops)
                if isinstance(x, Sync) and x.kind == "arrive"}
    for role, ops in plan.ops.items():
        for i, x in enumerate(ops):
            yield (role, i), (role, (i + 1) % len(ops)), int(i + 1 == len(ops))
            if isinstance(x, Sync) and x.kind == "wait":
                for (barrier, other, j), y in arrivals.items():
                    if barrier == x.barrier:
                        yield (other, j), (role, i), x.flip * plan.barriers[barrier].slots + x.late - y.late


def live(plan: Plan) -> None:
    """A schedule is live if every cycle of its edges carries a token: if what a step waits for on it is a step of an earlier
    iteration. Raises Deadlock with a cycle that carries none."""
    every = list(edges(plan))
    places = {p for a, b, _ in every for p in (a, b)}
    scale = len(places) + 1                                # then a cycle's weight is negative just if it carries no token
    distance = dict.fromkeys(places, 0)
    back: dict[Place, Place] = {}
    changed: Place | None = None
    for _ in range(len(places)):
        changed = None
        for a, b, tokens in every:
            if distance[a] + tokens * scale - 1 < distance[b]:
                distance[b], back[b], changed = distance[a] + tokens * scale - 1, a, b
        if changed is None:
            return
    assert changed is not None
    at = changed
    for _ in places:
        at = back[at]
    cycle, here = [at], back[at]
    while here != at:
        cycle.append(here)
        here = back[here]
    cycle.reverse()
    waits = [f"{role}: {plan.ops[role][i]}" for role, i in cycle if isinstance(plan.ops[role][i], Sync)]
    raise Deadlock("roles wait for each other for ever, each for the next: " + " -> ".join([*waits, waits[0]]))
