"""Which variant `gdn-ir emit` prints."""
from __future__ import annotations

from pathlib import Path

from gdn_ir import policy
from gdn_ir.autotune.keys import Shape
from gdn_ir.autotune.lookup import find
from gdn_ir.backends import BACKENDS
from gdn_ir.compiler import Instance, Variant, variant
from gdn_ir.schedules.defaults import forward_by_roles, roles_lack
from gdn_ir.schedules.plans import PLANS, backward_plan, plan
from gdn_ir.schedules.schedule import Schedule

ROLES = ("roles", "roles-fused")


def chosen(instance: Instance, shape: Shape, backend: str, arch: str, schedule: str) -> Variant:
    """The variant for a call. backend: "" for the one that serves it or, with a schedule, one that can have it. schedule:
    "default", a plan, "roles", "roles-fused" or a JSON file. Raises ValueError naming what is wrong."""
    if backend and backend not in BACKENDS:
        raise ValueError(f"--backend: got {backend!r}; accepts {', '.join(BACKENDS)}")
    from gdn_ir.registry import named as known_as
    arch = known_as(arch)
    if schedule == "default" and not backend:
        return serving(instance, shape, arch)
    wanted = None if schedule == "default" else named(schedule, instance)
    roles = wanted is not None and any(o.roles for _, o in wanted.kernels)
    backend = backend or ("tilelang" if roles or arch == "cpu" else "triton")
    if wanted is None:
        wanted = find("torch" if backend == "torch" else arch, instance, *shape.key, backend).schedule
    if roles and backend != "tilelang":
        raise ValueError(f"--backend: got {backend}; accepts tilelang, for a schedule of roles")
    try:
        return variant(instance, wanted, backend, arch)
    except ValueError as e:                                # which was made for another kind of call, perhaps
        raise ValueError(f"{e}\n  in --schedule {schedule}, for {instance}") from None


def serving(instance: Instance, shape: Shape, arch: str) -> Variant:
    """The one that `explain` says is chosen, of our backends."""
    from gdn_ir.registry import first, options
    every = options(instance, arch, *shape.key)
    found = first(every, policy.asked())
    if found is not None and isinstance(found.variant, Variant):
        return found.variant
    raise ValueError(f"--arch: got {arch}: " + "; ".join(f"{o.backend} cannot: {o.reason}" for o in every))


def named(schedule: str, instance: Instance) -> Schedule:
    """A schedule as a user names it."""
    s, back = instance.switches, bool(instance.grads)
    if instance.recurrent and not Path(schedule).is_file():
        raise ValueError(f"--schedule: got {schedule!r} with --op recurrent; accepts default, or a JSON file that exists")
    if schedule in ROLES and not back and (why := roles_lack("sm_90", instance)):
        raise ValueError(f"--schedule {schedule}: {why}")
    known = PLANS["backward" if back else "forward"]
    if Path(schedule).is_file():
        try:
            return Schedule.from_json(Path(schedule).read_text())
        except ValueError as e:
            raise ValueError(f"--schedule {schedule}: {e}") from None
    if schedule in ROLES and not back:
        return forward_by_roles(instance, one=schedule == "roles-fused")
    if schedule not in known:
        known = (*known, *(() if back else ROLES))
        raise ValueError(f"--schedule: got {schedule!r}; accepts default, {', '.join(known)}, or a JSON file that exists")
    steps = backward_plan(schedule, instance.program, instance.io, keep=instance.keep, beta=instance.beta) if back else \
        plan(schedule, s.erase, instance.io, sums=s.decay != "none" and bool(instance.left), leave=instance.left)
    return Schedule(schedule, steps=steps)
