"""One call of every kernel that serves a shape by default, forward, backward and one token at a time, for a tool to watch:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool initcheck python -m gdn_ir.bench.sanitize

(memcheck and racecheck likewise; without torch's cache of memory, a buffer that torch hands out is one that CUDA knows.)
"""
from __future__ import annotations

from typing import Any

import torch

from gdn_ir import registry
from gdn_ir.bench import inputs
from gdn_ir.ops import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

LENGTHS = [130, 64, 0, 71, 37]                             # whole chunks, ragged ends, no token; the last is nobody's


def main() -> None:
    x = inputs.make(LENGTHS, 2, 4, 128, 128)
    x["cu_seqlens"], x["initial_state"] = x["cu_seqlens"][:-1], x["initial_state"][:-1]
    leaves: dict[str, Any] = {n: x[n][None].requires_grad_() for n in ("q", "k", "v", "g", "beta")}
    state = x["initial_state"].requires_grad_()
    with registry.use("triton"):
        o, S = chunk_gated_delta_rule(**leaves, initial_state=state, output_final_state=True, cu_seqlens=x["cu_seqlens"])
        assert S is not None
        grads = torch.autograd.grad((o.float().square().sum() + S.square().sum()), [*leaves.values(), state])
        with torch.no_grad():
            one = {n: t[:, :1].contiguous() for n, t in leaves.items()}
            last, _ = fused_recurrent_gated_delta_rule(**one, initial_state=S[:1], output_final_state=True)
    torch.cuda.synchronize()
    for name, t in zip(("o", "final_state", *leaves, "initial_state", "one token"), (o, S, *grads, last), strict=True):
        if not bool(t.isfinite().all()):
            raise SystemExit(f"{name} is not finite")


if __name__ == "__main__":
    main()
