"""Records of measurements: two writers, torn and damaged lines; and the lookup that reads them, which always answers."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import triton

import gdn_ir
from gdn_ir import registry
from gdn_ir.autotune import keys, lookup, tables
from gdn_ir.autotune.keys import Device, Shape
from gdn_ir.autotune.space import Frame
from gdn_ir.autotune.records import Records, Subject, Winner, default_path, winners
from gdn_ir.backends import BACKENDS
from gdn_ir.compiler import Instance, variant
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.schedules.defaults import default, forward_by_roles
from gdn_ir.schedules.schedule import KernelOptions, Schedule

BF16 = Instance(Switches(final_state=True), 128, 128, "bf16", "bf16", True)
H100, H200 = Device("NVIDIA H100 80GB HBM3", 132, "sm_90"), Device("NVIDIA H200", 132, "sm_90")
SHAPE = Shape((8192,), 16, 32)


def winner(device: Device = H100, shape: Shape = SHAPE, stages: int = 4, instance: Instance = BF16) -> Winner:
    schedule = default("sm_90", instance, *shape.key)[0].with_options(scan=KernelOptions(16, 4, stages))
    sources = tuple((s.kernel, s.hash) for s in variant(instance, schedule, "triton", "sm_90").sources)
    subject = Subject(instance, "triton", device, tuple((BACKENDS["triton"].toolchain("sm_90") or {}).items()), "space")
    return Winner(subject, shape, replace(schedule, name="mine"), sources, 0.4, 0.5, (("o", 3e-3),), "2026-11-25 12:00")


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Records:
    """A file of the user's, and nothing that ships."""
    monkeypatch.setenv("GDN_IR_RECORDS", str(tmp_path / "records.jsonl"))
    monkeypatch.delenv("GDN_IR_TUNED")
    monkeypatch.setattr(lookup, "shipped", lambda: ())
    return Records(default_path())


def keep(records: Records, *found: Winner) -> None:
    for w in found:
        records.append("winner", w.subject.json(), **w.json())


def found(sequences: int = 1, heads: int = 32, tokens: int = 8192, instance: Instance = BF16) -> lookup.Found:
    return lookup.find("sm_90", instance, sequences, heads, tokens, "triton")


def test_records_read_back(records: Records) -> None:
    keep(records, winner())
    records.append("time", winner().subject.json(), ms=[1.0, 2.0])
    first, second = records.read()
    assert second["ms"] == [1.0, 2.0] and second["subject"] == first["subject"]
    (back,) = winners([first, second])
    assert back == replace(winner(), program=keys.program_hash(BF16))


@pytest.mark.parametrize("harm", ["torn", "digit", "garbage"])
def test_a_damaged_line_is_skipped_and_reported(records: Records, harm: str) -> None:
    for i in range(3):
        records.append("time", {}, ms=[100 + i])
    text = records.path.read_bytes()
    harmed = {"torn": text[:-20], "digit": text.replace(b"[102]", b"[192]"), "garbage": text[:-30] + b"\xff\0\n"}
    records.path.write_bytes(harmed[harm])
    records.append("time", {}, ms=[103])                   # after a torn line it begins a line of its own
    with pytest.warns(RuntimeWarning, match=r"line 3 is torn or damaged, and skipped; the other 3 records are whole"):
        assert [r["ms"] for r in records.read()] == [[100], [101], [103]]


WRITER = """
import sys
from pathlib import Path
from gdn_ir.autotune.records import Records
for i in range(100):
    Records(Path(sys.argv[1])).append("time", {"who": sys.argv[2]}, ms=[i] * 500)
"""


