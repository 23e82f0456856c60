"""The tuner: its space and what is pruned of it; candidates that hang, crash and lie; runs that are killed and go on."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import torch

import tests.faulty as faulty
from gdn_ir.artifacts import store
from gdn_ir.autotune import check, command, halving, prune
from gdn_ir.autotune.display import Display
from gdn_ir.autotune.keys import Shape
from gdn_ir.autotune.prune import Pruned, Ready, ready
from gdn_ir.autotune.records import Records, winners
from gdn_ir.autotune.space import Candidate, Frame, Space, based, candidates, compose, space_of, widened
from gdn_ir.autotune.tune import Limits, Task, Tuner
from gdn_ir.backends import BACKENDS
from gdn_ir.bench import cases
from gdn_ir.bench.role_backward import TIMED
from gdn_ir.calls import GRADIENTS
from gdn_ir.compiler import Instance, variant
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.registry import options
from gdn_ir.schedules import adjoints
from gdn_ir.schedules.defaults import (FUSED_LENGTHS, LENGTHS, backward_by_roles, default, forward_by_roles, roles_fit,
                                       roles_in_one, way_of_roles, whole_scans)
from gdn_ir.schedules.role_backward import WAYS
from gdn_ir.schedules.schedule import KernelOptions, Schedule

SMALL = Instance(Switches(final_state=True), 16, 16, "f32", "f32", True)
BF16 = Instance(Switches(final_state=True), 128, 128, "bf16", "bf16", True)
SHAPE = Shape((64,), 1, 2)


def sorted_out(space: Space, instance: Instance, arch: str) -> tuple[dict[str, Ready], Pruned, list[str]]:
    good, gone, why = {}, Pruned(), []
    for c in candidates(space, "triton", arch, instance):
        r = ready(c, instance, "triton", arch)
        if isinstance(r, str):
            gone.add(r)
            why.append(r)
        else:
            good[r.code] = r
    return good, gone, why


def test_the_space_is_pruned_for_reasons_that_count() -> None:
    space = Space((Frame("wy"), Frame("fused", 128, 32)), (None, 16, 128), (1, 8), (1, 4))
    good, gone, why = sorted_out(space, BF16, "sm_90")
    assert gone["declined"] and gone["registers"] and gone["illegal step"]
    assert set(gone) <= set(prune.REASONS) and f"{gone['declined']} declined" in str(gone)
    assert any(w.startswith("registers: scan carries 512 for each thread, of 255") for w in why)
    assert {r.candidate.varies for r in good.values()} == {None, "solve", "scan", "output"}
    assert space.hash != Space(space.frames).hash == Space(space.frames).hash


def test_a_stream_of_its_own_makes_another_candidate() -> None:
    """Two ways of the same kernels, in a row and beside each other, are timed both."""
    row, beside = (ready(Candidate(backward_by_roles(TIMED, WAYS[name])), TIMED, "tilelang", "sm_90")
                   for name in ("roles-throughout", "roles-aside-throughout"))
    assert isinstance(row, Ready) and isinstance(beside, Ready)
    assert row.keys == beside.keys and row.code != beside.code


def test_bounds_of_shared_memory_are_lower_bounds() -> None:
    """What is pruned could not have run: the estimate is below what Triton takes, and grows with stages."""
    found = []
    for stages in (1, 3):
        s = Schedule("x", steps=Frame("states").steps(BF16)).with_options(scan=KernelOptions(64, 4, stages))
        r = ready(Candidate(s), BF16, "triton", "sm_80")
        assert isinstance(r, Ready)
        kernel = next(k for k in r.variant.compiled.kernels if k.name == "scan")
        built = BACKENDS["triton"].build(kernel, BACKENDS["triton"].emit(kernel, "sm_80"), "sm_80")
        assert built is not None
        found.append(prune.shared_bytes(kernel))
        assert found[-1] <= built.launch["shared"]
    assert found[0] < found[1]
    wide = Schedule("x", 128, Frame("states", 128).steps(BF16)).with_options(scan=KernelOptions(64, 8, 4))
    r = ready(Candidate(wide), BF16, "triton", "sm_80")
    assert isinstance(r, str) and r.startswith("shared memory: scan takes at least")


@pytest.mark.parametrize(("backend", "arch", "io", "grads"), [
    ("triton", "sm_80", "bf16", ("q", "v")), ("torch", "torch", "f32", ()), ("tilelang", "cpu", "f32", ())])
def test_every_space_has_points(backend: str, arch: str, io: str, grads: tuple[str, ...]) -> None:
    i = Instance(Switches(final_state=not grads), 32, 32, io, io, True, grads)
    space = space_of(backend, arch, i)
    space = Space(space.frames[:2], space.v_tile[:2], space.num_warps[:2], space.num_stages[:2])
    assert any(isinstance(ready(c, i, backend, arch), Ready) for c in candidates(space, backend, arch, i))


@pytest.mark.parametrize("heads", [8, 64])
def test_roles_are_in_the_space(heads: int) -> None:
    """Whole and in segments, whether or not the default has them; each is worth compiling, and Triton's part stays its own."""
    space = space_of("tilelang", "sm_90", BF16)
    frames = [f for f in space.frames if f.plan in ("roles", "roles-short")]
    assert [f.segment for f in frames] == [0, *LENGTHS] * 2
    fused = [f for f in space.frames if f.plan == "roles-fused"]
    assert [f.segment for f in fused] == [0, *FUSED_LENGTHS]
    for f in fused:
        found = ready(Candidate(based(f, "tilelang", "sm_90", BF16, heads), f), BF16, "tilelang", "sm_90")
        served = forward_by_roles(BF16, f.segment, one=True) if f.segment else roles_in_one()
        assert isinstance(found, Ready) and found.sources == {
            s.kernel: s.hash for s in variant(BF16, served, "tilelang", "sm_90").sources}
    for f in frames:
        base = based(f, "tilelang", "sm_90", BF16, heads)
        found = ready(Candidate(base, f), BF16, "tilelang", "sm_90")
        assert isinstance(found, Ready), found
        assert [k.name for k in found.variant.compiled.kernels if k.options.roles] == ["solve", "scan"]
        chunks = 2 if f.plan == "roles-short" else 8
        served = variant(BF16, forward_by_roles(BF16, f.segment, chunks=chunks), "tilelang", "sm_90")
        assert found.sources == {s.kernel: s.hash for s in served.sources}
        every = [c.varies for c in widened(f, Space(space.frames, (None, 32), (1,), (1,)), "tilelang", "sm_90", BF16, heads)]
        assert not {"solve", "scan"} & {*every} and ("compose" in every) == (f.segment > 0)
    varied = next(c for c in widened(frames[1], space, "tilelang", "sm_90", BF16, heads) if c.varies == "compose")
    assert varied.schedule.options("compose").backend == "triton"
    plain = next(f for f in space.frames if f.plan == "states")
    assert not based(plain, "tilelang", "sm_90", BF16, heads).options("scan").roles
    normalised = replace(BF16, switches=Switches(l2norm=True))
    assert any(f.plan == "roles-fused" for f in space_of("tilelang", "sm_90", normalised).frames)
    for other in (replace(BF16, io="f16"), replace(BF16, V=64), replace(BF16, switches=Switches(state_v_first=True))):
        assert all(f.plan != "roles" for f in space_of("tilelang", "sm_90", other).frames)
    assert all(f.plan != "roles" for f in space_of("triton", "sm_90", BF16).frames)


