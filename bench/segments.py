"""The plan "segments", by Triton, and roles, whole and in segments, beside "states" in one run, on an H100 or its kin: checked,
then timed, whole and each kernel.

    python -m gdn_ir.bench.segments --out DIR --commit HASH
    python -m gdn_ir.bench.segments --out DIR --commit HASH --segments 32 --set compose=32,8,2 --set scan=16,4,3

Checked: on short sequences, against the token recurrence in float64, beside the errors of "states"; on those that are timed,
against the outputs of "states"; outputs and freed memory full of NaN before, and the same bits twice. What is wrong is reported
and not timed. --set adds a candidate for each number of chunks: one kernel with that tile of V, warps and stages. Kernels are
compiled beforehand, in several processes, into the cache. Roles that wait for each other would do so for ever: the process ends
where a check or a shape takes too long, and what was found before is kept.
"""
from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from gdn_ir.autotune.measure import copies_beyond_l2
from gdn_ir.backends.base import TORCH
from gdn_ir.bench import inputs
from gdn_ir.bench.backward import Tensors, kernels
from gdn_ir.bench.cases import Shape, name_of
from gdn_ir.bench.errors import bound, relative, worst
from gdn_ir.bench.timing import interleave, timer
from gdn_ir.compiler import Instance, Variant, variant
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.reference import recurrence
from gdn_ir.schedules.defaults import default, forward_by_roles, roles_can, segmented
from gdn_ir.schedules.schedule import KernelOptions, Schedule

ARCH = "sm_90"
SHAPES: list[Shape] = [([32768], 2, 8), ([32768], 16, 32), ([32768], 4, 16), ([8192], 16, 32), ([32768], 16, 64),
                       ([32768], 16, 16), ([8192], 2, 8), ([28672, 4096], 2, 8), ([1024] * 8, 4, 16), ([8192] * 4, 2, 8),
                       ([4096], 16, 32), ([4096], 2, 8), ([4096] * 8, 16, 64)]
TIMED = Instance(Switches(), 128, 128, "bf16", "bf16", True)
STATES = Switches(initial_state=True, final_state=True)
WORSE = 1.2                                                # times the error of "states", at most
SECONDS = 0.5                                              # of timing, for each candidate
LIMIT = 120                                                # seconds, for a check or a shape


@dataclass(frozen=True)
class Check:
    """Inputs to check against the recurrence. dense: two sequences of one length; else ragged ones, one of them empty, rows
    after the last, and others that end with a segment and a token after one."""
    name: str
    switches: Switches = STATES
    io: str = "bf16"
    kind: str = "model"
    dense: bool = False
    K: int = 128
    V: int = 128

    @property
    def instance(self) -> Instance:
        return Instance(self.switches, self.K, self.V, self.io, self.io, not self.dense)

    def lengths(self, segment: int) -> list[int]:
        tokens = 64 * segment
        return [tokens + 300] * 2 if self.dense else [2 * tokens + 300, 0, tokens, 129, tokens + 1, 70]


CHECKS = (Check("packed"), Check("dense", dense=True), Check("no decay", kind="no_decay"),
          Check("correlated", kind="correlated"), Check("hardly decays", kind="real"), Check("fades", kind="strong_decay"),
          Check("without states", Switches()),
          Check("float16", io="f16"), Check("float32", io="f32"), Check("no decay at all", replace(STATES, decay="none")),
          Check("no erase", replace(STATES, erase=False)), Check("neither", replace(STATES, decay="none", erase=False)),
          Check("K = 64, V = 96", K=64, V=96))


def states(instance: Instance, heads: int = 8, tokens: int = 32768) -> Schedule:
    return default(ARCH, instance, 1, heads, tokens)[0]


def as_roles(instance: Instance, segment: int) -> Schedule:
    return forward_by_roles(instance, 0 if segment == -1 else abs(segment), one=segment < 0)


def backend_of(schedule: Schedule) -> str:
    """Whose pipeline a schedule is for: roles are TileLang's."""
    return "tilelang" if any(o.roles for _, o in schedule.kernels) else "triton"


def candidates(instance: Instance, lengths: list[int], changes: list[tuple[str, KernelOptions]]) \
        -> Iterator[tuple[str, Schedule]]:
    """The plan "segments" with each number of chunks, and each change of a kernel's options."""
    for n in lengths:
        yield from changed(segmented(ARCH, instance, n), changes)


