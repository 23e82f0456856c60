"""The op against the token recurrence in float64, on CPU."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

import gdn_ir
from gdn_ir import registry
from gdn_ir.compiler import Instance
from gdn_ir.ops import chunk_gated_delta_rule
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.reference import recurrence
from tests.inputs import HARD, error, expected, make

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4.5e-3, torch.bfloat16: 4.5e-3}


@pytest.fixture(autouse=True)
def by_torch() -> Iterator[None]:
    """Nothing to compile: these tests are of the op, those of backends are in test_coverage.py."""
    with gdn_ir.use("torch"):
        yield


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [{}, {"B": 2, "T": 130}, {"H": 1, "HV": 3}, {"K": 48, "V": 80}, {"T": 1},
                                   {"K": 16, "V": 256}])
def test_dense(shape: dict[str, int], dtype: torch.dtype) -> None:
    x = make(**shape, dtype=dtype)
    o, S = chunk_gated_delta_rule(**x, output_final_state=True)
    want_o, want_S = expected(x)
    assert o.dtype == dtype and o.shape == x["v"].shape and S is not None
    assert S.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error(o, want_o) < BOUNDS[dtype]
    assert error(S, want_S) < BOUNDS[dtype]


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(0, 150), min_size=1, max_size=5), tail=st.integers(0, 70), group=st.integers(1, 3),
       K=st.sampled_from([16, 48, 64]), V=st.sampled_from([16, 32, 96]), wide=st.booleans(), initial=st.booleans(),
       v_first=st.booleans(), no_decay=st.booleans())
def test_packed(lengths: list[int], tail: int, group: int, K: int, V: int, wide: bool, initial: bool, v_first: bool,
                no_decay: bool) -> None:
    """Packed sequences of any length, zero included; rows past the last one are zeros and touch no state."""
    T = sum(lengths) + tail
    x = make(1, T, 1, group, K, V)
    if no_decay:
        x["g"] = None                                      # type: ignore[assignment]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int64 if wide else torch.int32)
    S0 = torch.randn(len(lengths), group, K, V) if initial else None
    given_state = S0.mT.contiguous() if S0 is not None and v_first else S0
    o, S = chunk_gated_delta_rule(**x, initial_state=given_state, output_final_state=True, cu_seqlens=cu, state_v_first=v_first)
    assert S is not None and S.shape == ((len(lengths), group, V, K) if v_first else (len(lengths), group, K, V))
    assert not o[:, sum(lengths):].any()
    want_o, want_S = expected(x, S0, cu)
    assert error(o, want_o) < 1e-5
    assert error(S.mT if v_first else S, want_S) < 1e-5


@pytest.mark.parametrize(("flags", "switches"), [
    ({"use_qk_l2norm_in_kernel": True}, {"l2norm": True}),
    ({"use_beta_sigmoid_in_kernel": True}, {"beta_sigmoid": True}),
    ({"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True}, {"beta_sigmoid": True, "neg_eigval": True})])
@pytest.mark.parametrize("T", [64, 70])
def test_flags(flags: dict[str, bool], switches: dict[str, bool], T: int) -> None:
    x = make(T=T)
    x["q"], x["k"], x["beta"] = 3 * x["q"], 0.5 * x["k"], torch.randn_like(x["beta"])
    o, S = chunk_gated_delta_rule(**x, output_final_state=True, **flags)
    assert S is not None
    want_o, want_S = expected(x, **switches)
    assert error(o, want_o) < 1e-5 and error(S, want_S) < 1e-5


def test_scale() -> None:
    x = make()
    assert error(chunk_gated_delta_rule(**x, scale=1.0)[0], 32 ** 0.5 * expected(x)[0]) < 1e-5


def test_no_final_state_unless_asked() -> None:
    assert chunk_gated_delta_rule(**make())[1] is None


def test_lower_precision_gate_is_upcast() -> None:
    x = make()
    x["g"] = x["g"].bfloat16()
    assert error(chunk_gated_delta_rule(**x)[0], expected(x)[0]) < 1e-5


def test_beta_of_another_dtype() -> None:
    x = make(dtype=torch.float32)
    x["beta"] = x["beta"].bfloat16()
    assert error(chunk_gated_delta_rule(**x)[0], expected(x)[0]) < 1e-5


def test_not_contiguous() -> None:
    x = make(B=2, T=70, H=2, HV=4)
    strided = {n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in x.items()}
    assert not strided["q"].is_contiguous()
    assert torch.equal(chunk_gated_delta_rule(**strided)[0], chunk_gated_delta_rule(**x)[0])


@pytest.mark.parametrize("initial", [False, True])
def test_no_tokens(initial: bool) -> None:
    x = make(B=3, T=0)
    S0 = torch.randn(3, 2, 32, 32) if initial else None
    o, S = chunk_gated_delta_rule(**x, initial_state=S0, output_final_state=True)
    assert o.shape == (3, 0, 2, 32) and S is not None
    assert torch.equal(S, torch.zeros(3, 2, 32, 32) if S0 is None else S0)


def test_no_sequences() -> None:
    o, S = chunk_gated_delta_rule(**make(T=5), cu_seqlens=torch.tensor([0]), output_final_state=True)
    assert not o.any() and S is not None and S.shape == (0, 2, 32, 32)


def test_inputs_are_not_written() -> None:
    x, S0 = make(), torch.randn(1, 2, 32, 32)
    before = {n: t.clone() for n, t in x.items()} | {"S": S0.clone()}
    chunk_gated_delta_rule(**x, initial_state=S0, output_final_state=True)
    assert all(torch.equal(before[n], t) for n, t in (x | {"S": S0}).items())


@pytest.mark.parametrize("packed", [False, True])
def test_gradients(packed: bool) -> None:
    """float64 gradients against those of the recurrence, strong decay included."""
    x = make(T=70, dtype=torch.float64, HV=4)
    x["g"] = x["g"] * 20
    cu = torch.tensor([0, 0, 30, 66]) if packed else None
    S0 = torch.randn(3 if packed else 1, 4, 32, 32, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (*x.values(), S0)]
    o, S = chunk_gated_delta_rule(**x, initial_state=S0, output_final_state=True, cu_seqlens=cu)
    want_o, want_S = (t for t in _reference(x, S0, cu))
    assert S is not None
    got = torch.autograd.grad((o ** 2).sum() + S.double().sin().sum(), leaves)
    want = torch.autograd.grad((want_o ** 2).sum() + want_S.sin().sum(), leaves)
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 1e-10


def _reference(x: dict[str, torch.Tensor], S0: torch.Tensor, cu: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    from gdn_ir.reference import recurrence
    return recurrence(**x, initial_state=S0, cu_seqlens=cu)


def test_opcheck() -> None:
    x = make()
    op = torch.ops.gdn_ir.chunk_forward
    library.opcheck(op, (*x.values(), 0.1, None, None, None, True, False, False, False, False, False))
    library.opcheck(op, (*x.values(), 0.1, torch.randn(2, 2, 32, 32), torch.tensor([0, 30, 90]), None, True, True, True,
                               True, True, False))


def test_compiles_to_one_graph() -> None:
    x = make()
    compiled = torch.compile(lambda **kw: chunk_gated_delta_rule(**kw, output_final_state=True), fullgraph=True,
                             backend="aot_eager")
    for a, b in zip(compiled(**x), chunk_gated_delta_rule(**x, output_final_state=True), strict=True):
        assert torch.equal(a, b)


def test_compiled_graphs_check_boundaries() -> None:
    x = make()
    compiled = torch.compile(lambda cu: chunk_gated_delta_rule(**x, cu_seqlens=cu)[0], fullgraph=True, backend="aot_eager")
    good = torch.tensor([0, 40, 90])
    assert torch.equal(compiled(good), chunk_gated_delta_rule(**x, cu_seqlens=good)[0])
    with pytest.raises(ValueError, match=r"cu_seqlens: got \[0, 80, 40\], which decreases"):
        compiled(torch.tensor([0, 80, 40]))


def test_training_under_compile() -> None:
    """Forward and backward are one graph each, and gradients those of an eager call."""
    x = make()
    x["v"].requires_grad_()
    compiled = torch.compile(lambda v: (2.0 * chunk_gated_delta_rule(**(x | {"v": v}))[0]).sum(), fullgraph=True,
                             backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(x["v"]), x["v"])
    (want,) = torch.autograd.grad((2.0 * chunk_gated_delta_rule(**x)[0]).sum(), x["v"])
    assert torch.allclose(got, want)


@pytest.mark.parametrize("reset", [-1e3, -1e8, float("-inf")])
def test_resets(reset: float) -> None:
    """A log decay of any size is a reset, and costs its neighbours nothing."""
    x = make()
    x["g"][:, [3, 40, 64]] = reset
    o, S = chunk_gated_delta_rule(**x, output_final_state=True)
    want_o, want_S = expected(x)
    assert S is not None and error(o, want_o) < 1e-5 and error(S, want_S) < 1e-5


def test_gradients_of_no_tokens() -> None:
    x = make(T=0)
    x["v"].requires_grad_()
    chunk_gated_delta_rule(**x)[0].sum().backward()
    assert x["v"].grad is not None and x["v"].grad.shape == x["v"].shape


def test_gradients_of_q_and_k_are_one_piece_of_memory() -> None:
    """Past the dispatcher; what a custom op returns shares none."""
    leaves = {n: t.requires_grad_() for n, t in make(HV=4).items()}
    o = chunk_gated_delta_rule(**leaves)[0]
    d_q, d_k, d_v = torch.autograd.grad(o.sum(), [leaves[n] for n in ("q", "k", "v")])
    assert d_q.is_contiguous() and d_k.is_contiguous() and d_k.data_ptr() == d_q.data_ptr() + d_q.nbytes
    assert d_v.untyped_storage().data_ptr() != d_q.untyped_storage().data_ptr()
    before = d_k._version
    d_q.zero_()                                            # no change of k's, which a graph may hold
    assert not d_q._is_view() and d_k._version == before and d_k.any()
    args = (torch.ones_like(o), None, *(t.detach() for t in leaves.values()), 0.1, None, None, False, False, False, False)
    found = torch.ops.gdn_ir.chunk_backward(*args, "q k v", "torch", [], "nothing")
    assert len({x.untyped_storage().data_ptr() for x in found}) == 3


def test_only_gradients_that_are_asked_for() -> None:
    """Of one input, through the final state alone, from a decay in bfloat16; all are what they are beside the others."""
    x = make(HV=4)
    x["g"] = x["g"].bfloat16()
    every = {n: t.clone().requires_grad_() for n, t in x.items()}
    S = chunk_gated_delta_rule(**every, output_final_state=True)[1]
    assert S is not None
    want = dict(zip(x, torch.autograd.grad(S.sin().sum(), list(every.values()), allow_unused=True), strict=True))
    assert want["g"].dtype == torch.bfloat16 and not want["q"].any()
    for name in ("k", "v", "g", "beta"):
        leaf = x[name].clone().requires_grad_()
        S = chunk_gated_delta_rule(**(x | {name: leaf}), output_final_state=True)[1]
        assert S is not None
        (got,) = torch.autograd.grad(S.sin().sum(), leaf)
        assert error(got, want[name]) < 1e-2 if name == "g" else error(got, want[name]) < 1e-5, name


def test_no_second_derivative() -> None:
    x = make(T=5)
    x["v"].requires_grad_()
    (d_v,) = torch.autograd.grad((chunk_gated_delta_rule(**x)[0] ** 2).sum(), x["v"], create_graph=True)
    with pytest.raises(NotImplementedError, match="the gradient of a gradient is not supported"):
        d_v.sum().backward()


def test_opcheck_of_the_backward() -> None:
    x = make(HV=4)
    args = (torch.randn(1, 100, 4, 32), torch.randn(1, 4, 32, 32), *x.values(), 0.1, None, None, False, False, False, False,
            "q k v g beta", "torch", [], "nothing")
    library.opcheck(torch.ops.gdn_ir.chunk_backward, args)


def test_native_code_through_the_op() -> None:
    """Packed and strided, tails and all."""
    S0 = torch.randn(3, 4, 32, 48)
    for lengths in ([5, 0, 7], [130, 1, 64]):
        x = make(1, sum(lengths) + 9, 2, 4, 32, 48)
        strided = {n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in x.items()}
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
        with gdn_ir.use("tilelang"):
            o, S = chunk_gated_delta_rule(**strided, initial_state=S0, output_final_state=True, cu_seqlens=cu)
            assert S is not None and not o[:, sum(lengths):].any()
            want_o, want_S = expected(x, S0, cu)
            assert error(o, want_o) < 1e-6 and error(S, want_S) < 1e-6
            with pytest.raises(ValueError, match=r"tilelang cannot serve .*no bfloat16 on cpu"):
                chunk_gated_delta_rule(**make(dtype=torch.bfloat16))


@pytest.mark.parametrize("backend", ["tilelang", "torch"])
@pytest.mark.parametrize("kind", HARD)
def test_gradients_of_hard_inputs(kind: str, backend: str) -> None:
    """Packed: sequences of no token, of one, of whole and broken chunks; rows that no sequence owns get zeros."""
    lengths = [0, 1, 40, 0, 16, 1]
    x = make(1, sum(lengths) + 9, 1, 2, 32, 48)
    for name, value in HARD[kind].items():
        x[name].fill_(value)
    leaves = {n: t.requires_grad_() for n, t in (x | {"initial_state": torch.randn(6, 2, 32, 48)}).items()}
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    with gdn_ir.use(backend):
        o, S = chunk_gated_delta_rule(**leaves, output_final_state=True, cu_seqlens=cu)
        assert S is not None
        weights = torch.randn_like(o), torch.randn_like(S)
        got = torch.autograd.grad([o, S], list(leaves.values()), list(weights))
    exact = {n: t.detach().double().requires_grad_() for n, t in leaves.items()}
    want = torch.autograd.grad(recurrence(**exact, cu_seqlens=cu), list(exact.values()), [w.double() for w in weights])
    for name, a, b in zip(leaves, got, want, strict=True):
        assert (a - b).norm() <= 2e-5 * b.norm().clamp(min=1e-3), name          # of g after resets: it is nothing but rounding
        assert name == "initial_state" or not a[:, sum(lengths):].any(), name


def test_native_gradients_are_served_unasked() -> None:
    """Float32 on a CPU: what the registry chooses for a backward is native code."""
    instance = Instance(Switches(), 32, 48, "f32", "f32", True, ("q", "v"))
    assert registry.choose(instance, "cpu", 1, 2, 100).backend == "tilelang"
    assert registry.choose(replace(instance, io="bf16"), "cpu", 1, 2, 100).backend == "torch"


def test_a_cache_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    from gdn_ir import cache
    monkeypatch.setenv("GDN_IR_CACHE", "/proc/nowhere")
    with pytest.warns(RuntimeWarning, match=r"cannot write the cache folder .*GDN_IR_CACHE names another"):
        assert cache.folder().is_dir()


def test_use_forces_a_backend() -> None:
    with gdn_ir.use("triton"), pytest.raises(ValueError, match="triton lowers to sm_80 and sm_90, not to cpu"):
        chunk_gated_delta_rule(**make())
    with pytest.raises(ValueError, match="backend: got 'cuda'; accepts triton, tilelang, torch"), gdn_ir.use("cuda"):
        pass
