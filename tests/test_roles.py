"""Role schedules: data, laid over a program, their synchronisation derived, and every piece of that shown to be needed."""
from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import pytest

from gdn_ir.bench.roles import VARIANTS
from gdn_ir.backends import BACKENDS
from gdn_ir.backends.base import Kernel
from gdn_ir.compiler import Instance, lower
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.schedules.events import IllegalRoles, Laid
from gdn_ir.schedules.execute import Fault, execute
from gdn_ir.schedules.defaults import roles_in_one
from gdn_ir.schedules.plans import plan
from gdn_ir.schedules.protocol import Deadlock, Plan, Sync, derive, live, wire
from gdn_ir.schedules.roles import FUSED, SOLVED, Event, Ring, Role, Roles, Turn
from gdn_ir.schedules.schedule import Schedule


@lru_cache(maxsize=3)
def scan(segment: int = 0) -> Kernel:
    """Of whole sequences, or of segments of so many chunks."""
    i = Instance(Switches(initial_state=True, final_state=True), 128, 128, "bf16", "bf16", True)
    if segment < 0:                                        # none, and nothing hoisted
        return lower(i.program, roles_in_one(), BACKENDS["tilelang"], "sm_90", i.sizes, i.dtypes, True)[-1]
    schedule = Schedule("x", steps=plan("cut", sums=True, segment=segment) if segment else plan("solve", sums=True))
    return lower(i.program, schedule, BACKENDS["tilelang"], "sm_90", i.sizes, i.dtypes, True)[-1]


def laid(roles: Roles = SOLVED, segment: int = 0) -> Laid:
    return Laid(scan(segment).program, roles)


def with_events(role: str, *events: str) -> Roles:
    changed = (replace(r, events=tuple(map(Event.of, events))) if r.name == role else r for r in SOLVED.roles)
    return replace(SOLVED, roles=tuple(changed))


def events(role: str) -> list[str]:
    return [str(e) for r in SOLVED.roles if r.name == role for e in r.events]


# ---- data -----------------------------------------------------------------------------------------------------------------


def test_json() -> None:
    turned = replace(SOLVED, turns=(Turn("state0", Event.of("issue SK"), "state1", Event.of("issue SK")),))
    for roles in (SOLVED, turned):
        assert Roles.of(json.loads(json.dumps(roles.data()))) == roles


@pytest.mark.parametrize(("data", "why"), [
    ({"roles": []}, "at least roles, rings"),
    ({"roles": [{"name": "a", "events": ["wait x"]}], "rings": []}, "event: got 'wait x'; accepts 'load"),
    ({"roles": [{"name": "a", "events": [], "warp": 4}], "rings": []}, "accepts an object with name, events, warps"),
    ({"roles": [{"name": "a", "events": [], "warps": 4, "registers": 30}], "rings": []}, "got 4 warps, 30 registers"),
    ({"roles": [{"name": "a", "events": [], "warps": 2}], "rings": []}, "fill 4 warps"),
    ({"roles": [{"name": "a", "events": [], "warps": 4, "registers": 240, "rows": "V", "copies": 3}], "rings": []},
     "got 240 \\+ 240 \\+ 240 registers a thread, by warpgroup; accepts 504 in all"),
    ({"roles": [], "rings": []}, "Roles.roles: got none"),
    ({"roles": [{"name": "a", "events": [], "registers": "56"}], "rings": []}, "\\[a\\].registers: got '56'; accepts a whole"),
    ({"roles": [{"name": "a", "events": ["fetch x late"]}], "rings": []}, "event: got fetch x late; accepts what touches no"),
    ({"roles": [{"name": "a", "events": ["load x early"]}], "rings": []}, "event: got load x, early; accepts an early fetch"),
])
def test_refuses_data(data: object, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Roles.of(data)


# ---- laid over a program ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("roles", "why"), [
    (replace(SOLVED, names=(*SOLVED.names, ("x", "k . v"))), "computes no 'k . v'"),
    (replace(SOLVED, rings=SOLVED.rings[1:]), "reads q, which load makes: it needs a ring"),
    (with_events("load", "load k", "load q", "load k"), "load makes k already"),
    (with_events("aux", "compute qk", "compute P"), "not what one can compute"),
    (with_events("aux", "issue qk", "compute P"), "issue qk is not completed in its chunk"),
    (with_events("state", *(e for e in events("state") if e != "compute decayed")), "the carry S must end as x \\+ product"),
])
def test_refuses_schedules(roles: Roles, why: str) -> None:
    with pytest.raises(IllegalRoles, match=why):
        derive(laid(roles))


