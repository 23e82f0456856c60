"""The backward's two scans cut into segments, the adjoint's in reverse: against the recurrence's autograd, in the interpreter
and by emitted kernels; what has faded; refusals; compiled."""
from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from gdn_ir.autodiff import backward
from gdn_ir.backends.triton import cross_compile
from gdn_ir.bench import adjoints as bench
from gdn_ir.bench.errors import worst
from gdn_ir.bench.gradients import FULL, backward_of, check, expected, make
from gdn_ir.compiler import Instance, variant
from gdn_ir.coverage import Cell, Layout
from gdn_ir.interp import Sizes, run_pipeline
from gdn_ir.program import Program
from gdn_ir.programs.gated_delta import Switches, build
from gdn_ir.schedules import defaults, steps
from gdn_ir.schedules.adjoints import PLANS, in_segments as cut, segment_of
from gdn_ir.schedules.defaults import default, whole_scans
from gdn_ir.schedules.forget import FADED
from gdn_ir.schedules.plans import Steps, backward_plan
from gdn_ir.schedules.schedule import KernelOptions, Schedule
from gdn_ir.schedules.segments import segments
from gdn_ir.split import split
from tests import inputs
from tests.differential import interpreted
from tests.test_backward import spilled

CHUNK, SEGMENT = 16, 3                                     # segments of 48 tokens
GRADS = ("q", "k", "v", "g", "beta")
BF16 = Instance(Switches(), 128, 128, "bf16", "bf16", True, GRADS, True)
# no chunk, a token, a whole segment, one and a token, and some that end within one
RAGGED = Cell("ragged", FULL, "f64", Layout((0, 130, 1, 48, 49, 0, 97), True, 1, 3, 5, 6))


def by_interpreter(cell: Cell, x: dict[str, torch.Tensor], p: Program, plan: Steps, tiles: bool = False) \
        -> dict[str, torch.Tensor]:
    """All that the kernels of a plan store, in float64. tiles: V and P's columns are split over the grid, where they may be."""
    lay = cell.layout
    axes = {"C": CHUNK, "K": lay.K, "V": lay.V, "H": lay.H, "HV": lay.HV, "X": SEGMENT}
    got = {n: t for n, t in x.items() if n in p.read()}
    cu = x["cu_seqlens"].tolist()
    for k in steps.apply(p, plan):
        axis = "K'" if k.name.endswith("transition") and cell.switches.erase else \
            "V" if k.name.startswith(("again", "back")) and k.name.endswith(("again", "back", "offset", "compose")) else ""
        axis = axis if tiles else ""
        got |= run_pipeline([split(k, axis) if axis else k], got, Sizes(axes, cu, {axis: 4} if axis else {}),
                            {"scale": lay.K ** -0.5})
    return got


def in_segments(p: Program, io: str = "f64", keep: str = "nothing", name: str = "segments") -> Steps:
    return backward_plan(name, p, io, CHUNK, 4, keep, segment=SEGMENT)


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("decay", "erase"), [("scalar", True), ("none", True), ("scalar", False), ("none", False)])
def test_exact(decay: str, erase: bool, name: str, states: bool, tiles: bool) -> None:
    """Without states the first segment's transition is not used, nor what the last does; in reverse, the other way round."""
    s = replace(FULL if states else Switches(), decay=decay, erase=erase)
    cell = replace(RAGGED, switches=s)
    x = make(cell, tail=0)
    p = backward(build(s))
    plan = tuple(t for t in in_segments(p, name=name) if t[0] != "forget" and "back_reach" not in t)
    got = by_interpreter(cell, x, p, plan, tiles)
    grads = tuple(n for n in (*GRADS, "initial_state") if f"d_{n}" in p.written())
    want = expected(cell, x, grads)
    assert len(grads) >= 4 and all(inputs.error(got[f"d_{n}"], want[n]) < 1e-12 for n in grads)
    idle = {k.name: t["idle"] for k in steps.apply(p, plan) for t in k.scans() if "idle" in dict(t.attr)}
    moves = decay != "none" or erase
    still = {"again_transition": ("last",), "again_offset": ("last",)} if states else \
        {"again_transition": ("first", "last"), "again_offset": ("last",),
         "back_transition": ("last", "first"), "back_offset": ("first",)}
    assert idle == {k: v for k, v in still.items() if moves or "offset" in k}


