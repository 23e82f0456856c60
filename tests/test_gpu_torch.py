"""What torch asks of an op on a GPU: no waiting, graphs whose contents change, streams, compilation; one token at a time."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import gdn_ir
from gdn_ir.backends.base import TORCH
from gdn_ir.bench.errors import bound
from gdn_ir.nn import GatedDeltaNet
from gdn_ir.ops import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from tests.inputs import error, expected, make

pytestmark = pytest.mark.gpu
BOUNDS = {TORCH[io]: bound(io) for io in ("bf16", "f16", "f32")}


@pytest.fixture(autouse=True)
def by_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GDN_IR_UNVERIFIED", "1")
    torch._dynamo.reset()
    with gdn_ir.use("triton"):
        yield


def inputs(seed: int = 0, **shape: Any) -> dict[str, torch.Tensor]:
    return make(**({"T": 200, "H": 2, "HV": 4, "K": 64, "V": 64} | shape), dtype=torch.bfloat16, device="cuda", seed=seed)


def layer() -> GatedDeltaNet:
    torch.manual_seed(0)
    return GatedDeltaNet(64, expand_v=1, head_dim=64, num_heads=2, num_v_heads=4).to("cuda", torch.bfloat16)


def training(x: dict[str, torch.Tensor], cu: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in x.values()]
    o, _ = chunk_gated_delta_rule(*leaves, cu_seqlens=cu)
    return (o.detach(), *torch.autograd.grad(o, leaves, torch.ones_like(o)))


# ---- one token at a time ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [{"B": 3, "T": 1, "HV": 4}, {"B": 2, "T": 9, "K": 128, "V": 128, "HV": 4},
                                   {"T": 70, "K": 48, "V": 80}, {"T": 5, "K": 256, "V": 256}])
@pytest.mark.parametrize("v_first", [False, True])
def test_recurrent(shape: dict[str, int], dtype: torch.dtype, v_first: bool) -> None:
    x = make(**shape, dtype=dtype, device="cuda")
    S0 = torch.randn(x["q"].shape[0], x["v"].shape[2], x["q"].shape[-1], x["v"].shape[-1], device="cuda")
    with torch.no_grad():
        o, S = fused_recurrent_gated_delta_rule(**x, initial_state=S0.mT.contiguous() if v_first else S0,
                                                output_final_state=True, state_v_first=v_first)
    want_o, want_S = expected(x, S0)
    assert S is not None
    assert error(o, want_o) <= BOUNDS[dtype] and error(S.mT if v_first else S, want_S) <= BOUNDS[dtype]


def test_recurrent_packed() -> None:
    x, cu = inputs(T=40), torch.tensor([0, 1, 1, 30], device="cuda")
    with torch.no_grad():
        o, S = fused_recurrent_gated_delta_rule(**x, output_final_state=True, cu_seqlens=cu)
    want_o, want_S = expected(x, None, cu)
    assert S is not None and not o[:, 30:].any()
    assert error(o, want_o) <= 4.5e-3 and error(S, want_S) <= 4.5e-3


# ---- no waiting -------------------------------------------------------------------------------------------------------------


def decode(block: GatedDeltaNet) -> None:
    with torch.no_grad():
        x = torch.randn(2, 9, 64, device="cuda", dtype=torch.bfloat16)
        _, state = block(x[:, :8], use_cache=True)
        block(x[:, 8:], state, use_cache=True)


def path(name: str) -> Callable[[], object]:
    """A call whose inputs are on the GPU already."""
    x, block, zeros = inputs(), layer(), torch.zeros(4, device="cuda")
    hidden, cu = torch.randn(1, 200, 64, device="cuda", dtype=torch.bfloat16), torch.tensor([0, 30, 30, 150], device="cuda")
    paths: dict[str, Callable[[], object]] = {
        "training": lambda: training(x), "packed training": lambda: training(x, cu),
        "raw gates": lambda: chunk_gated_delta_rule(**x, use_gate_in_kernel=True, A_log=zeros, dt_bias=zeros),
        "layer": lambda: block(hidden)[0].sum().backward(),
        "packed layer": lambda: block(hidden, cu_seqlens=cu, use_cache=True)[0].sum().backward(),
        "decoding": lambda: decode(block)}
    return paths[name]


@pytest.mark.parametrize("name", ["training", "packed training", "raw gates", "layer", "packed layer", "decoding"])
def test_never_waits_for_the_gpu(name: str) -> None:
    call = path(name)
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- CUDA graphs ------------------------------------------------------------------------------------------------------------


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    call()                                                 # compiles, which a capture may not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    return graph, found


@pytest.mark.parametrize("keep", ["nothing", "states"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_graph_replays_other_contents(packed: bool, keep: str) -> None:
    """Other tensors, and other boundaries of as many sequences: forward and every gradient."""
    x = inputs()
    cu = torch.tensor([0, 30, 30, 150], device="cuda", dtype=torch.int32) if packed else None
    with gdn_ir.keep(keep):
        replay_other_contents(x, cu)


def replay_other_contents(x: dict[str, torch.Tensor], cu: torch.Tensor | None) -> None:
    graph, got = captured(lambda: training(x, cu))
    for seed, ends in ((1, [0, 199, 199, 200]), (2, [0, 0, 64, 128])):
        for n, t in inputs(seed).items():
            x[n].copy_(t)
        if cu is not None:
            cu.copy_(torch.tensor(ends))
        for t in got:
            t.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(got, training(x, cu), strict=True):
            assert torch.equal(a, b)


def test_a_checkpointed_forward_keeps_again() -> None:
    """In a thread of autograd's, in which a backward on a GPU runs."""
    x = inputs()
    leaves = [t.requires_grad_() for t in x.values()]
    with gdn_ir.keep("states"):
        o = checkpoint(lambda *a: chunk_gated_delta_rule(*a)[0], *leaves, use_reentrant=False)
        got = torch.autograd.grad(o, leaves, torch.ones_like(o))
    for a, b in zip(got, training(x)[1:], strict=True):
        assert error(a, b) <= bound("bf16", True)


