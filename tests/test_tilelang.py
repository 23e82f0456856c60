"""TileLang: what it declines, and its CUDA, compiled for both architectures without a GPU (its C is executed by
test_coverage.py, test_programs.py and test_mutants.py)."""
from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from gdn_ir.autotune.prune import SHARED
from gdn_ir.bench.gradients import backward_of
from gdn_ir.backends import BACKENDS
from gdn_ir.backends.base import Kernel
from gdn_ir.backends.tilelang.runtime import cross_compile, lowered
from gdn_ir.cache import load_source
from gdn_ir.compiler import Instance, Unsupported, lower, program_of, variant
from gdn_ir.coverage import LAYOUTS, Cell
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.schedules.defaults import default
from gdn_ir.schedules.schedule import Schedule

TILELANG = BACKENDS["tilelang"]
FULL = Switches(initial_state=True, final_state=True)


@pytest.mark.parametrize(("io", "arch", "why"), [("bf16", "cpu", "no bfloat16 on cpu"), ("f64", "cpu", "no float64 on cpu"),
                                                 ("f64", "sm_90", "no float64 on sm_90"), ("f32", "sm_75", "to sm_75"),
                                                 ("f32", "sm_80", "do not fit sm_80's shared memory")])
def test_declines(io: str, arch: str, why: str) -> None:
    with pytest.raises(Unsupported, match=why):
        variant(Instance(FULL, 128, 128, io, io, True), Schedule("naive"), "tilelang", arch)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    i = Instance(FULL, 64, 64, "f32", "f32", True)
    (kernel,) = lower(program_of(FULL), Schedule("naive"), TILELANG, "cpu", i.sizes, i.dtypes, True)
    assert "needs tilelang and g++" in str(TILELANG.supports(kernel, "cpu"))


def function_of(kernel: Kernel, arch: str) -> Any:
    source = TILELANG.emit(kernel, arch)
    return getattr(load_source("tilelang", source.kernel, source.hash, source.text), source.kernel)


def cuda_of(kernel: Kernel, arch: str) -> str:
    """As nvcc accepted it, which takes most of these tests' time."""
    return cross_compile(function_of(kernel, arch), arch)


def lowered_of(kernel: Kernel, arch: str) -> str:
    return lowered(function_of(kernel, arch), arch)[0]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_defaults_compile_without_a_gpu(arch: str) -> None:
    """Products on matrix units, for Hopper by warp groups; the scan's tiles copied ahead."""
    i = Instance(FULL, 128, 128, "bf16", "bf16", True)
    schedule = default(arch, i, 1, 8, 2048, "tilelang")[0]               # no roles
    for kernel in lower(program_of(FULL), schedule, TILELANG, arch, i.sizes, i.dtypes, True):
        cuda = cuda_of(kernel, arch)
        assert ("wgmma" in cuda) == (arch == "sm_90") and "mma" in cuda
        if kernel.name == "scan":
            assert ("tma_load(" if arch == "sm_90" else "cp_async") in cuda


@pytest.mark.parametrize(("arch", "name", "io"), [("sm_90", "back", "bf16"), ("sm_80", "grads", "f16")])
def test_the_backward_lowers_without_a_gpu(arch: str, name: str, io: str) -> None:
    """Sums along products' sums, which other threads hold; as far as CUDA (nvcc takes half a minute for each)."""
    cell = Cell("x", FULL, io, replace(LAYOUTS["varlen"], H=1, HV=2, K=128, V=128))
    instance = backward_of(cell)
    chosen = variant(instance, default(arch, instance, 1, 8, 8192, "tilelang")[0], "tilelang", arch)         # no roles
    assert [s.kernel for s in chosen.sources] == ["solve", "again", "local", "back", "inner", "grads", "heads"]
    source = next(s for s in chosen.sources if s.kernel == name)
    cuda, shared = lowered(getattr(load_source("tilelang", name, source.hash, source.text), name), arch)
    assert "mma" in cuda and "atomic" not in cuda and shared <= SHARED[arch]


def test_no_schedule_compiles_without_a_gpu() -> None:
    i = Instance(FULL, 48, 80, "bf16", "bf16", True)
    (kernel,) = lower(program_of(FULL), Schedule("naive"), TILELANG, "sm_90", i.sizes, i.dtypes, True)
    assert "wgmma" in cuda_of(kernel, "sm_90")


def test_sums_of_rows_meet_all_threads() -> None:
    """Norms of rows that other threads have written: fewer rows than threads, which must not wait for each other alone."""
    i = Instance(Switches(l2norm=True, final_state=True), 64, 64, "bf16", "bf16", True)
    schedule = default("sm_90", i, 1, 8, 8192, "tilelang")[0]
    kernels = lower(program_of(i.switches), schedule, TILELANG, "sm_90", i.sizes, i.dtypes, True)
    cuda = {k.name: lowered_of(k, "sm_90") for k in kernels if k.name != "solve"}
    assert "__sync_thread_partial" not in cuda["output"]
    assert "partial(3, 128)" in cuda["scan"]               # all threads of its consumers, the loads have warps of their own
    assert set(re.findall(r"partial\((.*?)\)", cuda["scan"])) == {"3, 128"}
