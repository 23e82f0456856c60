"""The schedule for a call that nobody tuned: chosen from the architecture and the shape, and able to say why."""
from __future__ import annotations

from typing import TYPE_CHECKING

from gdn_ir.schedules.plans import plan
from gdn_ir.schedules.schedule import KernelOptions, Schedule

if TYPE_CHECKING:
    from gdn_ir.compiler import Instance


def default(arch: str, instance: Instance, sequences: int, heads: int, tokens: int) -> tuple[Schedule, str]:
    """The schedule, and the reason for it. arch: "sm_80", "sm_90" or "cpu"; sequences, heads (HV), tokens: of the call."""
    erase, io = instance.switches.erase, instance.io
    if arch == "cpu":
        return Schedule("fused", steps=plan("fused", erase, io)), "cpu: one pass over the chunks, the whole grid at once"
    kernels = (("*", KernelOptions(v_tile=64, num_warps=4, num_stages=2)),)
    return Schedule("states", steps=plan("states", erase, io), kernels=kernels), f"{arch}: default"
