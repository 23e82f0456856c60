"""The backward with its two scans as roles, and what follows them, beside the plan "gathered" by Triton alone, on an H100 or
its kin: checked, then timed, whole and each kernel.

    python -m gdn_ir.bench.role_backward --out FILE --commit HASH

Checked: on short sequences, packed with ragged ends and an empty one, and dense, against float64 autograd of the recurrence; on
those that are timed, against "gathered"; outputs and freed memory full of NaN before, and the same bits twice. What is wrong is
reported and not timed. Kernels are compiled beforehand, in several processes. Roles that wait for each other would do so for
ever: the process ends where a check or a shape takes too long, and what was found before is kept.
"""
from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from gdn_ir.bench import gradients, inputs
from gdn_ir.bench.adjoints import TIMED, near, spoil, wanted
from gdn_ir.bench.backward import Tensors, kernels
from gdn_ir.bench.cases import Shape, name_of, parse
from gdn_ir.bench.errors import bound, relative, worst
from gdn_ir.bench.gradients import FULL, backward_of
from gdn_ir.bench.plans import call
from gdn_ir.bench.segments import ARCH, LIMIT
from gdn_ir.bench.timing import interleave, timer
from gdn_ir.compiler import Instance, variant
from gdn_ir.coverage import Cell, Layout
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.schedules.adjoints import TURNS as CUT, in_segments
from gdn_ir.schedules.defaults import whole_scans
from gdn_ir.schedules.role_backward import (BACK_ONLY, BOTH, SCALED, SHORT, WALK, as_roles, inner_as_roles, scales_all,
                                            the_rest_by)
from gdn_ir.schedules.roles import AGAIN, BACK, BACK_ALONE
from gdn_ir.schedules.schedule import Schedule

SHAPES: list[Shape] = [([32768], 16, 32), ([32768], 8, 16), ([32768], 4, 8), ([4096] * 8, 16, 32), ([32768], 2, 4),
                       ([8192], 16, 32)]
RAGGED, DENSE = Layout((700, 0, 64, 129, 1, 63), True, 1, 2, 128, 128), Layout((330, 330), False, 2, 4, 128, 128)
CHECKS = [(Cell("packed", FULL, "bf16", RAGGED), "model"), (Cell("dense", FULL, "bf16", DENSE), "model"),
          *((Cell("without states", Switches(), "bf16", RAGGED), kind) for kind in ("real", "no_decay", "strong_decay"))]
SECONDS = 0.2                                              # of timing, for each candidate


def candidates(instance: Instance, sequences: int, heads: int, segments: Sequence[int] = ()) -> dict[str, Schedule]:
    """"gathered", the same with nothing that follows a scan; one kernel for inner and grads, in two ways, each also with eight
    warps; and roles, before each of these: a whole head to a block or half of one, or, beside each other, half of one in
    reverse alone; u's gradient by the outputs made before or among them, the scans in a row or beside each other; and that
    one kernel as roles too, after scans by Triton and by roles, its blocks of few chunks or of more; and roles throughout with
    finer arithmetic. segments: of so many chunks, by Triton and with roles."""
    gathered, merged, turns = (whole_scans(ARCH, instance, sequences, heads, "triton", merges=m)[0]
                               for m in ("", "gathered-merged", "gathered-turns"))
    row = replace(gathered, kernels=tuple((k, replace(o, follows=o.follows and k == "grads")) for k, o in gathered.kernels))
    ways = [*product(((), BOTH), (False, True)), (BACK_ONLY, True)]
    roles = [as_roles(gathered, AGAIN, back, *way) for back, way in product((BACK, BACK_ALONE), ways)]
    roles += [as_roles(base, AGAIN, BACK_ALONE, *way) for base, way in product((merged, turns), ways)]
    inner = [inner_as_roles(merged), *(inner_as_roles(turns, chunks=n) for n in (1, SHORT, 4, WALK, 2 * WALK))]
    inner += [inner_as_roles(as_roles(turns, AGAIN, BACK_ALONE, *way), chunks=n) for way in ways for n in (1, SHORT, WALK)]
    last = scales_all(instance)
    inner += [inner_as_roles(as_roles(turns, AGAIN, BACK_ALONE, halves, True, fine, last), chunks=n)
              for halves, fine, n in product(((), BOTH, BACK_ONLY), (1, 2), (1, SHORT, WALK))]
    one = {"merged": merged, "turns": turns}
    one |= {f"{n}, 8 warps": s.with_options(grads=replace(s.options("grads"), num_warps=8)) for n, s in one.items()}
    one |= {f"{n}, waits": s.with_options(grads=replace(s.options("grads"), follows=False)) for n, s in one.items()}
    found = {"gathered": gathered, "gathered, in a row": row, **one}
    found |= {called(s): s for s in (*roles, *inner)}
    for n in segments:
        cut = in_segments(turns, instance, n, CUT)
        found |= {called(s): s for s in (cut, inner_as_roles(cut))}
        scans = [as_roles(cut, back=back, fine=fine, scale_last=fine > 0 and last)
                 for back, fine in product((BACK, BACK_ALONE), (0, 1, 2))]
        found |= {called(s): s for s in (inner_as_roles(base, chunks=w) for base, w in product(scans, (SHORT, WALK)))}
    for n, halves in product(segments, ((), BOTH)):
        cut = in_segments(gathered, instance, n)
        found |= {called(s): s for s in (cut, as_roles(cut, halves=halves))}
    return {n: the_rest_by("triton", s) for n, s in found.items()}


