"""A small Gated DeltaNet language model over bytes (arXiv 2412.06464, section 3.4), for the demo: the layer around the op, in
plain torch. Blocks of the layer and a SwiGLU MLP, each behind an RMSNorm; the head is the embedding."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from gdn_ir.ops import chunk_gated_delta_rule

Tensor = torch.Tensor
Past = tuple[Tensor, Tensor]                               # of a layer: the convolution's last inputs, and the state
CONV = 4                                                   # width of the short convolution


@dataclass(frozen=True)
class Size:
    """Layers, their width, heads of q and k (H) and of v (HV), and the sizes of these heads."""
    layers: int
    width: int
    H: int
    HV: int
    K: int
    V: int


class Mixer(nn.Module):
    """The Gated DeltaNet layer: [B, T, width] to [B, T, width]."""

    def __init__(self, s: Size) -> None:
        super().__init__()
        self.s = s
        self.parts = (s.H * s.K, s.H * s.K, s.HV * s.V)
        self.qkv = nn.Linear(s.width, sum(self.parts), bias=False)
        self.conv = nn.Conv1d(sum(self.parts), sum(self.parts), CONV, groups=sum(self.parts), bias=False)
        self.a, self.b = (nn.Linear(s.width, s.HV, bias=False) for _ in range(2))
        self.A_log = nn.Parameter(torch.empty(s.HV).uniform_(1, 16).log())
        step = torch.exp(torch.empty(s.HV).uniform_(-6.9, -2.3))                  # from 1e-3 to 0.1, after softplus
        self.dt_bias = nn.Parameter(torch.log(torch.expm1(step)))
        self.gate = nn.Linear(s.width, s.HV * s.V, bias=False)
        self.norm = nn.RMSNorm(s.V, eps=1e-5)
        self.out = nn.Linear(s.HV * s.V, s.width, bias=False)

    def forward(self, x: Tensor, past: Past | None = None, keep: bool = False) -> tuple[Tensor, Past | None]:
        """The output, and with `keep` what the next tokens need. past: what this kept of the tokens before."""
        s, (B, T, _) = self.s, x.shape
        y = self.qkv(x).mT
        y = F.pad(y, (CONV - 1, 0)) if past is None else torch.cat([past[0].to(y.dtype), y], 2)
        q, k, v = F.silu(self.conv(y)).mT.split(self.parts, -1)
        g = -self.A_log.exp() * F.softplus(self.a(x).float() + self.dt_bias)
        o, state = chunk_gated_delta_rule(
            q.reshape(B, T, s.H, s.K), k.reshape(B, T, s.H, s.K), v.reshape(B, T, s.HV, s.V), g, self.b(x).sigmoid(),
            initial_state=None if past is None else past[1], output_final_state=keep, use_qk_l2norm_in_kernel=True)
        o = self.norm(o.float()) * F.silu(self.gate(x)).view(B, T, s.HV, s.V)
        return self.out(o.flatten(2)), None if state is None else (y[..., y.shape[-1] - CONV + 1:], state)


class Block(nn.Module):
    def __init__(self, s: Size) -> None:
        super().__init__()
        hidden = 8 * s.width // 3 // 16 * 16
        self.before, self.between = nn.RMSNorm(s.width), nn.RMSNorm(s.width)
        self.mixer = Mixer(s)
        self.up, self.down = nn.Linear(s.width, 2 * hidden, bias=False), nn.Linear(hidden, s.width, bias=False)

    def forward(self, x: Tensor, past: Past | None, keep: bool) -> tuple[Tensor, Past | None]:
        y, kept = self.mixer(self.before(x), past, keep)
        x = x + y
        a, b = self.up(self.between(x)).chunk(2, -1)
        return x + self.down(F.silu(a) * b), kept


class Model(nn.Module):
    """Bytes [B, T] to logits of the byte after each, [B, T, 256]."""

    def __init__(self, s: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, s.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = nn.RMSNorm(s.width)

    def forward(self, text: Tensor, past: list[Past | None] | None = None, keep: bool = False) \
            -> tuple[Tensor, list[Past | None]]:
        """The logits, and with `keep` what each layer must know of these bytes to go on from them (`past`)."""
        x, kept = self.embedding(text), []
        for block, p in zip(self.blocks, past or [None] * len(self.blocks), strict=True):
            x, new = block(x, p, keep)
            kept.append(new)
        return F.linear(self.norm(x), self.embedding.weight), kept

    @torch.no_grad()
    def sample(self, prompt: Tensor, length: int, temperature: float, generator: torch.Generator) -> list[int]:
        """`length` bytes that go on from the prompt [T], each drawn given all before; the past is the layers' states alone."""
        drawn: list[int] = []
        text, past = prompt[None], None
        for _ in range(length):
            logits, past = self(text, past, keep=True)
            chances = F.softmax(logits[0, -1].float() / temperature, -1)
            text = torch.multinomial(chances.cpu(), 1, generator=generator)[None].to(prompt.device)
            drawn.append(int(text))
        return drawn
