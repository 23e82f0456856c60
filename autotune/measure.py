"""Time on a GPU: CUDA-graph replays, medians, inputs rotated so that no call finds its own in L2."""
from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch


def graph_ms(calls: Sequence[Callable[[], object]], replays: int = 20) -> float:
    """Milliseconds of one call. calls: the same work on different copies of its inputs, together larger than L2; all are
    captured into one graph, and the median of its replays is shared among them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):                        # a first call may compile, which a capture forbids
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times: list[float] = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(calls))
    return statistics.median(times)


def copies_beyond_l2(size: int, least: int = 1, most: int = 16) -> int:
    """How many copies of inputs of `size` bytes are together larger than twice the GPU's L2."""
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(least, min(most, -(-2 * l2 // max(1, size))))
