"""The language: nodes, types, the tracer, the verifier, the printer; and the interpreter against the token recurrence."""
from __future__ import annotations

import itertools
import pickle
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn_ir.build import Tracer, as_node, cast, cumsum, dot, elem, exp, last, reduce_sum, select, tri_solve, zeros
from gdn_ir.interp import Sizes, round_to, run
from gdn_ir.nodes import At, IRError, Member, Node, Op, Rows, Tensor, Tile, Type, make
from gdn_ir.printer import dump, evaluate
from gdn_ir.program import Program, ScanView
from gdn_ir.programs.gated_delta import Switches, build
from gdn_ir.reference import recurrence
from gdn_ir.verify import RULES, VerifyError, verify
from tests.programs import tracer

X = Tensor("x", ("T", "HV", "V"))
Y = Tensor("y", ("T", "HV", "V"))


def tile(name: str = "x", *axes: str) -> Node:
    """A value to build on: a load over tokens and some axes."""
    axes = axes or ("V",)
    return make(Op.LOAD, tensor=Tensor(name, ("T", "HV", *axes)), index=(Rows(("X",), "C"), At("HV"), *(Tile(a) for a in axes)))


# ---- nodes ----------------------------------------------------------------------------------------------------------------


def test_equal_nodes_are_one_object() -> None:
    x = tile()
    assert tile() is x and (x + 1.0) is (tile() + 1) and (x + 1.0) is not (x + 2.0)
    assert pickle.loads(pickle.dumps(exp(x) * x)) is exp(x) * x
    assert make(Op.CONST, value=0.0) is make(Op.CONST, value=0.0)


def test_nodes_are_frozen() -> None:
    with pytest.raises(AttributeError, match="nodes are frozen"):
        tile().op = Op.ELEM                                # type: ignore[misc]


def test_axes_have_no_order() -> None:
    a, b = tile("a", "K"), tile("b", "V")
    assert (a * b).type == (b * a).type == Type(("C", "K", "V"))
    assert a.twin("C").axes == ("C'", "K") and a.twin("C").twin("C") is not a


@pytest.mark.parametrize(("make_it", "message"), [
    (lambda: dot(tile("a", "K"), tile("b", "V"), over="K"), r"dot: axis K is not among the axes of real\[C, V\]"),
    (lambda: reduce_sum(tile(), "K"), "reduce: axis K is not among"),
    (lambda: tri_solve(tile(), tile()), r"tri_solve: M must lie on \[C, C'\]"),
    (lambda: cast(tile(), "f32") + tile(), "add: arguments must share one dtype, got f32"),
    (lambda: select(tile(), 1.0, 0.0), "select: the condition must be bool"),
    (lambda: elem("gt", tile(), 0.0) + 1.0, "add: needs numbers, got bool|must share one dtype"),
    (lambda: elem("tan", tile()), "no function 'tan' of 1 arguments; there are add"),
    (lambda: make(Op.CAST, (tile(),), dtype="f8"), "dtype must be one of real"),
    (lambda: make(Op.BROADCAST, (tile(),), axes=("C",)), "broadcast: .* has axes outside"),
    (lambda: make(Op.STORE, (tile(),), tensor=Tensor("y", ("T", "HV")), index=(Rows(("X",), "C"), At("HV")), sum=()),
     r"store y: index covers axes \('C',\), the value is real\[C, V\]"),
    (lambda: make(Op.LOAD, tensor=X, index=(Rows(("X",), "C"),)), "load x: 1 index terms for 3 dimensions"),
    (lambda: make(Op.LOAD, tensor=X, index=(Tile("C"), At("HV"), Tile("V"))), "load x: dimension T cannot be indexed by"),
    (lambda: make(Op.FINAL, (tile(),), i=0), "final: carry number 0 does not exist in LOAD"),
    (lambda: last(tile()), "last: only of a running sum along C"),
    (lambda: Type(("V", "C")), "axes must be sorted and distinct"),
])
def test_typing_errors(make_it: Callable[[], object], message: str) -> None:
    with pytest.raises(IRError, match=message):
        make_it()


# ---- the tracer -----------------------------------------------------------------------------------------------------------


def test_notes_name_variable_and_line() -> None:
    p = build(Switches(final_state=True))
    u, (line,) = p.named("u"), p.lines_of(p.named("u"))
    assert u.op is Op.TRI_SOLVE and line.file == "gated_delta.py"
    assert line.text == "u = tri_solve(strict_lower(beta * D * kk), r)"
    assert p.named("S").op is Op.CARRY
    assert all(p.lines_of(n) for n in p.nodes() if n.op is not Op.CONST)
    with pytest.raises(IRError, match=r"has no value named 'w'; it has .*kk"):
        p.named("w")


