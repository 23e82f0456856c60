"""What physics allows: a row's least bytes over the memory's bandwidth, its arithmetic over the rate of a matrix product; both
rates are measured on the machine at hand at the start of a run."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gdn_ir.autotune.measure import graph_ms
from gdn_ir.bench.cases import Row

CHUNK = 64                                                 # of the chunk form whose arithmetic is counted
BACKWARD = 2.5                                             # arithmetic of a backward over a forward's (chunk form, K = V)


@dataclass(frozen=True)
class Rates:
    """bytes: read and written a second by the faster of a large copy and a large sum of two tensors (on an H100 the copy alone
    is a fifth below what kernels reach); flops: a second of a large matrix product in the row's dtype."""
    bytes: float
    flops: float


def measure(device: str, dtype: torch.dtype) -> Rates:
    """Rates of this machine, in about a second."""
    gpu = device == "cuda"
    size, n = (1 << 30, 8192) if gpu else (1 << 26, 1024)
    x, y = (torch.zeros(size // 4, device=device) for _ in range(2))
    z = torch.empty_like(x)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    c = torch.empty_like(a)
    ms = (lambda f: graph_ms([f], 11)) if gpu else _wall_ms
    moved = max(2e3 * size / ms(lambda: z.copy_(x)), 3e3 * size / ms(lambda: torch.add(x, y, out=z)))
    return Rates(moved, 2e3 * n ** 3 / ms(lambda: torch.mm(a, b, out=c)))


def _wall_ms(call: Callable[[], object]) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def bytes_of(row: Row, width: int) -> int:
    """Of a forward: q, k, v, g and beta read, o and the final state written, each once. width: bytes of an element of q."""
    tokens = row.tokens * (width * (2 * row.H * row.K + 2 * row.HV * row.V + row.HV) + 4 * row.HV)
    return tokens + 4 * len(row.lengths) * row.HV * row.K * row.V


def flops_of(row: Row) -> float:
    """Of a forward in chunks of 64: K K^T and Q K^T once for each head of k, the rest for each head of v."""
    K, V = row.K, row.V
    each_k, each_v = 2 * 2 * CHUNK * K, 3 * 2 * K * V + 2 * 2 * CHUNK * V          # for each token
    return float(row.tokens * (row.H * each_k + row.HV * each_v))


def backward_of(row: Row, width: int) -> tuple[int, float]:
    """Bytes and arithmetic of a backward: q, k, v, g, beta and do read, their gradients written, each once; 25 units of
    arithmetic for each chunk and head of v, of which a forward takes 10 where nothing is shared."""
    moved = row.tokens * (width * (4 * row.H * row.K + 3 * row.HV * row.V + 2 * row.HV) + 8 * row.HV)
    alone = flops_of(Row(row.lengths, row.HV, row.HV, row.K, row.V))
    return moved, BACKWARD * alone


def floor(row: Row, width: int, rates: Rates, train: bool) -> dict[str, Any]:
    """The least milliseconds of a row, and what they come from. A forward plus backward's is the sum of both passes'."""
    passes = [(bytes_of(row, width), flops_of(row))] + ([backward_of(row, width)] if train else [])
    ms = sum(1e3 * max(b / rates.bytes, f / rates.flops) for b, f in passes)
    by_bytes = sum(b for b, _ in passes) / rates.bytes >= sum(f for _, f in passes) / rates.flops
    return {"ms": ms, "bytes": sum(b for b, _ in passes), "flops": sum(f for _, f in passes),
            "bound": "bytes" if by_bytes else "arithmetic"}
