"""The decode step: fused_recurrent_gated_delta_rule, the same program in chunks of one token."""
from __future__ import annotations

from typing import Any

import torch

from gdn_ir.ops import checks, chunk

Tensor = torch.Tensor
KEYWORDS = tuple(k for k in chunk.KEYWORDS if k != "cu_seqlens_cpu")


def fused_recurrent_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, gk: Tensor | None = None,
                                     gv: Tensor | None = None, beta: Tensor | None = None, scale: float | None = None,
                                     initial_state: Tensor | None = None, output_final_state: bool = False,
                                     use_qk_l2norm_in_kernel: bool = False, use_gate_in_kernel: bool = False,
                                     A_log: Tensor | None = None, dt_bias: Tensor | None = None,
                                     use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False,
                                     state_v_first: bool = False, cu_seqlens: Tensor | None = None, **kwargs: Any) \
        -> tuple[Tensor, Tensor | None]:
    """The gated delta rule, one token at a time: for decoding, where T is 1 or a few.

    Arguments and results are those of `chunk_gated_delta_rule`; beta [B, T, HV], None: 1. Decays for each channel (gk, gv) are
    not served (NotImplementedError). The result is the recurrence's, with no rounding of products to q's dtype. Differentiable
    as the chunked op is, by the same backward. Raises as that op does.
    """
    checks.keywords("fused_recurrent_gated_delta_rule", {"gk": gk, "gv": gv, **kwargs}, KEYWORDS)
    if beta is None:
        if not isinstance(v, Tensor) or v.ndim < 3:
            raise checks.bad("v", v, "a tensor [B, T, HV, V]", ValueError if isinstance(v, Tensor) else TypeError)
        if use_beta_sigmoid_in_kernel:
            raise checks.bad("beta", beta, "a tensor with use_beta_sigmoid_in_kernel", TypeError)
        beta = v.new_ones(v.shape[:3])
    return chunk.call("fused_recurrent_gated_delta_rule", True, q, k, v, g, beta, scale, initial_state, output_final_state,
                      use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, cu_seqlens, None,
                      use_gate_in_kernel, A_log, dt_bias)
