"""What follows the backward's scans as roles: steps, its plan, its text, executed on the CPU; what nvcc makes of it."""
from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest

from gdn_ir.autodiff import backward
from gdn_ir.backends.base import SHARED, Kernel
from gdn_ir.backends.tilelang.roles import RolePrinter
from gdn_ir.backends.tilelang.runtime import lowered
from gdn_ir.bench import gradients
from gdn_ir.bench.gradients import backward_of
from gdn_ir.bench.errors import relative
from gdn_ir.cache import load_source
from gdn_ir.compiler import Unsupported, Variant, variant
from gdn_ir.coverage import Cell, Layout
from gdn_ir.interp import Sizes, run, run_pipeline
from gdn_ir.nodes import IRError
from gdn_ir.programs.gated_delta import Switches, build
from gdn_ir.schedules import steps
from gdn_ir.schedules.defaults import whole_scans
from gdn_ir.schedules.execute import execute
from gdn_ir.schedules.plans import backward_plan
from gdn_ir.schedules.role_backward import as_roles, inner_as_roles
from gdn_ir.schedules.schedule import Schedule
from gdn_ir.schedules.roles import AGAIN, BACK_ALONE, INNER, Event, Roles
from tests.differential import interpreted
from tests.test_backward import AXES, CU, FAMILY, in_f64, memory
from tests.test_role_backward import executed
from tests.test_role_kernels import TILELANG, spilled, synchronised
from tests.test_roles import unseen

STATES = Switches(initial_state=True, final_state=True)
SMALL = Cell("", STATES, "bf16", Layout((130, 0, 64, 1), True, 1, 2, 128, 128))


@lru_cache(maxsize=8)
def made_of(cell: Cell, plan: str = "turns", chunks: int = 16) -> Variant:
    instance = gradients.backward_of(cell)
    base = whole_scans("sm_90", instance, 1, 32, "triton", merges=f"gathered-{plan.removeprefix('roles-')}")[0]
    base = as_roles(base, AGAIN, BACK_ALONE) if plan.startswith("roles") else base
    return variant(instance, inner_as_roles(base, chunks=chunks), "triton", "sm_90")


def kernel_of(cell: Cell = SMALL) -> Kernel:
    return next(k for k in made_of(cell).compiled.kernels if k.name == "grads")


def test_runs() -> None:
    p = RolePrinter(kernel_of()).plan
    for chunks in (0, 1, 2, 7):
        for ragged in (False, True):
            execute(p, chunks, ragged, seeds=10)


# What other synchronisation implies: who loads has waited for d_S_free, which comes after what v_free says; a fence that a
# later one, before the same product, makes up for.
IMPLIED = {"load_values: without wait v_free", "load: without fence ragged"}


def test_nothing_derived_is_redundant() -> None:
    assert unseen(RolePrinter(kernel_of()).plan) == IMPLIED


@pytest.mark.parametrize(("lengths", "heads", "varlen", "states", "late", "plan", "chunks"), [
    ((130, 0, 64, 1), (1, 2), True, True, False, "turns", 2), ((193, 65), (2, 2), True, False, True, "turns", 16),
    ((193, 193), (1, 2), False, True, True, "turns", 2), ((330, 0, 64, 130), (1, 2), True, False, False, "merged", 2),
    ((66,), (2, 2), False, False, True, "merged", 2), ((66, 0, 64), (2, 6), True, False, True, "turns", 2),
    ((130, 0, 64, 1), (1, 2), True, True, True, "roles-turns", 2), ((193,), (2, 2), False, False, False, "roles-merged", 2)])
def test_emitted_text_computes_gradients(lengths: tuple[int, ...], heads: tuple[int, int], varlen: bool, states: bool,
                                         late: bool, plan: str, chunks: int) -> None:
    """Among the other kernels by torch, against float64: ragged tails, empty sequences, with and without states, value heads
    that share a key head or have their own; what is behind the last sequence is NaN, and all that it writes was."""
    cell = Cell("", STATES if states else Switches(), "bf16", Layout(lengths, varlen, *heads, 128, 128))
    found, want = executed(made_of(cell, plan, chunks), cell, late)
    for n, x in found.items():
        assert relative(x, want[n]) < 5e-3, n