def test_two_carries_of_one_name() -> None:
    t = tracer("twice")
    with t.recording():
        t.scan(lambda S: S + 1.0, S=zeros("K", "V"))
        with pytest.raises(IRError, match="a carry named 'S' exists already"):
            t.scan(lambda S: S + 1.0, S=zeros("K", "V"))


def test_a_body_returns_its_carries() -> None:
    t = tracer("short")
    with pytest.raises(IRError, match="the body returned 1 values for carries A, B"):
        t.scan(lambda A, B: A, A=zeros("K"), B=zeros("K"))


# ---- the verifier: one program that breaks each rule -----------------------------------------------------------------------


def traced(body: Callable[..., object], **inits: Node) -> Program:
    """A program, not verified: what a pass with a bug would hand on."""
    t = tracer("broken")
    with t.recording():
        t.scan(lambda *c: body(t, *c), **inits)            # type: ignore[arg-type, return-value]
    return Program("broken", t.grid, tuple(t.effects[0]), t.notes)


def outside() -> Program:
    p = traced(lambda t: t.store(Y, t.load(X)) and None)
    return Program("broken", p.grid, ScanView.of(p.roots[0]).effects, p.notes)


def value_as_root() -> Program:
    t = tracer("broken")
    with t.recording():
        x = t.load(Tensor("s", ("N", "HV", "V")))
    return Program("broken", t.grid, (x,), t.notes)


def declared_twice() -> Program:
    def body(t: Tracer) -> None:
        x = t.load(X) + t.load(Tensor("x", ("T", "HV", "V"), "f32"))
        t.store(Y, x)
    return traced(body)


def off_the_grid() -> Program:
    p = traced(lambda t: t.store(Y, t.load(X)) and None)
    return Program("broken", ("N",), p.roots, p.notes)


def stray_carry(t: Tracer, *axes: str) -> None:
    t.store(Y, t.load(X) + reduce_sum(make(Op.CARRY, name="Z", scan="X", axes=axes), axes[0]))


def homeless_carry() -> Program:
    return traced(lambda t: stray_carry(t, "K", "V"))


def carry_of_other_axes() -> Program:
    def body(t: Tracer, Z: Node) -> Node:
        stray_carry(t, "K")
        return Z
    return traced(body, Z=zeros("K", "V"))


def always_the_same_place() -> Program:
    return traced(lambda t: t.store(Tensor("s", ("N", "HV", "V")), reduce_sum(zeros("C", "V"), "C")) and None)


def chunks_on_one_place() -> Program:
    """What is stored differs from chunk to chunk; where it is stored does not."""
    return traced(lambda t: t.store(Tensor("s", ("N", "HV", "V")), reduce_sum(t.load(X), "C")) and None)


def unordered_memory() -> Program:
    def body(t: Tracer) -> None:
        before = t.load(X)
        t.store(X, zeros("C", "V"))
        t.store(Y, before)
    return traced(body)


def unsummed() -> Program:
    p = traced(lambda t: t.store(Tensor("y", ("T", "V")), t.load(X)) and None)
    return p.rebuild(lambda n, args: n.but(args, sum=()) if n.op is Op.STORE else None)


def member_of_no_group() -> Program:
    p = traced(lambda t: t.store(Y, t.load(X)) and None)
    index = (Rows(("X",), "C"), Member("N", "X"), Tile("V"))
    return p.rebuild(lambda n, args: n.but(args, index=index) if n.op is Op.LOAD else None)


def idle_without_a_scan_around() -> Program:
    p = traced(lambda t: t.store(Y, t.load(X)) and None)
    return p.rebuild(lambda n, args: n.but(args, idle=("last",)) if n.op is Op.SCAN else None)


def recent_and_outermost() -> Program:
    p = traced(lambda t: t.store(Y, t.load(X)) and None)
    return p.rebuild(lambda n, args: n.but((*args, as_node(2.0)), recent=True) if n.op is Op.SCAN else None)


def nested() -> Program:
    t = Tracer("broken", grid=("N", "HV"), chain=("Y", "X"))
    with t.recording():
        t.scan_chunks(lambda: t.store(Y, t.load(X)) and None)
    return t.program()


def recent_and_stored() -> Program:
    return nested().rebuild(lambda n, args: n.but((*args, as_node(2.0)), recent=True)
                            if n.op is Op.SCAN and n["axis"] == "X" else None)


def where_nothing_says_so() -> Program:
    p = traced(lambda t: t.store(Y, t.load(X)) and None)
    return p.rebuild(lambda n, args: n.but((*args, as_node(1.0)), where=True) if n.op is Op.SCAN else None)


