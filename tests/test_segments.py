"""Sequences cut into segments: the derived transition, the plan against the recurrence, refusals, kernels run and compiled."""
from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from gdn_ir.backends import BACKENDS
from gdn_ir.backends.triton import cross_compile
from gdn_ir.bench import inputs as model
from gdn_ir.build import Node, Tensor, Tracer, broadcast, dot, elem, reduce_sum, select, zeros
from gdn_ir.compiler import Instance, Unsupported, variant
from gdn_ir.interp import Sizes, run, run_pipeline
from gdn_ir.program import Program, ScanView
from gdn_ir.programs.gated_delta import Switches, build
from gdn_ir.reference import recurrence
from gdn_ir.schedules import defaults, steps
from gdn_ir.schedules.defaults import cuts, default, forward_by_roles, roles_in_one, segmented, segmented_roles, way_of_roles
from gdn_ir.schedules.role_solve import SHORT
from gdn_ir.schedules.plans import plan
from gdn_ir.schedules.schedule import Schedule
from gdn_ir.split import split
from gdn_ir.transition import transition
from tests import inputs
from tests.differential import interpreted

STATES = Switches(initial_state=True, final_state=True)
BF16 = Instance(Switches(final_state=True), 128, 128, "bf16", "bf16", True)


@pytest.mark.parametrize(("decay", "erase", "states"), [*itertools.product(("scalar", "none"), (True, False), (True,)),
                                                        ("scalar", True, False)])
def test_exact(decay: str, erase: bool, states: bool) -> None:
    """Against the recurrence: sequences of no chunk, of one, of whole segments and of a ragged one; V and P's columns whole,
    then split over the grid. Without states, the first segment's P is not used, nor what the last one does."""
    p = build(replace(STATES if states else Switches(), decay=decay, erase=erase))
    axes, cu = {"C": 16, "K": 5, "V": 6, "H": 1, "HV": 2, "X": 2}, [0, 85, 85, 101, 165]
    x = inputs.make(1, cu[-1], 1, 2, 5, 6, torch.float64)
    x["g"] = None if decay == "none" else x["g"]                         # type: ignore[assignment]
    S0 = states * torch.randn(4, 2, 5, 6, dtype=torch.float64)
    o, S = inputs.expected(x, S0, torch.tensor(cu), erase=erase)
    given = {n: t[0] for n, t in x.items() if t is not None} | {"initial_state": S0}
    taken = [s for s in plan("segments", erase, "f64", 16, 4, sums=decay != "none", segment=2) if s[0] != "forget"]
    kernels = list(steps.apply(p, tuple(taken)))
    assert [k.name for k in kernels[-4 - (decay != "none" or erase):]] == \
        [*(["transition"] if decay != "none" or erase else []), "offset", "compose", "scan", "output"]
    for tiled in (False, True):
        got = dict(given)
        for k in kernels:
            axis = {"transition": "K'" if erase else "", "solve": ""}.get(k.name, "V") if tiled else ""
            tiles = {axis: 4} if axis else {}
            got |= run_pipeline([split(k, axis) if axis else k], got, Sizes(axes, cu, tiles), {"scale": 5 ** -0.5})
        assert inputs.error(got["o"], o[0]) < 1e-13
        assert not states or inputs.error(got["final_state"], S) < 1e-13
    idle = {k.name: s["idle"] for k in kernels for s in k.scans() if "idle" in dict(s.attr)}
    assert idle == ({} if states else {"transition": ("first", "last"), "offset": ("last",)})


def test_an_inner_scan_ends_with_its_sequence() -> None:
    """Two scans that nest do what one does, whatever the body: here one that changes what it carries on no tokens too."""
    def decaying(chain: tuple[str, ...]) -> Program:
        t = Tracer("decaying", grid=("N", "HV"), chain=chain)
        with t.recording():
            (S,) = t.scan_chunks(lambda S: 0.5 * S + reduce_sum(t.load(Tensor("x", ("T", "HV", "V"))), "C") + 1.0, S=zeros("V"))
            t.store(Tensor("s", ("N", "HV", "V"), "f32"), S)
        return t.program()
    sizes = Sizes({"C": 4, "V": 3, "HV": 1, "X": 3}, [0, 17, 17, 29])
    x = {"x": torch.randn(29, 1, 3, dtype=torch.float64)}
    one, two = (run(decaying(c), x, sizes)["s"] for c in (("X",), ("Y", "X")))
    assert torch.equal(one, two)


