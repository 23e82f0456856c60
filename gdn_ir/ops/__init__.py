"""Torch ops."""
from gdn_ir.ops import gradients  # noqa: F401  (registers the backward)
from gdn_ir.ops.chunk import chunk_gated_delta_rule

__all__ = ["chunk_gated_delta_rule"]
