"""The op of one token at a time, and gates made in the ops, against the recurrence in float64."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import gdn_ir
from gdn_ir import registry
from gdn_ir.compiler import Instance
from gdn_ir.ops import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from gdn_ir.ops.gates import log_decay
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.reference import recurrence
from tests.differential import interpreted
from tests.inputs import error, expected, make

Op = Callable[..., tuple[torch.Tensor, "torch.Tensor | None"]]
OPS = pytest.mark.parametrize("op", [chunk_gated_delta_rule, fused_recurrent_gated_delta_rule])
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4.5e-3, torch.bfloat16: 4.5e-3}


@pytest.fixture(autouse=True)
def by_torch() -> Iterator[None]:
    with gdn_ir.use("torch"):
        yield


@pytest.mark.parametrize("dtype", BOUNDS)
def test_packed(dtype: torch.dtype) -> None:
    """Shared heads, an empty sequence, states [V, K], a tail."""
    x, cu = make(T=20, HV=4, K=32, V=48, dtype=dtype), torch.tensor([0, 1, 1, 17])
    S0 = torch.randn(3, 4, 32, 48, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    o, S = fused_recurrent_gated_delta_rule(**x, initial_state=S0.mT.contiguous(), output_final_state=True, cu_seqlens=cu,
                                            state_v_first=True)
    want_o, want_S = expected(x, S0, cu)
    assert S is not None and not o[:, 17:].any()
    assert error(o, want_o) < BOUNDS[dtype] and error(S.mT, want_S) < BOUNDS[dtype]


def test_decoding_continues_a_prefill() -> None:
    """Token after token from the state of the chunked op, as in generation."""
    x = make(B=2, T=70, HV=4)
    want_o, want_S = expected(x)
    _, S = chunk_gated_delta_rule(**{n: t[:, :64] for n, t in x.items()}, output_final_state=True)
    for t in range(64, 70):
        o, S = fused_recurrent_gated_delta_rule(**{n: y[:, t:t + 1] for n, y in x.items()}, initial_state=S,
                                                output_final_state=True)
        assert error(o, want_o[:, t:t + 1]) < 1e-5
    assert S is not None and error(S, want_S) < 1e-5


def test_native_code_decodes() -> None:
    x, S0 = make(B=3, T=1, HV=4), torch.randn(3, 4, 32, 32)
    with gdn_ir.use("tilelang"):
        o, S = fused_recurrent_gated_delta_rule(**x, initial_state=S0, output_final_state=True)
    want_o, want_S = expected(x, S0)
    assert S is not None and error(o, want_o) < 1e-6 and error(S, want_S) < 1e-6


def test_triton_decodes() -> None:
    """The schedule it is given on a GPU, V in several tiles, by Triton's interpreter."""
    found = interpreted([["recurrent", "initial state, f32"]])
    assert all(r.get("error", 1.0) < 1e-5 for r in found.values()), found      # type: ignore[operator]


def test_it_is_differentiable() -> None:
    x = make(T=20, dtype=torch.float64, HV=4)
    leaves = [t.requires_grad_() for t in x.values()]
    o, S = fused_recurrent_gated_delta_rule(**x, output_final_state=True)
    want_o, want_S = recurrence(**x)
    assert S is not None
    got = torch.autograd.grad(o.square().sum() + S.sin().sum(), leaves)
    for a, b in zip(got, torch.autograd.grad(want_o.square().sum() + want_S.sin().sum(), leaves), strict=True):
        assert error(a, b) < 1e-10


def test_positional_arguments_are_flas() -> None:
    x = make(T=3)
    o, _ = fused_recurrent_gated_delta_rule(x["q"], x["k"], x["v"], x["g"], None, None, x["beta"], 0.5)
    assert error(o, 0.5 * 32 ** 0.5 * expected(x)[0]) < 1e-5


def test_without_beta_it_is_one() -> None:
    x = make(T=3)
    x["beta"] = torch.ones_like(x["beta"])
    assert error(fused_recurrent_gated_delta_rule(x["q"], x["k"], x["v"], x["g"])[0], expected(x)[0]) < 1e-5


