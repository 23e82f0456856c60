"""Checks and times the role kernel beside FlashInfer's and gdn-ir's own; results as JSON.

    python -m gdn_ir.bench.experiments.run_roles --out FILE --commit HASH [--only check|time] [--options '{"q_slots": 3}' ...]

Everything on the GPU happens in a child process with a time limit, because roles that wait for each other for ever would hang
it. A kernel that fails its check is not timed.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gdn_ir import registry
from gdn_ir.bench import inputs
from gdn_ir.bench.contenders import op_call
from gdn_ir.bench.errors import relative, worst
from gdn_ir.bench.experiments import roles
from gdn_ir.autotune.measure import copies_beyond_l2, graph_ms
from gdn_ir.ops import chunk_gated_delta_rule
from gdn_ir.reference import recurrence

Tensors = dict[str, torch.Tensor]
SHAPES = (([4096] * 8, 16, 64), ([1024] * 8, 16, 32))
BOUNDS = {"model": 4.5e-3, "no_decay": 5e-3, "strong_decay": 4.5e-3, "correlated": 1.3e-2}
RAGGED = [300, 0, 64, 129]


def ours(x: Tensors, **options: Any) -> Callable[[], Tensors]:
    def call() -> Tensors:
        o, S = roles.forward(x["q"], x["k"], x["v"], x["g"], x["beta"], x["cu_seqlens"], **options)
        return {"o": o, "final_state": S}
    return call


def triton(x: Tensors, **_: Any) -> Callable[[], Tensors]:
    call = op_call(chunk_gated_delta_rule, x, train=False)

    def forced() -> Tensors:
        with registry.use("triton"):
            return call()
    return forced


def flashinfer(x: Tensors, **_: Any) -> Callable[[], Tensors]:
    """It takes the decay itself, not its log, and keeps states V-major."""
    from flashinfer.gdn_prefill import chunk_gated_delta_rule
    decay, beta, ends = torch.exp(x["g"]), x["beta"].float(), x["cu_seqlens"].long()
    _, HV, V = x["v"].shape
    out, state = torch.empty_like(x["v"]), torch.empty(len(ends) - 1, HV, V, x["q"].shape[2], device=x["v"].device)

    def call() -> Tensors:
        o, S = chunk_gated_delta_rule(x["q"], x["k"], x["v"], decay, beta, output_final_state=True, cu_seqlens=ends, output=out,
                                      output_state=state)
        return {"o": o, "final_state": S.mT}
    return call


KERNELS: dict[str, Callable[..., Callable[[], Tensors]]] = {"roles": ours, "flashinfer": flashinfer, "gdn-ir": triton}


def reference(x: Tensors) -> Tensors:
    packed = (x[n][None].cpu() for n in ("q", "k", "v", "g", "beta"))
    o, S = recurrence(*packed, cu_seqlens=x["cu_seqlens"].cpu())
    return {"o": o[0].cuda(), "final_state": S.cuda()}


def check(options: dict[str, Any]) -> dict[str, Any]:
    """Errors against the float64 recurrence on ragged sequences; bitwise repeats; no row of a neighbour read or written."""
    rows = []
    for kind in inputs.KINDS:
        x = inputs.make(RAGGED, 2, 4, kind=kind)
        exact = reference(x)
        o, S = torch.full_like(x["v"], float("nan")), torch.full((len(RAGGED), 4, 128, 128), float("nan"), device="cuda")
        args = [x[n] for n in ("q", "k", "v", "g", "beta", "cu_seqlens")]
        roles.forward(*args, o=o, final_state=S, **options)
        torch.cuda.synchronize()
        errors = {"o": relative(o, exact["o"]), "final_state": relative(S, exact["final_state"])}
        same = True
        for _ in range(20):
            o2, S2 = roles.forward(*args, **options)
            same &= torch.equal(o, o2) and torch.equal(S, S2)
        rows.append({"inputs": kind, "lengths": RAGGED, "errors": errors, "repeats": same,
                     "passes": bool(same and worst(errors.values()) <= BOUNDS[kind])})
        print(rows[-1], flush=True)

    # Only the first sequence is asked for; all that follows it is NaN, and its rows of o are marked.
    x = inputs.make([100, 64], 2, 4)
    ends = x["cu_seqlens"][:2].contiguous()
    args = [x[n] for n in ("q", "k", "v", "g", "beta")]
    clean = roles.forward(*args, ends, **options)
    for t in args:
        t[100:] = float("nan")
    o = torch.full_like(x["v"], 7.0)
    _, S = roles.forward(*args, ends, o=o, **options)
    alone = torch.equal(o[:100], clean[0][:100]) and torch.equal(S, clean[1]) and bool((o[100:] == 7).all())
    print("neighbours untouched:", alone, flush=True)
    return {"rows": rows, "neighbours": alone, "passes": alone and all(r["passes"] for r in rows)}


def speed(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Milliseconds of each, interleaved; an error is the distance from gdn-ir's float32 kernels on these very inputs."""
    out = []
    for lengths, H, HV in SHAPES:
        xs = [inputs.make(lengths, H, HV, seed=i) for i in range(copies_beyond_l2(sum(lengths) * (2 * H + 2 * HV) * 256))]
        exact = triton({n: t.float() if n in ("q", "k", "v", "beta") else t for n, t in xs[0].items()})()
        calls: dict[str, list[Callable[[], Tensors]]] = {}
        ms: dict[str, list[float]] = {}
        row: dict[str, Any] = {"lengths": lengths, "heads": [H, HV], "errors_against_float32": {}, "failed": {}}
        for name, make in KERNELS.items():
            try:
                calls[name] = [make(x, **options) for x in xs]
                found = calls[name][0]()
                row["errors_against_float32"][name] = {n: relative(found[n], exact[n]) for n in exact}
                ms[name] = []
            except Exception as e:                         # a peer that is not there, or of another version
                row["failed"][name] = f"{type(e).__name__}: {e}"[:300]
        for _ in range(3):
            for name in list(ms):
                try:
                    ms[name].append(graph_ms(calls[name], 11))
                except Exception as e:
                    row["failed"][name] = f"{type(e).__name__}: {e}"[:300]
                    del ms[name]
        row["ms"] = {n: min(t) for n, t in ms.items()}
        waves = -(-len(lengths) * HV // torch.cuda.get_device_properties(0).multi_processor_count)
        row["us_per_chunk_of_a_block"] = {n: 1e3 * t / (waves * -(-lengths[0] // 64)) for n, t in row["ms"].items()}
        print(row | {"lengths": f"{len(lengths)}x{lengths[0]}"}, flush=True)
        out.append(row)
    return out


def child(what: str, options: dict[str, Any], seconds: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "gdn_ir.bench.experiments.run_roles", "--child", what, "--options", json.dumps(options)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as e:
        print((e.stdout or b"").decode() if isinstance(e.stdout, bytes) else e.stdout)
        return {"failed": f"no end within {seconds} s: a deadlock, if not a compilation"}
    print(done.stdout, flush=True)
    last = done.stdout.strip().rsplit("\n", 1)[-1]
    return {"result": json.loads(last)} if done.returncode == 0 else {"failed": f"exit code {done.returncode}"}


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--out")
    p.add_argument("--commit")
    p.add_argument("--only", choices=("check", "time"))
    p.add_argument("--options", action="append", help="arguments of roles.build as JSON; may be given several times")
    p.add_argument("--seconds", type=int, default=60, help="for the check; timing gets five times as long")
    p.add_argument("--child", choices=("compile", "check", "time"))
    a = p.parse_args()
    variants = [json.loads(t) for t in a.options or ["{}"]]
    if a.child:
        run = {"compile": lambda o: [str(roles.kernel(*s[1:], **o)) and None for s in (*SHAPES, (None, 2, 4))], "check": check,
               "time": speed}
        print(json.dumps(run[a.child](variants[0])))
        return
    assert a.out and a.commit, "--out and --commit are required"
    gpu = torch.cuda.get_device_name()
    found: dict[str, Any] = {"commit": a.commit, "gpu": gpu, "torch": torch.__version__, "variants": []}
    for options in variants:
        row: dict[str, Any] = {"options": options}
        found["variants"].append(row)
        row["compile"] = child("compile", options, 300)    # with no GPU work, so that the check's limit is one of the kernel
        if a.only != "time" and "failed" not in row["compile"]:
            row["check"] = child("check", options, a.seconds)
        if a.only != "check" and (a.only == "time" or row.get("check", {}).get("result", {}).get("passes")):
            row["time"] = child("time", options, 5 * a.seconds)
        Path(a.out).write_text(json.dumps(found, indent=0) + "\n")


if __name__ == "__main__":
    main()
