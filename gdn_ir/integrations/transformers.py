"""Qwen3-Next and Qwen3.5 models of Hugging Face transformers on these kernels.

    import gdn_ir.integrations.transformers
    gdn_ir.integrations.transformers.enable()

A model's file calls two functions by name, one for prefill and training, one for decoding. `enable` puts ours under these
names, so that models made before and after are served alike; `disable` puts back what was there.
"""
from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from gdn_ir import ops
from gdn_ir.integrations import common

Tensor = torch.Tensor
MODELS = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
NAMES = {"torch_chunk_gated_delta_rule": False, "torch_recurrent_gated_delta_rule": True}      # True: one token at a time
_replaced: list[tuple[ModuleType, str, Any]] = []


def enable(models: Sequence[str] = MODELS) -> None:
    """Serve the gated delta rule of these models (folders of `transformers.models`) where gdn_ir can; what transformers had
    serves the rest, with a warning for each reason. Raises ImportError where transformers or a model is missing,
    RuntimeError where a model's file does not call the functions that this replaces."""
    found = []
    for model in models:
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        for name, recurrent in NAMES.items():
            if not hasattr(module, name):
                version = importlib.metadata.version("transformers")
                raise RuntimeError(f"transformers {version}: {module.__name__} has no {name}; this was written for 5.24")
            found.append((module, name, recurrent))
    for module, name, recurrent in found:
        if not any(m is module and n == name for m, n, _ in _replaced):
            original = getattr(module, name)
            _replaced.append((module, name, original))
            setattr(module, name, _served(original, recurrent))


def disable() -> None:
    """Leave every model's file as it was before `enable`."""
    while _replaced:
        module, name, original = _replaced.pop()
        setattr(module, name, original)


def _served(original: Any, recurrent: bool) -> Any:
    op = ops.fused_recurrent_gated_delta_rule if recurrent else ops.chunk_gated_delta_rule

    @functools.wraps(original)
    def served(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, *args: Any,
               initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
               cu_seqlens: Tensor | None = None, **kwargs: Any) -> Any:
        reason = "arguments by position" if args else common.declined(query, value, g, beta, initial_state, recurrent)
        if reason is not None:
            common.warn("transformers", original.__name__, reason)
            return original(query, key, value, g, beta, *args, initial_state=initial_state, cu_seqlens=cu_seqlens,
                            output_final_state=output_final_state, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **kwargs)
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        state = None if initial_state is None else initial_state.to(wide)
        return op(query, key, value, g=g, beta=beta, initial_state=state, output_final_state=output_final_state,
                  use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, cu_seqlens=cu_seqlens)
    return served