def test_where_values_lie() -> None:
    """What a product is added onto lies in the registers of what it is made of; a part of the state stays in its copy."""
    steps = {str(s): s for s in laid().steps["state1"]}
    assert [a.cell for a in steps["issue written"].writes] == ["state1:S"]
    assert [a.cell for a in steps["issue inside"].writes] == ["state1:QS"]
    assert {a.cell for a in steps["issue SK"].reads} == {"k", "state1:S16"}
    assert [a.cell for a in steps["compute o16 late"].writes] == ["o16_1"]


# ---- liveness -----------------------------------------------------------------------------------------------------------


def test_live_if_every_cycle_has_a_token() -> None:
    """Two roles that each wait for the other first: the error names the cycle."""
    SK = Event.of("issue SK")
    there = Turn("state0", SK, "state1", SK)
    derive(laid(replace(SOLVED, turns=(there,))))
    with pytest.raises(Deadlock, match=r"state[01]: wait turn[01]_full.* -> "):
        derive(laid(replace(SOLVED, turns=(there, Turn("state1", Event.of("issue u"), "state0", SK)))))
    late = [e for e in events("state") if e != "compute o16 late"]
    with pytest.raises(Deadlock, match="aux: wait turn0_full"):        # aux waits for what follows the use of its own P
        derive(laid(replace(with_events("state", *late, "compute o16"),
                            turns=(Turn("state0", Event.of("compute o16"), "aux", Event.of("issue qk")),))))


def test_liveness_is_what_executing_finds() -> None:
    """Random turns and depths: the static check says just when roles get stuck."""
    choose, found = random.Random(0), []
    places = [("state0", e) for e in ("issue SK", "compute R", "issue QS", "compute W", "issue inside")]
    places += [("state1", e) for _, e in places] + [("aux", "issue qk"), ("aux", "compute P"), ("load", "load k")]
    for _ in range(30):
        turns = []
        for _ in range(choose.randint(2, 7)):
            (a, x), (b, y) = choose.sample(places, 2)
            if a != b:
                turns.append(Turn(a, Event.of(x), b, Event.of(y), choose.randint(1, 2)))
        rings = tuple(Ring(r.values, choose.randint(1, 3)) for r in SOLVED.rings)
        made = wire(laid(replace(SOLVED, turns=tuple(turns), rings=rings)))
        try:
            live(made)
            found.append(True)
        except Deadlock:
            found.append(False)
        try:
            execute(made, 7, seeds=1)
            assert found[-1]
        except Fault as e:
            assert str(e).startswith("deadlock") and not found[-1]
    assert 5 < sum(found) < 25                            # both kinds were seen


# ---- the plan, executed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segment", [0, 16])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("chunks", [0, 1, 2, 7])
def test_runs(chunks: int, ragged: bool, segment: int) -> None:
    execute(derive(laid(segment=segment)), chunks, ragged, seeds=20)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_run(name: str) -> None:
    for segment in (-1,) if name.startswith("fused") else (0, 16):
        execute(derive(laid(VARIANTS[name], segment)), 7, True)


@pytest.mark.parametrize("depth", [1, 4])
def test_runs_with_other_depths(depth: int) -> None:
    execute(derive(laid(replace(SOLVED, rings=tuple(Ring(r.values, depth) for r in SOLVED.rings)))), 9, True)


def perturbed(p: Plan) -> Iterator[tuple[str, Plan]]:
    """Every wait, arrival, fence and drain left out; every parity flipped, every drain one short, every count one off."""
    for role, ops in p.ops.items():
        for i, x in enumerate(ops):
            if not isinstance(x, Sync):
                continue
            others = [("without", ())]
            others += [("the other parity of", (replace(x, flip=1 - x.flip),))] if x.kind == "wait" else []
            others += [("one short", (replace(x, most=x.most + 1),))] if x.kind == "drain" else []
            for what, instead in others:
                yield f"{role}: {what} {x}", replace(p, ops={**p.ops, role: (*ops[:i], *instead, *ops[i + 1:])})
    for name, b in p.barriers.items():
        for off in (1, -1):
            if b.arrivals + off:
                yield f"{name} {off:+d}", replace(p, barriers={**p.barriers, name: replace(b, arrivals=b.arrivals + off)})


