"""What is done to gates before the op: the log decay from a layer's raw output, in float32 and differentiable."""
from __future__ import annotations

import torch

Tensor = torch.Tensor


def log_decay(g: Tensor, A_log: Tensor, dt_bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """-exp(A_log) softplus(g + dt_bias): the log decay [..., HV] of a raw g [..., HV], with A_log and dt_bias [HV].
    Computed and returned in `dtype` whatever autocast asks for: decays are summed over a whole sequence."""
    with torch.autocast(g.device.type, enabled=False):
        raw = g.to(dtype) if dt_bias is None else g.to(dtype) + dt_bias.to(dtype)
        return -A_log.to(dtype).exp() * torch.nn.functional.softplus(raw)
