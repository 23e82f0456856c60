"""Runs every shipped default of the backward on the GPU at hand against float64 autograd of the recurrence, outputs and
temporaries poisoned, and records errors with the hashes of the sources that made them (as bench/verify.py does forward)."""
from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gdn_ir.bench.gradients import FULL, check
from gdn_ir.bench.inputs import KINDS
from gdn_ir.bench.verify import PACKED, PEERS
from gdn_ir.backends import BACKENDS
from gdn_ir.backends.triton.ptx import TritonPtx
from gdn_ir.coverage import DTYPES, Cell, table

SIZES = ((16, 16), (16, 128), (48, 96), (128, 64), (80, 112), (32, 32), (96, 128), (64, 128), (256, 256), (160, 192), (256, 64),
         (64, 256))


def shipped() -> Iterator[tuple[Cell, int | None, str]]:
    """What is checked: cells, how many scans (sequences x heads) to choose the default schedule for, kind of inputs."""
    for cell in table():
        yield cell, None, "model"
    for io in DTYPES:
        for size in (64, 128):
            for scans in (8, 512):
                for heads in ((2, 4), (4, 4)):
                    lay = replace(PACKED, K=size, V=size, H=heads[0], HV=heads[1])
                    name = f"{size} x {size}, {io}, H/HV {heads[0]}/{heads[1]}, for {scans} scans"
                    yield Cell(name, FULL, io, lay), scans, "model"
        for K, V in SIZES:
            yield Cell(f"{K} x {V}, {io}", FULL, io, replace(PACKED, K=K, V=V)), None, "model"
        for kind in KINDS:
            yield Cell(f"accuracy, {io}", replace(FULL, initial_state=False), io, PEERS), None, kind


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--out", required=True)
    p.add_argument("--commit", required=True)
    p.add_argument("--arch", default="sm_90", help="sm_80 runs from PTX")
    p.add_argument("--part", default="0/1", help="i/n: the i-th of n parts, to run in n processes")
    p.add_argument("--only", default="", help="cells whose name has this in it")
    a = p.parse_args()
    backend = "triton" if a.arch == "sm_90" else "triton-ptx"
    BACKENDS["triton-ptx"] = TritonPtx()
    torch.use_deterministic_algorithms(True, warn_only=True)                  # torch.empty gives NaN: temporaries are poisoned
    part, parts = (int(i) for i in a.part.split("/"))
    rows: list[dict[str, Any]] = []
    for i, (cell, scans, kind) in enumerate(c for c in shipped() if a.only in c[0].name):
        if i % parts != part:
            continue
        try:
            rows.append(check(cell, backend, a.arch, "cuda", kind, scans=scans))
            torch.cuda.synchronize()
        except Exception as e:
            rows.append({"cell": cell.name, "backend": backend, "arch": a.arch, "inputs": kind,
                         "failed": f"{type(e).__name__}: {e}"[:400]})
        last = rows[-1]
        print(last["cell"], kind, last.get("failed") or {n: f"{e:.1e}" for n, e in last["errors"].items()}, flush=True)
        about = {"commit": a.commit, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
                 "backend": BACKENDS["triton"].version()}
        Path(a.out).write_text(json.dumps(about | {"rows": rows}, indent=0))


if __name__ == "__main__":
    main()
