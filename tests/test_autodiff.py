"""The derived backward, in the interpreter, against float64 autograd of the token recurrence."""
from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn_ir.bench.errors import worst
from gdn_ir.autodiff import backward
from gdn_ir.build import Tensor, Tracer, dot, exp, reduce_max
from gdn_ir.interp import Sizes, run
from gdn_ir.nodes import IRError, Op
from gdn_ir.printer import dump, evaluate
from gdn_ir.program import Program
from gdn_ir.programs.gated_delta import Switches, build
from gdn_ir.reference import recurrence
from gdn_ir.split import split

FAMILY = list(itertools.product(("scalar", "none"), (True, False)))
STATES = {"initial_state": True, "final_state": True}


def gradients(s: Switches, chain: tuple[str, ...], lengths: list[int], H: int, HV: int, K: int, V: int, C: int) -> float:
    """The largest relative difference between derived gradients and autograd's."""
    generator = torch.Generator().manual_seed(sum(lengths) + K)
    T, N = sum(lengths), len(lengths)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)
    x = {"q": normal(T, H, K), "k": torch.nn.functional.normalize(normal(T, H, K), dim=-1), "v": normal(T, HV, V),
         "beta": normal(T, HV).sigmoid()}
    if s.decay == "scalar":
        x["g"] = -normal(T, HV).abs()
    if s.initial_state:
        x["initial_state"] = normal(N, HV, *((V, K) if s.state_v_first else (K, V)))
    for t in x.values():
        t.requires_grad_()
    S0 = x.get("initial_state")
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    o, S = recurrence(x["q"][None], x["k"][None], x["v"][None], x["g"][None] if "g" in x else None, x["beta"][None], 0.7,
                      S0.mT if S0 is not None and s.state_v_first else S0, cu, erase=s.erase, l2norm=s.l2norm,
                      beta_sigmoid=s.beta_sigmoid, neg_eigval=s.neg_eigval)
    d_o, d_S = normal(T, HV, V), normal(N, HV, K, V)
    want = torch.autograd.grad((o[0] * d_o).sum() + ((S * d_S).sum() if s.final_state else 0.0), list(x.values()))
    inputs = {n: t.detach() for n, t in x.items()} | {"d_o": d_o}
    if s.final_state:
        inputs["d_final_state"] = d_S.mT if s.state_v_first else d_S
    sizes = Sizes({"C": C, "K": K, "V": V, "H": H, "HV": HV, "X": 2}, cu.tolist())
    got = run(backward(build(s, chain)), inputs, sizes, {"scale": 0.7})
    return worst(float((got[f"d_{n}"] - w).abs().max() / w.abs().max().clamp(min=1e-6)) for n, w in zip(x, want, strict=True))


@pytest.mark.parametrize("chain", [("X",), ("Y", "X")])
@pytest.mark.parametrize("flags", [{}, STATES, STATES | {"state_v_first": True, "l2norm": True},
                                   STATES | {"beta_sigmoid": True, "neg_eigval": True}])
@pytest.mark.parametrize(("decay", "erase"), FAMILY)
def test_every_switch(decay: str, erase: bool, flags: dict[str, bool], chain: tuple[str, ...]) -> None:
    s = Switches(decay=decay, erase=erase, **flags)        # type: ignore[arg-type]
    assert gradients(s, chain, [11, 0, 20, 8], 1, 2, 4, 3, 8) < 1e-8


@settings(max_examples=15)
@given(lengths=st.lists(st.integers(0, 13), min_size=1, max_size=3).filter(any), H=st.integers(1, 2), group=st.integers(1, 3),
       K=st.integers(1, 4), V=st.integers(1, 4), C=st.sampled_from([2, 4, 8]), nested=st.booleans())
def test_random_shapes(lengths: list[int], H: int, group: int, K: int, V: int, C: int, nested: bool) -> None:
    s = Switches(**STATES)                                 # type: ignore[arg-type]
    assert gradients(s, ("Y", "X") if nested else ("X",), lengths, H, H * group, K, V, C) < 1e-8


@pytest.mark.parametrize(("decay", "erase"), FAMILY)
def test_v_split_over_the_grid(decay: str, erase: bool) -> None:
    """Gradients that sum over V become sums over its tiles, in float order of the grid."""
    whole = backward(build(Switches(decay=decay, erase=erase, l2norm=True, beta_sigmoid=True, **STATES)))     # type: ignore[arg-type]
    axes, cu = {"C": 8, "K": 4, "V": 6, "H": 1, "HV": 2}, [0, 11, 11, 31]
    sizes = Sizes(axes, cu)
    generator = torch.Generator().manual_seed(0)
    inputs = {n: 0.3 * torch.randn([sizes.dim(d) for d in t.dims], generator=generator, dtype=torch.float64)
              for n, t in whole.tensors().items() if n in whole.read() and not t.temp}
    tiled = split(whole, "V")
    assert {"d_q", "d_k", "d_beta"} <= {n["tensor"].name for n in tiled.nodes() if n.op is Op.STORE and "V#" in n["sum"]}
    want, got = run(whole, inputs, sizes, {"scale": 0.5}), run(tiled, inputs, Sizes(axes, cu, {"V": 4}), {"scale": 0.5})
    for name in want:
        if name.startswith("d_"):
            assert torch.allclose(want[name], got[name], rtol=1e-12, atol=1e-12), name


def test_split_refuses_what_is_not_linear() -> None:
    t = Tracer("p", grid=("N", "HV"))
    with t.recording():
        def body(S: object) -> None:
            v = t.load(Tensor("v", ("T", "HV", "V")))
            total = dot(v, v.twin("C"), over="V")
            t.store(Tensor("o", ("T", "HV", "C'")), exp(total))
        t.scan(lambda: body(None))
    with pytest.raises(IRError, match=r"split V: it is not linear in a partial sum over V(.|\n)*test_autodiff.py:\d+"):
        split(t.program(), "V")


def test_the_program_prints_and_evaluates_back() -> None:
    for chain in (("X",), ("Y", "X")):
        p = backward(build(Switches(**STATES), chain))     # type: ignore[arg-type]
        assert evaluate(dump(p)) == p


def test_only_what_is_asked_for() -> None:
    p = backward(build(), ["v"])
    assert {n["tensor"].name for n in p.nodes() if n.op is Op.STORE and not n["tensor"].temp} == {"d_v"}
    with pytest.raises(IRError, match="wrt: got 'w'; gated_delta_rule reads"):
        backward(build(), ["w"])


def test_no_derivative_names_the_node() -> None:
    t = Tracer("p", grid=("N", "HV"))

    def body() -> None:
        v = t.load(Tensor("v", ("T", "HV", "V")))
        t.store(Tensor("o", ("T", "HV")), reduce_max(v, "V"))
    with t.recording():
        t.scan(body)
    p: Program = t.program()
    with pytest.raises(IRError, match=r"no derivative of a max along an axis\n.*test_autodiff.py:\d+"):
        backward(p)


def test_the_solve_is_differentiated_whole() -> None:
    """One transposed solve in the backward, none of the explicit inverse's products."""
    solves = [n for n in backward(build()).nodes() if n.op is Op.TRI_SOLVE]
    assert sorted(bool(dict(n.attr).get("transpose")) for n in solves).count(True) == 1
