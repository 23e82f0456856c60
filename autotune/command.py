"""What `gdn-ir tune`, `show`, `export`, `verify` and `compile` do: options checked before anything runs, then the work."""
from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from gdn_ir.autotune import cost, tables
from gdn_ir.autotune.display import Display
from gdn_ir.autotune.keys import Json, device_here, of_instance, of_schedule
from gdn_ir.autotune.pool import Pool
from gdn_ir.autotune.records import Records, Winner, default_path, winners
from gdn_ir.autotune.tune import Limits, Task, Tuner
from gdn_ir.backends import BACKENDS
from gdn_ir.bench.results import slug
from gdn_ir.calls import instances, listed, shapes_of
from gdn_ir.compiler import Instance
from gdn_ir.schedules.defaults import roles_can

def arch_of(backend: str) -> str:
    """What a backend is tuned for here."""
    from gdn_ir.registry import architecture
    if backend == "torch":
        return "torch"
    return architecture(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def backends_here(instance: Instance) -> tuple[str, ...]:
    """Those that may be the fastest here: on Hopper scans may be roles, by TileLang."""
    if not torch.cuda.is_available():
        return ("tilelang",)
    return ("tilelang", "triton") if roles_can(arch_of("triton"), instance) else ("triton",)


def tune(op: str, shapes: str, backends: str, budget: float, resume: bool, dtype: str, K: int, V: int, flags: str, dense: bool,
         records: Path | None, workers: int, console: Console | None = None) -> bool:
    """Tune. False where Ctrl-C ended it: all that was measured is kept."""
    console = console or Console()
    names = listed(backends)
    for name in names:
        if name not in BACKENDS:
            raise ValueError(f"--backends: got {name!r}; accepts {', '.join(BACKENDS)}")
    if not budget > 0:
        raise ValueError(f"--budget: got {budget:g}; accepts a positive number of minutes")
    if workers < 1:
        raise ValueError(f"--workers: got {workers}; accepts a number from 1 on")
    dtype = dtype or ("bf16" if torch.cuda.is_available() else "f32")
    kept = Records(records or default_path())
    found = instances(op, shapes_of(shapes), dtype, K, V, flags, dense)
    work = [(i, some, name) for i, some in found.items() for name in names or backends_here(i)]
    count = min(workers, max(1, (os.cpu_count() or 1) - 2) if torch.cuda.is_available() else (os.cpu_count() or 1))
    done: list[Winner] = []
    try:
        for i, some, name in work:
            limits = Limits(60 * budget / len(work), workers=count, checkers=min(6, count))
            console.print(f"{op}, {i}, by {name}: {len(some)} shapes, {limits.budget / 60:.1f} minutes, into {kept.path}",
                          markup=False, highlight=False, soft_wrap=True)
            with Display(console, limits.budget) as display:
                tuner = Tuner(Task(i, name, arch_of(name), tuple(some)), kept, limits, display, resume)
                done += tuner.run()
    except KeyboardInterrupt:
        console.print("stopped; everything measured is kept, and --resume goes on from here")
        return False
    console.print(summary(done), markup=False, highlight=False)
    return True


def summary(done: list[Winner]) -> str:
    gains = [w.heuristic_ms / w.ms for w in done if w.ms and w.heuristic_ms]
    if not gains:
        return f"{len(done)} shapes tuned"
    before = [w.served_ms / w.ms for w in done if w.ms and w.served_ms]
    served = "" if not before else (f"; what was tuned for the nearest shape, and served {len(before)} of them before, takes "
                                    f"{statistics.geometric_mean(before):.3f}x of their time, {max(before):.3f}x at worst")
    return (f"{len(done)} shapes tuned: {statistics.geometric_mean(gains):.3f}x of the heuristic's speed (geometric mean), "
            f"{max(gains):.3f}x at best{served}")


def known(source: str) -> list[Winner]:
    """Winners of a file (records or a table), of what ships ("shipped"), or of the user's records and what ships ("")."""
    if source == "shipped":
        return list(tables.shipped())
    if not source:
        return [*tables.shipped(), *winners(Records(default_path()).read())]
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"table: got {source}; accepts shipped, or a file of records (.jsonl) or a table (.json)")
    return winners(Records(path).read()) if path.suffix == ".jsonl" else tables.read(path)