def test_a_graph_of_decoding() -> None:
    """The state is fed back in place, step after step."""
    steps = [inputs(seed, B=3, T=1) for seed in range(4)]
    x, S = inputs(0, B=3, T=1), torch.zeros(3, 4, 64, 64, device="cuda")

    def step() -> torch.Tensor:
        with torch.no_grad():
            o, after = fused_recurrent_gated_delta_rule(**x, initial_state=S, output_final_state=True)
            assert after is not None
            S.copy_(after)
        return o
    graph, o = captured(step)
    S.zero_()
    want = expected({n: torch.cat([s[n] for s in steps], 1) for n in x})[0]
    for t, s in enumerate(steps):
        for n in x:
            x[n].copy_(s[n])
        graph.replay()
        assert error(o, want[:, t:t + 1]) <= 4.5e-3


# ---- streams, torch.compile -------------------------------------------------------------------------------------------------


def test_streams() -> None:
    """On a stream of its own a call waits for that stream's work, and for no other's."""
    x, late = inputs(), inputs(1)
    want = training(late)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)                     # a launch elsewhere would read what was there before
        for n in x:
            x[n].copy_(late[n])
        got = training(x)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_layer(mode: str) -> None:
    """By Inductor, in one graph for every length; with CUDA graphs too."""
    block = layer()
    compiled = torch.compile(block, fullgraph=True, dynamic=mode == "default", mode=mode)
    for T in (64, 100) if mode == "default" else (64, 64, 64):
        x = torch.randn(2, T, 64, device="cuda", dtype=torch.bfloat16)
        grads = []
        for f in (compiled, block):
            y = f(x)[0].clone()
            grads.append((y.detach(), *torch.autograd.grad(y.float().square().sum(), list(block.parameters()))))
        for a, b in zip(*grads, strict=True):
            assert error(a, b) <= 2e-2