def changed(s: Schedule, changes: list[tuple[str, KernelOptions]]) -> Iterator[tuple[str, Schedule]]:
    """A schedule, and itself with each change of a kernel's tile, warps and stages."""
    yield s.name, s
    for kernel, o in changes:
        if kernel in dict(s.kernels):
            now = replace(s.options(kernel), v_tile=o.v_tile, num_warps=o.num_warps, num_stages=o.num_stages)
            yield f"{s.name}, {kernel} {now}", s.with_options(**{kernel: now})


def build(job: tuple[Instance, Schedule]) -> str | None:
    """Compile into the cache; why not, where it cannot be."""
    try:
        variant(*job, backend_of(job[1]), ARCH).compiled.launches         # noqa: B018
    except Exception as e:                                 # denied, or a compiler's
        return f"{type(e).__name__}: {e}"[:300]
    return None


def build_all(jobs: list[tuple[Instance, Schedule]]) -> dict[tuple[Instance, Schedule], str]:
    """Compile all, in processes; what failed, and why."""
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        return {job: why for job, why in zip(jobs, pool.map(build, jobs), strict=True) if why}


def call(chosen: Variant, x: Tensors, ends: torch.Tensor | None, sequences: int, spoil: bool = False) -> Tensors:
    """o and the final state, where it is asked for. spoil: what the call may find in memory is NaN."""
    s, (T, HV, V), K = chosen.instance.switches, x["v"].shape, x["q"].shape[-1]
    given = {n: x[n] for n in ("q", "k", "v", "beta")} | ({"g": x["g"]} if s.decay == "scalar" else {})
    given |= {"initial_state": x["initial_state"]} if s.initial_state else {}
    made = torch.full if spoil else lambda shape, _, **kinds: torch.empty(shape, **kinds)
    out = {"o": made((T, HV, V), float("nan"), dtype=x["v"].dtype, device="cuda")}
    if s.final_state:
        out["final_state"] = made((sequences, HV, K, V), float("nan"), dtype=torch.float32, device="cuda")
    if spoil:
        torch.full((1 << 28,), float("nan"), device="cuda")             # freed at once: temporaries lie there
    chosen(given | out, K ** -0.5, sequences, ends)
    return out


def repeated(run: Callable[[], Tensors]) -> tuple[Tensors, bool]:
    """What a call gives, and whether it does so again."""
    first, second = run(), run()
    return first, all(torch.equal(first[n], second[n]) for n in first)


def checked(c: Check, segment: int, cut: Schedule) -> dict[str, Any]:
    """Errors of "states" and of another schedule against the recurrence. segment: chunks of one, for the lengths."""
    lengths, s = c.lengths(segment), c.switches
    x = inputs.make(lengths, 2, 4, c.K, c.V, TORCH[c.io], kind=c.kind)
    if not c.dense:                                        # the last rows are no sequence's
        x |= {n: x[n][:-1].contiguous() for n in ("cu_seqlens", "initial_state")}
    cpu = {n: t.cpu() for n, t in x.items()}
    q, k, v, g, beta = (cpu[n][None] for n in ("q", "k", "v", "g", "beta"))
    start, ends = cpu["initial_state"] if s.initial_state else None, cpu["cu_seqlens"]
    o, S = recurrence(q, k, v, g if s.decay == "scalar" else None, beta, None, start, ends, erase=s.erase,
                      l2norm=s.l2norm)
    want = {"o": o[0].cuda(), "final_state": S.cuda()}
    found: dict[str, Any] = {"check": c.name, "schedule": cut.name, "errors": {}}
    for name, schedule in (("states", states(c.instance)), (cut.name, cut)):
        chosen = variant(c.instance, schedule, backend_of(schedule), ARCH)
        got, again = repeated(partial(call, chosen, x, None if c.dense else x["cu_seqlens"], len(ends) - 1, spoil=True))
        found["errors"][name] = {n: relative(got[n], want[n]) for n in got}
        found["repeats"] = again
    mine, theirs = found["errors"][cut.name], found["errors"]["states"]
    found["right"] = found["repeats"] and all(mine[n] <= WORSE * theirs[n] + 1e-6 for n in mine)
    return found


