"""How the ops behave inside torch's transforms: autocast, vmap, and those that they cannot serve, which they refuse; and
whether there are any."""
from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from gdn_ir.policy import NOTHING

Tensor = torch.Tensor
PLAIN = (Tensor, torch.nn.Parameter)


def _bits(*names: str) -> int:
    keys = [getattr(torch._C.DispatchKey, n) for n in names]
    return sum(torch._C.DispatchKeySet(key).raw_repr() for key in keys)


# what torch's dispatcher adds to a tensor's own keys in a thread where nothing is switched on, and what it takes away (of what
# matters here); second the same under inference_mode. Whatever comes between a call and its kernels adds keys of its own:
# modes of __torch_dispatch__ (fake tensors, tracing by make_fx and AOTAutograd, selective checkpointing), functorch's
# transforms, torch.jit's tracing, functionalisation; autocast puts back what is taken away.
_OFF = _bits("AutocastCPU", "AutocastCUDA")
_AUTOGRAD = _bits("AutogradFunctionality")
_ORDINARY = frozenset({(_bits("BackendSelect", "ADInplaceOrView"), _OFF), (_bits("BackendSelect"), _OFF | _AUTOGRAD)})


def direct(*tensors: Tensor | None) -> bool:
    """Whether an op on these tensors may be called without torch's dispatcher, because all that it would do is call it."""
    if torch.compiler.is_compiling():
        return False
    added, removed = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    if (added.raw_repr(), removed.raw_repr() & (_OFF | _AUTOGRAD)) not in _ORDINARY \
            or torch._C._len_torch_function_stack() or torch._C._autograd._profiler_enabled() or forward_ad._current_level >= 0:
        return False
    # no subclasses, no views whose numbers are yet to be negated, no zeros without memory
    return all([x is None or (type(x) in PLAIN and not x.is_neg() and not x._is_zerotensor()) for x in tensors])


def refuse(op: str, *tensors: Tensor | None) -> None:
    """Raise NotImplementedError where a tangent, or a gradient taken by torch.func, would be lost on the way."""
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active():
        kinds = torch._C._functorch.TransformType
        for level in torch._C._functorch.get_interpreter_stack() or ():
            if level.key() in (kinds.Grad, kinds.Jvp):
                raise NotImplementedError(f"{op}: torch.func's grad, vjp, jvp and what is made of them are not supported; "
                                          "accepts torch.autograd (backward, grad) and torch.func.vmap")
    if forward_ad._current_level >= 0:
        for x in tensors:
            if x is not None and forward_ad.unpack_dual(x).tangent is not None:
                raise NotImplementedError(f"{op}: forward-mode differentiation is not supported; accepts torch.autograd's "
                                          "backward and grad")


def cast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in autocast's dtype, as the operands of a matrix product; what is not a float of at most 32 bits stays."""
    found = []
    dtype = torch.get_autocast_dtype(q.device.type)
    for x in (q, k, v):
        found.append(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x)
    return found[0], found[1], found[2]


# ---- vmap: the mapped dimension joins the batch ---------------------------------------------------------------------------


def _fold(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    if x is None:
        return None
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _dense(cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        raise NotImplementedError("cu_seqlens: vmap over packed sequences is not supported; accepts None under vmap (or pack "
                                  "the mapped dimension too)")


def vmap_forward(info: Any, in_dims: tuple[int | None, ...], q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor,
                 scale: float, initial_state: Tensor | None, cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None,
                 final_state: bool, *flags: bool) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    _dense(cu_seqlens)
    n = info.batch_size
    inputs = [_fold(x, d, n) for x, d in zip((q, k, v, g, beta), in_dims)]
    initial_state = _fold(initial_state, in_dims[6], n)
    o, state = torch.ops.gdn_ir.chunk_forward(*inputs, scale, initial_state, None, None, final_state, *flags)
    batch = o.shape[0] // n
    return (o.view(n, batch, *o.shape[1:]), state.view(n, batch if final_state else 0, *state.shape[1:])), (0, 0)


def vmap_keeping(*_: Any) -> None:
    """Never asked: what is kept is decided beneath vmap, where the forward is recorded."""
    raise NotImplementedError("chunk_forward_keeping: vmap is not supported; accepts chunk_forward under vmap")


def vmap_backward(info: Any, in_dims: tuple[int | None, ...], d_o: Tensor, d_state: Tensor | None, q: Tensor, k: Tensor,
                  v: Tensor, g: Tensor | None, beta: Tensor, scale: float, initial_state: Tensor | None,
                  cu_seqlens: Tensor | None, l2norm: bool, beta_sigmoid: bool, neg_eigval: bool, state_v_first: bool,
                  wanted: str, asked: str, kept: list[Tensor], keep: str) -> tuple[list[Tensor], list[int]]:
    """What the forward left is not repeated for each of them, but computed again."""
    _dense(cu_seqlens)
    n = info.batch_size
    inputs = [_fold(x, d, n) for x, d in zip((d_o, d_state, q, k, v, g, beta), in_dims)]
    found = torch.ops.gdn_ir.chunk_backward(*inputs, scale, _fold(initial_state, in_dims[8], n), None, l2norm, beta_sigmoid,
                                            neg_eigval, state_v_first, wanted, asked, [], NOTHING)
    return [x.view(n, x.shape[0] // n, *x.shape[1:]) for x in found], [0] * len(found)
