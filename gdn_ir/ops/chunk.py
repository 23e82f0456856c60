"""The op: chunk_gated_delta_rule, with flash-linear-attention's arguments."""
from __future__ import annotations

from functools import partial
from typing import Any

import torch

from gdn_ir.ops import checks, forward, gates, gradients, kinds, transforms

Tensor = torch.Tensor
KEYWORDS = ("q", "k", "v", "g", "beta", "scale", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel",
            "use_beta_sigmoid_in_kernel", "allow_neg_eigval", "state_v_first", "cu_seqlens", "cu_seqlens_cpu",
            "use_gate_in_kernel", "A_log", "dt_bias")


def chunk_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float | None = None,
                           initial_state: Tensor | None = None, output_final_state: bool = False,
                           use_qk_l2norm_in_kernel: bool = False, use_beta_sigmoid_in_kernel: bool = False,
                           allow_neg_eigval: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
                           cu_seqlens_cpu: Tensor | None = None, *, use_gate_in_kernel: bool = False,
                           A_log: Tensor | None = None, dt_bias: Tensor | None = None, **kwargs: Any) \
        -> tuple[Tensor, Tensor | None]:
    """The gated delta rule (arXiv 2412.06464) over whole sequences: o_t = scale S_t^T q_t, with
    S_t = exp(g_t) S_{t-1} + k_t beta_t (v_t - exp(g_t) S_{t-1}^T k_t)^T.

    q, k [B, T, H, K]; v [B, T, HV, V], HV a multiple of H; all bfloat16, float16 or float32 (float64 on the torch backend);
    K and V multiples of 16 up to 256. g [B, T, HV]: natural log of the decay (None: no decay); below -100, where exp(g) is 0 in
    float32, it counts as -100. beta [B, T, HV]: write strength.
    scale: of q, K^-1/2 if None. initial_state [N, HV, K, V] float32 ([N, HV, V, K] with state_v_first), float64 where q is.
    use_qk_l2norm_in_kernel: q and k are normalised over K first. use_beta_sigmoid_in_kernel: beta comes as a logit; with
    allow_neg_eigval it is doubled. use_gate_in_kernel: g comes raw, and the log decay is -exp(A_log) softplus(g + dt_bias),
    with A_log [HV] and dt_bias [HV] or None; torch computes it in float32 before the op. cu_seqlens [N + 1], int32 or int64:
    boundaries of N packed sequences (B = 1); rows past the last come back as zeros. cu_seqlens_cpu: the same on the host, only
    to be checked.

    Returns o [B, T, HV, V] in q's dtype and the final state (None unless output_final_state), with dtype and layout of
    initial_state. Differentiable once, in q, k, v, g, beta, initial_state, A_log and dt_bias, through both results; only
    gradients that are asked for are computed (a gradient of a gradient raises NotImplementedError, and so do forward-mode
    derivatives and torch.func.grad). Under autocast q, k and v are cast to its dtype, as for a matrix product; g and states
    stay float32, beta as it is. torch.func.vmap joins the mapped dimension to the batch (not with cu_seqlens). Bad input
    raises TypeError or ValueError before anything is launched.
    """
    checks.keywords("chunk_gated_delta_rule", kwargs, KEYWORDS)
    return call("chunk_gated_delta_rule", False, q, k, v, g, beta, scale, initial_state, output_final_state,
                use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, cu_seqlens,
                cu_seqlens_cpu, use_gate_in_kernel, A_log, dt_bias)


def call(op: str, recurrent: bool, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float | None,
         initial_state: Tensor | None, final_state: bool, l2norm: bool, beta_sigmoid: bool, neg_eigval: bool,
         state_v_first: bool, cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None, gate: bool, A_log: Tensor | None,
         dt_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What every public op does: check, apply torch's transforms, call the custom op, or what is below it where torch has
    nothing to do between the two. op: its name; recurrent: one token at a time."""
    if not (type(final_state) is type(l2norm) is type(beta_sigmoid) is type(neg_eigval) is type(state_v_first) is type(gate)
            is bool):
        checks.flags(output_final_state=final_state, use_qk_l2norm_in_kernel=l2norm, use_beta_sigmoid_in_kernel=beta_sigmoid,
                     allow_neg_eigval=neg_eigval, state_v_first=state_v_first, use_gate_in_kernel=gate)
    direct = transforms.direct(q, k, v, g, beta, initial_state, cu_seqlens, cu_seqlens_cpu, A_log, dt_bias)
    if not direct and isinstance(q, Tensor) and q.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(q.device.type):
        q, k, v = transforms.cast(q, k, v)
    kind = kinds.of(q, k, v, g, beta, initial_state, cu_seqlens, cu_seqlens_cpu, state_v_first)
    if gate or A_log is not None or dt_bias is not None:
        checks.gate(g, gate, A_log, dt_bias, kind.sizes["HV"], q.device)
    if neg_eigval and not beta_sigmoid:
        raise ValueError("allow_neg_eigval: got True without use_beta_sigmoid_in_kernel; accepts it only where the op itself "
                         "makes beta (otherwise pass a doubled beta)")
    if not direct:
        transforms.refuse(op, q, k, v, g, beta, initial_state, A_log, dt_bias)
    scale = kind.sizes["K"] ** -0.5 if scale is None else checks.number("scale", scale)
    if gate:
        assert g is not None and A_log is not None
        g = gates.log_decay(g, A_log, dt_bias, kinds.wide(q))
        kind = kinds.of(q, k, v, g, beta, initial_state, cu_seqlens, cu_seqlens_cpu, state_v_first)
    arguments = (q, k, v, g, beta, scale, initial_state, cu_seqlens, cu_seqlens_cpu, final_state, l2norm, beta_sigmoid,
                 neg_eigval, state_v_first, recurrent)
    if direct:
        return gradients.recorded(partial(forward.run, kind), *arguments)
    o, state = forward.FORWARD(*arguments)
    return o, state if final_state else None
