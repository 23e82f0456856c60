"""The benchmark itself, on a CPU: what is listed, resumed, written and reported. Numbers in fixtures are made up."""
from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from gdn_ir.bench import cases, cold, command, energy, inputs, results, suite, timing
from gdn_ir.bench import floor as floors
from gdn_ir.bench.accuracy import reference, tokens_of_each
from gdn_ir.bench.cases import Row
from gdn_ir.bench.contenders import CONTENDERS, Contender, NotTimed, Tensors
from gdn_ir.bench.plots import PLOTS
from gdn_ir.bench.report import write
from gdn_ir.bench.results import Page
from gdn_ir.cli import app

RATES = floors.Rates(1e10, 1e11)


def planned(folder: Path, suite: str = "forward-core", shapes: str = "1x8:1/2,3+5:1/2", **options: Any) -> suite.Run:
    wanted = {"backends": "torch", "peers": "all", "dtype": "f32", "device": "cpu", "out": folder, "seconds": 0.0,
              "energy": 0.0, "K": 16, "V": 16} | options
    return command.plan(suite, shapes, **wanted)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


# ---- what is asked for ----------------------------------------------------------------------------------------------------


def test_suites_hold_their_rows() -> None:
    assert [len(cases.SUITES[s]) for s in ("forward", "forward-core", "train", "train-core")] == [171, 7, 32, 4]
    assert all(HV % H == 0 and min(lengths) > 0 for rows in cases.SUITES.values() for lengths, H, HV in rows)


def test_shapes_are_read_as_they_are_printed() -> None:
    found = cases.parse("8x1024:16/32, 3000+5192:2/8,1", "forward-core")
    assert found == [([1024] * 8, 16, 32), ([3000, 5192], 2, 8), ([32768], 2, 8)]
    for lengths, H, HV in cases.FORWARD + cases.TRAIN:
        text = str(Row(tuple(lengths), H, HV)).replace(" ", ":")
        assert cases.parse(text, "forward") == [(lengths, H, HV)]


@pytest.mark.parametrize("option, value, named", [
    ("suite", "fast", "suite: got 'fast'; accepts forward"), ("shapes", "8x:1/2", "--shapes: got '8x:1/2'"),
    ("shapes", "7", "an index from 0 to 6"), ("shapes", "1x8:3/4", "HV a multiple of H"),
    ("shapes", "0x8:1/2", "at least one sequence"),
    ("backends", "cuda", "--backends: got 'cuda'; accepts triton"), ("peers", "mamba", "--peers: got 'mamba'; accepts fla"),
    ("backends", "served", "accepts served in the suites that train"),
    ("dtype", "f64", "--dtype: got 'f64'; accepts bf16"), ("device", "tpu", "--device: got 'tpu'"),
    ("seconds", -1.0, "--seconds: got"),
    ("energy", 1e9, "--energy: got"), ("K", 17, "K: got 17")])
