"""Precision, padding and legalisation: what each pass must do to a program, and what would happen without it."""
from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from gdn_ir.backends import BACKENDS
from gdn_ir.build import (Tensor, Tracer, cumsum, dot, elem, exp, index, log, reduce_max, reduce_sum, select, strict_lower,
                          tri_solve, zeros)
from gdn_ir.compiler import lower
from gdn_ir.interp import Sizes, run
from gdn_ir.inverse import doubled
from gdn_ir.legalize import collapse, small_products, split_products
from gdn_ir.nodes import FLOATS, Node, Op
from gdn_ir.padding import pad
from gdn_ir.precision import precision, storage
from gdn_ir.program import Program
from gdn_ir.programs.gated_delta import Switches, build
from gdn_ir.reference import recurrence
from gdn_ir.rewrite import constant, simplify
from gdn_ir.schedules.plans import plan
from gdn_ir.schedules.schedule import Schedule
from gdn_ir.schedules.steps import apply
from tests.programs import tracer

FAMILY = list(itertools.product(("scalar", "none"), (True, False)))
FULL = {"initial_state": True, "final_state": True}


def inputs(p: Program, sizes: Sizes, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {n: 0.4 * torch.randn([sizes.dim(d) for d in t.dims], generator=generator).double()
             for n, t in p.tensors().items() if n in p.read()}
    return found | ({"g": -found["g"].abs()} if "g" in found else {})


def guards(p: Program) -> int:
    """How many values the program keeps to their valid part."""
    return sum(n.op is Op.SELECT and n.args[0].op is Op.ELEM and n.args[0]["fn"] == "lt" and n.args[0].args[1].op is Op.VALID
               for n in p.nodes())


# ---- precision --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("io", ["bf16", "f16", "f32"])
@pytest.mark.parametrize(("decay", "erase"), FAMILY)
def test_every_value_is_typed(io: str, decay: str, erase: bool) -> None:
    """Products take the chosen dtype and sum in float32; nothing stays a real; the ideal meaning is unchanged."""
    p = simplify(build(Switches(decay=decay, erase=erase, **FULL)))            # type: ignore[arg-type]
    products = "tf32" if io == "f32" else io
    t = precision(storage(p, io=io, beta=io), products)
    for n in t.nodes():
        assert n.type.dtype != "real" or n.op is Op.PARAM or constant(n) is not None, t.describe(n)
        if n.op is Op.DOT:
            assert n.type.dtype == "f32" and {a.type.dtype for a in n.args} == {products}
    sizes = Sizes({"C": 8, "K": 4, "V": 4, "H": 1, "HV": 2}, [0, 13])
    x = inputs(p, sizes)
    want, got = run(p, x, sizes, {"scale": 1.0}), run(t, x, sizes, {"scale": 1.0})
    assert all(torch.allclose(want[n], got[n], rtol=1e-12) for n in want)


def test_rounding_costs_what_bf16_costs() -> None:
    """The faithful reading of the typed program is as far from float64 as bf16 makes it: neither exact nor broken."""
    p = build(Switches(final_state=True))
    sizes = Sizes({"C": 16, "K": 32, "V": 32, "H": 1, "HV": 1}, [0, 64])
    x = {n: t.bfloat16().double() if n != "g" else t for n, t in inputs(p, sizes).items()}
    want = run(p, x, sizes, {"scale": 0.2})
    got = run(precision(storage(p, io="bf16", beta="bf16"), "bf16"), x, sizes, {"scale": 0.2}, faithful=True)
    for n in want:
        error = float((got[n] - want[n]).norm() / want[n].norm())
        assert 1e-4 < error < 1e-2, (n, error)


def test_casts_of_a_step_stand() -> None:
    """A product whose operands a step rounded keeps that rounding, whatever the schedule says of the others."""
    (kernel,) = apply(build(), plan("fused", io="f32"))
    t = precision(storage(doubled(kernel), io="bf16", beta="bf16"), "bf16")
    assert {n.args[0].type.dtype for n in t.nodes() if n.op is Op.DOT} == {"bf16", "tf32x3"}
    assert set(FLOATS) >= {n.type.dtype for n in t.nodes()} - {"real", "int", "bool", "effect"}


def test_split_products() -> None:
    """Three tf32 products for one of float32: exact as reals, and as numbers a thousand times closer than one of them."""
    p = simplify(build(Switches(**FULL)))                  # type: ignore[arg-type]
    sizes = Sizes({"C": 16, "K": 32, "V": 32, "H": 1, "HV": 1}, [0, 64])
    x = {n: t.float().double() for n, t in inputs(p, sizes).items()}
    want = run(p, x, sizes, {"scale": 0.2})
    three = split_products(precision(storage(p, io="f32", beta="f32"), "tf32x3"))
    one = precision(storage(p, io="f32", beta="f32"), "tf32")

    def count(q: Program) -> int:
        return sum(n.op is Op.DOT for n in q.nodes())
    assert count(three) == 3 * count(one) and {n.args[0].type.dtype for n in three.nodes() if n.op is Op.DOT} == {"tf32"}
    exact = run(three, x, sizes, {"scale": 0.2})
    got, rough = (run(q, x, sizes, {"scale": 0.2}, faithful=True) for q in (three, one))
    for n in want:
        size = want[n].norm()
        assert torch.allclose(exact[n], want[n], rtol=1e-12, atol=1e-12)
        assert float((got[n] - want[n]).norm() / size) < 1e-3 * float((rough[n] - want[n]).norm() / size), n


# ---- padding ----------------------------------------------------------------------------------------------------------------


def padded(p: Program, x: dict[str, torch.Tensor], sizes: Sizes) -> dict[str, torch.Tensor]:
    sizes = Sizes(sizes.axes, sizes.cu, {"K": 8, "V": 8})
    return run(p, x, sizes, {"scale": 0.7}, padded=True)


@pytest.mark.parametrize("flags", [FULL, FULL | {"l2norm": True}, FULL | {"beta_sigmoid": True, "neg_eigval": True}])
@pytest.mark.parametrize(("decay", "erase"), FAMILY)
def test_padded_tiles_agree_with_exact_ones(decay: str, erase: bool, flags: dict[str, bool]) -> None:
    p = build(Switches(decay=decay, erase=erase, **flags))  # type: ignore[arg-type]
    sizes = Sizes({"C": 8, "K": 5, "V": 6, "H": 1, "HV": 2}, [0, 13, 13, 20])
    x = inputs(p, sizes)
    want, got = run(p, x, sizes, {"scale": 0.7}), padded(pad(p, frozenset({"C", "K", "V"})), x, sizes)
    assert all(torch.allclose(want[n], got[n], rtol=1e-10, atol=1e-12) for n in want)


@pytest.mark.parametrize("chain", [("X",), ("Y", "X")])
def test_gated_delta_net_needs_no_guard(chain: tuple[str, ...]) -> None:
    """Padded rows of k and v load as zeros and the running sum repeats itself: the analysis sees that nothing is needed."""
    assert guards(pad(build(Switches(**FULL), chain), frozenset({"C", "K", "V"}))) == 0


def test_a_raw_gate_needs_one() -> None:
    """A decay computed in the op is not zero in the padding; without the guard the state comes out wrong."""
    t = tracer("raw_gate")

    def body(S: Node) -> Node:
        k, v = t.load(Tensor("k", ("T", "H", "K"))), t.load(Tensor("v", ("T", "HV", "V")))
        g = -exp(t.load(Tensor("a", ("T", "HV"))))         # exp(0) = 1 in the padding
        G = cumsum(g, "C")
        total = reduce_sum(g, "C")
        t.store(Tensor("o", ("T", "HV", "V")), exp(G) * dot(k, S, over="K"))
        return exp(total) * S + dot(k * exp(total - G), v, over="C")
    with t.recording():
        (S_end,) = t.scan(body, S=zeros("K", "V"))
        t.store(Tensor("S_end", ("N", "HV", "K", "V")), S_end)
    p = t.program()
    sizes = Sizes({"C": 8, "K": 5, "V": 6, "H": 1, "HV": 2}, [0, 13])
    x = inputs(p, sizes)
    want, guarded = run(p, x, sizes), pad(p, frozenset({"C", "K", "V"}))
    assert guards(guarded) > 0
    assert torch.allclose(padded(guarded, x, sizes)["S_end"], want["S_end"])
    assert not torch.allclose(padded(p, x, sizes)["S_end"], want["S_end"])


def test_sums_and_maxima_along_padding() -> None:
    t = tracer("rows")

    def body() -> None:
        x = t.load(Tensor("x", ("T", "HV", "K")))
        t.store(Tensor("total", ("T", "HV")), reduce_sum(exp(x), "K"))
        t.store(Tensor("most", ("T", "HV")), reduce_max(x, "K"))
    with t.recording():
        t.scan(body)
    p = t.program()
    sizes = Sizes({"C": 8, "K": 5, "V": 6, "H": 1, "HV": 2}, [0, 13])
    x = {"x": -1.0 - torch.rand(13, 2, 5, dtype=torch.float64)}      # all below the zeros of the padding
    want, got = run(p, x, sizes), padded(pad(p, frozenset({"C", "K"})), x, sizes)
    assert all(torch.allclose(want[n], got[n]) for n in want)
    bare = padded(p, x, sizes)
    assert not torch.allclose(want["total"], bare["total"]) and not torch.allclose(want["most"], bare["most"])


def test_neighbours_do_not_leak() -> None:
    """A sequence full of NaN next to ours, and NaN in rows that no sequence owns, change nothing of ours."""
    p = pad(build(Switches(**FULL)), frozenset({"C", "K", "V"}))
    sizes = Sizes({"C": 8, "K": 5, "V": 6, "H": 1, "HV": 2}, [0, 13, 20])
    x = inputs(p, sizes)
    want = padded(p, x, sizes)
    spoilt = {n: t.clone() for n, t in x.items()}
    for n in ("q", "k", "v", "g", "beta"):
        spoilt[n][13:] = math.nan
    got = padded(p, spoilt, sizes)
    assert torch.equal(got["o"][:13], want["o"][:13]) and torch.equal(got["final_state"][0], want["final_state"][0])
    assert got["o"][13:].isnan().all()


# ---- legalisation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("decay", "erase"), FAMILY)
def test_chunks_of_one_token_are_the_recurrence(decay: str, erase: bool) -> None:
    """With C = 1 the axis and the solve vanish, and what is left is the decode step."""
    p = collapse(build(Switches(decay=decay, erase=erase, **FULL)), "C")       # type: ignore[arg-type]
    assert not any(a.startswith("C") for n in p.nodes() for a in n.axes)
    assert not any(n.op in (Op.TRI_SOLVE, Op.CUMSUM) for n in p.nodes())
    sizes = Sizes({"C": 1, "K": 4, "V": 3, "H": 1, "HV": 2}, [0, 5, 5, 9])
    x = inputs(p, sizes)
    got = run(p, x, sizes, {"scale": 0.7})
    o, S = recurrence(*(x[n][None] for n in ("q", "k", "v")), x["g"][None] if decay == "scalar" else None, x["beta"][None], 0.7,
                      x["initial_state"], torch.tensor(sizes.cu), erase=erase)
    assert torch.allclose(got["o"], o[0]) and torch.allclose(got["final_state"], S)


def test_products_too_small_become_sums() -> None:
    p = build(Switches(**FULL))
    sizes = {"C": 16, "K": 32, "V": 8}
    small = small_products(p, sizes)
    for n in small.nodes():
        if n.op is Op.DOT:
            assert all(sizes[a.rstrip("'")] >= 16 for x in n.args for a in x.axes)
    assert sum(n.op is Op.DOT for n in small.nodes()) == 2           # K K^T and Q K^T; those with V have 8 columns
    assert small_products(p, {"C": 16, "K": 32, "V": 16}).roots == p.roots
    run_sizes = Sizes({**sizes, "H": 1, "HV": 1}, [0, 20])
    x = inputs(p, run_sizes)
    want, got = run(p, x, run_sizes, {"scale": 1.0}), run(small, x, run_sizes, {"scale": 1.0})
    assert all(torch.allclose(want[n], got[n]) for n in want)


def stored(make: Callable[[Tracer], Node], *dims: str) -> Program:
    t = tracer("one")

    def body() -> None:
        t.store(Tensor("y", dims or ("T", "HV", "K")), make(t))
    with t.recording():
        t.scan(body)
    return t.program()


X, Y, W = Tensor("x", ("T", "HV", "K")), Tensor("v", ("T", "HV", "V")), Tensor("w", ("HV", "K", "V"))
PITFALLS: dict[str, Callable[[Tracer], Node]] = {
    "a mask between unrelated axes is not causal":
        lambda t: reduce_sum(select(elem("ge", index("C"), index("V")), t.load(Y) + 1.0, 0.0), "V") * t.load(X),
    "a running sum of a constant is not that constant":
        lambda t: reduce_sum(cumsum(exp(t.load(W)), "K") - 1.0, "V") * t.load(X),
    "the inverse of a padded zero is infinite":
        lambda t: t.load(X) * reduce_sum(dot(exp(-log(t.load(X) * t.load(X))), t.load(Y), "C"), "V"),
    "zero by zero, rounded down":
        lambda t: t.load(X) * reduce_sum(dot(elem("floordiv", t.load(X), t.load(X)), t.load(Y), "C"), "V"),
    "a transposed solve starts in the padding":
        lambda t: tri_solve(strict_lower(0.1 * dot(t.load(X), t.load(X).twin("C"), "K")),
                            log(t.load(X) * t.load(X)), transpose=True),
}


@pytest.mark.parametrize("name", PITFALLS)
def test_pitfalls_of_padding(name: str) -> None:
    p = stored(PITFALLS[name])
    sizes = Sizes({"C": 8, "K": 5, "V": 6, "H": 1, "HV": 2}, [0, 13])
    x = inputs(p, sizes)
    assert torch.allclose(padded(pad(p, frozenset({"C", "K", "V"})), x, sizes)["y"], run(p, x, sizes)["y"], rtol=1e-9)


def test_both_names_of_a_padded_axis_are_masked() -> None:
    """A tile on [K, K'], both padded, is loaded and stored within its tensor."""
    p = stored(lambda t: reduce_sum(t.load(X).twin("K") * t.load(Tensor("m", ("HV", "K", "K'"))), "K'"))
    sizes = Sizes({"C": 8, "K": 5, "V": 6, "H": 1, "HV": 2}, [0, 13])
    x = inputs(p, sizes)
    assert torch.allclose(padded(pad(p, frozenset({"C", "K", "V"})), x, sizes)["y"], run(p, x, sizes)["y"])
    (kernel,) = lower(p, Schedule("plain", 16), BACKENDS["triton"], "sm_90", {"K": 48, "V": 64}, {"io": "f32"}, True)
    text = BACKENDS["triton"].emit(kernel, "sm_90").text
    assert "mask=in_K[:, None] & in_K[None, :]" in text
