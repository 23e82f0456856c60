"""What a forward leaves to its backward: memory for it, which autograd keeps between the two."""
from __future__ import annotations

import torch

from gdn_ir.schedules.plans import CHUNK, left

Tensor = torch.Tensor


def empty(keep: str, decay: bool, q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    """Tensors, not yet written, in the order of `plans.left`: the inverse A [T, HV, 64] and u [T, HV, V] of each token, the
    states S [X, HV, K, V], in q's dtype; the sums G [T, HV] and total [X, HV] of the log decay in that of its arithmetic. T:
    all tokens; X: places for chunks of 64, T // 64 and one more for each sequence."""
    HV, V = v.shape[-2:]
    T, K = v.numel() // (HV * V), q.shape[-1]
    X = T // CHUNK + (v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    like = {"A": ((T, HV, CHUNK), q.dtype), "G": ((T, HV), wide), "total": ((X, HV), wide), "S": ((X, HV, K, V), q.dtype),
            "u": ((T, HV, V), q.dtype)}
    return [q.new_empty(shape, dtype=dtype) for shape, dtype in (like[n] for n in left(keep, decay))]


def named(keep: str, decay: bool, tensors: list[Tensor]) -> dict[str, Tensor]:
    """These by name."""
    return dict(zip(left(keep, decay), tensors, strict=True))