def test_a_bad_option_is_named_before_anything_runs(tmp_path: Path, option: str, value: Any, named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        planned(tmp_path, **{option: value})
    assert not list(tmp_path.iterdir())


def test_what_is_served_is_timed_where_there_are_two_passes(tmp_path: Path) -> None:
    """A forward is one of the backends; peers alone are asked for as before."""
    names = {name: [c.name for c in planned(tmp_path, name, "1x8:1/2", backends="all").contenders]
             for name in ("forward-core", "train-core")}
    assert "gdn-ir served" in names["train-core"] and "gdn-ir served" not in names["forward-core"]
    assert [c.kind for c in planned(tmp_path, "forward-core", "1x8:1/2", backends="none", peers="fla").contenders] == ["peer"]


# ---- a run ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[suite.Run, Page]:
    run = planned(tmp_path_factory.mktemp("results"))
    assert command.bench(run, "aaaaaaa", accuracy=False, console=quiet())
    return run, results.read(run.path)


def test_ours_is_measured_and_nobody_is_dropped(measured: tuple[suite.Run, Page]) -> None:
    run, page = measured
    assert run.path.relative_to(run.path.parent.parent).as_posix() == "cpu/forward-core-f32.json"
    assert [results.row_of(r) for r in page.rows] == run.rows
    for r in page.rows:
        assert list(r["contenders"]) == ["gdn-ir torch", "FLA", "FlashQLA", "FlashInfer", "attention cuDNN", "attention flash"]
        mine = r["contenders"]["gdn-ir torch"]
        assert mine["ms"] > 0 and mine["low"] <= mine["ms"] <= mine["high"] and mine["how"] == "wall clock"
        assert mine["errors"].keys() == {"o", "final_state"} and max(mine["errors"].values()) < 1e-5
        assert mine["schedule"] == "fused" and mine["sources"] and mine["peak_bytes"] is None
        assert mine["of_floor"] == r["floor"]["ms"] / mine["ms"]
        for peer in ("FLA", "FlashQLA", "FlashInfer"):
            assert r["contenders"][peer] == {"kind": "peer", "reason": r["contenders"][peer]["reason"]}
        assert r["ratio"] is None and r["best_peer"] is None
    assert "ms" not in page.rows[1]["contenders"]["attention flash"]       # its two sequences differ in length


def test_a_run_resumes_by_commit(measured: tuple[suite.Run, Page], tmp_path: Path) -> None:
    run, page = measured
    run = replace(run, path=tmp_path / "page.json")
    page.write(run.path)
    assert command.bench(run, "aaaaaaa", resume=True, accuracy=False, console=quiet())
    assert results.read(run.path).rows == page.rows                        # nothing was measured again
    assert command.bench(replace(run, rows=run.rows[:1]), "bbbbbbb", resume=True, accuracy=False, console=quiet())
    found = results.read(run.path)
    assert len(found.rows) == 2 and {found.commit_of(r) for r in found.rows} == {"aaaaaaa", "bbbbbbb"}
    assert "aaaaaaa, bbbbbbb" in found.mixed and not page.mixed
    Page("forward-core", "another GPU", "f32").write(run.path)
    with pytest.raises(ValueError, match=r"--resume: .* is of another GPU"):
        command.bench(run, "aaaaaaa", resume=True, console=quiet())


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, rows = planned(tmp_path), []

    def measure(run: suite.Run, row: Row, rates: floors.Rates, told: Any) -> dict[str, Any]:
        if rows:
            raise KeyboardInterrupt
        rows.append(row)
        return {"contenders": {}}
    monkeypatch.setattr(suite, "measure", measure)
    console = quiet()
    assert not command.bench(run, "aaaaaaa", accuracy=False, console=console)
    assert [results.row_of(r) for r in results.read(run.path).rows] == run.rows[:1]
    assert "--resume" in console.file.getvalue()                          # type: ignore[attr-defined]


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "gpu" / "page.json"
    page = Page("forward", "GPU", "bf16")
    page.write(path)
    before = path.read_text()
    page.rows.append({"run": 0, "what JSON cannot hold": object()})
    page.runs.append({"commit": "aaaaaaa"})
    with pytest.raises(TypeError):
        page.write(path)
    assert path.read_text() == before and [p.name for p in path.parent.iterdir()] == ["page.json"]
    path.write_text("{")
    with pytest.raises(ValueError, match=r"page\.json: not a page of results"):
        results.read(path)


def test_a_contender_that_fails_is_listed_with_its_reason(tmp_path: Path) -> None:
    def broken(row: Row, x: Tensors, train: bool) -> Any:
        raise RuntimeError("no such\n   kernel")

    def wrong(row: Row, x: Tensors, train: bool) -> Any:
        return lambda: {"o": torch.full_like(x["v"], float("nan"))}
    run = replace(planned(tmp_path, peers="none"), skipped={"skipped": "because"})
    run.contenders.extend(Contender(n, "peer", f) for n, f in (("broken", broken), ("wrong", wrong), ("skipped", broken)))
    found = suite.measure(run, run.rows[0], RATES)["contenders"]
    assert found["broken"] == {"kind": "peer", "reason": "RuntimeError: no such kernel"}
    assert found["skipped"] == {"kind": "peer", "reason": "because"}
    assert found["wrong"]["errors"]["o"] != found["wrong"]["errors"]["o"]  # NaN is told, not hidden


def test_training_goes_through_the_public_op(tmp_path: Path) -> None:
    run = planned(tmp_path, "train-core", "5+3:1/2", backends="torch,tilelang", peers="flashinfer,attention-flash")
    found = suite.measure(run, run.rows[0], RATES)
    errors = found["contenders"]["gdn-ir torch"]["errors"]
    assert errors.keys() == {"o", "dq", "dk", "dv", "dg", "dbeta"} and max(errors.values()) < 1e-5
    tilelang = found["contenders"]["gdn-ir tilelang"]
    assert "ms" in tilelang or tilelang["reason"]                          # until it has a backward
    assert found["floor"]["ms"] > suite.measure(replace(run, suite="forward", contenders=[]), run.rows[0], RATES)["floor"]["ms"]


def test_attention_is_timed_by_length(tmp_path: Path) -> None:
    run = planned(tmp_path, "break-even-train", "2x8:1/2", backends="none", peers="attention-flash")
    assert suite.measure(run, run.rows[0], RATES)["contenders"]["attention flash"]["ms"] > 0


# ---- references, floors, times --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
def test_a_prefix_says_what_the_whole_row_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: bool) -> None:
    """Errors of the first tokens of each sequence are those of the same tokens in the whole."""
    from gdn_ir.bench import accuracy
    run = planned(tmp_path, "train" if train else "forward", "9+20+3:1/2")
    row, x = run.rows[0], suite.make(run, run.rows[0])
    monkeypatch.setattr(accuracy, "tokens_of_each", lambda row, train: 6)
    part = reference(row, x, train)                                        # zeroes "do" past the prefix
    monkeypatch.setattr(accuracy, "tokens_of_each", lambda row, train: 20)
    full = reference(row, x, train)
    assert not part.complete and full.complete and part.prefix.tolist() == [*range(6), *range(9, 15), *range(29, 32)]
    assert part.exact.keys() == ({"o", "dq", "dk", "dv", "dg", "dbeta"} if train else {"o"})
    for name, t in part.exact.items():
        torch.testing.assert_close(full.exact[name][part.prefix], t)
    if not train:
        assert part.about["whole"].startswith("gdn-ir") and part.about["error of whole"] < 1e-5
    assert max(part.errors(full.exact | part.whole).values()) < 1e-5


