"""What emitted torch kernels call: memory that is read by index tensors and written once, so that autograd can follow."""
from __future__ import annotations

import math

import torch

from gdn_ir.backends.base import TORCH

Index = tuple["torch.Tensor | int", ...]


class Memory:
    """A tensor of the program. Writes are gathered and applied together when the tensor is next read: one copy of it for
    a whole scan, and a graph that autograd can follow."""

    def __init__(self, value: torch.Tensor | None, shape: tuple[int, ...], dtype: str, device: torch.device) -> None:
        self.base, self.shape, self.dtype, self.device = value, shape, TORCH[dtype], device
        self.pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.summed = False

    def value(self) -> torch.Tensor:
        """The tensor, with all writes applied. Where nothing was written it holds what it held, or zero."""
        if self.pending:
            index = torch.cat([i for i, _ in self.pending])
            values = torch.cat([v for _, v in self.pending])
            count = math.prod(self.shape) // max(1, values.shape[1])
            before = self.base.reshape(count, -1) if self.base is not None and not self.summed else values.new_zeros(count, 1)
            # one more row takes what lies past the end of its sequence
            rows = torch.cat([before.expand(count, values.shape[1]), values.new_zeros(1, values.shape[1])])
            self.base = rows.index_put((index,), values, accumulate=self.summed)[:count].reshape(self.shape)
            self.pending = []
        if self.base is None:
            self.base = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return self.base

    def load(self, dims: tuple[int, ...], index: Index, mask: torch.Tensor | None = None,
             members: tuple[int, int] | None = None) -> torch.Tensor:
        """The tiles at `index`, one entry for each of the tensor's dimensions `dims`; the others stay whole and last.
        Zero where the mask (over the index's shape) is false. members (d, n): dimension d is first summed in n groups."""
        x = self.value()
        if members:
            x = x.unflatten(members[0], (members[1], -1)).sum(members[0] + 1)
        rest = [d for d in range(x.ndim) if d not in dims]
        tile = x.permute(*dims, *rest)[index] if dims else x
        return tile if mask is None else torch.where(mask[(...,) + (None,) * len(rest)], tile, 0)

    def store(self, index: Index, value: torch.Tensor, batch: tuple[int, ...], mask: torch.Tensor | None = None,
              add: bool = False) -> None:
        """Write tiles at `index`, an entry for each of the first dimensions; `value` has the batch's dimensions (or fewer,
        repeated), then the indexed tile axis, then the rest. `add`: writes to one place are summed."""
        at: torch.Tensor | int = 0
        for i, size in zip(index, self.shape, strict=False):
            at = at * size + i
        flat = torch.as_tensor(at, device=value.device)
        count = math.prod(self.shape[:len(index)])
        flat = flat if mask is None else torch.where(mask, flat, count)
        rest = self.shape[len(index):]
        lead = torch.broadcast_shapes(flat.shape, batch + (1,) * (flat.ndim - len(batch)))
        self.summed |= add
        self.pending.append((flat.expand(lead).reshape(-1), value.expand(*lead, *rest).reshape(-1, math.prod(rest))))


def bounds(cu: torch.Tensor | None, T: int, N: int, rank: int, device: torch.device) \
        -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Of each sequence: its number, first token and length, over `rank` batch dimensions; and the longest length (of
    sequences on a GPU the number of tokens: reading it would make the host wait)."""
    n = torch.arange(N, device=device).reshape(-1, *[1] * (rank - 1))
    if cu is None:
        return n, n * T, torch.full_like(n, T), T
    ends = cu.to(torch.int64).clamp(0, T)
    first, end = ends[:-1], torch.maximum(ends[1:], ends[:-1])
    length = end - first
    longest = (int(length.max()) if N else 0) if device.type == "cpu" else T
    return n, first.reshape(n.shape), length.reshape(n.shape), longest


def solve(m: torch.Tensor, r: torch.Tensor, block: int | None = None, transpose: bool = False) -> torch.Tensor:
    """u [..., C, D] with (I + M) u = r, M [..., C, C] strictly lower; `transpose` solves with (I + M)^T."""
    if block:
        at = torch.arange(m.shape[-1], device=m.device) // block
        m = torch.where(at[:, None] == at, m, 0)
    u: torch.Tensor = torch.linalg.solve_triangular(m.mT if transpose else m, r, upper=transpose, unitriangular=True)
    return u


def spread(x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """x, with its last dimensions repeated up to `sizes`."""
    return x.expand(*x.shape[:x.ndim - len(sizes)], *sizes)
