"""FLA's own layer and model give the same with and without us: logits, gradients, cached generation. On a CPU, where FLA has no
kernels, what surrounds the op is torch, and without us the op is FLA's naive one."""
from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import gdn_ir
from gdn_ir.integrations import fla as integration
from gdn_ir.nn import GatedDeltaNet
from gdn_ir.nn.parts import GatedRMSNorm, convolve, last_tokens
from gdn_ir.ops.gates import log_decay
from tests.inputs import error, farther

Tensor = torch.Tensor
DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]
SMALL = {"hidden_size": 32, "head_dim": 16, "num_heads": 2, "num_v_heads": 4, "expand_v": 1}
BOUND = {"cpu": 1e-5, "cuda": 2e-2}                        # float32; on a GPU bfloat16
GRADIENT_BOUND = 2e-4                                      # float32


def naive(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """FLA's reference, with what its kernels do inside done before it."""
    from fla.ops.gated_delta_rule import naive_recurrent_gated_delta_rule
    assert kwargs["use_qk_l2norm_in_kernel"] and kwargs["use_gate_in_kernel"] and kwargs["state_v_first"]
    q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    state = kwargs["initial_state"]
    o, S = naive_recurrent_gated_delta_rule(q, k, v, beta.sigmoid(), log_decay(g, kwargs["A_log"], kwargs["dt_bias"]),
                                            initial_state=None if state is None else state.mT,
                                            output_final_state=bool(kwargs["output_final_state"]))
    return o, None if S is None else S.mT


class Conv(nn.Module):
    """FLA's ShortConvolution in torch."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.weight, self.bias = like.weight, like.bias

    def forward(self, x: Tensor, cache: Tensor | None = None, output_final_state: bool = False,
                cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        y = nn.functional.silu(convolve(x, self.weight, self.bias, cache, cu_seqlens))
        return y, last_tokens(x, self.weight.shape[-1], cache, cu_seqlens) if output_final_state else None


@contextmanager
def by_naive() -> Iterator[None]:
    """FLA's layers call its naive op, on any device."""
    from fla.backends import _operation_registries, BaseBackend

    class Naive(BaseBackend):                              # type: ignore[misc]
        backend_type, priority, chunk_gated_delta_rule = "naive", 9, staticmethod(naive)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_operation_registries["gated_delta_rule"]._backends, "naive", Naive())
        for module in ("fla.ops.gated_delta_rule.fused_recurrent", "fla.layers.gated_deltanet"):
            patch.setattr(importlib.import_module(module), "fused_recurrent_gated_delta_rule", naive)
        yield


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    monkeypatch.setenv("GDN_IR_UNVERIFIED", "1")
    device = request.node.callspec.params.get("device", "cpu") if hasattr(request.node, "callspec") else "cpu"
    if device == "cpu":
        monkeypatch.setattr(importlib.import_module("fla.modules.mlp"), "swiglu", lambda x, y: nn.functional.silu(x) * y)
    else:                                                  # which of its kernels is fastest is nothing to these tests
        monkeypatch.setattr("triton.runtime.autotuner.Autotuner.prune_configs", lambda tuner, _: tuner.configs[:2])
    with by_naive() if device == "cpu" else nullcontext(), gdn_ir.use("torch" if device == "cpu" else "triton"):
        yield
    integration.disable()


def on(device: str, module: Any, dtype: torch.dtype | None = None) -> Any:
    """The module on the device (float32 on a CPU, else bfloat16); on a CPU with torch for what FLA writes in Triton."""
    for name, child in list(module.named_modules()):
        parent = module.get_submodule(name.rpartition(".")[0])
        if device == "cpu" and type(child).__name__ == "ShortConvolution":
            setattr(parent, name.rpartition(".")[2], Conv(child))
        if device == "cpu" and type(child).__name__ == "FusedRMSNormGated":
            norm = GatedRMSNorm(child.hidden_size, child.eps, child.activation)
            norm.weight = child.weight
            setattr(parent, name.rpartition(".")[2], norm)
        if hasattr(child, "_use_fused_qkv_conv") and device == "cpu":
            child._use_fused_qkv_conv = lambda *args, **kwargs: False
        if hasattr(child, "A_log"):                        # decays that leave their own gradients well conditioned
            nn.init.uniform_(child.A_log, -4, 0)
    return module.to(device, dtype or (torch.float32 if device == "cpu" else torch.bfloat16))


def model(device: str, dtype: torch.dtype | None = None) -> Any:
    """In 16 bits its weights are small: larger ones turn its own rounding into errors of tens of percent."""
    from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
    torch.manual_seed(0)
    config = GatedDeltaNetConfig(**SMALL, num_hidden_layers=2, vocab_size=50, intermediate_size=32,
                                 initializer_range=0.2 if device == "cpu" else 0.05, fuse_norm=device != "cpu",
                                 fuse_swiglu=device != "cpu", fuse_cross_entropy=device != "cpu",
                                 eos_token_id=None, bos_token_id=None, pad_token_id=0)
    return on(device, GatedDeltaNetForCausalLM(config), dtype)


