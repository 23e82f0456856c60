"""Calls past torch's dispatcher: only where nothing of torch's would have a part in them."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import gdn_ir
from gdn_ir.ops import chunk_gated_delta_rule, forward, gradients
from tests.inputs import make

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def by_torch() -> Iterator[None]:
    with gdn_ir.use("torch"):
        yield


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """"forward" and "backward" for every call that went to the dispatcher."""
    found: list[str] = []

    def counted(name: str, op: Any) -> Callable[..., Any]:
        def seen(*args: Any) -> Any:
            found.append(name)
            return op(*args)
        return seen
    monkeypatch.setattr(forward, "FORWARD", counted("forward", forward.FORWARD))
    monkeypatch.setattr(gradients, "BACKWARD", counted("backward", gradients.BACKWARD))
    return found


def call(x: dict[str, Tensor]) -> Tensor:
    return chunk_gated_delta_rule(**x)[0]


class Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return op(*args, **(kwargs or {}))


class Overriding(TorchFunctionMode):
    def __torch_function__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return op(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


def test_plain_calls_are_direct(dispatched: list[str]) -> None:
    """Of tensors and parameters, with gradients and without."""
    x = make(T=9)
    want = torch.ops.gdn_ir.chunk_forward(*x.values(), 32 ** -0.5, None, None, None, *[False] * 6)[0]
    found = [call(x), call(x | {"v": torch.nn.Parameter(x["v"])})]
    with torch.no_grad():
        found.append(call(x))
    with torch.inference_mode():
        found.append(call(x))
        assert found[-1].is_inference()
    leaves = {n: t.requires_grad_() for n, t in x.items()}
    found.append(call(leaves))
    torch.autograd.grad(found[-1].sum(), list(leaves.values()))
    assert not dispatched and all(torch.equal(o, want) for o in found)


@pytest.mark.parametrize("within", [
    Dispatching, Overriding, lambda: torch.autocast("cpu", dtype=torch.bfloat16), forward_ad.dual_level,
    lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]), torch._C._AutoDispatchBelowAutograd],
    ids=["dispatch mode", "function mode", "autocast", "forward-mode level", "profiler", "below autograd"])
def test_what_torch_has_a_part_in_is_dispatched(within: Callable[[], Any], dispatched: list[str]) -> None:
    x = make(T=9)
    want = call(x)
    with within():
        assert torch.allclose(call(x).float(), want, atol=2e-2)
    assert dispatched == ["forward"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("transform", [
    lambda x: torch.func.vmap(lambda v: call(x | {"v": v}))(x["v"][None])[0],
    lambda x: torch.func.functionalize(lambda v: call(x | {"v": v}))(x["v"]),
    lambda x: torch.jit.trace(lambda v: call(x | {"v": v}), x["v"], check_trace=False)(x["v"]),
    lambda x: make_fx(lambda v: call(x | {"v": v}))(x["v"])(x["v"]),
    lambda x: call(x | {"v": x["v"].as_subclass(Subclass)}).as_subclass(Tensor),
    lambda x: call(x | {"v": torch._neg_view(-x["v"])})],
    ids=["vmap", "functionalize", "jit.trace", "make_fx", "subclass", "negative view"])
def test_transformed_tensors_are_dispatched(transform: Callable[[dict[str, Tensor]], Tensor], dispatched: list[str]) -> None:
    x = make(T=9)
    want = call(x)
    assert torch.allclose(transform(x), want, atol=1e-6)
    assert dispatched == ["forward"]


def test_zeros_without_memory_are_dispatched(dispatched: list[str]) -> None:
    """Of a backward's gradient, too: a kernel would be given a null address."""
    x = {n: t.requires_grad_() for n, t in make(T=9).items()}
    o = call(x)
    (d_q,) = torch.autograd.grad(o, x["q"], torch._efficientzerotensor(o.shape, dtype=o.dtype))
    with torch.no_grad():
        zero = call(x | {"v": torch._efficientzerotensor(x["v"].shape, dtype=o.dtype)})
    assert dispatched == ["backward", "forward"] and not d_q.any() and not zero.any()


def test_the_profiler_sees_the_op() -> None:
    x = {n: t.requires_grad_() for n, t in make(T=9).items()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        torch.autograd.grad(call(x).sum(), x["v"])
    assert {"gdn_ir::chunk_forward", "gdn_ir::chunk_backward"} <= {e.key for e in seen.key_averages()}


def test_hooks_may_change_how_saved_tensors_lie(dispatched: list[str]) -> None:
    """What was true of the inputs in the forward need not hold in the backward."""
    x = {n: t.requires_grad_() for n, t in make(T=9, HV=4).items()}
    want = torch.autograd.grad(call(x).sum(), list(x.values()))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.transpose(1, 2).contiguous(), lambda t: t.transpose(1, 2)):
        o = call(x)
    got = torch.autograd.grad(o.sum(), list(x.values()))
    assert not dispatched and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_flag_is_a_bool_on_every_call() -> None:
    """Also where True, which equals 1, was there before."""
    x = make(T=9)
    chunk_gated_delta_rule(**x, output_final_state=True)
    with pytest.raises(TypeError, match="output_final_state: got 1; accepts True or False"):
        chunk_gated_delta_rule(**x, output_final_state=1)  # type: ignore[arg-type]
