"""Runs a suite: every contender on every row, side by side, what was measured written after each row."""
from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gdn_ir import registry
from gdn_ir.autotune.measure import copies_beyond_l2
from gdn_ir.backends.base import TORCH
from gdn_ir.bench import cases, energy, inputs, results
from gdn_ir.bench.accuracy import reference
from gdn_ir.bench.cases import Row
from gdn_ir.bench.contenders import SERVED, Contender, NotTimed, Tensors, instance, variant_of
from gdn_ir.bench.floor import Rates, bytes_of, floor
from gdn_ir.bench.results import Page, Record
from gdn_ir.bench.timing import Timer, interleave, peak_bytes, timer
from gdn_ir.compiler import Unsupported

ACCURACY = Row((768,), 2, 4)                               # every kind of input is compared on this one


@dataclass
class Run:
    """What a user asked for. skipped: contenders that are listed with this reason, not measured; seconds: of replays for each
    contender and row; joules: of replays again, for energy (0: none); inputs: their kind (`bench/inputs.py`)."""
    suite: str
    rows: list[Row]
    contenders: list[Contender]
    dtype: str
    device: str
    path: Path
    seconds: float = 0.15
    joules: float = 0.0
    inputs: str = "real"
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def train(self) -> bool:
        return cases.trains(self.suite)

    @property
    def gpu(self) -> str:
        return gpu_name(self.device)


def gpu_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


class Lost(RuntimeError):
    """The GPU's context is gone: nothing more can run in this process."""


def reason(e: BaseException) -> str:
    return str(e) if isinstance(e, NotTimed) else " ".join(f"{type(e).__name__}: {e}".split())[:300]


def settle(device: str, why: str = "a kernel broke the GPU's context") -> None:
    """Waits for the GPU. Raises Lost where an earlier kernel has broken its context: nothing more can run in this process."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            raise Lost(why) from None


def make(run: Run, row: Row, kind: str = "", seed: int = 0) -> Tensors:
    """Inputs of a row, of the run's kind where none is named."""
    x = inputs.make(list(row.lengths), row.H, row.HV, row.K, row.V, TORCH[run.dtype], run.device, kind or run.inputs, seed)
    if run.train:
        generator = torch.Generator(device=run.device).manual_seed(1000 + seed)
        x["do"] = torch.randn(x["v"].shape, generator=generator, device=run.device).to(x["v"].dtype)
    return x


def about(run: Run, c: Contender, row: Row, x: Tensors) -> Record:
    """Of ours: the schedule and the hashes of the sources that ran; in training those of the backward too."""
    if c.kind != "gdn-ir":
        return {}

    def said(back: bool) -> Record:
        chosen = variant_of(c.name.removeprefix("gdn-ir "), row, x, run.train, back)
        return {"backend": chosen.backend, "schedule": chosen.schedule.name,
                "sources": {s.kernel: s.hash for s in chosen.sources}}
    return said(False) | ({"backward": said(True)} if run.train else {})


def attempt(run: Run, c: Contender, work: Callable[[Contender], Record]) -> Record:
    """What a contender's part of a row gave, or the reason why it gave nothing: nobody is dropped."""
    if c.name in run.skipped:
        return {"kind": c.kind, "reason": run.skipped[c.name]}
    try:
        return {"kind": c.kind} | work(c)
    except Lost:
        raise
    except Exception as e:                                 # of a peer of another version, or none; out of memory; our own
        settle(run.device, f"{c.name} broke the GPU's context: {reason(e)}")
        return {"kind": c.kind, "reason": reason(e)}


def accuracy(run: Run, kind: str, told: Callable[[str], None] = lambda _: None) -> Record:
    """Every contender's errors against float64 on one kind of input, at T = 768, H/HV 2/4."""
    x = make(run, ACCURACY, kind)
    expected = reference(ACCURACY, x, run.train)

    def errors(c: Contender) -> Record:
        told(c.name)
        found = c.prepare(ACCURACY, x, run.train)()
        settle(run.device, f"{c.name} broke the GPU's context")
        return {"errors": expected.errors(found)} | about(run, c, ACCURACY, x)
    entries = {c.name: attempt(run, c, errors) for c in run.contenders if c.kind != "attention"}
    return {"served": served(run, ACCURACY), "contenders": entries}


