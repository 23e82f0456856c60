"""torch: any device, any dtype, differentiable. The whole grid runs at once, as batch dimensions before the tile's."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from gdn_ir.backends.base import Call, Kernel, Launch, Reason, Source, heads
from gdn_ir.backends.temporaries import in_order
from gdn_ir.backends.torch import emit as printer
from gdn_ir.backends.torch.runtime import Memory
from gdn_ir.cache import load_source
from gdn_ir.schedules.schedule import KernelOptions


class Torch:
    name = "torch"
    functional = True
    splits_grid = False
    by_address = False
    sweeps = False
    in_turn = False
    loads_once = False

    def supports(self, kernel: Kernel, arch: str) -> Reason | None:
        if kernel.beside or kernel.leads:
            return Reason("torch runs one kernel after another; triton starts one beside another on sm_90")
        return Reason("torch has no roles; tilelang has") if kernel.options.roles else None

    def tile(self, axis: str, extent: int, arch: str) -> int:
        return extent

    def products(self, io: str, arch: str) -> str:
        return "f64" if io == "f64" else "f32"

    def reads_tf32(self, arch: str) -> bool:
        return False

    def joins(self, options: KernelOptions, block: int, size: int) -> bool:
        return False

    def emit(self, kernel: Kernel, arch: str) -> Source:
        return printer.emit(kernel)

    def compile(self, kernel: Kernel, source: Source, arch: str) -> Launch:
        function = getattr(load_source(self.name, source.kernel, source.hash, source.text), source.kernel)
        tensors, written, read = kernel.tensors(), set(kernel.program.written()), set(kernel.program.read())
        params, sizes = kernel.program.params(), heads(kernel)

        def launch(memory: Mapping[str, torch.Tensor], values: Mapping[str, float], call: Call) -> dict[str, torch.Tensor]:
            device = next(iter(memory.values())).device
            # what it hands on lies as programs index it, for it is written over nothing
            places = {t.name: Memory(memory.get(t.name) if t.name in read else None,
                                     call.shape(kernel, replace(t, members=())), t.dtype, device) for t in tensors}
            with torch.autocast(device.type, enabled=False):           # the program says what is rounded, and to what
                function(*places.values(), *([call.cu_seqlens] if kernel.varlen else []), *(values[p] for p in params),
                         call.length, call.sequences, *(call.heads[h] for h in sizes))
            return {name: place.value() for name, place in places.items() if name in written}
        return launch

    def join(self, kernels: Sequence[Kernel], launches: Sequence[Launch]) -> Launch:
        return in_order(kernels, launches)

    def recipe(self, kernel: Kernel, source: Source, arch: str) -> dict[str, Any]:
        return {"backend": self.name, "source": source.digest, "dtypes": {t.name: t.dtype for t in kernel.tensors()}}

    def toolchain(self, arch: str) -> dict[str, str]:
        return {"torch": torch.__version__}

    def build(self, kernel: Kernel, source: Source, arch: str) -> None:
        """Python runs the source as it stands."""

    def generated(self, kernel: Kernel, source: Source, arch: str) -> str:
        return f"# {kernel.name}: torch runs the source as it stands\n"

    def clear_tail(self, x: torch.Tensor, call: Call) -> None:
        raise AssertionError("a functional backend returns zeros where nothing is written")

    def version(self) -> str:
        return f"torch {torch.__version__}"
