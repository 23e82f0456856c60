"""The backward of the op: one custom op for all gradients that are asked for, and what autograd is told about the two."""
from __future__ import annotations

from typing import Any

import torch
from torch import library
from torch._guards import TracingContext         # of this thread, while torch.compile traces

from gdn_ir import policy
from gdn_ir.ops import chunk, transforms

Tensor = torch.Tensor
INPUTS = ("q", "k", "v", "g", "beta", "initial_state")


def _empty(wanted: str, **inputs: Tensor | None) -> list[Tensor]:
    """Gradients, not yet written, in the order of `wanted`: each like its input; of g in the dtype of its arithmetic."""
    found = []
    for name in wanted.split():
        x = inputs[name]
        assert x is not None
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        found.append(torch.empty(x.shape, dtype=wide if name == "g" else x.dtype, device=x.device))
    return found


def _chunk_backward(d_o: Tensor, d_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor,
                    scale: float, initial_state: Tensor | None, cu_seqlens: Tensor | None, l2norm: bool, beta_sigmoid: bool,
                    neg_eigval: bool, state_v_first: bool, wanted: str, asked: str) -> list[Tensor]:
    """Gradients of the inputs named in `wanted` (separated by spaces). d_o as o; d_state as the final state, None where it has
    no gradient. asked: the policy that held in the forward, or WHEN_RUN."""
    if asked == policy.WHEN_RUN:
        asked = policy.asked()
    found = _empty(wanted, q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state)
    grads = dict(zip(wanted.split(), found, strict=True))
    if chunk.nothing(q, cu_seqlens):
        for name, x in grads.items():
            x.zero_() if name != "initial_state" or d_state is None else x.copy_(d_state)
        return found
    chosen, tensors, sequences, ends = chunk.bind(q, k, v, g, beta, initial_state, cu_seqlens, d_state is not None, l2norm,
                                                  beta_sigmoid, neg_eigval, state_v_first, asked, tuple(grads))
    tensors["d_o"] = d_o.contiguous().view(-1, *d_o.shape[2:])
    if d_state is not None:
        tensors["d_final_state"] = d_state.contiguous()
    tensors |= {f"d_{name}": x if name == "initial_state" else x.view(-1, *x.shape[2:]) for name, x in grads.items()}
    chosen(tensors, scale, sequences, ends)
    return found


def _fake_backward(d_o: Tensor, d_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor,
                   scale: float, initial_state: Tensor | None, cu_seqlens: Tensor | None, l2norm: bool, beta_sigmoid: bool,
                   neg_eigval: bool, state_v_first: bool, wanted: str, asked: str) -> list[Tensor]:
    return _empty(wanted, q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state)


BACKWARD = chunk.operator("gdn_ir::chunk_backward", _chunk_backward, _fake_backward, transforms.vmap_backward)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
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
        found = BACKWARD(d_o, d_state if ctx.final_state else None, q, k, v, g, beta, ctx.scale,
                         initial_state, cu_seqlens, *ctx.flags, " ".join(wanted), ctx.asked)
        grads = dict(zip(wanted, found, strict=True))
        if "g" in grads:
            grads["g"] = grads["g"].to(g.dtype)
    d_q, d_k, d_v, d_g, d_beta, d_initial = (grads.get(n) for n in INPUTS)
    return d_q, d_k, d_v, d_g, d_beta, None, d_initial, *[None] * 8


def _twice(ctx: Any, *gradients: Any) -> Any:
    raise NotImplementedError("chunk_gated_delta_rule: the gradient of a gradient is not supported")


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, below: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            output: tuple[Tensor, Tensor] = chunk.FORWARD.redispatch(below, *inputs)
        _remember(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return None, *_backward(ctx, *gradients)


def _autograd(keys: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
    """What `library.register_autograd` would do, which reads the schema anew in every call."""
    below = keys & torch._C._after_autograd_keyset
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return _Differentiable.apply(below, *inputs)       # type: ignore[no-any-return, no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return chunk.FORWARD.redispatch(below, *inputs)    # type: ignore[no-any-return]


LIBRARY = library.Library("gdn_ir", "FRAGMENT")            # must outlive what is registered
LIBRARY.impl("chunk_forward", _autograd, "Autograd", with_keyset=True)
library.register_autograd("gdn_ir::chunk_backward", _twice)
