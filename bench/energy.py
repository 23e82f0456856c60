"""Energy of replays, from the GPU's own counter (NVML, which comes with the driver), where it can be read."""
from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import torch

from gdn_ir.bench.timing import Timer


def counter() -> Callable[[], int]:
    """Reads the millijoules that this GPU has used since its driver was loaded. Raises OSError or RuntimeError with the reason
    where NVML is missing or declines."""
    nvml, handle, value = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p(), ctypes.c_ulonglong()
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    name = (uuid if uuid.startswith("GPU-") else f"GPU-{uuid}").encode()

    def read() -> int:
        if error := nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(value)):
            raise RuntimeError(f"NVML does not give the energy of {name.decode()}: error {error}")
        return value.value
    if error := nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
        raise RuntimeError(f"NVML does not find {name.decode()}: error {error}")
    read()
    return read


def of(timer: Timer, tokens: int, seconds: float) -> dict[str, Any]:
    """{"microjoules_per_token", "watts"} of a contender replayed for `seconds` (the counter ticks some ten times a second, so
    give it one or more), or {"energy": why not}. The whole GPU's, idle power included."""
    if timer.how == "wall clock":
        return {"energy": "not read on a CPU"}
    try:
        read = counter()
    except (OSError, RuntimeError, AttributeError) as e:
        return {"energy": f"not read: {e}"}
    torch.cuda.synchronize()
    calls, start, before = 0, time.perf_counter(), read()
    while time.perf_counter() - start < seconds:
        for _ in range(4):
            timer.run()
        torch.cuda.synchronize()
        calls += 4 * timer.calls
    spent, taken = read() - before, time.perf_counter() - start
    return {"microjoules_per_token": 1e3 * spent / (calls * tokens), "watts": 1e-3 * spent / taken}
