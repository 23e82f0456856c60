"""The search space: what a schedule decides, each decision with the values that are tried.

A **frame** fixes the plan, the chunk, how the triangular solve is computed, what is hoisted and the products' precision; it
decides which kernels there are. Within a frame each kernel has options: tile, warps, stages. The kernels of a pipeline run one
after another, so their times add: the options of one kernel are varied while the others keep the frame's, and the best of each
are put together afterwards (`compose`). That is a sum of choices where their product would be thousands.

The order of a carry (K x V or V x K) and of products is not a choice that schedules have yet.
"""
from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace

from gdn_ir.artifacts import digest
from gdn_ir.compiler import Instance, planned
from gdn_ir.follow import can_follow
from gdn_ir.program import Program
from gdn_ir.schedules import adjoints
from gdn_ir.schedules.defaults import (CROWDED, FUSED_LENGTHS, LENGTHS, backward_by_roles, default, forward_by_roles,
                                       lean, roles_can, segmented, whole_scans)
from gdn_ir.schedules.plans import Steps, backward_plan, finer, plan
from gdn_ir.schedules.role_backward import WAYS
from gdn_ir.schedules.role_solve import SHORT, WALK
from gdn_ir.schedules.schedule import KernelOptions, Schedule

MODEST = KernelOptions(64, 4, 1)


@dataclass(frozen=True)
class Frame:
    """All of a schedule but its kernels' options. block: rows that the triangular solve substitutes before it merges blocks by
    products; sums: whether the log decay's running sums are hoisted beside the solve; dot: what products' operands are rounded
    to; segment: chunks of a segment, in a plan that cuts sequences into such. The plan "roles" is "solve" ("cut", where it has
    segments) with a scan as roles, which are not varied, and its inverses made by other roles ("roles-short": in blocks of few
    chunks); "roles-fused", "fused" or "cut-fused", has the inverse among them.
    Of a backward "roles" and its kin are what `role_backward.WAYS` says."""
    plan: str
    chunk: int = 64
    block: int = 16
    sums: bool = True
    dot: str = "io"
    segment: int = 0

    def steps(self, instance: Instance) -> Steps:
        if self.plan == "recurrent":
            return ()
        if self.plan.startswith("roles"):
            return self.roles(instance).steps
        if instance.grads:
            norm = self.gathers and instance.switches.l2norm
            return backward_plan(self.plan, instance.program, instance.io, self.chunk, self.block, beta=instance.beta,
                                 segment=self.segment, norm=norm)
        sums = self.sums and instance.switches.decay != "none"
        return plan(self.plan, instance.switches.erase, instance.io, self.chunk, self.block, sums, self.segment)

    @property
    def gathers(self) -> bool:
        """Of a backward, whether it is one of the plans that gather in inner what reads the states."""
        return self.plan.startswith("gathered")

    def roles(self, instance: Instance) -> Schedule:
        """The schedule of roles that a frame of these is."""
        if instance.grads:
            return backward_by_roles(instance, WAYS[self.plan])
        chunks = SHORT if self.plan.endswith("-short") else WALK
        return forward_by_roles(instance, self.segment, self.plan == "roles-fused", chunks)

    def __str__(self) -> str:
        sums = "" if self.sums else ", sums in the scan"
        dot = "" if self.dot == "io" else f", products in {self.dot}"
        cut = f", segments of {self.segment} chunks" if self.segment else ""
        return f"{self.plan}, chunks of {self.chunk}, blocks of {self.block}{sums}{dot}{cut}"


@dataclass(frozen=True)
class Space:
    """frames: the first is searched whole, another where it turns out near the best. v_tile, num_warps, num_stages: values of
    kernels' options (a tile is the part of V that a block owns)."""
    frames: tuple[Frame, ...]
    v_tile: tuple[int | None, ...] = (None,)
    num_warps: tuple[int, ...] = (4,)
    num_stages: tuple[int, ...] = (1,)

    @property
    def hash(self) -> str:
        return digest(asdict(self))[:16]

    def options(self) -> Iterator[KernelOptions]:
        for v, w, s in itertools.product(self.v_tile, self.num_warps, self.num_stages):
            yield KernelOptions(v, w, s)


