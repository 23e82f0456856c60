"""Backward passes of gdn-ir and FLA on the same inputs in one run: milliseconds by CUDA-graph replay, and each kernel's share.

    python -m gdn_ir.bench.backward --out FILE --commit HASH

gdn-ir's call is the backward alone, from q, k, v, g, beta, d_o (states are computed again within it). FLA's is measured as
forward and backward together, less its forward; gdn-ir's forward is reported beside it.
"""
from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("FLA_FLASH_QLA", "0")

import torch

from gdn_ir.bench import cases, inputs
from gdn_ir.bench.errors import relative
from gdn_ir.autotune.measure import graph_ms
from gdn_ir.compiler import NAMES, Instance, Variant, variant
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.schedules.defaults import default

Tensors = dict[str, torch.Tensor]
GRADS = ("q", "k", "v", "g", "beta")


def made(lengths: list[int], H: int, HV: int) -> Tensors:
    """Inputs, and d_o."""
    x = inputs.make(lengths, H, HV)
    return x | {"d_o": torch.randn(x["v"].shape, device="cuda").to(x["v"].dtype)}


def of_one_sequence(p: argparse.ArgumentParser) -> tuple[argparse.Namespace, Tensors]:
    """What was asked for, with options for the size of one sequence; and its inputs."""
    p.add_argument("--tokens", type=int, default=32768)
    p.add_argument("--H", type=int, default=16)
    p.add_argument("--HV", type=int, default=32)
    a = p.parse_args()
    return a, made([a.tokens], a.H, a.HV)


def ours(x: Tensors) -> tuple[Variant, Callable[[], Tensors], Callable[[], Tensors]]:
    """The backward's variant, its call, and the forward's call."""
    T, HV, V = x["v"].shape
    H, K = x["q"].shape[1:]
    N, io = len(x["cu_seqlens"]) - 1, NAMES[x["q"].dtype]
    back = Instance(Switches(), K, V, io, io, True, GRADS, HV > H)
    forth = Instance(Switches(), K, V, io, io, True)
    b, f = (variant(i, default("sm_90", i, N, HV, T)[0], "triton", "sm_90") for i in (back, forth))
    given = {n: x[n] for n in GRADS}

    def backward() -> Tensors:
        out = {f"d_{n}": torch.empty_like(x[n]) for n in GRADS}
        out["d_q"], out["d_k"] = torch.empty((2, *x["q"].shape), dtype=x["q"].dtype, device=x["q"].device)      # as the op does
        b(given | {"d_o": x["d_o"]} | out, K ** -0.5, N, x["cu_seqlens"])
        return out

    def forward() -> Tensors:
        out = {"o": torch.empty_like(x["v"])}
        f(given | out, K ** -0.5, N, x["cu_seqlens"])
        return out
    return b, backward, forward


def kernels(chosen: Variant, call: Callable[[], Tensors]) -> dict[str, float]:
    """Milliseconds of each kernel of a backward, by torch's profiler, over ten calls."""
    from torch.profiler import ProfilerActivity, profile
    call()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(10):
            call()
        torch.cuda.synchronize()
    names = {s.kernel for s in chosen.sources}
    found = ((e.key.removesuffix("_kernel"), e.device_time_total) for e in seen.key_averages())            # TileLang's suffix
    return {name: round(time / 1e4, 4) for name, time in found if name in names}


def fla(x: Tensors) -> tuple[Callable[[], Tensors], Callable[[], object]]:
    op = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule

    def both() -> Tensors:
        leaves = {n: x[n][None].detach().requires_grad_() for n in GRADS}
        o, _ = op(**leaves, cu_seqlens=x["cu_seqlens"])
        found = torch.autograd.grad(o, list(leaves.values()), x["d_o"][None])
        return {f"d_{n}": d[0] for n, d in zip(GRADS, found, strict=True)}

    def forward() -> object:
        with torch.no_grad():
            return op(**{n: x[n][None] for n in GRADS}, cu_seqlens=x["cu_seqlens"])
    return both, forward


def row(lengths: list[int], H: int, HV: int) -> dict[str, Any]:
    x = made(lengths, H, HV)
    chosen, backward, forward = ours(x)
    wide = {n: t.float() if n in ("q", "k", "v", "beta", "d_o") else t for n, t in x.items()}
    exact = ours(wide)[1]()
    got = backward()
    found: dict[str, Any] = {"lengths": lengths, "heads": [H, HV], "schedule": chosen.schedule.name,
                             "sources": {s.kernel: s.hash for s in chosen.sources}, "kernels": kernels(chosen, backward),
                             "errors_against_float32": {"gdn-ir": {n: relative(got[n], exact[n].double()) for n in exact}}}
    found["ms"] = {"gdn-ir backward": graph_ms([backward], 11), "gdn-ir forward": graph_ms([forward], 11)}
    try:
        both, plain = fla(x)
        theirs = both()
        found["errors_against_float32"]["fla"] = {n: relative(theirs[n], exact[n].double()) for n in exact}
        del theirs
        whole, alone = graph_ms([both], 11), graph_ms([plain], 11)
        found["ms"] |= {"fla backward": whole - alone, "fla forward": alone}
    except Exception as e:                                 # not installed, or it refuses the Triton at hand
        found["fla"] = f"{type(e).__name__}: {e}"[:300]
    return found


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--out", required=True)
    p.add_argument("--commit", required=True)
    a = p.parse_args()
    result: dict[str, Any] = {"commit": a.commit, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": []}
    for case in cases.TRAIN_CORE:
        result["rows"].append(row(*case))
        print(json.dumps(result["rows"][-1]), flush=True)
        Path(a.out).write_text(json.dumps(result, indent=0) + "\n")


if __name__ == "__main__":
    main()
