"""The host's part of a warm call: nothing is looked up, traced or lowered again. bench/host.py measures it."""
from __future__ import annotations

import pytest

from gdn_ir import compiler, registry
from gdn_ir.bench import host


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


def test_measured_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDN_IR_UNVERIFIED", "1")
    monkeypatch.setattr(host, "WARM", 1)
    monkeypatch.setattr(host, "TIMED", 2)
    assert all(0 < t < 1e6 for t in host.measure("cpu", stub=True).values())
