"""First calls, each in a process of its own: how long a user waits with empty caches and with warm ones; and the same processes
side by side, to compile ahead what a run will need."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gdn_ir.bench.cases import Row
from gdn_ir.bench.contenders import CONTENDERS, Contender

CACHES = ("TRITON_CACHE_DIR", "TILELANG_CACHE_DIR", "GDN_IR_CACHE", "CUTE_DSL_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE",
          "CUDA_CACHE_PATH", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")


@dataclass(frozen=True)
class Task:
    """First calls of one contender on rows, in one process."""
    contender: str
    rows: tuple[Row, ...]
    dtype: str
    device: str
    train: bool

    def json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> Task:
        data = json.loads(text)
        rows = tuple(Row(**{**r, "lengths": tuple(r["lengths"])}) for r in data.pop("rows"))
        return cls(rows=rows, **data)


def first_calls(task: Task) -> dict[str, Any]:
    """In a fresh process: seconds from importing the contender to the end of its first call on the first row (inputs are made
    and torch is imported before), and of that call on each further row; and the
    last "reason" where a row was not served."""
    import torch

    from gdn_ir.bench.suite import Run, make
    from gdn_ir.bench.suite import reason as say
    run = Run("train" if task.train else "forward", list(task.rows), [], task.dtype, task.device, None)     # type: ignore[arg-type]
    c = CONTENDERS[task.contender]
    found: list[float] = []
    why: dict[str, str] = {}
    for row in task.rows:
        x = make(run, row)
        if task.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        try:
            c.prepare(row, x, task.train)()
            if task.device == "cuda":
                torch.cuda.synchronize()
            found.append(round(time.perf_counter() - start, 3))
        except Exception as e:                             # the other rows may be served
            why["reason"] = say(e)
    return {"seconds": found} | why


def spawn(task: Task, folder: str | None = None, limit: float = 900.0) -> dict[str, Any]:
    """`first_calls` in a new process. folder: where every cache that a contender may use is kept; None: where the user's are.
    Gives {"seconds": [...]} and "process": seconds of the whole process, or {"reason": ...}."""
    moved = {} if folder is None else {name: os.path.join(folder, name.lower()) for name in CACHES}
    for path in moved.values():
        os.makedirs(path, exist_ok=True)
    start = time.perf_counter()
    try:
        done = subprocess.run([sys.executable, "-m", "gdn_ir.bench.cold", task.json()], env={**os.environ, **moved},
                              capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"reason": f"did not end within {limit:.0f} s"}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found | {"process": round(time.perf_counter() - start, 3)}
    return {"reason": f"its process ended with {done.returncode}: {' '.join(done.stderr.split())[-200:]}"}


def cold_and_warm(task: Task) -> dict[str, Any]:
    """{"cold_s", "warm_s"}: the first call with empty caches, then once more in another process with what that one left; or
    {"reason"}."""
    with tempfile.TemporaryDirectory(prefix="gdn_ir_cold_") as folder:
        cold = spawn(task, folder)
        warm = cold if "reason" in cold else spawn(task, folder)
    if "reason" in warm:
        return {"reason": warm["reason"]}
    return {"cold_s": cold["seconds"][0], "warm_s": warm["seconds"][0], "cold_process_s": cold["process"],
            "warm_process_s": warm["process"]}


def chosen_by_triton() -> set[Path]:
    """Where Triton's autotuner keeps what it chose, as FLA lets it; nothing without Triton."""
    try:
        from triton import knobs
    except ImportError:
        return set()
    return set(Path(knobs.cache.dir).rglob("*.autotune.json"))


def warm_up(contenders: list[Contender], rows: list[Row], dtype: str, device: str, train: bool, workers: int,
            told: Callable[[str], None]) -> None:
    """Compiles what a run will need into the user's caches: a process for each contender and number of heads, `workers` at a
    time. A contender that chooses by timing, as FLA does, chose beside others here: that choice is forgotten, and made again,
    from what is compiled, in the run."""
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.H, row.HV), []).append(row)
    tasks = [Task(c.name, tuple(g), dtype, device, train) for c in contenders for g in groups.values()]
    before = chosen_by_triton()
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(spawn, task): task for task in tasks}
        for future in as_completed(futures):
            task, found = futures[future], future.result()
            what = found.get("reason") or f"{found['process']:.0f} s"
            told(f"compiled ahead: {task.contender}, {len(task.rows)} rows from {task.rows[0]}: {what}")
    for path in chosen_by_triton() - before:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    print(json.dumps(first_calls(Task.of(sys.argv[1]))), flush=True)
