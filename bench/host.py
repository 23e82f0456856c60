"""Host time of one warm eager call: what small batches wait for. Prints microseconds and writes them as JSON.

On a GPU: the call as it is, forward, forward and backward, and one token at a time. Anywhere, with --stub: the same calls for
an H100's kernels with tensors on the CPU and a driver that does nothing, so that what is left is ours, torch's and the
allocator's; --profile N prints the N functions that take most of it.
"""
from __future__ import annotations

import argparse
import cProfile
import ctypes
import json
import pstats
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from gdn_ir import registry
from gdn_ir.backends.base import Kernel, Launch, Source
from gdn_ir.backends.triton import Triton, driver
from gdn_ir.bench import inputs
from gdn_ir.ops import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

SHAPE = "1 x 256, H/HV 16/32"
WARM, TIMED = 50, 250


def calls(device: str) -> dict[str, Callable[[], object]]:
    """What is timed, by name; inputs are made here."""
    x = inputs.make([256], 16, 32, device=device)
    args: dict[str, Any] = {n: x[n][None] for n in ("q", "k", "v", "g", "beta")}
    packed = args | {"cu_seqlens": x["cu_seqlens"]}
    one = {n: t[:, :1].contiguous() for n, t in args.items()} | {"initial_state": x["initial_state"]}
    leaves = {n: t.clone().requires_grad_() for n, t in args.items()}
    d_o = torch.ones_like(args["v"])

    def forward(op: Callable[..., Any], a: dict[str, Any]) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return op(**a, output_final_state=True)
        return call

    def step() -> object:
        return torch.autograd.grad(chunk_gated_delta_rule(**leaves)[0], list(leaves.values()), d_o)
    return {"dense": forward(chunk_gated_delta_rule, args), "packed": forward(chunk_gated_delta_rule, packed),
            "one token": forward(fused_recurrent_gated_delta_rule, one), "forward and backward": step}


class Driver:
    """Stands for the CUDA driver: its launch is a function of the C library that does nothing, and so costs what the driver's
    does but for the launch itself."""

    def __init__(self) -> None:
        self.cuLaunchKernelEx = ctypes.CDLL(None).pthread_condattr_destroy
        self.cuLaunchKernelEx.argtypes = driver.LAUNCH

    def __getattr__(self, name: str) -> Callable[..., int]:
        return lambda *_: 0


@contextmanager
def stubbed() -> Iterator[None]:
    """Triton's variants for sm_90, bound to their arguments and launched by a driver that does nothing."""
    def compile(self: Triton, kernel: Kernel, source: Source, arch: str) -> Launch:
        return driver.Image(kernel, b"", {"name": kernel.name, "shared": 0, "num_warps": kernel.options.num_warps})
    nothing, cpu = Driver(), -1
    with mock.patch.object(Triton, "compile", compile), mock.patch.object(registry, "architecture", lambda _: "sm_90"), \
            mock.patch.object(driver, "driver", lambda: nothing), mock.patch.object(driver, "current", lambda: cpu), \
            mock.patch.object(driver, "stream", lambda device: 7), \
            mock.patch.object(driver, "workspace", lambda size, device: torch.empty(size, dtype=torch.uint8)):
        registry.forget()                                  # what was chosen for the CPU, and what was compiled
        try:
            yield
        finally:
            registry.forget()                              # variants hold what they compiled, and every memo holds variants


def median(call: Callable[[], object], wait: Callable[[], object]) -> float:
    """Microseconds."""
    times = []
    for _ in range(WARM + TIMED):
        wait()
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times[WARM:])


def measure(device: str, stub: bool, profile: int = 0) -> dict[str, float]:
    """Microseconds of each call."""
    found = {}
    with stubbed() if stub else nullcontext(), registry.use("triton"):
        for name, call in calls(device).items():
            found[name] = median(call, torch.cuda.synchronize if device == "cuda" else lambda: None)
            if profile:
                with cProfile.Profile() as seen:
                    for _ in range(TIMED):
                        call()
                print(f"\n{name}")
                pstats.Stats(seen).sort_stats("tottime").print_stats(profile)
    return found


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--out", default="")
    p.add_argument("--commit", default="")
    p.add_argument("--stub", action="store_true", help="no GPU: kernels of an H100, launched by a driver that does nothing")
    p.add_argument("--profile", type=int, default=0)
    a = p.parse_args()
    device = "cpu" if a.stub else "cuda"
    found = measure(device, a.stub, a.profile)
    print({n: round(t, 1) for n, t in found.items()}, "microseconds")
    if a.out:
        gpu = "none: launches stubbed" if a.stub else torch.cuda.get_device_name()
        Path(a.out).write_text(json.dumps({"commit": a.commit, "gpu": gpu, "shape": SHAPE, "microseconds": found}) + "\n")


if __name__ == "__main__":
    main()
