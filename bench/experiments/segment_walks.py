"""The backward of few heads on a GPU, each way beside the others: Triton's scans, roles in halves, and roles in segments, with
walks of so many chunks after them, composes of other tiles and stages, and kernels before the scans in the order of Triton's.

    python -m gdn_ir.bench.experiments.segment_walks --shapes 1x32768:4/8,1x16384:4/8 --out page.json --commit 1234567
"""
from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gdn_ir.bench import inputs
from gdn_ir.bench.cases import parse
from gdn_ir.bench.errors import relative
from gdn_ir.bench.gradients import Tensors, poison
from gdn_ir.bench.role_backward import ARCH, TIMED
from gdn_ir.bench.timing import interleave, timer
from gdn_ir.compiler import Variant, variant
from gdn_ir.schedules import adjoints, defaults, role_solve
from gdn_ir.schedules.role_backward import (
    BOTH,
    SEGMENT,
    SINGLE,
    WALK,
    Way,
    as_roles,
    inner_as_roles,
    solve_as_roles,
    the_rest_by,
)
from gdn_ir.schedules.schedule import Schedule

SECONDS = 0.1


def ways(sequences: int, heads: int) -> dict[str, Schedule]:
    """All that is timed, by name; the first is what the others' gradients are compared with."""
    turns = defaults.whole_scans(ARCH, TIMED, sequences, heads, "triton", merges="gathered-turns")[0]
    found = {"turns": turns, "turns, segments 16": adjoints.in_segments(turns, TIMED, 16, adjoints.TURNS)}
    for n in (2, 4, WALK):
        found[f"segments {SEGMENT}, walk {n}"] = defaults.backward_by_roles(TIMED, Way(segment=SEGMENT, walk=n))
    mine = found[f"segments {SEGMENT}, walk {WALK}"]
    for tile, warps, stages in ((32, 8, 1), (32, 4, 1), (16, 4, 1), (16, 4, 2), (16, 4, 3)):
        options = {k: replace(mine.options(k), v_tile=tile, num_warps=warps, num_stages=stages)
                   for k in ("again_compose", "back_compose")}
        found[f"compose {tile} {warps} {stages}"] = mine.with_options(**options)
    cut = adjoints.in_segments(turns, TIMED, SEGMENT, adjoints.TURNS)
    cut = cut.with_options(**{k: replace(cut.options(k), num_stages=2) for k in ("again_compose", "back_compose")})
    scans = inner_as_roles(as_roles(cut, fine=2, scale_last=True), chunks=WALK, apart=True)
    found[f"segments {SEGMENT}, walk {WALK}, old order"] = the_rest_by("triton", solve_as_roles(scans, role_solve.WALK))
    for n in (WALK, SINGLE):
        found[f"halves, walk {n}"] = defaults.backward_by_roles(TIMED, Way(BOTH, aside=True, walk=n))
    return found


def call(chosen: Variant, x: Tensors) -> Tensors:
    """Its gradients, over poison that lies as the op's does."""
    out = poison(x, TIMED.grads)
    chosen({n: x[n] for n in (*TIMED.grads, "d_o")} | out, TIMED.K ** -0.5, len(x["cu_seqlens"]) - 1, x["cu_seqlens"])
    return out


def timed(shape: str) -> dict[str, Any]:
    """Milliseconds of all ways on one shape, in turns; how far each one's gradients are from the first's, and whether they are
    the same twice."""
    ((lengths, H, HV),) = parse(shape, "train")
    x = inputs.make(lengths, H, HV, kind="real")
    x["d_o"] = torch.randn_like(x["v"])
    row: dict[str, Any] = {"shape": shape, "plans": {}}
    runs, first = {}, Tensors()
    for name, schedule in ways(len(lengths), HV).items():
        chosen = variant(TIMED, schedule, "triton", ARCH)
        run = partial(call, chosen, x)
        got, again = run(), run()
        first = first or got
        row["plans"][name] = {"from_turns": max(relative(got[n], first[n]) for n in got),
                              "repeats": all(torch.equal(got[n], again[n]) for n in got),
                              "sources": {s.kernel: s.hash for s in chosen.sources}}
        runs[name] = timer([run], "cuda")
    interleave(runs, SECONDS)
    for name, t in runs.items():
        row["plans"][name] |= t.summary()
    return row


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", required=True, help="as 1x32768:4/8, with commas between")
    p.add_argument("--out", required=True, type=Path)
    p.add_argument("--commit", required=True)
    a = p.parse_args()
    page = {"commit": a.commit, "gpu": torch.cuda.get_device_name(), "rows": [timed(s) for s in a.shapes.split(",")]}
    a.out.write_text(json.dumps(page, indent=0) + "\n")


if __name__ == "__main__":
    main()
