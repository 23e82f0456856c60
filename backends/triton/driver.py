"""Launches what Triton compiled through the CUDA driver: from a cubin (or PTX) and a few numbers, without Triton."""
from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch

from gdn_ir.backends.base import Call, Kernel, Launch, blocks, heads

MAX_DYNAMIC_SHARED = 8                                     # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
WITHOUT_ASKING = 48 * 1024                                 # bytes of shared memory that every kernel may use
ALIGNMENT = 16                                             # bytes: what cross_compile tells Triton of every pointer


def about(built: Any) -> dict[str, Any]:
    """What a launch needs to know of a kernel that Triton compiled. Raises NotImplementedError where it needs more than
    arguments: scratch memory, or blocks in clusters."""
    m = built.metadata
    names = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl")
    more = {n: value for n in names if (value := getattr(m, n, 0))} | ({"num_ctas": m.num_ctas} if m.num_ctas != 1 else {})
    if more:
        raise NotImplementedError(f"{m.name}: the driver's loader knows no launch with {more}")
    return {"name": m.name, "shared": m.shared, "num_warps": m.num_warps}


def binder(kernel: Kernel) -> Callable[[Mapping[str, torch.Tensor], Mapping[str, float], Call], list[Any]]:
    """What picks a kernel's arguments out of a call, in the order of its signature."""
    tensors, params, sizes, varlen = [t.name for t in kernel.tensors()], kernel.program.params(), heads(kernel), kernel.varlen

    def arguments(memory: Mapping[str, torch.Tensor], values: Mapping[str, float], call: Call) -> list[Any]:
        return [*(memory[t] for t in tensors), *([call.cu_seqlens] if varlen else []), *(values[p] for p in params),
                call.length, call.sequences, *(call.heads[h] for h in sizes)]
    return arguments


@lru_cache(maxsize=1)
def driver() -> Any:
    """The CUDA driver, its launch declared so that calls convert numbers themselves."""
    found = ctypes.CDLL("libcuda.so.1")
    size, pointer = ctypes.c_uint, ctypes.c_void_p
    found.cuLaunchKernel.argtypes = [pointer, *[size] * 7, pointer, pointer, pointer]
    return found


def must(code: int, what: str, name: str) -> None:
    """name: of the kernel or device that it was called for."""
    if code:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(code, ctypes.byref(text))            # leaves it null where it does not know the code
        said = f" ({text.value.decode()})" if text.value else ""
        raise RuntimeError(f"{what} of {name} failed with CUDA driver error {code}{said}")


def load(kernel: str, image: bytes, launch: Mapping[str, Any], device: int) -> ctypes.c_void_p:
    """The function in an image (a cubin, or PTX as text), on a device."""
    enter(device)
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    must(driver().cuModuleLoadData(ctypes.byref(module), image), "cuModuleLoadData", kernel)
    must(driver().cuModuleGetFunction(ctypes.byref(function), module, launch["name"].encode()), "cuModuleGetFunction", kernel)
    if launch["shared"] > WITHOUT_ASKING:
        must(driver().cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, launch["shared"]), "cuFuncSetAttribute", kernel)
    return function


def enter(device: int) -> None:
    """Make torch's context of a device current in this thread: a new thread has none before its first call to the runtime."""
    context, handle, name = ctypes.c_void_p(), ctypes.c_int(), f"cuda:{device}"
    must(driver().cuDeviceGet(ctypes.byref(handle), device), "cuDeviceGet", name)
    must(driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "cuDevicePrimaryCtxRetain", name)
    must(driver().cuCtxSetCurrent(context), "cuCtxSetCurrent", name)


class Arguments:
    """A kernel's arguments as the driver takes them: made once for a thread, filled for each launch."""

    def __init__(self, given: list[Any]) -> None:
        kinds = [ctypes.c_void_p if isinstance(x, torch.Tensor) else ctypes.c_float if isinstance(x, float) else ctypes.c_int32
                 for x in given]
        self.held = [kind() for kind in kinds]
        scratch = [ctypes.c_void_p(0), ctypes.c_void_p(0)]           # Triton's, unused
        self.all = [*self.held, *scratch]
        self.pointers = (ctypes.c_void_p * len(self.all))(*(ctypes.addressof(h) for h in self.all))

    def fill(self, given: list[Any]) -> None:
        for held, x in zip(self.held, given):
            held.value = x.data_ptr() if isinstance(x, torch.Tensor) else x


def launcher(kernel: Kernel, image: bytes, launch: Mapping[str, Any]) -> Launch:
    """What launches a kernel from its image, which is loaded to a device at the first call there. Tensors that are not aligned
    to 16 bytes are copied first: the code was compiled for those that are."""
    arguments, mine = binder(kernel), threading.local()
    threads, shared = 32 * launch["num_warps"], launch["shared"]
    written = frozenset(kernel.program.written())
    functions: dict[int, ctypes.c_void_p] = {}

    def run(memory: Mapping[str, torch.Tensor], values: Mapping[str, float], call: Call) -> None:
        grid = blocks(kernel, call)
        if not grid:
            return
        given = arguments(memory, values, call)
        if any(isinstance(x, torch.Tensor) and x.data_ptr() % ALIGNMENT for x in given):
            aligned(memory, values, call)
            return
        device = given[0].device.index
        function = functions.get(device)
        if function is None:
            function = functions.setdefault(device, load(kernel.name, image, launch, device))
        packed = getattr(mine, "packed", None)
        if packed is None:
            enter(device)
            packed = mine.packed = Arguments(given)
        packed.fill(given)
        stream = torch.cuda.current_stream(device).cuda_stream
        must(driver().cuLaunchKernel(function, grid, 1, 1, threads, 1, 1, shared, stream, packed.pointers, None),
             "cuLaunchKernel", kernel.name)

    def aligned(memory: Mapping[str, torch.Tensor], values: Mapping[str, float], call: Call) -> None:
        moved = {n: x.clone() for n, x in memory.items() if x.data_ptr() % ALIGNMENT}
        ends = call.cu_seqlens
        run({**memory, **moved}, values, call if ends is None or not ends.data_ptr() % ALIGNMENT else
            Call(call.sequences, call.tokens, call.length, call.heads, ends.clone(), call.memo))
        for name in written & moved.keys():
            memory[name].copy_(moved[name])
    return run