def test_rows_of_no_sequence() -> None:
    """A block that takes heads in turn clears none, for at its end it has no head; where each has its own, outputs alone."""
    made = made_of(SMALL).compiled
    assert kernel_of().gathers and not kernel_of().owns_tail and {*made.tails} >= {"d_q", "d_k", "d_v"}
    cell = Cell("", Switches(), "bf16", Layout((130, 0, 64, 1), True, 2, 2, 128, 128))
    kernel = kernel_of(cell)
    assert kernel.owns_tail and not kernel.gathers
    text = RolePrinter(kernel).source().text
    compile(text, "grads", "exec")
    cleared = {line.strip().split("_[")[0] for line in text.splitlines() if "tail + beyond" in line and line.endswith("= 0.0")}
    assert cleared == {"d_q", "d_k", "d_v"}


def test_what_the_op_normalises() -> None:
    """Rows are normalised before, and gradients of the normalised ones made after it, by other kernels."""
    cell = Cell("", replace(STATES, l2norm=True), "bf16", Layout((130, 0, 64, 1), True, 1, 2, 128, 128))
    made = made_of(cell, "roles-turns", 2)
    assert [k.name for k in made.compiled.kernels] == ["norm", "solve", "again", "back", "grads", "rows", "unnorm"]
    found, want = executed(made, cell, True)
    for n, x in found.items():
        assert relative(x, want[n]) < 5e-3, n


@pytest.mark.parametrize(("kind", "most"), [("correlated", 7e-3), ("strong_decay", 2.1e-3)])
def test_what_cancels_has_digits_to_spare(kind: str, most: float) -> None:
    """The decay's gradient is row sums less column sums, of which most cancels: of tiles in one part 1.1e-2, 2.5e-3."""
    cell = Cell("", Switches(), "bf16", Layout((320,), True, 1, 2, 128, 128))
    found, want = executed(made_of(cell), cell, False, kind)
    assert relative(found["g"], want["g"]) < most


@pytest.mark.parametrize("varlen", [True, False])
def test_cuda(tmp_path: Path, varlen: bool) -> None:
    """It synchronises as planned, and nvcc leaves products asynchronous."""
    made = kernel_of(SMALL if varlen else Cell("", Switches(), "bf16", Layout((330, 330), False, 2, 4, 128, 128)))
    source = TILELANG.emit(made, "sm_90")
    function = getattr(load_source("tilelang", source.kernel, source.hash, source.text), source.kernel)
    cuda, shared = lowered(function, "sm_90", TILELANG.flags(made))
    assert shared + 1024 <= SHARED["sm_90"]                # its barriers have the rest
    synchronised(made, cuda)
    assert spilled(tmp_path, cuda) == 0


@pytest.mark.parametrize("plan", ["merged", "turns"])
@pytest.mark.parametrize(("decay", "erase"), FAMILY)
def test_steps_are_exact(plan: str, decay: str, erase: bool) -> None:
    """In the interpreter: products last, in parts, sums of rows apart, two chunks to a block."""
    p = backward(build(Switches(decay=decay, erase=erase, initial_state=True, final_state=True)))
    more = (("products_last", "grads"), ("in_parts", "grads", "f64"), ("rows_after", "grads", "rows"), ("walk", "grads", 2))
    sizes = Sizes(AXES | {"X": 2}, CU)
    given = memory(p, sizes)
    want = run(p, given, sizes, {"scale": 0.7})
    got = given | run_pipeline(list(steps.apply(p, (*in_f64(backward_plan(f"gathered-{plan}", p, chunk=16, block=4)), *more))),
                               given, sizes, {"scale": 0.7})
    for n in (n for n in want if n.startswith("d_")):
        assert float((got[n] - want[n]).abs().max()) < 1e-10, n


def test_what_the_steps_refuse() -> None:
    p = backward(build(Switches()))
    plan = backward_plan("gathered-turns", p)
    for more, why in (((("products_last", "inner"),), "products_last: no kernel is named 'inner'"),
                      ((("in_parts", "inner", "bf16"),), "in_parts: no kernel is named 'inner'"),
                      ((("walk", "back", 8),), "walk: back must be one scan, which runs all chunks at once"),
                      ((("walk", "grads", 0),), "a block must take a chunk or more, got 0"),
                      ((("rows_after", "solve", "rows"),), "nothing that it stores is made of sums along rows alone"),
                      ((("walk", "grads", 8), ("rows_after", "grads", "rows")), "rows_after: grads must be one scan")):
        with pytest.raises(steps.IllegalStep, match=why):
            steps.apply(p, (*plan, *more))
    base = whole_scans("sm_90", gradients.backward_of(SMALL), 1, 32, "triton")[0]
    with pytest.raises(ValueError, match="accepts a schedule of the plans gathered-merged and gathered-turns"):
        inner_as_roles(base)