@dataclass(frozen=True)
class Candidate:
    """A point of the space. varies: the kernel whose options are not the frame's (None: the frame itself, the heuristic, or a
    composition)."""
    schedule: Schedule
    frame: Frame | None = None
    varies: str | None = None


def space_of(backend: str, arch: str, instance: Instance) -> Space:
    """The space for a backend on an architecture."""
    back, f32 = bool(instance.grads), instance.io == "f32"
    if instance.recurrent:
        one = (Frame("recurrent", 1),)
        return Space(one) if arch in ("cpu", "torch") else Space(one, (None, 16, 32, 64, 128), (1, 2, 4, 8))
    if backend == "torch":
        plans: tuple[str, ...] = ("states", "naive") if back else ("fused", "solve", "states", "wy")
        return Space(tuple(Frame(p, c) for p in plans for c in (64, 32, 128)))
    if arch == "cpu":
        chunked = [Frame(p, c) for p in (("states", "naive") if back else ("fused", "naive", "states")) for c in (16, 32, 64)]
        return Space(((Frame("recurrent", 1),) if not back else ()) + tuple(chunked), v_tile=(None, 16, 32, 64))
    if backend == "tilelang" and roles_can(arch, instance):            # without roles it takes half again what Triton does
        if back:
            able = {n: w for n, w in WAYS.items() if not (w.walk and instance.switches.beta_sigmoid)
                    and (adjoints.can(instance) or not w.segment)}
            return Space(tuple(Frame(n, segment=w.segment) for n, w in able.items()), (None, 64), (1, 2, 4, 8), (1, 2))
        ways = (("roles", (0, *LENGTHS)), ("roles-short", (0, *LENGTHS)), ("roles-fused", (0, *FUSED_LENGTHS)))
        roles = tuple(Frame(name, segment=n) for name, lengths in ways for n in lengths)
        return Space((*roles, Frame("states")), (None, 32, 64), (1, 2, 4, 8), (1, 2, 3))
    plans = ("states",) if back else ("states", "wy", "solve", "fused")
    frames = [Frame(p, c, b) for p in plans for c, b in ((64, 16), (64, 32), (32, 16), (128, 16))]
    frames += [Frame(p, sums=False) for p in ("states", "wy") if not back and instance.switches.decay != "none"]
    frames += [Frame(p) for p in ("inside", "merged") if back and backend == "triton"]
    if back and backend == "triton":                       # first what serves whole scans: the first frame is searched whole
        whole = ("gathered-turns", "gathered", "gathered-merged", "grouped") if lean(arch, instance, backend) else ()
        frames = [*map(Frame, whole), *frames, *([] if whole else [Frame("grouped")])]
    if back and lean(arch, instance, backend) and adjoints.can(instance):
        frames += [Frame(p, segment=n) for p in adjoints.PLANS for n in adjoints.LENGTHS]
    frames += [Frame("states", dot="tf32")] if f32 else []
    frames += [Frame("segments", segment=n) for n in (16, 32, 64) if not back and backend == "triton" and instance.K <= 128]
    return Space(tuple(frames), (None, 16, 32, 64, 128), (1, 2, 4, 8), (1, 2, 3, 4))


def candidates(space: Space, backend: str, arch: str, instance: Instance, heads: int = 32) -> Iterator[Candidate]:
    """What is tried first: every frame, and the first one's options. Illegal ones too (prune.py says why they go)."""
    for frame in space.frames:
        yield Candidate(based(frame, backend, arch, instance, heads), frame)
    yield from widened(space.frames[0], space, backend, arch, instance, heads)


def widened(frame: Frame, space: Space, backend: str, arch: str, instance: Instance, heads: int = 32) -> Iterator[Candidate]:
    """A frame with the options of each of its kernels varied, but what roles do. A kernel that follows another does so in all
    but one."""
    base = based(frame, backend, arch, instance, heads)
    for kernel in kernels_of(frame, instance):
        kept = base.options(kernel)
        follows = kept.follows
        for options in space.options() if not kept.roles else ():
            varied = replace(kept, v_tile=options.v_tile, num_warps=options.num_warps, num_stages=options.num_stages)
            yield Candidate(base.with_options(**{kernel: varied}), frame, kernel)
        if follows:
            yield Candidate(base.with_options(**{kernel: replace(base.options(kernel), follows=False)}), frame, kernel)


