"""Winners run again: their errors against the oracle, and their times beside what a table says."""
from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console

from gdn_ir.autotune import check
from gdn_ir.autotune.keys import device_here, of_instance, of_schedule
from gdn_ir.autotune.pool import Worker
from gdn_ir.autotune.records import Winner
from gdn_ir.autotune.tune import Task
from gdn_ir.bench.errors import worst
from gdn_ir.bench.timing import quantile
from gdn_ir.compiler import Instance, variant


def verify_all(found: list[Winner], within: float, console: Console, limit: float = 120.0) -> bool:
    """Whether every winner of this device is right, compiles to what was measured, and is at most `within` slower than it was.
    Says so for each."""
    mine = [w for w in found if w.ms is not None and device_here(w.subject.device.arch) == w.subject.device]
    console.print(f"{len(mine)} of {len(found)} winners are of this machine's devices", highlight=False)
    worker, fine = Worker(), True
    try:
        with tempfile.TemporaryDirectory(prefix="gdn_ir_verify_") as folder:
            oracles: dict[Instance, Path] = {}
            for w in mine:
                i = w.subject.instance
                if i not in oracles:
                    oracles[i] = Path(folder) / f"{len(oracles)}.pt"
                    check.save(oracles[i], i, max(longest(x) for x in mine if x.subject.instance == i))
                why = one(w, worker, oracles[i], within, limit)
                fine &= not why.startswith(("wrong", "slow"))
                console.print(f"{w.shape}, {w.subject.backend}, {w.subject.instance}: {why}", markup=False, highlight=False,
                              soft_wrap=True)
    finally:
        worker.stop()
    return fine


def longest(w: Winner) -> int:
    """Tokens of the segments that a winner cuts sequences into; 0 where it does not."""
    return max((int(s[2]) * w.schedule.chunk for s in w.schedule.steps if s[0] == "segment"), default=0)


def one(w: Winner, worker: Worker, oracle: Path, within: float, limit: float) -> str:
    """What is seen of a winner; it begins with "wrong" or "slow" where that is not what the table says."""
    s = w.subject
    try:
        made = variant(s.instance, w.schedule, s.backend, s.device.arch)
    except ValueError as e:
        return f"wrong: not legal any more: {e}"
    if {x.kernel: x.hash for x in made.sources} != dict(w.sources):
        return "wrong: it compiles to other code than was measured"
    job = {"instance": of_instance(s.instance), "backend": s.backend, "arch": s.device.arch,
           "device": Task(s.instance, s.backend, s.device.arch, ()).device}
    answer = worker.run(job | {"job": "check", "schedule": of_schedule(w.schedule), "oracle": str(oracle)}, limit)
    if "done" not in answer:
        return f"wrong: {answer.get('lost') or answer['failed']}"
    errors = answer["done"]["errors"]
    told = ", ".join(f"{n} {e:.1e}" for n, e in errors.items())
    if not worst(errors.values()) <= check.bound(s.instance):
        return f"wrong: errors {told}"
    shape = {"lengths": list(w.shape.lengths), "H": w.shape.H, "HV": w.shape.HV}
    answer = worker.run(job | {"job": "time", "schedules": [of_schedule(w.schedule)], "shape": shape, "seconds": 0.2}, limit)
    if "done" not in answer:
        return f"wrong: {answer.get('lost') or answer['failed']}"
    assert w.ms is not None
    ms = quantile(answer["done"]["ms"][0], 0.5)
    slow = "slow, though right: " if ms > w.ms * (1 + within) else ""
    return f"{slow}{ms:.4g} ms, {ms / w.ms:.3f} of the table's; errors {told}"
