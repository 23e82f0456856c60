"""The derived backward with its two serial scans, and what follows them, as cooperating roles, for TileLang on Hopper; all else
is Triton's."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gdn_ir.schedules import adjoints, role_solve
from gdn_ir.schedules.plans import CHUNK, Steps
from gdn_ir.schedules.role_solve import solve_as_roles
from gdn_ir.schedules.roles import AGAIN, BACK, BACK_ALONE, INNER, Roles, in_halves, in_two_parts, on_diagonal, scaled_last
from gdn_ir.schedules.schedule import KernelOptions, Schedule

if TYPE_CHECKING:
    from gdn_ir.compiler import Instance

MANY = 32                                                  # sequences x heads from which roles win, a whole head to a block
SOME = 8                                                   # sequences from which that is so of few heads too
WALK, SHORT, SINGLE = 8, 2, 1                              # chunks of a sequence that a block of what comes after goes through
# times the multiprocessors, by blocks of WALK: 1x8192, 16/32, where it was timed, has 1.94; SHORT won where there are fewer
FILLED = 1.9
BRIEF = 1024                                               # tokens of a sequence, in the mean, up to which roles cost no more
SEGMENT = 32                                               # chunks of a segment
HALF = 64                                                  # columns of V that a block owns where two share a head
BOTH, BACK_ONLY = ("again", "back"), ("back",)             # scans whose blocks share heads
# how fine the arithmetic is, of a schedule's name: as products round; with what that takes of solves' operands, and the scale
# last, where it can be; and with what it takes of what again writes to its state, for one product more
FINE = ("", "-finer", "-finest")
FINER: Steps = (("diagonal", "again", "u_again", "bf16"), ("diagonal", "back", "d_r", "bf16"))
SCALED = "-scaled"                                         # likewise: the scale comes last
FINEST: Steps = (*FINER, ("in_parts", "again", "bf16", "S_again"))
SERVED = 2                                                 # of FINE, as it serves

# u's two tiles of a key head lie where that block's of d_q and d_k come to lie, if two value heads share it
TOGETHER: Steps = (("members_apart", "u", "H"),)
# what makes u's gradient by the outputs before the adjoint's scan, which then only adds it
BEFORE = (("peel", "d_u", "d_u_o"), ("turn", "d_u_o"), ("hoist", "d_u_o", "io", "local"))


def as_roles(base: Schedule, again: Roles = AGAIN, back: Roles = BACK, halves: tuple[str, ...] = (), aside: bool = False,
             fine: int = 0, scale_last: bool = False) -> Schedule:
    """The plan "gathered" of `base`, one of its kin, or "gathered-segments", its scans as roles. back: BACK_ALONE needs no
    kernel local. halves: of which of the two scans two blocks share a head, each with half of its columns: for few heads, BOTH;
    BACK_ONLY where there is room for all blocks, for a chunk of the adjoint takes half again as long. aside: the two run beside
    each other, in two streams (of whole sequences). fine: of FINE. scale_last: so it is, where no final state has a
    gradient."""
    if fine not in range(len(FINE)):
        raise ValueError(f"as_roles.fine: got {fine}; accepts 0 to {len(FINE) - 1}")
    if halves not in ((), BOTH, BACK_ONLY):
        raise ValueError(f"as_roles.halves: got {halves!r}; accepts (), {BOTH} and {BACK_ONLY}")
    if aside and "-segments" in base.name:
        raise ValueError(f"as_roles.aside: got true with {base.name}; accepts a schedule of whole sequences: segments fill the "
                         "GPU by themselves")
    alone = any(e.do == "issue" and e.value == "qk" for r in back.roles for e in r.events)
    steps = tuple(s for s in base.steps if s not in FINEST)  # of Triton's scans
    steps = without_local(steps) if alone else steps
    last = "inner" if "inner" in dict(base.kernels) else "grads"               # what follows both scans
    kept = {k: replace(o, follows=o.follows and k != last) for k, o in base.kernels if not alone or k != "local"}
    if fine:
        again, back = on_diagonal(in_two_parts(again) if fine > 1 else again), on_diagonal(back)
    if scale_last:
        back = scaled_last(back)
    for name, roles in (("again", again), ("back", back)):
        half = name in halves
        kept[name] = KernelOptions(HALF if half else None, roles=in_halves(roles) if half else roles, backend="tilelang",
                                   aside=aside and name == "again")
    plan = next((f"-{p}" for p in ("merged", "turns") if p in base.name), "")
    cut = base.name[base.name.index("-segments"):] if "-segments" in base.name else ""
    split = {(): "", BOTH: "-halves", BACK_ONLY: "-back-halves"}[halves]
    how = f"{split}{'-aside' if aside else ''}{FINE[fine]}{SCALED * scale_last}"
    more: Steps = (*((("scale_last",),) if scale_last else ()), ("accumulate", "d_S"), *((), FINER, FINEST)[fine])
    return replace(base, name=f"backward-roles{plan}{'-alone' if alone else ''}{how}{cut}", steps=(*steps, *more),
                   kernels=tuple(kept.items()))


def without_local(steps: Steps) -> Steps:
    """With u's gradient by the outputs made where it is added, and no kernel local: what was moved before that goes to where it
    was moved."""
    goes = [s[2] for s in steps if s[:2] == ("move", "local")]
    kept = (s for s in steps if s not in BEFORE and s[:2] != ("move", "local"))
    return tuple(("move", s[1], *goes) if s[0] == "move" and s[2] == "local" else s for s in kept)


def inner_as_roles(base: Schedule, inner: Roles = INNER, chunks: int = WALK, apart: bool = False) -> Schedule:
    """The plan "gathered-merged" or "gathered-turns" of `base`, or one of these with its scans as roles, and what follows them
    as roles too: each block walks through so many chunks of a sequence, with turns of all value heads of a key head, so that
    none waits for another. What is of rows alone is made after it, by Triton, of the sums that it stores. apart: of a
    program of grouped heads whose scans are roles, u lies where d_q and d_k will."""
    if "merged" not in base.name and "turns" not in base.name:
        raise ValueError(f"inner_as_roles: got {base.name}; accepts a schedule of the plans gathered-merged and gathered-turns")
    inner = scaled_last(inner) if ("scale_last",) in base.steps else inner
    kernels = {k: o for k, o in base.kernels if k != "grads"}
    kernels |= {"grads": KernelOptions(None, roles=inner, backend="tilelang"),
                "rows": KernelOptions(None, 1, 1, backend=base.options("solve").backend)}
    steps = (*base.steps, *(TOGETHER if apart else ()), ("products_last", "grads"), ("in_parts", "grads", "bf16"),
             ("rows_after", "grads", "rows"), ("made_again", "rows", "beta_kept"), ("heads_first",),
             ("walk", "grads", chunks))
    width = base.name.rsplit("-", 1)[-1]                   # of Triton's scans
    name = base.name.removesuffix(f"-{width}" if width.isdigit() and "segments" not in base.name else "")
    return replace(base, name=name + "-inner" + f"-{chunks}" * (chunks != WALK), steps=steps, kernels=tuple(kernels.items()))


def the_rest_by(backend: str, schedule: Schedule) -> Schedule:
    """A schedule whose kernels are that backend's but for those of which it says something else."""
    return replace(schedule, kernels=tuple((k, replace(o, backend=o.backend or backend)) for k, o in schedule.kernels))


