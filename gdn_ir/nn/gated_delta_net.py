"""The Gated DeltaNet block (arXiv 2412.06464): projections, short convolutions, gates, the op, a gated norm."""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from gdn_ir.compiler import LARGEST
from gdn_ir.nn.parts import GatedRMSNorm, ShortConvolution, convolve, last_tokens
from gdn_ir.ops import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

Tensor = torch.Tensor


class State(NamedTuple):
    """What a layer carries from one call to the next, of N sequences. recurrent: [N, heads, K, V] float32. conv: the last
    inputs of the short convolutions, [N, conv_size - 1, channels of q, k and v together]; None without them."""
    recurrent: Tensor
    conv: Tensor | None


class GatedDeltaNet(nn.Module):
    """The token mixer, with the parameters of flash-linear-attention's layer of this name: its state_dict loads.

    hidden_size: D of the input [B, T, D]. head_dim: K of each of num_heads query and key heads. expand_v: V over K.
    num_v_heads: value heads, a multiple of num_heads (None: as many). K a multiple of 16 up to 256, V a multiple of 16, past
    256 of 256. use_gate: the output is gated. use_short_conv, conv_size, conv_bias: the causal convolutions over q, k and v.
    allow_neg_eigval: beta in (0, 2). output_gate_activation: "silu" ("swish") or "sigmoid". A_log and dt_bias are marked
    `_no_weight_decay`. Raises ValueError naming an argument that does not fit.
    """

    def __init__(self, hidden_size: int = 2048, expand_v: float = 2, head_dim: int = 256, num_heads: int = 6,
                 num_v_heads: int | None = None, use_gate: bool = True, use_short_conv: bool = True,
                 allow_neg_eigval: bool = False, conv_size: int = 4, conv_bias: bool = False, norm_eps: float = 1e-5,
                 output_gate_activation: str = "swish") -> None:
        super().__init__()
        heads, K = num_heads if num_v_heads is None else num_v_heads, head_dim
        V = round(head_dim * expand_v)
        for name, value, ok, accepts in (
                ("head_dim", K, 0 < K <= LARGEST and K % 16 == 0, f"a multiple of 16 from 16 to {LARGEST}"),
                ("expand_v", expand_v, math.isclose(V, K * expand_v) and V > 0 and V % (16 if V <= LARGEST else LARGEST) == 0,
                 f"a factor that makes head_dim = {K} a multiple of 16, past {LARGEST} of {LARGEST}"),
                ("num_heads", num_heads, num_heads > 0, "a positive number"),
                ("num_v_heads", heads, num_heads > 0 and heads > 0 and heads % num_heads == 0, f"a multiple of {num_heads}"),
                ("conv_size", conv_size, conv_size > 1, "at least 2")):
            if not ok:
                raise ValueError(f"{name}: got {value}; accepts {accepts}")
        self.K, self.V, self.heads, self.conv_size, self.allow_neg_eigval = K, V, heads, conv_size, allow_neg_eigval
        self.parts = max(1, V // LARGEST)                  # columns of V are independent: a wide head runs as several
        self.sizes = [num_heads * K, num_heads * K, heads * V]
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(hidden_size, size, bias=False) for size in self.sizes)
        self.a_proj, self.b_proj = (nn.Linear(hidden_size, heads, bias=False) for _ in range(2))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1e-4, 16).log())
        dt = torch.exp(torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)))
        self.dt_bias = nn.Parameter(torch.log(torch.expm1(dt)))                      # softplus gives dt back
        for p in (self.A_log, self.dt_bias):
            p._no_weight_decay = True                      # type: ignore[attr-defined]
        self.use_short_conv = use_short_conv
        if use_short_conv:
            self.q_conv1d, self.k_conv1d, self.v_conv1d = (ShortConvolution(n, conv_size, conv_bias) for n in self.sizes)
        self.g_proj = nn.Linear(hidden_size, heads * V, bias=False) if use_gate else None
        self.o_norm = GatedRMSNorm(V, norm_eps, output_gate_activation)
        self.o_proj = nn.Linear(heads * V, hidden_size, bias=False)

    def forward(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None, use_cache: bool = False) \
            -> tuple[Tensor, State | None]:
        """x [B, T, D], state of B sequences; or B = 1 and N packed sequences with boundaries cu_seqlens [N + 1]. Returns
        [B, T, D], and the state after the last tokens (None without use_cache), to be given to the next call. Calls of one
        token run by the recurrent op. Raises ValueError naming what does not fit."""
        self._check(x, state, cu_seqlens)
        mixed = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)
        conv = None
        if self.use_short_conv:
            three = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
            weight = torch.cat([c.weight for c in three])
            bias = None if three[0].bias is None else torch.cat([c.bias for c in three if c.bias is not None])
            past = None if state is None else state.conv
            if use_cache:
                conv = last_tokens(mixed, self.conv_size, past, cu_seqlens)
            mixed = convolve(mixed, weight, bias, past, cu_seqlens)
        q, k, v = F.silu(mixed).split(self.sizes, -1)
        a, b = self.a_proj(x), self.b_proj(x)
        gates: tuple[Tensor, ...] = (a, b, self.A_log, self.dt_bias)
        if self.parts > 1:
            gates = tuple(y.repeat_interleave(self.parts, -1) for y in gates)
        a, b, A_log, dt_bias = gates
        op = fused_recurrent_gated_delta_rule if x.shape[1] == 1 and cu_seqlens is None else chunk_gated_delta_rule
        o, recurrent = op(q.unflatten(-1, (-1, self.K)), k.unflatten(-1, (-1, self.K)),
                          v.unflatten(-1, (-1, self.V // self.parts)), g=a, beta=b,
                          initial_state=None if state is None else state.recurrent, output_final_state=use_cache,
                          use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True, allow_neg_eigval=self.allow_neg_eigval,
                          cu_seqlens=cu_seqlens, use_gate_in_kernel=True, A_log=A_log, dt_bias=dt_bias)
        o = o.flatten(-2).unflatten(-1, (self.heads, self.V))
        o = self.o_norm(o, None if self.g_proj is None else self.g_proj(x).view_as(o))
        return self.o_proj(o.flatten(-2)), None if recurrent is None else State(recurrent, conv)

    def _check(self, x: Tensor, state: State | None, cu_seqlens: Tensor | None) -> None:
        D, packed = self.q_proj.in_features, cu_seqlens is not None
        if x.ndim != 3 or x.shape[2] != D or x.shape[1] == 0 or (packed and x.shape[0] != 1):
            raise ValueError(f"x: got {list(x.shape)}; accepts [{'1' if packed else 'B'}, T, {D}], T at least 1")
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if state is not None and state.recurrent.shape[0] != sequences:
            raise ValueError(f"state: got the state of {state.recurrent.shape[0]} sequences; accepts that of {sequences}")
