"""Runs a kernel from the PTX of an older architecture, through the CUDA driver: how Ampere code is executed on a Hopper."""
from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch

from gdn_ir.backends.base import Call, Kernel, Launch, Source, blocks
from gdn_ir.backends.triton import Triton, binder, cross_compile

MAX_DYNAMIC_SHARED = 8                                     # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class TritonPtx(Triton):
    """Triton, except that `compile` builds PTX for its architecture and lets the driver finish it for the GPU at hand."""
    name = "triton-ptx"

    def compile(self, kernel: Kernel, source: Source, arch: str) -> Launch:
        built = cross_compile(kernel, source, arch)
        arguments, driver = binder(kernel), ctypes.CDLL("libcuda.so.1")
        torch.cuda.current_stream().synchronize()          # the context exists from here on

        def must(code: int, what: str) -> None:
            if code:
                raise RuntimeError(f"{what} of {kernel.name} failed with CUDA driver error {code}")
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        must(driver.cuModuleLoadData(ctypes.byref(module), built.asm["ptx"].encode()), "cuModuleLoadData")
        must(driver.cuModuleGetFunction(ctypes.byref(function), module, built.metadata.name.encode()), "cuModuleGetFunction")
        shared = built.metadata.shared
        must(driver.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, shared), "cuFuncSetAttribute")

        def launch(memory: Mapping[str, torch.Tensor], values: Mapping[str, float], call: Call) -> None:
            grid = blocks(kernel, call)
            if not grid:
                return
            held: list[ctypes._SimpleCData[int] | ctypes._SimpleCData[float] | ctypes.c_void_p] = []
            for x in arguments(memory, values, call):
                held.append(ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor)
                            else ctypes.c_float(x) if isinstance(x, float) else ctypes.c_int32(x))
            held += [ctypes.c_void_p(0), ctypes.c_void_p(0)]         # Triton's scratch pointers, unused here
            pointers = (ctypes.c_void_p * len(held))(*(ctypes.cast(ctypes.pointer(h), ctypes.c_void_p) for h in held))
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            must(driver.cuLaunchKernel(function, grid, 1, 1, 32 * kernel.options.num_warps, 1, 1, shared, stream, pointers,
                                       None), "cuLaunchKernel")
        return launch