def where_it_carries() -> Program:
    t = Tracer("broken", grid=("N", "HV"))
    with t.recording():
        t.scan(lambda S: S + 1.0, S=zeros("K", "V"))
        t.scan_chunks(lambda: t.store(Y, t.load(X)) and None)
    return t.program().rebuild(lambda n, args: n.but((*args, as_node(1.0)), where=True) if n.op is Op.SCAN else None)


def where_it_is_nested() -> Program:
    return nested().rebuild(lambda n, args: n.but((*args, as_node(1.0)), where=True)
                            if n.op is Op.SCAN and n["axis"] == "X" else None)


def idle_and_stored() -> Program:
    return nested().rebuild(lambda n, args: n.but(args, idle=("last",)) if n.op is Op.SCAN and n["axis"] == "X" else None)


BREACHES = [
    (value_as_root, "roots_are_effects", "only stores and scans may be roots"),
    (declared_twice, "tensors_agree", "was declared as"),
    (off_the_grid, "tensors_agree", r"is not on the grid \('N',\)"),
    (homeless_carry, "carries_stay_home", "carry 'Z' has no scan"),
    (carry_of_other_axes, "carries_stay_home", r"has axes \('K',\), but starts as real\[K, V\]"),
    (outside, "scopes_close", "varies with scan X but stands outside it"),
    (always_the_same_place, "scopes_close", "is written in every iteration of scan X, always at the same place"),
    (chunks_on_one_place, "scopes_close", "is written in every iteration of scan X, always at the same place"),
    (unordered_memory, "memory_is_ordered", "have no order; give one of them the other as `after`"),
    (member_of_no_group, "members_are_of_groups", r"index Member\(grid=.N., scan=.X., own=False\) is of no scan"),
    (idle_without_a_scan_around, "idle_scans_are_inner", r"is idle in iterations \('last',\) of no scan around it"),
    (idle_and_stored, "idle_scans_are_inner", r"is not stored in the iterations \('last',\)"),
    (where_nothing_says_so, "chunks_left_out_are_alone", "runs where a value says so that is no number in memory"),
    (where_it_carries, "chunks_left_out_are_alone", "leaves out iterations, which only a program of all chunks at once can"),
    (where_it_is_nested, "chunks_left_out_are_alone", "leaves out iterations, which only a program of all chunks at once can"),
    (recent_and_outermost, "idle_scans_are_inner", "runs its last iterations alone, which only an inner scan"),
    (recent_and_stored, "idle_scans_are_inner", "is not stored in the iterations that its scan leaves out"),
    (unsummed, "sums_cover", "is written by every point of HV: say that they are summed"),
]


def test_every_rule_is_broken_below() -> None:
    """types_follow, which no honest call can break, has a test of its own."""
    assert {b[1] for b in BREACHES} | {"types_follow"} == {r.__name__ for r in RULES}


@pytest.mark.parametrize(("program", "rule", "message"), BREACHES)
def test_each_rule_names_node_and_line(program: Callable[[], Program], rule: str, message: str) -> None:
    with pytest.raises(VerifyError, match=message + r"(.|\n)*test_language.py:\d+"):
        verify(program())


def test_in_place_with_an_edge() -> None:
    """What was read before a store stays as it was; what is read after it is what was stored."""
    def body(t: Tracer) -> None:
        before = t.load(X)
        written = t.store(X, 2.0 * before)
        t.store(Y, t.load(X, after=[written]) + before)
    p = verify(traced(body))
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    out = run(p, {"x": x}, Sizes({"C": 2, "V": 3, "H": 1, "HV": 2}, [0, 5]))
    assert torch.equal(out["x"], 2 * x) and torch.equal(out["y"], 3 * x)


def test_types_are_checked_again() -> None:
    """A node whose type was tampered with does not pass."""
    p = replace(build(), name="tampered")                  # not one that was verified before
    node = next(n for n in p.nodes() if n.op is Op.DOT)
    honest = node.type
    try:
        object.__setattr__(node, "type", Type(honest.axes, "f32"))
        with pytest.raises(VerifyError, match=r"has type f32\[.*its arguments make it real(.|\n)*gated_delta.py:\d+"):
            verify(p)
    finally:
        object.__setattr__(node, "type", honest)


# ---- the printer ------------------------------------------------------------------------------------------------------------

FLAGS = [{}, {"initial_state": True, "final_state": True}, {"l2norm": True, "state_v_first": True, "initial_state": True},
         {"beta_sigmoid": True, "neg_eigval": True}]


