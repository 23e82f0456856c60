"""The coverage table: every cell through every backend. On a CPU, Triton's kernels are executed by Triton's interpreter, which
cannot multiply bfloat16: those cells are lowered here and executed on a GPU (bench/verify.py)."""
from __future__ import annotations

import json

import pytest
import torch

from gdn_ir.coverage import Cell, table
from gdn_ir.compiler import Unsupported, variant
from gdn_ir.schedules.defaults import default
from tests.differential import executed, interpreted
from tests.interpreted import of_cell

BOUNDS = {"bf16": 4.5e-3, "f16": 4.5e-3, "f32": 2e-5}
PLANS = ("naive", "fused", "solve", "states", "wy")


def verdict(result: dict[str, object], io: str) -> str:
    if "declined" in result:
        return f"declined ({result['declined']})"
    if "failed" in result:
        return f"failed ({str(result['failed'])[-200:]})"
    error = float(result["error"])                         # type: ignore[arg-type]
    return f"executed ({error:.1e})" if error < BOUNDS[io] else f"failed (error {error:.1e})"


def test_torch(printed: list[str]) -> None:
    rows = []
    for cell in table():
        torch.manual_seed(0)
        rows.append((cell.name, verdict(of_cell(cell, backend="torch", arch="torch"), cell.io)))
    report("torch", rows, printed)


def test_triton(printed: list[str]) -> None:
    cells = table()
    found = interpreted([["cell", c.name] for c in cells if c.io != "bf16"])
    rows = [(c.name, verdict(found[json.dumps(["cell", c.name])], c.io) if c.io != "bf16" else lowered(c)) for c in cells]
    report("triton", rows, printed)


def test_tilelang(printed: list[str]) -> None:
    """Native code for CPUs, float32, executed."""
    cells = table(("f32",))
    found = executed([["cell", c.name] for c in cells], "tilelang", "cpu")
    report("tilelang", [(c.name, verdict(found[json.dumps(["cell", c.name])], c.io)) for c in cells], printed)


def lowered(cell: Cell) -> str:
    try:
        for arch in ("sm_80", "sm_90"):
            variant(cell.instance, default(arch, cell.instance, 1, 8, 100)[0], "triton", arch).sources      # noqa: B018
    except Unsupported as e:
        return f"declined ({e})"
    return "emitted for sm_80 and sm_90 (Triton's interpreter has no bfloat16 products)"


def report(backend: str, rows: list[tuple[str, str]], printed: list[str]) -> None:
    printed += [f"{backend:<9}{name:<44}{status}" for name, status in rows]
    bad = [r for r in rows if not r[1].startswith(("executed", "emitted"))]
    assert not bad, bad


@pytest.mark.parametrize("member", ["gated delta rule", "linear attention"])
def test_every_plan(member: str) -> None:
    """Each plan, dense and packed and ragged, shared heads, and chunks of one token (the decode step)."""
    layouts = ("dense", "varlen", "GVA", "ragged")
    cases: list[list[object]] = [["plan", plan, f"{member}, f32, {layout}", 64] for plan in PLANS for layout in layouts]
    cases += [["plan", "naive", f"{member}, f32, {layout}", 1] for layout in ("varlen", "GVA")]
    found = interpreted(cases)
    native = [c for c in cases if str(c[2]).endswith(("varlen", "GVA"))]
    found |= {f"tilelang {k}": v for k, v in executed(native, "tilelang", "cpu").items()}
    bad = {k: v for k, v in found.items() if not verdict(v, "f32").startswith("executed")}
    assert not bad, json.dumps(bad, indent=1)[:3000]
