"""Time on a GPU: CUDA-graph replays, medians, inputs rotated so that no call finds its own in L2."""
from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Sequence

import torch

Calls = Sequence[Callable[[], object]]
KERNEL, COPY, FILL = range(3)                              # of CUgraphNodeType: what runs on the GPU


def capture(calls: Calls) -> torch.cuda.CUDAGraph:
    """All calls in one graph, each made once before: a first call may compile, which a capture forbids. Raises what CUDA or a
    call raises where it cannot be captured."""
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    before.wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)          # so that its nodes can be counted
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    finally:
        torch.cuda.set_stream(before)                      # a capture that fails leaves its own behind
    graph.instantiate()
    return graph


def launches(graph: torch.cuda.CUDAGraph) -> int:
    """Kernels, copies and fills in a captured graph."""
    driver, handle, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t()
    if error := driver.cuGraphGetNodes(handle, None, ctypes.byref(count)):
        raise RuntimeError(f"cuGraphGetNodes: error {error}")
    nodes, kind = (ctypes.c_void_p * count.value)(), ctypes.c_int()
    driver.cuGraphGetNodes(handle, nodes, ctypes.byref(count))
    kinds = []
    for node in nodes:
        driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind))
        kinds.append(kind.value)
    return sum(k in (KERNEL, COPY, FILL) for k in kinds)


def elapsed_ms(run: Callable[[], object]) -> float:
    """Milliseconds that the GPU takes from before a run to its end."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def graph_ms(calls: Calls, replays: int = 20) -> float:
    """Milliseconds of one call. calls: the same work on different copies of its inputs, together larger than L2; all are
    captured into one graph, and the median of its replays is shared among them."""
    graph = capture(calls)
    for _ in range(3):
        graph.replay()
    return statistics.median(elapsed_ms(graph.replay) / len(calls) for _ in range(replays))


def copies_beyond_l2(size: int, least: int = 1, most: int = 16) -> int:
    """How many copies of inputs of `size` bytes are together larger than twice the GPU's L2."""
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(least, min(most, -(-2 * l2 // max(1, size))))