def test_prefixes_are_affordable() -> None:
    for name, rows in cases.SUITES.items():
        for row in (Row(tuple(lengths), H, HV) for lengths, H, HV in rows):
            each = tokens_of_each(row, cases.trains(name))
            assert 1 <= each <= max(row.lengths) and each * len(row.lengths) <= 3072


def test_floors() -> None:
    """At the rates of an H100: a forward at 16/32 is bound by its bytes; nothing is under its own bytes or arithmetic."""
    rates, row = floors.Rates(3.02e12, 7.4e14), Row((32768,), 16, 32)
    forward, both = floors.floor(row, 2, rates, False), floors.floor(row, 2, rates, True)
    assert forward["ms"] == pytest.approx(0.271, rel=0.02) and forward["bound"] == "bytes"
    assert both["ms"] - forward["ms"] == pytest.approx(0.6, rel=0.1) and both["bound"] == "arithmetic"
    assert floors.flops_of(Row((64,), 1, 1)) == 10 * 2 * 64 * 64 * 128
    found = floors.measure("cpu", torch.float32)
    assert found.bytes > 1e8 and found.flops > 1e8


def test_quantiles_and_turns() -> None:
    assert timing.quantile([3.0, 1.0, 2.0], 0.5) == 2.0 and timing.quantile([1.0, 2.0], 0.1) == pytest.approx(1.1)
    order: list[str] = []
    timers = {n: timing.Timer(lambda n=n: order.append(n), 1, "wall clock") for n in "ab"}       # type: ignore[misc]
    timing.interleave(timers, 0.0)
    assert "".join(order) == "aabb" * timing.ROUNDS
    assert timers["a"].summary()["samples"] == 2 * timing.ROUNDS
    assert energy.of(timers["a"], 1, 0.1) == {"energy": "not read on a CPU"}

    def breaks() -> None:
        raise RuntimeError("an illegal\nmemory access")
    with pytest.raises(RuntimeError, match="b failed when it was timed: an illegal memory access"):
        timing.interleave(timers | {"b": timing.Timer(breaks, 1, "wall clock")}, 0.0)


def test_one_head_hardly_decays() -> None:
    """And the kinds that are recorded with errors are what they were."""
    x = inputs.make([4096], 1, 4, 16, 16, torch.float32, "cpu", "real")
    total = x["g"].sum(0)
    assert total[0] > -0.5 and (total[1:] < -1).all() and "real" not in inputs.KINDS
    same = inputs.make([4096], 1, 4, 16, 16, torch.float32, "cpu", "model")
    assert torch.equal(same["g"][:, 1:], x["g"][:, 1:]) and torch.equal(same["q"], x["q"])


