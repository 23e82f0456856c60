"""A tuning run: space -> prune -> compile -> check -> time -> record.

Everything measured is recorded at once (records.py), so whatever ends the run, a resumed one goes on from there. Nothing is
compiled, run or timed in this process: see worker.py.
"""
from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gdn_ir.autotune import check
from gdn_ir.autotune.display import Display
from gdn_ir.autotune.halving import Timing, timed_rounds
from gdn_ir.autotune.keys import Shape, device_here, of_instance, of_schedule, to_schedule
from gdn_ir.autotune.lookup import find
from gdn_ir.autotune.pool import Pool
from gdn_ir.autotune.prune import Pruned, Ready, ready
from gdn_ir.autotune.records import Records, Subject, Winner, today
from gdn_ir.autotune.space import Candidate, Space, candidates, space_of
from gdn_ir.backends import BACKENDS
from gdn_ir.bench.errors import worst
from gdn_ir.compiler import Instance
from gdn_ir.schedules.defaults import default
from gdn_ir.schedules.schedule import Schedule

Json = dict[str, Any]
COMPILING, CHECKING = 0.9, 0.95                            # parts of the budget after which no more of either is begun


@dataclass(frozen=True)
class Task:
    """What is tuned: an instance on a backend for an architecture, for calls of these shapes."""
    instance: Instance
    backend: str
    arch: str
    shapes: tuple[Shape, ...]

    @property
    def device(self) -> str:
        """torch's name of where it runs."""
        import torch
        return "cuda" if self.arch.startswith("sm_") or (self.arch == "torch" and torch.cuda.is_available()) else "cpu"


@dataclass(frozen=True)
class Limits:
    """budget: seconds in all. compiling, checking, timing: seconds without a sign of life after which a worker is killed.
    workers: that compile side by side; checkers: that check (each holds a context of the GPU). seconds: of runs for each
    candidate in the first round of timing."""
    budget: float = 240.0
    compiling: float = 90.0
    checking: float = 60.0
    timing: float = 60.0
    workers: int = 14
    checkers: int = 6
    seconds: float = 0.02


