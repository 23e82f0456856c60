"""The Gated DeltaNet layer against the same block written token by token in float64."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from einops import rearrange

import gdn_ir
from gdn_ir.nn import GatedDeltaNet, State
from gdn_ir.reference import recurrence
from tests.inputs import error

Tensor = torch.Tensor
SMALL: dict[str, Any] = {"hidden_size": 24, "head_dim": 16, "num_heads": 2, "num_v_heads": 4, "expand_v": 1}
VARIANTS: list[dict[str, Any]] = [{}, {"num_v_heads": None, "expand_v": 2}, {"use_gate": False}, {"use_short_conv": False},
                                  {"conv_bias": True, "conv_size": 3}, {"allow_neg_eigval": True},
                                  {"output_gate_activation": "sigmoid"}, {"expand_v": 32, "num_heads": 1, "num_v_heads": 2}]


@pytest.fixture(autouse=True)
def by_torch() -> Iterator[None]:
    torch.manual_seed(0)
    with gdn_ir.use("torch"):
        yield


def built(**changes: Any) -> GatedDeltaNet:
    layer = GatedDeltaNet(**(SMALL | changes))
    for c in ("q_conv1d", "k_conv1d", "v_conv1d"):
        if changes.get("conv_bias"):
            torch.nn.init.normal_(getattr(layer, c).bias)
    torch.nn.init.uniform_(layer.o_norm.weight, 0.5, 1.5)
    return layer


def block(p: dict[str, Tensor], x: Tensor, num_heads: int, head_dim: int, neg: bool = False, activation: str = "swish") \
        -> Tensor:
    """One sequence x [T, D] through the block, from its parameters by name; all in float64."""
    def mixed(name: str) -> Tensor:
        y = x @ p[f"{name}_proj.weight"].mT
        if f"{name}_conv1d.weight" in p:
            taps = p[f"{name}_conv1d.weight"][:, 0]
            width = taps.shape[1]
            rows = [sum(taps[:, width - 1 - j] * y[t - j] for j in range(min(width, t + 1))) for t in range(len(y))]
            y = torch.stack(rows) + p.get(f"{name}_conv1d.bias", 0)          # type: ignore[arg-type]
        return y * y.sigmoid()
    heads = len(p["A_log"])
    q, k = (rearrange(mixed(n), "t (h k) -> 1 t h k", h=num_heads, k=head_dim) for n in "qk")
    v = rearrange(mixed("v"), "t (h v) -> 1 t h v", h=heads)
    g = -p["A_log"].exp() * torch.log1p((x @ p["a_proj.weight"].mT + p["dt_bias"]).exp())
    beta = (x @ p["b_proj.weight"].mT).sigmoid() * (2 if neg else 1)
    o = recurrence(q, k, v, g[None], beta[None], l2norm=True)[0][0]
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p["o_norm.weight"]
    if "g_proj.weight" in p:
        gate = rearrange(x @ p["g_proj.weight"].mT, "t (h v) -> t h v", h=heads)
        o = o * gate.sigmoid() * (1 if activation == "sigmoid" else gate)
    return rearrange(o, "t h v -> t (h v)") @ p["o_proj.weight"].mT


def expected(layer: GatedDeltaNet, x: Tensor, **changes: Any) -> Tensor:
    settings = SMALL | changes
    p = {n: t.detach().double() for n, t in layer.state_dict().items()}
    return torch.stack([block(p, s.double(), settings["num_heads"], 16, settings.get("allow_neg_eigval", False),
                              settings.get("output_gate_activation", "swish")) for s in x])


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda c: ",".join(c) or "plain")
def test_dense(changes: dict[str, Any]) -> None:
    layer, x = built(**changes), torch.randn(2, 12, 24)
    y, state = layer(x)
    assert state is None and error(y, expected(layer, x, **changes)) < 1e-5


@pytest.mark.parametrize("changes", [VARIANTS[0], VARIANTS[3]], ids=lambda c: ",".join(c) or "plain")
def test_state_cache(changes: dict[str, Any]) -> None:
    """A prefill in two pieces, the second shorter than the convolution, then token after token."""
    layer, x = built(**changes), torch.randn(2, 14, 24)
    want = expected(layer, x, **changes)
    state, at = None, 0
    for size in (8, 2, 1, 1, 1, 1):
        y, state = layer(x[:, at:at + size], state, use_cache=True)
        assert error(y, want[:, at:at + size]) < 1e-5
        at += size
    assert isinstance(state, State) and (state.conv is None) == ("use_short_conv" in changes)


@pytest.mark.parametrize("changes", [VARIANTS[0], *VARIANTS[3:5]], ids=lambda c: ",".join(c) or "plain")
def test_packed(changes: dict[str, Any]) -> None:
    """Sequences of any length, none included, in two calls: each is what it is alone."""
    layer, lengths = built(**changes), ((5, 3), (0, 2), (1, 1), (4, 0), (2, 7))
    sequences = [torch.randn(1, a + b, 24) for a, b in lengths]
    wants = [expected(layer, s, **changes) for s in sequences]
    state = None
    for turn in (0, 1):
        parts = [s.split(n, 1)[turn] for s, n in zip(sequences, lengths, strict=True)]
        cu = torch.tensor([0, *torch.tensor([n[turn] for n in lengths]).cumsum(0).tolist()], dtype=torch.int32)
        y, state = layer(torch.cat([*parts, torch.randn(1, 3, 24)], 1), state, cu, use_cache=True)
        want = torch.cat([w.split(n, 1)[turn] for w, n in zip(wants, lengths, strict=True)], 1)
        assert error(y[:, :want.shape[1]], want) < 1e-5


def test_gradients_of_every_parameter() -> None:
    layer, x = built(conv_bias=True).double(), torch.randn(1, 9, 24, dtype=torch.float64)
    got = torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))
    p = {n: t.detach().requires_grad_() for n, t in layer.named_parameters()}
    want = torch.autograd.grad(block(p, x[0], 2, 16).square().sum(), list(p.values()))
    for name, a, b in zip(p, got, want, strict=True):
        assert error(a, b) < 1e-9, name


def test_packed_gradients_are_the_dense_ones() -> None:
    layer, x = built(), torch.randn(2, 9, 24)
    params = list(layer.parameters())
    dense = torch.autograd.grad(layer(x)[0].square().sum(), params)
    packed = torch.autograd.grad(layer(x.reshape(1, 18, 24), cu_seqlens=torch.tensor([0, 9, 18]))[0].square().sum(), params)
    assert all(error(a, b) < 1e-4 for a, b in zip(packed, dense, strict=True))


def test_compiles_to_one_graph() -> None:
    layer = built()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (9, 20):
        x = torch.randn(2, T, 24)
        assert torch.allclose(compiled(x)[0], layer(x)[0], atol=1e-6)


def test_loads_what_flash_linear_attention_saves() -> None:
    """Parameter names, shapes and marks are those of its layer; its defaults are ours."""
    from fla.layers import GatedDeltaNet as Theirs
    for changes in ({}, {"use_gate": False}, {"conv_bias": True}):
        theirs, mine = Theirs(**(SMALL | changes)), GatedDeltaNet(**(SMALL | changes))
        mine.load_state_dict(theirs.state_dict())
        marks = [{n for n, p in m.named_parameters() if getattr(p, "_no_weight_decay", False)} for m in (theirs, mine)]
        assert marks[0] == marks[1] == {"A_log", "dt_bias"}
    with torch.device("meta"):
        shapes = [{n: p.shape for n, p in m().named_parameters()} for m in (Theirs, GatedDeltaNet)]
    assert shapes[0] == shapes[1]


def test_initial_gates() -> None:
    layer = GatedDeltaNet(64, head_dim=16, num_heads=200, expand_v=1)
    dt = torch.nn.functional.softplus(layer.dt_bias)
    assert dt.min() > 1e-3 * 0.99 and dt.max() < 0.1 * 1.01 and layer.A_log.isfinite().all() and layer.A_log.exp().max() <= 16


@pytest.mark.parametrize(("changes", "message"), [
    ({"head_dim": 24}, "head_dim: got 24; accepts a multiple of 16 from 16 to 256"),
    ({"expand_v": 1.3}, "expand_v: got 1.3; accepts a factor that makes head_dim = 16 a multiple of 16"),
    ({"expand_v": 18}, "expand_v: got 18; accepts .* past 256 of 256"),
    ({"num_v_heads": 3}, "num_v_heads: got 3; accepts a multiple of 2"),
    ({"conv_size": 1}, "conv_size: got 1; accepts at least 2"),
    ({"output_gate_activation": "relu"}, "output_gate_activation: got 'relu'; accepts silu, swish, sigmoid")])
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatedDeltaNet(**(SMALL | changes))


def test_what_does_not_fit_is_named() -> None:
    layer = GatedDeltaNet(hidden_size=32, num_heads=2, head_dim=16)
    x = torch.randn(2, 5, 32)
    _, state = layer(x, use_cache=True)
    for args, message in (((x[:, :0],), r"x: got \[2, 0, 32\]; accepts \[B, T, 32\], T at least 1"),
                          ((x[..., :30],), r"x: got \[2, 5, 30\]; accepts \[B, T, 32\]"),
                          ((x, None, torch.tensor([0, 5])), r"x: got \[2, 5, 32\]; accepts \[1, T, 32\]"),
                          ((x[:1], state), "state: got the state of 2 sequences; accepts that of 1")):
        with pytest.raises(ValueError, match=message):
            layer(*args)
