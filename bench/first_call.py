"""How long the first call of the op takes in a fresh process: with nothing, with a warm cache, and with a pack.

    python -m gdn_ir.bench.first_call 1x8192:16/32 --pack PACK

Each is a process of its own. torch is imported, the device ready and the inputs made before the clock starts; importing gdn_ir,
loading the pack, choosing, loading (or compiling) and running are what it measures.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

from gdn_ir.bench.cases import parse

DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


def first_call(shape: str, dtype: str, K: int, V: int, pack: str) -> dict[str, object]:
    """In this process: seconds of importing gdn_ir, loading the pack, the first call and the second; and which compilers were
    imported meanwhile."""
    import torch

    from gdn_ir.bench import inputs
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ((lengths, H, HV),) = parse(shape, "forward")
    x = inputs.make(lengths, H, HV, K, V, getattr(torch, DTYPES[dtype]), device)

    def settle() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
    times = [settle()]
    import gdn_ir
    op = gdn_ir.ops.chunk_gated_delta_rule
    times.append(settle())
    if pack:
        gdn_ir.load_pack(pack)
    times.append(settle())
    for _ in range(2):
        with torch.no_grad():
            q, k, v, g, beta = (x[n][None] for n in ("q", "k", "v", "g", "beta"))
            op(q, k, v, g, beta, output_final_state=True, cu_seqlens=x["cu_seqlens"])
        times.append(settle())
    imported, loaded, first, second = (round(b - a, 4) for a, b in zip(times, times[1:]))
    return {"import_s": imported, "load_pack_s": loaded, "first_call_s": first, "second_call_s": second,
            "all_s": round(imported + loaded + first, 4), "compilers": [m for m in ("triton", "tilelang") if m in sys.modules]}


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("shape", help="as 1x8192:16/32")
    p.add_argument("--pack", default="")
    p.add_argument("--dtype", default="", help="bf16, f16 or f32 (bf16; f32 on a CPU)")
    p.add_argument("--K", type=int, default=128)
    p.add_argument("--V", type=int, default=128)
    p.add_argument("--here", action="store_true", help="measure in this process")
    a = p.parse_args()
    if not a.dtype:
        import torch
        a.dtype = "bf16" if torch.cuda.is_available() else "f32"
    if a.here:
        print(json.dumps(first_call(a.shape, a.dtype, a.K, a.V, a.pack)))
        return
    from gdn_ir.bench.cold import CACHES                   # imports gdn_ir, whose import is measured above
    for name, pack in (("nothing, then warm", ""), ("pack", a.pack)):
        if name == "pack" and not pack:
            continue
        with tempfile.TemporaryDirectory() as folder:
            caches = {n: os.path.join(folder, n.lower()) for n in CACHES} | ({"GDN_IR_NO_JIT": "1"} if pack else {})
            for turn in ("with a pack, compiling forbidden",) if pack else ("with nothing", "with a warm cache"):
                command = [sys.executable, "-m", "gdn_ir.bench.first_call", a.shape]
                words = ["--here", "--dtype", a.dtype, "--K", str(a.K), "--V", str(a.V), *(["--pack", pack] if pack else [])]
                done = subprocess.run([*command, *words], env=os.environ | caches, capture_output=True, text=True)
                print(f"{turn}: {done.stdout.strip() or done.stderr.strip().rpartition(chr(10))[2]}", flush=True)


if __name__ == "__main__":
    main()
