"""The backward with its scans in segments, and with a state's readers gathered, beside "grouped", on an H100 or its kin:
checked, then timed, whole and each kernel.

    python -m gdn_ir.bench.adjoints --out FILE --commit HASH
    python -m gdn_ir.bench.adjoints --out FILE --commit HASH --segments 32 --set back=32,4,3
    python -m gdn_ir.bench.adjoints --out FILE --commit HASH --segments ""        # whole scans alone

Checked: on short packed sequences against float64 autograd of the recurrence, within the bound of gradients or near the errors
of "grouped", with states in and out and without, for several decays; on those that are timed likewise, against float32
kernels; outputs and freed memory full of NaN before, and the same bits twice. What is wrong is reported and not timed. Kernels
are compiled, and the recurrence runs, beforehand, in several processes.
"""
from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from gdn_ir.bench import gradients, inputs
from gdn_ir.bench.backward import GRADS, Tensors, kernels
from gdn_ir.bench.cases import Shape, name_of, parse
from gdn_ir.bench.errors import bound, relative
from gdn_ir.bench.gradients import FULL, backward_of
from gdn_ir.bench.plans import call
from gdn_ir.bench.segments import ARCH, WORSE, build, change
from gdn_ir.bench.timing import interleave, timer
from gdn_ir.compiler import Instance, variant
from gdn_ir.coverage import Cell, Layout
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.schedules.adjoints import PLANS, in_segments
from gdn_ir.schedules.defaults import whole_scans
from gdn_ir.schedules.schedule import KernelOptions, Schedule

SHAPES: list[Shape] = [([32768], 2, 4), ([32768], 4, 8), ([32768], 8, 16), ([32768], 16, 32), ([8192], 2, 4), ([8192], 16, 32),
                       ([12000, 20768], 4, 8),
                       ([4096] * 8, 16, 32)]
TIMED = Instance(Switches(), 128, 128, "bf16", "bf16", True, GRADS, True)
WIDE = Instance(Switches(), 128, 128, "f32", "f32", True, GRADS, True)
RAGGED = Layout((2100, 0, 1024, 1025, 1), True, 1, 2, 128, 128)         # some end with a segment of 16, or a token after
CHECKS = [(Cell("states", FULL, "bf16", RAGGED), "model"), (Cell("no states", Switches(), "bf16", RAGGED), "model"),
          *((Cell("states", FULL, "bf16", RAGGED), kind) for kind in ("real", "strong_decay", "no_decay"))]
SECONDS = 0.2                                              # of timing, for each candidate


def grouped(instance: Instance, shape: Shape, gathers: bool = False, merges: str = "") -> Schedule:
    lengths, _, HV = shape
    return whole_scans(ARCH, instance, len(lengths), HV, "triton", gathers, merges)[0]


def candidates(instance: Instance, lengths: list[int], changes: list[tuple[str, KernelOptions]], shape: Shape) \
        -> dict[str, Schedule]:
    """"grouped", "gathered" and, with one kernel for inner and grads, "gathered-merged" and "gathered-turns" (both also
    with 8 warps; the first with all of K at once, and with its chunks in the order of "gathered"); "segments" and
    its kin with each number of chunks; and each change of a kernel's options, which does what it did beside
    others. The scans' options of those in segments do not depend on the shape."""
    both = grouped(instance, shape, True)
    back, inner = both.options("back"), both.options("inner")
    found = {"grouped": grouped(instance, shape),
             "gathered, inner waits": both.with_options(inner=replace(inner, follows=False)),
             "gathered, back in 2 stages": both.with_options(back=replace(back, num_stages=2))}
    merged = {plan: grouped(instance, shape, True, plan) for plan in ("gathered-merged", "gathered-turns")}
    grads = merged["gathered-merged"].options("grads")
    turns = merged["gathered-turns"]
    merged["gathered-turns, 8 warps"] = turns.with_options(grads=replace(turns.options("grads"), num_warps=8))
    for what, o in (("8 warps", replace(grads, num_warps=8)), ("all K at once", replace(grads, k_tile=None)),
                    ("over all sequences", replace(grads, around=False))):
        merged[f"gathered-merged, {what}"] = merged["gathered-merged"].with_options(grads=o)
    bases = [merged["gathered-turns"], both, grouped(instance, shape)]
    cut = [in_segments(base, instance, n, plan) for n, (plan, base) in product(lengths, zip(PLANS, bases, strict=True))]
    for name, s in {"gathered": both, **merged, **{s.name: s for s in cut}}.items():
        found[name] = s
        for kernel, o in ((k, o) for k, o in changes if k in dict(s.kernels)):
            was = s.options(kernel)
            o = replace(was, v_tile=o.v_tile, num_warps=o.num_warps, num_stages=o.num_stages)
            found[f"{name}, {kernel} {o}"] = s.with_options(**{kernel: o})
    return found


def wanted(check: tuple[Cell, str]) -> Tensors:
    """What the recurrence says, in a process of its own."""
    torch.set_num_threads(1)
    cell, kind = check
    return gradients.expected(cell, gradients.make(cell, kind=kind), backward_of(cell).grads)


def spoil() -> None:
    torch.full((1 << 28,), float("nan"), device="cuda")    # freed at once: temporaries lie there


def near(mine: dict[str, float], theirs: dict[str, float]) -> bool:
    """Whether errors are within the bound of gradients, or hardly larger than those of "grouped", which are themselves at most
    so much larger than that bound."""
    most = bound("bf16", True)
    return all(e <= max(WORSE * min(theirs[n], WORSE * most), most) for n, e in mine.items())