def test_a_transition_in_reverse_is_the_transpose() -> None:
    """Of the adjoint and of the state, over the same segment."""
    x = make(RAGGED, tail=0)
    p = backward(build(FULL))
    got = by_interpreter(RAGGED, x, p, tuple(t for t in in_segments(p) if t[0] != "forget"))
    back, again = (got[n][1:3] for n in ("P_d_S", "P_S_again"))          # of the first sequence, but for its last
    assert (back.diagonal(dim1=-2, dim2=-1) < 0.999).any() and torch.allclose(back, again.mT, atol=1e-12)


def fading(norm: float = 1.0) -> tuple[Cell, dict[str, torch.Tensor]]:
    """Heads of which the first fades within two chunks, the second within a segment, the last hardly."""
    cell = replace(RAGGED, layout=replace(RAGGED.layout, lengths=(250, 0, 96, 9)))
    x = make(cell, tail=0)
    x["g"] = torch.tensor([-1.1, -0.5, -1e-4], dtype=torch.float64).expand_as(x["g"]).contiguous()
    x["k"] = norm * x["k"]
    return cell, x


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("norm", [1.0, 2.0])
def test_what_has_faded_is_left_out(norm: float, name: str) -> None:
    """From the end that each scan reaches: of a segment's last chunks, and in reverse of its first; not where keys stretch."""
    cell, x = fading(norm)
    p = backward(build(FULL))
    got = by_interpreter(cell, x, p, in_segments(p, name=name))
    want = expected(cell, x, (*GRADS, "initial_state"))
    assert all(inputs.error(got[f"d_{n}"], w) < 10 * math.exp(-FADED) for n, w in want.items())
    if norm == 1.0:
        assert got["again_within"][0].tolist() == got["back_within"][0].tolist() == [2, 3, 3]
        assert (got["P_d_S"].abs().amax((-2, -1)) > 0)[0].tolist() == [False, False, True]
    else:
        assert (got["P_d_S"].abs().amax((-2, -1)) > 0)[0].tolist() == [False, True, True]


def test_it_looks_from_the_right_end() -> None:
    """A head that forgets only in a segment's first chunk: all of it is within the state's reach, that chunk alone within the
    adjoint's. With less left in than is within reach, gradients are wrong."""
    cell, x = fading()
    x["g"] = torch.full_like(x["g"], -1e-4)
    x["g"][:16] = -2.0
    p = backward(build(FULL))
    got = by_interpreter(cell, x, p, in_segments(p))
    assert got["again_within"][0].tolist() == [3] * 3 and got["back_within"][0].tolist() == [1] * 3
    want = expected(cell, x, GRADS)
    assert all(inputs.error(got[f"d_{n}"], w) < 10 * math.exp(-FADED) for n, w in want.items())
    early = tuple((*t, 1) if t[0] == "forget" else t for t in in_segments(p))
    x["g"] = torch.full_like(x["g"], -0.05)
    want, soon = expected(cell, x, GRADS), by_interpreter(cell, x, p, early)
    assert worst(inputs.error(soon[f"d_{n}"], w) for n, w in want.items()) > 1e-4


def test_what_leads_to_the_adjoint_lies_between() -> None:
    """Of the plan "gathered-segments": each kernel, and whether it runs beside the one before it."""
    schedule = cut(whole_scans("sm_90", BF16, 1, 4, "triton", gathers=True)[0], BF16, 32)
    kernels = {k.name: k.beside for k in variant(BF16, schedule, "triton", "sm_90").compiled.kernels}
    assert [("beside " if x else "") + n for n, x in kernels.items()] == [
        "solve", "again_reach", "beside back_reach", "again_transition", "beside again_offset", "beside back_transition",
        "beside local", "again_compose", "beside back_offset", "back_compose", "beside again", "back", "inner", "heads",
        "beside grads"]
    local = next(k for k in steps.apply(BF16.program, schedule.steps) if k.name == "local")
    assert set(local.read()) == {"G", "q", "k", "d_o"} and set(local.written()) == {"d_u_o"}
    turns = cut(whole_scans("sm_90", BF16, 1, 4, "triton", merges="gathered-turns")[0], BF16, 32, "gathered-turns-segments")
    made = variant(BF16, turns, "triton", "sm_90").compiled.kernels
    assert [k.name for k in made] == [n for n in kernels if n not in ("inner", "heads")]
    assert [k.beside for k in made[:-1]] == [x for n, x in kernels.items()][:len(made) - 1] and made[-1].turns


@pytest.mark.parametrize(("taken", "why"), [
    (("inner", "back"), r"inner and back, which comes before it, meet in (d_r|d_S)\n  in .*:\d+"),
    (("back", "local"), r"back and local, which comes before it, meet in d_u_o"),
    (("again", "back"), "back must come before again, got solve, local, again, back"),
    (("again", "outer"), "outer must come before again"),
])
def test_what_cannot_be_moved(taken: tuple[str, str], why: str) -> None:
    p = backward(build(Switches()))
    with pytest.raises(steps.IllegalStep, match=f"move: {why}"):
        steps.apply(p, (*backward_plan("gathered", p), ("move", *taken)))