def test_two_processes_write_at_once(records: Records) -> None:
    running = [subprocess.Popen([sys.executable, "-c", WRITER, str(records.path), str(i)]) for i in range(2)]
    assert [p.wait(timeout=120) for p in running] == [0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        every = records.read()
    for who in "01":
        assert [r["ms"][0] for r in every if r["subject"]["who"] == who] == list(range(100))


def test_lookup_goes_from_exact_to_heuristic(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "device_here", lambda target: H100)
    assert found().level == "heuristic" and found().schedule == default("sm_90", BF16, 1, 32, 8192)[0]
    keep(records, winner(H200, stages=3))
    assert found().level == "same architecture" and "on NVIDIA H200 (2026-11-25" in found().why
    keep(records, winner(shape=Shape((16384,), 16, 32), stages=2))
    assert found().level == "near" and found().schedule.options("scan").num_stages == 2
    assert "tuned (near) for 1x16384:16/32 on NVIDIA H100" in found().why
    keep(records, winner())
    assert found().level == "exact" and found().schedule.name == "mine"
    assert f"12:00, triton {triton.__version__}): 0.4 ms, the heuristic's 0.5 ms" in found().why
    keep(records, replace(winner(stages=5), date="2026-11-26 12:00"))
    assert found().schedule.options("scan").num_stages == 5                    # the newest
    assert found(heads=128).level == "heuristic" and found(instance=replace(BF16, K=64)).level == "heuristic"
    monkeypatch.setenv("GDN_IR_TUNED", "0")
    assert found().level == "heuristic"


def test_a_neighbour_of_another_kind_does_not_serve(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cuts sequences, tuned, serves where the heuristic would cut them alike, and not half an octave on, where it would
    not."""
    monkeypatch.setattr(lookup, "device_here", lambda target: H100)
    train = replace(BF16, switches=Switches(), grads=("q", "k", "v", "g", "beta"))
    names = {n: default("sm_90", train, 1, 4, n)[0].name for n in (8192, 14000, 16384)}
    assert names == {8192: "backward-gathered-turns-16", **dict.fromkeys((14000, 16384), "backward-gathered-turns-segments-16")}
    mine = default("sm_90", train, 1, 4, 14000)[0].with_options(grads=KernelOptions(None, 8, 1))
    sources = tuple((s.kernel, s.hash) for s in variant(train, mine, "triton", "sm_90").sources)
    subject = replace(winner().subject, instance=train)
    keep(records, replace(winner(), subject=subject, shape=Shape((14000,), 2, 4), schedule=mine, sources=sources))
    assert {n: found(1, 4, n, train).level for n in names} == {8192: "heuristic", 14000: "exact", 16384: "near"}


def test_kernels_cut_otherwise_serve_near_by_alone(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that the heuristic has for neither shape, where it won: for 7000 tokens as for 8192, not for 16384."""
    monkeypatch.setattr(lookup, "device_here", lambda target: H100)
    mine = Frame("wy").steps(BF16)
    schedule = replace(winner().schedule, steps=mine)
    sources = tuple((s.kernel, s.hash) for s in variant(BF16, schedule, "triton", "sm_90").sources)
    keep(records, replace(winner(), schedule=schedule, sources=sources))
    assert {n: found(tokens=n).level for n in (8192, 7000, 16384)} == {8192: "exact", 7000: "near", 16384: "heuristic"}


def test_another_toolchain_s_winner_comes_last(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact in all else, it gives way to what these versions measured on another GPU; alone it serves, and says so."""
    monkeypatch.setattr(lookup, "device_here", lambda target: H100)
    old = winner(stages=3)
    keep(records, replace(old, subject=replace(old.subject, versions=(("triton", "3.5.0"),))))
    assert found().level == "other toolchain"
    assert "tuned (other toolchain) for 1x8192:16/32 on NVIDIA H100 80GB HBM3 (2026-11-25 12:00, triton 3.5.0)" in found().why
    keep(records, winner(H200, stages=2))
    assert found().level == "same architecture"


def test_what_compiles_to_other_code_now_is_not_served(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "device_here", lambda target: H100)
    keep(records, replace(winner(), sources=(("scan", "0" * 16),)))
    assert found().level == "heuristic" and "compiles to other code now: gdn-ir tune measures it again" in found().why
    keep(records, replace(winner(), schedule=Schedule("old", steps=(("no such step",),))))
    assert found().level == "heuristic" and "not legal any more" in found().why


def test_records_that_cannot_be_read_are_said_once(records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDN_IR_RECORDS", str(tmp_path))
    monkeypatch.setattr(lookup, "device_here", lambda target: H100)
    monkeypatch.setattr(lookup, "shipped", lambda: (replace(winner(), program=keys.program_hash(BF16)),))
    with pytest.warns(RuntimeWarning, match=r"cannot read what was tuned here .*; what ships serves\. GDN_IR_RECORDS names"):
        assert found().level == "exact"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found().level == "exact"
        monkeypatch.setenv("GDN_IR_RECORDS", str(tmp_path / "nothing there"))
        assert found().level == "exact"


def test_explain_says_where_a_schedule_comes_from(records: Records) -> None:
    keep(records, winner())
    registry.options.cache_clear()
    try:
        text = str(gdn_ir.explain(H=16, HV=32, T=8192, sequences=1, arch="sm_90", final_state=True))
        assert "schedule mine: tuned (same architecture) for 1x8192:16/32 on NVIDIA H100 80GB HBM3" in text
    finally:
        registry.options.cache_clear()


@pytest.mark.parametrize(("ms", "first"), [(0.3, "tilelang"), (0.5, "triton")])
def test_of_what_was_tuned_for_a_shape_the_fastest_serves(records: Records, monkeypatch: pytest.MonkeyPatch, ms: float,
                                                          first: str) -> None:
    """Roles, where the heuristic has them first; not against a time measured for another shape."""
    monkeypatch.setattr(lookup, "device_here", lambda target: H100)
    monkeypatch.setattr(registry, "at_hand", lambda *a: True)
    shape = Shape((16384,), 16, 32)
    roles = default("sm_90", BF16, *shape.key, "tilelang")[0]
    sources = tuple((s.kernel, s.hash) for s in variant(BF16, roles, "tilelang", "sm_90").sources)
    versions = tuple((BACKENDS["tilelang"].toolchain("sm_90") or {}).items())
    mine = Winner(Subject(BF16, "tilelang", H100, versions, "space"), shape, roles, sources, ms, ms, (), "2026-11-25 12:00")
    registry.forget()
    keep(records, mine, winner())
    assert [o.winner and o.winner.ms for o in registry.options(BF16, "sm_90", *shape.key)][:2] == [ms, 0.4]
    registry.forget()
    keep(records, winner(shape=shape))                     # takes 0.4
    assert registry.options(BF16, "sm_90", *shape.key)[0].backend == first
    registry.forget()


def test_distances_are_in_octaves() -> None:
    assert keys.distance((1, 32, 8192), (2, 16, 16384)) == 0 and keys.distance((1, 32, 8192), (2, 32, 16384)) == 1.0
    assert keys.distance((1, 32, 8192), (1, 32, 16384)) == 0.5 and keys.distance((1, 1, 0), (1, 1, 64)) == 0


def test_tables(tmp_path: Path) -> None:
    """What is exported reads back: the newest winner of each shape."""
    old, new = winner(), replace(winner(stages=5), date="2026-11-26 12:00")
    shape = Shape((4096,) * 8, 16, 64)
    other = replace(winner(shape=shape), schedule=replace(default("sm_90", BF16, *shape.key, "tilelang")[0], name="roles"))
    cut = replace(winner(shape=Shape((4096,) * 8, 16, 80)), schedule=forward_by_roles(BF16, 16))
    made = tables.to_json([old, new, cut, other, winner(H200)])
    assert set(made) == {H100, H200} and len(made[H100]["groups"]) == 1
    first, *roles = ([k.get("roles") for k in w["schedule"]["kernels"].values() if "roles" in k]
                     for w in made[H100]["groups"][0]["winners"])
    assert not any(first) and roles == [["SOLVED", "solve 1"], ["solve 2", "SOLVED"]]
    assert set(made[H100]["roles"]) == {"solve 1", "solve 2"}                    # of segments: bounds too
    (tmp_path / "h100.json").write_text(tables.text_of(made[H100]))
    assert json.loads(tables.text_of(made[H100])) == made[H100]
    back = tables.read(tmp_path / "h100.json")
    assert [replace(w, program="") for w in back] == [new, other, cut]
    assert tables.to_json(back)[H100] == made[H100]        # the same names, whatever the order
    for group in made[H100]["groups"]:                     # as tables had them before
        group["winners"] = [tables.with_roles(w, lambda _, x: made[H100]["roles"].get(x, x)) for w in group["winners"]]
    (tmp_path / "h100.json").write_text(json.dumps({n: x for n, x in made[H100].items() if n != "roles"}))
    assert tables.read(tmp_path / "h100.json") == back
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad.json: not a table of schedules"):
        tables.read(tmp_path / "bad.json")


def test_program_hashes_agree_between_processes() -> None:
    code = "from tests.test_records import BF16, keys; print(keys.program_hash(BF16))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONHASHSEED": "7"})
    assert done.stdout.strip() == keys.program_hash(BF16) != keys.program_hash(replace(BF16, switches=Switches()))
