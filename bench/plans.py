"""Plans of the backward beside each other in one run: the whole by CUDA-graph replay, and each kernel by the profiler.

    python -m gdn_ir.bench.plans --plans states,grouped,inside,merged
    python -m gdn_ir.bench.plans --plans grouped --vary grads --warps 4,8 --stages 1,2,3
    python -m gdn_ir.bench.plans --around --out FILE --commit HASH

--vary times each plan once for each number of warps and stages of that kernel; --around the default and its neighbours: what
it was before its last steps, and its kernels with other warps and orders. What a toolchain cannot build is reported, and so is
what is far from the first's gradients; neither is timed. For Hopper.
"""
from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gdn_ir.autotune.measure import graph_ms
from gdn_ir.bench.backward import GRADS, Tensors, kernels, of_one_sequence
from gdn_ir.bench.errors import bound, relative, worst
from gdn_ir.compiler import Instance, Variant, variant
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.schedules.defaults import default
from gdn_ir.schedules.plans import backward_plan
from gdn_ir.schedules.schedule import KernelOptions, Schedule


def planned(plan: str, instance: Instance, heads: int, tokens: int) -> Schedule:
    """A plan with the default's options for the kernels that it makes."""
    base = default("sm_90", instance, 1, heads, tokens)[0]
    whole = replace(base, name=plan, steps=backward_plan(plan, instance.program, instance.io, beta=instance.beta),
                    kernels=(("*", base.options("inner")),))
    made = {s.kernel for s in variant(instance, whole, "triton", "sm_90").sources}
    return replace(whole, kernels=tuple((k, o) for k, o in base.kernels if k in made))


def candidates(a: argparse.Namespace, instance: Instance) -> Iterator[tuple[str, Schedule | ValueError]]:
    """Schedules by name; of a plan that is not legal, why."""
    for plan in a.plans.split(","):
        try:
            base = planned(plan, instance, a.HV, a.tokens)
        except ValueError as e:
            yield plan, e
            continue
        if not a.vary:
            yield plan, base
            continue
        for w, s in itertools.product(a.warps, a.stages):
            options = KernelOptions(base.options(a.vary).v_tile, w, s)
            yield f"{plan}, {a.vary} {options}", base.with_options(**{a.vary: options})


def around(a: argparse.Namespace, instance: Instance) -> Iterator[tuple[str, Schedule | ValueError]]:
    """The default's neighbours, which differ from it in one thing, or in what should be good together."""
    new = default("sm_90", instance, 1, a.HV, a.tokens)[0]
    wide, shared = ("hoist", "beta"), ("share", "inner")

    def without(*steps: tuple[str, str]) -> Schedule:
        return replace(new, steps=tuple(s for s in new.steps if s[:2] not in steps))

    def changed(**kernels: tuple[int, bool]) -> Schedule:
        """kernels: warps, and whether sparing."""
        return new.with_options(**{k: replace(new.options(k), num_warps=w, sparing=s) for k, (w, s) in kernels.items()})
    yield "before", without(wide, shared)
    yield "default", new
    yield "beta as it is stored", without(wide)
    yield "nothing shared in inner", without(shared)
    for kernel, options in (("inner", ((8, True), (4, False), (4, True))), ("grads", ((8, True), (4, False), (4, True))),
                            ("local", ((4, True),))):
        for warps, sparing in options:
            yield f"{kernel} {warps} warps{', sparing' if sparing else ''}", changed(**{kernel: (warps, sparing)})
    yield "local, inner 4 warps, sparing", changed(local=(4, True), inner=(4, True))
    yield "local, inner, grads 4 warps, sparing", changed(local=(4, True), inner=(4, True), grads=(4, True))


def call(chosen: Variant, x: Tensors) -> Tensors:
    out = {f"d_{n}": torch.empty_like(x[n]) for n in GRADS}
    chosen({n: x[n] for n in (*GRADS, "d_o")} | out, x["q"].shape[-1] ** -0.5, len(x["cu_seqlens"]) - 1, x["cu_seqlens"])
    return out


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--plans", default="states,grouped,inside,merged")
    p.add_argument("--vary", default="", help="a kernel")
    p.add_argument("--warps", type=numbers, default=[4, 8])
    p.add_argument("--stages", type=numbers, default=[1, 2])
    p.add_argument("--around", action="store_true", help="the default and its neighbours")
    p.add_argument("--out", type=Path)
    p.add_argument("--commit", default="")
    a, x = of_one_sequence(p)
    instance = Instance(Switches(), 128, 128, "bf16", "bf16", True, GRADS, a.HV > a.H)
    want: Tensors | None = None
    page: dict[str, Any] = {"commit": a.commit, "gpu": torch.cuda.get_device_name(), "lengths": [a.tokens],
                            "heads": [a.H, a.HV], "rows": []}

    def tell(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        page["rows"].append(row)
        if a.out:
            a.out.write_text(json.dumps(page, indent=0) + "\n")
    for name, schedule in around(a, instance) if a.around else candidates(a, instance):
        try:
            if isinstance(schedule, ValueError):
                raise schedule
            chosen = variant(instance, schedule, "triton", "sm_90")
            run = partial(call, chosen, x)
            got = run()
            torch.cuda.synchronize()
        except Exception as e:                             # not legal, denied, or too much shared memory
            tell({"schedule": name, "failed": f"{type(e).__name__}: {e}"[:200]})
            continue
        want = want or got
        apart = {n: relative(got[n], want[n]) for n in got}
        if not worst(apart.values()) <= 2 * bound("bf16", True):     # each may be as far from the truth as that
            tell({"schedule": name, "wrong": apart})
            continue
        again = run()
        tell({"schedule": name, "ms": round(graph_ms([run], 11), 3), "kernels": kernels(chosen, run),
              "from_first": {n: f"{e:.1e}" for n, e in apart.items()},
              "repeats": all(torch.equal(got[n], again[n]) for n in got),
              "sources": {s.kernel: s.hash for s in chosen.sources}})


if __name__ == "__main__":
    main()