def test_the_backward_s_segments_are_in_the_space() -> None:
    """Where they may serve, each length, as it would."""
    train = Instance(Switches(), 128, 128, "bf16", "bf16", True, ("q", "k", "v", "g", "beta"), True)
    frames = space_of("triton", "sm_90", train).frames
    assert [f.plan for f in frames[:4]] == ["gathered-turns", "gathered", "gathered-merged", "grouped"]
    for i, (gathers, plan) in enumerate(((True, "gathered-turns-segments"), (True, "gathered-segments"), (False, "segments"))):
        found = [f for f in frames if f.plan == plan]
        assert [f.segment for f in found] == [*adjoints.LENGTHS]
        whole, _ = whole_scans("sm_90", train, 1, 4, "triton", gathers, "" if i else "gathered-turns")
        cut = {f: adjoints.in_segments(whole, train, f.segment, plan) for f in found}
        served = {frames[(0, 1, 3)[i]]: whole} | cut
        for f, schedule in served.items():
            mine, theirs = (variant(train, s, "triton", "sm_90") for s in (based(f, "triton", "sm_90", train, 4), schedule))
            assert [(s.kernel, s.hash, k.options) for k, s in zip(mine.compiled.kernels, mine.sources, strict=True)] == \
                [(s.kernel, s.hash, k.options) for k, s in zip(theirs.compiled.kernels, theirs.sources, strict=True)]
    turns, served_whole = based(frames[0], "triton", "sm_90", train, 8), default("sm_90", train, 1, 8, 32768)[0]
    assert all(turns.options(k) == o for k, o in served_whole.kernels if k != "*") and served_whole.options("grads").k_tile
    roles = space_of("tilelang", "sm_90", train).frames
    assert [(f.plan, f.segment) for f in roles] == [(n, 32 * ("segments" in n)) for n in WAYS]
    made = [based(f, "tilelang", "sm_90", train, 32) for f in roles]
    assert [s.options("again").aside for s in made] == ["aside" in f.plan for f in roles]
    assert [[k for k, o in s.kernels if o.roles] for s in made] == [
        ["solve", "again", "back", *["grads"] * ("throughout" in f.plan)] for f in roles]
    wide = replace(train, io="f16", beta="f16")
    assert all("segments" not in f.plan for f in space_of("triton", "sm_90", wide).frames)


