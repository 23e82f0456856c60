"""Every rewrite rule keeps value and type, on random values that it fits; and together, on whole random programs."""
from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn_ir.build import broadcast, cast, cumsum, dot, elem, exp, index, reduce_sum, select, sigmoid, tri_solve
from gdn_ir.interp import Sizes, run
from gdn_ir.nodes import At, Node, Op, Rows, Slot, Tensor, Tile, make
from gdn_ir.program import Program
from gdn_ir.rewrite import SIMPLIFY, simplify
from tests import programs
from tests.differential import distance

AXES, LENGTHS = {"C": 4, "K": 3, "V": 5, "H": 1, "HV": 1}, [0, 4, 7]
SIZES = Sizes(AXES, LENGTHS)


def load(name: str, *axes: str) -> Node:
    dims = ("T", "HV", *(a for a in axes if a != "C"))
    return make(Op.LOAD, tensor=Tensor(name, dims), index=(Rows(("X",), "C"), At("HV"), *(Tile(a) for a in axes if a != "C")))


LEAVES = [load("g", "C"), load("k", "C", "K"), load("v", "C", "V"), load("w", "C", "K", "V")]
i, j = index("C"), index("C'")


@st.composite
def values(draw: st.DrawFn, depth: int = 2) -> Node:
    """A tile: a load, or arithmetic on tiles."""
    if depth == 0 or draw(st.booleans()):
        return draw(st.sampled_from(LEAVES))
    x, y = draw(values(depth - 1)), draw(values(depth - 1))
    return draw(st.sampled_from([x + y, x * y, x - 0.5, 2.0 * x, sigmoid(x), x.twin("C") * y,
                                 select(elem("gt", x, 0.0), x, y)]))


squares = st.builds(lambda x, y: x * y.twin("C"), st.just(LEAVES[0]), st.sampled_from([LEAVES[0], 0.3 * LEAVES[0]]))
numbers = st.sampled_from([-1.5, 0.0, 0.25, 1.0, 3.0])
conditions = st.sampled_from([elem("ge", i, j), elem("gt", i, j), elem("gt", LEAVES[1], 0.1)])


def other(x: Node, value: float, spread: bool) -> Node:
    """A constant beside x: bare, or spread over x's axes."""
    return broadcast(value, x.axes) if spread else make(Op.CONST, value=value)


def zero(x: Node) -> Node:
    return broadcast(0.0, x.axes)


# for each rule, values that it fits
FITS: dict[str, st.SearchStrategy[Node]] = {
    "add_zero": st.builds(lambda x, s, f: x + other(x, 0.0, s) if f else other(x, 0.0, s) + x,
                          values(), st.booleans(), st.booleans()),
    "sub_zero": st.builds(lambda x, s: x - other(x, 0.0, s), values(), st.booleans()),
    "sub_self": st.builds(lambda x: x - x, values()),
    "mul_one": st.builds(lambda x, s, f: x * other(x, 1.0, s) if f else other(x, 1.0, s) * x,
                         values(), st.booleans(), st.booleans()),
    "mul_zero": st.builds(lambda x, s: x * other(x, 0.0, s), values(), st.booleans()),
    "fold": st.builds(lambda fn, a, b: elem(fn, broadcast(a, ("C", "K")), broadcast(b, ("C",))),
                      st.sampled_from(["add", "sub", "mul", "max", "min"]), numbers, numbers),
    "sum_of_zeros": st.one_of(
        st.builds(lambda x: cumsum(zero(x), "C"), st.sampled_from(LEAVES)),
        st.builds(lambda x: reduce_sum(zero(x), "C"), st.sampled_from(LEAVES)),
        st.builds(lambda x, y, f: dot(zero(x), y, "C") if f else dot(y, zero(x), "C"),
                  st.sampled_from(LEAVES), st.sampled_from(LEAVES), st.booleans()),
        st.builds(lambda m: tri_solve(select(elem("gt", i, j), m, 0.0), broadcast(0.0, ("C", "V"))), squares)),
    "solve_without_matrix": st.builds(lambda r: tri_solve(broadcast(0.0, ("C", "C'")), r), st.sampled_from(LEAVES)),
    "twin_of_twin": st.one_of(st.builds(lambda x: x.twin("C").twin("C"), values()),
                              st.builds(lambda a: broadcast(a, ("C", "K")).twin("C"), numbers),
                              st.just(reduce_sum(LEAVES[1], "C").twin("C"))),
    "twin_of_index": st.just(make(Op.TWIN, (i,), axis="C")),
    "broadcast_of_broadcast": st.builds(lambda x: make(Op.BROADCAST, (broadcast(x, (*x.axes, "V")),),
                                                       axes=tuple(sorted({*x.axes, "V", "K"}))), st.just(LEAVES[0])),
    "implicit_broadcast": st.builds(lambda x: x + broadcast(LEAVES[0], x.axes), st.sampled_from(LEAVES[1:])),
    "same_branches": st.builds(lambda c, x: select(c, x, x), conditions, values()),
    "masked_exp_of_constant": st.builds(lambda c, a, b: exp(select(c, a, b)), conditions, numbers, st.just(-math.inf)),
    "mul_by_mask": st.builds(lambda c, x, f: select(c, 1.0, 0.0) * x if f else x * select(c, 1.0, 0.0),
                             conditions, values(), st.booleans()),
    "masks_meet": st.builds(lambda x, y: select(elem("gt", i, j), x * select(elem("ge", i, j), y, 0.0), 0.0), squares, squares),
    "cast_of_cast": st.builds(lambda x, d, w: cast(cast(cast(x, d), w), d), values(), st.sampled_from(["bf16", "f16"]),
                              st.sampled_from(["f32", "f64"])),
}


