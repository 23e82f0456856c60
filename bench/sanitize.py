"""One call of every kernel that serves a shape by default, forward and backward (each by roles too) and one token at a time,
for a tool to watch:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool initcheck python -m gdn_ir.bench.sanitize

(memcheck and racecheck likewise; without torch's cache of memory, a buffer that torch hands out is one that CUDA knows.
initcheck does not see what TMA stores. So all memory that roles and kernels beside them are given is full of NaN before, and
says nothing of what these read: their results must be those that Triton alone makes, which it watches.)
"""
from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from gdn_ir import registry
from gdn_ir.bench import gradients, inputs
from gdn_ir.bench.errors import relative
from gdn_ir.compiler import Instance, variant
from gdn_ir.coverage import Cell, Layout
from gdn_ir.ops import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.schedules.adjoints import TURNS as CUT, in_segments
from gdn_ir.schedules.defaults import TURNS, backward_by_roles, forward_by_roles, segmented, whole_scans
from gdn_ir.schedules.role_backward import WAYS
from gdn_ir.schedules.role_solve import SHORT, WALK
from gdn_ir.schedules.schedule import Schedule

Tensors = dict[str, torch.Tensor]
NEAR = 2e-2                                                # two results of one input, each 3e-3 to 6e-3 off the exact one
LENGTHS = [130, 64, 0, 71, 37]                             # whole chunks, ragged ends, no token; the last is nobody's


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
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
        found: Tensors = {"o": o, "final_state": S, "one token": last}
        found |= {f"d {n}": d for n, d in zip((*leaves, "initial_state"), grads, strict=True)}
    if torch.cuda.get_device_capability()[0] == 9:
        found |= on_hopper({n: t.detach()[0] for n, t in leaves.items()} | {"initial_state": state.detach()}, x["cu_seqlens"])
    torch.cuda.synchronize()
    for name, t in found.items():
        if not bool(t.isfinite().all()):
            raise SystemExit(f"{name} is not finite")
        like = name.split(", ")[0]                         # what Triton alone made of the same
        if name != like and (off := relative(t, found[f"{like}, by triton"])) > NEAR:
            raise SystemExit(f"{name} is off by {off:.1e}; accepts {NEAR:.0e}")


def on_hopper(x: Tensors, ends: torch.Tensor) -> Tensors:
    """What is made there in segments of two chunks, by Triton alone; and each way of roles."""
    instance = Instance(Switches(initial_state=True, final_state=True), 128, 128, "bf16", "bf16", True)
    found = forward_by(instance, [segmented("sm_90", instance, 2)], x, ends)
    found |= backward_by(lambda i: [in_segments(whole_scans("sm_90", i, 4, 4, "triton", merges=TURNS)[0], i, 2, CUT)])
    found |= {f"{n.split(', ')[0]}, by triton": t for n, t in found.items()}
    made = ((False, WALK), (False, SHORT), (True, WALK))   # inverses beside the scan, and chunks of a walk that makes them
    ways = [replace(how, segment=2) if how.segment else how for how in WAYS.values()]
    with gradients.full_of_nan():
        found |= forward_by(instance, [forward_by_roles(instance, cut, *how) for cut in (0, 2) for how in made], x, ends)
        return found | backward_by(lambda i: [backward_by_roles(i, how) for how in ways])


def forward_by(instance: Instance, schedules: list[Schedule], x: Tensors, ends: torch.Tensor) -> Tensors:
    """What forwards make of the same by these schedules. Outputs are full of NaN before."""
    found: Tensors = {}
    for schedule in schedules:
        out = {n: torch.full_like(x[like], math.nan) for n, like in (("o", "v"), ("final_state", "initial_state"))}
        chosen = variant(instance, schedule, "tilelang" if schedule.name.startswith("roles") else "triton", "sm_90")
        chosen(x | out, 128 ** -0.5, len(ends) - 1, ends)
        found |= {f"{n}, {schedule.name}": t for n, t in out.items()}
    return found


def backward_by(schedules: Callable[[Instance], list[Schedule]]) -> Tensors:
    """All gradients, by these schedules."""
    cell = Cell("sanitized", Switches(), "bf16", Layout((*LENGTHS[:-1],), True, 2, 4, 128, 128))
    instance, x = gradients.backward_of(cell), gradients.make(cell, "cuda", tail=LENGTHS[-1])
    found: Tensors = {}
    for schedule in schedules(instance):
        made = gradients.run(variant(instance, schedule, "triton", "sm_90"), cell, x)
        found |= {f"{n}, {schedule.name}": t for n, t in made.items()}
    return found


if __name__ == "__main__":
    main()
