"""The backward's last kernels as one, which steps through K in parts: the steps that it takes, the loop, and what it holds."""
from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from gdn_ir.autodiff import backward
from gdn_ir.backends.arrange import is_sum
from gdn_ir.backends.temporaries import uncleared
from gdn_ir.backends.triton import cross_compile
from gdn_ir.compiler import Instance, Unsupported, variant
from gdn_ir.interp import Sizes, run, run_pipeline
from gdn_ir.nodes import IRError, Op, Tensor
from gdn_ir.printer import dump, evaluate
from gdn_ir.program import ScanView, tile_axes
from gdn_ir.programs.gated_delta import Switches, build
from gdn_ir.schedules import steps
from gdn_ir.schedules.defaults import whole_scans
from gdn_ir.schedules.plans import backward_plan
from gdn_ir.schedules.schedule import KernelOptions, Schedule
from gdn_ir.split import in_turn
from tests.programs import Case, tracer
from tests.test_backward import AXES, CU, FAMILY, GRADS, STATES, in_f64, interpreted, memory, spilled

BF16 = Instance(Switches(), 128, 128, "bf16", "bf16", True, GRADS)
PLANS = ("gathered-merged", "gathered-turns")


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("decay", "erase"), FAMILY)
def test_parts_of_k_are_exact(plan: str, decay: str, erase: bool) -> None:
    """In the interpreter, K in parts of 3, in the exact reading; and a program with such a loop prints as what it is."""
    axes = AXES | {"K": 6}
    p = backward(build(Switches(decay=decay, erase=erase, **STATES)))          # type: ignore[arg-type]
    given = memory(p, Sizes(axes, CU))
    want = run(p, given, Sizes(axes, CU), {"scale": 0.7})
    got = dict(given)
    for k in steps.apply(p, in_f64(backward_plan(plan, p, chunk=16, block=4))):
        if k.name == "grads":
            k = in_turn(k, "K")
            assert evaluate(dump(k)) == k and any(ScanView.of(s).parts == "K" for s in k.scans())
        got |= run_pipeline([k], got, Sizes(axes, CU, {"K": 3} if k.name == "grads" else {}), {"scale": 0.7})
    for n in (f"d_{name}" for name in (*GRADS, "initial_state") if f"d_{name}" in want):
        assert float((got[n] - want[n]).abs().max()) < 1e-10, n


def test_what_no_loop_over_parts_can_do() -> None:
    p, normalised = backward(build()), backward(build(Switches(l2norm=True)))
    with pytest.raises(IRError, match=r"split K: it needs a sum along all of K\n  in "):
        in_turn(next(k for k in steps.apply(normalised, backward_plan(PLANS[0], normalised)) if k.name == "grads"), "K")
    with pytest.raises(IRError, match="split K: a loop over parts holds no other"):
        in_turn(next(k for k in steps.apply(p, backward_plan("gathered", p)) if k.name == "grads"), "K")
    for taken in (("trade", "inner2"), ("collect", "inner2"), ("chain", "inner2")):
        with pytest.raises(steps.IllegalStep, match=f"{taken[0]}: no kernel is named 'inner2'; there are solve, local"):
            steps.apply(p, (*backward_plan("gathered", p), taken))


def test_what_no_kernel_may_have() -> None:
    """Parts of K that Triton miscompiles, or that do not make K; turns whose blocks would wait for others that start later."""
    made = whole_scans("sm_90", BF16, 1, 32, "triton", merges=PLANS[1])[0]
    for more, io, why in (({"k_tile": 32}, BF16, "Triton miscompiles 16-bit products narrower than 64"),
                          ({"around": False}, BF16, "grads.around: got false where it follows two scans"),
                          ({}, replace(BF16, K=96), r"grads.k_tile: got 64; accepts a divisor of K = 96")):
        schedule = made.with_options(grads=replace(made.options("grads"), **more))
        with pytest.raises(ValueError, match=why):
            variant(io, schedule, "triton", "sm_90")


def test_chain_keeps_signs() -> None:
    """Of a difference whose tile is multiplied twice by the same along rows."""
    t = tracer("twice")

    def body() -> None:
        x, e = t.load(Tensor("x", ("T", "HV", "V"))), t.load(Tensor("e", ("T", "HV")))
        t.store(Tensor("y", ("T", "HV", "V")), x - (x * e) * e)
    with t.recording():
        t.scan(body)
    case = Case(t.program(), {"V": 3})
    given, (chained,) = case.inputs(), steps.apply(case.program, (("chain", "twice"),))
    got, want = (run(p, given, case.sizes(), {})["y"] for p in (chained, case.program))
    assert chained != case.program and float((got - want).abs().max()) < 1e-12


def test_what_the_steps_save() -> None:
    """No product is there for the decay's gradient alone, and four sums of tiles instead of five."""
    plan = backward_plan("gathered-merged", BF16.program, beta="bf16")
    counts = []
    for left in (("trade", "collect", "share", "chain"), ("collect", "chain"), ()):
        grads = next(k for k in steps.apply(BF16.program, tuple(s for s in plan if s[0] not in left)) if k.name == "grads")
        nodes = grads.nodes()
        sums = [n for n in nodes if n.op is Op.REDUCE and "C" in n.axes and n["over"] == "K"]
        counts.append((sum(n.op is Op.DOT for n in nodes), len(sums), sum(n.op is Op.DOT and n["over"] == "K" for n in nodes)))
    assert counts == [(11, 3, 2), (9, 5, 0), (9, 4, 0)]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("grouped", [True, False])
