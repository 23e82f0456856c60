"""The forward as one custom op, served by whatever variant the registry chooses."""
from __future__ import annotations

from typing import Any

import torch
from torch import library

from gdn_ir import policy
from gdn_ir.ops import checks, kinds, left, transforms
from gdn_ir.ops.kinds import Kind

Tensor = torch.Tensor


def empty(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, final_state: bool, state_v_first: bool) \
        -> tuple[Tensor, Tensor | None]:
    """Outputs, not yet written: o, and the final state where it is asked for."""
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    if not final_state:
        return o, None
    B, _, HV, V = v.shape
    K, N = q.shape[-1], B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return o, q.new_empty((N, HV, V, K) if state_v_first else (N, HV, K, V), dtype=kinds.wide(q))


def run(kind: Kind, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float, initial_state: Tensor | None,
        cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None, final_state: bool, l2norm: bool, beta_sigmoid: bool,
        neg_eigval: bool, state_v_first: bool, recurrent: bool, keep: str = policy.NOTHING) -> tuple[Any, ...]:
    """What the op does. recurrent: by the program of chunks of one token, whose results are the same. Returns o, the final
    state or None, and what is left to the backward."""
    if cu_seqlens is not None:
        checks.boundaries(cu_seqlens, cu_seqlens_cpu, kind.sizes["T"])
    o, state = empty(q, v, cu_seqlens, final_state, state_v_first)
    kept = left.empty(keep, g is not None, q, v, cu_seqlens) if keep != policy.NOTHING else []
    if kind.nothing:
        return o.zero_(), None if state is None else _unchanged(state, initial_state), *kept
    serve = kind.serving(q, g, beta, initial_state, cu_seqlens, final_state, l2norm, beta_sigmoid, neg_eigval, state_v_first,
                         recurrent, (), policy.asked(), keep)
    tensors = {"q": q, "k": k, "v": v, "beta": beta, "o": o}
    for name, x in (("g", g), ("initial_state", initial_state), ("final_state", state)):
        if x is not None:
            tensors[name] = x
    if kept:
        tensors |= left.named(keep, g is not None, kept)
    serve(tensors, scale, cu_seqlens)
    return o, state, *kept


def _unchanged(state: Tensor, initial: Tensor | None) -> Tensor:
    """The state after no tokens: the initial one, or zero."""
    return state.zero_() if initial is None or not state.numel() else state.copy_(initial)


# ---- the custom op --------------------------------------------------------------------------------------------------------


def _some(q: Tensor, state: Tensor | None) -> Tensor:
    """A custom op returns tensors: one without entries for a state that was not asked for."""
    return q.new_empty((0,), dtype=kinds.wide(q)) if state is None else state


def _chunk_forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float, initial_state: Tensor | None,
                   cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None, final_state: bool, l2norm: bool,
                   beta_sigmoid: bool, neg_eigval: bool, state_v_first: bool, recurrent: bool) -> tuple[Tensor, Tensor]:
    kind = kinds.of(q, k, v, g, beta, initial_state, cu_seqlens, cu_seqlens_cpu, state_v_first)
    o, state = run(kind, q, k, v, g, beta, scale, initial_state, cu_seqlens, cu_seqlens_cpu, final_state, l2norm, beta_sigmoid,
                   neg_eigval, state_v_first, recurrent)
    return o, _some(q, state)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float, initial_state: Tensor | None,
                  cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None, final_state: bool, l2norm: bool,
                  beta_sigmoid: bool, neg_eigval: bool, state_v_first: bool, recurrent: bool) -> tuple[Tensor, Tensor]:
    o, state = empty(q, v, cu_seqlens, final_state, state_v_first)
    return o, _some(q, state)


def _chunk_forward_keeping(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float,
                           initial_state: Tensor | None, cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None,
                           final_state: bool, l2norm: bool, beta_sigmoid: bool, neg_eigval: bool, state_v_first: bool,
                           recurrent: bool, keep: str) -> list[Tensor]:
    """The same, and after both results what it leaves to the backward."""
    kind = kinds.of(q, k, v, g, beta, initial_state, cu_seqlens, cu_seqlens_cpu, state_v_first)
    o, state, *kept = run(kind, q, k, v, g, beta, scale, initial_state, cu_seqlens, cu_seqlens_cpu, final_state, l2norm,
                          beta_sigmoid, neg_eigval, state_v_first, recurrent, keep)
    return [o, _some(q, state), *kept]


def _fake_forward_keeping(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float,
                          initial_state: Tensor | None, cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None,
                          final_state: bool, l2norm: bool, beta_sigmoid: bool, neg_eigval: bool, state_v_first: bool,
                          recurrent: bool, keep: str) -> list[Tensor]:
    o, state = empty(q, v, cu_seqlens, final_state, state_v_first)
    return [o, _some(q, state), *left.empty(keep, g is not None, q, v, cu_seqlens)]


def operator(name: str, run: Any, fake: Any, vmap: Any) -> Any:
    """A custom op made of its parts: `library.custom_op` also looks at every call's results for aliases, which costs a third of
    a call's time on the host; `opcheck` does so in the tests."""
    library.define(name, library.infer_schema(run, mutates_args=()), tags=torch.Tag.needs_exact_strides)
    library.impl(name, ("cpu", "cuda"), run)
    library.register_fake(name, fake)
    library.register_vmap(name, vmap)
    return getattr(torch.ops.gdn_ir, name.partition("::")[2]).default


FORWARD = operator("gdn_ir::chunk_forward", _chunk_forward, _fake_forward, transforms.vmap_forward)
KEEPING = operator("gdn_ir::chunk_forward_keeping", _chunk_forward_keeping, _fake_forward_keeping, transforms.vmap_keeping)