def checked(check: tuple[Cell, str], want: Tensors, made: dict[str, Schedule]) -> dict[str, Any]:
    """Errors of each schedule's gradients, over poison. Rows that no sequence owns must be zeros."""
    cell, kind = check
    x = {n: t.cuda() for n, t in gradients.make(cell, kind=kind).items()}
    found: dict[str, Any] = {"check": cell.name, "inputs": kind, "errors": {}, "right": {}}
    for name, schedule in made.items():
        chosen = variant(backward_of(cell), schedule, "triton", ARCH)
        spoil()
        got, again = (gradients.run(chosen, cell, x) for _ in range(2))
        rows = sum(cell.layout.lengths)
        clean = not any(t[rows:].any() for n, t in got.items() if not n.endswith("state"))
        found["errors"][name] = mine = {n: relative(t.cpu(), want[n[2:]]) for n, t in got.items()}
        same = all(torch.equal(got[n], again[n]) for n in got)
        found["right"][name] = clean and same and near(mine, found["errors"]["grouped"])
    return found


def timed(shape: Shape, made: dict[str, Schedule], instance: Instance, wide: Instance) -> dict[str, Any]:
    """Milliseconds of all candidates on one shape, in turns, and of each of their kernels. wide: the same in float32."""
    lengths, H, HV = shape
    x = inputs.make(lengths, H, HV, kind="real")
    x["d_o"] = torch.randn_like(x["v"])
    found: dict[str, Any] = {"shape": name_of(lengths), "heads": [H, HV], "plans": {}}
    runs, first = {}, dict[str, float]()
    whole = {n: t.float() if t.is_floating_point() else t for n, t in x.items()}
    exact = call(variant(wide, grouped(wide, shape), "triton", ARCH), whole)
    for name, schedule in made.items():
        try:
            chosen = variant(instance, schedule, "triton", ARCH)
            run = partial(call, chosen, x)
            spoil()
            got, again = run(), run()
            apart = {n: relative(got[n], exact[n]) for n in got}
            first = apart if name == "grouped" else first
            same = all(torch.equal(got[n], again[n]) for n in got)
            found["plans"][name] = {"errors": apart, "repeats": same, "sources": {s.kernel: s.hash for s in chosen.sources}}
            if same and first and near(apart, first):      # where "grouped" failed there is nothing to hold them to
                found["plans"][name]["kernels"] = kernels(chosen, run)
                runs[name] = timer([run], "cuda")
        except Exception as e:                             # denied, a compiler's, or too much shared memory
            found["plans"][name] = {"failed": f"{type(e).__name__}: {e}"[:300]}
    interleave(runs, SECONDS)
    for name, t in runs.items():
        found["plans"][name] |= t.summary()
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True, type=Path)
    p.add_argument("--commit", required=True)
    p.add_argument("--segments", type=lambda t: [int(n) for n in t.split(",") if n], default=[16, 32, 64, 128])
    p.add_argument("--set", type=change, action="append", default=[], metavar="KERNEL=TILE,WARPS,STAGES")
    p.add_argument("--only", choices=("checks", "times"), help="one half of the run")
    p.add_argument("--l2norm", action="store_true", help="of what is timed: the op normalises q and k")
    p.add_argument("--shapes", default="", help="to be timed, as 8x1024:16/32, with commas between")
    p.add_argument("--plans", default="", help="which candidates, besides grouped, by how they begin, with commas between")
    a = p.parse_args()
    checks = CHECKS if a.only != "times" else []
    shapes = (parse(a.shapes, "train") if a.shapes else SHAPES) if a.only != "checks" else []
    plans = tuple(a.plans.split(","))

    def some(made: dict[str, Schedule]) -> dict[str, Schedule]:
        return {n: s for n, s in made.items() if n == "grouped" or n.startswith(plans)}
    small = [some(candidates(backward_of(c), a.segments, [], (list(c.layout.lengths), c.layout.H, c.layout.HV)))
             for c, _ in checks]
    this, wide = (replace(i, switches=replace(i.switches, l2norm=a.l2norm)) for i in (TIMED, WIDE))
    large = [some(candidates(this, a.segments, a.set, shape)) for shape in shapes]
    jobs = dict.fromkeys([(backward_of(c), s) for (c, _), made in zip(checks, small, strict=True) for s in made.values()]
                         + [(this, s) for made in large for s in made.values()]
                         + [(wide, grouped(wide, shape)) for shape in shapes])
    a.out.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        slow = pool.map(wanted, checks)                    # as long as a schedule's kernels
        built = list(pool.map(build, jobs))
        wants = list(slow)
        failed = {f"{i}, {s.name} {s.kernels}": why for (i, s), why in zip(jobs, built, strict=True) if why}
    result: dict[str, Any] = {"commit": a.commit, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
                              "failed": failed, "checks": [], "rows": []}

    def keep(kind: str, row: dict[str, Any]) -> None:
        result[kind].append(row)
        print(json.dumps(row), flush=True)
        a.out.write_text(json.dumps(result, indent=0) + "\n")
    for check, want, made in zip(checks, wants, small, strict=True):
        keep("checks", checked(check, want, made))
    wrong = {n for row in result["checks"] for n, right in row["right"].items() if not right}
    for shape, made in zip(shapes, large, strict=True):
        keep("rows", timed(shape, {n: s for n, s in made.items() if n.split(",")[0] not in wrong}, this, wide))


if __name__ == "__main__":
    main()
