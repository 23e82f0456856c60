"""Errors as they are reported and bounded: relative L2, and a worst case that no NaN slips through."""
from __future__ import annotations

from collections.abc import Iterable

import torch


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2 distance of a from b; of equal shapes, lest one be repeated unseen. NaN where a holds one."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def worst(errors: Iterable[float]) -> float:
    """The largest error, infinite if one is NaN (Python's max would drop it)."""
    return max((e if e == e else float("inf") for e in errors), default=0.0)