def in_float32(run: Callable[[Any], Any], mode: bool) -> Any:
    """What a run gives of the model in float32 on the GPU, its op the naive one."""
    with by_naive():
        return run(model("cuda", torch.float32).train(mode))


def tokens(device: str, T: int = 70) -> Tensor:
    return torch.randint(1, 50, (2, T), generator=torch.Generator().manual_seed(0)).to(device)


def both(run: Callable[[], Any]) -> tuple[Any, Any]:
    before = run()
    integration.enable()
    try:
        return before, run()
    finally:
        integration.disable()


def step(m: Any) -> dict[str, Tensor]:
    """Logits and the gradient of every parameter."""
    ids = tokens(m.device.type)
    out = m(ids, labels=ids)
    m.zero_grad()
    out.loss.backward()
    return {"logits": out.logits.detach()} | {n: p.grad.clone() for n, p in m.named_parameters()}


@pytest.mark.parametrize("device", DEVICES)
def test_prefill_and_training(device: str, calls: list[str]) -> None:
    m = model(device).train()
    want, got = both(lambda: step(m))
    assert calls == 2 * ["chunk_gated_delta_rule"]
    if device == "cpu":
        assert error(got.pop("logits"), want.pop("logits")) <= BOUND[device]
        for name in want:
            assert error(got[name], want[name]) <= GRADIENT_BOUND, name
    else:
        assert not farther(got, want, in_float32(step, mode=True))


def generate(m: Any) -> dict[str, Tensor]:
    """Logits of a prefill by the chunked op, then of token after token from the cache by the recurrent one."""
    found, cache, ids = {}, None, tokens(m.device.type, 80)
    with torch.no_grad():
        for i, part in enumerate((ids[:, :76], *ids[:, 76:].split(1, 1))):
            out = m(part, past_key_values=cache, use_cache=True)
            found[f"part {i}"] = out.logits
            cache = out.past_key_values
    return found


@pytest.mark.parametrize("device", DEVICES)
def test_generation(device: str, calls: list[str]) -> None:
    m = model(device).eval()
    want, got = both(lambda: generate(m))
    assert calls == 2 * ["chunk_gated_delta_rule"] + 8 * ["fused_recurrent_gated_delta_rule"]
    if device == "cpu":
        assert all(error(got[name], want[name]) <= BOUND[device] for name in want)
    else:
        assert not farther(got, want, in_float32(generate, mode=False))


@pytest.mark.parametrize("device", DEVICES)
def test_our_layer_is_theirs(device: str) -> None:
    """Same weights, same output and state, packed sequences too (which the naive op does not keep apart)."""
    from fla.layers import GatedDeltaNet as Theirs
    torch.manual_seed(0)
    theirs = on(device, Theirs(**SMALL, layer_idx=0)).eval()
    mine = GatedDeltaNet(**SMALL).to(device, next(theirs.parameters()).dtype)
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 70, 32, device=device, dtype=mine.q_proj.weight.dtype)
    assert error(mine(x)[0], theirs(x)[0]) <= BOUND[device]
    integration.enable()
    cu = torch.tensor([0, 20, 140], device=device)
    packed = x.reshape(1, 140, 32)
    assert error(mine(packed, cu_seqlens=cu)[0], theirs(packed, cu_seqlens=cu)[0]) <= BOUND[device]


def test_what_we_cannot_serve_stays_with_fla(calls: list[str]) -> None:
    from fla.layers import GatedDeltaNet as Theirs
    integration.enable()
    odd = on("cpu", Theirs(**(SMALL | {"head_dim": 8}), layer_idx=0))
    assert odd(torch.randn(1, 5, 32))[0].shape == (1, 5, 32) and not calls
    with torch.no_grad():
        assert odd.eval()(torch.randn(1, 5, 32))[0].shape == (1, 5, 32) and not calls


def test_context_parallelism_and_unknown_keywords_stay_with_fla() -> None:
    x = torch.zeros(1, 4, 1, 16), torch.zeros(1, 4, 1)
    args = (x[0], x[0], x[0], x[1], x[1])
    assert integration._declined(*args) is None
    assert integration._declined(*args, cp_context=object()) == "cp_context is not supported"
    assert integration._declined(*args, new_flag=True) == "new_flag is not supported"


def test_a_registry_that_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fla.backends._DISPATCH_DISABLED", True)
    with pytest.raises(RuntimeError, match="FLA_DISABLE_BACKEND_DISPATCH=1: FLA asks no backend"):
        integration.enable()


def test_disable_is_exact() -> None:
    layer, recurrent = (sys.modules[f"fla.{n}"] for n in ("layers.gated_deltanet", "ops.gated_delta_rule.fused_recurrent"))
    before = [m.fused_recurrent_gated_delta_rule for m in (layer, recurrent)]
    integration.enable()
    integration.enable()
    assert layer.fused_recurrent_gated_delta_rule is not before[0]
    integration.disable()
    integration.disable()
    assert [m.fused_recurrent_gated_delta_rule for m in (layer, recurrent)] == before