def meaning(x: Node, faithful: bool = False) -> torch.Tensor:
    """The value of a tile in every chunk, by the interpreter."""
    out = Tensor("out", ("X", "HV", *x.axes))
    store = make(Op.STORE, (x,), tensor=out, index=(Slot(("X",), "C"), At("HV"), *(Tile(a) for a in x.axes)), sum=())
    scan = make(Op.SCAN, (store,), axis="X", chain=("X",), tile="C", carries=(), reverse=False)
    generator = torch.Generator().manual_seed(0)
    p = Program("one", ("N", "HV"), (scan,))
    given_ = {n.name: torch.randn([SIZES.dim(d) for d in n.dims], generator=generator, dtype=torch.float64)
              for leaf in LEAVES for n in [leaf["tensor"]]}
    return run(p, given_, SIZES, faithful=faithful)["out"]


def test_every_rule_is_tested() -> None:
    assert set(FITS) == set(SIMPLIFY)


@pytest.mark.parametrize("name", FITS)
def test_rule(name: str) -> None:
    """The rule fits (or it would not be tested), and what it makes has the same type and value."""
    fitted = []

    @settings(max_examples=25)
    @given(FITS[name])
    def check(x: Node) -> None:
        new = SIMPLIFY[name](x)
        if new is None:                                    # such as 0 - 0, which is folded before it is drawn as a leaf
            return
        fitted.append(x)
        assert new.type == x.type or (new.op is Op.CONST and not x.axes)
        faithful = name == "cast_of_cast"                  # with casts that do nothing there is nothing to see
        a, b = meaning(x, faithful), meaning(new, faithful)
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)
    check()
    assert fitted, f"{name} fits none of its examples"


@pytest.mark.parametrize("seed", range(40))
def test_programs_keep_their_meaning(seed: int) -> None:
    case = programs.rand(seed)
    want = run(case.program, case.inputs(), case.sizes())
    assert distance(run(simplify(case.program), case.inputs(), case.sizes()), want) < 1e-12


def wrong(n: Node) -> Node | None:
    """x * y -> x, whatever y is."""
    return broadcast(n.args[0], n.axes) if n.op is Op.ELEM and n["fn"] == "mul" else None


def test_the_check_would_notice() -> None:
    rule: Callable[[Node], Node | None] = wrong
    x = LEAVES[1] * LEAVES[0]
    new = rule(x)
    assert new is not None and not torch.allclose(meaning(x), meaning(new), equal_nan=True)
