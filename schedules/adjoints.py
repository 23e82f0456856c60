"""The derived backward with both of its scans in segments: the schedule, and where it should be the fastest."""
from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gdn_ir.schedules.plans import backward_plan, finer
from gdn_ir.schedules.schedule import KernelOptions, Schedule

if TYPE_CHECKING:
    from gdn_ir.compiler import Instance

TURNS, GATHERED = "gathered-turns-segments", "gathered-segments"
PLANS = (TURNS, GATHERED, "segments")
LENGTHS = (16, 32)                                         # chunks that a segment may have (64 gains 1.4% at most)
# microseconds on an H100: of what is not scanned, a token and head, by Triton, and by roles with the inverses among it; of both
# scans as roles, a chunk, and a token and head where memory limits them; of launches between segments
REST, REST_ROLES, SCANS_ROLES, BYTES_ROLES, BETWEEN = 2.9e-3, 1.75e-3, 4.6, 1.15e-3, 60
WORTH, WORTH_ROLES = 0.9, 0.85                             # of whole scans' time, which follow each other: for a margin
UNEQUAL = 2.2                                              # the longest of several packed sequences, for a mean of 1, in TRAIN
ONLY = "all five gradients and no state's, value heads that share a key head, bf16, K x V of 128 x 128, nothing normalised " \
    "or kept"


# of the kernels before scans by roles: first what again's segments start with is made of, and beside it local; then what back's
# are, which reads local, and beside it again's compose
ORDER = (("move", "back_reach", "again_transition"), ("move", "local", "again_compose"),
         ("move", "back_offset", "again_compose"), ("move", "back_transition", "again_compose"),
         ("move", "back_compose", "again"))


def in_segments(base: Schedule, instance: Instance, segment: int, plan: str = "gathered-segments", roles: bool = False) \
        -> Schedule:
    """The plan "segments" or a kin of it, with that many chunks to a segment, and for the kernels that `base` has too (of whole
    scans, its last kernels the same) the options of that. Segments are stored beside each other, so that nothing follows their
    scans. Wide tiles, for there are blocks enough, and two stages of the adjoint's loads, so that two blocks have a
    multiprocessor. What is gathered runs beside the kernels before it where it reads nothing of these. roles: these will
    scan the segments, a block each, and start where all before them has ended."""
    steps = backward_plan(plan, instance.program, instance.io, keep=instance.keep, beta=instance.beta, segment=segment,
                          norm=plan != "segments" and instance.switches.l2norm)
    steps = (*(s for s in steps if s[0] != "move"), *ORDER) if roles else \
        finer(steps, instance.io, instance.K, "sm_90")     # segments of a backward are of Hopper
    chosen = {k: replace(o, follows=False) for k, o in base.kernels}
    moves = instance.switches.erase or instance.switches.decay != "none"           # a state, but for what is added to it
    for prefix in (str(s[4]) for s in steps if s[0] == "segment"):
        name = prefix.removesuffix("_")
        scan = KernelOptions(32, 4, 2 if name == "back" else 3)
        late = roles and name == "back"                    # local is before its offset, which reads that
        chosen |= {name: scan, f"{prefix}offset": replace(scan, follows=moves and not late),
                   f"{prefix}compose": KernelOptions(32, 8, 1 + roles)}
        chosen |= {f"{prefix}transition": scan} if moves else {}                   # beside the offset: neither reads the other
        chosen |= {f"{prefix}reach": KernelOptions(None, 1, 1)} if any(s[0] == "forget" for s in steps) else {}
    if any(s[0] == "move" for s in steps):
        heads = any(s[0] == "sum_after" for s in steps)    # grads comes after these; else after inner, which it needs
        beside = ("back_reach", "back_transition", "local", *(("again_compose",) if roles else ("back_offset", "again")),
                  *(("grads",) if heads else ()))
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
    """Chunks of a segment that Triton scans, one of LENGTHS; 0 where sequences should stay whole."""
    chunks, scans, work = -(-tokens // (64 * sequences)), sequences * heads, tokens * heads
    best = min(LENGTHS, key=lambda size: cut(chunks, scans, work, units, size))
    wins = cut(chunks, scans, work, units, best) < WORTH * uncut(chunks, scans, work, units)
    return best if best < chunks and wins else 0


def cut(chunks: int, scans: int, work: int, units: int, size: int) -> float:
    """Microseconds in segments by Triton: both scans 5.6 a chunk where two blocks share a multiprocessor, then the rest, which
    takes all chunks at once. Fitted to 4, 8, 16 and 32 heads. work: tokens x heads."""
    segments = -(-chunks // size)
    waves = -(-segments * scans * 4 // (2 * units))        # tiles of 32 columns
    return waves * 5.6 * size + states(segments, size) + REST * work


def states(segments: int, size: int) -> float:
    """Of the states that segments start with: what has not faded of transition and offset 1 a chunk, composing 4 a segment."""
    return 2 * (size + 4 * segments + 10)


def uncut(chunks: float, scans: int, work: int, units: int) -> float:
    """Of whole scans by Triton beside each other: 1.6 a chunk where no two blocks share a multiprocessor, 3.4 where they do;
    some of the rest hides behind them."""
    blocks = 2 * scans * 4                                 # of both
    return chunks * (1.6 if blocks <= units else 3.4 * -(-blocks // (2 * units))) + 0.7 * REST * work


def roles_win(sequences: int, heads: int, tokens: int, units: int, size: int, packed: bool) -> bool:
    """Whether roles should scan segments of so many chunks faster than Triton whole sequences or segments ("every way on
    TRAIN's shapes" in docs/performance-log.md). Of several packed sequences the longest counts; two that were timed were near
    enough to equal."""
    chunks, scans, work = -(-tokens // (64 * sequences)), sequences * heads, tokens * heads
    segments = -(-chunks // size)
    both = max(-(-segments * scans // units) * SCANS_ROLES * size, BYTES_ROLES * work)
    takes = both + states(segments, size) + BETWEEN + REST_ROLES * work
    whole = uncut(chunks * (UNEQUAL if packed and sequences > 2 else 1), scans, work, units)
    worth = WORTH if sequences == 1 else WORTH_ROLES       # roles copy a sequence's last chunk in strips
    return size < chunks and takes < min(worth * whole, *(cut(chunks, scans, work, units, n) for n in LENGTHS))
