"""The host's part of a warm call: nothing is looked up, traced or lowered again. bench/host.py measures it."""
from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from gdn_ir import compiler, registry
from gdn_ir.bench import host
from gdn_ir.compiler import Instance, Unsupported
from gdn_ir.programs.gated_delta import Switches

INSTANCE = Instance(Switches(), 128, 128, "bf16", "bf16", False)


def test_a_warm_call_asks_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of an H100, bound to their arguments and not launched."""
    monkeypatch.setenv("GDN_IR_UNVERIFIED", "1")
    with host.stubbed(), registry.use("triton"):
        calls = host.calls("cpu")
        for call in calls.values():
            call()

        def again(*args: object, **kwargs: object) -> None:
            raise AssertionError("a warm call builds an instance")
        monkeypatch.setattr(compiler.Instance, "__post_init__", again)
        monkeypatch.setattr(compiler.Call, "shape", again)
        for call in calls.values():
            call()
    assert set(calls) == {"dense", "packed", "one token", "forward and backward"}


def test_no_stub_outlives_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the block fails: Triton's variants launch again, and the CPU is no H100 any more."""
    monkeypatch.setenv("GDN_IR_UNVERIFIED", "1")

    def serve() -> None:
        with registry.use("triton"):
            for call in host.calls("cpu").values():
                call()
    with pytest.raises(KeyError), host.stubbed():
        serve()
        stubbed = registry.choose(INSTANCE, "sm_90", 1, 32, 256)
        assert stubbed.backend == "triton" and stubbed is registry.options(INSTANCE, "sm_90", 1, 32, 256)[0].variant
        raise KeyError
    assert registry.choose(INSTANCE, "sm_90", 1, 32, 256) is not stubbed
    with pytest.raises(Unsupported, match="triton lowers to sm_80 and sm_90, not to cpu"):
        serve()


def test_measured_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median of what a clock says that reads 0, 1, 4, 9, ... microseconds; what warms up is left out."""
    monkeypatch.setenv("GDN_IR_UNVERIFIED", "1")
    monkeypatch.setattr(host, "WARM", 1)
    monkeypatch.setattr(host, "TIMED", 2)
    reads = itertools.count()
    monkeypatch.setattr(host, "time", SimpleNamespace(perf_counter=lambda: next(reads) ** 2 * 1e-6))   # 1, 5, 9, ... between
    found = host.measure("cpu", stub=True)
    assert found == pytest.approx({"dense": 7, "packed": 19, "one token": 31, "forward and backward": 43})
    assert not registry.prepared and not any(memo.cache_info().currsize for memo in (registry.options, registry.choose))