def timed(shape: Shape, made: list[tuple[str, Schedule]], instance: Instance = TIMED) -> dict[str, Any]:
    """Milliseconds of all candidates on one shape, in turns, and of each of their kernels."""
    lengths, H, HV = shape
    x = inputs.make(lengths, H, HV, kind="real")
    size = sum(t.numel() * t.element_size() for t in x.values())
    copies = [x, *({n: t.clone() for n, t in x.items()} for _ in range(copies_beyond_l2(size) - 1))]
    found: dict[str, Any] = {"shape": name_of(lengths), "heads": [H, HV], "plans": {}}
    runs, want = {}, None
    for name, schedule in made:
        chosen = variant(instance, schedule, backend_of(schedule), ARCH)
        run = [partial(call, chosen, y, y["cu_seqlens"], len(lengths)) for y in copies]
        got, again = repeated(partial(call, chosen, x, x["cu_seqlens"], len(lengths), spoil=True))
        want = want or got
        apart = {n: relative(got[n], want[n]) for n in got}
        found["plans"][name] = {"from_first": apart, "repeats": again, "sources": {s.kernel: s.hash for s in chosen.sources}}
        if again and worst(apart.values()) <= 2 * bound("bf16"):         # each may be as far from the truth as that
            found["plans"][name]["kernels"] = kernels(chosen, run[0])
            runs[name] = timer(run, "cuda")
    interleave(runs, SECONDS)
    for name, t in runs.items():
        found["plans"][name] |= t.summary()
    return found


def change(text: str) -> tuple[str, KernelOptions]:
    kernel, numbers = text.split("=")
    tile, warps, stages = (int(n) for n in numbers.split(","))
    return kernel, KernelOptions(tile or None, warps, stages)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True, type=Path)
    p.add_argument("--commit", required=True)
    p.add_argument("--segments", type=lambda t: [int(n) for n in t.split(",") if n], default=[16, 32, 64])
    p.add_argument("--roles", type=lambda t: [int(n) for n in t.split(",") if n], default=[0, 16, 32, 64, 128],
                   help="chunks of segments that roles scan; 0: whole sequences; -1: these, the inverse among the "
                        "roles; -n: segments of n, so too (write --roles=-1,-64)")
    p.add_argument("--set", type=change, action="append", default=[], metavar="KERNEL=TILE,WARPS,STAGES")
    p.add_argument("--only", choices=("checks", "times"), help="one half of the run")
    p.add_argument("--l2norm", action="store_true", help="the op normalises q and k")
    p.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes are timed")
    a = p.parse_args()
    every = [replace(c, switches=replace(c.switches, l2norm=a.l2norm)) for c in CHECKS]
    this = replace(TIMED, switches=replace(TIMED.switches, l2norm=a.l2norm))
    checks = [(c, n, segmented(ARCH, c.instance, n)) for n in a.segments
              for c in (every if n == a.segments[0] else every[:3])]
    able = [c for c in every if roles_can(ARCH, c.instance)]
    checks += [(c, max(abs(n), 2), as_roles(c.instance, n)) for n in a.roles for c in (able if n in a.roles[:2] else able[:2])]
    checks = checks if a.only != "times" else []
    shapes = SHAPES[:a.shapes] if a.only != "checks" else []
    made = [*candidates(this, a.segments, a.set), *(x for n in a.roles for x in changed(as_roles(this, n), a.set))]
    base = [states(this, HV * len(lengths)) for lengths, _, HV in shapes]
    jobs = [(c.instance, s) for c, _, cut in checks for s in (states(c.instance), cut)]
    jobs += [(this, s) for s in (*base, *(s for _, s in made))] if shapes else []
    failed = build_all(list(dict.fromkeys(jobs)))
    result: dict[str, Any] = {"commit": a.commit, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
                              "failed": {f"{i}, {s.name} {s.kernels}": why for (i, s), why in failed.items()},
                              "checks": [], "rows": []}
    a.out.mkdir(parents=True, exist_ok=True)

    def keep(kind: str, row: dict[str, Any]) -> None:
        result[kind].append(row)
        print(json.dumps(row), flush=True)
        (a.out / "segments.json").write_text(json.dumps(result, indent=0) + "\n")
    if failed:
        print(json.dumps(result["failed"]), flush=True)
    wrong: set[str] = set()                                # schedules that a check found so: they are not timed
    for c, n, cut in checks:
        signal.alarm(LIMIT)
        try:
            keep("checks", checked(c, n, cut))
        except Exception as e:
            keep("checks", {"check": c.name, "schedule": cut.name, "failed": f"{type(e).__name__}: {e}"[:300]})
        wrong |= set() if result["checks"][-1].get("right") else {cut.name}
    for shape, first in zip(shapes, base, strict=True):
        signal.alarm(LIMIT)
        left = ((n, s) for n, s in made if (this, s) not in failed and s.name not in wrong)
        keep("rows", timed(shape, [("states", first), *left], this))
    signal.alarm(0)


if __name__ == "__main__":
    main()
