"""Triton: Ampere and Hopper."""
from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from gdn_ir.artifacts import Built, obtain, said
from gdn_ir.backends.base import Call, Kernel, Launch, Reason, Source, blocks, clear_tail
from gdn_ir.backends.temporaries import in_order, temporaries
from gdn_ir.backends.triton import emit as printer
from gdn_ir.backends.triton.denylist import denied
from gdn_ir.backends.triton.driver import Batch, Image, about, arguments, sizes
from gdn_ir.backends.triton.runtime import BESIDE
from gdn_ir.cache import load_source
from gdn_ir.schedules.schedule import KernelOptions
from gdn_ir.nodes import Op

TARGETS = ("sm_80", "sm_90")
CUBIN = "kernel.cubin"


class Triton:
    name = "triton"
    functional = False
    splits_grid = True
    sweeps = True
    in_turn = True
    loads_once = True

    @property
    def by_address(self) -> bool:
        return not interpreting()

    def supports(self, kernel: Kernel, arch: str) -> Reason | None:
        if arch not in TARGETS and not interpreting():
            return Reason(f"triton lowers to {' and '.join(TARGETS)}, not to {arch}")
        if kernel.options.roles:
            return Reason("triton has no roles; tilelang has")
        for n in kernel.program.nodes():
            if n.op is Op.STORE and n["sum"] and n["tensor"].name not in kernel.turns:
                return Reason(f"triton does not lower a store summed over {', '.join(n['sum'])} yet ({n['tensor'].name})")
            if n.type.dtype == "f64":
                return Reason("triton: matrix units have no float64 here; use the torch backend")
            if len(n.axes) > 2 and n.op is not Op.SCAN:
                return Reason(f"triton tiles have at most two axes, got {kernel.program.describe(n)}")
            if n.op is Op.TRI_SOLVE and dict(n.attr).get("transpose"):
                return Reason("triton does not lower the transposed solve yet")
        both = set(kernel.program.read()) & set(kernel.program.written())
        if both:
            return Reason(f"triton: no barrier orders what one kernel writes and reads of {', '.join(sorted(both))}")
        if len(kernel.splits) > 1:
            return Reason("triton: one split axis a kernel")
        if (kernel.leads or kernel.beside) and arch != "sm_90" and not interpreting():
            return Reason("triton: one kernel follows another on sm_90 alone, which can start it beside the other")
        return None if interpreting() else denied(kernel, arch)

    def tile(self, axis: str, extent: int, arch: str) -> int:
        # not under 64: products with fewer columns are where Hopper's miscompiles are (denylist.py)
        return max(64, 1 << (extent - 1).bit_length()) if extent > 1 else 1

    def products(self, io: str, arch: str) -> str:
        return "tf32x3" if io == "f32" else io

    def reads_tf32(self, arch: str) -> bool:
        return False

    def joins(self, options: KernelOptions, block: int, size: int) -> bool:
        # by several warps, products of 16 rows are where Triton is not to be trusted (denylist.py)
        return size // block in (2, 4) and block >= 16 and options.num_warps == 1

    def emit(self, kernel: Kernel, arch: str) -> Source:
        return printer.emit(kernel)

    def compile(self, kernel: Kernel, source: Source, arch: str) -> Launch:
        if interpreting():
            module = load_source(self.name, source.kernel, source.hash, source.text)
            for name in BESIDE & set(vars(module)):        # written in PTX; here one kernel ends before the next begins
                setattr(module, name, lambda *_: None)
            return interpreted(getattr(module, source.kernel), kernel)
        artifact = obtain(self, kernel, source, arch)
        return Image(kernel, artifact.path(CUBIN).read_bytes(), artifact.launch)

    def join(self, kernels: Sequence[Kernel], launches: Sequence[Launch]) -> Launch:
        images = [x for x in launches if isinstance(x, Image)]
        return Batch(images, temporaries(kernels)) if len(images) == len(launches) else in_order(kernels, launches)

    def recipe(self, kernel: Kernel, source: Source, arch: str) -> dict[str, Any]:
        return {"backend": "triton", "source": source.digest, "kernel": kernel.name, "arch": arch, "options": options(kernel),
                "signature": signature(kernel)}

    def toolchain(self, arch: str) -> dict[str, str] | None:
        try:
            found = {"triton": version("triton")}
        except PackageNotFoundError:
            return None
        replaced = os.environ.get("TRITON_PTXAS_PATH")
        if replaced:
            with suppress(OSError, subprocess.CalledProcessError):             # which Triton passes over for its own
                found["ptxas"] = said(replaced)
        return found

    def build(self, kernel: Kernel, source: Source, arch: str) -> Built:
        built = cross_compile(kernel, source, arch)
        return Built({CUBIN: built.asm["cubin"]}, about(built))

    def generated(self, kernel: Kernel, source: Source, arch: str) -> str:
        return str(cross_compile(kernel, source, arch).asm["ptx"])

    def clear_tail(self, x: torch.Tensor, call: Call) -> None:
        clear_tail(x, call)

    def version(self) -> str:
        return f"triton {version('triton')}"


def interpreted(function: Any, kernel: Kernel) -> Launch:
    """By Triton's interpreter, on CPUs (TRITON_INTERPRET=1)."""
    names = arguments(kernel)

    def launch(memory: Mapping[str, torch.Tensor], values: Mapping[str, float], call: Call) -> None:
        grid = blocks(kernel, call)
        if grid:
            every = {**memory, **values, **sizes(call), "cu_seqlens": call.cu_seqlens}
            function[(grid,)](*(every[n] for n in names), **options(kernel))
    return launch


def options(kernel: Kernel) -> dict[str, int]:
    """What Triton is told beside the source."""
    return {"num_warps": kernel.options.num_warps, "num_stages": kernel.options.num_stages}


def signature(kernel: Kernel) -> dict[str, str]:
    """Triton's types of a kernel's arguments, by name."""
    pointers = {"f32": "*fp32", "tf32": "*fp32", "bf16": "*bf16", "f16": "*fp16", "int": "*i32"}
    types: dict[str, str] = {f"{t.name}_ptr": pointers[t.dtype] for t in kernel.tensors()}
    types |= {"cu_ptr": "*i32"} | {p: "fp32" for p in kernel.program.params()}
    return {n: types.get(n, "i32") for n in printer.signature(kernel)}


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def cross_compile(kernel: Kernel, source: Source, arch: str) -> Any:
    """Compile for an architecture that need not be here: returns Triton's compiled kernel (`.asm`: ptx, cubin, ... by name;
    `.metadata`: name, shared memory, warps)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    module = load_source("triton", source.kernel, source.hash, source.text)
    # what a launch on aligned tensors would specialise on
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(signature(kernel)) if n.endswith("_ptr")}
    code = ASTSource(getattr(module, source.kernel), signature(kernel), constexprs={}, attrs=aligned)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return triton.compile(code, target=target, options=options(kernel))
