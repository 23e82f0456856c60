"""Running one program through the interpreter and through a backend."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from gdn_ir.bench.errors import worst
from gdn_ir.backends import BACKENDS
from gdn_ir.backends.base import Call, Reason
from gdn_ir.compiler import Compiled, lower
from gdn_ir.schedules.schedule import KernelOptions, Schedule
from tests.programs import Case

PLAIN = Schedule("plain", chunk=16, kernels=(("*", KernelOptions(num_warps=1, num_stages=1)),), dot="f32")


def by_backend(case: Case, backend: str, io: str, arch: str, schedule: Schedule = PLAIN) -> dict[str, torch.Tensor] | Reason:
    """What a backend makes of a case, outputs poisoned first; or the reason why it declines."""
    b = BACKENDS[backend]
    sizes = case.sizes()
    if io == "f64":
        schedule = Schedule(schedule.name, schedule.chunk, schedule.steps, schedule.kernels, "f64")
    kernels = lower(case.program, schedule, b, arch, case.axes, {"io": io, "beta": io}, True)
    for k in kernels:
        reason = b.supports(k, arch)
        if reason is not None:
            return reason
    dtype = torch.float64 if io == "f64" else torch.float32
    memory = {n: t.to(dtype if case.program.tensors()[n].dtype == "io" else torch.float32) for n, t in case.inputs().items()}
    for n, shape in case.outputs().items():
        kind = torch.float32 if case.program.tensors()[n].dtype == "f32" else dtype
        memory[n] = torch.full(shape, float("nan"), dtype=kind)
    call = Call(sizes.sequences, case.cu[-1], case.cu[-1], {"H": case.heads[0], "HV": case.heads[1]},
                torch.tensor(case.cu, dtype=torch.int32))
    Compiled(kernels, b, arch)(memory, {}, call)
    return {n: memory[n].double() for n in case.outputs()}


def distance(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """The largest difference, relative to the largest value of each output; infinite where one holds a NaN."""
    return worst(float((got[n] - w).abs().max() / w.abs().max().clamp(min=1e-3)) for n, w in want.items() if w.numel())


def interpreted(cases: list[list[object]]) -> dict[str, dict[str, object]]:
    """Run cases (see tests/interpreted.py) by Triton's interpreter; keys are the cases as JSON."""
    return executed(cases, "triton", "sm_90", 1)


def executed(cases: list[list[object]], backend: str, arch: str, processes: int = 2) -> dict[str, dict[str, object]]:
    """Run cases on the CPU, in processes of their own; native code's blocks are shared out between two threads."""
    found: dict[str, dict[str, object]] = {}
    threads = {"OMP_NUM_THREADS": "2" if backend == "tilelang" else "1", "OMP_WAIT_POLICY": "passive"}
    environment = {**os.environ, **threads, "TRITON_INTERPRET": "1"}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.json" for i in range(processes)]
        running = []
        for i, file in enumerate(files):
            file.write_text(json.dumps(cases[i::processes]))
            running.append(subprocess.Popen([sys.executable, "-m", "tests.interpreted", backend, arch, str(file)],
                                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                            env=environment, cwd=Path(__file__).parent.parent))
        for process, file in zip(running, files, strict=True):
            _, said = process.communicate()
            assert process.returncode == 0, said[-3000:]
            found |= json.loads(file.read_text())
    assert set(found) == {json.dumps(c) for c in cases}
    return found
