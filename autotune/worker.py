"""A process that does one job at a time for a tuner, so that a crash or a hang costs that job only: it is killed, and another
takes its place. Jobs come as lines of JSON on standard input; answers go, as lines of JSON, to where standard output was.

    compile   one kernel of a candidate, into the cache
    oracle    what an instance must give, into a file
    check     a candidate's outputs against the oracle
    time      several candidates on one shape, in turns

Each answer is {"done": ...} or {"failed": why}; before a candidate is touched in `time`, {"at": its index}.
"""
from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Json = dict[str, Any]
PR_SET_PDEATHSIG = 1


def lowered(job: Json) -> Any:
    from gdn_ir.autotune.keys import to_instance, to_schedule
    from gdn_ir.compiler import variant
    return variant(to_instance(job["instance"]), to_schedule(job["schedule"]), job["backend"], job["arch"])


def compile_(job: Json, say: Callable[[Json], None]) -> Json:
    """job: a candidate, and the index of one of its kernels."""
    from gdn_ir import artifacts
    chosen, start = lowered(job), time.perf_counter()
    c, i = chosen.compiled, job["kernel"]
    launch = artifacts.obtain(c.makers[i], c.kernels[i], c.sources[i], job["arch"]).launch
    return {"seconds": round(time.perf_counter() - start, 3)} | ({"shared": launch["shared"]} if "shared" in launch else {})


def oracle(job: Json, say: Callable[[Json], None]) -> Json:
    """job: an instance, a path, and tokens of a segment."""
    from gdn_ir.autotune.check import save
    from gdn_ir.autotune.keys import to_instance
    save(Path(job["oracle"]), to_instance(job["instance"]), job["segment"])
    return {}


def check(job: Json, say: Callable[[Json], None]) -> Json:
    from gdn_ir.autotune.check import errors
    return {"errors": errors(lowered(job), Path(job["oracle"]), job["device"])}


def timed(job: Json, say: Callable[[Json], None]) -> Json:
    """job: "schedules" of one instance, a "shape", and "seconds" of replays for each. Every one is made ready first; then they
    take turns."""
    import torch

    from gdn_ir.autotune.check import call, cell, memory
    from gdn_ir.autotune.measure import copies_beyond_l2
    from gdn_ir.bench.timing import ROUNDS, Timer, timer
    device, s = job["device"], job["shape"]
    timers: list[Timer] = []
    instance, inputs = None, []
    for i, schedule in enumerate(job["schedules"]):
        say({"at": i})
        chosen = lowered(job | {"schedule": schedule})
        if instance is None:
            instance = chosen.instance
            problem = cell(instance, tuple(s["lengths"]), s["H"], s["HV"])
            inputs = [memory(instance, problem, device, 0, "real")]
            size = sum(t.numel() * t.element_size() for t in inputs[0].values())
            copies = copies_beyond_l2(size) if device == "cuda" else 1
            inputs += [{n: t.clone() for n, t in inputs[0].items()} for _ in range(copies - 1)]
        timers.append(timer([call(chosen, x, len(s["lengths"])) for x in inputs], device))
        if device == "cuda":
            torch.cuda.synchronize()
    for _ in range(ROUNDS):
        for i, t in enumerate(timers):
            say({"at": i})
            t.sample(job["seconds"] / ROUNDS)
    found = {"ms": [[round(ms, 6) for ms in t.ms] for t in timers]}
    del timers, t, inputs                                  # a timer keeps the memory that it uses
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return found


JOBS = {"compile": compile_, "oracle": oracle, "check": check, "time": timed}


def main() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # where the tuner is killed, nothing of it goes on
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)                                          # what compilers print does not come between

    def say(answer: Json) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    for module in sys.argv[1:]:
        importlib.import_module(module)                    # which may register further backends
    import gdn_ir.autotune.check                           # noqa: F401 (imported before the first job's time begins)
    say({"ready": os.getpid()})
    for line in sys.stdin:
        job = json.loads(line)
        try:
            say({"done": JOBS[job["job"]](job, say)})
        except Exception as e:
            leaving = job.get("device") == "cuda"          # its context may be broken, its memory not its own
            say({"failed": " ".join(f"{type(e).__name__}: {e}".split())[:400], "leaving": leaving})
            if leaving:
                return


if __name__ == "__main__":
    main()
