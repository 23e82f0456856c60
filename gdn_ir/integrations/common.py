"""Which calls of other libraries are taken over, and what is said of those that are not."""
from __future__ import annotations

import warnings
from functools import lru_cache

import torch

from gdn_ir import policy, registry
from gdn_ir.compiler import LARGEST, NAMES, Instance
from gdn_ir.programs.gated_delta import Switches

Tensor = torch.Tensor


def declined(q: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, initial_state: Tensor | None, recurrent: bool) -> str | None:
    """Why a call is better left to the library, or None where it is taken over: what the ops do not accept, and calls on a GPU
    for which there are no kernels but torch's (unless `gdn_ir.use` asks for a backend)."""
    if q.device.type not in ("cpu", "cuda"):
        return f"tensors on {q.device.type}"
    if q.dtype not in NAMES or beta.dtype not in NAMES:
        return f"q of {q.dtype} and beta of {beta.dtype}"
    for name, size in (("K", q.shape[-1]), ("V", v.shape[-1])):
        if size % 16 or not 0 < size <= LARGEST:
            return f"{name} = {size}, which is no multiple of 16 up to {LARGEST}"
    if q.device.type == "cpu":
        return None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else q.dtype
    train = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, v, g, beta, initial_state))
    reason: str | None = slow(q.device, q.shape[-1], v.shape[-1], dtype, beta.dtype, train, recurrent)
    return reason


@torch.compiler.assume_constant_result                     # type: ignore[untyped-decorator]
def slow(device: torch.device, K: int, V: int, dtype: torch.dtype, beta: torch.dtype, train: bool, recurrent: bool) \
        -> str | None:
    """Why nothing but the torch backend would serve such calls, if so and if nobody asks for one backend. The registry is asked
    for a shape like others of these sizes. A compiled graph keeps the answer of its compilation."""
    asked = policy.asked()
    if policy.forced(asked) is not None:
        return None
    arch = registry.architecture(device)
    for instance in _instances(K, V, NAMES[dtype], NAMES[beta], train, recurrent):
        every = registry.options(instance, arch, 1, 16, 1 if instance.recurrent else 2048)
        chosen = registry.first(every, asked)
        if chosen is None or chosen.backend == "torch":
            out = policy.forbidden(asked)
            return "; ".join(o.reason for o in every if o.variant is None and o.backend not in out) \
                or f"{', '.join(out)} forbidden by gdn_ir.forbid or GDN_IR_FORBID"
    return None


@lru_cache(maxsize=256)
def _instances(K: int, V: int, io: str, beta: str, train: bool, recurrent: bool) -> tuple[Instance, ...]:
    """What such calls need: the forward, and in training the backward."""
    parts = [((), recurrent)] + ([(("q", "k", "v", "g", "beta"), False)] if train else [])
    return tuple(Instance(Switches(final_state=not grads), K, V, io, beta, False, grads, recurrent=one) for grads, one in parts)


@lru_cache(maxsize=256)
def warn(library: str, what: str, reason: str) -> None:
    """Once for each reason."""
    warnings.warn(f"gdn_ir: {library}'s own {what} serves this call, not gdn_ir: {reason}", RuntimeWarning, stacklevel=3)
