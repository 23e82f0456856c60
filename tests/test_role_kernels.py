"""Role kernels in TileLang: the CUDA synchronises what the plan holds, in its order; nvcc leaves products asynchronous."""
from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from gdn_ir.bench import inputs
from gdn_ir.bench.errors import relative
from gdn_ir.backends import BACKENDS
from gdn_ir.backends.base import SHARED, TORCH, Kernel
from gdn_ir.backends.tilelang.roles import RolePrinter
from gdn_ir.backends.tilelang.runtime import compiler, lowered
from gdn_ir.cache import load_source
from gdn_ir.cli import app
from gdn_ir.compiler import Instance, Unsupported, variant
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.reference import recurrence
from gdn_ir.schedules import defaults
from gdn_ir.schedules.defaults import of_roles, roles_in_one, segmented_roles, forward_by_roles
from gdn_ir.schedules.plans import plan
from gdn_ir.schedules.protocol import Plan, Step, Sync, derive
from gdn_ir.schedules.roles import FUSED as FUSED_ROLES
from gdn_ir.schedules.roles import SOLVED, Event, Roles
from gdn_ir.schedules.schedule import Schedule
from tests import emulated

TILELANG = BACKENDS["tilelang"]
TOKENS = re.compile(r"(?P<barrier>\w+)\[(?P<slot>[^\]]*)\]\.(?P<what>wait|arrive)\((?P<parity>.*)\);"
                    r"|(?P<fence>fence_proxy_async)|wait_wgmma<(?P<most>\d+)>|(?P<stored>tma_store_wait)|(?P<other>__sync_?thread|bar\.sync|mbarrier)")


# of segments: none, and the inverse among the roles; none, and each state loads its own values; g computed before the next
FUSED, OWN, FIRST, CUT_FUSED = -1, -2, -3, -4


def schedule(i: Instance, segment: int) -> Schedule:
    if segment == OWN:
        return of_roles(own_values())
    if segment == CUT_FUSED:
        return forward_by_roles(i, 2, one=True)
    if segment == FIRST:
        return roles_in_one(computed_first())
    return roles_in_one() if segment == FUSED else segmented_roles(i, segment) if segment else of_roles()


def own_values() -> Roles:
    """The shipped roles, but each state loads its part of v itself: they cannot be one text."""
    data = SOLVED.data()
    events = {r["name"]: r["events"] for r in data["roles"]}
    events["load_values"].remove("load v")
    events["state"].insert(events["state"].index("read v"), "load v")
    return Roles.of(data)


@lru_cache(maxsize=4)
def scan(varlen: bool = True, states: bool = True, segment: int = 0) -> tuple[Kernel, str, int]:
    """The kernel, its CUDA and its shared memory. segment: chunks of one, where sequences are cut."""
    i = Instance(Switches(initial_state=states, final_state=states), 128, 128, "bf16", "bf16", varlen)
    chosen = variant(i, schedule(i, segment), "tilelang", "sm_90")
    kernel, source = chosen.compiled.kernels[-1], chosen.sources[-1]
    function = getattr(load_source("tilelang", source.kernel, source.hash, source.text), source.kernel)
    return kernel, *lowered(function, "sm_90", TILELANG.flags(kernel))


def planned(p: Plan, copies: tuple[str, ...]) -> list[list[Sync]]:
    """All that a plan synchronises, in the order of the text: what is late stands in the loop and behind it. Of roles that are
    one text each synchronisation of the first, and what it is for the others."""
    found: list[list[Sync]] = []
    texts = [[role] for role in p.ops if role not in copies[1:]]
    for roles in ([*copies] if role == list(copies[:1]) else role for role in texts):
        beside = [list(x) for x in zip(*([x for x in p.ops[r] if isinstance(x, Sync)] for r in roles), strict=True)]
        found += [*beside, *(x for x in beside if x[0].late)]
    return found


def evaluated(text: str, chunk: int, late: bool, row: int = 0) -> int:
    """An expression of C over the loop's counter (or the number of chunks) in that chunk, in that row of threads."""
    text = re.sub(r"\bi_X(_\d+)?\b", str(chunk + late), text)
    text = re.sub(r"\bchunks(_\d+)?\b", str(chunk + 1), text)
    return int(eval(text.replace("((int)threadIdx.y)", str(row)).replace("/", "//")))


