"""The derived backward with its two serial scans as cooperating roles, for TileLang on Hopper; all else is Triton's."""
from __future__ import annotations

from dataclasses import replace

from gdn_ir.schedules.roles import AGAIN, BACK, Roles, in_halves
from gdn_ir.schedules.schedule import KernelOptions, Schedule

# what makes u's gradient by the outputs before the adjoint's scan, which then only adds it
BEFORE = (("peel", "d_u", "d_u_o"), ("turn", "d_u_o"), ("hoist", "d_u_o", "io", "local"), ("move", "local", "again"))
HALF = 64                                                  # columns of V that a block owns where two share a head


def as_roles(base: Schedule, again: Roles = AGAIN, back: Roles = BACK, halves: bool = False, aside: bool = False) -> Schedule:
    """The plan "gathered" of `base`, or "gathered-segments", its scans as roles. back: BACK_ALONE needs no kernel local (of
    whole sequences). halves: two blocks share a head, each with its columns: for few heads. aside: the two run beside each
    other, in two streams (likewise). Nothing follows a scan of roles yet: it counts no chunks."""
    alone = any(e.do == "issue" and e.value == "qk" for r in back.roles for e in r.events)
    steps = tuple(s for s in base.steps if not alone or s not in BEFORE)
    kept = {k: replace(o, follows=o.follows and k != "inner") for k, o in base.kernels if not alone or k != "local"}
    for name, roles in (("again", again), ("back", back)):
        kept[name] = KernelOptions(HALF if halves else None, roles=in_halves(roles) if halves else roles, backend="tilelang",
                                   aside=aside and name == "again")
    name = f"backward-roles{'-alone' if alone else ''}{'-halves' if halves else ''}{'-aside' if aside else ''}"
    return replace(base, name=name, steps=(*steps, ("accumulate", "d_S")), kernels=tuple(kept.items()))