@pytest.mark.parametrize("chain", [("X",), ("Y", "X")])
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize(("decay", "erase"), list(itertools.product(("scalar", "none"), (True, False))))
def test_text_evaluates_to_the_same_nodes(decay: str, erase: bool, flags: dict[str, bool], chain: tuple[str, ...]) -> None:
    p = build(Switches(decay=decay, erase=erase, **flags), chain)              # type: ignore[arg-type]
    assert evaluate(dump(p)).roots == p.roots


# ---- the interpreter --------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(0, 20), min_size=1, max_size=4), H=st.integers(1, 2), group=st.integers(1, 3),
       K=st.integers(1, 6), V=st.integers(1, 6), C=st.integers(1, 9), decay=st.sampled_from(["scalar", "none"]),
       erase=st.booleans(), l2norm=st.booleans(), sigmoid=st.booleans(), neg=st.booleans(), initial=st.booleans(),
       v_first=st.booleans(), nested=st.booleans(), seed=st.integers(0, 99))
def test_interpreter_is_the_recurrence(lengths: list[int], H: int, group: int, K: int, V: int, C: int, decay: str, erase: bool,
                                       l2norm: bool, sigmoid: bool, neg: bool, initial: bool, v_first: bool, nested: bool,
                                       seed: int) -> None:
    s = Switches(decay, erase, l2norm, sigmoid, neg, initial, True, v_first)
    generator = torch.Generator().manual_seed(seed)
    T, N, HV = sum(lengths), len(lengths), H * group

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)
    q, k, v = normal(T, H, K), torch.nn.functional.normalize(normal(T, H, K), dim=-1), normal(T, HV, V)
    g, beta, S0 = -normal(T, HV).abs(), normal(T, HV).sigmoid(), normal(N, HV, K, V)
    cu = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    want = recurrence(q[None], k[None], v[None], g[None] if decay == "scalar" else None, beta[None], 0.7,
                      S0 if initial else None, torch.tensor(cu), erase=erase, l2norm=l2norm, beta_sigmoid=sigmoid,
                      neg_eigval=neg)
    given_ = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": S0.mT if v_first else S0}
    p = build(s, ("Y", "X") if nested else ("X",))
    sizes = Sizes({"C": C, "K": K, "V": V, "H": H, "HV": HV, "X": 3}, cu)
    got = run(p, {n: given_[n] for n in p.read()}, sizes, {"scale": 0.7})
    state = got["final_state"].mT if v_first else got["final_state"]
    for a, b in ((got["o"], want[0][0]), (state, want[1])):
        assert a.numel() == 0 or float((a - b).abs().max()) < 1e-10


def test_faithful_rounds_and_ideal_does_not() -> None:
    x = torch.randn(3, 1, 4, dtype=torch.float64)
    p = traced(lambda t: t.store(Y, make(Op.CAST, (t.load(X),), dtype="bf16")) and None)
    sizes = Sizes({"C": 2, "V": 4, "H": 1, "HV": 1}, [0, 3])
    assert torch.equal(run(p, {"x": x}, sizes)["y"], x)
    assert torch.equal(run(p, {"x": x}, sizes, faithful=True)["y"], x.bfloat16().double())


@pytest.mark.parametrize(("dtype", "bits"), [("f32", 23), ("tf32", 10), ("bf16", 7), ("f16", 10)])
def test_rounding(dtype: str, bits: int) -> None:
    x = torch.rand(1000, dtype=torch.float64) + 1.0        # in [1, 2): the spacing is 2^-bits
    x = x if dtype == "f32" else x.float().double()        # as in kernels, which round from float32
    error = (round_to(x, dtype) - x).abs().max()
    assert 2.0 ** -(bits + 2) < float(error) <= 2.0 ** -(bits + 1)
    assert torch.equal(round_to(round_to(x, dtype), dtype), round_to(x, dtype))


def test_missing_input_is_named() -> None:
    with pytest.raises(IRError, match=re.escape("gated_delta_rule reads g, which was not given; given: k")):
        run(build(), {"k": torch.zeros(1, 1, 1)}, Sizes({"C": 1, "K": 1, "V": 1, "H": 1, "HV": 1}, [0, 1]))


def test_running_sum_backwards() -> None:
    p = traced(lambda t: t.store(Y, cumsum(t.load(X), "C", reverse=True)) and None)
    x = torch.randn(5, 1, 2, dtype=torch.float64)
    got = run(p, {"x": x}, Sizes({"C": 3, "V": 2, "H": 1, "HV": 1}, [0, 5]))["y"]
    want = torch.cat([part.flip(0).cumsum(0).flip(0) for part in (x[:3], x[3:])])
    assert torch.allclose(got, want)
