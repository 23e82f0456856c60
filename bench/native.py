"""Native code for CPUs beside torch: milliseconds of a warm call at several lengths, float32, and errors against float64."""
from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from gdn_ir.bench import inputs
from gdn_ir.bench.errors import relative
from gdn_ir.compiler import Instance, variant
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.reference import recurrence
from gdn_ir.schedules.defaults import default
from gdn_ir.schedules.schedule import Schedule

FULL = Switches(initial_state=True, final_state=True)


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--out", required=True)
    p.add_argument("--commit", required=True)
    a = p.parse_args()
    rows: list[dict[str, Any]] = []
    for H, HV, size in ((16, 32, 128), (2, 4, 64)):
        instance = Instance(FULL, size, size, "f32", "f32", False)
        for T in (1, 8, 64, 512, 2048):
            x = inputs.make([T], H, HV, size, size, torch.float32, "cpu")
            q, k, v, g, beta = (x[n][None] for n in ("q", "k", "v", "g", "beta"))
            want, _ = recurrence(q, k, v, g, beta, None, x["initial_state"])
            x |= {"o": torch.empty_like(x["v"]), "final_state": torch.empty_like(x["initial_state"])}
            row: dict[str, Any] = {"tokens": T, "heads": [H, HV], "K": size, "V": size, "ms": {}, "errors": {}}
            candidates = [("torch", default("torch", instance, 1, HV, T)[0]), ("tilelang", Schedule("recurrent", 1))]
            candidates += [("tilelang", Schedule(f"chunks-{c}", c)) for c in (16, 32, 64)]
            for backend, schedule in candidates:
                chosen, times = variant(instance, schedule, backend, "torch" if backend == "torch" else "cpu"), []
                for _ in range(12):
                    start = time.perf_counter()
                    chosen(x, size ** -0.5, 1)
                    times.append(1e3 * (time.perf_counter() - start))
                name = f"{backend} {schedule.name}"
                row["ms"][name] = round(statistics.median(times[2:]), 3)
                row["errors"][name] = relative(x["o"], want[0])
            rows.append(row)
            print(T, (H, HV, size), row["ms"], flush=True)
            about = {"commit": a.commit, "machine": platform.machine(), "threads": torch.get_num_threads()}
            Path(a.out).write_text(json.dumps(about | {"rows": rows}, indent=0) + "\n")


if __name__ == "__main__":
    main()
