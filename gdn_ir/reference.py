"""The oracle: the token recurrence in plain torch, one token at a time (arXiv 2412.06464, eq. 10; shared notation).

    S <- exp(g_t) S;  u_t = beta_t (v_t - S^T k_t);  S <- S + k_t u_t^T;  o_t = scale S^T q_t

Nothing here is shared with the compiler. It runs in float64 and is differentiable.
"""
from __future__ import annotations

import torch
from einops import repeat

Tensor = torch.Tensor


def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float | None = None,
               initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None, erase: bool = True,
               l2norm: bool = False, beta_sigmoid: bool = False, neg_eigval: bool = False) -> tuple[Tensor, Tensor]:
    """q, k [B, T, H, K]; v [B, T, HV, V]; g (None: no decay), beta [B, T, HV]; initial_state [N, HV, K, V];
    cu_seqlens [N + 1] with B = 1. Returns o [B, T, HV, V] and the final state [N, HV, K, V], both float64."""
    q, k, v, beta = (x.to(torch.float64) for x in (q, k, v, beta))
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    if l2norm:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    if beta_sigmoid:
        beta = torch.sigmoid(beta)
    if neg_eigval:
        beta = 2 * beta
    q, k = (repeat(x, "b t h k -> b t (h group) k", group=HV // H) for x in (q, k))
    scale = K ** -0.5 if scale is None else scale
    decay = torch.ones_like(beta) if g is None else torch.exp(g.to(torch.float64))

    def sequence(b: int, start: int, end: int, S: Tensor) -> tuple[Tensor, Tensor]:
        out = []
        # tokens are taken apart once: an index for each would, backwards, fill all of a tensor for every token
        for q_t, k_t, v_t, beta_t, decay_t in zip(*(x[b, start:end].unbind() for x in (q, k, v, beta, decay)), strict=True):
            S = S * decay_t[:, None, None]
            read = torch.einsum("hkv,hk->hv", S, k_t) if erase else 0.0
            u = beta_t[:, None] * (v_t - read)
            S = S + k_t[:, :, None] * u[:, None, :]
            out.append(scale * torch.einsum("hkv,hk->hv", S, q_t))
        return (torch.stack(out) if out else v.new_zeros(0, HV, V)), S

    ends = [(b, 0, T) for b in range(B)] if cu_seqlens is None else \
        [(0, int(s), int(e)) for s, e in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)]
    zero = v.new_zeros(HV, K, V)
    outs, states = [], []
    for n, (b, s, e) in enumerate(ends):
        o, S = sequence(b, s, e, zero if initial_state is None else initial_state[n].to(torch.float64))
        outs.append(o)
        states.append(S)
    o = torch.cat(outs) if outs else v.new_zeros(0, HV, V)
    if cu_seqlens is not None and o.shape[0] < T:                # rows past the last sequence are padding
        o = torch.cat([o, v.new_zeros(T - o.shape[0], HV, V)])
    return o.reshape(B, T, HV, V), torch.stack(states) if states else v.new_zeros(0, HV, K, V)