@pytest.mark.parametrize(("kwargs", "kind", "message"), [
    ({"gk": torch.zeros(1)}, NotImplementedError, "gk: got float32"),
    ({"gv": torch.zeros(1)}, NotImplementedError, "gv: got float32"),
    ({"gamma": 1}, TypeError, "fused_recurrent_gated_delta_rule: unknown keyword 'gamma', got 1; accepts q, k, v"),
    ({"cu_seqlens_cpu": None}, TypeError, "unknown keyword 'cu_seqlens_cpu'"),
    ({"beta": None, "use_beta_sigmoid_in_kernel": True}, TypeError, "beta: got None; accepts a tensor with use_beta_sigmoid"),
    ({"beta": None, "v": torch.zeros(2)}, ValueError, r"v: got float32 \[2\] on cpu; accepts a tensor \[B, T, HV, V\]"),
    ({"beta": None, "v": 1.0}, TypeError, r"v: got 1.0; accepts a tensor"),
    ({"beta": torch.zeros(1, 3, 2, 32)}, ValueError, r"beta: got .*3 dimensions")])
def test_refused(kwargs: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        fused_recurrent_gated_delta_rule(**(make(T=3) | kwargs))


def test_on_a_gpu() -> None:
    one = Instance(Switches(initial_state=True, final_state=True), 128, 128, "bf16", "bf16", False, recurrent=True)
    for arch in ("sm_80", "sm_90"):
        first = registry.options(one, arch, 8, 32, 8)[0]
        assert first.backend == "triton" and first.variant is not None and first.variant.schedule.chunk == 1
    with pytest.raises(ValueError, match="recurrent: got True with grads"):
        Instance(Switches(), 128, 128, "bf16", "bf16", False, ("v",), recurrent=True)


# ---- gates made in the op ---------------------------------------------------------------------------------------------------


def raw(dtype: torch.dtype = torch.float32, **shape: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Inputs whose g is raw, and the gate's parameters."""
    x = make(**shape, dtype=dtype)
    HV = x["v"].shape[2]
    x["g"] = torch.randn(x["g"].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return x, {"A_log": torch.linspace(-2.0, 2.0, HV), "dt_bias": torch.linspace(-4.0, 1.0, HV)}


@OPS
@pytest.mark.parametrize("bias", [False, True])
def test_gate(op: Op, bias: bool) -> None:
    x, gate = raw(T=20, HV=4)
    gate = gate if bias else {"A_log": gate["A_log"]}
    o, _ = op(**x, **gate, use_gate_in_kernel=True)
    g = -gate["A_log"].double().exp() * torch.log1p((x["g"].double() + gate.get("dt_bias", 0)).exp())
    assert error(o, expected(x | {"g": g})[0]) < 1e-5


@OPS
def test_gradients_of_the_gate(op: Op) -> None:
    x, gate = raw(torch.float64, T=20, HV=4)
    leaves = [t.double().requires_grad_() for t in (x["g"], *gate.values())]
    g, A_log, dt_bias = leaves
    o, _ = op(**(x | {"g": g}), use_gate_in_kernel=True, A_log=A_log, dt_bias=dt_bias)
    decay = -A_log.exp() * torch.log1p((g + dt_bias).exp())
    want, _ = recurrence(**(x | {"g": decay}))
    got = torch.autograd.grad(o.square().sum(), leaves)
    for a, b in zip(got, torch.autograd.grad(want.square().sum(), leaves), strict=True):
        assert error(a, b) < 1e-10


def test_the_gate_is_float32_under_autocast() -> None:
    """Rounded to bfloat16, decays would be off by parts in 256, and their sums by more."""
    x, gate = raw(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = log_decay(x["g"], gate["A_log"].bfloat16(), gate["dt_bias"])
    assert got.dtype == torch.float32 and torch.equal(got, log_decay(x["g"], gate["A_log"].bfloat16(), gate["dt_bias"]))