def unseen(synchronised: Plan) -> set[str]:
    """What can be left out or moved without a run that shows it."""
    found = set()
    for what, mutant in perturbed(synchronised):
        try:
            for ragged in (True, False):
                execute(mutant, 7, ragged)
            found.add(what)
        except Fault:
            pass
    return found


@pytest.mark.parametrize("segment", [0, 16])
def test_nothing_derived_is_redundant(segment: int) -> None:
    assert not unseen(derive(laid(segment=segment)))


# What follows from other synchronisation of the fused roles: who waits for P or M knows of the sums that they are made of; k
# has fewer slots than the sums, and a slot of k is free only after all that the sums are for; the two warps have waited for
# each other's blocks of the chunk before.
IMPLIED = {"inverse: without wait A_free", "inverse: without wait G_full", "load: without wait G_free",
           "state0: without wait G_full", "state1: without wait G_full"}


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("chunks", [0, 1, 2, 7])
def test_fused_runs(chunks: int, ragged: bool) -> None:
    execute(derive(laid(FUSED, -1)), chunks, ragged, seeds=20)


def test_fused_is_synchronised() -> None:
    """As above, but for what is implied."""
    assert unseen(derive(laid(FUSED, -1))) == IMPLIED


def test_what_is_fetched_early_is_of_the_next_chunk() -> None:
    """Fetched before the chunk at hand has used its own, it is not what that chunk means."""
    load = FUSED.roles[0]
    fetch = Event.of("fetch g early")
    moved = replace(load, events=(fetch, *(e for e in load.events if e != fetch)))
    with pytest.raises(Fault, match=r"stale: load reads load:fetched g in chunk 0 .*\('g', 1\)"):
        execute(derive(laid(replace(FUSED, roles=(moved, *FUSED.roles[1:])), -1)), 3)
    store = replace(FUSED.roles[1], events=(*FUSED.roles[1].events, fetch))
    with pytest.raises(IllegalRoles, match="store: fetch g early: it computes nothing of that"):
        laid(replace(FUSED, roles=(load, store, *FUSED.roles[2:])), -1)
    for value, why in (("kk", "no value is called kk; there are .*beta, g"), ("k", "is not what one can fetch"),
                       ("g early", "it is fetched twice")):
        twice = replace(load, events=(*load.events, Event.of(f"fetch {value}")))
        with pytest.raises(IllegalRoles, match=why):
            laid(replace(FUSED, roles=(twice, *FUSED.roles[1:])), -1)


def test_warps_of_a_role_wait_for_each_other() -> None:
    """What one of two warps joins the other wrote too: it knows of that by a barrier alone."""
    p = derive(laid(FUSED, -1))
    ops = {**p.ops, "inverse": tuple(x for x in p.ops["inverse"] if str(x) != "wait A_full")}
    with pytest.raises(Fault, match=r"(race|stale): inverse reads A .*join A16"):
        execute(replace(p, ops=ops), 7)


def test_faults_say_what_is_wrong() -> None:
    p = derive(laid())

    def without(role: str, sync: str) -> Plan:
        return replace(p, ops={**p.ops, role: tuple(x for x in p.ops[role] if str(x) != sync)})
    for mutant, why in (
            (without("aux", "fence"), "not visible: state.'s issue inside"), (without("load", "wait k_free"), "race"),
            (without("state1", "arrive P_free"), "deadlock: "), (without("state0", "drain tensor 0"), "race|stale")):
        with pytest.raises(Fault, match=why):
            for ragged, _ in itertools.product((False, True), range(2)):
                execute(mutant, 7, ragged)


def test_registers_of_a_running_product() -> None:
    """An accumulator touched before its product is complete: no barrier is missing, an event is too early."""
    early = [e for e in events("state") if e != "compute u16"]
    early.insert(early.index("compute decayed"), "compute u16")
    with pytest.raises(Fault, match=r"stale|race"):
        execute(derive(laid(with_events("state", *early))), 3)


def test_roles_are_data() -> None:
    assert isinstance(SOLVED.roles[0], Role) and hash(SOLVED) == hash(Roles.of(SOLVED.data()))
