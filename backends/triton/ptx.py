"""Runs a kernel from the PTX of an older architecture, through the CUDA driver: how Ampere code is executed on a Hopper."""
from __future__ import annotations

from gdn_ir.backends.base import Kernel, Launch, Source
from gdn_ir.backends.triton import Triton, cross_compile
from gdn_ir.backends.triton.driver import Image, about


class TritonPtx(Triton):
    """Triton, except that `compile` builds PTX for its architecture and lets the driver finish it for the GPU at hand."""
    name = "triton-ptx"

    def compile(self, kernel: Kernel, source: Source, arch: str) -> Launch:
        built = cross_compile(kernel, source, arch)
        return Image(kernel, built.asm["ptx"].encode(), about(built))
