"""What follows the backward's scans as roles: its plan, its text, executed on the CPU against float64; what nvcc makes of it.
"""
from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest

from gdn_ir.backends.base import SHARED, Kernel
from gdn_ir.backends.tilelang.roles import RolePrinter
from gdn_ir.backends.tilelang.runtime import lowered
from gdn_ir.bench import gradients
from gdn_ir.bench.errors import relative
from gdn_ir.cache import load_source
from gdn_ir.compiler import Variant, variant
from gdn_ir.coverage import Cell, Layout
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.schedules.defaults import whole_scans
from gdn_ir.schedules.execute import execute
from gdn_ir.schedules.role_backward import inner_as_roles
from tests.test_role_backward import executed
from tests.test_role_kernels import TILELANG, spilled, synchronised
from tests.test_roles import unseen

STATES = Switches(initial_state=True, final_state=True)
SMALL = Cell("", STATES, "bf16", Layout((130, 0, 64, 1), True, 1, 2, 128, 128))


@lru_cache(maxsize=8)
def made_of(cell: Cell, plan: str = "turns", chunks: int = 16) -> Variant:
    instance = gradients.backward_of(cell)
    base = whole_scans("sm_90", instance, 1, 32, "triton", merges=f"gathered-{plan}")[0]
    return variant(instance, inner_as_roles(base, chunks=chunks), "triton", "sm_90")


def kernel_of(cell: Cell = SMALL) -> Kernel:
    return next(k for k in made_of(cell).compiled.kernels if k.name == "grads")


def test_runs() -> None:
    p = RolePrinter(kernel_of()).plan
    for chunks in (0, 1, 2, 7):
        for ragged in (False, True):
            execute(p, chunks, ragged, seeds=10)


# What other synchronisation implies: who loads has waited for d_S_free, which comes after what v_free says.
IMPLIED = {"load_values: without wait v_free"}


def test_nothing_derived_is_redundant() -> None:
    assert unseen(RolePrinter(kernel_of()).plan) == IMPLIED


@pytest.mark.parametrize(("lengths", "H", "varlen", "states", "late", "plan", "chunks"), [
    ((130, 0, 64, 1), 1, True, True, False, "turns", 2), ((193, 65), 2, True, False, True, "turns", 16),
    ((193, 193), 1, False, True, True, "turns", 2), ((330, 0, 64, 130), 1, True, False, False, "merged", 2),
    ((66,), 2, False, False, True, "merged", 2), ((66, 0, 64), 1, True, False, True, "turns", 2)])
def test_emitted_text_computes_gradients(lengths: tuple[int, ...], H: int, varlen: bool, states: bool, late: bool, plan: str,
                                         chunks: int) -> None:
    cell = Cell("", STATES if states else Switches(), "bf16", Layout(lengths, varlen, H, 2, 128, 128))
    found, want = executed(made_of(cell, plan, chunks), cell, late)
    for n, x in found.items():
        assert relative(x, want[n]) < 5e-3, n


@pytest.mark.parametrize("varlen", [True, False])
def test_cuda(tmp_path: Path, varlen: bool) -> None:
    """It synchronises as planned, and nvcc leaves products asynchronous."""
    made = kernel_of(SMALL if varlen else Cell("", Switches(), "bf16", Layout((330, 330), False, 2, 4, 128, 128)))
    source = TILELANG.emit(made, "sm_90")
    function = getattr(load_source("tilelang", source.kernel, source.hash, source.text), source.kernel)
    cuda, shared = lowered(function, "sm_90", TILELANG.flags(made))
    assert shared <= SHARED["sm_90"]
    synchronised(made, cuda)
    assert spilled(tmp_path, cuda) == 0
