"""The derived backward with its two serial scans, and what follows them, as cooperating roles, for TileLang on Hopper; all else
is Triton's."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gdn_ir.schedules import adjoints
from gdn_ir.schedules.plans import CHUNK
from gdn_ir.schedules.roles import AGAIN, BACK, BACK_ALONE, INNER, Roles, in_halves
from gdn_ir.schedules.schedule import KernelOptions, Schedule

if TYPE_CHECKING:
    from gdn_ir.compiler import Instance

MANY = 32                                                  # sequences x heads from which roles win, a whole head to a block

# what makes u's gradient by the outputs before the adjoint's scan, which then only adds it
BEFORE = (("peel", "d_u", "d_u_o"), ("turn", "d_u_o"), ("hoist", "d_u_o", "io", "local"), ("move", "local", "again"))
WALK, SHORT = 8, 2                                         # chunks of a sequence that a block goes through
FILLED = 0.48                                              # of the multiprocessors, by blocks of long walks
HALF = 64                                                  # columns of V that a block owns where two share a head
FOLLOWS = "-follows"                                       # of a schedule's name


def as_roles(base: Schedule, again: Roles = AGAIN, back: Roles = BACK, halves: bool = False, aside: bool = False,
             follows: bool = False) -> Schedule:
    """The plan "gathered" of `base`, one of its kin, or "gathered-segments", its scans as roles. back: BACK_ALONE needs no
    kernel local (of whole sequences). halves: two blocks share a head, each with half of its columns: for few heads. aside: the
    two run beside each other, in two streams (likewise). follows: beside each other in one stream, and what comes after them
    follows both, as it follows Triton's (of whole sequences). It is right wherever it runs, for who follows starts when all
    blocks of both have; but a block of roles takes a multiprocessor, so where both have more than there are, back starts when
    again ends, and nothing is won."""
    if aside and follows:
        raise ValueError("as_roles: got aside and follows; accepts one of them: who follows is in the stream of both scans")
    if follows and "-segments" in base.name:
        raise ValueError(f"as_roles.follows: got true with {base.name}; accepts a schedule of whole sequences: segments are "
                         "not counted")
    alone = any(e.do == "issue" and e.value == "qk" for r in back.roles for e in r.events)
    steps = tuple(s for s in base.steps if not alone or s not in BEFORE)
    last = "inner" if "inner" in dict(base.kernels) else "grads"               # what follows both scans
    kept = {k: replace(o, follows=o.follows and (k != last or follows)) for k, o in base.kernels if not alone or k != "local"}
    for name, roles in (("again", again), ("back", back)):
        kept[name] = KernelOptions(HALF if halves else None, roles=in_halves(roles) if halves else roles, backend="tilelang",
                                   aside=aside and name == "again", follows=follows and name == "back")
    plan = next((f"-{p}" for p in ("merged", "turns") if p in base.name), "")
    cut = base.name[base.name.index("-segments"):] if "-segments" in base.name else ""
    how = "-aside" if aside else FOLLOWS if follows else ""
    name = f"backward-roles{plan}{'-alone' if alone else ''}{'-halves' if halves else ''}{how}{cut}"
    return replace(base, name=name, steps=(*steps, ("accumulate", "d_S")), kernels=tuple(kept.items()))


def inner_as_roles(base: Schedule, inner: Roles = INNER, chunks: int = WALK, follows: bool = False) -> Schedule:
    """The plan "gathered-merged" or "gathered-turns" of `base`, or one of these with its scans as roles, and what follows them
    as roles too: each block walks through so many chunks of a sequence, with turns of all value heads of a key head, so that
    none waits for another. What is of rows alone is made after it, by Triton, of the sums that it stores. follows: it starts
    beside both scans, by Triton or as roles, which run beside each other in one stream; walks in the middle first, for there
    they meet."""
    if "merged" not in base.name and "turns" not in base.name:
        raise ValueError(f"inner_as_roles: got {base.name}; accepts a schedule of the plans gathered-merged and gathered-turns")
    if follows and not base.options("back").follows:
        raise ValueError(f"inner_as_roles.follows: got true with {base.name}, whose scans run one after the other or in two "
                         "streams; accepts a schedule whose back follows")
    kernels = {k: o for k, o in base.kernels if k != "grads"}
    kernels |= {"grads": KernelOptions(None, roles=inner, backend="tilelang", follows=follows, around=follows),
                "rows": KernelOptions(None, 1, 1, backend=base.options("solve").backend)}
    steps = (*base.steps, ("products_last", "grads"), ("in_parts", "grads", "bf16"), ("rows_after", "grads", "rows"),
             ("walk", "grads", chunks))
    width = base.name.rsplit("-", 1)[-1]                   # of Triton's scans
    name = base.name.removesuffix(f"-{width}" if width.isdigit() and "segments" not in base.name else "")
    name = (name.removesuffix(FOLLOWS) if follows else name) + "-inner" + f"-{chunks}" * (chunks != WALK) + FOLLOWS * follows
    return replace(base, name=name, steps=steps, kernels=tuple(kernels.items()))


def the_rest_by(backend: str, schedule: Schedule) -> Schedule:
    """A schedule whose kernels are that backend's but for those of which it says something else."""
    return replace(schedule, kernels=tuple((k, replace(o, backend=o.backend or backend)) for k, o in schedule.kernels))


