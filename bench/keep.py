"""What a forward keeps for its backward: times, each kernel's share, memory and errors under every setting, in one run.

    python -m gdn_ir.bench.keep --out FILE --commit HASH
    python -m gdn_ir.bench.keep --out FILE --commit HASH --tokens 32768 --H 2 --HV 4

Milliseconds by CUDA-graph replay, of forward, of backward and of one after the other; kernels by the profiler. MiB are of a
step of the op beyond its inputs: the most that it holds at once, and what is held between forward and backward. For Hopper.
"""
from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GDN_IR_UNVERIFIED", "1")

import torch

import gdn_ir
from gdn_ir.autotune.measure import graph_ms
from gdn_ir.bench.backward import GRADS, Tensors, kernels, of_one_sequence
from gdn_ir.bench.errors import relative
from gdn_ir.compiler import NAMES, Instance, Variant, variant
from gdn_ir.ops import chunk_gated_delta_rule, left
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.schedules.defaults import default
from gdn_ir.schedules.plans import KEEP

MIB = 2 ** 20


def pair(x: Tensors, keep: str) -> tuple[tuple[Variant, Callable[[], Tensors]], tuple[Variant, Callable[[], Tensors]]]:
    """Forward and backward as their defaults have them: the variant, and a call of it."""
    (T, HV, V), (H, K) = x["v"].shape, x["q"].shape[1:]
    N, io = len(x["cu_seqlens"]) - 1, NAMES[x["q"].dtype]
    forth = Instance(Switches(), K, V, io, io, True, keep=keep)
    back = Instance(Switches(), K, V, io, io, True, GRADS, HV > H, keep=keep)
    f, b = (variant(i, default("sm_90", i, N, HV, T)[0], "triton", "sm_90") for i in (forth, back))
    given = {n: x[n] for n in GRADS}

    def memory() -> Tensors:
        return left.named(keep, True, left.empty(keep, True, x["q"], x["v"], x["cu_seqlens"]))
    kept = memory()

    def forward() -> Tensors:
        out = {"o": torch.empty_like(x["v"])}
        f(given | out | kept, K ** -0.5, N, x["cu_seqlens"])
        return out

    def backward() -> Tensors:
        out = {f"d_{n}": torch.empty_like(x[n]) for n in GRADS}
        b(given | {"d_o": x["d_o"]} | out | kept, K ** -0.5, N, x["cu_seqlens"])
        return out
    return (f, forward), (b, backward)


def held(x: Tensors, keep: str) -> dict[str, float]:
    """MiB of a step beyond its inputs."""
    leaves: dict[str, Any] = {n: x[n][None].detach().requires_grad_() for n in GRADS}
    with gdn_ir.use("triton"), gdn_ir.keep(keep):
        for _ in range(2):                                 # the first compiles
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            o = chunk_gated_delta_rule(**leaves, cu_seqlens=x["cu_seqlens"])[0]
            between = torch.cuda.memory_allocated() - before
            grads = torch.autograd.grad(o, list(leaves.values()), x["d_o"][None])
            torch.cuda.synchronize()
            most = torch.cuda.max_memory_allocated() - before
            del o, grads
    return {"most": round(most / MIB, 1), "between forward and backward, with o": round(between / MIB, 1)}


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--commit", required=True)
    if not torch.cuda.is_available():
        p.error("it needs a CUDA GPU, and this machine has none")
    a, x = of_one_sequence(p)
    wide = {n: t.float() if n in ("q", "k", "v", "beta", "d_o") else t for n, t in x.items()}
    exact = {**pair(wide, "nothing")[0][1](), **pair(wide, "nothing")[1][1]()}
    rows: list[dict[str, Any]] = []
    for keep in KEEP:
        (f, forward), (b, backward) = pair(x, keep)
        got = forward() | backward()

        def both(forward: Callable[[], Tensors] = forward, backward: Callable[[], Tensors] = backward) -> Tensors:
            return forward() | backward()
        again = both()
        rows.append({"keep": keep, "schedules": [f.schedule.name, b.schedule.name],
                     "ms": {n: round(graph_ms([run], 11), 4) for n, run in
                            (("forward", forward), ("backward", backward), ("both", both))},
                     "kernels": {"forward": kernels(f, forward), "backward": kernels(b, backward)},
                     "repeats": all(torch.equal(got[n], again[n]) for n in got),
                     "errors_against_float32": {n: relative(got[n], exact[n].double()) for n in got}, "MiB": held(x, keep)})
        print(json.dumps(rows[-1]), flush=True)
    about = {"commit": a.commit, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
             "shape": {"tokens": a.tokens, "H": a.H, "HV": a.HV}}
    a.out.write_text(json.dumps(about | {"rows": rows}, indent=0) + "\n")


if __name__ == "__main__":
    main()