@pytest.mark.parametrize(("decay", "erase"), FAMILY)
def test_layout_and_what_is_made_again_change_nothing(decay: str, erase: bool) -> None:
    p = backward(build(Switches(decay=decay, erase=erase, initial_state=True, final_state=True)))
    plan = in_f64(backward_plan("gathered-turns", p))
    parts = steps.apply(p, (*plan, ("rows_after", "grads", "rows")))
    u, beta = ("u" in parts[-1].tensors() or "u" in parts[-2].tensors(), "beta_kept" in parts[-1].read())
    sizes = Sizes(AXES | {"X": 2}, CU)
    given = memory(p, sizes)
    want = run(p, given, sizes, {"scale": 0.7})
    more = [("rows_after", "grads", "rows")]
    more += [("members_apart", "u", "H")] if u else []
    more += [("made_again", "rows", "beta_kept")] if beta else []
    assert (u, beta) == (erase, erase and decay != "none")
    made = steps.apply(p, (*plan, *more))
    assert "beta_kept" not in made[-1].read()
    got = given | run_pipeline(list(made), given, sizes, {"scale": 0.7})
    for n in (n for n in want if n.startswith("d_")):
        assert float((got[n] - want[n]).abs().max()) < 1e-10, n


def test_heads_first_of_batches_and_of_packed_sequences() -> None:
    """By Triton's interpreter: of a batch all sequences' tokens of a head lie together."""
    names = [f"gated delta rule, f32, {layout}" for layout in ("dense", "varlen", "GVA")]
    found = interpreted([["heads first", n, "gathered-turns"] for n in names])
    assert all(float(str(v.get("error", "nan"))) < 2e-5 for v in found.values()), found
    kernels = variant(backward_of(replace(SMALL, layout=replace(SMALL.layout, lengths=(64, 64), varlen=False))), Schedule(
        "x", 64, (*backward_plan("gathered-turns", backward_of(SMALL).program), ("heads_first",))), "triton", "sm_90").compiled
    assert any("i_HV * (N * T)" in s.text for s in kernels.sources)


def test_what_layouts_and_what_is_made_again_refuse() -> None:
    p = backward(build(Switches(final_state=True)))
    plan = (*backward_plan("gathered-turns", p), ("rows_after", "grads", "rows"))
    for step, why in ((("members_apart", "d_q", "H"), "accepts a temporary with rows of points that share H"),
                      (("members_apart", "S_kept", "H"), "got 'S_kept', 'H'; accepts a temporary with rows"),
                      (("members_apart", "u", "K"), "rows of points that share K"),
                      (("made_again", "rows", "G"), "G is not made of inputs' rows alone"),
                      (("made_again", "rows", "u"), "got 'u'; accepts a temporary that rows reads, of G, beta_kept"),
                      (("made_again", "scan", "G"), "no kernel is named 'scan'")):
        with pytest.raises(steps.IllegalStep, match=why):
            steps.apply(p, (*plan, step))
    instance = gradients.backward_of(SMALL)
    base = whole_scans("sm_90", instance, 1, 32, "triton", merges="gathered-turns")[0]
    laid = replace(base, steps=(*base.steps, ("members_apart", "u", "H")))
    with pytest.raises(IRError, match="u: members of its groups lie apart, which roles alone read and write"):
        assert variant(instance, laid, "triton", "sm_90").sources


def changed(before: str, after: str) -> Roles:
    """The shipped roles with one event replaced (or, with "", left out)."""
    return replace(INNER, roles=tuple(replace(r, events=tuple(
        Event.of(after) if str(e) == before else e for e in r.events if after or str(e) != before)) for r in INNER.roles))


@pytest.mark.parametrize(("roles", "why"), [
    (changed("fetch G", "fetch G early"), "what comes next may be another member's"),
    (replace(INNER, rings=tuple(replace(r, depth=2) if r.values == ("d_q16",) else r for r in INNER.rings)),
     "d_q16 is stored summed: it must be rounded, and have a ring of one slot"),
    (replace(INNER, rings=tuple(r for r in INNER.rings if r.values[0] != "Y")), "dk reads Y, .* it needs a ring"),
    (changed("store row1", "store d_v"), "dq reads d_v16, which values makes: it needs a ring")])
def test_declines(roles: Roles, why: str) -> None:
    instance = gradients.backward_of(SMALL)
    base = whole_scans("sm_90", instance, 1, 32, "triton", merges="gathered-turns")[0]
    with pytest.raises(Unsupported, match=why):
        variant(instance, inner_as_roles(base, roles), "triton", "sm_90")
