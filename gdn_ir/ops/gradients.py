"""The backward of the op: one custom op for all gradients that are asked for, and what autograd is told about the two."""
from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch.library import Library, register_autograd
from torch._guards import TracingContext         # of this thread, while torch.compile traces

from gdn_ir import policy, registry
from gdn_ir.ops import forward, kinds, left, transforms
from gdn_ir.ops.forward import FORWARD, KEEPING

Tensor = torch.Tensor
INPUTS = ("q", "k", "v", "g", "beta", "initial_state")


def _empty(wanted: tuple[str, ...], *inputs: Tensor | None) -> list[Tensor]:
    """Gradients, not yet written, in the order of `wanted`: each like its input; of g in the dtype of its arithmetic."""
    like = dict(zip(INPUTS, inputs))
    return [torch.empty_like(x, dtype=kinds.wide(x) if name == "g" else x.dtype, memory_format=torch.contiguous_format)
            for name in wanted if (x := like[name]) is not None]


def _together(wanted: tuple[str, ...], q: Tensor, k: Tensor, *others: Tensor | None) -> list[Tensor]:
    """The same, those of q and k in one piece of memory, which then holds what both are made of until they are stored
    (`temporaries.overwritten`)."""
    if wanted[:2] != ("q", "k") or q.shape != k.shape or q.dtype != k.dtype:
        return _empty(wanted, q, k, *others)
    d_q, d_k = (x.data for x in q.new_empty((2, *q.shape)))            # no views: to change one does not touch the other
    return [d_q, d_k, *_empty(wanted[2:], q, k, *others)]


def run(d_o: Tensor, d_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float,
        initial_state: Tensor | None, cu_seqlens: Tensor | None, l2norm: bool, beta_sigmoid: bool, neg_eigval: bool,
        state_v_first: bool, wanted: tuple[str, ...], asked: str, kept: list[Tensor], keep: str, direct: bool = True) \
        -> list[Tensor]:
    """Gradients of the inputs named in `wanted`. d_o as o; d_state as the final state, None where it has no gradient. asked:
    the policy that held in the forward, or WHEN_RUN. kept: what the forward left, where it was asked to `keep`. direct: past
    the dispatcher."""
    if asked == policy.WHEN_RUN:
        asked = policy.asked()
    kind = kinds.of(q, k, v, g, beta, initial_state, cu_seqlens, None, state_v_first)
    # a custom op's results must not share memory
    found = (_together if direct else _empty)(wanted, q, k, v, g, beta, initial_state)
    if kind.nothing:
        for name, x in zip(wanted, found):
            x.zero_() if name != "initial_state" or d_state is None else x.copy_(d_state)
        return found
    serve = kind.serving(q, g, beta, initial_state, cu_seqlens, d_state is not None, l2norm, beta_sigmoid, neg_eigval,
                         state_v_first, False, wanted, asked, keep)
    tensors = {"q": q, "k": k, "v": v, "beta": beta, "d_o": d_o}
    for name, x in zip(wanted, found):
        tensors["d_" + name] = x
    for name, given in (("g", g), ("initial_state", initial_state), ("d_final_state", d_state)):
        if given is not None:
            tensors[name] = given
    if kept:
        tensors |= left.named(keep, g is not None, kept)
    serve(tensors, scale, cu_seqlens)
    return found


def _chunk_backward(d_o: Tensor, d_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor,
                    scale: float, initial_state: Tensor | None, cu_seqlens: Tensor | None, l2norm: bool, beta_sigmoid: bool,
                    neg_eigval: bool, state_v_first: bool, wanted: str, asked: str, kept: list[Tensor], keep: str) \
        -> list[Tensor]:
    """`run` as a custom op: names in `wanted` are separated by spaces."""
    return run(d_o, d_state, q, k, v, g, beta, scale, initial_state, cu_seqlens, l2norm, beta_sigmoid, neg_eigval,
               state_v_first, tuple(wanted.split()), asked, kept, keep, False)


def _fake_backward(d_o: Tensor, d_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor,
                   scale: float, initial_state: Tensor | None, cu_seqlens: Tensor | None, l2norm: bool, beta_sigmoid: bool,
                   neg_eigval: bool, state_v_first: bool, wanted: str, asked: str, kept: list[Tensor], keep: str) \
        -> list[Tensor]:
    return _empty(tuple(wanted.split()), q, k, v, g, beta, initial_state)


BACKWARD = forward.operator("gdn_ir::chunk_backward", _chunk_backward, _fake_backward, transforms.vmap_backward)


@lru_cache(maxsize=256)
def _wanted(needed: tuple[bool, ...], decay: bool, initial_state: bool) -> tuple[str, ...]:
    """Names of the gradients to compute. needed: whether each argument of `_Differentiable` needs one."""
    there = {"g": decay, "initial_state": initial_state}
    return tuple(n for n, asked in zip(INPUTS, needed[-len(INPUTS):], strict=True) if asked and there.get(n, True))


