"""Forward passes of gdn-ir and FLA on the same inputs in one run: milliseconds by CUDA-graph replay, errors against float64.

    python -m gdn_ir.bench.compare --out FILE --commit HASH
"""
from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("FLA_FLASH_QLA", "0")                # measure FLA itself, not what it hands over to

import torch

from gdn_ir.bench import cases, inputs
from gdn_ir.bench.errors import relative
from gdn_ir.autotune.measure import copies_beyond_l2, graph_ms
from gdn_ir.compiler import NAMES, Instance, Variant, variant
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.reference import recurrence
from gdn_ir.schedules.defaults import default

Tensors = dict[str, torch.Tensor]


def ours(x: Tensors) -> tuple[Callable[[], Tensors], Variant]:
    T, HV, V = x["v"].shape
    K, N = x["q"].shape[2], len(x["cu_seqlens"]) - 1
    io = NAMES[x["q"].dtype]
    instance = Instance(Switches(final_state=True), K, V, io, io, True)
    chosen = variant(instance, default("sm_90", instance, N, HV, T)[0], "triton", "sm_90")

    def call() -> Tensors:
        out = {"o": torch.empty_like(x["v"]), "final_state": torch.empty(N, HV, K, V, device="cuda")}
        chosen({n: x[n] for n in ("q", "k", "v", "g", "beta")} | out, K ** -0.5, N, x["cu_seqlens"])
        return out
    return call, chosen


def peer(package: str, x: Tensors) -> Callable[[], Tensors]:
    """A peer's op of the same name, on packed input."""
    op = importlib.import_module(package).chunk_gated_delta_rule
    packed = {n: x[n][None] for n in ("q", "k", "v", "g", "beta")}

    def call() -> Tensors:
        with torch.no_grad():
            o, S = op(**packed, output_final_state=True, cu_seqlens=x["cu_seqlens"])
        return {"o": o[0], "final_state": S}
    return call


fla, flash_qla = partial(peer, "fla.ops.gated_delta_rule"), partial(peer, "flash_qla")


def accuracy(lengths: list[int], H: int, HV: int, kind: str) -> dict[str, Any]:
    """Errors of gdn-ir, FLA and FlashQLA against the float64 recurrence; a peer that fails is listed with its reason."""
    x = inputs.make(lengths, H, HV, kind=kind)
    packed = (x[n][None].cpu() for n in ("q", "k", "v", "g", "beta"))
    o, S = (t.cuda() for t in recurrence(*packed, cu_seqlens=x["cu_seqlens"].cpu()))
    found: dict[str, Any] = {}
    for name, make in (("gdn-ir", lambda x: ours(x)[0]), ("fla", fla), ("flash-qla", flash_qla)):
        try:
            out = make(x)()
            found[name] = {"o": relative(out["o"], o[0]), "final_state": relative(out["final_state"], S)}
        except Exception as e:                             # a peer of another version, or none at all
            found[name] = {"failed": f"{type(e).__name__}: {e}"[:300]}
    return {"lengths": lengths, "heads": [H, HV], "inputs": kind, "errors": found}


def speed(lengths: list[int], H: int, HV: int) -> dict[str, Any]:
    """Milliseconds of both, interleaved; the error is each one's distance from the float32 instance on these very inputs."""
    bytes_ = sum(lengths) * (2 * H + 2 * HV) * 128 * 2
    xs = [inputs.make(lengths, H, HV, seed=i) for i in range(copies_beyond_l2(bytes_))]
    mine, theirs, chosen = [ours(x)[0] for x in xs], [fla(x) for x in xs], ours(xs[0])[1]
    exact = ours({n: t.float() if n in ("q", "k", "v", "beta") else t for n, t in xs[0].items()})[0]()
    both = (("gdn-ir", mine[0]), ("fla", theirs[0]))
    errors = {name: {n: relative(call()[n], exact[n].double()) for n in exact} for name, call in both}
    del exact
    ms: dict[str, list[float]] = {"gdn-ir": [], "fla": []}
    for _ in range(3):
        for name, calls in (("gdn-ir", mine), ("fla", theirs)):
            ms[name].append(graph_ms(calls, 11))
    row = {"lengths": lengths, "heads": [H, HV], "ms": {n: min(t) for n, t in ms.items()}, "errors_against_float32": errors,
           "schedule": chosen.schedule.name, "sources": {s.kernel: s.hash for s in chosen.sources}}
    print(lengths[:1], len(lengths), H, HV, {n: round(t, 4) for n, t in row["ms"].items()}, flush=True)
    return row


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--out", required=True)
    p.add_argument("--commit", required=True)
    p.add_argument("--only", default="accuracy,speed")
    a = p.parse_args()
    result: dict[str, Any] = {"commit": a.commit, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    result["accuracy"] = [accuracy([768], 2, 4, kind) for kind in inputs.KINDS if "accuracy" in a.only]
    for row in result["accuracy"]:
        print(row["inputs"], row["errors"], flush=True)
    result["speed"] = []
    for case in cases.FORWARD_CORE if "speed" in a.only else ():
        result["speed"].append(speed(*case))
        Path(a.out).write_text(json.dumps(result, indent=0) + "\n")


if __name__ == "__main__":
    main()
