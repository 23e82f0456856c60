"""Where a training step's time goes: each kernel of ours and of peers, when it starts and how long it takes, from a CUDA graph.

    python -m gdn_ir.bench.experiments.train_kernels --peers flashqla --out page.json --commit 1234567
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from gdn_ir.autotune.measure import capture
from gdn_ir.bench import inputs
from gdn_ir.bench.cases import TRAIN_CORE, Row
from gdn_ir.bench.contenders import Call, chosen

REPLAYS = 5


def timeline(call: Call) -> list[dict[str, Any]]:
    """Of the median of some replays: kernels by name, start and duration in microseconds."""
    for _ in range(3):
        call()
    graph = capture([call])
    graph.replay()
    torch.cuda.synchronize()
    found = []
    for _ in range(REPLAYS):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
            graph.replay()
            torch.cuda.synchronize()
        spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in p.events() if "CUDA" in str(e.device_type))
        first = spans[0][0]
        found.append([{"kernel": name[:60], "at": round(a - first, 1), "us": round(b - a, 1)} for a, b, name in spans])
    return sorted(found, key=lambda kernels: kernels[-1]["at"] + kernels[-1]["us"])[REPLAYS // 2]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--peers", default="flashqla")
    p.add_argument("--out", required=True, type=Path)
    p.add_argument("--commit", required=True)
    a = p.parse_args()
    page: dict[str, Any] = {"commit": a.commit, "gpu": torch.cuda.get_device_name(), "rows": []}
    contenders = [*chosen("--backends", "served"), *chosen("--peers", a.peers)]
    for lengths, H, HV in TRAIN_CORE:
        x = inputs.make(lengths, H, HV, kind="real")
        x["do"] = torch.randn_like(x["v"])
        row = Row(tuple(lengths), H, HV)
        kernels = {c.name: timeline(c.prepare(row, x, True)) for c in contenders}
        page["rows"].append({"shape": str(row), "contenders": kernels})
        for name, found in kernels.items():
            print(row, name, *(f"{k['kernel'][:28]} {k['us']:.0f}" for k in found), sep=" | ", flush=True)
        a.out.write_text(json.dumps(page, indent=0) + "\n")


if __name__ == "__main__":
    main()