# ---- what is affine, and in which axes ---------------------------------------------------------------------------------------


def body(step: object) -> tuple[Program, ScanView]:
    """A scan of a state [K, V] whose next value is step(S, k, w), k on [C, K] and w on [K]."""
    t = Tracer("body", grid=("N", "HV"))

    def once(S: Node) -> Node:
        k, w = t.load(Tensor("k", ("T", "HV", "K"))), t.load(Tensor("w", ("N", "HV", "K")))
        return step(S, k, w)                               # type: ignore[operator, no-any-return]
    with t.recording():
        (S,) = t.scan(once, S=zeros("K", "V"))
        t.store(Tensor("s", ("N", "HV", "K", "V"), "f32"), S)
    p = t.program()
    return p, ScanView.of(p.scans()[0])


def read(S: Node, k: Node, w: Node) -> Node:
    return S - dot(k, dot(k, S, "K"), "C")


@pytest.mark.parametrize(("step", "axes", "mixed"), [
    (read, ("K", "K'"), "K"),
    (lambda S, k, w: w * S + reduce_sum(k, "C"), ("K",), None),
    (lambda S, k, w: 0.5 * S + 1.0, (), None),
    (lambda S, k, w: select(elem("gt", w, 0.0), S, 7.0), ("K",), None),
    (lambda S, k, w: S + broadcast(reduce_sum(w * S, "K"), ("K", "V")), ("K", "K'"), "K"),
])
def test_axes_of_a_transition(step: object, axes: tuple[str, ...], mixed: str | None) -> None:
    found = transition(*body(step), "P")
    assert found.carry.axes == found.step.axes == axes and found.mixed == mixed


@pytest.mark.parametrize(("step", "why"), [
    (lambda S, k, w: S * S, "not affine in S"),
    (lambda S, k, w: S + dot(k, dot(k, S * S, "K"), "C"), "not affine in S"),
    (lambda S, k, w: w / (S + 1.0), "not affine in S"),
    (lambda S, k, w: reduce_sum(S, "K") + S + reduce_sum(S, "V"), "a matrix along"),
    (lambda S, k, w: S + reduce_sum(S.twin("K") * w, "K'"), "lies on K'"),
])
def test_refusals_name_the_node(step: object, why: str) -> None:
    p, _ = body(step)
    with pytest.raises(steps.IllegalStep, match=f"segment: transition: .*{why}(.|\n)*test_segments.py:\\d+"):
        steps.apply(p, (("segment", "S", 4),))


def test_refusals_of_segments() -> None:
    with pytest.raises(steps.IllegalStep, match="no kernel's scan carries a value named 'o'"):
        steps.apply(build(), (("segment", "o", 4),))
    with pytest.raises(steps.IllegalStep, match="2 chunks or more, got 1"):
        steps.apply(build(), (("segment", "S", 1),))
    with pytest.raises(Unsupported, match="tilelang lowers scans over segments of chunks as roles alone"):
        variant(BF16, Schedule("x", steps=plan("segments")), "tilelang", "sm_90")


# ---- kernels -----------------------------------------------------------------------------------------------------------------


def test_by_triton() -> None:
    """Packed, one sequence empty, outputs poisoned, with states in and out and without; P's columns and V in tiles."""
    found = interpreted([["plan", name, f"{cell}, f32", 16, 2, 32] for name, cell in (
        ("segments", "initial state"), ("segments", "no final state"), ("cut", "initial state"))])
    assert all(float(str(v.get("error", "nan"))) < 1e-6 for v in found.values()), found


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_compiles_without_a_gpu(arch: str) -> None:
    chosen = variant(BF16, segmented(arch, BF16), "triton", arch)
    assert [s.kernel for s in chosen.sources] == ["solve", "reach", "transition", "offset", "compose", "scan", "output"]
    for kernel, source in list(zip(chosen.compiled.kernels, chosen.sources, strict=True))[1:6]:
        built = cross_compile(kernel, source, arch)
        assert built.metadata.shared <= {"sm_80": 166912, "sm_90": 232448}[arch]
    assert 'input_precision="tf32x3"' in chosen.sources[4].text          # of the state, from segment to segment


