"""The inverses of all chunks as roles, in forwards and backwards, beside those by Triton, on an H100 or its kin: checked, then
timed, whole and each kernel.

    python -m gdn_ir.bench.role_solve --out FILE --commit HASH

Checked and timed as bench/segments.py does forwards and bench/role_backward.py backwards: against float64 and against what
serves, over poison, the same bits twice; what is wrong is reported and not timed.
"""
from __future__ import annotations

import argparse
import json
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from gdn_ir.bench import role_backward, segments
from gdn_ir.bench.adjoints import TIMED, wanted
from gdn_ir.bench.cases import Shape, parse
from gdn_ir.bench.gradients import backward_of
from gdn_ir.bench.segments import ARCH, LIMIT
from gdn_ir.compiler import Instance
from gdn_ir.schedules.defaults import (LENGTHS, MULTIPROCESSORS, TURNS, default, forward_by_roles, of_roles, segmented_roles,
                                       whole_scans)
from gdn_ir.schedules.role_backward import served, the_rest_by, way
from gdn_ir.schedules.role_solve import solve_as_roles
from gdn_ir.schedules.schedule import KernelOptions, Schedule

SHAPES: list[Shape] = [([8192], 16, 32), ([32768], 16, 32), ([32768], 4, 8), ([8192], 4, 8), ([2048], 16, 32),
                       ([1024] * 8, 16, 32)]
BACKWARD: list[Shape] = [([8192], 16, 32), ([32768], 16, 32), ([32768], 4, 8), ([1024] * 8, 16, 32), ([4096] * 8, 16, 32)]
WALKS = (8, 2, 4, 16)                                      # chunks that a block walks through
FORWARD_CHECKS = [c for c in segments.CHECKS
                  if c.io == "bf16" and c.switches.erase and c.switches.decay != "none" and c.K == 128]


def forwards(shape: Shape) -> dict[str, Schedule]:
    """What serves by TileLang, and segments of every length that a sequence has, with their inverses by Triton and as roles."""
    lengths, _, HV = shape
    chunks = max(-(-n // 64) for n in lengths)
    found = {"served": default(ARCH, segments.TIMED, len(lengths), HV, sum(lengths), "tilelang")[0]}
    found["roles-fused"] = forward_by_roles(segments.TIMED, one=True)
    for n in (0, *(n for n in LENGTHS if n < chunks)):
        base = segmented_roles(segments.TIMED, n) if n else solved_by_triton()
        found |= {s.name: s for s in (base, *(solve_as_roles(base, w) for w in WALKS[:2]))}
    return found


def solved_by_triton() -> Schedule:
    """Roles of whole sequences, their inverses by Triton."""
    base = of_roles()
    return base.with_options(solve=KernelOptions(None, 1, 1, backend="triton"))


def backwards(instance: Instance, shape: Shape) -> dict[str, Schedule]:
    """The way that serves by roles, with its inverses by Triton and as roles."""
    lengths, _, HV = shape
    how = way(instance, len(lengths), HV, sum(lengths), MULTIPROCESSORS[ARCH])
    turns, gathered = (whole_scans(ARCH, instance, len(lengths), HV, "triton", merges=m)[0] for m in (TURNS, ""))
    base = turns if isinstance(how, str) else served(turns, instance, how, inverses=False)
    found = [base, *(solve_as_roles(base, w) for w in WALKS)]
    return {"gathered": the_rest_by("triton", gathered)} | {s.name: the_rest_by("triton", s) for s in found}


def build(job: tuple[str, Instance, Schedule]) -> str | None:
    """Compile into the cache; why not, where it cannot be."""
    op, instance, schedule = job
    return segments.build((instance, schedule)) if op == "forward" else role_backward.build((instance, schedule))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True, type=Path)
    p.add_argument("--commit", required=True)
    p.add_argument("--only", choices=("checks", "times", "build"), help="a part of the run; to compile alone needs no GPU")
    p.add_argument("--ops", default="forward,backward", help="of these")
    p.add_argument("--shapes", default="", help="to be timed, as 8x1024:16/32, with commas between")
    p.add_argument("--processes", type=int, default=14, help="that compile")
    a = p.parse_args()
    ops, asked = a.ops.split(","), parse(a.shapes, "train") if a.shapes else []
    tables = {"forward": SHAPES, "backward": BACKWARD} if a.only != "checks" else {}
    shapes = {op: asked or table for op, table in tables.items() if op in ops}
    checks = role_backward.CHECKS if "backward" in ops and a.only != "times" else []
    small: Shape = ([700, 64], 16, 32)
    of_checks = [backwards(backward_of(c), small) for c, _ in checks]
    cuts = [(c, forward_by_roles(c.instance, n)) for c in FORWARD_CHECKS for n in (0, 8)
            if "forward" in ops and a.only != "times"]
    jobs: dict[tuple[str, Instance, Schedule], None] = {}
    for (c, _), made in zip(checks, of_checks, strict=True):
        jobs |= {("backward", backward_of(c), role_backward.in_a_row(s)): None for s in made.values()}
    for check, cut in cuts:
        jobs |= {("forward", check.instance, s): None for s in (segments.states(check.instance), cut)}
    for shape in shapes.get("forward", []):
        jobs |= {("forward", segments.TIMED, s): None for s in forwards(shape).values()}
    for shape in shapes.get("backward", []):
        jobs |= {("backward", TIMED, role_backward.in_a_row(s)): None
                 for s in backwards(TIMED, shape).values()}
    with ProcessPoolExecutor(min(a.processes, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        slow = pool.map(wanted, checks if a.only != "build" else [])
        built = list(pool.map(build, jobs))
        wants = list(slow)
    failed = {f"{i}, {s.name}": why for (_, i, s), why in zip(jobs, built, strict=True) if why}
    result: dict[str, Any] = {"commit": a.commit, "failed": failed, "checks": [], "forward": [], "backward": []}
    if failed:
        print(json.dumps(failed), flush=True)
    if a.only == "build":
        return
    result |= {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}

    def keep(kind: str, row: dict[str, Any]) -> None:
        result[kind].append(row)
        a.out.write_text(json.dumps(result, indent=0) + "\n")
    a.out.parent.mkdir(parents=True, exist_ok=True)
    for bench_check, want, made in zip(checks, wants, of_checks, strict=True):
        signal.alarm(LIMIT)
        keep("checks", role_backward.checked(bench_check, want, made))
    for check, cut in cuts:
        signal.alarm(LIMIT)
        keep("checks", segments.checked(check, 8, cut))
    for shape in shapes.get("backward", []):
        signal.alarm(LIMIT)
        keep("backward", role_backward.timed(shape, backwards(TIMED, shape)))
    for shape in shapes.get("forward", []):
        signal.alarm(LIMIT)
        keep("forward", segments.timed(shape, [*forwards(shape).items()]))
    signal.alarm(0)


if __name__ == "__main__":
    main()