def show(source: str, console: Console | None = None) -> None:
    """Print what is known, a line for each winner, and what was measured for it."""
    console = console or Console()
    found = sorted(known(source), key=lambda w: (w.subject.device != device_here(w.subject.device.arch), w.how != "measured"))
    groups: dict[str, Table] = {}
    for w in found:
        s = w.subject
        title = f"{s.device.name}, {s.backend}, {s.instance}; {w.how}, with {', '.join(f'{n} {v}' for n, v in s.versions)}"
        table = groups.setdefault(title, Table("shape", "ms", "heuristic", "gain", "schedule", box=None, pad_edge=False))
        gain = f"{w.heuristic_ms / w.ms:.3f}x" if w.ms and w.heuristic_ms else ""
        options = "; ".join(f"{k} {w.schedule.options(k)}" for k, _ in w.sources)
        table.add_row(str(w.shape), number(w.ms), number(w.heuristic_ms), gain,
                      f"{w.schedule.name}, chunks of {w.schedule.chunk}: {options}")
    for title, table in groups.items():
        console.print(title, markup=False, highlight=False, soft_wrap=True)
        console.print(table)
    if not found:
        console.print("nothing was tuned yet: gdn-ir tune")
    path = Path(source) if source.endswith(".jsonl") else default_path()
    kinds = Counter(r["kind"] + (" failed" if "failed" in r else "") for r in Records(path).read()) if path.exists() else {}
    if kinds:
        console.print(f"{path}: " + ", ".join(f"{n} {k}" for k, n in sorted(kinds.items())), markup=False, soft_wrap=True)


def number(ms: float | None) -> str:
    return "" if ms is None else f"{ms:.4g}"


MODELS = {"a100": cost.A100, "h100": cost.H100}


def export(source: str, out: Path, model: str = "") -> list[Path]:
    """Write a table for each device of the records; or, of a GPU that nobody has timed, one by heuristic and cost model."""
    if model and model not in MODELS:
        raise ValueError(f"--model: got {model!r}; accepts {', '.join(MODELS)}")
    found = known(source) if not model else [
        w for i, some in instances("forward", shapes_of(""), "bf16", 128, 128, "", False).items()
        for w in cost.modelled(i, some, MODELS[model])]
    written = []
    for device, table in tables.to_json(found).items():
        path = out / f"{slug(device.name)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(tables.text_of(table))
        written.append(path)
    return written


def verify(source: str, within: float, console: Console | None = None) -> bool:
    """Run a table's winners of this device again: whether each is right, and at most `within` (a part) slower than it was."""
    from gdn_ir.autotune.verify import verify_all
    return verify_all(known(source), within, console or Console())


TARGETS = ("sm_80", "sm_90", "cpu")


def compile_ahead(targets: str, shapes: str, op: str, dtype: str, K: int, V: int, flags: str, dense: bool, backends: str,
                  beta: str, grads: str, out: Path, workers: int, console: Console | None = None) -> None:
    """Make a pack, for machines that need not be this one."""
    from gdn_ir.packs import plan_entries, write_pack
    console = console or Console()
    if out.exists():
        raise ValueError(f"-o: got {out}, which exists; accepts a path where nothing is")
    wanted = [t.strip().replace("sm_90a", "sm_90") for t in targets.split(",")]
    for t in wanted:
        if t not in TARGETS:
            raise ValueError(f"--target: got {t!r}; accepts {', '.join(TARGETS)} (sm_90a is sm_90), separated by commas")
    named = listed(backends)
    for b in named:
        if b not in BACKENDS or BACKENDS[b].functional:
            raise ValueError(f"--backends: got {b!r}; accepts {', '.join(n for n, x in BACKENDS.items() if not x.functional)}")
    start, planned = time.monotonic(), []
    for t in dict.fromkeys(wanted):
        io = dtype or ("f32" if t == "cpu" else "bf16")
        work = instances(op, shapes_of(shapes), io, K, V, flags, dense, beta, grads)
        planned += plan_entries([t], work, named)
    jobs: dict[str, Json] = {}
    for entry, _ in planned:
        for i, key in enumerate(entry.keys):
            jobs.setdefault(key, {"job": "compile", "instance": of_instance(entry.instance), "backend": entry.backend,
                                  "arch": entry.target, "schedule": of_schedule(entry.schedule), "kernel": i})
    with Display(console) as display, Pool(max(1, min(workers, len(jobs), os.cpu_count() or 1))) as pool:
        display.phase("compiling", len(jobs))
        for i, answer in pool.map(list(jobs.values()), 600.0):
            display.step()
            if "done" not in answer:
                raise ValueError(f"{list(jobs.values())[i]['instance']}: {answer.get('lost') or answer['failed']}")
    count = write_pack(out, planned)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    seconds = time.monotonic() - start
    console.print(f"{out}: {count} kernels for {len(planned)} shapes, {size / 2**20:.1f} MiB, in {seconds:.0f} s", markup=False,
                  highlight=False, soft_wrap=True)
