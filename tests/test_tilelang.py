"""TileLang: what it declines, and its CUDA, compiled for both architectures without a GPU (its C is executed by
test_coverage.py, test_programs.py and test_mutants.py)."""
from __future__ import annotations

import pytest

from gdn_ir.backends import BACKENDS
from gdn_ir.backends.tilelang.runtime import cross_compile
from gdn_ir.cache import load_source
from gdn_ir.compiler import Instance, Unsupported, lower, program_of, variant
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.schedules.plans import plan
from gdn_ir.schedules.schedule import KernelOptions, Schedule

TILELANG = BACKENDS["tilelang"]
FULL = Switches(initial_state=True, final_state=True)


@pytest.fixture(autouse=True)
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDN_IR_UNVERIFIED", "1")


def test_cuda_is_not_served_before_a_gpu_has_run_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GDN_IR_UNVERIFIED")
    with pytest.raises(Unsupported, match="has not passed the whole coverage table"):
        variant(Instance(FULL, 96, 96, "bf16", "bf16", True), Schedule("naive"), "tilelang", "sm_90")


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


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("name", "K", "V"), [("states", 128, 128), ("naive", 48, 80)])
def test_cuda_compiles(name: str, K: int, V: int, arch: str) -> None:
    """Products on matrix units, for Hopper by warp groups."""
    i = Instance(FULL, K, V, "bf16", "bf16", True)
    tiled = {k: KernelOptions(64, 4, 1) for k in ("scan", "output")} if name == "states" else {"*": KernelOptions(None, 4, 1)}
    schedule = Schedule(name, steps=plan(name, sums=name == "states")).with_options(**tiled)
    for kernel in lower(program_of(FULL), schedule, TILELANG, arch, i.sizes, i.dtypes, True):
        source = TILELANG.emit(kernel, arch)
        cuda = cross_compile(getattr(load_source("tilelang", source.kernel, source.hash, source.text), source.kernel), arch)
        assert ("wgmma" in cuda) == (arch == "sm_90") and "mma" in cuda
