"""The op on a GPU, against float64, with outputs poisoned before they are written."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import gdn_ir
from gdn_ir.backends.base import TORCH
from gdn_ir.bench.errors import bound
from gdn_ir.compiler import Unsupported
from gdn_ir.ops import chunk_gated_delta_rule, forward
from gdn_ir.reference import recurrence
from tests.inputs import HARD, error, expected, make

pytestmark = pytest.mark.gpu
BOUNDS = {TORCH[io]: bound(io) for io in ("bf16", "f16", "f32")}
GRADIENT_BOUNDS = {TORCH[io]: bound(io, gradients=True) for io in ("bf16", "f16", "f32")}


@pytest.fixture(autouse=True, params=["triton", "tilelang"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every test runs on both."""
    monkeypatch.setenv("GDN_IR_UNVERIFIED", "1")
    with gdn_ir.use(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = forward.empty

    def nan(*args: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        o, S = empty(*args)
        return o.fill_(float("nan")), None if S is None else S.fill_(float("nan"))
    monkeypatch.setattr(forward, "empty", nan)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [{}, {"B": 2, "T": 130, "K": 64, "V": 128}, {"H": 1, "HV": 3, "K": 128, "V": 128},
                                   {"K": 48, "V": 80}, {"T": 1}, {"K": 256, "V": 16}])
def test_dense(shape: dict[str, int], dtype: torch.dtype, backend: str) -> None:
    x = make(**shape, dtype=dtype, device="cuda")
    if backend == "tilelang" and dtype == torch.float32 and shape.get("K", 0) > 64:
        with pytest.raises(Unsupported, match="float32 tiles over 64"), torch.no_grad():
            chunk_gated_delta_rule(**x)
        return
    with torch.no_grad():
        o, S = chunk_gated_delta_rule(**x, output_final_state=True)
    want_o, want_S = expected(x)
    assert error(o, want_o) <= BOUNDS[dtype] and S is not None and error(S, want_S) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("v_first", [False, True])
def test_packed(dtype: torch.dtype, v_first: bool) -> None:
    lengths = [0, 64, 1, 0, 150, 63]
    x = make(1, sum(lengths) + 70, 2, 4, 64, 96, dtype, "cuda")
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device="cuda")
    S0 = torch.randn(6, 4, 64, 96, device="cuda")
    strided = {n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in x.items()}
    with torch.no_grad():
        o, S = chunk_gated_delta_rule(**strided, initial_state=S0.mT.contiguous() if v_first else S0, output_final_state=True,
                                      cu_seqlens=cu, state_v_first=v_first)
    want_o, want_S = expected(x, S0, cu)
    assert S is not None and not o[:, sum(lengths):].any()
    assert error(o, want_o) <= BOUNDS[dtype] and error(S.mT if v_first else S, want_S) <= BOUNDS[dtype]


@pytest.mark.parametrize("initial", [False, True])
def test_as_many_heads_as_multiprocessors(initial: bool, backend: str) -> None:
    """Where TileLang has roles and Triton a follower: ragged tails, an empty sequence, rows of nobody, again to the bit."""
    lengths = [300, 0, 64, 129, 1, 63]
    x = make(1, sum(lengths) + 70, 16, 32, 128, 128, torch.bfloat16, "cuda")
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    state = 0.1 * torch.randn(len(lengths), 32, 128, 128, device="cuda") if initial else None

    def call() -> tuple[torch.Tensor, torch.Tensor | None]:
        with torch.no_grad():
            return chunk_gated_delta_rule(**x, initial_state=state, output_final_state=True, cu_seqlens=ends)
    o, S = call()
    want_o, want_S = recurrence(*(x[n].cpu() for n in ("q", "k", "v", "g", "beta")), None,
                                None if state is None else state.cpu(), ends.cpu())
    bounds = BOUNDS[torch.bfloat16]
    assert S is not None and error(S, want_S.cuda()) <= bounds
    assert error(o[:, :sum(lengths)], want_o[:, :sum(lengths)].cuda()) <= bounds
    assert not o[:, sum(lengths):].any()
    for _ in range(20):
        again, state_again = call()
        assert torch.equal(again, o) and state_again is not None and torch.equal(state_again, S)


def test_no_tokens() -> None:
    S0 = torch.randn(2, 2, 32, 32, device="cuda")
    o, S = chunk_gated_delta_rule(**make(B=2, T=0, device="cuda"), initial_state=S0, output_final_state=True)
    assert o.shape[1] == 0 and S is not None and torch.equal(S, S0)


def test_never_waits_for_the_gpu() -> None:
    x = make(K=64, V=64, dtype=torch.bfloat16, device="cuda")
    cu = torch.tensor([0, 30, 100], device="cuda")
    with torch.no_grad():
        want = chunk_gated_delta_rule(**x, cu_seqlens=cu)[0]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = chunk_gated_delta_rule(**x, cu_seqlens=cu)[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, want)


def test_cuda_graph() -> None:
    x = make(K=64, V=64, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        want = chunk_gated_delta_rule(**x)[0]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = chunk_gated_delta_rule(**x)[0]
        got.fill_(float("nan"))
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [{}, {"B": 2, "T": 130, "K": 64, "V": 128}, {"H": 1, "HV": 3, "K": 128, "V": 128},
                                   {"K": 48, "V": 80}, {"K": 256, "V": 256}, {"HV": 4, "K": 160, "V": 192}])
