from __future__ import annotations

import pytest

from gdn_ir.analysis import contracted_axes, cost, feeds, needs, parallel_axes, role
from gdn_ir.autodiff import backward
from gdn_ir.programs.gated_delta import Switches, build


def test_v_is_parallel_forward_and_contracted_backward() -> None:
    p = build()
    assert parallel_axes(p) == {"V"} and contracted_axes(p) == {"C", "K"}
    assert "V" in contracted_axes(backward(p))


@pytest.mark.parametrize(("name", "wanted"), [("G", "hoistable"), ("kk", "hoistable"), ("D", "hoistable"), ("qk", "hoistable"),
                                              ("u", "serial"), ("r", "serial"), ("o", "sinkable")])
def test_roles(name: str, wanted: str) -> None:
    p = build()
    assert role(p, p.named(name)) == wanted


def test_carries_needed_and_fed() -> None:
    p = build(Switches(final_state=True))
    u, o, kk = (p.named(n) for n in ("u", "o", "kk"))
    assert needs(p)[u] == {"S"} == feeds(p)[u]
    assert needs(p)[o] == {"S"} and feeds(p)[o] == frozenset()
    assert needs(p)[kk] == frozenset() and feeds(p)[kk] == {"S"}


def test_without_erase_u_needs_no_state() -> None:
    p = build(Switches(erase=False))
    assert role(p, p.named("u")) == "hoistable"


def test_forward_costs_ten_units() -> None:
    """Of 2 x 64 x 64 x 128 flops a chunk: KK^T 1, QK^T 1, KS 2, QS 2, the solve 1, (..)U 1, K^T U 2."""
    unit = 2 * 64 * 64 * 128
    assert cost(build(), {"C": 64, "K": 128, "V": 128}).flops == 10 * unit
    assert cost(build(Switches(erase=False)), {"C": 64, "K": 128, "V": 128}).flops == 6 * unit


def test_bytes_are_each_input_and_output_once() -> None:
    q = k = 64 * 128 * 2
    assert cost(build(), {"C": 64, "K": 128, "V": 128}).bytes == q + k + 2 * (64 * 128 * 2) + 64 * 4 + 64 * 2


def test_naive_backward_is_near_math_s_count() -> None:
    """What reverse mode derives, states recomputed: forward values again and two products for each of theirs."""
    unit = 2 * 64 * 64 * 128
    flops = cost(backward(build()), {"C": 64, "K": 128, "V": 128}).flops
    assert 28 * unit <= flops <= 40 * unit