# ---- first calls ----------------------------------------------------------------------------------------------------------


def test_first_calls_in_a_fresh_process(tmp_path: Path) -> None:
    task = cold.Task("gdn-ir torch", (Row((8,), 1, 2, 16, 16), Row((3, 5), 1, 2, 16, 16)), "f32", "cpu", False)
    assert cold.Task.of(task.json()) == task
    found = cold.spawn(task, str(tmp_path))
    assert len(found["seconds"]) == 2 and found["process"] > sum(found["seconds"])
    assert (tmp_path / "gdn_ir_cache" / "torch").is_dir()
    peer = cold.first_calls(replace(task, contender="FlashQLA"))
    assert peer["seconds"] == [] and peer["reason"]


def test_cold_and_warm_use_the_same_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[str | None] = []

    def spawn(task: cold.Task, folder: str | None = None) -> dict[str, Any]:
        folders.append(folder)
        return {"seconds": [3.0 / len(folders)], "process": 5.0}
    monkeypatch.setattr(cold, "spawn", spawn)
    task = cold.Task("FLA", (Row((8,), 1, 2),), "bf16", "cuda", False)
    assert cold.cold_and_warm(task) == {"cold_s": 3.0, "warm_s": 1.5, "cold_process_s": 5.0, "warm_process_s": 5.0}
    assert len(set(folders)) == 1 and folders[0] and not Path(folders[0]).exists()
    folders.clear()
    told: list[str] = []
    rows = [Row((8,), 1, 2), Row((16,), 1, 2), Row((8,), 2, 2)]
    cold.warm_up([CONTENDERS["FLA"], CONTENDERS["FlashQLA"]], rows, "bf16", "cuda", False, 2, told.append)
    assert folders == [None] * 4 and sum("FLA, 2 rows" in t for t in told) == 1        # by number of heads


def test_what_was_chosen_beside_others_is_forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """But not what was chosen before."""
    kept, made = tmp_path / "a" / "x.autotune.json", tmp_path / "b" / "y.autotune.json"
    monkeypatch.setattr("triton.knobs.cache.dir", str(tmp_path))

    def spawn(task: cold.Task) -> dict[str, Any]:
        made.parent.mkdir()
        made.write_text("{}")
        return {"seconds": [1.0], "process": 1.0}
    kept.parent.mkdir()
    kept.write_text("{}")
    monkeypatch.setattr(cold, "spawn", spawn)
    cold.warm_up([CONTENDERS["FLA"]], [Row((8,), 1, 2)], "bf16", "cuda", False, 1, lambda _: None)
    assert kept.exists() and not made.exists()


def test_cold_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"cold_s": 3.0, "warm_s": 1.0, "cold_process_s": 5.0, "warm_process_s": 2.0}
    monkeypatch.setattr(cold, "cold_and_warm", lambda task: times if "gdn-ir" in task.contender else {"reason": "none"})
    run = replace(planned(tmp_path), rows=[])
    run.rows.append(Row((8,), 1, 2))
    page = Page("forward-core", "cpu", "f32", runs=[{"commit": "aaaaaaa"}])
    assert command.first_calls(run, page, 0, quiet()) and command.first_calls(run, page, 0, quiet())
    assert [r["contender"] for r in page.cold] == [c.name for c in run.contenders]
    assert page.cold[0]["cold_s"] == 3.0 and page.cold[1]["reason"] == "none"


# ---- the report -----------------------------------------------------------------------------------------------------------


