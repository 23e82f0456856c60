"""Torch ops, with flash-linear-attention's names and arguments."""
from gdn_ir.ops import gradients  # noqa: F401  (registers the backward)
from gdn_ir.ops.chunk import chunk_gated_delta_rule
from gdn_ir.ops.recurrent import fused_recurrent_gated_delta_rule

__all__ = ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"]