@pytest.mark.parametrize("kind", ["no_decay", "correlated"])
def test_as_near_as_one_scan(kind: str) -> None:
    """Rounded as bf16 kernels round, where errors last: hardly farther from the truth than the plan that cuts nothing."""
    x = model.make([500, 0, 12], 1, 1, 32, 32, torch.bfloat16, "cpu", kind)
    ends = x.pop("cu_seqlens")
    o, S = recurrence(*(x[n][None] for n in ("q", "k", "v", "g", "beta")), 0.2, x["initial_state"], ends)
    errors = []
    for name in ("states", "segments"):
        s = Schedule(name, 16, plan(name, True, "bf16", 16, sums=True, segment=4), dot="bf16")
        got = variant(Instance(STATES, 32, 32, "bf16", "bf16", True), s, "torch", "torch").apply(x, 0.2, 3, ends)
        errors.append([inputs.error(got["o"], o[0]), inputs.error(got["final_state"], S)])
    assert all(mine <= 1.2 * theirs for theirs, mine in zip(*errors, strict=True)), errors


def test_where_a_sequence_should_be_cut() -> None:
    assert cuts("sm_90", BF16, 1, 8, 32768) and not cuts("sm_90", BF16, 1, 64, 32768)       # the grid is full
    assert not cuts("sm_90", BF16, 8, 8, 8192)                                              # short ones
    assert not cuts("sm_90", replace(BF16, K=256), 1, 8, 32768)
    assert default("sm_90", BF16, 1, 8, 32768)[0].name == "states-16"                       # until a GPU has run it


@pytest.mark.parametrize(("sequences", "heads", "tokens", "segment", "one"), [
    (1, 8, 32768, 32, False), (1, 32, 32768, 64, False), (1, 32, 8192, 32, False), (1, 8, 8192, 16, False),
    (2, 8, 32768, 32, False), (4, 8, 32768, 32, False), (8, 32, 32768, 0, True), (8, 64, 32768, 0, False),
    (8, 16, 8192, 0, True)])
def test_segments_of_roles_fill_the_gpu(sequences: int, heads: int, tokens: int, segment: int, one: bool,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """The length that was the fastest on an H100, and who makes the inverses; whole where blocks fill it. Only where few
    sequences are long."""
    assert way_of_roles(sequences, heads, tokens) == (segment, one)
    with monkeypatch.context() as m:
        m.setattr(defaults, "ROLES_IN_SEGMENTS", False)
        assert default("sm_90", BF16, 1, 8, 32768, "tilelang")[0].name == "states-32" and way_of_roles(1, 64, 32768)[0] == 0
    cut, why = default("sm_90", BF16, 1, 8, 32768, "tilelang")
    assert cut == forward_by_roles(BF16, 32) and "segments of 32 chunks; the inverses by other roles, before" in why
    assert default("sm_90", BF16, 8, 32, 8192, "tilelang")[0] == roles_in_one()             # enough blocks
    assert default("sm_90", BF16, 3, 16, 3072, "tilelang")[0] == roles_in_one()             # three quarters of a wave
    assert default("sm_90", BF16, 4, 8, 8192, "tilelang")[0].name == "states-32"            # short ones
    few, _ = default("sm_90", BF16, 1, 8, 8192, "tilelang")
    assert few == forward_by_roles(BF16, 16, chunks=SHORT)                                  # whose inverses are few


def test_roles_in_segments() -> None:
    """All before their scan is by Triton; rows of no sequence are cleared by the inverse's kernel."""
    made = variant(BF16, segmented_roles(BF16, 32), "tilelang", "sm_90").compiled
    assert [(k.name, b.name) for k, b in zip(made.kernels, made.makers, strict=True)] == [
        *((n, "triton") for n in ("solve", "reach", "transition", "offset", "compose")), ("scan", "tilelang")]
    assert made.kernels[0].sweeps and made.tails == ()
    assert made.kernels[-1].program.written() == ("o",)    # the end of the last segment is compose's
    fused = variant(BF16, forward_by_roles(BF16, 64, one=True), "tilelang", "sm_90").compiled
    assert [k.name for k in fused.kernels] == ["fade", "reach", "solve", "transition", "offset", "compose", "scan"]
    assert fused.kernels[0].sweeps and fused.tails == () and "A_beta" not in fused.kernels[-1].program.tensors()
    solve = next(k for k in fused.kernels if k.name == "solve")
    assert "does not leave out chunks" in str(BACKENDS["tilelang"].supports(solve, "sm_90"))
    first = variant(replace(BF16, switches=Switches()), segmented_roles(BF16, 32), "tilelang", "sm_90").compiled
    idle = {k.name: s["idle"] for k in first.kernels for s in k.program.scans() if "idle" in dict(s.attr)}
    assert idle == {"transition": ("first", "last"), "offset": ("last",)}
