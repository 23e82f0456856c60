"""The cost model against kernels that were timed, and the tables that ship."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from gdn_ir import calls
from gdn_ir.autotune import cost, lookup, tables
from gdn_ir.backends.base import Call
from gdn_ir.bench.cases import FORWARD
from gdn_ir.bench.errors import worst
from gdn_ir.autotune.check import bound
from gdn_ir.compiler import Instance, variant
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.schedules.defaults import default

BF16 = Instance(Switches(final_state=True), 128, 128, "bf16", "bf16", True)
KERNELS = Path(__file__).parent.parent / "bench" / "results" / "h100" / "kernels.json"


def test_the_model_is_near_what_an_h100_took() -> None:
    """Each kernel of each shape within 30 percent: as near as a choice between schedules needs."""
    rows = json.loads(KERNELS.read_text())["rows"]
    assert len(rows) == 7
    for r in rows:
        lengths, (H, HV) = r["lengths"], r["heads"]
        made = variant(BF16, default("sm_90", BF16, len(lengths), HV, sum(lengths))[0], "triton", "sm_90")
        call = Call(len(lengths), sum(lengths), sum(lengths), {"H": H, "HV": HV})
        for k in made.compiled.kernels:
            predicted = 1e3 * cost.kernel_seconds(k, call, cost.H100)
            assert 1 / 1.3 <= predicted / r["triton"][k.name] <= 1.3, (lengths, H, HV, k.name, predicted, r["triton"])


def test_shipped_tables_are_of_today_s_code() -> None:
    """Every winner compiles to the code that its table names (else it would not be served), is right where it was measured, and
    says so where it was not."""
    shipped = tables.shipped()
    assert {w.subject.device.name for w in shipped} >= {"NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"}
    for w in shipped:
        s = w.subject
        made = variant(s.instance, w.schedule, s.backend, s.device.arch)
        assert {x.kernel: x.hash for x in made.sources} == dict(w.sources), (s.device.name, str(w.shape))
        if w.how == "measured":
            assert w.ms and w.errors and worst(dict(w.errors).values()) <= bound(s.instance)
        else:
            assert w.ms is None and not w.errors and w.predicted_ms and w.how == "heuristic and cost model"
            few, many = (default(s.device.arch, s.instance, 1, n, 64)[0] for n in (cost.FEW, cost.MANY))
            assert w.schedule in (few, many)               # which were checked, from their PTX


def test_an_a100_is_served_by_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GDN_IR_TUNED")
    monkeypatch.setattr(lookup, "device_here", lambda target: cost.A100.device)
    found = lookup.find("sm_80", BF16, 1, 32, 8192, "triton")
    assert found.level == "exact" and "by heuristic and cost model, never timed" in found.why and "ms predicted" in found.why
    near = lookup.find("sm_80", BF16, 2, 16, 8192, "triton")
    assert near.level == "near"


def test_twenty_shapes_stand_for_the_suite() -> None:
    """Every row of FORWARD is near enough to one of them to be served by its winner."""
    shapes = calls.shapes_of("")
    assert len(shapes) == 20
    for lengths, _, HV in FORWARD:
        key = (len(lengths), HV, sum(lengths))
        assert min(lookup.distance(s.key, key) for s in shapes) <= lookup.NEAR, key
