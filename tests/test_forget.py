"""What has faded before a segment's end is left out of its transition and offset: only where it may be, and then in fact."""
from __future__ import annotations

import math

import pytest
import torch

from gdn_ir.build import dot
from gdn_ir.compiler import Instance, variant
from gdn_ir.interp import Sizes, run_pipeline
from gdn_ir.nodes import IRError
from gdn_ir.program import Program
from gdn_ir.programs.gated_delta import Switches, build
from gdn_ir.reference import recurrence
from gdn_ir.schedules import steps
from gdn_ir.schedules.forget import FADED
from gdn_ir.schedules.partition import _join
from gdn_ir.schedules.pipeline import STEPS
from gdn_ir.schedules.plans import plan
from gdn_ir.schedules.schedule import Schedule
from tests import inputs
from tests.differential import interpreted

STATES = Switches(initial_state=True, final_state=True)
CHUNK, SEGMENT, ENDS = 16, 4, [0, 200, 200, 328, 337]      # segments of 64 tokens; some sequences end within one, or a chunk


def fading(norm: float = 1.0, K: int = 5, V: int = 6) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs of three heads, and states: the first fades within two chunks, the second within a segment, the last hardly.
    norm: that of the keys."""
    x = inputs.make(1, ENDS[-1], 1, 3, K, V, torch.float64)
    x["k"] = norm * x["k"]
    x["g"] = torch.tensor([-1.1, -0.4, -1e-4], dtype=torch.float64).expand_as(x["g"]).contiguous()
    return x, torch.randn(len(ENDS) - 1, 3, K, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_interpreter(x: dict[str, torch.Tensor], S0: torch.Tensor, taken: tuple[tuple[str | int, ...], ...]) \
        -> dict[str, torch.Tensor]:
    """All that the kernels of a plan store, in float64."""
    sizes = Sizes({"C": CHUNK, "K": 5, "V": 6, "H": 1, "HV": 3, "X": SEGMENT}, ENDS)
    given = {n: t[0] for n, t in x.items()} | {"initial_state": S0}
    return run_pipeline(list(steps.apply(build(STATES), taken)), given, sizes, {"scale": 5 ** -0.5})


def cut(plan_name: str = "cut", least: int | None = None) -> tuple[tuple[str | int, ...], ...]:
    """The steps; least: nats that count as faded, 0 for a plan that forgets nothing."""
    taken = plan(plan_name, True, "f64", CHUNK, 4, sums=True, segment=SEGMENT)
    assert ("forget", "S") in taken
    return tuple(s if s[0] != "forget" else (*s, least) for s in taken if s[0] != "forget" or least != 0) \
        if least is not None else taken


@pytest.mark.parametrize("name", ["segments", "cut", "cut-fused"])
def test_what_is_left_out_is_below_rounding(name: str) -> None:
    x, S0 = fading()
    o, S = inputs.expected(x, S0, torch.tensor(ENDS))
    got = by_interpreter(x, S0, cut(name))
    assert inputs.error(got["o"], o[0]) < math.exp(-FADED) and inputs.error(got["final_state"], S) < math.exp(-FADED)
    # of the first sequence's segments: 4, 4, 4 chunks and one, of 8 tokens
    assert got["within"][:4].tolist() == [[2, 4, 4]] * 3 + [[1, 1, 1]]
    alive = got["P_S"].abs().amax((-2, -1)) > 0
    assert alive[:4].tolist() == [[False, False, True]] * 3 + [[True, True, True]]
    bound = torch.tensor([-1.1 * 32, -0.4 * 64, -1e-4 * 64], dtype=torch.float64)
    assert torch.allclose(got["bound"][0], bound, atol=1e-5)


def test_it_is_what_makes_it_cheap() -> None:
    """With less left out, more is computed: the same kernels without the step, and with one that forgets too soon."""
    x, S0 = fading()
    o, _ = inputs.expected(x, S0, torch.tensor(ENDS))
    whole, early = (by_interpreter(x, S0, cut(least=n)) for n in (0, 3))
    assert inputs.error(whole["o"], o[0]) < 1e-13 and "within" not in whole
    assert early["within"][0].tolist() == [1, 1, 4] and inputs.error(early["o"], o[0]) > 1e-6


def test_keys_that_are_not_normalised() -> None:
    """With keys of norm 1.6 and beta up to 1 a token may stretch a state by 1.56: a decay that would forget does not."""
    x, S0 = fading(1.6)
    x["beta"] = torch.ones_like(x["beta"])
    o, S = inputs.expected(x, S0, torch.tensor(ENDS))
    got = by_interpreter(x, S0, cut())
    stretch = math.log(1.6 ** 2 - 1)
    grows = SEGMENT * CHUNK * (stretch - torch.tensor([0.4, 1e-4], dtype=torch.float64))
    assert torch.allclose(got["bound"][0, 1:], grows, atol=1e-5)
    assert got["within"][0].tolist() == [2, 4, 4] and got["P_S"][0, 1].abs().max() > 0
    assert inputs.error(got["o"], o[0]) < math.exp(-FADED) and inputs.error(got["final_state"], S) < math.exp(-FADED)


def test_a_nan_is_not_forgotten() -> None:
    x, S0 = fading()
    x["v"][0, 63, 0] = math.nan                            # within reach of the first segment's end
    x["g"][0, 70, 1] = math.nan
    got = by_interpreter(x, S0, cut())
    assert got["o"][64:, 0].isnan().any() and got["o"][70:, 1].isnan().any()


def test_by_torch_and_triton() -> None:
    x, S0 = fading(K=16, V=16)
    o, S = inputs.expected(x, S0, torch.tensor(ENDS))
    instance = Instance(STATES, 16, 16, "f32", "f32", True)
    for name in ("cut", "cut-fused"):
        taken = plan(name, True, "f32", CHUNK, 4, sums=True, segment=SEGMENT)
        made = variant(instance, Schedule("x", CHUNK, taken), "torch", "torch")
        got = made.apply({n: t[0].float() for n, t in x.items()} | {"initial_state": S0.float()}, 0.25, 4,
                         torch.tensor(ENDS, dtype=torch.int32))
        assert inputs.error(got["o"], o[0]) < 1e-6 and inputs.error(got["final_state"], S) < 1e-6
    found = interpreted([["plan", name, "initial state, f32", 16, 4, 32, 8.0] for name in ("cut", "cut-fused")])
    assert all(float(str(v.get("error", "nan"))) < 1e-6 for v in found.values()), found


def test_refusals() -> None:
    p = build(STATES)
    with pytest.raises(steps.IllegalStep, match="forget: S is not cut into segments"):
        steps.apply(p, (*plan("solve", sums=True), ("forget", "S")))
    taken = tuple(s for s in plan("cut", segment=4, sums=False))
    assert not any(s[0] == "forget" for s in taken)
    with pytest.raises(steps.IllegalStep, match=r"forget: .*kk"):
        steps.apply(p, (*taken, ("forget", "S")))


def test_inverses_within_reach_alone() -> None:
    """What transition and offset read is computed for the chunks that they look at, and for no other."""
    x, S0 = fading()
    got = by_interpreter(x, S0, cut("cut-fused"))
    assert got["near"][:4].tolist() == [[0, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]]       # within reach: 2, 4 and 4 of 4 chunks
    near, made = got["near"] == 1, got["total"] < 0
    assert near.any() and (got["near"] == 0).any() and torch.equal(near, made)


def test_refusals_of_what_is_hoisted_within() -> None:
    p = build(STATES)
    before = [s for s in plan("cut-fused", sums=True, segment=4) if s[0] not in ("base_two", "merge")]
    at = [s[0] for s in before].index("hoist_within")
    for step, why in ((("hoist_within", "A_beta,G", "io", "solve"), "a dtype for each name"),
                      (("hoist_within", "A_beta", "io", "scan"), "there is a kernel scan already"),
                      (("hoist_within", "beta", "f32", "solve"), "there is a tensor beta already"),
                      (("hoist_within", "P_S_u", "io", "solve"), "P_S_u needs P_S, which the scan carries"),
                      (("hoist_within", "kk,x", "io,io", "solve"), "no value named 'x'")):
        with pytest.raises(IRError, match=why):
            steps.apply(p, (*before[:at], step))
    with pytest.raises(steps.IllegalStep, match="after the step forget"):
        steps.apply(p, (*before[:at - 1], before[at]))
    with pytest.raises(steps.IllegalStep, match="is used once"):
        steps.apply(p, (*before[:at], ("hoist_within", "kk", "f32", "one"), before[at]))
    with pytest.raises(steps.IllegalStep, match="solve leaves chunks out"):
        _join("hoist", steps.apply(p, tuple(before)), 4, "solve", ())


def test_the_bound_is_of_the_keys_themselves() -> None:
    """Where kk is something else, its first factor says nothing of its diagonal."""
    def doubled(q: Program) -> Program:
        return q.rebuild(lambda n, args: dot(args[0], 2.0 * args[1], "K") if q.name_of(n) == "kk" else None)
    before = plan("cut-fused", sums=True, segment=4)
    kernels = steps.apply(build(STATES), before[:before.index(("forget", "S"))])
    with pytest.raises(steps.IllegalStep, match="kk is not the product of the keys and themselves"):
        STEPS["forget"](tuple(map(doubled, kernels)), "S")


def test_chunks_left_out_are_not_written() -> None:
    """By the kernel itself: of chunks that are not near, nothing (torch's kernels return zeros where nothing is written)."""
    i = Instance(Switches(), 16, 16, "f32", "f32", True)
    schedule = Schedule("x", CHUNK, plan("cut-fused", True, "f32", CHUNK, 4, sums=True, segment=SEGMENT))
    chosen = variant(i, schedule, "torch", "torch")
    launch = chosen.compiled.launches[[k.name for k in chosen.compiled.kernels].index("solve")]
    x = {n: t[0].float() for n, t in fading(K=16, V=16)[0].items()}
    call = chosen.call_of(x, len(ENDS) - 1, torch.tensor(ENDS, dtype=torch.int32))
    near = (torch.arange(call.slots(CHUNK) * 3).reshape(-1, 3) % 2).float()
    some, every = (launch(x | {"near": mark}, {"scale": 1.0}, call) for mark in (near, torch.ones_like(near)))
    assert some and every and every["total"].count_nonzero() > 20
    assert torch.equal(some["total"], near * every["total"])
    text = next(s.text for s in variant(i, schedule, "triton", "sm_90").sources if s.kernel == "solve")
    assert "if tl.load(near_ptr + slot * HV + i_HV) == 0.0:\n        return" in text


def test_reference_is_of_the_op() -> None:
    """The recurrence that the others are held against forgets too: after 64 tokens a state is gone, where it should be."""
    x, S0 = fading()
    tokens = {n: x[n][:, 100:164] for n in ("q", "k", "v", "g", "beta")}
    _, from_zero = recurrence(*tokens.values())
    _, from_one = recurrence(*tokens.values(), initial_state=S0[:1] + 1.0)
    far = (from_zero - from_one).abs().amax((-2, -1))[0]
    assert far[0] < 1e-20 and far[1] < math.exp(-FADED) and far[2] > 1e-3