@dataclass(frozen=True)
class Way:
    """How sequences are scanned by roles: whole, a block for each head or, of the scans in `halves`, two; or in segments of so
    many chunks. aside: the two scans beside each other, in two streams. walk: chunks of a block of what comes after them, as
    roles too (0: by Triton). fine: how fine the arithmetic is, of FINE."""
    halves: tuple[str, ...] = ()
    aside: bool = False
    segment: int = 0
    walk: int = 0
    fine: int = SERVED

    def __post_init__(self) -> None:
        if self.halves not in ((), BOTH, BACK_ONLY):
            raise ValueError(f"Way.halves: got {self.halves!r}; accepts (), {BOTH} and {BACK_ONLY}")
        if self.segment and (self.halves or self.aside):
            raise ValueError(f"Way.segment: got {self.segment} with halves or aside; accepts 0 there: these are of whole "
                             "sequences")

    def __str__(self) -> str:
        part = f" segment of {self.segment} chunks" if self.segment else ""
        blocks = {(): "one block for each", BOTH: "two blocks for each",
                  BACK_ONLY: "one block for each, their adjoints in two"}[self.halves] + part
        rest = f"; what comes after them as roles, {self.walk} chunk{'s' * (self.walk > 1)} to a block" if self.walk else ""
        rest += f"; {FINE[self.fine].removeprefix('-')} arithmetic" if self.fine else ""
        return f"as roles in {blocks}, {'beside each other' if self.aside else 'one after the other'}{rest}"