def _backward(ctx: Any, d_o: Tensor | None, d_state: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of INPUTS, None where they are not needed."""
    q, k, v, g, beta, initial_state, cu_seqlens, *kept = ctx.saved_tensors
    wanted = _wanted(ctx.needs_input_grad, g is not None, initial_state is not None)
    grads: dict[str, Tensor] = {}
    if wanted and (d_o is not None or d_state is not None):
        d_o = torch.zeros_like(v) if d_o is None else d_o
        # with a graph of the backward asked for, the dispatcher must refuse it
        direct = not torch.is_grad_enabled() and transforms.direct(d_o, d_state, q, k, v, g, beta, initial_state, cu_seqlens,
                                                                   *kept)
        compute: Any = run if direct else BACKWARD
        found = compute(d_o, d_state, q, k, v, g, beta, ctx.scale, initial_state, cu_seqlens, *ctx.flags,
                        wanted if direct else " ".join(wanted), ctx.asked, kept, ctx.keep)
        grads = dict(zip(wanted, found))
        if "g" in grads and g.dtype != grads["g"].dtype:
            grads["g"] = grads["g"].to(g.dtype)
    return tuple([grads.get(n) for n in INPUTS])


def _twice(ctx: Any, *gradients: Any) -> Any:
    raise NotImplementedError("chunk_gated_delta_rule: the gradient of a gradient is not supported")


class _Differentiable(torch.autograd.Function):
    """The forward as `compute` does it: through the dispatcher or past it."""

    @staticmethod
    def forward(ctx: Any, compute: Any, scale: float, cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None,
                flags: tuple[bool, ...], keep: str, *inputs: Tensor | None) -> tuple[Tensor, Tensor | None]:
        *others, initial_state = inputs
        o, state, *kept = compute(*others, scale, initial_state, cu_seqlens, cu_seqlens_cpu, *flags, keep)
        ctx.save_for_backward(*inputs, cu_seqlens, *kept)
        ctx.keep = keep
        final_state, *rest, _ = flags
        ctx.scale, ctx.flags, ctx.final_state = scale, rest, final_state
        # what holds for the forward holds for its backward; but a graph that is traced here runs later, under other policies
        ctx.asked = policy.asked() if TracingContext.try_get() is None else policy.WHEN_RUN
        ctx.set_materialize_grads(False)
        return o, state

    @staticmethod
    def backward(ctx: Any, d_o: Tensor | None, d_state: Tensor | None) -> Any:
        return *[None] * 6, *_backward(ctx, d_o, d_state if ctx.final_state else None)


# without what Function.apply does for functorch in each call: its transforms are refused, or done with, before
_APPLY: Any = super(torch.autograd.Function, _Differentiable).apply


def recorded(compute: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float,
             initial_state: Tensor | None, cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None, *flags: bool) \
        -> tuple[Tensor, Tensor | None]:
    """`compute` on these, and what autograd needs of it, if it needs anything."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad or beta.requires_grad
                                    or (g is not None and g.requires_grad)
                                    or (initial_state is not None and initial_state.requires_grad)):
        keep = policy.keeping()
        if keep != policy.NOTHING:
            keep = _kept(keep, q, v, g, beta, initial_state, cu_seqlens, *flags)
        found = _APPLY(compute, scale, cu_seqlens, cu_seqlens_cpu, flags, keep, q, k, v, g, beta, initial_state)
    else:
        found = compute(q, k, v, g, beta, scale, initial_state, cu_seqlens, cu_seqlens_cpu, *flags, policy.NOTHING)
    return found                                           # type: ignore[no-any-return]


def _kept(keep: str, q: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, initial_state: Tensor | None,
          cu_seqlens: Tensor | None, final_state: bool, l2norm: bool, beta_sigmoid: bool, neg_eigval: bool, state_v_first: bool,
          recurrent: bool) -> str:
    """What is kept for a backward where `keep` is asked for. Chunks of one token leave nothing of use. (Where torch traces for
    any size, a graph is of these heads, and of any number of tokens.)"""
    if recurrent:
        return policy.NOTHING
    K, V, H, HV = (int(n) for n in (q.shape[-1], v.shape[-1], q.shape[-2], v.shape[-2]))
    return registry.keeps(q.device, q.dtype, beta.dtype, K, V, H, HV, cu_seqlens is not None, g is not None, l2norm,
                          beta_sigmoid, neg_eigval, initial_state is not None, final_state, state_v_first, policy.asked(), keep)


def _below(below: Any, *inputs: Any) -> Any:
    """The forward beneath autograd; the last of `inputs` is what it keeps."""
    *given, keep = inputs
    with torch._C._AutoDispatchBelowAutograd():
        return FORWARD.redispatch(below, *given) if keep == policy.NOTHING else KEEPING.redispatch(below, *given, keep)


def _autograd(keys: Any, *inputs: Any) -> tuple[Tensor, Tensor | None]:
    """What `register_autograd` would do, which reads the schema anew in every call."""
    return recorded(partial(_below, keys & torch._C._after_autograd_keyset), *inputs)


FRAGMENT = Library("gdn_ir", "FRAGMENT")                   # held: what it registers goes when it goes
FRAGMENT.impl("chunk_forward", _autograd, "Autograd", with_keyset=True)
register_autograd("gdn_ir::chunk_backward", _twice)
