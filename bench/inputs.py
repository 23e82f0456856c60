"""Inputs for checks and timings: as a model makes them, and hard ones."""
from __future__ import annotations

from collections.abc import Callable

import torch

KINDS = ("model", "no_decay", "strong_decay", "correlated")


def make(lengths: list[int], H: int, HV: int, K: int = 128, V: int = 128, dtype: torch.dtype = torch.bfloat16,
         device: str = "cuda", kind: str = "model", seed: int = 0) -> dict[str, torch.Tensor]:
    """q, k [T, H, K] (unit length); v [T, HV, V]; g (log decay, float32), beta [T, HV]; initial_state [N, HV, K, V]; cu_seqlens
    [N + 1] int32. kind: "model" (decays as Gated DeltaNet initialises them), "no_decay" (g = 0), "strong_decay" (g near -5),
    "correlated" (keys of cosine about 0.99, beta 0.5 to 1), "real" (as "model", but one head in sixteen, and at least one,
    hardly decays: g about -1e-5, as trained models keep them)."""
    generator = torch.Generator(device=device).manual_seed(seed)
    T, N = sum(lengths), len(lengths)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    q, k, v = normal(T, H, K), normal(T, H, K), normal(T, HV, V)
    if kind == "correlated":
        k = normal(1, H, K) + 0.1 * k
    rate = 16 * uniform(HV)
    bias = torch.log(torch.expm1(torch.exp(uniform(HV) * 4.6 - 6.9)))                # steps from 1e-3 to 0.1 after softplus
    if kind == "real":
        rate[::16] = 1e-4                                  # as a trained A_log may make it: half is left after 32768 tokens

    def gates() -> torch.Tensor:
        return torch.as_tensor(-rate * torch.nn.functional.softplus(normal(T, HV) + bias))
    makers: dict[str, Callable[[], torch.Tensor]] = {
        "model": gates, "real": gates,
        "no_decay": lambda: torch.zeros(T, HV, device=device),
        "strong_decay": lambda: -4 - 2 * uniform(T, HV),
        "correlated": lambda: -0.02 * uniform(T, HV)}
    g = makers[kind]()
    beta = 0.5 + 0.5 * uniform(T, HV) if kind == "correlated" else torch.sigmoid(normal(T, HV))
    unit = torch.nn.functional.normalize
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    return {"q": unit(q, dim=-1).to(dtype), "k": unit(k, dim=-1).to(dtype), "v": v.to(dtype), "g": g, "beta": beta.to(dtype),
            "initial_state": 0.1 * normal(N, HV, K, V), "cu_seqlens": ends}
