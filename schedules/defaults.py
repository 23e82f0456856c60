"""The schedule for a call that nobody tuned: chosen from the architecture and the shape, and able to say why.

The options are those that won sweeps on an H100 and an H200 (docs/performance-log.md); for sm_80 they are the same plan within
an A100's shared memory, compiled and checked but not timed.
"""
from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from gdn_ir.schedules import adjoints, role_backward
from gdn_ir.schedules.plans import CHUNK, Steps, backward_plan, finer, narrow, plan
from gdn_ir.schedules.role_solve import WALK, solve_as_roles, walk
from gdn_ir.schedules.roles import FUSED, SOLVED, Roles
from gdn_ir.schedules.schedule import KernelOptions, Schedule

if TYPE_CHECKING:
    from gdn_ir.compiler import Instance

MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132}
CROWDED = 48                                               # sequences x heads from which roles win with whole sequences
SEGMENTS = False                                           # whether few long sequences are cut (docs/performance-log.md)
SEGMENT = 64                                               # chunks of one
ROLES_IN_SEGMENTS = True                                   # whether sequences are cut where roles can scan them
BACK_IN_SEGMENTS = True                                    # and those of a backward (schedules/adjoints.py)
ROLES_IN_ONE = True                                        # whether roles may make the inverses too
TURNS = "gathered-turns"                                   # what serves a backward of whole scans on Hopper
LENGTHS = (8, 16, 32, 64, 128)                             # chunks that a segment of roles may have
FUSED_LENGTHS = (64, 128)                                  # and those of roles that make the inverses too: for the tuner
LONG = 64                                                  # chunks of a sequence, on average, that is worth cutting
FILLED = 0.9                                               # blocks of the scan for each multiprocessor that need no more