def test_what_is_given_needs_no_scan_again() -> None:
    p = backward(build(Switches()))
    names = {keep: [k.name for k in steps.apply(p, in_segments(p, keep=keep))] for keep in ("nothing", "inverse", "states")}
    assert [n for n in names["nothing"] if n.startswith("again")] == \
        [f"again{x}" for x in ("_reach", "_transition", "_offset", "_compose", "")]
    assert "again_compose" in names["inverse"] and not any(n.startswith("again") for n in names["states"])
    assert all("back_compose" in found for found in names.values())


def test_segments_of_two_lengths_are_refused() -> None:
    p = backward(build(Switches()))
    plan = tuple((*t[:2], 4, *t[3:]) if t[:2] == ("segment", "d_S") else t for t in in_segments(p))
    with pytest.raises(steps.IllegalStep, match="cut alike, got segments of 3 and 4 chunks"):
        segments(plan)


def test_kernels_of_one_name_are_refused() -> None:
    p = backward(build(Switches()))
    plan = tuple(t[:4] if t[0] == "segment" else t for t in in_segments(p))
    with pytest.raises(steps.IllegalStep, match="a kernel compose, offset, transition already: name these by a `prefix`"):
        steps.apply(p, plan)


# ---- kernels -----------------------------------------------------------------------------------------------------------------

SMALL = Layout((200, 0, 1, 129), True, 1, 3, 16, 16)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("given", ["model", "strong_decay"])
def test_by_torch(given: str, name: str) -> None:
    for io in ("f64", "f32"):
        cell = Cell("small", FULL, io, SMALL)
        instance = backward_of(cell)
        schedule = Schedule("x", CHUNK, in_segments(instance.program, io, name=name))
        found = check(cell, "torch", "torch", kind=given, schedule=schedule)["errors"]
        assert worst(found.values()) < {"f64": 1e-8, "f32": 1e-4}[io], found


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("keep", ["inverse", "states"])
def test_what_is_given(keep: str, name: str) -> None:
    """With the states given the adjoint's scan alone is cut."""
    cell = Cell("given", FULL, "f32", replace(SMALL, lengths=(400, 0, 1, 129)))
    program = backward_of(cell, keep=keep).program
    schedule = Schedule("x", steps=backward_plan(name, program, "f32", keep=keep, segment=2))
    found = check(cell, "torch", "torch", schedule=schedule, keep=keep)["errors"]
    assert worst(found.values()) < 1e-4, found


def test_by_triton() -> None:
    """Packed, one sequence empty, outputs poisoned, with states in and out and without; P's columns and V in tiles; and a
    sequence of more segments, in most of which only what is near the end counts. (There d_g, a sum of differences, is off by
    4e-5 under any plan.)"""
    found = interpreted([*(["backward", cell, 32, name, [1, 2], False, 2]
                           for cell, name in (("initial state, f32", "segments"), ("no final state, f32", "segments"),
                                              ("no final state, f32", "gathered-segments"),
                                              ("no final state, f32", "gathered-turns-segments"))),
                         *(["backward", "initial state, f32", 32, name, [1, 2], False, 3, 500, "strong_decay"]
                           for name in PLANS)])
    assert all(float(str(v.get("error", "nan"))) < (1e-4 if "strong_decay" in n else 1e-5) for n, v in found.items()), found


@pytest.mark.parametrize(("switches", "gathers"), [(Switches(), False), (FULL, False), (Switches(), True)])
def test_compiles_without_a_gpu(switches: Switches, gathers: bool) -> None:
    """Every kernel around the two scans, with shared memory for two blocks to a multiprocessor, and without a spill, but for 8
    bytes of what composes."""
    instance = replace(BF16, switches=switches)
    plan = PLANS[1] if gathers else PLANS[2]
    schedule = cut(whole_scans("sm_90", instance, 1, 4, "triton", gathers)[0], instance, 32, plan)
    chosen = variant(instance, schedule, "triton", "sm_90")
    scans = [f"{s}{x}" for s in ("again", "back") for x in ("_reach", "_transition", "_offset", "_compose", "")]
    if not gathers:
        assert [s.kernel for s in chosen.sources] == ["solve", *scans[:5], "local", "heads", *scans[5:], "inner", "grads"]
    for kernel, source in zip(chosen.compiled.kernels, chosen.sources, strict=True):
        if kernel.name in (*scans, "local"):
            made = cross_compile(kernel, source, "sm_90")
            assert 2 * (made.metadata.shared + 1024) <= 233472
            assert spilled(made.asm["ptx"]) <= (8 if kernel.name.endswith("compose") else 0)


