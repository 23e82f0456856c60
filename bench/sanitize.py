"""One call of every kernel that serves a shape by default, forward and backward (each by roles too) and one token at a time,
for a tool to watch:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool initcheck python -m gdn_ir.bench.sanitize

(memcheck and racecheck likewise; without torch's cache of memory, a buffer that torch hands out is one that CUDA knows.
initcheck does not see what TMA stores, and the backward reads such: --no-roles leaves those out.)
"""
from __future__ import annotations

import argparse
import math
from dataclasses import replace
from typing import Any

import torch

from gdn_ir import registry
from gdn_ir.bench import gradients, inputs
from gdn_ir.compiler import Instance, variant
from gdn_ir.coverage import Cell, Layout
from gdn_ir.ops import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.schedules.adjoints import TURNS as CUT, in_segments
from gdn_ir.schedules.defaults import TURNS, backward_by_roles, forward_by_roles, whole_scans
from gdn_ir.schedules.role_backward import WAYS
from gdn_ir.schedules.role_solve import SHORT, WALK

LENGTHS = [130, 64, 0, 71, 37]                             # whole chunks, ragged ends, no token; the last is nobody's


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--no-roles", action="store_true", help="the backward's scans by Triton alone")
    roles = not p.parse_args().no_roles
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
        found = {"o": o, "final_state": S, "one token": last}
        found |= {f"d {n}": d for n, d in zip((*leaves, "initial_state"), grads, strict=True)}
    if torch.cuda.get_device_capability()[0] == 9:
        found |= by_roles({n: t[0] for n, t in leaves.items()} | {"initial_state": state}, x["cu_seqlens"])
        found |= backward_more(roles)
    torch.cuda.synchronize()
    for name, t in found.items():
        if not bool(t.isfinite().all()):
            raise SystemExit(f"{name} is not finite")


def by_roles(x: dict[str, torch.Tensor], ends: torch.Tensor) -> dict[str, torch.Tensor]:
    """What roles make of the same: whole sequences, segments of two chunks, and with the inverses among what they make.
    (initcheck does not see what TMA stores: outputs are full of NaN before.)"""
    x = {n: t.detach() for n, t in x.items()}
    instance = Instance(Switches(initial_state=True, final_state=True), 128, 128, "bf16", "bf16", True)
    found: dict[str, torch.Tensor] = {}
    for segment in (0, 2):
        for one, chunks in ((False, WALK), (False, SHORT), (True, WALK)):
            schedule = forward_by_roles(instance, segment, one, chunks)
            out = {n: torch.full_like(x[like], math.nan) for n, like in (("o", "v"), ("final_state", "initial_state"))}
            variant(instance, schedule, "tilelang", "sm_90")(x | out, 128 ** -0.5, len(ends) - 1, ends)
            found |= {f"{n}, {schedule.name}": t for n, t in out.items()}
    return found


def backward_more(roles: bool) -> dict[str, torch.Tensor]:
    """What serves a backward elsewhere: segments of two chunks, and each way of roles."""
    cell = Cell("sanitized", Switches(), "bf16", Layout((*LENGTHS[:-1],), True, 2, 4, 128, 128))
    instance, x = gradients.backward_of(cell), gradients.make(cell, "cuda", tail=LENGTHS[-1])
    ways = (replace(how, segment=2) if how.segment else how for how in WAYS.values())
    cut = in_segments(whole_scans("sm_90", instance, 4, 4, "triton", merges=TURNS)[0], instance, 2, CUT)
    found: dict[str, torch.Tensor] = {}
    for schedule in (cut, *(backward_by_roles(instance, how) for how in ways if roles)):
        made = gradients.run(variant(instance, schedule, "triton", "sm_90"), cell, x)
        found |= {f"{n}, {schedule.name}": t for n, t in made.items()}
    return found


if __name__ == "__main__":
    main()
