"""What follows the backward's scans as roles: steps, its plan, its text, executed on the CPU; what nvcc makes of it."""
from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import pytest

from gdn_ir.autodiff import backward
from gdn_ir.backends import BACKENDS
from gdn_ir.backends.base import SHARED, Call, Kernel, blocks
from gdn_ir.backends.tilelang.roles import RolePrinter
from gdn_ir.backends.tilelang.runtime import lowered
from gdn_ir.bench import gradients
from gdn_ir.bench.errors import relative
from gdn_ir.cache import load_source
from gdn_ir.compiler import Unsupported, Variant, variant
from gdn_ir.coverage import Cell, Layout
from gdn_ir.interp import Sizes, run, run_pipeline
from gdn_ir.programs.gated_delta import Switches, build
from gdn_ir.schedules import steps
from gdn_ir.schedules.defaults import whole_scans
from gdn_ir.schedules.events import Beside, IllegalRoles, Laid
from gdn_ir.schedules.execute import Fault, execute
from gdn_ir.schedules.plans import backward_plan
from gdn_ir.schedules.protocol import Sync
from gdn_ir.schedules.role_backward import as_roles, inner_as_roles
from gdn_ir.schedules.roles import AGAIN, BACK_ALONE, INNER, Event, Roles
from tests.emulated import Language
from tests.test_backward import AXES, CU, FAMILY, in_f64, memory
from tests.test_role_backward import executed
from tests.test_role_kernels import TILELANG, ptx, spilled, synchronised
from tests.test_roles import unseen

STATES = Switches(initial_state=True, final_state=True)
SMALL = Cell("", STATES, "bf16", Layout((130, 0, 64, 1), True, 1, 2, 128, 128))
DENSE = Cell("", Switches(), "bf16", Layout((330, 330), False, 2, 4, 128, 128))


@lru_cache(maxsize=8)
def made_of(cell: Cell, plan: str = "turns", chunks: int = 16) -> Variant:
    """plan: "merged" or "turns"; "roles-", "halves-": with scans by roles; "follows-": beside both."""
    instance = gradients.backward_of(cell)
    *how, name = plan.split("-")
    follows = "follows" in how
    base = whole_scans("sm_90", instance, 1, 32, "triton", merges=f"gathered-{name}")[0]
    roles = {"roles", "halves"} & {*how}
    base = as_roles(base, AGAIN, BACK_ALONE, "halves" in how, follows=follows) if roles else base
    return variant(instance, inner_as_roles(base, chunks=chunks, follows=follows), "triton", "sm_90")


def kernel_of(cell: Cell = SMALL, plan: str = "turns", chunks: int = 16) -> Kernel:
    return next(k for k in made_of(cell, plan, chunks).compiled.kernels if k.name == "grads")


def test_runs() -> None:
    p = RolePrinter(kernel_of()).plan
    for chunks in (0, 1, 2, 7):
        for ragged in (False, True):
            execute(p, chunks, ragged, seeds=10)


# What other synchronisation implies: who loads has waited for d_S_free, which comes after what v_free says; a fence that a
# later one, before the same product, makes up for.
IMPLIED = {"load_values: without wait v_free", "load: without fence ragged"}


def test_nothing_derived_is_redundant() -> None:
    assert unseen(RolePrinter(kernel_of()).plan) == IMPLIED


@pytest.mark.parametrize("chunks", [2, 8, 16])
def test_who_follows_asks_for_what_it_reads(chunks: int) -> None:
    """Of each scan before the first load of what that stores, and once for as many chunks as are counted, or as a block has;
    where one does not, that is seen."""
    p = RolePrinter(kernel_of(SMALL, "follows-roles-turns", chunks)).plan
    asks = {role: [str(x) for x in ops if isinstance(x, Sync) and x.kind == "await"] for role, ops in p.ops.items()}
    assert {role: found for role, found in asks.items() if found} == {
        "load": ["await again_ready"], "load_values": ["await back_ready", "await again_ready"]}
    assert p.few == min(chunks, 8) and not p.counts
    for n in (0, 1, 2, 8, 17):
        execute(p, n, True)
    assert unseen(p) == IMPLIED
    for role, value in (("load", "u"), ("load_values", "d_r"), ("load_values", "S"), ("load_values", "d_S")):
        load = next(x for x in p.ops[role] if str(x) == f"load {value}")
        early = (load, *(x for x in p.ops[role] if x is not load))
        with pytest.raises(Fault, match=f"not there: {role} does load {value} in chunk 0"):
            execute(replace(p, ops={**p.ops, role: early}), 3)


