"""Each kernel of what ships for the forward, alone, on the shapes of FORWARD_CORE: what the cost model is held against.

    python -m gdn_ir.bench.kernels --out bench/results/h100/kernels.json --commit HASH

By CUDA-graph replay. A kernel that would start beside the one before it is timed as it is without that; the outputs of the
whole are compared with those of our float32 kernels.
"""
from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from gdn_ir.autotune.measure import graph_ms
from gdn_ir.backends import BACKENDS
from gdn_ir.backends.base import STORED
from gdn_ir.backends.temporaries import temporaries
from gdn_ir.bench import inputs
from gdn_ir.bench.cases import FORWARD_CORE
from gdn_ir.bench.errors import relative
from gdn_ir.compiler import Instance, variant
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.schedules.defaults import default

SCALE = 128 ** -0.5


def outputs(x: dict[str, torch.Tensor], io: str) -> dict[str, torch.Tensor]:
    dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[io]
    N, HV, tokens = len(x["cu_seqlens"]) - 1, x["v"].shape[1], x["v"].shape[0]
    given = {n: x[n].to(dtype) for n in ("q", "k", "v", "beta")} | {"g": x["g"]}
    out = {"o": torch.full_like(given["v"], float("nan")), "final_state": torch.full_like(x["initial_state"], float("nan"))}
    instance = Instance(Switches(final_state=True), 128, 128, io, io, True)
    variant(instance, default("sm_90", instance, N, HV, tokens)[0], "triton", "sm_90")(given | out, SCALE, N, x["cu_seqlens"])
    return out


def measure(lengths: list[int], H: int, HV: int) -> dict[str, object]:
    x = inputs.make(lengths, H, HV, kind="real")
    instance = Instance(Switches(final_state=True), 128, 128, "bf16", "bf16", True)
    schedule = default("sm_90", instance, len(lengths), HV, sum(lengths))[0]
    schedule = schedule.with_options(**{n: replace(o, follows=False) for n, o in schedule.kernels if n != "*"})
    chosen = variant(instance, schedule, "triton", "sm_90")
    call = chosen.call_of(x, len(lengths), x["cu_seqlens"])
    kernels = chosen.compiled.kernels
    memory = {n: x[n] for n in ("q", "k", "v", "g", "beta")}
    memory |= {"o": torch.empty_like(x["v"]), "final_state": torch.empty_like(x["initial_state"])}
    temps = temporaries(kernels).items()
    memory |= {n: torch.zeros(call.shape(k, t), dtype=STORED[t.dtype], device="cuda") for n, (k, t, *_) in temps}
    ms = {}
    for kernel, launch in zip(kernels, chosen.compiled.launches, strict=True):
        ms[kernel.name] = round(graph_ms([lambda run=launch: run(memory, {"scale": SCALE}, call)], 15), 4)     # type: ignore[misc]
    want, served = outputs(x, "f32"), outputs(x, "bf16")
    return {"lengths": lengths, "heads": [H, HV], "triton": ms, "sources": {s.kernel: s.hash for s in chosen.sources},
            "errors": {n: relative(served[n], want[n]) for n in want}}


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--commit", required=True)
    a = p.parse_args()
    about = {"commit": a.commit, "gpu": torch.cuda.get_device_name(), "backend": BACKENDS["triton"].version(),
             "what": "milliseconds of each kernel alone, by CUDA-graph replay; errors against our float32 kernels"}
    rows = []
    for lengths, H, HV in FORWARD_CORE:
        rows.append(measure(lengths, H, HV))
        print(rows[-1], flush=True)
    a.out.write_text(json.dumps(about | {"rows": rows}, indent=0) + "\n")


if __name__ == "__main__":
    main()
