"""What surrounds the op in a layer: the short convolution and the gated norm, in torch."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

Tensor = torch.Tensor


class ShortConvolution(nn.Module):
    """Parameters of a causal depthwise convolution: weight [channels, 1, width], the last tap on the present token."""

    def __init__(self, channels: int, width: int, bias: bool) -> None:
        super().__init__()
        bound = width ** -0.5
        self.weight = nn.Parameter(torch.empty(channels, 1, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Causal depthwise convolution of x [B, T, D] with weight [D, 1, W]. past [N, W - 1, D]: the tokens before each sequence
    (None: zeros). With cu_seqlens [N + 1] and B = 1 no token sees another sequence. Nothing is read on the host."""
    width = weight.shape[-1]
    if cu_seqlens is None:
        past = x.new_zeros(x.shape[0], width - 1, x.shape[2]) if past is None else past.to(x.dtype)
        return F.conv1d(torch.cat([past, x], 1).mT, weight.to(x.dtype), None if bias is None else bias.to(x.dtype),
                        groups=x.shape[2]).mT
    n, place = _places(cu_seqlens, x.shape[1])
    t = torch.arange(x.shape[1], device=x.device)
    y = x.new_zeros(x.shape[1:], dtype=torch.float32)
    for back in range(width):
        before = _before(past, n, place - back)            # of tokens that lie before their sequence
        tap = x[0] if back == 0 else torch.where((place >= back)[:, None], x[0, (t - back).clamp(min=0)], before)
        y = y + tap.float() * weight[:, 0, width - 1 - back].float()
    return (y if bias is None else y + bias.float()).to(x.dtype)[None]


def last_tokens(x: Tensor, width: int, past: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The `past` [N, width - 1, D] of what follows x [B, T, D]: the last tokens of each sequence, older ones from its past."""
    if cu_seqlens is None:
        past = x.new_zeros(x.shape[0], width - 1, x.shape[2]) if past is None else past.to(x.dtype)
        return torch.cat([past, x], 1)[:, x.shape[1]:]
    first, length = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    place = length[:, None] + torch.arange(1 - width, 0, device=x.device)
    n = torch.arange(len(first), device=x.device)[:, None].expand_as(place)
    own = x[0, (first[:, None] + place).clamp(0, max(x.shape[1] - 1, 0))]
    return torch.where((place >= 0)[..., None], own, _before(past, n, place))


def _places(cu_seqlens: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """Of each of T packed tokens: its sequence, and its place in it. Tokens past the last sequence count as its own."""
    t = torch.arange(T, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    n = (torch.searchsorted(cu_seqlens, t, right=True) - 1).clamp(0, max(len(cu_seqlens) - 2, 0))
    return n, t - cu_seqlens[n]


def _before(past: Tensor | None, n: Tensor, place: Tensor) -> Tensor:
    """Tokens at places before the first of sequence n, which are negative; zeros without a past. Others are arbitrary."""
    if past is None:
        return torch.zeros((), device=place.device)
    found: Tensor = past[n, (past.shape[1] + place).clamp(0, past.shape[1] - 1)]
    return found


class GatedRMSNorm(nn.Module):
    """x / rms(x) weight activation(gate) over the last dimension, in float32; without a gate where none is given.
    activation: "silu" (or "swish") or "sigmoid"."""

    def __init__(self, size: int, eps: float, activation: str) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"output_gate_activation: got {activation!r}; accepts {', '.join(ACTIVATIONS)}")
        self.weight, self.eps, self.activation = nn.Parameter(torch.ones(size)), eps, activation

    def forward(self, x: Tensor, gate: Tensor | None) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight.to(wide.dtype)
        return (y if gate is None else y * ACTIVATIONS[self.activation](gate.to(wide.dtype))).to(x.dtype)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "swish": F.silu, "sigmoid": torch.sigmoid}