@dataclass(frozen=True)
class Way:
    """How sequences are scanned: whole, a block for each head or, with `halves`, two; or in segments of so many chunks, by
    Triton. aside: the two scans beside each other. walk: chunks of a block of what comes after them, as roles too (0: by
    Triton). follows: that starts beside both, and they beside each other in one stream (of whole sequences; `aside` then says
    nothing)."""
    halves: bool = False
    aside: bool = False
    segment: int = 0
    walk: int = 0
    follows: bool = False

    def __post_init__(self) -> None:
        if self.follows and self.segment:
            raise ValueError("Way.follows: got true with segments; accepts false there: what comes after them waits for all")

    def __str__(self) -> str:
        blocks = "two blocks" if self.halves else "one block"
        beside = self.aside or self.follows
        whole = f"as roles in {blocks} for each, {'beside each other' if beside else 'one after the other'}"
        scans = f"each cut into segments of {self.segment} chunks, which triton scans" if self.segment else whole
        after = f"; what follows them as roles, {self.walk} chunks to a block" if self.walk else ""
        return f"{scans}{after}{', as soon as its chunks are there' if self.follows else ''}"


def way(instance: Instance, sequences: int, heads: int, tokens: int, units: int) -> Way | None:
    """How roles serve a backward; None where they should not be the fastest. units: multiprocessors.

    Roles follow the scans, in long walks where blocks of these are enough (two value heads are taken to share a key head), but
    not where beta comes as logits: its gradient is no sum of rows times beta then. Whole heads are scanned where these and
    sequences are many (several sequences of few heads may be unequal: then a block has most of them); where they are few,
    halves of heads, or segments where they win by Triton alone."""
    scans, walks = sequences * heads, tokens * heads // (2 * CHUNK * WALK)
    long = walks >= FILLED * units
    walk = 0 if instance.switches.beta_sigmoid else WALK if long else SHORT
    if scans >= (MANY if heads >= 16 else 2 * MANY):
        return Way(aside=2 * scans <= units, walk=walk)
    if not walk:
        return None
    if long and heads < 16 and adjoints.can(instance) and \
            (size := adjoints.segment_of(sequences, heads, tokens, units, adjoints.BY_ROLES)):
        return Way(segment=size, walk=walk)
    return Way(halves=True, aside=4 * scans <= units, walk=walk)


def served(base: Schedule, instance: Instance, how: Way) -> Schedule:
    """As it serves: what is of the outputs' gradient among the roles; all that is no role by Triton. base: "gathered-turns"."""
    made = adjoints.in_segments(base, instance, how.segment, adjoints.TURNS) if how.segment else \
        as_roles(base, AGAIN, BACK_ALONE, how.halves, how.aside and not how.follows, how.follows)
    return the_rest_by("triton", inner_as_roles(made, chunks=how.walk, follows=how.follows) if how.walk else made)


def lacks(arch: str, instance: Instance) -> str:
    """What keeps roles from serving a backward; "" where nothing does."""
    s = instance.switches
    needs = {f"roles are of Hopper, not of {arch}": arch == "sm_90",
             f"roles take bf16, not {instance.io} and beta {instance.beta}": (instance.io, instance.beta) == ("bf16", "bf16"),
             f"roles take K x V of 128 x 128, not {instance.K} x {instance.V}": (instance.K, instance.V) == (128, 128),
             f"roles are given nothing by a forward ({instance.keep} is)": instance.keep == "nothing",
             "roles make all of the gradients of q, k, v, g and beta": {*instance.grads} >= {"q", "k", "v", "g", "beta"},
             "roles need a decay": s.decay == "scalar", "roles need what erases": s.erase,
             "roles have states as [K, V], not [V, K]": not s.state_v_first}
    return next((why for why, met in needs.items() if not met), "")
