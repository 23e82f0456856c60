"""The derived backward with both of its scans in segments: the schedule, and where it should be the fastest."""
from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gdn_ir.schedules.plans import backward_plan
from gdn_ir.schedules.schedule import KernelOptions, Schedule

if TYPE_CHECKING:
    from gdn_ir.compiler import Instance

LENGTHS = (16, 32, 64, 128)                                # chunks that a segment may have
WORTH = 0.85                                               # of the time of whole scans, beside which other kernels run


def in_segments(base: Schedule, instance: Instance, segment: int) -> Schedule:
    """The plan "segments", with that many chunks to a segment, and for the kernels that "grouped" has too the options of
    `base`. Segments are stored beside each other, so that nothing follows their scans. Wide tiles, for there are blocks enough,
    and two stages of the adjoint's loads, so that two blocks have a multiprocessor."""
    steps = backward_plan("segments", instance.program, instance.io, keep=instance.keep, beta=instance.beta, segment=segment)
    chosen = {k: replace(o, follows=False) for k, o in base.kernels}
    moves = instance.switches.erase or instance.switches.decay != "none"           # a state, but for what is added to it
    for prefix in (str(s[4]) for s in steps if s[0] == "segment"):
        name = prefix.removesuffix("_")
        scan = KernelOptions(32, 4, 2 if name == "back" else 3)
        chosen |= {name: scan, f"{prefix}offset": replace(scan, follows=moves), f"{prefix}compose": KernelOptions(32, 8, 1)}
        chosen |= {f"{prefix}transition": scan} if moves else {}                   # beside the offset: neither reads the other
        chosen |= {f"{prefix}reach": KernelOptions(None, 1, 1)} if any(s[0] == "forget" for s in steps) else {}
    return Schedule(f"backward-segments-{segment}", steps=steps).with_options(**chosen)


def forgets(instance: Instance) -> bool:
    """Whether there is a decay, and a kernel that knows what has faded: without, all of each transition is computed."""
    return instance.switches.erase and instance.switches.decay != "none"


def segment_of(sequences: int, heads: int, tokens: int, units: int) -> int:
    """Chunks of a segment, one of LENGTHS; 0 where sequences should stay whole. By what an H100 takes, in microseconds, for the
    two scans: a chunk 1.75 and 2 where blocks have a multiprocessor to themselves, half as much again where two share it; what
    has not faded of transition and offset 1.2 a chunk and scan, composing 2.5 a segment, and five more launches."""
    chunks, scans = -(-tokens // (64 * sequences)), sequences * heads

    def takes(size: int) -> float:
        segments = -(-chunks // size)
        waves = -(-segments * scans * 4 // (2 * units))    # tiles of 32 columns
        return waves * 5.6 * size + 2 * (1.2 * size + 2.5 * segments + 15)
    whole = chunks * (3.75 if scans * 4 <= units else 5.6 * -(-scans * 4 // (2 * units)))
    best = min(LENGTHS, key=takes)
    return best if best < chunks and takes(best) < WORTH * whole else 0