# all that `way` and the tuner choose from, by the names that the latter has for them: a GPU has run each
# (bench/verify_backward.py)
WAYS = {"roles-aside": Way(aside=True, fine=0), "roles": Way(fine=0),
        "roles-aside-throughout": Way(aside=True, walk=WALK), "roles-throughout": Way(walk=WALK),
        "roles-halves-aside-throughout": Way(BOTH, aside=True, walk=WALK),
        "roles-aside-throughout-short": Way(aside=True, walk=SHORT), "roles-throughout-short": Way(walk=SHORT),
        "roles-halves-aside-throughout-short": Way(BOTH, aside=True, walk=SHORT),
        "roles-halves-aside-throughout-single": Way(BOTH, aside=True, walk=SINGLE),
        "roles-back-halves-aside-throughout": Way(BACK_ONLY, aside=True, walk=WALK),
        "roles-back-halves-aside-throughout-short": Way(BACK_ONLY, aside=True, walk=SHORT),
        "roles-segments-throughout": Way(segment=SEGMENT, walk=WALK),
        "roles-segments-throughout-short": Way(segment=SEGMENT, walk=SHORT)}


def way(instance: Instance, sequences: int, heads: int, tokens: int, units: int) -> Way | str:
    """How roles serve a backward, or why they should not. units: multiprocessors. By what TRAIN's shapes took on an H100
    ("every way on TRAIN's shapes" in docs/performance-log.md; tests/test_role_backward.py holds it to these).

    Roles do what comes after the scans too, but not where beta comes as logits: its gradient is no sum of rows times beta then.
    Where sequences and heads are many these are scanned whole, beside each other as long as each scan's blocks have a
    multiprocessor; by halves where two waves of these even out what more than two unequal sequences leave. Few heads go in
    halves where there are 16 of them, else in segments where sequences are long. Up to BRIEF tokens they cost about what
    Triton's kernels do, and err less on inputs of which much cancels; between the two these win, for they follow each other
    chunk by chunk."""
    scans = sequences * heads
    blocks = tokens * heads // ((2 if instance.grouped else 1) * CHUNK * WALK)     # two value heads taken to share a key head
    walk = 0 if instance.switches.beta_sigmoid else WALK if blocks >= FILLED * units else SHORT

    def made(*how: Any, **more: Any) -> Way:
        return arithmetic(instance, Way(*how, **more))
    if scans >= MANY and (heads >= 16 or scans >= 2 * MANY or sequences >= SOME):
        uneven = instance.varlen and sequences > 2 and units < 4 * scans <= 2 * units
        return made(BOTH if walk and uneven else (), scans <= units if walk else 2 * scans <= units, walk=walk)
    few = f"roles want {MANY} sequences x heads (twice as many where a sequence has fewer than 16 heads and there are fewer " \
        f"than {SOME}), not {sequences} x {heads}"
    if not walk:
        return f"{few}, where beta comes as logits"
    if heads >= 16:
        return made(BOTH, aside=True, walk=walk)
    cut = adjoints.roles_win(sequences, heads, tokens, units, SEGMENT, instance.varlen)
    if cut and adjoints.can(instance):
        return made(segment=SEGMENT, walk=min((WALK, SHORT), key=lambda n: after_segments(tokens * heads, units, n)))
    if tokens <= BRIEF * sequences:
        return made(BOTH, aside=True, walk=SINGLE)
    segments = f"would be the fastest, but serve only {adjoints.ONLY}" if cut else \
        f"would take longer than triton, sequences having {tokens // sequences} in the mean"
    return f"{few}; or 16 value heads, or at most {BRIEF} tokens a sequence in the mean; segments {segments}"