def measure(run: Run, row: Row, rates: Rates, told: Callable[[str], None] = lambda _: None) -> Record:
    """One row: errors, memory and launches of every contender, then all of them timed in turns."""
    width = TORCH[run.dtype].itemsize
    copies = copies_beyond_l2(bytes_of(row, width)) if run.device == "cuda" else 1
    told("inputs and references")
    xs = [make(run, row, seed=i) for i in range(copies)]
    for x in xs:
        x["cu_seqlens"] = xs[0]["cu_seqlens"]              # peers cache what they derive from it by identity, a few at most
    expected = reference(row, xs[0], run.train)
    timers: dict[str, Timer] = {}

    def ready(c: Contender) -> Record:
        told(c.name)
        calls = [c.prepare(row, x, run.train) for x in xs]
        found = calls[0]()
        settle(run.device, f"{c.name} broke the GPU's context")
        errors = {} if c.kind == "attention" else expected.errors(found)
        del found
        entry = {"errors": errors, "peak_bytes": peak_bytes(calls[0], run.device)} | about(run, c, row, xs[0])
        timers[c.name] = timer(calls, run.device)
        return entry
    entries = {c.name: attempt(run, c, ready) for c in run.contenders}
    told("timing")
    try:
        interleave(timers, run.seconds)
    except RuntimeError as broken:
        settle(run.device, str(broken))
        raise
    for name, t in timers.items():
        entries[name] |= t.summary() | (energy.of(t, row.tokens, run.joules) if run.joules else {})
    lower = floor(row, width, rates, run.train)
    for e in entries.values():
        if "ms" in e and e["kind"] != "attention":
            e["of_floor"] = lower["ms"] / e["ms"]
    record: Record = {"train": run.train, "copies": copies, "floor": lower, "served": served(run, row),
                      "reference": expected.about, "contenders": entries}
    return record | {"best_peer": results.best(record, "peer"), "ratio": results.ratio(record)}


def served(run: Run, row: Row) -> str | None:
    """Ours as the registry serves it without being told: a forward by one backend, both passes perhaps by two."""
    if run.train:
        return f"gdn-ir {SERVED}"
    try:
        chosen = registry.choose(instance(row, TORCH[run.dtype], run.train), registry.architecture(torch.device(run.device)),
                                 len(row.lengths), row.HV, row.tokens)
    except (Unsupported, ValueError):
        return None
    return f"gdn-ir {chosen.backend}"


def line(name: str, record: Record) -> str:
    """A record in some lines, for who watches: milliseconds (and where they are not of a graph, how), the largest error, and
    who served which pass where these are two."""
    lines = [name]
    if "floor" in record:
        lines[0] += f": floor {record['floor']['ms']:.3f} ms"
        lines[0] += f"; best peer / ours {record['ratio']:.2f}" if record["ratio"] else ""
    for contender, c in record["contenders"].items():
        found = [f"{c['ms']:.3f} ms" + (f" ({c['how']})" if c["how"] != "cuda graph" else "")] if "ms" in c else []
        if c.get("errors"):
            most = max(c["errors"], key=lambda n: float(c["errors"][n]))
            found.append(f"error {c['errors'][most]:.2e} ({most})")
        back = c.get("backward", {}).get("backend")
        found += [f"forward by {c['backend']}, backward by {back}"] if back and back != c["backend"] else []
        lines.append(f"    {contender}: {', '.join(found) or c.get('reason', 'nothing')[:100]}")
    return "\n".join(lines)


@contextmanager
def progress(console: Console) -> Iterator[Progress]:
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
                  TimeRemainingColumn(), console=console, transient=True) as bar:
        yield bar


@dataclass(frozen=True)
class Part:
    """One thing to measure: a record of a page. work: takes a function that is told what happens meanwhile."""
    name: str
    part: str
    key: Record
    work: Callable[[Callable[[str], None]], Record]


def parts_of(run: Run, rates: Rates, kinds: tuple[str, ...]) -> list[Part]:
    found = [Part(f"accuracy, {kind}", "accuracy", {"inputs": kind, "dtype": run.dtype}, partial(accuracy, run, kind))
             for kind in kinds]
    return found + [Part(str(row), "rows", results.key_of(row, run.dtype), partial(measure, run, row, rates))
                    for row in run.rows]


def perform(run: Run, page: Page, index: int, rates: Rates, console: Console, kinds: tuple[str, ...] = inputs.KINDS) -> bool:
    """Measures what the page does not have of this run's commit yet. kinds: of inputs whose errors are compared first. False
    where Ctrl-C ended it early; what was measured by then is in the file."""
    commit, parts = page.runs[index]["commit"], parts_of(run, rates, kinds)
    todo = [p for p in parts if not page.has(p.part, p.key, commit)]
    if len(todo) < len(parts):
        console.print(f"{len(parts) - len(todo)} of {len(parts)} were measured at {commit} already")
    try:
        with progress(console) as bar:
            task = bar.add_task(run.suite, total=len(todo))
            for p in todo:
                def told(what: str, name: str = p.name) -> None:
                    bar.update(task, description=f"{name}: {what}")
                told("starts")
                record = p.work(told)
                page.put(p.part, p.key, {"run": index} | record)
                page.write(run.path)
                console.print(line(p.name, record), highlight=False, markup=False)
                bar.advance(task)
                gc.collect()                               # graphs hold memory
                if run.device == "cuda":
                    torch.cuda.empty_cache()
    except (KeyboardInterrupt, Lost) as e:
        why = f"stopped: {e}, leave it out" if isinstance(e, Lost) else "stopped"
        console.print(f"{why}; {run.path} has what was measured, and --resume goes on from there", markup=False)
        return False
    return True
