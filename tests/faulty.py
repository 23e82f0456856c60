"""A backend with candidates that go wrong, for the tuner's tests: what `num_stages` says. Importing this registers it."""
from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from typing import Any

import torch

from gdn_ir.artifacts import Built, obtain
from gdn_ir.backends import BACKENDS
from gdn_ir.backends.base import Call, Kernel, Launch, Reason, Source
from gdn_ir.backends.torch import Torch

SLOW, FINE, WRONG, UNWRITTEN, CRASHES, HANGS, WONT_COMPILE, COMPILES_FOREVER = range(1, 9)


class Faulty(Torch):
    """Torch, with options that matter: it builds (nothing) and misbehaves by the number of stages."""
    name = "faulty"
    functional = False
    splits_grid = True

    def clear_tail(self, x: torch.Tensor, call: Call) -> None:
        assert call.cu_seqlens is not None
        x[int(call.cu_seqlens[-1]):] = 0

    def supports(self, kernel: Kernel, arch: str) -> Reason | None:
        return Reason("faulty: sixteen warps are too many") if kernel.options.num_warps == 16 else None

    def recipe(self, kernel: Kernel, source: Source, arch: str) -> dict[str, Any]:
        return {**super().recipe(kernel, source, arch), "stages": kernel.options.num_stages}

    def toolchain(self, arch: str) -> dict[str, str]:
        return {"faulty": "1"}

    def build(self, kernel: Kernel, source: Source, arch: str) -> Built:      # type: ignore[override]
        if kernel.options.num_stages == COMPILES_FOREVER:
            time.sleep(1000)
        if kernel.options.num_stages == WONT_COMPILE:
            raise RuntimeError("no such register")
        return Built({}, {})

    def compile(self, kernel: Kernel, source: Source, arch: str) -> Launch:
        stages = kernel.options.num_stages
        obtain(self, kernel, source, arch)
        inner = super().compile(kernel, source, arch)

        def launch(memory: Mapping[str, torch.Tensor], values: Mapping[str, float], call: Call) -> None:
            if stages == CRASHES:
                os.kill(os.getpid(), signal.SIGSEGV)
            if stages == HANGS:
                time.sleep(1000)
            if stages == WRONG:                            # and fast
                for n in kernel.program.written():
                    memory[n].fill_(0.5)
                return
            if stages == SLOW:
                time.sleep(0.02)
            for n, x in (inner(memory, values, call) or {}).items():
                if stages != UNWRITTEN or n != "final_state":
                    memory[n].copy_(x)
        return launch


BACKENDS["faulty"] = Faulty()
