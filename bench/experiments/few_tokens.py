"""Errors of the gradients of few tokens, ours and FLA's on the same inputs, over draws of these: is what is off ours alone?

    python -m gdn_ir.bench.experiments.few_tokens --out FILE --commit HASH [--draws 8]

Relative L2 against float64 autograd of the recurrence, with gradients flowing in through o and the final state.
"""
from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import torch

from gdn_ir.ops import chunk_gated_delta_rule
from gdn_ir.bench import inputs
from gdn_ir.bench.errors import relative
from gdn_ir.coverage import Layout
from gdn_ir.reference import recurrence

# those of bench/verify_backward.py with an error over the bound
CELLS = {"dense, H = HV": (Layout((200, 200), False, 3, 3, 128, 128), 1.0),
         "packed, GVA": (Layout((300, 64, 129), True, 2, 4, 128, 128), 1.0),
         "packed, beta to 2": (Layout((300, 64, 129), True, 2, 4, 128, 128), 2.0),
         "96 x 128": (Layout((300, 64, 129), True, 2, 4, 96, 128), 1.0)}
LEAVES = ("q", "k", "v", "g", "beta", "initial_state")


def draw(lay: Layout, strength: float, seed: int) -> dict[str, torch.Tensor]:
    """Inputs as the op takes them, packed, and gradients of both outputs."""
    x = inputs.make(list(lay.lengths), lay.H, lay.HV, lay.K, lay.V, kind="model", seed=seed)
    torch.manual_seed(seed)
    x["beta"] = x["beta"] * strength
    return x | {"d_o": torch.randn_like(x["v"]), "d_final_state": torch.randn_like(x["initial_state"])}


def gradients(op: Any, x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    leaves = {n: x[n].detach().requires_grad_() for n in LEAVES}
    o, state = op(*(leaves[n][None] for n in LEAVES[:5]), initial_state=leaves["initial_state"], output_final_state=True,
                  cu_seqlens=x["cu_seqlens"])
    found = torch.autograd.grad([o[0], state], list(leaves.values()), [x["d_o"], x["d_final_state"]])
    return dict(zip(LEAVES, found, strict=True))


def exact(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    leaves = {n: x[n].detach().double().cpu().requires_grad_() for n in LEAVES}
    q, k, v, g, beta = (leaves[n][None] for n in LEAVES[:5])
    o, state = recurrence(q, k, v, g, beta, None, leaves["initial_state"], x["cu_seqlens"].cpu())
    found = torch.autograd.grad([o[0], state], list(leaves.values()), [x[n].double().cpu() for n in ("d_o", "d_final_state")])
    return dict(zip(LEAVES, found, strict=True))


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--out", required=True, type=Path)
    p.add_argument("--commit", required=True)
    p.add_argument("--draws", type=int, default=8)
    a = p.parse_args()
    ops = {"gdn-ir": chunk_gated_delta_rule, "FLA": importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule}
    rows = []
    for name, (lay, strength) in CELLS.items():
        for seed in range(a.draws):
            x = draw(lay, strength, seed)
            want = exact(x)
            rows.append({"cell": name, "draw": seed, "errors": {
                who: {f"d_{n}": relative(t.cpu(), want[n]) for n, t in gradients(op, x).items()} for who, op in ops.items()}})
        mine = rows[-a.draws:]
        print(name, {who: {"rms": sum(r["errors"][who]["d_g"] ** 2 for r in mine) ** 0.5 / a.draws ** 0.5,
                           "most": max(r["errors"][who]["d_g"] for r in mine)} for who in ops}, flush=True)
        a.out.write_text(json.dumps({"commit": a.commit, "gpu": torch.cuda.get_device_name(), "rows": rows}, indent=0) + "\n")


if __name__ == "__main__":
    main()
