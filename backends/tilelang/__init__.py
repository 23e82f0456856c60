"""TileLang: native code for CPUs, through TVM's C target; and CUDA, compiled but not served before a GPU has run it."""
from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping

import torch

from gdn_ir.backends.base import Call, Kernel, Launch, Reason, Source, blocks, heads
from gdn_ir.backends.tilelang import emit as printer
from gdn_ir.cache import load_source
from gdn_ir.nodes import Op


class TileLang:
    name = "tilelang"
    functional = False
    splits_grid = True

    def supports(self, kernel: Kernel, arch: str) -> Reason | None:
        if arch != "cpu":
            return Reason(f"tilelang's CUDA compiles (sm_80, sm_90) but has not run on a GPU yet: it serves cpu, not {arch}")
        for n in kernel.program.nodes():
            if n.type.dtype in ("f64", "bf16", "f16"):
                return Reason(f"tilelang's C target computes in float32; {n.type.dtype} is torch's")
            if n.op is Op.STORE and n["sum"]:
                return Reason(f"tilelang does not lower a store summed over {', '.join(n['sum'])} yet ({n['tensor'].name})")
        if len(kernel.splits) > 1 or (kernel.parallel and len(kernel.parallel.chain) > 1):
            return Reason("tilelang: one split axis a kernel, and one scan where its iterations go to the grid")
        if importlib.util.find_spec("tilelang") is None or shutil.which("g++") is None:
            return Reason("tilelang's C target needs tilelang and g++")
        return None

    def tile(self, axis: str, extent: int, arch: str) -> int:
        return extent if arch == "cpu" or extent == 1 else max(16, 1 << (extent - 1).bit_length())

    def products(self, io: str, arch: str) -> str:
        return "f32" if io == "f32" else io

    def emit(self, kernel: Kernel, arch: str) -> Source:
        return printer.emit(kernel, printer.C if arch == "cpu" else printer.CUDA)

    def compile(self, kernel: Kernel, source: Source, arch: str) -> Launch:
        from gdn_ir.backends.tilelang.runtime import build
        function = getattr(load_source(self.name, source.kernel, source.hash, source.text), source.kernel)
        run = build(function, printer.signature(kernel), printer.symbols(kernel))
        tensors, params, sizes = kernel.tensors(), kernel.program.params(), heads(kernel)

        def launch(memory: Mapping[str, torch.Tensor], values: Mapping[str, float], call: Call) -> None:
            grid = blocks(kernel, call)
            if not grid:
                return
            given: dict[str, torch.Tensor | int | float] = {f"{t.name}_": memory[t.name] for t in tensors}
            given |= {p: values[p] for p in params} | {h: call.heads[h] for h in sizes}
            given |= {"L": call.length, "N": call.sequences, "tokens": call.tokens, "sequences": call.sequences,
                      "slots": call.slots(kernel.chunk)}
            if call.cu_seqlens is not None:
                given |= {"cu": call.cu_seqlens, "boundaries": call.sequences + 1}
            run(given, grid)
        return launch

    def generated(self, kernel: Kernel, source: Source, arch: str) -> str:
        from gdn_ir.backends.tilelang.runtime import cross_compile
        function = getattr(load_source(self.name, source.kernel, source.hash, source.text), source.kernel)
        return f"{function.script()}\n\n{cross_compile(function, arch)}"

    def clear_tail(self, x: torch.Tensor, call: Call) -> None:
        """Zero the rows of a packed tensor past the last sequence."""
        assert call.cu_seqlens is not None
        x[int(call.cu_seqlens[-1]):].zero_()

    def version(self) -> str:
        from importlib.metadata import version
        return f"tilelang {version('tilelang')}"
