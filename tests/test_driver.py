"""What the CUDA driver is given: arguments, temporaries, streams; no GPU."""
from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gdn_ir.backends.base import STORED, Call, Kernel, blocks
from gdn_ir.backends.temporaries import overwritten, temporaries
from gdn_ir.backends.triton import driver, signature
from gdn_ir.compiler import Instance, variant
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.schedules.defaults import default


class Driver:
    """Stands for the CUDA driver: takes down what is launched, as the driver reads it at that time."""

    def __init__(self, *kernels: Kernel, seen: Callable[[dict[str, Any]], object] = lambda values: None) -> None:
        self.kernels, self.seen = itertools.cycle(kernels), seen
        self.launched: list[tuple[driver.Config, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> object:
        return lambda *a: 0

    def cuLaunchKernelEx(self, config: int, function: object, pointers: int, extra: None) -> int:
        kernel = next(self.kernels)
        names, types = driver.arguments(kernel), list(signature(kernel).values())
        kinds: list[Any] = [{"fp32": ctypes.c_float, "i32": ctypes.c_int32}.get(t, ctypes.c_uint64) for t in [*types, "", ""]]
        at = ctypes.cast(pointers, ctypes.POINTER(ctypes.c_void_p))
        values = [ctypes.cast(at[i], ctypes.POINTER(kind))[0] for i, kind in enumerate(kinds)]
        assert values[len(names):] == [0, 0]               # Triton's scratch
        given = dict(zip(names, values))
        self.seen(given)
        self.launched.append((driver.Config.from_buffer_copy(driver.Config.from_address(config)), given))
        return 0


def test_what_the_driver_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments in the kernel's order; a tensor that is not aligned goes in as an aligned copy, and comes back."""
    i = Instance(Switches(final_state=True), 16, 16, "f32", "f32", True)
    kernel = variant(i, default("sm_90", i, 1, 2, 64)[0], "triton", "sm_90").compiled.kernels[-1]
    fake, streams = Driver(kernel), iter([7, 7, 8])
    monkeypatch.setattr(driver, "driver", lambda: fake)
    monkeypatch.setattr(driver, "current", lambda: -1)
    monkeypatch.setattr(driver, "workspace", lambda size, device: torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(driver, "stream", lambda device: next(streams))
    launch = driver.Image(kernel, b"", {"name": "output", "shared": 5, "num_warps": 4})
    call = Call(1, 64, 64, {"H": 1, "HV": 2}, torch.tensor([0, 64], dtype=torch.int32))
    memory = {t.name: torch.zeros(call.shape(kernel, t)) for t in kernel.tensors()}
    launch(memory, {"scale": 0.5}, call)
    config, given = fake.launched[0]
    assert (config.gridX, config.gridY, config.blockX, config.shared, config.stream) == (blocks(kernel, call), 1, 128, 5, 7)
    assert all(given[n] == x.data_ptr() for n, x in memory.items())
    assert {n: given[n] for n in ("scale", "T", "N", "HV")} == {"scale": 0.5, "T": 64, "N": 1, "HV": 2}
    memory["o"] = torch.ones(memory["o"].numel() + 1)[1:].view(memory["o"].shape)
    launch(memory, {"scale": 0.25}, call)
    given = fake.launched[1][1]
    assert given["o"] % 16 == 0 and given["o"] != memory["o"].data_ptr()
    assert given["scale"] == 0.25 and memory["o"].eq(1).all()
    launch(memory, {"scale": 0.25}, call)
    assert fake.launched[2][0].stream == 8


class Broken:
    """A CUDA driver that can do nothing but say so."""
    def cuGetErrorString(self, code: int, text: Any) -> int:
        if code == 101:
            text._obj.value = b"invalid device ordinal"
        return 0

    def cuDeviceGet(self, handle: Any, device: int) -> int:
        return 100 + device


def test_what_the_driver_says_is_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "driver", Broken)
    with pytest.raises(RuntimeError, match=r"^cuDeviceGet of cuda:1 failed .* error 101 \(invalid device ordinal\)$"):
        driver.enter(1)
    with pytest.raises(RuntimeError, match=r"^cuLaunchKernelEx of scan failed with CUDA driver error 999$"):
        driver.must(999, "cuLaunchKernelEx", "scan")


# ---- a pipeline -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> tuple[tuple[Kernel, ...], driver.Batch, Call]:
    """The forward of an H100 as one batch, for two sequences of 100 tokens, launched as if the CPU were a GPU."""
    monkeypatch.setattr(driver, "current", lambda: -1)
    monkeypatch.setattr(driver, "workspace", lambda size, device: torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(driver, "stream", lambda device: 7)
    i = Instance(Switches(), 64, 64, "bf16", "bf16", False)
    kernels = variant(i, default("sm_90", i, 2, 8, 200)[0], "triton", "sm_90").compiled.kernels
    images = [driver.Image(k, b"", {"name": k.name, "shared": 0, "num_warps": 4}) for k in kernels]
    return kernels, driver.Batch(images, temporaries(kernels)), Call(2, 200, 100, {"H": 2, "HV": 4})


def memory_of(kernels: tuple[Kernel, ...], call: Call) -> dict[str, torch.Tensor]:
    return {t.name: torch.zeros(call.shape(k, t), dtype=STORED[t.dtype]) for k in kernels for t in k.tensors() if not t.temp}


def test_temporaries_are_parts_of_one_allocation(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Aligned, apart from each other, the same for who writes and who reads; NaN where torch makes what is empty so."""
    kernels, batch, call = pipeline
    temps = {n: life for n, life in temporaries(kernels).items() if n not in overwritten(kernels)}        # which lie in outputs
    size = {n: STORED[t.dtype].itemsize * torch.Size(call.shape(k, t)).numel() for n, (k, t, *_) in temps.items()}

    def seen(values: dict[str, Any]) -> None:
        for n in temps.keys() & values.keys():
            data = (ctypes.c_uint8 * size[n]).from_address(values[n])
            x = torch.frombuffer(data, dtype=STORED[temps[n][1].dtype])
            assert bool((x == -1).all() if x.dtype == torch.int32 else x.isnan().all()), n
    fake = Driver(*kernels, seen=seen)
    monkeypatch.setattr(driver, "driver", lambda: fake)
    torch.use_deterministic_algorithms(True)
    try:
        batch(memory_of(kernels, call), {"scale": 0.5}, call)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(fake.launched) == len(kernels) > 1
    places: dict[str, set[int]] = {n: {values[n] for _, values in fake.launched if n in values} for n in temps}
    spans = sorted((at, at + size[n]) for n, (at,) in places.items())
    assert len(spans) > 1 and all(end <= start for (_, end), (start, _) in zip(spans, spans[1:]))
    assert all((at - spans[0][0]) % 256 == 0 for at, _ in spans)


def test_threads_share_no_arguments(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits in the midst of its launches until the other is as far."""
    kernels, batch, call = pipeline
    both = threading.Barrier(2, timeout=20)
    found: dict[int, Any] = {}

    def serve(scale: float) -> None:
        memory = memory_of(kernels, call)
        batch(memory, {"scale": scale}, call)
        found[threading.get_ident()] = memory["q"].data_ptr(), scale
    seen: dict[int, list[tuple[Any, ...]]] = {}

    class Fake(Driver):
        def cuLaunchKernelEx(self, config: int, function: object, pointers: int, extra: None) -> int:
            both.wait()
            mine = seen.setdefault(threading.get_ident(), [])
            one = Driver(kernels[len(mine)])
            one.cuLaunchKernelEx(config, function, pointers, extra)
            mine.append((one.launched[0][1].get("q"), one.launched[0][1].get("scale")))
            return 0
    fake = Fake()
    monkeypatch.setattr(driver, "driver", lambda: fake)
    threads = [threading.Thread(target=serve, args=(scale,)) for scale in (0.25, 0.5)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 2
    for ident, (q, scale) in found.items():
        assert all(a in (None, q) and b in (None, scale) for a, b in seen[ident])
    assert len(next(iter(call.memo[batch].frames.values()))) == 2             # both are there for later calls