def test_gradients(shape: dict[str, int], dtype: torch.dtype) -> None:
    """Through o and the final state, by Triton, against float64 autograd of the recurrence. Of four batch rows: the relative
    error of g's gradient, a sum in which most cancels, is anything from 0.002 to 0.008 where there is one."""
    x = make(**shape | {"B": 4}, dtype=dtype, device="cuda")
    torch.manual_seed(0)
    leaves = {n: t.clone().requires_grad_() for n, t in x.items()}
    with gdn_ir.use("triton"):
        o, S = chunk_gated_delta_rule(**leaves, output_final_state=True)
    assert S is not None
    d_o, d_S = torch.randn_like(o), torch.randn_like(S)
    got = torch.autograd.grad([o, S], list(leaves.values()), [d_o, d_S])
    exact = {n: t.detach().cpu().double().requires_grad_() for n, t in x.items()}
    want_o, want_S = recurrence(**exact)
    loss = (want_o * d_o.cpu().double()).sum() + (want_S * d_S.cpu().double()).sum()
    for n, a, b in zip(x, got, torch.autograd.grad(loss, list(exact.values())), strict=True):
        assert a.dtype == x[n].dtype and error(a.cpu(), b) <= GRADIENT_BOUNDS[dtype], n


@pytest.mark.parametrize("keep", ["inverse", "states"])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [{"T": 130, "HV": 4, "K": 64, "V": 128}, {"HV": 4, "K": 128, "V": 128}, {"K": 256, "V": 256}])
def test_gradients_of_what_was_kept(shape: dict[str, int], dtype: torch.dtype, keep: str) -> None:
    """Given what the forward left, a backward computes what it would compute without."""
    x = make(**shape | {"B": 4}, dtype=dtype, device="cuda")
    d_o, d_S = torch.randn_like(x["v"]), torch.randn(4, x["v"].shape[2], x["q"].shape[3], x["v"].shape[3], device="cuda")
    found = []
    for what in ("nothing", keep):
        leaves = {n: t.clone().requires_grad_() for n, t in x.items()}
        with gdn_ir.use("triton"), gdn_ir.keep(what):
            o, S = chunk_gated_delta_rule(**leaves, output_final_state=True)
            assert S is not None and o.grad_fn is not None
            assert (len(o.grad_fn.saved_tensors) > 7) == (what != "nothing")   # type: ignore[attr-defined]
            found.append((o, S, *torch.autograd.grad([o, S], list(leaves.values()), [d_o, d_S])))
    for n, want, got in zip(("o", "S", *x), *found, strict=True):
        assert error(got, want) <= GRADIENT_BOUNDS[dtype], n


@pytest.mark.parametrize("keep", ["nothing", "inverse", "states"])
def test_gradients_agree_to_the_bit(keep: str) -> None:
    x = make(T=500, H=2, HV=4, K=128, V=128, dtype=torch.bfloat16, device="cuda")
    leaves = [t.requires_grad_() for t in x.values()]
    with gdn_ir.use("triton"), gdn_ir.keep(keep):
        o = chunk_gated_delta_rule(**x)[0]
    first = torch.autograd.grad(o, leaves, torch.ones_like(o), retain_graph=True)
    for _ in range(100):
        again = torch.autograd.grad(o, leaves, torch.ones_like(o), retain_graph=True)
        assert all(torch.equal(s, t) for s, t in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("kind", HARD)
def test_gradients_of_hard_inputs(kind: str, dtype: torch.dtype) -> None:
    """Packed, with sequences of no token and of one; rows that no sequence owns get zeros."""
    lengths = [0, 1, 100, 0, 64, 1]
    x = make(1, sum(lengths) + 9, 1, 2, 64, 64, dtype, "cuda")
    for name, value in HARD[kind].items():
        x[name].fill_(value)
    torch.manual_seed(0)
    leaves = {n: t.requires_grad_() for n, t in (x | {"initial_state": torch.randn(6, 2, 64, 64, device="cuda")}).items()}
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device="cuda")
    with gdn_ir.use("triton"):
        o, S = chunk_gated_delta_rule(**leaves, output_final_state=True, cu_seqlens=cu)
        assert S is not None
        weights = torch.randn_like(o), torch.randn_like(S)
        got = torch.autograd.grad([o, S], list(leaves.values()), list(weights))
    exact = {n: t.detach().cpu().double().requires_grad_() for n, t in leaves.items()}
    wide = [w.cpu().double() for w in weights]
    want = torch.autograd.grad(recurrence(**exact, cu_seqlens=cu.cpu()), list(exact.values()), wide)
    limit = GRADIENT_BOUNDS[dtype]
    for name, a, b in zip(leaves, got, want, strict=True):
        assert (a.cpu() - b).norm() <= limit * b.norm().clamp(min=1e-3), name
        assert name == "initial_state" or not a[:, sum(lengths):].any(), name


def test_two_calls_agree_to_the_bit() -> None:
    x = make(T=500, K=128, V=128, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        a, b = (chunk_gated_delta_rule(**x, output_final_state=True) for _ in range(2))
    assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def test_tensors_that_start_anywhere() -> None:
    """Views whose first element is aligned to its own size only, before and after aligned ones."""
    x = make(T=150, K=64, V=64, dtype=torch.bfloat16, device="cuda")

    def shifted(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)
    moved = {n: shifted(t) for n, t in x.items()}
    assert moved["q"].data_ptr() % 16 == 2
    with torch.no_grad():
        results = [chunk_gated_delta_rule(**y)[0] for y in (x, moved, x)]
    want = expected(x)[0]
    assert all(error(o, want) <= BOUNDS[torch.bfloat16] for o in results)
