"""The backward of the op: one custom op for all gradients that are asked for, and what autograd is told about the two."""
from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import library
from torch._guards import TracingContext         # of this thread, while torch.compile traces

from gdn_ir import policy
from gdn_ir.ops import forward, kinds, transforms
from gdn_ir.ops.forward import FORWARD
from gdn_ir.ops.kinds import Kind

Tensor = torch.Tensor
INPUTS = ("q", "k", "v", "g", "beta", "initial_state")


def _empty(wanted: str, **inputs: Tensor | None) -> list[Tensor]:
    """Gradients, not yet written, in the order of `wanted`: each like its input; of g in the dtype of its arithmetic."""
    found = []
    for name in wanted.split():
        x = inputs[name]
        assert x is not None
        found.append(torch.empty_like(x, dtype=kinds.wide(x) if name == "g" else x.dtype,
                                      memory_format=torch.contiguous_format))
    return found


def _chunk_backward(d_o: Tensor, d_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor,
                    scale: float, initial_state: Tensor | None, cu_seqlens: Tensor | None, l2norm: bool, beta_sigmoid: bool,
                    neg_eigval: bool, state_v_first: bool, wanted: str, asked: str) -> list[Tensor]:
    """Gradients of the inputs named in `wanted` (separated by spaces). d_o as o; d_state as the final state, None where it has
    no gradient. asked: the policy that held in the forward, or WHEN_RUN."""
    if asked == policy.WHEN_RUN:
        asked = policy.asked()
    kind = kinds.of(q, k, v, g, beta, initial_state, cu_seqlens, None, state_v_first)
    found = _empty(wanted, q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state)
    grads = dict(zip(wanted.split(), found, strict=True))
    if kind.nothing:
        for name, x in grads.items():
            x.zero_() if name != "initial_state" or d_state is None else x.copy_(d_state)
        return found
    serve = kind.serving(q, g, beta, initial_state, cu_seqlens, d_state is not None, l2norm, beta_sigmoid, neg_eigval,
                         state_v_first, False, tuple(grads), asked)
    tensors = {"q": q, "k": k, "v": v, "beta": beta, "d_o": d_o, **{f"d_{name}": x for name, x in grads.items()}}
    for name, given in (("g", g), ("initial_state", initial_state), ("d_final_state", d_state)):
        if given is not None:
            tensors[name] = given
    serve(tensors, scale, cu_seqlens)
    return found


def _fake_backward(d_o: Tensor, d_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor,
                   scale: float, initial_state: Tensor | None, cu_seqlens: Tensor | None, l2norm: bool, beta_sigmoid: bool,
                   neg_eigval: bool, state_v_first: bool, wanted: str, asked: str) -> list[Tensor]:
    return _empty(wanted, q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state)


BACKWARD = forward.operator("gdn_ir::chunk_backward", _chunk_backward, _fake_backward, transforms.vmap_backward)


def _remember(ctx: Any, inputs: tuple[Any, ...]) -> None:
    q, k, v, g, beta, scale, initial_state, cu_seqlens, _, final_state, l2norm, beta_sigmoid, neg_eigval, v_first, _ = inputs
    ctx.save_for_backward(q, k, v, g, beta, initial_state, cu_seqlens)
    ctx.scale, ctx.final_state, ctx.flags = scale, final_state, (l2norm, beta_sigmoid, neg_eigval, v_first)
    # what holds for the forward holds for its backward; but a graph that is traced here runs later, under other policies
    ctx.asked = policy.asked() if TracingContext.try_get() is None else policy.WHEN_RUN
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_o: Tensor | None, d_state: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, g, beta, initial_state, cu_seqlens = ctx.saved_tensors
    inputs = dict(zip(INPUTS, (q, k, v, g, beta, initial_state), strict=True))
    asked = dict(zip(INPUTS, (*ctx.needs_input_grad[1:6], ctx.needs_input_grad[7]), strict=True))
    wanted = [n for n in INPUTS if asked[n] and inputs[n] is not None]
    grads: dict[str, Tensor] = {}
    if wanted and (d_o is not None or d_state is not None):
        d_o = torch.zeros_like(v) if d_o is None else d_o
        d_state = d_state if ctx.final_state else None
        # with a graph of the backward asked for, the dispatcher must refuse it
        direct = not torch.is_grad_enabled() and transforms.direct(d_o, d_state, q, k, v, g, beta, initial_state, cu_seqlens)
        found = (_chunk_backward if direct else BACKWARD)(d_o, d_state, q, k, v, g, beta, ctx.scale, initial_state, cu_seqlens,
                                                          *ctx.flags, " ".join(wanted), ctx.asked)
        grads = dict(zip(wanted, found, strict=True))
        if "g" in grads:
            grads["g"] = grads["g"].to(g.dtype)
    d_q, d_k, d_v, d_g, d_beta, d_initial = (grads.get(n) for n in INPUTS)
    return d_q, d_k, d_v, d_g, d_beta, None, d_initial, *[None] * 8


def _twice(ctx: Any, *gradients: Any) -> Any:
    raise NotImplementedError("chunk_gated_delta_rule: the gradient of a gradient is not supported")


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Any, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        output: tuple[Tensor, Tensor | None] = run(*inputs)
        _remember(ctx, inputs)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return None, *_backward(ctx, *gradients)


def _recorded(run: Any, *inputs: Any) -> Any:
    """run(*inputs), and what autograd needs of it, if it needs anything."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return _Differentiable.apply(run, *inputs)         # type: ignore[no-untyped-call]
    return run(*inputs)


def direct(kind: Kind, *inputs: Any) -> tuple[Tensor, Tensor | None]:
    """What FORWARD does where `transforms.direct` says that nothing else has a part in it."""
    return _recorded(partial(forward.run, kind), *inputs)                 # type: ignore[no-any-return]


def _below(below: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return FORWARD.redispatch(below, *inputs)          # type: ignore[no-any-return]


def _autograd(keys: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
    """What `library.register_autograd` would do, which reads the schema anew in every call."""
    return _recorded(partial(_below, keys & torch._C._after_autograd_keyset), *inputs)     # type: ignore[no-any-return]


LIBRARY = library.Library("gdn_ir", "FRAGMENT")            # must outlive what is registered
LIBRARY.impl("chunk_forward", _autograd, "Autograd", with_keyset=True)
library.register_autograd("gdn_ir::chunk_backward", _twice)
