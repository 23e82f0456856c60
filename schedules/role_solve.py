"""What makes the inverses of all chunks before the scans that read them, as cooperating roles: of the forward and of the derived
backward alike."""
from __future__ import annotations

from dataclasses import replace

from gdn_ir.schedules.roles import Roles, solving
from gdn_ir.schedules.schedule import KernelOptions, Schedule

KERNEL = "solve"
WALK = 8                                                   # chunks of a sequence that a block goes through
BLOCKS = 4                                                 # that share a multiprocessor


def solve_as_roles(base: Schedule, chunks: int = WALK, blocks: int = BLOCKS, apart: bool = False) -> Schedule:
    """A schedule whose kernel solve is roles too, joining the inverse's blocks by products in fp16, each block walking through so
    many chunks of a sequence. Raises ValueError for one that has no such kernel, or leaves chunks out of it."""
    if not any(s[0] == "hoist" and s[-1] == KERNEL for s in base.steps):
        raise ValueError(f"solve_as_roles: got {base.name}; accepts a schedule that makes the inverses of all chunks at once")
    joined = ((*s[:-1], "f16") if s[0] == "merge" else s for s in base.steps)
    kernels = {**dict(base.kernels), KERNEL: KernelOptions(None, roles=roles_of(base, blocks, apart), backend="tilelang")}
    return replace(base, name=f"{base.name}-{KERNEL}" + f"-{chunks}" * (chunks != WALK), kernels=tuple(kernels.items()),
                   steps=(*joined, ("walk", KERNEL, chunks)))


def roles_of(base: Schedule, blocks: int, apart: bool) -> Roles:
    """The roles that store what a schedule hoists there."""
    hoisted = [str(s[1]) for s in base.steps if s[0] == "hoist" and s[-1] == KERNEL]
    stored = tuple(n if n != "beta" else "beta_kept" for n in hoisted if n in ("G", "total", "beta"))
    return solving("A_beta" in hoisted, stored, any(s[0] == "forget" for s in base.steps), blocks, apart)
