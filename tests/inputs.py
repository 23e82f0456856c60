"""Inputs of the op, and its results by the float64 recurrence."""
from __future__ import annotations

from typing import Any

import torch

from gdn_ir.bench.errors import relative as error
from gdn_ir.reference import recurrence

__all__ = ["FARTHER", "HARD", "ROUNDING", "correlated", "error", "expected", "farther", "make"]
FARTHER = 1.5                                              # times as far from its float32 self, a model of 16 bits with us
ROUNDING = 0.1                                             # and how far at most, in the mean, without us
HARD: dict[str, dict[str, float]] = {"as they come": {}, "no decay, to the digit": {"g": 0.0},
                                     "a reset each step": {"g": -50.0}, "beta near 2": {"beta": 1.999}}


def make(B: int = 1, T: int = 100, H: int = 2, HV: int = 2, K: int = 32, V: int = 32, dtype: torch.dtype = torch.float32,
         device: str = "cpu", seed: int = 0) -> dict[str, torch.Tensor]:
    """q, k, v, g, beta as the op takes them: q and k of unit length, decays as a model's."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float64)
    q, k = (torch.nn.functional.normalize(normal(B, T, H, K), dim=-1) for _ in range(2))
    g = -torch.nn.functional.softplus(normal(B, T, HV) - 2)
    return {"q": q.to(dtype), "k": k.to(dtype), "v": normal(B, T, HV, V).to(dtype),
            "g": g if dtype is torch.float64 else g.float(), "beta": torch.sigmoid(normal(B, T, HV)).to(dtype)}


def correlated(top: float, T: int = 64) -> dict[str, torch.Tensor]:
    """q, k, v, beta of one sequence and head, [T, 1, 64 or 32]: keys of cosine 0.99, beta up to `top`; no decay."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, 64, generator=generator) + 0.1 * torch.randn(T, 1, 64, generator=generator)
    unit = torch.nn.functional.normalize
    x = {"q": unit(torch.randn(T, 1, 64, generator=generator), dim=-1), "k": unit(k, dim=-1),
         "v": torch.randn(T, 1, 32, generator=generator), "beta": top * (0.5 + 0.5 * torch.rand(T, 1, generator=generator))}
    assert float((x["k"][0] * x["k"][1]).sum()) > 0.98
    return x


def expected(x: dict[str, Any], initial_state: torch.Tensor | None = None, cu_seqlens: torch.Tensor | None = None,
             **switches: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """o and the final state of inputs on any device, in float64 on that device."""
    cpu = {n: None if t is None else t.detach().cpu() for n, t in x.items()}
    o, S = recurrence(cpu["q"], cpu["k"], cpu["v"], cpu["g"], cpu["beta"], None,
                      None if initial_state is None else initial_state.cpu(), None if cu_seqlens is None else cu_seqlens.cpu(),
                      **switches)
    return o.to(x["q"].device), S.to(x["q"].device)


def farther(found: dict[str, torch.Tensor], without: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> list[str]:
    """What of a model of 16 bits is not about as near to its float32 self with us as without us: all tensors together (each by
    its own norm, else the largest would hide the rest), and each by itself, where chance has more room. And whether it is near
    without us: a bad reference would forgive everything."""
    assert set(found) == set(without) == set(exact)
    ours, theirs = ({n: error(x[n], exact[n]) for n in exact} for x in (found, without))
    mean, bound = (sum(e * e / len(x) for e in x.values()) ** 0.5 for x in (ours, theirs))
    wrong = [] if mean <= FARTHER * bound else [f"all: {mean:.2e}, without us {bound:.2e}"]
    wrong += [] if bound <= ROUNDING else [f"without us: {bound:.2e}"]
    return wrong + [f"{n}: {ours[n]:.2e}, without us {theirs[n]:.2e}" for n in exact
                    if not ours[n] <= 2 * FARTHER * theirs[n] + 1e-2]
