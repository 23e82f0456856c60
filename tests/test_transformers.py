"""Small randomly initialised models of transformers give the same with and without us: logits, gradients, cached generation."""
from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

import gdn_ir
from gdn_ir import policy, providers, registry
from gdn_ir.backends.base import Reason
from gdn_ir.backends.triton import Triton
from gdn_ir.integrations import common
from gdn_ir.integrations import transformers as integration
from tests.inputs import error, expected, farther, make

MODELS = ("qwen3_next", "qwen3_5")
DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]
BOUND, GRADIENT_BOUND = 1e-4, 2e-4                         # float32; of each parameter by itself
CALM = 0.05                                                # initializer_range of a model that 16 bits do not throw off course
SMALL = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
         "linear_key_head_dim": 16, "linear_value_head_dim": 16, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None,
         "initializer_range": 0.2,
         "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"]}


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a GPU our own kernels, on a CPU torch's, for which nothing is compiled."""
    monkeypatch.setenv("GDN_IR_UNVERIFIED", "1")
    device = request.node.callspec.params.get("device", "cpu") if hasattr(request.node, "callspec") else "cpu"
    with gdn_ir.use("torch" if device == "cpu" else "triton"):
        yield


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without us: transformers' own torch, even where it would take Triton kernels of FLA."""
    for model in integration.MODELS:
        module = modeling(model)
        for name in integration.NAMES:
            monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
    yield
    integration.disable()


def modeling(model: str) -> ModuleType:
    return importlib.import_module(f"transformers.models.{model}.modeling_{model}")


