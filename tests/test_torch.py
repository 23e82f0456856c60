"""The ops at home in torch: opcheck, torch.compile, export, autocast, vmap, checkpointing; what cannot be served is refused."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import library
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import gdn_ir
from gdn_ir.ops import chunk_gated_delta_rule
from tests.inputs import error, make

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def by_torch() -> Iterator[None]:
    torch._dynamo.reset()
    with gdn_ir.use("torch"):
        yield


def leaves(**shape: Any) -> dict[str, Tensor]:
    return {n: t.requires_grad_() for n, t in make(**shape).items()}


def counted(f: Callable[..., Any], **how: Any) -> tuple[Callable[..., Any], Any]:
    """f, compiled, and the counter of its graphs."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    return torch.compile(f, fullgraph=True, backend=counter, **how), counter


def test_opcheck_with_gradients() -> None:
    """Schema, fake kernels, autograd, and both under ahead-of-time tracing with dynamic shapes."""
    x, S0, cu = leaves(T=20, HV=4), torch.randn(2, 4, 32, 32, requires_grad=True), torch.tensor([0, 7, 18])
    library.opcheck(torch.ops.gdn_ir.chunk_forward, (*x.values(), 0.1, S0, cu, None, True, True, True, False, False, True))


@pytest.mark.parametrize("packed", [False, True])
def test_one_graph_serves_every_length(packed: bool) -> None:
    """In training: o, the state and every gradient, from one graph."""
    def step(cu: Tensor | None, **x: Tensor) -> tuple[Tensor, Tensor | None]:
        return chunk_gated_delta_rule(**x, output_final_state=True, cu_seqlens=cu)    # type: ignore[arg-type]
    compiled, counter = counted(step, dynamic=True)
    for T in (70, 64, 129):
        x = leaves(T=T, HV=4)
        cu = torch.tensor([0, T // 3, *([T // 2] if T % 2 else []), T]) if packed else None
        results = [f(cu, **x) for f in (compiled, step)]
        grads = [torch.autograd.grad(o.square().sum() + S.sum(), list(x.values())) for o, S in results]
        for a, b in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    assert counter.frame_count == 1


def test_a_second_length_makes_the_last_graph() -> None:
    """Without dynamic=True torch compiles the first length as it is, the second for all lengths."""
    compiled, counter = counted(lambda **x: chunk_gated_delta_rule(**x)[0])
    for T in (100, 70, 64, 33, 2):
        compiled(**make(T=T))
    assert counter.frame_count == 2


def test_a_compiled_graph_asks_the_registry_when_it_runs() -> None:
    compiled, counter = counted(lambda **x: chunk_gated_delta_rule(**x)[0])
    compiled(**make())
    with gdn_ir.use("triton"), pytest.raises(ValueError, match="triton lowers to sm_80 and sm_90, not to cpu"):
        compiled(**make())
    assert counter.frame_count == 1


def test_a_compiled_backward_asks_the_registry_when_it_runs() -> None:
    compiled, counter = counted(lambda **x: chunk_gated_delta_rule(**x)[0])
    x = leaves()
    torch.autograd.grad(compiled(**x).sum(), x["v"])
    o = compiled(**x).sum()
    with gdn_ir.use("triton"), pytest.raises(ValueError, match="triton lowers to sm_80 and sm_90, not to cpu"):
        torch.autograd.grad(o, x["v"])
    assert counter.frame_count == 1


class Packed(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu: Tensor) -> tuple[Tensor, Tensor | None]:
        return chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True, cu_seqlens=cu)


def test_export() -> None:
    """One node, for any number of tokens and sequences."""
    T, N = torch.export.Dim("T", min=2, max=1 << 20), torch.export.Dim("N", min=3, max=1 << 10)
    example = (*make().values(), torch.tensor([0, 30, 100]))
    program = torch.export.export(Packed(), example, dynamic_shapes=[{1: T}] * 5 + [{0: N}])
    assert [n.target for n in program.graph.nodes if "gdn_ir" in str(n.target)] == [torch.ops.gdn_ir.chunk_forward.default]
    x = (*make(T=33).values(), torch.tensor([0, 3, 7, 9, 33]))
    for a, b in zip(program.module()(*x), Packed()(*x), strict=True):
        assert torch.equal(a, b)


# ---- autocast ---------------------------------------------------------------------------------------------------------------


def test_autocast_casts_what_a_product_would() -> None:
    """q, k, v to autocast's dtype, whatever mix they come in; g, beta and states stay; gradients are as inputs were."""
    x, S0 = leaves(), torch.randn(1, 2, 32, 32)
    mixed = x | {"v": x["v"].detach().half().requires_grad_()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, S = chunk_gated_delta_rule(**mixed, initial_state=S0, output_final_state=True)
        with torch.autocast("cpu", enabled=False):
            assert chunk_gated_delta_rule(**x)[0].dtype == torch.float32
    # nothing but q, k and v is rounded: inside, products of float32 stay what they are
    low = {n: t.detach().bfloat16() if n in "qkv" else t.detach() for n, t in mixed.items()}
    want_o, want_S = chunk_gated_delta_rule(**low, initial_state=S0, output_final_state=True)
    assert o.dtype == torch.bfloat16 and torch.equal(o, want_o)
    assert S is not None and want_S is not None and S.dtype == torch.float32 and torch.equal(S, want_S)
    grads = torch.autograd.grad(o.float().sum(), list(mixed.values()))
    assert [d.dtype for d in grads] == [t.dtype for t in mixed.values()]


def test_autocast_leaves_float64_alone() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert chunk_gated_delta_rule(**make(dtype=torch.float64))[0].dtype == torch.float64


def test_autocast_in_a_graph() -> None:
    def step(**x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return chunk_gated_delta_rule(**x)[0]
    compiled, _ = counted(step)
    assert torch.equal(compiled(**make()), step(**make()))


# ---- torch.func -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [
    lambda f, v: torch.func.grad(lambda v: f(v).sum())(v),
    lambda f, v: torch.func.jacrev(f)(v),
    lambda f, v: torch.func.jvp(f, (v,), (v,)),
    lambda f, v: torch.func.grad(lambda v: torch.func.vmap(f)(v[None]).sum())(v)])
def test_transforms_that_are_refused(transform: Callable[..., object]) -> None:
    x = make(T=3)
    with pytest.raises(NotImplementedError, match=r"chunk_gated_delta_rule: torch.func's grad, vjp, jvp .* not supported"):
        transform(lambda v: chunk_gated_delta_rule(**(x | {"v": v}))[0], x["v"])


def test_forward_mode_is_refused() -> None:
    """A tangent would be dropped on the way, and the derivative come out as zero."""
    x = make(T=3)
    with forward_ad.dual_level():
        chunk_gated_delta_rule(**x)
        with pytest.raises(NotImplementedError, match="forward-mode differentiation is not supported"):
            chunk_gated_delta_rule(**(x | {"k": forward_ad.make_dual(x["k"], x["k"])}))


@pytest.mark.parametrize("final", [False, True])
def test_vmap(final: bool) -> None:
    """Over some inputs, along any dimension, of batches."""
    x, many, S0 = make(B=2, T=70, HV=4), torch.randn(2, 70, 3, 4, 32), torch.randn(3, 2, 4, 32, 32)

    def f(v: Tensor, S: Tensor) -> tuple[Tensor, ...]:
        o, S_end = chunk_gated_delta_rule(**(x | {"v": v}), initial_state=S, output_final_state=final)
        return (o,) if S_end is None else (o, S_end)
    got = torch.func.vmap(f, in_dims=(2, 0))(many, S0)
    want = [f(many[:, :, i], S0[i]) for i in range(3)]
    for i in range(3):
        assert len(got) == 1 + final
        for a, b in zip(got, want[i], strict=True):
            assert error(a[i], b) < 1e-6


def test_vmap_of_the_backward() -> None:
    """Many gradients of o at once, for jacobians."""
    x = leaves(T=9, HV=4)
    o = chunk_gated_delta_rule(**x)[0]
    d_o = torch.randn(3, *o.shape)
    got = torch.func.vmap(lambda d: torch.autograd.grad(o, list(x.values()), d, retain_graph=True))(d_o)
    for i in range(3):
        for a, b in zip(got, torch.autograd.grad(o, list(x.values()), d_o[i], retain_graph=True), strict=True):
            assert error(a[i], b) < 1e-6


def test_vmap_of_packed_sequences_is_refused() -> None:
    x, cu = make(), torch.tensor([0, 40, 100])
    with pytest.raises(NotImplementedError, match="cu_seqlens: vmap over packed sequences is not supported"):
        torch.func.vmap(lambda v: chunk_gated_delta_rule(**(x | {"v": v}), cu_seqlens=cu)[0])(x["v"][None])


# ---- activation checkpointing -----------------------------------------------------------------------------------------------


def gradients(x: dict[str, Tensor], how: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    def block(*inputs: Tensor) -> Tensor:
        return chunk_gated_delta_rule(*inputs)[0].sigmoid()
    return torch.autograd.grad(how(block, *x.values()).sum(), list(x.values()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, launches: list[str]) -> None:
    x = leaves()
    plain = gradients(x, lambda f, *a: f(*a))
    assert launches == ["forward", "backward"]

    def backward_of(f: Callable[..., Tensor], *a: Tensor) -> tuple[Tensor, ...]:
        checkpoint(f, *a, use_reentrant=reentrant).sum().backward()
        return tuple(t.grad for t in a if t.grad is not None)
    got = backward_of(lambda *a: chunk_gated_delta_rule(*a)[0].sigmoid(), *x.values())
    assert launches[2:] == ["forward", "forward", "backward"]            # the second forward is the recomputation
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


def test_a_policy_can_save_the_op(launches: list[str]) -> None:
    """Selective checkpointing knows the op by name: what it gave is kept, only the rest runs again."""
    x = leaves()

    def policy(_: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        kept = op is torch.ops.gdn_ir.chunk_forward.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
    got = gradients(x, lambda f, *a: checkpoint(f, *a, use_reentrant=False,
                                                context_fn=lambda: create_selective_checkpoint_contexts(policy)))
    assert launches == ["forward", "backward"]
    assert all(torch.equal(a, b) for a, b in zip(got, gradients(x, lambda f, *a: f(*a)), strict=True))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """"forward" or "backward" for every variant that ran."""
    from gdn_ir.compiler import Variant
    found: list[str] = []
    run = Variant.run

    def seen(self: Variant, *args: Any) -> None:
        found.append("backward" if self.instance.grads else "forward")
        run(self, *args)
    monkeypatch.setattr(Variant, "run", seen)
    return found