@pytest.mark.parametrize("varlen", [True, False])
def test_what_is_cut_is_checked_where_it_is_cut(varlen: bool, tmp_path: Path) -> None:
    """With a head of which something is left at a segment's end."""
    small = Instance(Switches(final_state=True), 16, 16, "f32", "f32", varlen)
    check.save(tmp_path / "o.pt", small, 128)
    data = torch.load(tmp_path / "o.pt", weights_only=True)
    assert max(data["lengths"]) > 128 and sum(data["lengths"]) <= len(data["x"]["q"])
    assert data["x"]["g"][:, 0].sum() > -1
    assert max(f.segment * f.chunk for f in space_of("tilelang", "sm_90", BF16).frames) == 64 * max(LENGTHS)


def test_the_best_options_are_put_together() -> None:
    frame = Frame("states")
    base = Schedule("states", steps=frame.steps(BF16))
    base = base.with_options(scan=KernelOptions(16, 4, 2), output=KernelOptions(64, 4, 1))
    a, b = KernelOptions(32, 4, 3), KernelOptions(64, 8, 1)
    timed = [(Candidate(base, frame), 1.0), (Candidate(base.with_options(scan=a), frame, "scan"), 0.8),
             (Candidate(base.with_options(output=b), frame, "output"), 0.9),
             (Candidate(base.with_options(output=KernelOptions(128, 8, 1)), frame, "output"), 0.95)]
    first, second = compose(timed)[:2]
    assert first.schedule == base.with_options(scan=a, output=b)
    assert second.schedule == base.with_options(scan=a, output=KernelOptions(128, 8, 1))


def test_one_binary_serves_many_shapes() -> None:
    """N, T, H and HV are arguments: all 203 rows of FORWARD and TRAIN run few distinct kernels."""
    codes = Counter()                                      # type: ignore[var-annotated]
    for lengths, _, HV in [*cases.FORWARD, *cases.TRAIN]:
        chosen = options(BF16, "sm_90", len(lengths), HV, sum(lengths))[0].variant
        fit = roles_fit("sm_90", BF16, len(lengths), HV, sum(lengths))
        assert chosen is not None and chosen.backend == ("tilelang" if fit else "triton")
        made = chosen.compiled
        for b, k, s in zip(made.makers, made.kernels, made.sources, strict=True):
            codes[k.name, str(b.recipe(k, s, "sm_90"))] += 1
    kinds = Counter(name for name, _ in codes)
    # two widths of Triton's scan; roles of whole sequences, which make the inverses or do not, and of segments of 16 to 128
    # chunks; what comes before each; inverses by Triton, and as roles in long walks and short ones, or long ones of no segments
    cut = dict.fromkeys(("reach", "transition", "offset", "compose"), 4)
    assert kinds == {"solve": 4, "scan": 8, "output": 1, **cut}, kinds
    crowded = sum(way_of_roles(len(n), HV, sum(n)) == (0, True) and roles_fit("sm_90", BF16, len(n), HV, sum(n))
                  for n, _, HV in [*cases.FORWARD, *cases.TRAIN])
    assert crowded > 30 and sum(n for (name, _), n in codes.items() if name == "solve") == 203 - crowded


