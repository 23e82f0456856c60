"""Contenders timed side by side: every one captured first, then replayed in turns, so that a drift of the clock is shared."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gdn_ir.autotune.measure import capture, elapsed_ms, launches

ROUNDS = 5


@dataclass
class Timer:
    """One contender, ready to be replayed. how: "cuda graph", "cuda events" or "wall clock"; calls: made by one run; kept: what
    they hold, which a graph reads and writes as long as it is replayed."""
    run: Callable[[], object]
    calls: int
    how: str
    launches: int | None = None                            # for each call, where they can be counted
    note: str = ""
    ms: list[float] = field(default_factory=list)          # of each call
    kept: Sequence[Callable[[], object]] = ()

    def sample(self, seconds: float, least: int = 1) -> None:
        """Adds times until `seconds` have passed, at least `least` of them."""
        end, taken = time.perf_counter() + seconds, 0
        while taken < least or time.perf_counter() < end:
            if self.how == "wall clock":
                start = time.perf_counter()
                self.run()
                self.ms.append(1e3 * (time.perf_counter() - start) / self.calls)
            else:
                self.ms.append(elapsed_ms(self.run) / self.calls)
            taken += 1

    def summary(self) -> dict[str, Any]:
        """ms: the median; low and high: the 10th and 90th percentile (of `samples` runs)."""
        found: dict[str, Any] = {"ms": statistics.median(self.ms), "low": quantile(self.ms, 0.1),
                                 "high": quantile(self.ms, 0.9), "samples": len(self.ms), "how": self.how,
                                 "launches": self.launches}
        return found | ({"note": self.note} if self.note else {})


def quantile(values: Sequence[float], q: float) -> float:
    """The value below which a part q of them lies, interpolated."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    return ordered[low] + (at - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def timer(calls: Sequence[Callable[[], object]], device: str) -> Timer:
    """A CUDA graph of the calls where it captures, events around eager calls otherwise (they include the host's time where the
    host is slower), the wall clock on a CPU."""
    def eager() -> None:
        for call in calls:
            call()
    if device == "cpu":
        eager()
        return Timer(eager, len(calls), "wall clock")
    try:
        graph = capture(calls)
    except Exception as e:
        torch.cuda.synchronize()                           # raises where the GPU's context is lost
        return Timer(eager, len(calls), "cuda events", note=f"not captured: {type(e).__name__}: {e}"[:200])
    try:
        count, note = round(launches(graph) / len(calls)), ""
    except (OSError, RuntimeError, AttributeError) as e:
        count, note = None, f"launches not counted: {e}"
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    return Timer(graph.replay, len(calls), "cuda graph", count, note, kept=calls)


def interleave(timers: Mapping[str, Timer], seconds: float) -> None:
    """Fills every timer's `ms`, in rounds through all of them. seconds: for each timer in all. Raises RuntimeError with the
    name of one that fails."""
    for _ in range(ROUNDS):
        for name, t in timers.items():
            try:
                t.sample(seconds / ROUNDS, least=2)
            except RuntimeError as e:
                raise RuntimeError(f"{name} failed when it was timed: {' '.join(str(e).split())[:200]}") from e


def peak_bytes(call: Callable[[], object], device: str) -> int | None:
    """The most GPU memory that a warm call holds at once beyond its inputs: temporaries and outputs. None on a CPU."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
