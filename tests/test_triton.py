"""What the Triton backend declines, and why; details of what it prints."""
from __future__ import annotations

import pytest

from gdn_ir.autodiff import backward
from gdn_ir.backends import BACKENDS
from gdn_ir.backends.base import Kernel
from gdn_ir.backends.triton import denylist
from gdn_ir.build import Tensor, Tracer, dot, reduce_sum, zeros
from gdn_ir.compiler import Instance, lower, program_of
from gdn_ir.program import Program
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.schedules.plans import plan
from gdn_ir.schedules.schedule import KernelOptions, Schedule

TRITON = BACKENDS["triton"]


def kernel(name: str, steps: str, options: KernelOptions, io: str = "bf16") -> Kernel:
    i = Instance(Switches(final_state=True), 128, 128, io, io, True)
    s = Schedule("x", steps=plan(steps, io=io)).with_options(**{name: options})
    made = lower(program_of(i.switches), s, TRITON, "sm_90", i.sizes, i.dtypes, True)
    return next(k for k in made if k.name == name)


@pytest.mark.parametrize(("denied", "allowed", "why"), [
    (kernel("output", "states", KernelOptions(32, 4, 1)), kernel("output", "states", KernelOptions(64, 4, 1)), "outside of"),
    (kernel("scan", "states", KernelOptions(16, 4, 1)), kernel("scan", "states", KernelOptions(16, 4, 2)), "outside of"),
    (kernel("scan", "states", KernelOptions(16, 8, 2), "f32"), kernel("scan", "states", KernelOptions(16, 4, 2), "f32"),
     "16 columns over 8 warps"),
    (kernel("scan", "fused", KernelOptions(32, 4, 2)), kernel("scan", "fused", KernelOptions(64, 4, 2)), "with itself"),
])
def test_denylist(denied: Kernel, allowed: Kernel, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each entry denies what it was measured on, and not its neighbour; on Hopper, for the Tritons it names."""
    reason = TRITON.supports(denied, "sm_90")
    assert reason is not None and why in str(reason) and "v_tile" in str(reason)
    assert TRITON.supports(allowed, "sm_90") is None and TRITON.supports(denied, "sm_80") is None
    monkeypatch.setattr(denylist, "installed", lambda: (3, 9))
    assert denylist.denied(denied, "sm_90") is None


def declined(p: Program, chunk: int = 16, **sizes: int) -> str:
    (k,) = lower(p, Schedule("plain", chunk), TRITON, "sm_90", {"K": 16, "V": 16, **sizes}, {"io": "f32", "beta": "f32"}, True)
    return str(TRITON.supports(k, "sm_90") or "")


def test_no_barrier_no_reading_back() -> None:
    """The derived backward keeps states in one loop and reads them in the next."""
    assert declined(backward(program_of(Switches(erase=False, decay="none"))))

    def twice(t: Tracer) -> None:
        def first() -> None:
            t.store(Tensor("kept", ("T", "HV", "V"), temp=True), 2.0 * t.load(Tensor("x", ("T", "HV", "V"))))
        t.scan(first)
        written = t.effects[0][0]

        def second() -> None:
            t.store(Tensor("y", ("T", "HV", "V")), t.load(Tensor("kept", ("T", "HV", "V"), temp=True), after=[written]))
        t.scan(second)
    t = Tracer("twice", grid=("N", "HV"))
    with t.recording():
        twice(t)
    assert "no barrier orders what one kernel writes and reads of kept" in declined(t.program())


def test_scan_axes_keep_their_name() -> None:
    t = Tracer("sums", grid=("N", "HV"), chain=("Z",))
    with t.recording():
        t.scan(lambda: t.store(Tensor("y", ("T", "HV", "V")), 2.0 * t.load(Tensor("x", ("T", "HV", "V")))) and None)
    (k,) = lower(t.program(), Schedule("plain", 16), TRITON, "sm_90", {"V": 16}, {"io": "f32"}, True)
    text = TRITON.emit(k, "sm_90").text
    assert "i_Z" in text and "i_X" not in text


def test_one_token_at_a_time_in_parallel_is_still_python() -> None:
    """No rows to mask: the store of rows that no sequence owns has none either."""
    i = Instance(Switches(erase=False, final_state=True), 64, 64, "f32", "f32", True)
    s = Schedule("x", 1, plan("states", erase=False))
    for k in lower(program_of(i.switches), s, TRITON, "sm_90", i.sizes, i.dtypes, True):
        compile(TRITON.emit(k, "sm_90").text, "emitted", "exec")


def test_indices_are_64_bit() -> None:
    """A packed kernel that runs chunks in parallel and indexes by sequence."""
    t = Tracer("weighed", grid=("N", "HV"))
    with t.recording():
        x, w = Tensor("x", ("T", "HV", "K")), Tensor("w", ("N", "HV", "K", "V"))
        t.scan(lambda: t.store(Tensor("y", ("T", "HV", "V")), dot(t.load(x), t.load(w), "K")) and None)
    (k,) = lower(t.program(), Schedule("plain", 16), TRITON, "sm_90", {"K": 16, "V": 16}, {"io": "f32"}, True)
    text = TRITON.emit(k, "sm_90").text
    assert "w_ptr + n * (HV * 256)" in text and "return tl.cast(low, tl.int64), first, length" in text


def test_sums_over_heads_are_declined() -> None:
    t = Tracer("summed", grid=("N", "HV"))

    def body(S: object) -> object:
        return S + reduce_sum(t.load(Tensor("x", ("T", "HV", "V"))), "C")      # type: ignore[operator]
    with t.recording():
        (S,) = t.scan(body, S=zeros("V"))                  # type: ignore[arg-type]
        t.store(Tensor("s", ("N", "V"), "f32"), S)
    assert "triton does not lower a store summed over HV yet (s)" in declined(t.program())