def built(model: str, device: str, dtype: torch.dtype, **changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    module = modeling(model)
    if model == "qwen3_next":
        experts = {"mlp_only_layers": [0, 1, 2, 3], "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                   "shared_expert_intermediate_size": 16}
        made = module.Qwen3NextForCausalLM(module.Qwen3NextConfig(**(SMALL | experts | changes)))
    else:
        made = module.Qwen3_5ForCausalLM(module.Qwen3_5TextConfig(**(SMALL | changes)))
    for name, p in made.named_parameters():
        if name.endswith("A_log"):                         # decays that leave their own gradients well conditioned
            torch.nn.init.uniform_(p, -4, 0)
    result: torch.nn.Module = made.to(device, dtype).eval()
    return result


def both(run: Callable[[], Any]) -> tuple[Any, Any]:
    """What a run gives without us, then with us."""
    before = run()
    integration.enable()
    try:
        return before, run()
    finally:
        integration.disable()


def tokens(device: str, T: int = 70) -> torch.Tensor:
    return torch.randint(1, 50, (2, T), generator=torch.Generator().manual_seed(0)).to(device)


def training_step(m: torch.nn.Module, device: str) -> dict[str, torch.Tensor]:
    """A loss and the gradient of every parameter."""
    m.zero_grad()
    loss = m(tokens(device), labels=tokens(device)).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", MODELS)
def test_prefill(model: str, device: str, calls: list[str]) -> None:
    m = built(model, device, torch.float32)
    with torch.no_grad():
        want, got = both(lambda: m(tokens(device)).logits)
    assert error(got, want) <= BOUND
    assert calls == 3 * ["chunk_gated_delta_rule"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", MODELS)
def test_training(model: str, device: str, calls: list[str]) -> None:
    m = built(model, device, torch.float32).train()
    want, got = both(lambda: training_step(m, device))
    assert set(want) == set(got) and any("A_log" in n for n in got) and len(calls) == 3
    for name in want:
        assert error(got[name], want[name]) <= GRADIENT_BOUND, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", MODELS)
def test_bfloat16(model: str, device: str, calls: list[str]) -> None:
    """Logits and gradients are about as far from the same model in float32, without us, as it is in 16 bits without us: its own
    rounding is most of it."""
    wide = built(model, device, torch.float32, initializer_range=CALM).train()
    m = built(model, device, torch.bfloat16, initializer_range=CALM).train()
    with torch.no_grad():
        exact = wide(tokens(device)).logits
        want, got = both(lambda: m(tokens(device)).logits)
    assert not farther({"logits": got}, {"logits": want}, {"logits": exact})
    gradients = training_step(wide, device)
    before, after = both(lambda: training_step(m, device))
    assert not farther(after, before, gradients)
    assert calls == 6 * ["chunk_gated_delta_rule"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", MODELS)
def test_generation(model: str, device: str, calls: list[str]) -> None:
    """Greedy, from a cache: the same tokens, the same logits at each step."""
    m: Any = built(model, device, torch.float32)

    def generate() -> Any:
        return m.generate(tokens(device, 20), max_new_tokens=6, do_sample=False, output_logits=True,
                          return_dict_in_generate=True)
    want, got = both(generate)
    assert torch.equal(got.sequences, want.sequences)
    assert all(error(a, b) < 1e-4 for a, b in zip(got.logits, want.logits, strict=True))
    assert calls == 3 * ["chunk_gated_delta_rule"] + 15 * ["fused_recurrent_gated_delta_rule"]


def test_packed_sequences() -> None:
    """Boundaries keep sequences apart; transformers' torch path ignores them."""
    integration.enable()
    rule = modeling("qwen3_next").torch_chunk_gated_delta_rule
    x = make(T=70, HV=4)
    o, S = rule(*x.values(), cu_seqlens=torch.tensor([0, 30, 70]), output_final_state=True)
    for n, (a, b) in enumerate(((0, 30), (30, 70))):
        want_o, want_S = expected({name: t[:, a:b] for name, t in x.items()})
        assert error(o[:, a:b], want_o) < 1e-5 and error(S[n:n + 1], want_S) < 1e-5


def test_enable_and_disable_are_exact() -> None:
    before = [getattr(modeling(m), n) for m in integration.MODELS for n in integration.NAMES]
    integration.enable()
    integration.enable()
    assert not any(a is b for a, b in zip(before, (getattr(modeling(m), n) for m in integration.MODELS
                                                   for n in integration.NAMES), strict=True))
    integration.disable()
    integration.disable()
    assert before == [getattr(modeling(m), n) for m in integration.MODELS for n in integration.NAMES]


def test_what_we_cannot_serve_is_left_alone_with_one_warning(calls: list[str]) -> None:
    common.warn.cache_clear()
    m, said = built("qwen3_next", "cpu", torch.float32, linear_key_head_dim=8), "serves this call, not gdn_ir: K = 8"
    with torch.no_grad():
        want = m(tokens("cpu")).logits
        integration.enable()
        with pytest.warns(RuntimeWarning, match=f"transformers's own torch_chunk_gated_delta_rule {said}"):
            got = m(tokens("cpu")).logits
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            m(tokens("cpu"))
    assert torch.equal(got, want) and not calls


def test_compiles_to_one_graph() -> None:
    """What decides who serves is no break in a graph."""
    integration.enable()
    rule = modeling("qwen3_next").torch_chunk_gated_delta_rule
    compiled = torch.compile(rule, fullgraph=True, backend="aot_eager")
    x = make(HV=4).values()
    for f in (compiled, rule):
        assert error(f(*x, use_qk_l2norm_in_kernel=True)[0], expected(make(HV=4), l2norm=True)[0]) < 1e-5


def test_who_serves_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls for which a GPU has but the torch backend stay with the library, in compiled graphs too."""
    monkeypatch.setattr(registry, "architecture", lambda _: "sm_80")
    call = (torch.device("cpu"), 128, 128, torch.bfloat16, torch.bfloat16)
    assert common.slow(*call, True, False) is None                      # torch is asked for here
    with policy.automatic():
        assert common.slow(*call, False, False) is None and common.slow(*call, True, True) is None
        monkeypatch.delenv("GDN_IR_UNVERIFIED")
        registry.options.cache_clear()                      # which has answers from before
        assert common.slow(*call, False, False) is None
        assert "backward has not run" in str(common.slow(*call, True, False))
        compiled = torch.compile(lambda x: x + (common.slow(*call, True, False) is None), fullgraph=True, backend="eager")
        assert not compiled(torch.zeros(1)).any()
    registry.forget()


class First:
    """A provider that asks to be first and offers nothing, or something."""
    name, first = "first", True

    def __init__(self, offers: bool) -> None:
        self.offers = offers

    def offer(self, *call: object) -> tuple[Callable[..., None], str]:
        if not self.offers:
            raise ValueError("not today")
        return lambda *args: None, "for the test"


def test_who_serves_on_a_gpu_is_what_the_registry_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is forbidden, whoever else offers variants, whichever of our backends it is."""
    monkeypatch.setattr(registry, "architecture", lambda _: "sm_90")

    def slow() -> str | None:
        return common.slow(torch.device("cpu"), 128, 128, torch.bfloat16, torch.bfloat16, False, False)
    with policy.automatic():
        assert slow() is None
        with policy.forbid("triton", "tilelang"):
            assert slow() == "tilelang, triton forbidden by gdn_ir.forbid or GDN_IR_FORBID"
            with policy.forbid("torch"):
                assert "forbidden" in str(slow())
        for offers in (False, True):
            providers.register(First(offers))
            try:
                assert slow() is None
                with policy.forbid("triton", "tilelang"):
                    assert slow() == (None if offers else "not today")
            finally:
                providers.unregister("first")
        assert slow() is None
        monkeypatch.setattr(Triton, "supports", lambda *_: Reason("triton has a day off"))
        registry.forget()
        assert slow() is None                               # TileLang serves
        with policy.forbid("tilelang"):
            assert slow() == "triton has a day off"
    registry.forget()


def test_models_that_are_not_known() -> None:
    with pytest.raises(ImportError, match="no_such_model"):
        integration.enable(["no_such_model"])
    with pytest.raises(RuntimeError, match="modeling_qwen3 has no torch_chunk_gated_delta_rule"):
        integration.enable(["qwen3"])
