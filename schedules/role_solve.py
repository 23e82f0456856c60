"""What makes the inverses of all chunks before the scans that read them, as cooperating roles: of the forward and of the
derived backward alike."""
from __future__ import annotations

from dataclasses import replace

from gdn_ir.schedules.roles import Roles, solving
from gdn_ir.schedules.schedule import KernelOptions, Schedule

KERNEL = "solve"
WALK, SHORT = 8, 2                                         # chunks of a sequence that a block goes through
MANY = 1500                                                # inverses from which long walks win on an H100


def walk(inverses: int) -> int:
    """Chunks of a block's walk: to start one takes about half as long as a chunk, so that walks should be long where there are
    blocks enough for all multiprocessors then."""
    return WALK if inverses >= MANY else SHORT


def solve_as_roles(base: Schedule, chunks: int = WALK) -> Schedule:
    """A schedule whose kernel solve is roles too; each block walks through so many chunks of a sequence. They join an inverse's
    blocks in fp16, as roles that make it beside the scan do: as fine as tf32, but over 65504 it overflows, which takes keys
    that make states grow (beta |k|^2 over 2). Raises ValueError for a schedule that does not make all chunks' inverses in such
    a kernel."""
    if not any(s[0] == "hoist" and s[-1] == KERNEL for s in base.steps):
        raise ValueError(f"solve_as_roles: got {base.name}; accepts a schedule that makes the inverses of all chunks at once")
    joined = ((*s[:-1], "f16") if s[0] == "merge" else s for s in base.steps)
    kernels = {**dict(base.kernels), KERNEL: KernelOptions(None, roles=roles_of(base), backend="tilelang")}
    return replace(base, name=f"{base.name}-{KERNEL}" + f"-{chunks}" * (chunks != WALK), kernels=tuple(kernels.items()),
                   steps=(*joined, ("walk", KERNEL, chunks)))


def roles_of(base: Schedule) -> Roles:
    """The roles that store what a schedule hoists there."""
    hoisted = [str(s[1]) for s in base.steps if s[0] == "hoist" and s[-1] == KERNEL]
    stored = tuple(n if n != "beta" else "beta_kept" for n in hoisted if n in ("G", "total", "beta"))
    return solving("A_beta" in hoisted, stored, any(s[0] == "forget" for s in base.steps))