def kernels_of(frame: Frame, instance: Instance) -> list[str]:
    """Names of the kernels that a frame makes; none where it is not legal."""
    return [p.name for p in made_by(frame, instance)]


def made_by(frame: Frame, instance: Instance) -> tuple[Program, ...]:
    if frame.plan == "recurrent":
        return (instance.program,)
    try:
        return planned(instance.program, frame.steps(instance))
    except ValueError:
        return ()


def based(frame: Frame, backend: str, arch: str, instance: Instance, heads: int) -> Schedule:
    """A frame's schedule before any option is varied: the heuristic's options for kernels that it knows, modest ones else."""
    pipeline = made_by(frame, instance)
    names = [p.name for p in pipeline]
    known: Mapping[str, KernelOptions] = {}
    if arch not in ("cpu", "torch"):
        try:
            few = min(heads, CROWDED - 1) if backend == "tilelang" else heads              # roles have frames of their own
            whole = frame.plan.removesuffix("-segments")
            merges = whole if whole in ("gathered-turns", "gathered-merged") else ""
            best = whole_scans(arch, instance, 1, heads, backend, frame.gathers, merges)[0] if instance.grads else \
                default(arch, instance, 1, few, 64, backend)[0]
            if instance.grads and frame.segment:
                best = adjoints.in_segments(best, instance, frame.segment, frame.plan)
            known = dict(best.kernels)
        except ValueError:
            known = {}
        if frame.plan in ("fused", "solve"):               # its scan does all the work
            known = {k: o for k, o in known.items() if k != "scan"}
    if frame.plan.startswith("roles"):
        known = dict(frame.roles(instance).kernels)
    elif frame.segment and not instance.grads and arch in ("sm_80", "sm_90"):
        known = dict(segmented(arch, instance).kernels)
    behind = {p.name: before for before, p in zip(pipeline, pipeline[1:])}
    known = {n: o if not o.follows or (n in behind and can_follow(behind[n], next(p for p in pipeline if p.name == n)))
             else replace(o, follows=False) for n, o in known.items()}
    options = {n: known.get(n, MODEST if arch not in ("cpu", "torch") else KernelOptions()) for n in names}
    steps = frame.steps(instance) if names else (("illegal",),)
    steps = finer(steps, instance.io, instance.K, arch) if instance.grads and backend == "triton" else steps      # as serves
    made = Schedule(frame.plan, frame.chunk, steps, dot=frame.dot)
    return replace(made, kernels=(("*", MODEST if arch not in ("cpu", "torch") else KernelOptions()), *options.items()))


def compose(times: Iterable[tuple[Candidate, float]], most: int = 6) -> list[Candidate]:
    """New candidates from measured ones: of each frame, every kernel's best options put together; then with the second best of
    one kernel. The best frames first."""
    frames: dict[Frame, list[tuple[float, Candidate]]] = {}
    for c, ms in times:
        if c.frame is not None:
            frames.setdefault(c.frame, []).append((ms, c))
    found: dict[Schedule, Candidate] = {}
    for frame, group in sorted(frames.items(), key=lambda x: min(ms for ms, _ in x[1])):
        ranked: dict[str, list[KernelOptions]] = {}
        for _, c in sorted(group, key=lambda x: x[0]):
            if c.varies is not None:
                ranked.setdefault(c.varies, []).append(c.schedule.options(c.varies))
        base = min(group, key=lambda x: x[0])[1].schedule
        best = base.with_options(**{k: o[0] for k, o in ranked.items()})
        for s in (best, *(best.with_options(**{k: o[1]}) for k, o in ranked.items() if len(o) > 1)):
            if all(s != c.schedule for _, c in group):
                found.setdefault(s, Candidate(s, frame))
    return list(found.values())[:most]
