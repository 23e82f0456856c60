"""A small Gated DeltaNet language model over bytes (arXiv 2412.06464, section 3.4), for the demo: blocks of the layer in
gdn_ir.nn and a SwiGLU MLP, each behind an RMSNorm; the head is the embedding."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from gdn_ir.nn import GatedDeltaNet, State

Tensor = torch.Tensor


@dataclass(frozen=True)
class Size:
    """Layers, their width, heads of q and k (H) and of v (HV), and the sizes of these heads."""
    layers: int
    width: int
    H: int
    HV: int
    K: int
    V: int


class Block(nn.Module):
    def __init__(self, s: Size) -> None:
        super().__init__()
        hidden = 8 * s.width // 3 // 16 * 16
        self.before, self.between = nn.RMSNorm(s.width), nn.RMSNorm(s.width)
        self.mixer = GatedDeltaNet(s.width, s.V / s.K, s.K, s.H, s.HV)
        self.up, self.down = nn.Linear(s.width, 2 * hidden, bias=False), nn.Linear(hidden, s.width, bias=False)

    def forward(self, x: Tensor, past: State | None, keep: bool) -> tuple[Tensor, State | None]:
        y, kept = self.mixer(self.before(x), past, use_cache=keep)
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

    def forward(self, text: Tensor, past: list[State | None] | None = None, keep: bool = False) \
            -> tuple[Tensor, list[State | None]]:
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