def test_an_early_fetch_cannot_wait() -> None:
    p = kernel_of(SMALL, "follows-roles-turns").program
    with pytest.raises(IllegalRoles, match="fetch total early: it is of the next chunk, which x_ready may not have reached"):
        Laid(p, changed("fetch total", "fetch total early"), Beside(ready=(("total", "x_ready"),)))


@pytest.mark.parametrize("chunks", [2, 8])
@pytest.mark.parametrize(("lengths", "varlen"), [([1500] * 2, True), ([1500] * 3, False), ([1500, 0, 700, 64], True)])
def test_walks_in_the_middle_come_first(lengths: list[int], varlen: bool, chunks: int) -> None:
    """As blocks are numbered, which start in that order: of every sequence each walk once, of those of one length from where
    the scans meet."""
    made = kernel_of(SMALL if varlen else DENSE, "follows-roles-turns", chunks)
    text = TILELANG.emit(made, "sm_90").text.split("as block:")[1].split("tx = T.get")[0]
    lines = [x[8:] for x in text.splitlines() if "alloc" not in x and "annotate" not in x]
    call = Call(len(lengths), sum(lengths), sum(lengths) if varlen else lengths[0], {"H": 1, "HV": 2})
    names = {"T": Language({}, 0, 0, 1, {}, False), "cu": [*accumulate(lengths, initial=0)], "L": call.length,
             "N": call.sequences, "H": 1, "HV": 2, "low": [0], "high": [0], "block0": 0, "blocks": blocks(made, call)}
    found, here = list[tuple[int, int]](), dict[str, int]()
    for block in range(blocks(made, call)):
        exec("\n".join(lines), names | {"block": block}, here)
        found += [(here["n"], here["i_Y"])] * (here["chunks"] > 0)
    walks = [-(-n // (64 * chunks)) for n in lengths]
    assert sorted(found) == [(n, i) for n, count in enumerate(walks) for i in range(count)]
    outwards = [walks[0] // 2 + (j // 2 if j % 2 == 0 else -1 - j // 2) for j in range(walks[0])]
    if len({*lengths}) == 1:
        assert found == [(n, i) for i in outwards for n in range(len(lengths))]


def test_what_can_follow() -> None:
    """Scans that run one after the other, or in two streams, are not followed; names say what is."""
    base = whole_scans("sm_90", gradients.backward_of(SMALL), 1, 32, "triton", merges="gathered-turns")[0]
    beside = as_roles(base, AGAIN, BACK_ALONE, follows=True)
    names = [inner_as_roles(s, chunks=n, follows=f).name for s, n, f in (
        (base, 8, True), (base, 2, True), (beside, 8, True), (beside, 8, False), (as_roles(base, AGAIN, BACK_ALONE), 8, False))]
    assert names == [f"backward-{n}" for n in (
        "gathered-turns-inner-follows", "gathered-turns-inner-2-follows", "roles-turns-alone-inner-follows",
        "roles-turns-alone-follows-inner", "roles-turns-alone-inner")]
    for aside in (False, True):
        with pytest.raises(ValueError, match="accepts a schedule whose back follows"):
            inner_as_roles(as_roles(base, AGAIN, BACK_ALONE, aside=aside), follows=True)
    grads = kernel_of(SMALL, "follows-turns", 8)
    assert [(t.name, n) for t, n, _ in grads.awaits] == [("back_ready", 128), ("again_ready", 128)]
    walks = replace(grads, options=replace(grads.options, roles=None))
    assert "takes one chunk a block" in str(BACKENDS["triton"].supports(walks, "sm_90"))


@pytest.mark.parametrize(("lengths", "heads", "varlen", "states", "late", "plan", "chunks"), [
    ((130, 0, 64, 1), (1, 2), True, True, False, "turns", 2), ((193, 65), (2, 2), True, False, True, "turns", 16),
    ((193, 193), (1, 2), False, True, True, "turns", 2), ((330, 0, 64, 130), (1, 2), True, False, False, "merged", 2),
    ((66,), (2, 2), False, False, True, "merged", 2), ((66, 0, 64), (2, 6), True, False, True, "turns", 2),
    ((130, 0, 64, 1), (1, 2), True, True, True, "roles-turns", 2), ((193,), (2, 2), False, False, False, "roles-merged", 2),
    ((64, 0, 700), (1, 2), True, True, False, "follows-roles-turns", 8),
    ((130, 330), (1, 2), True, False, True, "follows-halves-turns", 2),
    ((193, 193), (2, 2), False, True, False, "follows-merged", 2)])
def test_emitted_text_computes_gradients(lengths: tuple[int, ...], heads: tuple[int, int], varlen: bool, states: bool,
                                         late: bool, plan: str, chunks: int) -> None:
    """Among the other kernels by torch, against float64: ragged tails, empty sequences, with and without states, value heads
    that share a key head or have their own; what is behind the last sequence is NaN, and all that it writes was. Who follows
    finds counted what it waits for."""
    cell = Cell("", STATES if states else Switches(), "bf16", Layout(lengths, varlen, *heads, 128, 128))
    found, want = executed(made_of(cell, plan, chunks), cell, late)
    for n, x in found.items():
        assert relative(x, want[n]) < 5e-3, n


def test_what_the_op_normalises() -> None:
    """Rows are normalised before, and gradients of the normalised ones made after it, by other kernels."""
    cell = Cell("", replace(STATES, l2norm=True), "bf16", Layout((130, 0, 64, 1), True, 1, 2, 128, 128))
    made = made_of(cell, "roles-turns", 2)
    assert [k.name for k in made.compiled.kernels] == ["norm", "solve", "again", "back", "grads", "rows", "unnorm"]
    found, want = executed(made, cell, True)
    for n, x in found.items():
        assert relative(x, want[n]) < 5e-3, n


@pytest.mark.parametrize(("kind", "most"), [("correlated", 7e-3), ("strong_decay", 2.1e-3)])
def test_what_cancels_has_digits_to_spare(kind: str, most: float) -> None:
    """The decay's gradient is row sums less column sums, of which most cancels: of tiles in one part 1.1e-2, 2.5e-3."""
    cell = Cell("", Switches(), "bf16", Layout((320,), True, 1, 2, 128, 128))
    found, want = executed(made_of(cell), cell, False, kind)
    assert relative(found["g"], want["g"]) < most


@pytest.mark.parametrize(("varlen", "plan", "chunks"), [(True, "turns", 16), (False, "turns", 16),
                                                        (True, "follows-roles-turns", 8), (False, "follows-roles-turns", 2)])
def test_cuda(tmp_path: Path, varlen: bool, plan: str, chunks: int) -> None:
    """It synchronises as planned, and nvcc leaves products asynchronous."""
    made = kernel_of(SMALL if varlen else DENSE, plan, chunks)
    source = TILELANG.emit(made, "sm_90")
    function = getattr(load_source("tilelang", source.kernel, source.hash, source.text), source.kernel)
    cuda, shared = lowered(function, "sm_90", TILELANG.flags(made))
    assert shared + 1024 <= SHARED["sm_90"]                # its barriers have the rest
    synchronised(made, cuda)
    assert spilled(tmp_path, cuda) == 0


COUNT = ["cp.async.bulk.wait_group 0", "fence.proxy.async", "fence.acq_rel.gpu", "bar.warp.sync",
         "red.release.gpu.global.add.s32"]
AWAIT = ["ld.acquire.gpu.global.s32", "nanosleep.u32", "ld.acquire.gpu.global.s32", "bar.warp.sync", "fence.proxy.async"]


@pytest.mark.parametrize("name", ["again", "back", "grads"])
def test_instructions(tmp_path: Path, name: str) -> None:
    """A warp counts once its own copies lie in memory, for the whole GPU, and both sides fence between the two ways there; who
    follows lets nothing that others write meanwhile be read through a cache of what never changes."""
    made = next(k for k in made_of(SMALL, "follows-roles-turns", 8).compiled.kernels if k.name == name)
    source = TILELANG.emit(made, "sm_90")
    function = getattr(load_source("tilelang", source.kernel, source.hash, source.text), source.kernel)
    cuda, _ = lowered(function, "sm_90", TILELANG.flags(made))
    text = ptx(tmp_path, cuda)
    what = "|".join(map(re.escape, {*COUNT, *AWAIT}))
    found = " ".join(re.findall(rf"^\s*({what})(?=[\s;])", text, re.M))
    assert (" ".join(COUNT) in found, " ".join(AWAIT) in found) == (name != "grads", name == "grads")
    assert found.count(COUNT[0]) == found.count(COUNT[2]) and ("ld.acquire" in found) == (name == "grads")
    beside = ("griddepcontrol.launch_dependents;" in text, "griddepcontrol.wait;" in text)
    assert beside == (name != "grads", name != "again")
    assert "ld.global.nc" not in text or name == "again"


@pytest.mark.parametrize(("name", "beside"), [("again", False), ("back", True)])
def test_a_library_keeps_how_it_is_launched(name: str, beside: bool) -> None:
    """What a pack holds too: TileLang's runtime launches what waits for the kernel before it, at its end, beside that."""
    made = next(k for k in made_of(SMALL, "follows-roles-turns", 8).compiled.kernels if k.name == name)
    if TILELANG.toolchain("sm_90") is None:
        pytest.skip("no nvcc")
    (library,) = TILELANG.build(made, TILELANG.emit(made, "sm_90"), "sm_90").files.values()
    assert (b"use_programtic_dependent_launch" in library) == beside


@pytest.mark.parametrize("plan", ["merged", "turns"])
@pytest.mark.parametrize(("decay", "erase"), FAMILY)
def test_steps_are_exact(plan: str, decay: str, erase: bool) -> None:
    """In the interpreter: products last, in parts, sums of rows apart, two chunks to a block."""
    p = backward(build(Switches(decay=decay, erase=erase, initial_state=True, final_state=True)))
    more = (("products_last", "grads"), ("in_parts", "grads", "f64"), ("rows_after", "grads", "rows"), ("walk", "grads", 2))
    sizes = Sizes(AXES | {"X": 2}, CU)
    given = memory(p, sizes)
    want = run(p, given, sizes, {"scale": 0.7})
    got = given | run_pipeline(list(steps.apply(p, (*in_f64(backward_plan(f"gathered-{plan}", p, chunk=16, block=4)), *more))),
                               given, sizes, {"scale": 0.7})
    for n in (n for n in want if n.startswith("d_")):
        assert float((got[n] - want[n]).abs().max()) < 1e-10, n


def test_what_the_steps_refuse() -> None:
    p = backward(build(Switches()))
    plan = backward_plan("gathered-turns", p)
    for more, why in (((("products_last", "inner"),), "products_last: no kernel is named 'inner'"),
                      ((("in_parts", "inner", "bf16"),), "in_parts: no kernel is named 'inner'"),
                      ((("walk", "back", 8),), "walk: back must be one scan, which runs all chunks at once"),
                      ((("walk", "grads", 0),), "a block must take a chunk or more, got 0"),
                      ((("rows_after", "solve", "rows"),), "nothing that it stores is made of sums along rows alone"),
                      ((("walk", "grads", 8), ("rows_after", "grads", "rows")), "rows_after: grads must be one scan")):
        with pytest.raises(steps.IllegalStep, match=why):
            steps.apply(p, (*plan, *more))
    base = whole_scans("sm_90", gradients.backward_of(SMALL), 1, 32, "triton")[0]
    with pytest.raises(ValueError, match="accepts a schedule of the plans gathered-merged and gathered-turns"):
        inner_as_roles(base)


def changed(before: str, after: str) -> Roles:
    """The shipped roles with one event replaced (or, with "", left out)."""
    return replace(INNER, roles=tuple(replace(r, events=tuple(
        Event.of(after) if str(e) == before else e for e in r.events if after or str(e) != before)) for r in INNER.roles))


@pytest.mark.parametrize(("roles", "why"), [
    (changed("fetch G", "fetch G early"), "what comes next may be another member's"),
    (replace(INNER, rings=tuple(replace(r, depth=2) if r.values == ("d_q16",) else r for r in INNER.rings)),
     "d_q16 is stored summed: it must be rounded, and have a ring of one slot"),
    (replace(INNER, rings=tuple(r for r in INNER.rings if r.values[0] != "Y")), "dk reads Y, .* it needs a ring"),
    (changed("store row1", "store d_v"), "dq reads d_v16, which values makes: it needs a ring")])
def test_declines(roles: Roles, why: str) -> None:
    instance = gradients.backward_of(SMALL)
    base = whole_scans("sm_90", instance, 1, 32, "triton", merges="gathered-turns")[0]
    with pytest.raises(Unsupported, match=why):
        variant(instance, inner_as_roles(base, roles), "triton", "sm_90")
