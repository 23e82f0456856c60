"""TileLang: CUDA for Ampere and Hopper, and native code for CPUs through TVM's C target."""
from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gdn_ir.artifacts import PACKS, Built, obtain, packed
from gdn_ir.backends.base import Call, Kernel, Launch, Reason, Source, blocks, clear_tail, heads
from gdn_ir.backends.temporaries import in_order
from gdn_ir.backends.tilelang import emit as printer
from gdn_ir.backends.tilelang import roles, warps
from gdn_ir.backends.tilelang.roles import RolePrinter
from gdn_ir.backends.tilelang.statements import SM_80, SM_90, C
from gdn_ir.cache import load_source
from gdn_ir.schedules.schedule import KernelOptions
from gdn_ir.nodes import Op
from gdn_ir.program import ScanView

TARGETS = {"cpu": C, "sm_80": SM_80, "sm_90": SM_90}
SPLIT = 64                                                 # the widest tile of float32 products, which are made of three


class TileLang:
    name = "tilelang"
    functional = False
    splits_grid = True
    by_address = False
    sweeps = False
    in_turn = False
    loads_once = False

    def supports(self, kernel: Kernel, arch: str) -> Reason | None:
        if arch not in ("cpu", "sm_80", "sm_90"):
            return Reason(f"tilelang lowers to cpu, sm_80 and sm_90, not to {arch}")
        if kernel.leads or kernel.beside:
            return Reason("tilelang does not start one kernel beside another; triton does on sm_90")
        if kernel.clears or kernel.counts or kernel.awaits or kernel.options.around:
            return Reason(f"tilelang has no part in what runs beside each other, as {kernel.name} should: it sets no counts to "
                          "zero, counts nothing, and takes chunks in their order; triton does")
        refused = {"f64": "float64"} | ({"bf16": "bfloat16", "f16": "float16"} if arch == "cpu" else {})
        for n in kernel.program.nodes():
            if n.type.dtype in refused:
                return Reason(f"tilelang has no {refused[n.type.dtype]} on {arch}; torch has")
            if n.op is Op.DOT and arch != "cpu" and n.args[0].type.dtype == "f32":
                return Reason(f"tilelang's products of float32 are tf32 on {arch} (a schedule may ask for tf32x3)")
            if n.op is Op.DOT and arch != "cpu" and n.args[0].type.dtype == "tf32" \
                    and max(kernel.tile(a) for a in {*n.axes, n["over"]}) > SPLIT:
                return Reason(f"tilelang: float32 tiles over {SPLIT}, each in three parts, do not fit {arch}'s shared memory")
            if n.op is Op.STORE and n["sum"] and n["sum"] != (kernel.gathers or ())[:1]:
                return Reason(f"tilelang does not lower a store summed over {', '.join(n['sum'])} yet ({n['tensor'].name})")
        if any(ScanView.of(s).parts for s in kernel.program.scans()):
            return Reason("tilelang does not step through parts of K; triton does")
        for scan in kernel.groups:
            return Reason(f"tilelang does not lower a loop over the {scan.axis} that share one {scan.group} yet")
        if not kernel.options.roles and (kernel.segments or any("idle" in dict(s.attr) for s in kernel.program.scans())):
            return Reason("tilelang lowers scans over segments of chunks as roles alone; triton lowers all")
        if any("where" in dict(s.attr) for s in kernel.program.scans()):
            return Reason("tilelang does not leave out chunks where memory says so; triton does")
        if not kernel.options.roles and (len(kernel.splits) > 1 or (kernel.parallel and len(kernel.parallel.chain) > 1)):
            return Reason("tilelang: one split axis a kernel, and one scan where its iterations go to the grid")
        if importlib.util.find_spec("tilelang") is None or (arch == "cpu" and shutil.which("g++") is None):
            if arch == "cpu" and PACKS and packed(self.recipe(kernel, self.emit(kernel, arch), arch)):
                return None                                # compiled ahead: it needs neither
            return Reason("tilelang's native code needs tilelang and g++")
        return roles.supports(kernel, arch) if kernel.options.roles else None

    def tile(self, axis: str, extent: int, arch: str) -> int:
        # on a GPU four warps share a product's rows
        return extent if arch == "cpu" or extent == 1 else max(64, 1 << (extent - 1).bit_length())

    def products(self, io: str, arch: str) -> str:
        return "tf32x3" if io == "f32" and arch != "cpu" else io

    def reads_tf32(self, arch: str) -> bool:
        return arch != "cpu"

    def joins(self, options: KernelOptions, block: int, size: int) -> bool:
        return bool(options.roles) and (block, size) == (warps.BLOCK, warps.SIZE)

    def emit(self, kernel: Kernel, arch: str) -> Source:
        return RolePrinter(kernel).source() if kernel.options.roles else printer.emit(kernel, TARGETS[arch])

    def compile(self, kernel: Kernel, source: Source, arch: str) -> Launch:
        from gdn_ir.backends.tilelang.runtime import LIBRARY, for_cpu, for_gpu, library
        artifact = obtain(self, kernel, source, arch)
        path, order = artifact.path(LIBRARY), list(artifact.launch["order"])
        written = frozenset(f"{t}_" for t in kernel.changes)
        run = for_cpu(path, order) if arch == "cpu" else for_gpu(library(path), order, written)
        tensors, params, sizes = kernel.tensors(), kernel.program.params(), heads(kernel)

        def launch(memory: Mapping[str, torch.Tensor], values: Mapping[str, float], call: Call) -> None:
            grid = blocks(kernel, call)
            if not grid:
                return
            given: dict[str, torch.Tensor | int | float] = {f"{t.name}_": memory[t.name] for t in tensors}
            given |= {p: values[p] for p in params} | {h: call.heads[h] for h in sizes}
            given |= {"L": call.length, "N": call.sequences, "tokens": call.tokens, "sequences": call.sequences,
                      "slots": call.slots(kernel.chunk), **{f"slots_{d}": call.slots(n) for d, n in kernel.segments.items()}}
            if call.cu_seqlens is not None:
                given |= {"cu": call.cu_seqlens, "boundaries": call.sequences + 1}
            run(given, grid)
        return launch

    def join(self, kernels: Sequence[Kernel], launches: Sequence[Launch]) -> Launch:
        return in_order(kernels, launches)

    def recipe(self, kernel: Kernel, source: Source, arch: str) -> dict[str, Any]:
        from gdn_ir.backends.tilelang.runtime import FLAGS, MASKED, processor
        flags: dict[str, Any] = {"g++": FLAGS, "processor": processor()} if arch == "cpu" else self.flags(kernel)
        return {"backend": "tilelang", "source": source.digest, "kernel": kernel.name, "arch": arch, "flags": MASKED | flags}

    def toolchain(self, arch: str) -> dict[str, str] | None:
        from gdn_ir.backends.tilelang.runtime import toolchain
        return toolchain(arch)

    def build(self, kernel: Kernel, source: Source, arch: str) -> Built:
        from gdn_ir.backends.tilelang.runtime import build
        function = getattr(load_source(self.name, source.kernel, source.hash, source.text), source.kernel)
        return build(function, printer.signature(kernel), printer.symbols(kernel), arch, self.flags(kernel))

    def flags(self, kernel: Kernel) -> dict[str, bool]:
        """Of TileLang's passes on GPUs."""
        from gdn_ir.backends.tilelang.runtime import FAST, ROLES
        return FAST | ROLES if kernel.options.roles else FAST

    def generated(self, kernel: Kernel, source: Source, arch: str) -> str:
        from gdn_ir.backends.tilelang.runtime import cross_compile
        function = getattr(load_source(self.name, source.kernel, source.hash, source.text), source.kernel)
        return f"{function.script()}\n\n{cross_compile(function, arch, self.flags(kernel))}"

    def clear_tail(self, x: torch.Tensor, call: Call) -> None:
        clear_tail(x, call)

    def version(self) -> str:
        from importlib.metadata import version
        return f"tilelang {version('tilelang')}"
