"""The derived backward with both of its scans in segments: the schedule, and where it should be the fastest."""
from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gdn_ir.schedules.plans import backward_plan
from gdn_ir.schedules.schedule import KernelOptions, Schedule

if TYPE_CHECKING:
    from gdn_ir.compiler import Instance

TURNS, GATHERED = "gathered-turns-segments", "gathered-segments"
PLANS = (TURNS, GATHERED, "segments")
LENGTHS = (16, 32)                                         # chunks that a segment may have (64 gains 1.4% at most)
REST = 2.9e-3                                              # microseconds a token and head of what is not scanned
WORTH, WORTH_ROLES = 0.9, 0.85                             # of the time of whole scans
UNEQUAL = 2.2                                              # the longest of several packed sequences, for one of equal ones


def in_segments(base: Schedule, instance: Instance, segment: int, plan: str = "gathered-segments") -> Schedule:
    """The plan "segments" or a kin of it, with that many chunks to a segment, and for the kernels that `base` has too (of whole
    scans, its last kernels the same) the options of that. Segments are stored beside each other, so that nothing follows their
    scans. Wide tiles, for there are blocks enough, and two stages of the adjoint's loads, so that two blocks have a
    multiprocessor. What is gathered runs beside the kernels before it where it reads nothing of these."""
    steps = backward_plan(plan, instance.program, instance.io, keep=instance.keep, beta=instance.beta, segment=segment,
                          norm=plan != "segments" and instance.switches.l2norm)
    chosen = {k: replace(o, follows=False) for k, o in base.kernels}
    moves = instance.switches.erase or instance.switches.decay != "none"           # a state, but for what is added to it
    for prefix in (str(s[4]) for s in steps if s[0] == "segment"):
        name = prefix.removesuffix("_")
        scan = KernelOptions(32, 4, 2 if name == "back" else 3)
        chosen |= {name: scan, f"{prefix}offset": replace(scan, follows=moves), f"{prefix}compose": KernelOptions(32, 8, 1)}
        chosen |= {f"{prefix}transition": scan} if moves else {}                   # beside the offset: neither reads the other
        chosen |= {f"{prefix}reach": KernelOptions(None, 1, 1)} if any(s[0] == "forget" for s in steps) else {}
    if any(s[0] == "move" for s in steps):
        heads = any(s[0] == "sum_after" for s in steps)    # grads comes after these; else after inner, which it needs
        beside = ("back_reach", "back_transition", "local", "back_offset", "again", *(("grads",) if heads else ()))
        chosen |= {k: replace(o, follows=True) for k, o in chosen.items() if k in beside}
    return Schedule(f"backward-{plan}-{segment}", steps=steps).with_options(**chosen)


def can(instance: Instance) -> bool:
    """Whether segments may serve an instance: there is a decay, and a kernel that knows what has faded, for without all of each
    transition is computed; and it is of the kind that a GPU has run with every length (`bench/verify_backward.py`): all
    gradients, value heads that share a key head."""
    s = instance.switches
    plain = not (s.l2norm or s.beta_sigmoid or s.state_v_first) and (s.final_state or not s.initial_state)
    every = set(instance.grads) >= {"q", "k", "v", "g", "beta"} and instance.grouped and instance.keep == "nothing"
    return s.erase and s.decay == "scalar" and plain and every and (instance.K, instance.V) == (128, 128) \
        and (instance.io, instance.beta) == ("bf16", "bf16")


def segment_of(sequences: int, heads: int, tokens: int, units: int) -> int:
    """Chunks of a segment, one of LENGTHS; 0 where sequences should stay whole. By what an H100 takes, in microseconds: both
    scans 5.6 a chunk where two blocks share a multiprocessor; what has not faded of transition and offset 1 a chunk and scan,
    composing 4 a segment; then the rest, which takes all chunks at once. Fitted to 4, 8, 16 and 32 heads."""
    chunks, scans, work = -(-tokens // (64 * sequences)), sequences * heads, tokens * heads

    def takes(size: int) -> float:
        segments = -(-chunks // size)
        waves = -(-segments * scans * 4 // (2 * units))    # tiles of 32 columns
        return waves * 5.6 * size + 2 * (size + 4 * segments + 10) + REST * work
    best = min(LENGTHS, key=takes)
    return best if best < chunks and takes(best) < WORTH * uncut(chunks, scans, work, units) else 0


def uncut(chunks: float, scans: int, work: int, units: int) -> float:
    """Microseconds of whole scans by Triton beside each other: 1.6 a chunk where no two blocks share a multiprocessor, 3.4
    where they do; some of the rest hides behind them."""
    blocks = 2 * scans * 4                                 # of both
    return chunks * (1.6 if blocks <= units else 3.4 * -(-blocks // (2 * units))) + 0.7 * REST * work


def roles_win(sequences: int, heads: int, tokens: int, units: int, size: int) -> bool:
    """Whether roles should scan segments of so many chunks, for there are too few sequences and heads for whole ones: both
    scans take 4.6 a chunk, or by memory 1.15e-3 a token and head; between them what segment_of counts and some launches;
    inverses and what follows 1.75e-3 a token and head."""
    chunks, scans, work = -(-tokens // (64 * sequences)), sequences * heads, tokens * heads
    segments = -(-chunks // size)
    both = max(-(-segments * scans // units) * 4.6 * size, 1.15e-3 * work)
    takes = both + 2 * (size + 4 * segments + 10) + 60 + 1.75e-3 * work
    longest = chunks * (UNEQUAL if sequences > 2 else 1)
    return size < chunks and takes < WORTH_ROLES * uncut(longest, scans, work, units)