def default(arch: str, instance: Instance, sequences: int, heads: int, tokens: int, backend: str = "triton") \
        -> tuple[Schedule, str]:
    """The schedule, and the reason for it. arch: "sm_80", "sm_90", "cpu" (native code) or "torch" (any device); sequences,
    heads (HV), tokens: of the call."""
    if instance.grads:
        return backward_default(arch, instance, sequences, heads, tokens, backend)
    erase, io, decay = instance.switches.erase, instance.io, instance.switches.decay != "none"
    if instance.keep != "nothing" and arch in ("cpu", "torch"):
        return Schedule(f"states, leaves {instance.keep}", CHUNK, plan("states", erase, io, sums=decay, leave=instance.left)), \
            f"chunks of {CHUNK} in parallel but for the state: what the backward is given is of these"
    if arch == "cpu":
        return Schedule("recurrent", 1), "native code: one token at a time, the state in a core's cache; heads go to threads"
    if instance.recurrent and (arch == "torch" or arch in MULTIPROCESSORS):
        parts = (("*", KernelOptions(32, 4, 1)),) if backend == "triton" else (("*", KernelOptions()),)
        return Schedule("recurrent", 1, kernels=parts), "one token at a time, as was asked"
    if arch == "torch":
        return Schedule("fused", steps=plan("fused", erase, io)), "any device: one pass over the chunks, the whole grid at once"
    if arch not in MULTIPROCESSORS:
        raise ValueError(f"arch: got {arch!r}; accepts cpu, {', '.join(MULTIPROCESSORS)}")
    widen = arch == "sm_90" and backend == "triton" and instance.keep != "nothing" and narrow(instance.beta)
    steps = plan("states", erase, io, sums=decay, leave=instance.left, widen=widen)
    if instance.keep == "states" and backend == "triton":
        steps = finer(steps, io, instance.K, arch)              # u as a backward would make it, which reads that
    if backend == "tilelang" and roles_fit(arch, instance, sequences, heads, tokens):
        size, one = way_of_roles(sequences, heads, tokens)
        schedule = forward_by_roles(instance, size, one, walk(tokens * heads // CHUNK))
        if size:
            return schedule, (
                f"{arch}: {sequences * heads} blocks of roles would not fill {MULTIPROCESSORS[arch]} multiprocessors for long; "
                f"each sequence is cut into segments of {size} chunks; the inverses by other roles, before; what else comes "
                "before their scan by triton")
        if one:
            return schedule, \
                f"{arch}: roles in one block for each of {sequences * heads} sequences and heads, beside each other on " \
                f"{MULTIPROCESSORS[arch]} multiprocessors; they make the inverses too"
        return schedule, \
            f"{arch}: roles in one block for each of {sequences * heads} sequences and heads, beside each other on " \
            f"{MULTIPROCESSORS[arch]} multiprocessors; the inverses by other roles, before"
    if backend == "tilelang":
        schedule, why = of_tilelang(arch, instance, steps)
        few = f"roles want {CROWDED} sequences x heads or {LONG * 64} tokens a sequence in the mean, not {sequences * heads} " \
            f"and {tokens // sequences if sequences else 0}"
        return schedule, f"{why}; {roles_lack(arch, instance) or few}"
    if SEGMENTS and instance.keep == "nothing" and cuts(arch, instance, sequences, heads, tokens):
        return segmented(arch, instance), (f"{arch}: {sequences * heads} serial scans would not fill {MULTIPROCESSORS[arch]} "
                                           f"multiprocessors; each is cut into segments of {SEGMENT} chunks")
    width = scan_width(arch, instance, sequences * heads)
    chosen = {k: o for k, o in options(arch, instance, width).items() if erase or k != "solve"}      # nothing to solve
    schedule = Schedule(f"states-{width}{kept(instance)}", steps=steps).with_options(**chosen)
    beside = "; the output starts beside them" if chosen["output"].follows else ""
    return schedule, (f"{arch}: chunks in parallel but for the state; {sequences * heads} serial scans, each cut into "
                      f"{-(-instance.V // width)} tiles of {width} columns to fill {MULTIPROCESSORS[arch]} multiprocessors"
                      f"{beside}")


def of_tilelang(arch: str, instance: Instance, steps: Steps) -> tuple[Schedule, str]:
    """The same plan in TileLang: on Hopper what won a sweep; elsewhere, and in float32, whose tiles lie three times in memory,
    what fits in shared memory."""
    width = 16 if instance.io == "f32" else 32
    whole = KernelOptions(128, 8, 1) if arch == "sm_90" else KernelOptions(64, 4, 1)
    output = KernelOptions(32, 4, 1) if instance.io == "f32" else whole
    beside = arch == "sm_90" and instance.io == "f32" and instance.switches.l2norm      # a normalised k; there is little room
    ring = 2 if beside else 3
    parts = {"scan": KernelOptions(width, 4, ring), "output": output}
    parts |= {"solve": KernelOptions(None, 4, 1)} if instance.switches.erase else {}
    return Schedule(f"states-{width}{kept(instance)}", steps=steps).with_options(**parts), \
        f"{arch}: chunks in parallel but for the state"


def kept(instance: Instance) -> str:
    """What a schedule's name says of what a forward leaves or a backward is given."""
    return "" if instance.keep == "nothing" else f", {'given' if instance.grads else 'leaves'} {instance.keep}"


def of_roles(roles: Roles = SOLVED, solve: KernelOptions | None = None, norm: bool = False) -> Schedule:
    """The plan "solve" with its scan as cooperating roles, for TileLang on Hopper, bfloat16, K = V = 128; the log decay's sums
    are hoisted too. norm: q and k are normalised before, by Triton."""
    made = Schedule("roles", steps=plan("solve", sums=True, norm=norm))
    return made.with_options(**normalised(norm), scan=KernelOptions(roles=roles), solve=solve or KernelOptions(None, 4, 1))


def roles_in_one(roles: Roles = FUSED, norm: bool = False) -> Schedule:
    """The plan "fused" as cooperating roles, the inverse among what they make: one kernel, but for what normalises q and k."""
    made = Schedule("roles-fused", steps=plan("fused", scaled=True, norm=norm))
    return made.with_options(**normalised(norm), scan=KernelOptions(roles=roles))


def normalised(norm: bool) -> dict[str, KernelOptions]:
    """Of the kernel that normalises q and k for roles, whose tiles come from memory as they are."""
    return {"norm": KernelOptions(None, 4, 1, backend="triton")} if norm else {}


class Takes(NamedTuple):
    """What parts of a forward by roles take on an H100, in microseconds: a chunk of a block, where blocks are on half of the
    multiprocessors, on more, and where they make the inverses too, of one sequence or of several, which may be unequal; an
    inverse made before. (Fitted to the shapes that are tuned: `bench/experiments/fit_ways.py`.)"""
    half: float = 2.1
    full: float = 2.3
    fused: float = 3.1
    fused_of_several: float = 3.3
    inverse: float = 0.0075


TAKES = Takes()


def way_of_roles(sequences: int, heads: int, tokens: int, takes: Takes = TAKES) -> tuple[int, bool]:
    """How roles should take a call: the chunks of a segment, one of LENGTHS, so that few kernels serve all lengths of sequences
    (0 where these should stay whole), and whether they make the inverses too. By what an H100 takes, in microseconds:

    a block of roles has a multiprocessor to itself, so that blocks come in waves of so much a chunk (`Takes`). Inverses made
    before take a launch. Transition and offset of what has not faded take 1.2 a chunk and a third a segment and head, composing
    4 a segment, launches 20. (Segments that make the inverses too always take longer, for the bounds that tell what has faded:
    they are the tuner's.)"""
    chunks, units = -(-tokens // (64 * sequences)), MULTIPROCESSORS["sm_90"]
    inverses = takes.inverse * chunks * sequences * heads

    def waves(segments: int, length: int) -> float:
        blocks = segments * sequences * heads
        return -(-blocks // units) * (6 + (takes.half if 2 * blocks <= units else takes.full) * length)
    us = {(0, False): inverses + waves(1, chunks) + 20}
    if ROLES_IN_ONE:
        each = takes.fused_of_several if sequences > 1 else takes.fused
        us[0, True] = -(-sequences * heads // units) * (12 + each * chunks)
    for n in (n for n in LENGTHS if n < chunks and ROLES_IN_SEGMENTS):
        segments = -(-chunks // n)
        both = 4 * segments + 1.2 * n + segments * sequences * heads / 3 + 20
        us[n, False] = inverses + waves(segments, n) + both
    return min(us, key=lambda way: us[way])


def segmented_roles(instance: Instance, segment: int, one: bool = False) -> Schedule:
    """The plan "cut", with that many chunks to a segment: all segments scanned as roles, the kernels before by Triton. one: the
    plan "cut-fused"; the roles make the inverses too."""
    before = {k: replace(o, backend="triton") for k, o in segmented("sm_90", instance, segment).kernels
              if k not in ("*", "scan", "output")}
    for kernel in ("transition", "compose"):               # more blocks of these beside each other: few have much to do
        before[kernel] = replace(before[kernel], num_stages=2)
    norm = instance.switches.l2norm
    steps = plan("cut-fused" if one else "cut", instance.switches.erase, instance.io, sums=True, segment=segment, norm=norm)
    before |= {"fade": KernelOptions(None, 1, 1, backend="triton")} if one else {}
    made = Schedule(f"roles-fused-{segment}" if one else f"roles-{segment}", steps=steps)
    return made.with_options(**normalised(norm), **before, scan=KernelOptions(roles=FUSED if one else SOLVED))


def forward_by_roles(instance: Instance, segment: int = 0, one: bool = False, chunks: int = WALK) -> Schedule:
    """Roles as they serve, what else comes before their scan by Triton. segment: chunks of one; with 0, sequences are whole.
    one: they make the inverses too; else other roles do, before, each block of so many chunks."""
    if segment:
        made = segmented_roles(instance, segment, one)
        return made if one else solve_as_roles(made, chunks)
    norm = instance.switches.l2norm
    return roles_in_one(norm=norm) if one else solve_as_roles(of_roles(norm=norm), chunks)


def roles_lack(arch: str, instance: Instance) -> str:
    """What keeps the forward as roles from serving an instance; "" where nothing does."""
    s = instance.switches
    needs = {f"roles are of Hopper, not of {arch}": arch == "sm_90",
             f"roles take bf16, not {instance.io}": instance.io == "bf16",
             f"roles take K x V of 128 x 128, not {instance.K} x {instance.V}": (instance.K, instance.V) == (128, 128),
             "roles are of the forward": not instance.grads, "roles do not take one token at a time": not instance.recurrent,
             f"roles leave nothing to a backward ({instance.keep} is kept)": instance.keep == "nothing",
             "roles need a decay": s.decay == "scalar", "roles need what erases": s.erase,
             "roles have states as [K, V], not [V, K]": not s.state_v_first}
    return next((why for why, met in needs.items() if not met), "")


def roles_can(arch: str, instance: Instance) -> bool:
    """Whether roles can serve an instance."""
    return not (role_backward.lacks if instance.grads else roles_lack)(arch, instance)


def roles_want(arch: str, instance: Instance, sequences: int, heads: int, tokens: int) -> str:
    """Why roles do not serve a backward; "" where they do."""
    if why := role_backward.lacks(arch, instance):
        return why
    how = role_backward.way(instance, sequences, heads, tokens, MULTIPROCESSORS[arch])
    return how if isinstance(how, str) else ""


def roles_fit(arch: str, instance: Instance, sequences: int, heads: int, tokens: int) -> bool:
    """Whether they should also be the fastest for a call. Of a forward one block takes a whole sequence and head, so there must
    be enough of these to be busy beside each other; or sequences so long, in the mean, that they are worth cutting."""
    if instance.grads:
        return not roles_want(arch, instance, sequences, heads, tokens)
    crowded, long = sequences * heads >= CROWDED, ROLES_IN_SEGMENTS and tokens >= LONG * 64 * sequences
    return roles_can(arch, instance) and (crowded or long)


def scan_width(arch: str, instance: Instance, scans: int) -> int:
    """Columns of V that one block of the scan owns: 32 where that makes a block, nearly, for each multiprocessor, else 16.
    Wide tiles read k and the inverse once for more columns; narrow ones shorten the serial chain. Float32 takes 32, for no
    more fit; so does K > 128, except where eight warps can hold the state of 64 columns."""
    if instance.io == "f32" or instance.K > 128:
        return 64 if instance.io != "f32" and arch == "sm_90" else 32
    enough = 0.9 * MULTIPROCESSORS[arch]
    return 32 if scans * -(-instance.V // 32) >= enough else 16


def cuts(arch: str, instance: Instance, sequences: int, heads: int, tokens: int) -> bool:
    """Whether sequences should be cut into segments: the scan's blocks leave multiprocessors idle for long. (Composing holds a
    float32 matrix over K x K in a block: up to 128.)"""
    scans = sequences * heads
    blocks = scans * -(-instance.V // scan_width(arch, instance, scans))
    return instance.K <= 128 and blocks < FILLED * MULTIPROCESSORS[arch] and tokens >= LONG * 64 * sequences


def segmented(arch: str, instance: Instance, segment: int = SEGMENT) -> Schedule:
    """The plan "segments", with that many chunks to a segment."""
    s, width = instance.switches, 32
    steps = plan("segments", s.erase, instance.io, sums=s.decay != "none", segment=segment)
    chosen = options(arch, instance, width)
    chosen["output"] = replace(chosen["output"], follows=False)                # segments are stored beside each other
    chosen |= {"reach": KernelOptions(None, 1, 1), "transition": chosen["scan"], "offset": chosen["scan"],
               "compose": KernelOptions(width, 8, 1) if arch == "sm_90" else KernelOptions(16, 8, 2)}
    chosen = {k: o for k, o in chosen.items() if s.erase or k != "solve"}
    if s.decay == "none" and not s.erase:                  # a state moves by what is added to it alone
        del chosen["transition"]
    elif arch == "sm_90":                                  # neither reads the other
        chosen["offset"] = replace(chosen["offset"], follows=True)
    if s.decay == "none" or not s.erase:                   # nothing that fades, or no kernel that knows
        del chosen["reach"]
    return Schedule(f"segments-{segment}", steps=steps).with_options(**chosen)


def options(arch: str, instance: Instance, width: int) -> dict[str, KernelOptions]:
    """Options of each kernel of the plan "states"."""
    wide, whole = instance.K > 128, instance.io == "f32"
    if arch == "sm_80":
        stages = 1 if wide or whole else 2
        return {"solve": KernelOptions(num_warps=4 if whole else 1, num_stages=1),
                "scan": KernelOptions(width, 4, stages),
                "output": KernelOptions(32 if whole or wide else 64, 4, 1)}
    if whole:
        return {"solve": KernelOptions(num_warps=4, num_stages=1), "scan": KernelOptions(width, 4, 1 if wide else 2),
                "output": KernelOptions(32, 4, 1, follows=True)}
    return {"solve": KernelOptions(num_warps=4 if wide else 1, num_stages=1),
            "scan": KernelOptions(width, 8, 2) if wide else KernelOptions(width, 4, 3),
            "output": KernelOptions(64, 4, 1 if wide else 2, follows=True)}


def lean(arch: str, instance: Instance, backend: str) -> bool:
    """Whether a backward takes the plan "grouped" before all others."""
    return arch == "sm_90" and backend == "triton" and instance.io != "f32" and max(instance.K, instance.V) <= 128


def backward_default(arch: str, instance: Instance, sequences: int, heads: int, tokens: int, backend: str) \
        -> tuple[Schedule, str]:
    """The same for a backward: on Hopper by roles, or by Triton in segments, where these should win."""
    if backend == "tilelang" and roles_can(arch, instance) and not isinstance(
            how := role_backward.way(instance, sequences, heads, tokens, MULTIPROCESSORS[arch]), str):
        return backward_by_roles(instance, how), (
            f"{arch}: states again, and their adjoints in reverse, of {sequences} x {heads} sequences x heads on "
            f"{MULTIPROCESSORS[arch]} multiprocessors, {how}; roles make the inverses before; the rest by triton")
    if not lean(arch, instance, backend):
        return whole_scans(arch, instance, sequences, heads, backend)
    # one kernel for inner and grads takes halves of K in turn, and is for all that they make
    one = instance.K == 128 and instance.switches.erase and {*instance.grads} >= {"q", "k", "v", "g", "beta"}
    schedule, why = whole_scans(arch, instance, sequences, heads, backend, merges=TURNS if one else "")
    size = adjoints.segment_of(sequences, heads, tokens, MULTIPROCESSORS[arch]) if BACK_IN_SEGMENTS else 0
    if size and not adjoints.can(instance):
        why += f"; segments of {size} chunks may be faster, but serve only what a GPU has run so: {adjoints.ONLY}"
    if not size or not adjoints.can(instance):
        return schedule, why
    return adjoints.in_segments(schedule, instance, size, adjoints.TURNS), (
        f"{arch}: {sequences * heads} serial scans each way would not fill {MULTIPROCESSORS[arch]} multiprocessors for long; "
        f"each is cut into segments of {size} chunks")


def backward_by_roles(instance: Instance, how: role_backward.Way) -> Schedule:
    """The scans, and perhaps what follows them, as roles. (Of Triton's schedule only what is no scan stays, for which numbers
    of sequences and heads do not matter.)"""
    return role_backward.served(whole_scans("sm_90", instance, 1, 32, "triton", merges=TURNS)[0], instance, how)


def whole_scans(arch: str, instance: Instance, sequences: int, heads: int, backend: str, gathers: bool = True,
                merges: str = "") -> tuple[Schedule, str]:
    """A backward whose scans are not cut. gathers: the plan "gathered", where it may serve, and not "grouped"; merges: one of
    its kin in which inner and grads are one kernel instead."""
    if arch == "cpu":
        chunk = 16 if instance.keep == "nothing" else CHUNK
        states = "" if instance.keep == "states" else "states again, then "
        steps = backward_plan("fused", instance.program, instance.io, chunk, keep=instance.keep)
        return Schedule(f"backward-fused{kept(instance)}", chunk, steps), \
            f"native code: {states}their adjoints in reverse, kept a chunk of {chunk} tokens apart; heads go to threads"
    if arch != "torch" and (backend not in ("triton", "tilelang") or arch not in MULTIPROCESSORS):
        raise ValueError(f"no schedule of a backward for {backend} on {arch} yet")
    whole = instance.io == "f32"
    grouped = lean(arch, instance, backend)
    gathers = grouped and gathers
    merges = merges if gathers else ""
    name = merges if merges else "gathered" if gathers else "grouped" if grouped else "states"
    norm = gathers and instance.switches.l2norm
    steps = backward_plan(name, instance.program, instance.io, keep=instance.keep, beta=instance.beta, norm=norm)
    if arch == "torch":
        return Schedule(f"backward{kept(instance)}", steps=steps), \
            "any device: one pass over the chunks each way, the rest of them at once"
    if backend == "tilelang" and max(instance.K, instance.V) > 128:
        raise ValueError(f"no schedule of a backward for K x V of {instance.K} x {instance.V} by tilelang yet; 128 at most")
    steps = finer(steps, instance.io, instance.K, arch) if backend == "triton" else steps
    both = any(step[0] == "move" for step in steps)        # scans, beside each other
    width = 32 if backend == "tilelang" else scan_width(arch, instance, (1 + both) * sequences * heads)
    carried = instance.program.scans()[-1]["carries"]      # none where nothing passes from chunk to chunk, in reverse
    runs_again = len(instance.program.scans()) == 2 and instance.keep != "states"
    again = back = KernelOptions(width, 4, 2)
    every = local = inner = KernelOptions(None, 8, 1)
    if grouped:                                            # a third stage of a scan, where it costs no block a multiprocessor
        crowded = (1 + both) * sequences * heads * -(-instance.V // width) > MULTIPROCESSORS[arch]
        again, back = KernelOptions(width, 4, 3), KernelOptions(width, 4, 2 if crowded else 3, follows=both)
        every = KernelOptions(None, 4, 1, sparing=True)    # so that two blocks have a multiprocessor
        local, inner = replace(every, follows=runs_again and not both), replace(every, follows=bool(carried))
    if max(instance.K, instance.V) > 128:                  # a state is more than a block holds: sums over V in parts
        every = local = inner = KernelOptions(32 if whole else 64, 8, 1)
        again = back = KernelOptions(width, 8 if width == 64 else 4, 2 if arch == "sm_90" and not whole else 1)
    grads = replace(every, follows=both and any(step[0] == "sum_after" for step in steps))
    grads = replace(inner, k_tile=64, around=both) if merges else grads        # narrower products are not to be trusted
    kernels = {"solve": KernelOptions(None, 1 if not whole and backend == "triton" else 4, 1),
               "widen": KernelOptions(None, 1, 1), "again": again, "local": local,
               "back": back if carried else every, "inner": inner, "grads": grads,
               "heads": KernelOptions(None, 4, 1), "norm": KernelOptions(None, 4, 1), "unnorm": KernelOptions(None, 4, 1)}
    made = {step[-1] for step in steps if step[0] in ("hoist", "lift", "sink")} | ({"norm", "unnorm"} if norm else set()) | \
        {step[1] for step in steps if step[0] == "sum_after"} | \
        {name for step in steps if step[0] == "separate" for name in step[2:] if name != "again" or runs_again}
    chosen = {k: o for k, o in kernels.items() if k in made}
    gathered = f"{merges}-" if merges else "gathered-" if ("lift", "d_q", "inner") in steps else ""
    schedule = Schedule(f"backward-{gathered}{width}{kept(instance)}", steps=steps).with_options(**chosen)
    what = "states again, then their adjoints" if runs_again else "adjoints of states"
    return schedule, (f"{arch}: {what} in reverse, in tiles of {width} columns; the rest for all chunks at once"
                      f"{f', V in tiles of {every.v_tile}' if every.v_tile else ''}")