def test_it_hardly_spills(plan: str, grouped: bool) -> None:
    """At two blocks a multiprocessor, by ptxas: up to 100 bytes of stack, and shared memory for both."""
    i = replace(BF16, grouped=grouped)
    made = variant(i, whole_scans("sm_90", i, 1, 32, "triton", merges=plan)[0], "triton", "sm_90")
    names = [k.name for k in made.compiled.kernels]
    assert names == ["solve", "local", "again", "back", "grads", *(["heads"] if grouped and plan == PLANS[0] else [])]
    grads, source = made.compiled.kernels[4], made.sources[4]
    assert len(grads.awaits) == 2 and grads.options == KernelOptions(None, 4, 1, True, sparing=True, k_tile=64, around=True)
    built = cross_compile(grads, source, "sm_90")
    assert spilled(built.asm["ptx"]) <= 100 and 2 * (built.metadata.shared + 1024) <= 233472
    assert uncleared(made.compiled.kernels) == ({"d_q_turn", "d_k_turn"} if grouped and plan == PLANS[1] else set())


def test_sums_stand_apart() -> None:
    """Each sum of tiles in the loop is a line of its own, so that none waits for all its addends."""
    made = variant(BF16, whole_scans("sm_90", BF16, 1, 32, "triton", merges=PLANS[0])[0], "triton", "sm_90")
    text = next(s.text for s in made.sources if s.kernel == "grads")
    loop = text.split("for part_K in range(2):")[1].split("K_0, K_1")[0]
    grads = next(k.program for k in made.compiled.kernels if k.name == "grads")
    sums = sum(is_sum(n) and "K" in n.axes for n in grads.nodes())
    assert len(re.findall(r"^ +\w+ = [^(\n]*(?: [+] )", loop, re.M)) == sums == 5


def test_executed() -> None:
    """By Triton's interpreter: packed with zero lengths, ragged, dense; groups of one, two and three; parts of K of 64."""
    cases = [["backward", f"gated delta rule, {layout}", None, plan, heads, True, 32, 0, "model", tile]
             for layout, plan, heads, tile in (("f32, varlen", PLANS[0], (1, 2), 32), ("f32, ragged", PLANS[1], (1, 3), 32),
                                               ("f32, dense", PLANS[1], (1, 2), 32), ("f16, varlen", PLANS[1], (2, 2), 32))]
    found = interpreted(cases)
    bad = {k: v for k, v in found.items() if "error" not in v or not float(v["error"]) < (2e-5 if "f32" in k else 4.5e-3)}
    assert not bad, json.dumps(bad, indent=1)[:3000]


@pytest.mark.parametrize(("lengths", "slots"), [((640, 640), 22), ((65, 0, 700), 14), ((64,), 2), ((3, 3, 3), 3)])
def test_chunks_from_the_middle_of_each_sequence(lengths: tuple[int, ...], slots: int) -> None:
    """Each block has a chunk of its own, all chunks have one; of sequences of one length those in the middle come first."""
    made = variant(BF16, whole_scans("sm_90", BF16, 1, 32, "triton", merges=PLANS[0])[0], "triton", "sm_90")
    text = next(s.text for s in made.sources if s.kernel == "grads")
    lines = [x.strip() for x in text.splitlines()]
    first = lines[lines.index("each = tl.num_programs(0) // (N * HV)"):][:2]
    last = [x for x in lines if x.startswith(("middle, away =", "i_X = tl.where("))]
    tl = SimpleNamespace(num_programs=lambda _: slots, where=lambda c, a, b: a if c else b, cdiv=lambda a, b: -(-a // b))
    cu = torch.tensor([0, *lengths]).cumsum(0).tolist()
    order = []
    for pid in range(slots):
        names = {"tl": tl, "pid": pid, "N": len(lengths), "HV": 1}
        exec("\n".join(first), names)
        n = max(i for i in range(len(lengths)) if cu[i] // 64 + i <= names["pid"])
        names |= {"length": lengths[n], "i_X": names["pid"] - cu[n] // 64 - n}
        if names["i_X"] * 64 < lengths[n]:
            exec("\n".join(last), names)
            order.append((n, names["i_X"]))
    assert sorted(order) == [(n, i) for n, length in enumerate(lengths) for i in range(-(-length // 64))]
    if lengths == (640, 640):
        assert order[:4] == [(0, 5), (1, 5), (0, 4), (1, 4)] and {i for _, i in order[-4:]} == {0, 9}


def test_who_declines() -> None:
    steps_ = backward_plan(PLANS[0], BF16.program, beta="bf16")
    parts = KernelOptions(None, 4, 2, k_tile=64)
    s = Schedule("x", steps=steps_).with_options(**{"*": KernelOptions(32, 4, 2), "grads": parts})
    with pytest.raises(Unsupported, match="tilelang does not step through parts of K; triton does"):
        variant(BF16, s, "tilelang", "sm_90")
    s = replace(s, steps=backward_plan(PLANS[1], BF16.program, beta="bf16"))
    with pytest.raises(Unsupported, match="does not lower a store summed over HV yet"):
        variant(BF16, s, "tilelang", "sm_90")
    assert "K" in tile_axes(BF16.program)


def test_the_options_say_so() -> None:
    options = KernelOptions(None, 4, 1, k_tile=64, around=True)
    assert str(options) == "4 warps, 1 stage, K in turn in tiles of 64, chunks from the middle"
    schedule = Schedule("mine").with_options(grads=options)
    assert Schedule.from_json(schedule.to_json()) == schedule
    with pytest.raises(ValueError, match=r"KernelOptions.k_tile: got 48; accepts a power of two"):
        KernelOptions(k_tile=48)
