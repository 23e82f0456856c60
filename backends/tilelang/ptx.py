"""Runs a kernel from the PTX of an older architecture, which the driver finishes for the GPU at hand: how Ampere code is
executed on a Hopper."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gdn_ir.backends.base import Kernel, Launch, Source
from gdn_ir.backends.tilelang import TileLang
from gdn_ir.backends.tilelang.runtime import compiler

COMPILE = "tilelang_callback_cuda_compile"                 # what TileLang calls to make a binary of the CUDA it printed


class TileLangPtx(TileLang):
    """TileLang, except that what it hands to the driver is PTX."""
    name = "tilelang-ptx"

    def compile(self, kernel: Kernel, source: Source, arch: str) -> Launch:
        with printing_ptx():
            return super().compile(kernel, source, arch)

    def recipe(self, kernel: Kernel, source: Source, arch: str) -> dict[str, Any]:
        return super().recipe(kernel, source, arch) | {"image": "ptx"}


@contextmanager
def printing_ptx() -> Iterator[None]:
    """Within the block TileLang compiles no further than PTX."""
    compiler()
    import tvm_ffi
    from tilelang.contrib import nvcc
    from tilelang.env import CUTLASS_INCLUDE_DIR, TILELANG_TEMPLATE_PATH
    binary = tvm_ffi.get_global_func(COMPILE)

    def ptx(code: str, target: Any, configuration: Mapping[str, Any] | None = None) -> bytearray:
        compute, _ = nvcc.get_target_arch_and_code(target)
        virtual = ["-gencode", f"arch=compute_{compute},code=compute_{compute}"]
        include = ["-std=c++20", f"-I{TILELANG_TEMPLATE_PATH}", f"-I{CUTLASS_INCLUDE_DIR}"]
        return bytearray(nvcc.compile_cuda(code, "ptx", virtual, options=include))
    tvm_ffi.register_global_func(COMPILE, ptx, override=True)
    try:
        yield
    finally:
        tvm_ffi.register_global_func(COMPILE, binary, override=True)
