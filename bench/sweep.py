"""Times every kernel of every plan under every option on the GPU at hand, each checked against float64 first."""
from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from gdn_ir.autotune.measure import graph_ms
from gdn_ir.backends.base import TORCH
from gdn_ir.backends.temporaries import temporaries
from gdn_ir.compiler import NAMES, Instance, Variant, variant
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.reference import recurrence
from gdn_ir.schedules.plans import plan
from gdn_ir.schedules.schedule import KernelOptions, Schedule

from gdn_ir.bench import cases, inputs
from gdn_ir.bench.errors import relative, worst

CHECK = [300, 0, 64, 129]


def candidates(plans: list[str], space: dict[str, list[int]], erase: bool = True, io: str = "bf16",
               chunk: int = 64, **changes: Any) -> list[tuple[str, str, Schedule]]:
    """(plan, kernel whose options vary, schedule); the other kernels of the plan keep modest options meanwhile."""
    found = []
    for name in plans:
        one = name in ("naive", "fused", "solve")
        scan = "scan"
        tiled = KernelOptions(v_tile=64, num_warps=4, num_stages=1)
        rest = {scan: replace(tiled, v_tile=32, num_stages=2)} if io == "f32" else {scan: tiled}
        base = Schedule(name, chunk, plan(name, erase, io, chunk, **changes)).with_options(**rest)
        base = base if one else base.with_options(output=tiled)
        options = itertools.product(space["v_tile"], space["num_warps"], space["num_stages"])
        vary: list[tuple[str, tuple[int | None, int, int]]]
        vary = [(k, o) for o in options for k in ((scan,) if one else (scan, "output"))]
        if name not in ("naive", "fused") and erase:
            vary += [("solve", (None, w, 1)) for w in (1, 2, 4, 8)]
        found += [(name, k, base.with_options(**{k: KernelOptions(*o)})) for k, o in vary]
    return found


def memory_for(x: dict[str, torch.Tensor], V: int) -> dict[str, torch.Tensor]:
    tensors = {k: t for k, t in x.items() if k != "cu_seqlens"}
    tensors["o"] = torch.full_like(x["v"], float("nan"))
    tensors["final_state"] = torch.full_like(x["initial_state"], float("nan"))
    return tensors


def check(job: tuple[Instance, Schedule, str]) -> dict[str, Any]:
    instance, schedule, arch = job
    start = time.time()
    try:
        chosen = variant(instance, schedule, "triton", arch)
        dtype = {v: k for k, v in NAMES.items()}[instance.io]
        x = inputs.make(CHECK, 2, 4, instance.K, instance.V, dtype)
        tensors = memory_for(x, instance.V)
        if not instance.switches.initial_state:
            tensors.pop("initial_state")
        chosen(tensors, instance.K ** -0.5, len(CHECK), x["cu_seqlens"])
        torch.cuda.synchronize()
        o, S = ORACLE[0] if ORACLE else oracle(x, instance)
        errors = {"o": relative(tensors["o"], o), "final_state": relative(tensors["final_state"], S)}
        return {**errors, "seconds": time.time() - start, "sources": {s.kernel: s.hash for s in chosen.sources}}
    except Exception as e:
        return {"failed": f"{type(e).__name__}: {e}"[:300], "seconds": time.time() - start}


ORACLE: list[tuple[torch.Tensor, torch.Tensor]] = []


def oracle(x: dict[str, torch.Tensor], instance: Instance) -> tuple[torch.Tensor, torch.Tensor]:
    state = x["initial_state"] if instance.switches.initial_state else None
    q, k, v, g, beta = (x[n][None] for n in ("q", "k", "v", "g", "beta"))
    o, S = recurrence(q, k, v, g, beta, None, state, x["cu_seqlens"].cpu(), erase=instance.switches.erase)
    ORACLE.append((o[0], S))
    return ORACLE[0]