@pytest.mark.parametrize("heads", [8, 16, 32])
def test_scans_beside_each_other_share_a_multiprocessor(heads: int) -> None:
    """Of the plan "gathered": without a spill, and where their blocks do not each have one, with shared memory for both."""
    schedule = whole_scans("sm_90", BF16, 1, heads, "triton", gathers=True)[0]
    chosen, shared, blocks = variant(BF16, schedule, "triton", "sm_90"), 0, 0
    for kernel, source in zip(chosen.compiled.kernels, chosen.sources, strict=True):
        if kernel.name in ("again", "back"):
            made = cross_compile(kernel, source, "sm_90")
            assert spilled(made.asm["ptx"]) == 0
            shared, blocks = shared + made.metadata.shared + 1024, blocks + heads * 128 // kernel.columns
    assert (blocks > defaults.MULTIPROCESSORS["sm_90"]) == (heads == 32) and (heads < 32 or shared <= 233472)


@pytest.mark.parametrize("kind", ["no_decay", "real"])
def test_as_near_as_whole_scans(kind: str) -> None:
    """Rounded as bf16 kernels round: in the mean hardly farther from the truth than the plan that cuts nothing. (A single d_g,
    a sum of differences, errs by half to twice the mean under either.)"""
    errors: dict[str, list[dict[str, float]]] = {"grouped": [], "segments": [], "gathered": [], "gathered-segments": [],
                                                 "gathered-merged": [], "gathered-turns": [],
                                                 "gathered-turns-segments": []}
    for length in (500, 440, 380, 320):
        cell = Cell("x", FULL, "bf16", Layout((length, 0, 12), True, 1, 2, 32, 32))
        program = backward_of(cell).program
        for name, found in errors.items():
            s = Schedule(name, CHUNK, backward_plan(name, program, "bf16", CHUNK, segment=4), dot="bf16")
            found.append(check(cell, "torch", "torch", kind=kind, schedule=s)["errors"])
    whole, *others = ({n: sum(e[n] for e in found) / 4 for n in found[0]} for found in errors.values())
    assert all(mine[n] <= 1.2 * whole[n] for mine in others for n in mine), errors


def test_the_bench_has_candidates_of_each_plan() -> None:
    """All of which compile to kernels; one that changes an option stays beside what it was beside."""
    change = ("again", KernelOptions(16, 4, 2))
    for shape in bench.SHAPES[0], bench.SHAPES[3]:
        found = bench.candidates(bench.TIMED, [16], [change, ("back_compose", KernelOptions(32, 8, 2))], shape)
        assert {n.split(",")[0] for n in found} == \
            {"grouped", "gathered", "gathered-merged", "gathered-turns", "backward-segments-16",
             "backward-gathered-segments-16", "backward-gathered-turns-segments-16"}
        made = {n: variant(bench.TIMED, s, "triton", "sm_90").compiled.kernels for n, s in found.items()}
        changed = [k for n, ks in made.items() if n.startswith("backward-gathered-segments-16, again ")
                   for k in ks if k.name == "again"]
        assert [(k.beside, k.options.num_stages) for k in changed] == [(True, 2)]


def test_where_scans_should_be_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few heads over many tokens; not where blocks fill the GPU, nor what no GPU has run."""
    schedule, why = default("sm_90", BF16, 1, 4, 32768)
    assert schedule.name == "backward-gathered-turns-segments-32" and "segments of 32 chunks" in why
    assert default("sm_90", BF16, 8, 32, 32768)[0].name == "backward-gathered-turns-32"
    assert default("sm_90", replace(BF16, keep="states"), 1, 4, 32768)[0].name == "backward-gathered-turns-16, given states"
    assert default("sm_90", replace(BF16, grads=("q",)), 1, 4, 32768)[0].name == "backward-16"
    assert default("sm_90", replace(BF16, io="f16", beta="f16"), 1, 4, 32768)[0].name == "backward-gathered-turns-16"
    assert default("sm_90", replace(BF16, io="f32", beta="f32"), 8, 32, 32768)[0].name == "backward-32"
    assert segment_of(1, 4, 32768, 132) and not segment_of(8, 8, 8192, 132) and not segment_of(1, 8, 32768, 132)
    monkeypatch.setattr(defaults, "BACK_IN_SEGMENTS", False)
    assert default("sm_90", BF16, 1, 4, 32768)[0].name == "backward-gathered-turns-16"