def called(schedule: Schedule) -> str:
    """The same whether its scale comes last or not, which is for what it is given to say."""
    return schedule.name.removeprefix("backward-").replace(SCALED, "")


def build(job: tuple[Instance, Schedule]) -> str | None:
    """Compile into the cache; why not, where it cannot be."""
    try:
        variant(*job, "triton", ARCH).compiled.launches    # noqa: B018
    except Exception as e:                                 # a compiler's
        return f"{type(e).__name__}: {e}"[:300]
    return None


def in_a_row(schedule: Schedule) -> Schedule:
    """The same kernels, none beside another."""
    kernels = tuple((k, replace(o, aside=False)) for k, o in schedule.kernels)
    return replace(schedule, name=schedule.name.replace("-aside", ""), kernels=kernels)


def checked(check: tuple[Cell, str], want: Tensors, made: dict[str, Schedule]) -> dict[str, Any]:
    """Errors of each schedule's gradients, over poison. Rows that no sequence owns must be zeros."""
    cell, kind = check
    x = {n: t.cuda() for n, t in gradients.make(cell, kind=kind).items()}
    rows = sum(cell.layout.lengths)
    found: dict[str, Any] = {"check": cell.name, "inputs": kind, "errors": {}, "right": {}}
    for name, schedule in made.items():
        print(f"{cell.name}, {kind}: {name}", file=sys.stderr, flush=True)             # should it never end
        try:
            chosen = variant(backward_of(cell), schedule, "triton", ARCH)
            spoil()
            got, again = (gradients.run(chosen, cell, x) for _ in range(2))
            clean = not any(t[rows:].any() for n, t in got.items() if not n.endswith("state"))
            found["errors"][name] = mine = {n: relative(t.cpu(), want[n[2:]]) for n, t in got.items()}
            same = all(torch.equal(got[n], again[n]) for n in got)
            found["right"][name] = clean and same and near(mine, found["errors"]["gathered"])
        except Exception as e:                             # a compiler's, or CUDA's
            found["right"][name], found["errors"][name] = False, {"failed": f"{type(e).__name__}: {e}"[:300]}
    return found