def launches(chosen: Variant, x: dict[str, torch.Tensor]) -> dict[str, Any]:
    """One callable for each kernel, over memory that all of them have filled."""
    c = chosen.compiled
    memory = memory_for(x, chosen.instance.V)
    call = chosen.call_of(memory, len(x["cu_seqlens"]) - 1, x["cu_seqlens"])
    for name, (kernel, t, *_) in temporaries(c.kernels).items():
        memory[name] = torch.empty(call.shape(kernel, t), dtype=TORCH[t.dtype], device="cuda")
    for launch in c.launches:
        launch(memory, {"scale": 0.1}, call)
    return {k.name: lambda f=f: f(memory, {"scale": 0.1}, call) for k, f in zip(c.kernels, c.launches, strict=True)}


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--plans", default="states,wy,solve,fused")
    p.add_argument("--out", required=True)
    p.add_argument("--commit", required=True)
    p.add_argument("--K", type=int, default=128)
    p.add_argument("--V", type=int, default=128)
    p.add_argument("--dtype", default="bf16")
    p.add_argument("--sums", action="store_true", help="the log decay's running sums are hoisted")
    p.add_argument("--chunk", type=int, default=64)
    p.add_argument("--block", type=int, default=16, help="rows that the inverse substitutes before it merges")
    p.add_argument("--kernels", default="", help="only these")
    p.add_argument("--no-erase", action="store_true")
    for option, values in (("v_tile", "16,32,64,128"), ("num_warps", "4,8"), ("num_stages", "1,2,3")):
        p.add_argument(f"--{option}", default=values)
    p.add_argument("--shapes", default="", help="indices into FORWARD_CORE, comma-separated (all)")
    a = p.parse_args()
    start = time.time()
    switches = Switches(erase=not a.no_erase, final_state=True)
    instance = Instance(switches, a.K, a.V, a.dtype, a.dtype, True)
    arch = f"sm_{torch.cuda.get_device_capability()[0]}0"
    varied = {o: [int(x) for x in getattr(a, o).split(",")] for o in ("v_tile", "num_warps", "num_stages")}
    space = candidates(a.plans.split(","), varied,
                       not a.no_erase, a.dtype, chunk=a.chunk, sums=a.sums, block=a.block)
    space = [c for c in space if not a.kernels or c[1] in a.kernels.split(",")]
    context = multiprocessing.get_context("spawn")
    with context.Pool(14) as pool:
        checks = pool.map(check, [(instance, s, arch) for _, _, s in space], chunksize=1)
    compiled = time.time() - start
    rows = [{"plan": name, "kernel": kernel, **asdict(s.options(kernel)), **c, "ms": {}}
            for (name, kernel, s), c in zip(space, checks, strict=True)]
    dtype = {v: k for k, v in NAMES.items()}[a.dtype]
    shapes = cases.FORWARD_CORE if not a.shapes else [cases.FORWARD_CORE[int(i)] for i in a.shapes.split(",")]
    for lengths, H, HV in shapes:
        x = inputs.make(lengths, H, HV, a.K, a.V, dtype)
        for (_, kernel, s), row in zip(space, rows, strict=True):
            if "failed" in row or not worst((row["o"], row["final_state"])) <= 8e-3:
                continue
            run = launches(variant(instance, s, "triton", arch), x)[kernel]
            row["ms"][f"{len(lengths)}x{lengths[0]} {H}/{HV}"] = round(graph_ms([run] * 3, 7), 4)
        del x
        print(lengths, H, HV, round(time.time() - start), flush=True)
        result = {"commit": a.commit, "gpu": torch.cuda.get_device_name(), "instance": str(instance), "compile_s": compiled,
                  "total_s": time.time() - start, "rows": rows}
        Path(a.out).write_text(json.dumps(result, indent=0))       # a run that is cut off keeps the shapes it finished
    best(rows)


def best(rows: list[dict[str, Any]]) -> None:
    for shape in dict.fromkeys(s for r in rows for s in r["ms"]):
        for key in dict.fromkeys((r["plan"], r["kernel"]) for r in rows):
            these = [r for r in rows if (r["plan"], r["kernel"]) == key and shape in r["ms"]]
            these.sort(key=lambda r: r["ms"][shape])
            print(shape, *key, *[f"{r['ms'][shape]}:({r['v_tile']},{r['num_warps']},{r['num_stages']})" for r in these[:4]])
    bad = [r for r in rows if "failed" in r or not worst((r["o"], r["final_state"])) <= 8e-3]
    print(len(bad), "bad of", len(rows), *[str({k: v for k, v in r.items() if k != "ms"})[:300] for r in bad[:6]], sep="\n")


if __name__ == "__main__":
    main()
