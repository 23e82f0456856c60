"""Host time of one warm eager call: what small batches wait for. Prints microseconds."""
from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from gdn_ir.bench import inputs
from gdn_ir.ops import chunk_gated_delta_rule


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--out", required=True)
    p.add_argument("--commit", required=True)
    a = p.parse_args()
    found = {}
    for name, packed in (("dense", False), ("packed", True)):
        x = inputs.make([256], 16, 32)
        args: dict[str, Any] = {n: x[n][None] for n in ("q", "k", "v", "g", "beta")}
        args |= ({"cu_seqlens": x["cu_seqlens"]} if packed else {})
        times = []
        with torch.no_grad():
            for _ in range(300):
                torch.cuda.synchronize()
                start = time.perf_counter()
                chunk_gated_delta_rule(**args, output_final_state=True)
                times.append(1e6 * (time.perf_counter() - start))
        found[name] = statistics.median(times[50:])
    print({n: round(t, 1) for n, t in found.items()}, "microseconds")
    Path(a.out).write_text(json.dumps({"commit": a.commit, "gpu": torch.cuda.get_device_name(), "shape": "1 x 256, H/HV 16/32",
                                       "microseconds": found}) + "\n")


if __name__ == "__main__":
    main()