def synchronised(kernel: Kernel, cuda: str) -> None:
    """Whether what a kernel's CUDA synchronises is its plan's, in the plan's order."""
    printer = RolePrinter(kernel)
    p = derive(printer.laid)
    copies_ = [printer.laid.instances(r) for r in printer.roles.roles if printer.alike(r)]
    init, body = cuda.split("fence_barrier_init();", 1)
    for name, b in p.barriers.items():
        array, first = printer.places[name]
        for i in range(b.slots):
            assert re.findall(rf"\b{array}\[{(first or 0) + i}\]\.init\((\d+)\)", init) == [str(b.arrivals)]
    body = body.replace("__syncthreads();", "", 1)         # after the barriers are made
    # TileLang's own, of the one thread that asks for a tile
    body = re.sub(r"(expect_transaction\(\d+\);\s*)tl::fence_proxy_async\(\);", r"\1", body)
    # or stores it, where its role has written to other memory
    body = re.sub(r"(tl_shuffle_elect<\d+>\(\)\) \{\s*)tl::fence_proxy_async\(\);(\s*tl::tma_store\()", r"\1\2", body)
    body = re.sub(r"(warpgroup_arrive\(\);\s*)tl::fence_proxy_async\(\);", r"\1", body)       # and of products, after stores
    expected = planned(p, tuple(*copies_))
    for found in TOKENS.finditer(body):
        assert not found["other"], found[0]
        copies = expected.pop(0)
        for row, x in enumerate(copies, start=1) if found["barrier"] else ():
            array, first = printer.places[x.barrier]
            assert (x.kind, array) == (found["what"], found["barrier"]), found[0]
            slots = p.barriers[x.barrier].slots
            for c in range(12):
                assert evaluated(found["slot"], c, x.late, row) == (first or 0) + c % slots, found[0]
                assert x.kind == "arrive" or evaluated(found["parity"], c, x.late) % 2 == (c // slots + x.flip) % 2, found[0]
        x = copies[0]
        if not found["barrier"]:
            what = ("fence", "") if found["fence"] else ("drain", "copy") if found["stored"] else ("drain", "tensor")
            assert (x.kind, x.engine) == what and (not found["most"] or x.most == int(found["most"])), found[0]
    assert not expected


@pytest.mark.parametrize(("varlen", "states", "segment"), [
    (True, True, 0), (False, False, 0), (True, False, 32), (False, True, 16), (True, True, FUSED)])
def test_cuda_synchronises_as_planned(varlen: bool, states: bool, segment: int) -> None:
    kernel, cuda, shared = scan(varlen, states, segment)
    assert shared <= SHARED["sm_90"]
    (state,) = (r for r in RolePrinter(kernel).roles.roles if r.copies > 1)
    assert RolePrinter(kernel).alike(state)
    synchronised(kernel, cuda)


def test_products() -> None:
    """Of both states, which are one text, five, their left operands from registers; of aux one, from shared memory."""
    kernel, cuda, _ = scan()
    steps = [x for ops in derive(RolePrinter(kernel).laid).ops.values() for x in ops if isinstance(x, Step)]
    issues = [x for x in steps if x.event.do == "issue"]
    assert cuda.count("tl::wgmma_rs<") == 5 and cuda.count("tl::wgmma_ss<") == 1 and len(issues) == 11
    assert "atomic" not in cuda and cuda.count("tl::tma_store(") == 2


@pytest.mark.parametrize(("varlen", "segment"), [(True, 0), (True, 32), (False, 16), (True, FUSED)])
def test_nvcc_serialises_nothing(tmp_path: Path, varlen: bool, segment: int) -> None:
    """ptxas makes every product of a kernel wait for itself, with only a note, where a stage runs short of registers."""
    stored = spilled(tmp_path, scan(varlen, varlen == (segment == 0), segment)[1])
    assert stored <= (32 if segment == FUSED else 16)      # addresses, of warps that have time and of who solves


def spilled(folder: Path, cuda: str) -> int:
    """Bytes that nvcc spills, of a kernel of which it serialises nothing."""
    compiler()
    from tilelang.contrib import nvcc
    from tilelang.env import CUTLASS_INCLUDE_DIR, TILELANG_TEMPLATE_PATH
    if shutil.which(nvcc.get_nvcc_compiler()) is None:
        pytest.skip("no nvcc")
    (folder / "scan.cu").write_text(cuda)
    command = [nvcc.get_nvcc_compiler(), "-std=c++20", "-O3", "--use_fast_math", "-gencode", "arch=compute_90a,code=sm_90a",
               f"-I{TILELANG_TEMPLATE_PATH}", f"-I{CUTLASS_INCLUDE_DIR}", "-Xptxas", "-v", "-cubin", "-o", "x", "scan.cu"]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    notes = said.stdout + said.stderr
    assert not re.search(r"C75\d\d", notes)
    (stored,) = re.findall(r"(\d+) bytes spill stores", notes)
    return int(stored)


def test_asked_for_by_a_schedule(tmp_path: Path) -> None:
    path = tmp_path / "roles.json"
    ask = ["emit", "--backend", "tilelang", "--schedule"]
    path.write_text(CliRunner().invoke(app, [*ask, "roles", "--json"]).output)
    i = Instance(Switches(final_state=True), 128, 128, "bf16", "bf16", True)
    assert Schedule.from_json(path.read_text()) == forward_by_roles(i)
    path_of_one = tmp_path / "one.json"
    path_of_one.write_text(CliRunner().invoke(app, [*ask, "roles-fused", "--json"]).output)
    assert Schedule.from_json(path_of_one.read_text()) == roles_in_one()
    said = CliRunner().invoke(app, [*ask, str(path), "--kernel", "scan"])
    assert said.exit_code == 0 and "T.barrier_wait(k_full[i_X % 3], i_X // 3 % 2)" in said.output


def test_declines() -> None:
    i = Instance(Switches(final_state=True), 128, 128, "bf16", "bf16", True)
    wide = Instance(Switches(), 128, 256, "bf16", "bf16", True)
    for instance, arch, backend, why in ((i, "sm_80", "tilelang", "for sm_90, not for sm_80"),
                                         (i, "sm_90", "triton", "no roles"), (wide, "sm_90", "tilelang", "64 rows")):
        with pytest.raises(Unsupported, match=why):
            variant(instance, of_roles(), backend, arch)
    assert "roles" not in json.loads(Schedule("x").to_json())["kernels"]["*"]
    for role, left, why in (("state", "compute W", "state0 reads W, which no event"),
                            ("state", "compute u16", "state0 reads u16"), ("state", "compute R", "state0 reads R"),
                            ("inverse", "join A16", "state0 reads A16"),
                            ("load", "load q", "reads q, which no event"), ("load", "compute total", "load reads total"),
                            ("state", "compute o16 late", "store: store o: no event of any role makes what is stored"),
                            ("store", "store o", "read by none")):
        with pytest.raises(Unsupported, match=why):
            variant(i, roles_in_one(without(role, left)), "tilelang", "sm_90")
    deep = replace(FUSED_ROLES, rings=tuple(replace(r, depth=20) if r.values == ("k",) else r for r in FUSED_ROLES.rings))
    with pytest.raises(Unsupported, match=r"rings take \d+ bytes of shared memory; a block has 232448"):
        variant(i, roles_in_one(deep), "tilelang", "sm_90")
    load = FUSED_ROLES.roles[0]
    late = replace(load, events=tuple(replace(e, late=e == Event.of("compute beta")) for e in load.events))
    with pytest.raises(Unsupported, match="compute beta late: only what touches no tensor"):
        variant(i, roles_in_one(replace(FUSED_ROLES, roles=(late, *FUSED_ROLES.roles[1:]))), "tilelang", "sm_90")


def without(role: str, event: str) -> Roles:
    """The fused roles, of which one leaves something out."""
    roles = (replace(r, events=tuple(e for e in r.events if e != Event.of(event))) if r.name == role else r
             for r in FUSED_ROLES.roles)
    return replace(FUSED_ROLES, roles=tuple(roles))


def computed_first() -> Roles:
    """The fused roles, of which who loads computes with g as it is before it fetches the next."""
    load = FUSED_ROLES.roles[0]
    at = load.events.index(Event.of("compute G"))
    rest = tuple(e for e in load.events[at + 1:] if e != Event.of("fetch g early"))
    early = (*load.events[:at], Event.of("compute g"), Event.of("fetch g early"), load.events[at], *rest)
    return replace(FUSED_ROLES, roles=(replace(load, events=early), *FUSED_ROLES.roles[1:]))


@pytest.mark.parametrize(("late", "varlen", "starts", "kept", "lengths", "segment"), [
    (False, True, True, True, [130, 0, 64], 0), (True, True, False, True, [70], 0), (True, False, True, True, [65], 0),
    (True, True, False, False, [65, 0, 3], 0), (False, False, True, False, [66], 0),
    (False, True, True, True, [0, 300, 64, 0, 129, 1], 2), (True, True, False, False, [257, 70], 2),
    (True, False, True, True, [193, 193], 2), (False, False, False, False, [200], 3),
    (False, True, True, True, [193, 0, 65], FUSED), (True, False, False, True, [130], FUSED),
    (True, True, True, True, [130, 0, 64], OWN), (True, True, True, True, [193, 65], FIRST),
    (False, True, True, True, [0, 300, 64, 0, 129, 1], CUT_FUSED), (True, False, False, True, [193, 193], CUT_FUSED)])
def test_emitted_text_computes_the_rule(late: bool, varlen: bool, starts: bool, kept: bool, lengths: list[int],
                                        segment: int) -> None:
    """The emitted text itself, executed role by role, against float64: ragged tails, an empty sequence, with and without
    initial and final states, value heads that share a key head; whole or in segments, a sequence's last one shorter; all behind
    the last sequence is NaN, and stays as it was, or is cleared by roles that have no kernel beside them."""
    i = Instance(Switches(initial_state=starts, final_state=kept), 128, 128, "bf16", "bf16", varlen)
    name = "cut-fused" if segment == CUT_FUSED else "cut" if segment > 0 else "solve"
    steps = Schedule("x", steps=plan(name, sums=True, segment=max(segment, 2)))
    before, chosen = variant(i, steps, "torch", "torch"), variant(i, schedule(i, segment), "tilelang", "sm_90")
    kernel, source = chosen.compiled.kernels[-1], chosen.sources[-1]
    x = inputs.make(lengths, 1, 2, device="cpu")
    ends, total, more = x["cu_seqlens"], sum(lengths), 200 * varlen
    want = recurrence(*(x[n][None] for n in ("q", "k", "v", "g", "beta")),
                      initial_state=x["initial_state"] if starts else None, cu_seqlens=ends)
    memory = {n: torch.cat([t, torch.full((more, *t.shape[1:]), float("nan"), dtype=t.dtype)])
              for n, t in x.items() if n in ("q", "k", "v", "g", "beta")}
    memory |= {"initial_state": x["initial_state"], "o": torch.full_like(memory["v"], 7.0),
               "final_state": torch.full_like(x["initial_state"], float("nan"))}
    call = chosen.call_of(memory, len(lengths), ends if varlen else None)
    for launch in before.compiled.launches[:-1]:
        memory |= launch(memory, {"scale": 1.0}, call) or {}
    memory |= {n: memory[n].to(TORCH[t.dtype]) for n, t in kernel.program.tensors().items() if t.temp}
    emulated.run(kernel, source, memory, 128 ** -0.5, call, late)
    assert relative(memory["o"][:total], want[0][0]) < 4.5e-3
    assert any("final_state" in k.program.written() for k in chosen.compiled.kernels) == kept
    assert not kept or relative(memory["final_state"], want[1]) < 4.5e-3
    assert bool((memory["o"][total:] == (0 if kernel.owns_tail else 7)).all())
    assert kernel.owns_tail == (varlen and segment <= 0 and segment != CUT_FUSED)


@pytest.mark.parametrize("segment", [0, 2, FUSED])
def test_what_is_normalised_is_so_before(segment: int) -> None:
    """q and k are normalised once for each key head, in a kernel by Triton; roles load what it stored."""
    i = Instance(Switches(l2norm=True, final_state=True), 128, 128, "bf16", "bf16", True)
    made = roles_in_one(norm=True) if segment == FUSED else forward_by_roles(i, segment)
    chosen = variant(i, made, "tilelang", "sm_90")
    first, maker = chosen.compiled.kernels[0], chosen.compiled.makers[0]
    assert defaults.roles_can("sm_90", i) and (first.name, maker.name, first.program.grid) == ("norm", "triton", ("N", "H"))
    assert "k_kept_" in chosen.sources[-1].text
    plans = {0: plan("solve", sums=True, norm=True), FUSED: plan("fused", scaled=True, norm=True)}
    steps = plans.get(segment) or plan("cut", sums=True, segment=segment, norm=True)
    before = variant(i, Schedule("x", steps=steps), "torch", "torch")
    x = inputs.make([193, 0, 65], 1, 2, device="cpu")
    x["q"], x["k"] = 3 * x["q"], x["k"] / 5
    want = recurrence(*(x[n][None] for n in ("q", "k", "v", "g", "beta")), cu_seqlens=x["cu_seqlens"], l2norm=True)
    memory = {n: x[n] for n in ("q", "k", "v", "g", "beta")}
    memory |= {"o": torch.full_like(x["v"], float("nan")), "final_state": torch.full_like(x["initial_state"], float("nan"))}
    call = chosen.call_of(memory, 3, x["cu_seqlens"])
    for launch in before.compiled.launches[:-1]:
        memory |= launch(memory, {"scale": 1.0}, call) or {}
    kernel, source = chosen.compiled.kernels[-1], chosen.sources[-1]
    memory |= {n: memory[n].to(TORCH[t.dtype]) for n, t in kernel.program.tensors().items() if t.temp}
    emulated.run(kernel, source, memory, 128 ** -0.5, call, False)
    assert relative(memory["o"], want[0][0]) < 4.5e-3
    assert relative(memory["final_state"], want[1]) < 4.5e-3