def timed(shape: Shape, made: dict[str, Schedule]) -> dict[str, Any]:
    """Milliseconds of all candidates on one shape, in turns, and of each kernel; microseconds a chunk of the scans."""
    lengths, H, HV = shape
    x = inputs.make(lengths, H, HV, kind="real")
    x["d_o"] = torch.randn_like(x["v"])
    found: dict[str, Any] = {"shape": name_of(lengths), "heads": [H, HV], "plans": {}}
    runs, first = {}, dict[str, torch.Tensor]()
    for name, schedule in made.items():
        print(f"{found['shape']}, {H}/{HV}: {name}", file=sys.stderr, flush=True)
        chosen = variant(TIMED, schedule, "triton", ARCH)
        run = partial(call, chosen, x)
        spoil()
        got, again = run(), run()
        first = first or got
        apart = {n: relative(got[n], first[n]) for n in got}
        row = found["plans"][name] = {"from_gathered": apart, "repeats": all(torch.equal(got[n], again[n]) for n in got)}
        if not row["repeats"] or not worst(apart.values()) <= 2 * bound("bf16", True):
            continue
        runs[name] = timer([run], "cuda")
        row["sources"] = {s.kernel: s.hash for s in chosen.sources}
        if name == "gathered" or schedule.options("again").aside:         # each by itself: where in a row
            continue
        row["kernels"] = ms = kernels(chosen, run)
        if "inner" in name:                                # of each chunk and head
            units = torch.cuda.get_device_properties(0).multi_processor_count
            row["us_per_chunk"] = {"grads": 1e3 * ms["grads"] * units / (HV * sum(-(-n // 64) for n in lengths))}
        elif "roles" in name and "segments" not in name:
            blocks = len(lengths) * HV * (1 + ("halves" in name))
            waves = -(-blocks // torch.cuda.get_device_properties(0).multi_processor_count)
            row["us_per_chunk"] = {k: 1e3 * ms[k] / (waves * -(-max(lengths) // 64)) for k in ("again", "back")}
    interleave(runs, SECONDS)
    for name, t in runs.items():
        found["plans"][name] |= t.summary()
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True, type=Path)
    p.add_argument("--commit", required=True)
    p.add_argument("--only", choices=("checks", "times"), help="one half of the run")
    p.add_argument("--shapes", default="", help="to be timed, as 8x1024:16/32, with commas between")
    p.add_argument("--plans", help="which candidates, besides gathered, with commas between; else all")
    p.add_argument("--segments", type=lambda t: [int(n) for n in t.split(",")], default=[], help="chunks of one: also these")
    p.add_argument("--processes", type=int, default=14, help="that compile")
    a = p.parse_args()
    checks = CHECKS if a.only != "times" else []
    shapes = (parse(a.shapes, "train") if a.shapes else SHAPES) if a.only != "checks" else []
    asked = a.plans.split(",") if a.plans else None

    def some(made: dict[str, Schedule]) -> dict[str, Schedule]:
        return {n: s for n, s in made.items() if n == "gathered" or not asked or n in asked}
    small = [some(candidates(backward_of(c), len(c.layout.lengths), c.layout.HV, a.segments)) for c, _ in checks]
    large = [some(candidates(TIMED, len(lengths), HV, a.segments)) for lengths, _, HV in shapes]
    cells = [(backward_of(c), made) for (c, _), made in zip(checks, small, strict=True)] + [(TIMED, made) for made in large]
    jobs = dict.fromkeys((instance, in_a_row(s)) for instance, made in cells for s in made.values())
    a.out.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(min(a.processes, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        slow = pool.map(wanted, checks)
        built = list(pool.map(build, jobs))
        wants = list(slow)
    failed = {f"{i}, {s.name}": why for (i, s), why in zip(jobs, built, strict=True) if why}
    result: dict[str, Any] = {"commit": a.commit, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
                              "failed": failed, "checks": [], "rows": []}

    def keep(kind: str, row: dict[str, Any]) -> None:
        result[kind].append(row)
        print(json.dumps(row), flush=True)
        a.out.write_text(json.dumps(result, indent=0) + "\n")
    if failed:
        print(json.dumps(failed), flush=True)
    for check, want, made in zip(checks, wants, small, strict=True):
        signal.alarm(LIMIT)
        keep("checks", checked(check, want, made))
    wrong = {n for row in result["checks"] for n, right in row["right"].items() if not right}
    for shape, made in zip(shapes, large, strict=True):
        signal.alarm(LIMIT)
        keep("rows", timed(shape, {n: s for n, s in made.items() if n not in wrong}))
    signal.alarm(0)


if __name__ == "__main__":
    main()
