"""flash-linear-attention's layers and models on these kernels, through its own registry of backends.

    import gdn_ir.integrations.fla
    gdn_ir.integrations.fla.enable()

From then on `fla.ops.chunk_gated_delta_rule` asks gdn_ir first, gates and beta in the kernel included. Its
`fused_recurrent_gated_delta_rule` has no registry in FLA 0.6.0: the name is replaced in FLA's own modules.
"""
from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

import torch

from gdn_ir import ops
from gdn_ir.integrations import common

Tensor = torch.Tensor
RECURRENT = "fused_recurrent_gated_delta_rule"
_enabled = False
_registered = False
_replaced: dict[str, Any] = {}                             # modules whose name was replaced, and what they had


def enable() -> None:
    """Serve FLA's gated delta rule where gdn_ir can; FLA serves the rest as before (its log says why). Raises ImportError
    without FLA, RuntimeError where its registry is switched off."""
    global _enabled
    backends = importlib.import_module("fla.backends")
    if getattr(backends, "_DISPATCH_DISABLED", False):
        raise RuntimeError("FLA_DISABLE_BACKEND_DISPATCH=1: FLA asks no backend; unset it before fla is imported")
    importlib.import_module("fla.layers.gated_deltanet")   # the op, its registry, and who uses the recurrent one
    _register(backends)
    _enabled = True
    original = importlib.import_module("fla.ops.gated_delta_rule.fused_recurrent").__dict__[RECURRENT]
    if _replaced:
        return
    ours = _recurrent(original)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "fla" and getattr(module, "__dict__", {}).get(RECURRENT) is original:
            _replaced[name] = original
            setattr(module, RECURRENT, ours)


def disable() -> None:
    """Leave FLA as it was before `enable`."""
    global _enabled
    _enabled = False
    for name, original in _replaced.items():
        setattr(sys.modules[name], RECURRENT, original)
    _replaced.clear()


def _register(backends: Any) -> None:
    global _registered
    if _registered:
        return

    class GdnIR(backends.BaseBackend):                     # type: ignore[misc]
        backend_type = "gdn_ir"
        package_name = None
        priority = 1                                       # before FlashQLA's, which has 3

        def is_enabled(self) -> bool:
            return _enabled

        def chunk_gated_delta_rule_verifier(self, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
            reason = _declined(*args, **kwargs)
            return reason is None, reason

        def chunk_gated_delta_rule(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            return _chunk(*args, **kwargs)

    backends.register("gated_delta_rule")(GdnIR)
    _registered = True


GATE = {"use_gate_in_kernel", "A_log", "dt_bias"}


def _declined(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float | None = None,
              initial_state: Tensor | None = None, *rest: Any, cp_context: object = None, **kwargs: Any) -> str | None:
    known = GATE | {"output_final_state", "use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval",
                    "state_v_first", "cu_seqlens", "cu_seqlens_cpu", "chunk_indices", "chunk_size"}
    unknown = {n for n, x in kwargs.items() if n not in known and x is not None and x is not False}
    if unknown or cp_context is not None or (len(rest) > 8 and rest[8] is not None):
        return f"{', '.join(sorted(unknown)) or 'cp_context'} is not supported"
    return common.declined(q, v, g, beta, initial_state, recurrent=False)


def _chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float | None = None,
           initial_state: Tensor | None = None, output_final_state: bool | None = False, use_qk_l2norm_in_kernel: bool = False,
           use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False, state_v_first: bool = False,
           cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None, chunk_indices: Tensor | None = None,
           cp_context: object = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return ops.chunk_gated_delta_rule(q, k, v, g, beta, scale, _wide(initial_state, q), bool(output_final_state),
                                      use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first,
                                      cu_seqlens, cu_seqlens_cpu, **_gate(kwargs))


def _gate(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The gate's parameters, where they are used: FLA reads them only then."""
    return {n: kwargs[n] for n in GATE & set(kwargs)} if kwargs.get("use_gate_in_kernel") else {}


def _wide(state: Tensor | None, q: Tensor) -> Tensor | None:
    """FLA takes states in any dtype."""
    return None if state is None else state.to(torch.float64 if q.dtype == torch.float64 else torch.float32)


def _recurrent(original: Any) -> Any:
    @functools.wraps(original)
    def fused_recurrent_gated_delta_rule(*args: Any, **kwargs: Any) -> Any:
        return (original if _step_declined(*args, **kwargs) else _step)(*args, **kwargs)
    return fused_recurrent_gated_delta_rule


def _step_declined(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, gk: Tensor | None = None, gv: Tensor | None = None,
                   beta: Tensor | None = None, scale: float | None = None, initial_state: Tensor | None = None, *rest: Any,
                   **kwargs: Any) -> str | None:
    known = GATE | {"output_final_state", "use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval",
                    "state_v_first", "cu_seqlens"}
    if gk is not None or gv is not None or beta is None or beta.ndim != 3 or len(rest) > 2 or not known >= set(kwargs):
        return "arguments beyond one decay and one beta for each head"
    return common.declined(q, v, g, beta, initial_state, recurrent=True)


def _step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, gk: None = None, gv: None = None,
          beta: Tensor | None = None, scale: float | None = None, initial_state: Tensor | None = None,
          output_final_state: bool | None = False, use_qk_l2norm_in_kernel: bool = False, **kwargs: Any) \
        -> tuple[Tensor, Tensor | None]:
    rest = {n: x for n, x in kwargs.items() if n not in GATE}
    return ops.fused_recurrent_gated_delta_rule(q, k, v, g, gk, gv, beta, scale, _wide(initial_state, q),
                                                bool(output_final_state), use_qk_l2norm_in_kernel, **rest, **_gate(kwargs))
