"""Errors as they are reported and bounded: relative L2, and a worst case that no NaN slips through."""
from __future__ import annotations

from collections.abc import Iterable

import torch

# relative L2 of any output of a forward, and of any gradient, on model-like inputs, by the dtype of q, k and v
FORWARD = {"bf16": 4.5e-3, "f16": 4.5e-3, "f32": 1e-4, "f64": 1e-10}
GRADIENTS = {"bf16": 6e-3, "f16": 6e-3, "f32": 1e-4, "f64": 1e-10}


def bound(io: str, gradients: bool = False) -> float:
    """The largest relative error that is right."""
    return (GRADIENTS if gradients else FORWARD)[io]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2 distance of a from b; of equal shapes, lest one be repeated unseen. NaN where a holds one."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def worst(errors: Iterable[float]) -> float:
    """The largest error, infinite if one is NaN (Python's max would drop it)."""
    return max((e if e == e else float("inf") for e in errors), default=0.0)