@dataclass
class Tuner:
    """One task's run. modules: that workers import first (which may register backends); space: searched instead of the
    backend's own."""
    task: Task
    records: Records
    limits: Limits = field(default_factory=Limits)
    display: Display = field(default_factory=Display)
    resume: bool = False
    modules: tuple[str, ...] = ()
    space: Space | None = None

    def __post_init__(self) -> None:
        t = self.task
        device, versions = device_here(t.arch), BACKENDS[t.backend].toolchain(t.arch)
        if device is None or versions is None:
            raise ValueError(f"--backends: got {t.backend}, which cannot be measured here: "
                             f"{'no device of ' + t.arch if device is None else 'its compiler is not installed'}")
        self.searched = self.space or space_of(t.backend, t.arch, t.instance)
        self.subject = Subject(t.instance, t.backend, device, tuple(versions.items()), self.searched.hash)
        self.pruned, self.reason = Pruned(), ""            # and the first reason
        self.tried: dict[str, Ready] = {}                  # by code
        self.codes: dict[Schedule, str] = {}
        self.failed: dict[str, str] = {}                   # why, by a kernel's key or a candidate's code
        self.errors: dict[str, dict[str, float]] = {}      # of checked candidates, by code
        self.timings: dict[tuple[str, Shape, int], Timing] = {}
        self.finished: dict[Shape, Winner] = {}
        # what was tuned for the nearest shape, if anything was, before this run found anything
        self.served: dict[Shape, Schedule | None] = {}
        self.asked: Callable[[], Json] | None = None       # waits for the oracle, until somebody has
        self.start = time.monotonic()
        if self.resume:
            self.recall()

    def recall(self) -> None:
        """What was measured before, of this very subject."""
        mine = self.subject.json()
        for r in self.records.read():
            if r["subject"] != mine:
                continue
            if r["kind"] == "winner":
                w = Winner.of(r["subject"], r)
                self.finished[w.shape] = w
            elif r["kind"] == "start":
                for x in r["served"]:
                    s, schedule = x["shape"], x["schedule"]
                    self.served[Shape(tuple(s["lengths"]), s["H"], s["HV"])] = schedule and to_schedule(schedule)
            elif r["kind"] == "check" and "errors" in r:
                self.errors[r["code"]] = r["errors"]
            elif r["kind"] == "time" and "ms" in r:
                s = r["shape"]
                shape = Shape(tuple(s["lengths"]), s["H"], s["HV"])
                self.timings[r["code"], shape, r["round"]] = Timing(statistics.median(r["ms"]), r["ratio"])
            elif "failed" in r:                            # a candidate that hung or crashed is not tried again
                self.failed[r.get("key") or r["code"]] = r["failed"]
                if r.get("reference"):                     # what was timed beside it was timed again
                    s = r["shape"]
                    gone = Shape(tuple(s["lengths"]), s["H"], s["HV"]), r["round"]
                    self.timings = {k: t for k, t in self.timings.items() if k[1:] != gone}

    # -- the run

    def run(self) -> list[Winner]:
        """Winners of the shapes that were finished, earlier ones of a resumed run too."""
        t = self.task
        todo = [s for s in dict.fromkeys(t.shapes) if s not in self.finished]
        with ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gdn_ir_tune_")))
            # what Triton keeps of its own, beside our cache, goes with the run
            kept = {"TRITON_CACHE_DIR": str(self.folder / "triton")}
            counts = (self.limits.workers, self.limits.checkers, 1, 1)
            self.compilers, self.checkers, timers, oracles = (
                stack.enter_context(Pool(n, self.modules, kept)) for n in counts)
            if todo:
                self.oracle = self.folder / "oracle.pt"    # made while candidates are compiled
                longest = max(f.segment * f.chunk for f in self.searched.frames)
                self.asked = oracles.begin(self.job("oracle", oracle=str(self.oracle), segment=longest), self.limits.budget)
                begun = self.begin([s for s in todo if s not in self.served])
                heads = todo[0].HV * len(todo[0].lengths)
                found = [*(Candidate(s) for s in (*self.heuristics(todo), *filter(None, self.served.values()))),
                         *candidates(self.searched, t.backend, t.arch, t.instance, heads)]
                good = self.prepare(found)
                if not self.tried:
                    raise ValueError(f"--backends: got {t.backend}, which serves nothing of {t.instance} here: {self.reason}")
                self.records.append("start", self.subject.json(), served=begun)
                timed_rounds(self, timers.workers[0], good, todo)
        return [self.finished[s] for s in dict.fromkeys(t.shapes) if s in self.finished]

    def heuristics(self, shapes: Iterable[Shape]) -> list[Schedule]:
        """What nobody tuned would be served with."""
        found: dict[Schedule, None] = {}
        for s in shapes:
            try:
                found[default(self.task.arch, self.task.instance, *s.key, self.task.backend)[0]] = None
            except ValueError:
                continue
        return list(found)

    def begin(self, shapes: Iterable[Shape]) -> list[Json]:
        """Look up what serves calls of these shapes because it was tuned, here, for the nearest other one; returns it to be
        recorded: a resumed run would ask too late."""
        said: list[Json] = []
        for s in shapes:
            try:
                found = find(self.task.arch, self.task.instance, *s.key, self.task.backend)
            except ValueError:
                continue
            schedule = self.served[s] = found.schedule if found.level == "near" else None
            said.append({"shape": {"lengths": list(s.lengths), "H": s.H, "HV": s.HV},
                         "schedule": schedule and of_schedule(schedule)})
        return said

    def prepare(self, found: Iterable[Candidate]) -> list[Ready]:
        """Candidates that compile and are right, of those not seen before."""
        fresh = self.prune(found)
        self.compile(fresh)
        fresh = [r for r in fresh if not any(k in self.failed for k in r.keys)]
        self.check(fresh)
        return [r for r in fresh if r.code in self.errors and self.right(r.code) and r.code not in self.failed]

    def prune(self, found: Iterable[Candidate]) -> list[Ready]:
        every, fresh, t, gone = list(found), [], self.task, Pruned()
        self.display.phase("lowering", len(every))
        for c in every:
            self.display.step()
            r = ready(c, t.instance, t.backend, t.arch)
            if isinstance(r, str):
                gone.add(r)
                self.reason = self.reason or r
                continue
            self.codes[c.schedule] = r.code
            if r.code in self.tried:
                gone.add("same code")
            else:
                self.tried[r.code] = r
                fresh.append(r)
        self.pruned.update(gone)
        if every:
            self.display.say(f"{len(every)} candidates, {len(fresh)} of them to compile; not worth it: {gone}")
        return fresh

    def job(self, kind: str, r: Ready | None = None, **more: Any) -> Json:
        t = self.task
        found = {"job": kind, "instance": of_instance(t.instance), "backend": t.backend, "arch": t.arch, "device": t.device}
        return found | ({} if r is None else {"schedule": of_schedule(r.candidate.schedule)}) | more

    def before(self, part: float) -> bool:
        return time.monotonic() - self.start < part * self.limits.budget

    def compile(self, fresh: list[Ready]) -> None:
        """Every kernel once, side by side."""
        kernels: dict[str, tuple[Ready, int]] = {}
        for r in fresh:
            if r.variant.compiled.backend.functional:      # nothing to compile
                continue
            for i, key in enumerate(r.keys):
                if key not in self.failed:
                    kernels.setdefault(key, (r, i))
        jobs = [self.job("compile", r, kernel=i, device="none") for r, i in kernels.values()]
        keys, done = list(kernels), set()
        self.display.phase("compiling", len(jobs))
        for i, answer in self.compilers.map(jobs, self.limits.compiling, lambda: self.before(COMPILING)):
            done.add(keys[i])
            self.display.step()
            r, number = kernels[keys[i]]
            what = {"key": keys[i], "kernel": r.variant.compiled.kernels[number].name}
            why = answer.get("lost") or answer.get("failed")
            if why:
                self.failed[keys[i]] = why
            self.records.append("compile", self.subject.json(), **what, **({"failed": why} if why else answer["done"]))
        for key in keys:
            if key not in done:
                self.failed[key] = "not compiled: the budget for it ended"
        late = len(keys) - len(done)
        if late:
            self.display.say(f"{late} kernels not compiled: the budget for it ended (a larger --budget, or --resume)")
        self.tell("kernels do not compile", [self.failed[k] for k in keys if k in self.failed and k in done])

    def check(self, fresh: list[Ready]) -> None:
        """Every candidate against the oracle."""
        todo = [r for r in fresh if r.code not in self.errors and r.code not in self.failed]
        if todo and self.asked is not None:
            answer, self.asked = self.asked(), None
            if "done" not in answer:
                raise RuntimeError(f"the oracle of {self.task.instance}: {answer.get('lost') or answer['failed']}")
        jobs = [self.job("check", r, oracle=str(self.oracle)) for r in todo]
        self.display.phase("checking", len(jobs))
        wrong = []
        for i, answer in self.checkers.map(jobs, self.limits.checking, lambda: self.before(CHECKING)):
            r = todo[i]
            self.display.step()
            found = answer["done"] if "done" in answer else {"failed": answer.get("lost") or answer["failed"]}
            self.records.append("check", self.subject.json(), code=r.code, schedule=of_schedule(r.candidate.schedule),
                                sources=r.sources, **found)
            if "failed" in found:
                self.failed[r.code] = found["failed"]
                wrong.append(found["failed"])
            else:
                self.errors[r.code] = found["errors"]
                if not self.right(r.code):
                    wrong.append(f"wrong: errors {found['errors']}")
        self.tell("candidates are wrong", wrong)

    def right(self, code: str) -> bool:
        return worst(self.errors[code].values()) <= check.bound(self.task.instance)

    def tell(self, what: str, reasons: list[str]) -> None:
        if reasons:
            self.display.say(f"{len(reasons)} {what}; the first: {reasons[0]}")

    def finish(self, shape: Shape, r: Ready, ms: float, heuristic_ms: float | None, served_ms: float | None) -> None:
        """Record a shape's winner."""
        heuristic, served = (None if x is None else round(x, 6) for x in (heuristic_ms, served_ms))
        w = Winner(self.subject, shape, r.candidate.schedule, tuple(r.sources.items()), round(ms, 6), heuristic,
                   tuple(self.errors[r.code].items()), today(), served_ms=served)
        self.records.append("winner", self.subject.json(), **w.json())
        self.finished[shape] = w
        gain = "" if heuristic_ms is None else f", {heuristic_ms / ms:.3f}x of the heuristic's {heuristic_ms:.4g} ms"
        name = r.candidate.frame or r.candidate.schedule.name
        options = "; ".join(f"{k.name} {k.options}" for k in r.variant.compiled.kernels)
        self.display.say(f"{shape}: {ms:.4g} ms{gain}: {name}: {options}")
