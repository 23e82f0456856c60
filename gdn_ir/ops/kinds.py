"""What is worked out once for all calls whose tensors are alike: that they pass the checks, which variant serves, on what."""
from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from gdn_ir import registry
from gdn_ir.backends.base import Call
from gdn_ir.compiler import Variant
from gdn_ir.ops import checks
from gdn_ir.providers import Offered
from gdn_ir.schedules.plans import left

Tensor = torch.Tensor
ALL = frozenset(left("states"))                            # what may be left to a backward: without a dimension of batches
MOST = 4096                                                # kinds that are remembered


class Kind:
    """Calls whose tensors have the same shapes, dtypes and devices, and passed the checks. sizes: B, T, H, HV, K, V, N.
    served: how, by flags, gradients and policies."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes
        self.served: dict[tuple[Any, ...], Serving] = {}

    @cached_property
    def nothing(self) -> bool:
        """No tokens, or no sequences."""
        return self.sizes["B"] * self.sizes["T"] == 0 or self.sizes["N"] == 0

    def serving(self, q: Tensor, g: Tensor | None, beta: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None,
                final_state: bool, l2norm: bool, beta_sigmoid: bool, neg_eigval: bool, state_v_first: bool, recurrent: bool,
                grads: tuple[str, ...], asked: str, keep: str) -> Serving:
        """What serves under policies (a backward, where `grads` names gradients)."""
        key = (final_state, l2norm, beta_sigmoid, neg_eigval, state_v_first, recurrent, grads, asked, keep)
        found = self.served.get(key)
        if found is None:
            s, dense = self.sizes, cu_seqlens is None
            chosen = registry.serving(q.device, q.dtype, beta.dtype, s["K"], s["V"], s["H"], s["HV"], s["N"], s["B"] * s["T"],
                                      not dense, g is not None, l2norm, beta_sigmoid, neg_eigval, initial_state is not None,
                                      final_state, state_v_first, recurrent, grads, asked, keep)
            found = self.served[key] = Serving(chosen, s["N"], wide(q) if g is not None and g.dtype != wide(q) else None,
                                               cu_seqlens is not None and cu_seqlens.dtype != torch.int32)
        return found


class Serving:
    """A variant, and what must be done to arguments of one kind before it runs.

    cast: the dtype that g is brought to, None where it has it. narrow: whether boundaries must become int32."""

    def __init__(self, chosen: Variant | Offered, sequences: int, cast: torch.dtype | None, narrow: bool) -> None:
        self.chosen, self.sequences, self.cast, self.narrow = chosen, sequences, cast, narrow
        self.views = not (isinstance(chosen, Variant) and chosen.compiled.by_address)
        self.call: Call | None = None                      # its sizes, once there was one

    def __call__(self, tensors: dict[str, Tensor], scale: float, cu_seqlens: Tensor | None) -> None:
        """tensors: as the op has them, [B, T, ...], states [N, ...], and what is left to a backward; outputs contiguous."""
        if self.cast is not None:
            tensors["g"] = tensors["g"].to(self.cast)
        for name, x in tensors.items():
            x = x.contiguous()
            tensors[name] = x.flatten(0, 1) if self.views and not name.endswith("state") and name not in ALL else x
        if cu_seqlens is not None:
            cu_seqlens = (cu_seqlens.to(torch.int32) if self.narrow else cu_seqlens).contiguous()
        if isinstance(self.chosen, Offered):
            self.chosen(tensors, scale, self.sequences, cu_seqlens)
            return
        if self.call is None:
            self.call = self.chosen.call_of(tensors, self.sequences, cu_seqlens).bounded(None)
        self.chosen.run(tensors, scale, self.call if cu_seqlens is None else self.call.bounded(cu_seqlens))


def wide(x: Tensor) -> torch.dtype:
    """The dtype of decays and states beside x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def of(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, initial_state: Tensor | None,
       cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None, state_v_first: bool) -> Kind:
    """The kind of a call. Raises what the checks raise; tensors like those that passed before are not looked at again."""
    given = (q, k, v, g, beta, initial_state, cu_seqlens, cu_seqlens_cpu)
    if torch.compiler.is_compiling():                      # sizes are symbols there, and may not become keys
        return Kind(checks.inputs(*given, state_v_first))
    try:
        key = (q.shape, q.dtype, q.device, q.layout, k.shape, k.dtype, k.device, k.layout,
               v.shape, v.dtype, v.device, v.layout, beta.shape, beta.dtype, beta.device, beta.layout,
               None if g is None else (g.shape, g.dtype, g.device, g.layout),
               None if initial_state is None else (initial_state.shape, initial_state.dtype, initial_state.device,
                                                   initial_state.layout, state_v_first),
               None if cu_seqlens is None else (cu_seqlens.shape, cu_seqlens.dtype, cu_seqlens.device, cu_seqlens.layout),
               None if cu_seqlens_cpu is None else (cu_seqlens_cpu.shape, cu_seqlens_cpu.dtype, cu_seqlens_cpu.device,
                                                    cu_seqlens_cpu.layout))
        found: Kind | None = registry.prepared.get(key)
    except (AttributeError, TypeError):                    # something else than a tensor: the checks will say so
        return Kind(checks.inputs(*given, state_v_first))
    if found is None:
        found = Kind(checks.inputs(*given, state_v_first))
        if len(registry.prepared) >= MOST:
            registry.prepared.clear()
        registry.prepared[key] = found
    return found