def made_up(suite: str, commits: tuple[str, ...] = ("aaaaaaa",)) -> Page:
    """A page with everything a report can show. The numbers are made up."""
    page, train = Page(suite, "MADE-UP GPU", "bf16"), cases.trains(suite)
    page.runs = [{"commit": c, "date": "2000-01-01 00:00", "versions": {"torch": "0"}, "bytes_per_s": 1e12, "flops_per_s": 1e14,
                  "inputs": "real"} for c in commits]
    for i, (lengths, H, HV) in enumerate(cases.SUITES[suite]):
        row = Row(tuple(lengths), H, HV)
        lower = floors.floor(row, 2, floors.Rates(1e12, 1e14), train)
        entries = {n: {"kind": k, "ms": lower["ms"] * f, "low": lower["ms"] * f, "high": lower["ms"] * f * 1.1, "samples": 9,
                       "how": "cuda graph", "launches": 3, "errors": {"o": 3e-3} if k != "attention" else {}, "of_floor": 1 / f,
                       "peak_bytes": 2 ** 24, "microjoules_per_token": f}
                   for n, k, f in (("gdn-ir triton", "gdn-ir", 3.0), ("FLA", "peer", 6.0),
                                   ("attention cuDNN", "attention", 2.0))}
        entries["FlashInfer"] = {"kind": "peer", "reason": "made up: <none>"}
        page.put("rows", results.key_of(row, "bf16"), {
            "run": i % len(commits), "train": train, "floor": lower, "served": "gdn-ir triton", "contenders": entries,
            "reference": {"exact": "a made-up reference"}})
    page.put("cold", {"contender": "FLA"} | results.key_of(row, "bf16"),
             {"run": 0, "kind": "peer", "cold_s": 3.0, "warm_s": 1.0, "cold_process_s": 5.0, "warm_process_s": 2.0})
    page.put("accuracy", {"inputs": "model"}, {"run": 0, "contenders": entries})
    return page


def test_a_report_shows_everything_in_one_file(tmp_path: Path) -> None:
    for name in ("forward-core", "break-even", "break-even-train"):
        page = made_up(name)
        page.write(results.path_of(tmp_path / "results", page.gpu, name, "bf16"))
    (tmp_path / "results" / "made-up-gpu" / "other.json").write_text('{"rows": []}')      # of another tool
    md, html = write(tmp_path / "results", tmp_path / "docs")
    text, page_text = md.read_text(), html.read_text()
    for title, _ in PLOTS.values():
        assert title in text and title in page_text
    assert page_text.count("<svg") == page_text.count("</svg>") == 2 * len(PLOTS) and "Not shown" not in page_text
    assert not re.search(r'(src|href)="(?!#)', page_text) and "mixes commits" not in text
    assert "made up: <none>" in text and "made up: &lt;none&gt;" in page_text
    assert "| 1x32768 2/8 |" in text and "| 2.00 |" in text               # FLA takes twice as long


def test_a_report_of_mixed_commits_says_so(tmp_path: Path) -> None:
    page = made_up("forward-core", ("aaaaaaa", "bbbbbbb"))
    page.write(tmp_path / "gpu" / "forward-core.json")
    assert json.loads((tmp_path / "gpu" / "forward-core.json").read_text())["mixed"]
    for path in write(tmp_path, tmp_path / "docs"):
        assert "This page mixes commits: aaaaaaa, bbbbbbb" in path.read_text()


def test_a_report_of_a_cpu_says_what_is_missing(measured: tuple[suite.Run, Page], tmp_path: Path) -> None:
    run, _ = measured
    md, _ = write(run.path.parent.parent, tmp_path)
    assert "Not shown: peak memory is read on a GPU only." in md.read_text()
    with pytest.raises(ValueError, match="no page of results"):
        write(tmp_path / "nowhere", tmp_path)


def test_commands(tmp_path: Path) -> None:
    runner = CliRunner()
    words = "bench forward --shapes 1x8:1/2 --K 16 --V 16 --backends torch --peers none --no-accuracy --seconds 0 --device cpu"
    done = runner.invoke(app, [*words.split(), "--commit", "ccc", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert results.read(tmp_path / "cpu" / "forward-f32.json").commits == ["ccc"]
    assert runner.invoke(app, ["report", str(tmp_path), "--out", str(tmp_path)]).exit_code == 0
    failed = runner.invoke(app, ["bench", "--workers", "0"])
    assert isinstance(failed.exception, ValueError) and "--workers: got 0" in str(failed.exception)


def test_only_the_benchmark_knows_peers() -> None:
    """gdn_ir and what it is made of never import one."""
    root = Path(__file__).parent.parent
    for folder in ("gdn_ir", "backends", "schedules", "autotune"):
        for path in (root / folder).rglob("*.py"):
            assert not re.search(r"^\s*(import|from) (fla|flash_qla|flashinfer)\b", path.read_text(), re.M), path
    with pytest.raises(NotTimed, match="not installed"):
        from gdn_ir.bench.contenders import need
        need("no_such_peer.ops", {}, Row((1,), 1, 1))