# ---- runs -------------------------------------------------------------------------------------------------------------------


def tuner(path: Path, stages: tuple[int, ...], console: Console | None = None, resume: bool = False,
          shapes: tuple[Shape, ...] = (SHAPE,), count: int = 1) -> Tuner:
    space = Space((Frame("fused", 16),), num_warps=(4, 16), num_stages=stages)
    # what hangs only sleeps, so waiting for it costs no time of a processor; on busy ones the rest takes seconds
    limits = Limits(400, compiling=10, checking=15, timing=60, workers=count, checkers=count, seconds=0.01)
    return Tuner(Task(SMALL, "faulty", "torch", shapes), Records(path), limits, Display(console, 400), resume,
                 ("tests.faulty",), space)


def test_what_hangs_crashes_or_lies_costs_only_itself(tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    t = tuner(tmp_path / "r.jsonl", tuple(range(1, 9)), console, count=2)
    (w,) = t.run()
    said = console.export_text()
    assert w.schedule.options("scan").num_stages == faulty.FINE and w.ms and w.heuristic_ms    # the slow one is right, too
    by: dict[int, Any] = {}
    for r in Records(tmp_path / "r.jsonl").read():
        if r["kind"] == "check":
            by[r["schedule"]["kernels"].get("scan", r["schedule"]["kernels"]["*"])["num_stages"]] = r
    assert by[faulty.CRASHES]["failed"] == "crashed: killed by SIGSEGV"
    assert by[faulty.HANGS]["failed"].startswith("hung: ")
    assert by[faulty.WRONG]["errors"]["o"] > 0.1           # it was the fastest of all
    assert by[faulty.UNWRITTEN]["errors"]["final_state"] != by[faulty.UNWRITTEN]["errors"]["final_state"]
    failed = [r["failed"] for r in Records(tmp_path / "r.jsonl").read() if r["kind"] == "compile" and "failed" in r]
    assert sorted(f.split(":")[0] for f in failed) == ["RuntimeError", "hung"]
    assert "2 kernels do not compile" in said and "4 candidates are wrong" in said and "8 declined" in said
    timed = {r["schedule"]["kernels"].get("scan", {}).get("num_stages") for r in Records(tmp_path / "r.jsonl").read()
             if r["kind"] == "time"}
    assert {faulty.FINE, faulty.SLOW} <= timed <= {None, faulty.FINE, faulty.SLOW}


class Losing:
    """Stands for a worker: all take a second, but one, which it never comes back from after its `good` first times."""

    def __init__(self, bad: int, good: int) -> None:
        self.bad, self.good, self.jobs = bad, good, []     # type: ignore[var-annotated]

    def run(self, job: dict[str, Any], limit: float) -> dict[str, Any]:
        stages = [s["kernels"]["*"]["num_stages"] for s in job["schedules"]]
        self.jobs.append(stages)
        self.good -= self.bad in stages
        if self.bad in stages and self.good < 0:
            return {"lost": "hung", "at": stages.index(self.bad)}
        return {"done": {"ms": [[float(s)] for s in stages]}}


@pytest.mark.parametrize("good", [0, 1])
def test_a_lost_reference_is_replaced_and_the_round_timed_again(tmp_path: Path, good: int, monkeypatch: pytest.MonkeyPatch) \
        -> None:
    """It is tried no more, and every ratio that stands is to the new one; in a resumed run too."""
    monkeypatch.setattr(halving, "TOGETHER", 4)
    t, worker = tuner(tmp_path / "r.jsonl", (1,)), Losing(1, good)
    found = []
    for stages in range(1, 8):
        options = (("*", KernelOptions(num_stages=stages)),)
        r = ready(Candidate(Schedule("x", 16, Frame("fused", 16).steps(SMALL), options)), SMALL, "faulty", "torch")
        assert isinstance(r, Ready)
        found.append(r)
    scores, reference = halving.measure(t, worker, found, found[0], SHAPE, 0, float("inf"))    # type: ignore[arg-type]
    assert reference is found[1] and {r.code: scores[r.code].ratio for r in found[1:]} == {
        r.code: (i + 2) / 2 for i, r in enumerate(found[1:])}
    assert worker.jobs == [*[[1, 2, 3, 4], [1, 5, 6, 7]][:good + 1], [2, 3, 4, 5], [2, 6, 7]]
    again = tuner(tmp_path / "r.jsonl", (1,), resume=True)
    assert {k[0]: v.ratio for k, v in again.timings.items()} == {r.code: scores[r.code].ratio for r in found[1:]}
    assert set(again.failed) == {found[0].code}


def test_what_served_before_is_in_the_last_round(tmp_path: Path) -> None:
    """However slow it is: how well a shape is served by what was tuned for another is worth knowing."""
    t, found = tuner(tmp_path / "r.jsonl", (1,)), []
    for stages in (1, 2, 7):
        options = (("*", KernelOptions(num_stages=stages)),)
        found.append(ready(Candidate(Schedule("x", 16, Frame("fused", 16).steps(SMALL), options)), SMALL, "faulty", "torch"))
    for r in found:
        assert isinstance(r, Ready)
        t.errors[r.code], t.codes[r.candidate.schedule] = {"o": 0.0}, r.code
    t.served = {SHAPE: r.candidate.schedule}
    halving.one_shape(t, Losing(0, 1), found, SHAPE, 0.0, False)                   # type: ignore[arg-type]
    (w,) = winners(Records(tmp_path / "r.jsonl").read())
    assert (w.ms, w.served_ms) == (1.0, 7.0) and "takes 7.000x of their time" in command.summary([replace(w, heuristic_ms=1.0)])


RUN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)       # which a job in the background is started without
from pathlib import Path
from tests.test_tune import *
t = tuner(Path(sys.argv[1]), (1, 2), resume="resume" in sys.argv, shapes=(SHAPE, Shape((32, 32), 1, 2)))
print(len(t.run()), flush=True)
"""


def start(path: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", RUN, str(path), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, start_new_session=True)


def workers_of(process: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"\nPPid:\t{process}\n" in (entry / "status").read_text():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def gone_by(seconds: float, processes: list[int]) -> None:
    end = time.time() + seconds
    while time.time() < end and any(os.path.exists(f"/proc/{p}") for p in processes):
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{p}") for p in processes)


def test_a_killed_run_loses_nothing_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    process = start(path)
    end = time.time() + 60
    while time.time() < end and not (path.exists() and b'"kind": "time"' in path.read_bytes()):
        time.sleep(0.05)
    children = workers_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert children
    gone_by(10, children)                                  # nothing goes on without the tuner
    before = Records(path).read()
    assert any(r["kind"] == "time" for r in before)
    with open(path, "ab") as f:
        f.write(b'{"sum": 1, "rec')                        # and a torn line, as a kill may leave
    out, err = start(path, "resume").communicate(timeout=120)
    assert out.splitlines()[-1] == "2", err[-2000:]
    with pytest.warns(RuntimeWarning, match="torn or damaged"):
        after = Records(path).read()
    assert after[:len(before)] == before                   # nothing measured was lost, and no check was made twice
    assert max(Counter(r["code"] for r in after if r["kind"] == "check").values()) == 1
    done = Counter((r["code"], str(r["shape"]), r["round"]) for r in after if r["kind"] == "time" and r["round"] >= 0)
    reference = max(done, key=lambda k: done[k])[0]        # is timed beside every group
    assert all(n == 1 for k, n in done.items() if k[0] != reference)
    assert {w.shape for w in winners(after)} == {SHAPE, Shape((32, 32), 1, 2)}


def test_a_worker_serves_many_jobs_and_phases(tmp_path: Path) -> None:
    """Processes are started once: neither the end of a phase nor a wrong candidate costs another start."""
    from gdn_ir.autotune.pool import Pool
    from gdn_ir.autotune.keys import of_instance, of_schedule
    s = Schedule("x", 16, Frame("fused", 16).steps(SMALL))
    job = {"job": "compile", "instance": of_instance(SMALL), "backend": "faulty", "arch": "torch", "schedule": of_schedule(s),
           "kernel": 0}
    with Pool(1, ("tests.faulty",)) as pool:
        first = [answer for _, answer in pool.map([job, job | {"kernel": 9}], 30)]
        process = pool.workers[0].process
        assert process is not None and "done" in first[0] and "IndexError" in first[1]["failed"]
        time.sleep(0.3)
        assert "done" in next(iter(pool.map([job], 30)))[1] and pool.workers[0].process is process and process.poll() is None
        (lost,) = [answer for _, answer in pool.map([job | {"job": "compile", "schedule": of_schedule(
            Schedule("x", 16, s.steps, (("*", KernelOptions(None, 4, faulty.COMPILES_FOREVER)),)))}], 1)]
        assert lost["lost"] == "hung: nothing heard of it for 1 s" and process.poll() is not None
        assert "done" in next(iter(pool.map([job], 30)))[1]                    # by another
        last = pool.workers[0].process
    assert last is not None and last.poll() is not None


def test_two_runs_at_once_and_ctrl_c(tmp_path: Path) -> None:
    """Into the same records and cache; one is interrupted in the midst of timing, and the other ends as if it were alone."""
    path = tmp_path / "r.jsonl"
    two = [start(path), start(path)]
    children: list[int] = []
    end = time.time() + 100
    while time.time() < end and not (children and path.exists() and b'"kind": "time"' in path.read_bytes()):
        time.sleep(0.05)
        children = workers_of(two[1].pid)
    assert children and two[1].poll() is None
    two[1].send_signal(signal.SIGINT)
    _, said = two[1].communicate(timeout=60)
    assert two[1].returncode == -signal.SIGINT and "KeyboardInterrupt" in said
    gone_by(10, children)
    out, err = two[0].communicate(timeout=120)
    assert out.splitlines()[-1] == "2", err[-2000:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")                     # no line of one is torn by the other, nor by the interrupt
        found = Records(path).read()
    assert {w.shape for w in winners(found)} == {SHAPE, Shape((32, 32), 1, 2)}
    assert store().root.exists()


@pytest.mark.parametrize(("change", "message"), [
    ({"op": "both"}, "--op: got 'both'; accepts forward, backward"),
    ({"backends": "cuda"}, "--backends: got 'cuda'; accepts triton, tilelang, torch"),
    ({"shapes": "8by4"}, "--shapes: got '8by4'; accepts 8x1024:16/32"),
    ({"flags": "fast"}, "--flags: got 'fast'; accepts erase, l2norm"),
    ({"budget": 0.0}, "--budget: got 0; accepts a positive number of minutes"),
    ({"workers": 0}, "--workers: got 0; accepts a number from 1 on"),
    ({"dense": True, "shapes": "10+20:1/1"}, "--shapes: got 10\\+20:1/1 with --dense"),
    ({"backends": "triton"}, "--backends: got triton, which serves nothing of .* here: declined: triton lowers to"),
])
def test_wrong_words(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    plain = {"op": "forward", "shapes": "1x64:1/1", "backends": "torch", "budget": 1.0, "resume": False, "dtype": "f32",
             "K": 16, "V": 16, "flags": "", "dense": False, "records": tmp_path / "r.jsonl", "workers": 1}
    with pytest.raises(ValueError, match=message):
        command.tune(**(plain | change))                   # type: ignore[arg-type]
    assert not (tmp_path / "r.jsonl").exists()


def test_a_backward_is_tuned_shown_exported_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On torch, with few points, from the command's functions: and an exported table is read back."""
    few = Space((Frame("states"),))                        # what the heuristic has, too
    monkeypatch.setattr("gdn_ir.autotune.tune.space_of", lambda *a: few)
    console = Console(record=True, width=300)
    records = tmp_path / "r.jsonl"
    assert command.tune("backward", "1x40:1/2", "torch", 5.0, False, "f32", 16, 16, "no-final_state", False, records, 1,
                        console)
    (w,) = winners(Records(records).read())
    assert w.subject.instance.grads == GRADIENTS
    assert {n for n, _ in w.errors} == {f"d_{n}" for n in GRADIENTS}
    command.show(str(records), console)
    (path,) = command.export(str(records), tmp_path)
    assert command.known(str(path)) == [w]
    assert not command.verify(str(path), -0.999, console)  # it is right, but not a thousand times faster than it was
    said = console.export_text()
    assert "1 shapes tuned" in said and "1x40:1/2" in said and "slow, though right: " in said and "; errors d_q " in said
    with pytest.raises(ValueError, match=r"table: got none.json; accepts shipped, or a file"):
        command.known("none.json")