def after_segments(work: int, units: int, walk: int) -> int:
    """How long what comes after segments takes in walks of so many chunks, in the time of a value head's chunk, two of them
    to a key head; a block takes one more to begin. work: tokens x value heads. (Fitted to the nine shapes of
    segment_walks.json at 4b1997a, for each of which it takes the faster.)"""
    blocks = -(-work // (2 * CHUNK * walk))
    return -(-blocks // units) * (1 + 2 * walk)


def served(base: Schedule, instance: Instance, how: Way, inverses: bool = True) -> Schedule:
    """As it serves: what is of the outputs' gradient among the roles, where sequences are whole; all that is no role by Triton.
    base: "gathered-turns". inverses: roles make these too."""
    fine = arithmetic(instance, how).fine
    last = fine > 0 and scales_all(instance)
    made = as_roles(adjoints.in_segments(base, instance, how.segment, adjoints.TURNS, True), fine=fine, scale_last=last) \
        if how.segment else as_roles(base, AGAIN, BACK_ALONE, how.halves, how.aside, fine, last)
    few = how.walk in (SHORT, SINGLE) and not how.segment  # inverses: `way` has counted; segments are of long sequences
    made = inner_as_roles(made, chunks=how.walk, apart=instance.grouped) if how.walk else made
    made = solve_as_roles(made, role_solve.SHORT if few else role_solve.WALK) if inverses else made
    return the_rest_by("triton", made)


def arithmetic(instance: Instance, how: Way) -> Way:
    """The way with the arithmetic that a GPU has run for an instance: finer of roles throughout."""
    return how if how.walk else replace(how, fine=0)


def scales_all(instance: Instance) -> bool:
    """Whether the scale can come last of all: all that a backward is given has it as a factor (the gradient of the outputs
    does, a final state's not), and what roles store is what it returns (where q and k are normalised, that is made after)."""
    return "d_final_state" not in instance.program.read() and not instance.switches.l2norm


def lacks(arch: str, instance: Instance) -> str:
    """What keeps roles from serving a backward; "" where nothing does."""
    s = instance.switches
    needs = {f"roles are of Hopper, not of {arch}": arch == "sm_90",
             f"roles take bf16, not {instance.io} and beta {instance.beta}": (instance.io, instance.beta) == ("bf16", "bf16"),
             f"roles take K x V of 128 x 128, not {instance.K} x {instance.V}": (instance.K, instance.V) == (128, 128),
             f"roles are given nothing by a forward ({instance.keep} is)": instance.keep == "nothing",
             "roles make all of the gradients of q, k, v, g and beta": {*instance.grads} >= {"q", "k", "v", "g", "beta"},
             "roles take beta as it is, or as logits, not doubled (neg_eigval) alone": s.beta_sigmoid or not s.neg_eigval,
             "roles need a decay": s.decay == "scalar", "roles need what erases": s.erase,
             "roles have states as [K, V], not [V, K]": not s.state_v_first}
    return next((why for why, met in needs.items() if not met), "")
