"""A backward with finer arithmetic, by roles and by Triton: its steps, the text of roles' scans, what they err less, what nvcc
makes of them."""
from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest

from gdn_ir.autodiff import backward
from gdn_ir.backends.base import SHARED
from gdn_ir.backends.tilelang.roles import RolePrinter
from gdn_ir.backends.tilelang.runtime import lowered
from gdn_ir.bench import gradients
from gdn_ir.build import elem
from gdn_ir.bench.errors import relative
from gdn_ir.bench.experiments.roundings import draw
from gdn_ir.cache import load_source
from gdn_ir.compiler import Instance, Variant, variant
from gdn_ir.coverage import Cell, Layout
from gdn_ir.interp import Sizes, run, run_pipeline
from gdn_ir.nodes import LEFT, Op
from gdn_ir.programs.gated_delta import Switches, build
from gdn_ir.schedules import steps
from gdn_ir.schedules.defaults import default, whole_scans
from gdn_ir.schedules.execute import execute
from gdn_ir.schedules.plans import KEEP, Steps, backward_plan, finer, left, plan
from gdn_ir.schedules.role_backward import (BACK_ONLY, BOTH, FINER, FINEST, Way, as_roles, inner_as_roles, served,
                                            the_rest_by)
from gdn_ir.schedules.roles import AGAIN, BACK_ALONE
from gdn_ir.schedules.schedule import Schedule
from gdn_ir.schedules.trades import diagonal
from tests.test_backward import AXES, CU, in_f64, memory
from tests.test_role_backward import executed
from tests.test_role_kernels import TILELANG, spilled, synchronised
from tests.test_roles import unseen

STATES = Switches(initial_state=True, final_state=True)
SMALL = Cell("", STATES, "bf16", Layout((130, 0, 64, 1), True, 1, 2, 128, 128))
NO_STATE = replace(SMALL, switches=Switches())
WAYS = (Way(aside=True, walk=2), Way(BOTH, True, walk=2), Way(segment=2, walk=2))


@lru_cache(maxsize=8)
def made_of(cell: Cell, way: Way, inverses: bool = True) -> Variant:
    instance = gradients.backward_of(cell)
    turns = whole_scans("sm_90", instance, 1, 32, "triton", merges="gathered-turns")[0]
    return variant(instance, served(turns, instance, way, inverses), "triton", "sm_90")


@pytest.mark.parametrize("plan", ["gathered-turns", "gathered-turns-segments", "states"])
@pytest.mark.parametrize("more", [(("scale_last",),), FINER, FINEST, (("scale_last",), *FINEST)], ids=str)
def test_steps_are_exact(plan: str, more: tuple[tuple[str, ...], ...]) -> None:
    """In the interpreter, where nothing rounds; the scale last where a state's gradient comes in is refused."""
    p = backward(build(Switches(initial_state=True, final_state=more[0] != ("scale_last",))))
    sizes = Sizes(AXES | {"X": 2}, CU)
    given = memory(p, sizes)
    want = run(p, given, sizes, {"scale": 0.7})
    made = (*in_f64(backward_plan(plan, p, "f64", chunk=16, block=4, segment=2)), *in_f64_too(more))
    got = given | run_pipeline(list(steps.apply(p, made)), given, sizes, {"scale": 0.7})
    for n in (n for n in want if n.startswith("d_")):
        assert float((got[n] - want[n]).abs().max()) < (1e-8 if plan.endswith("segments") else 1e-10), n


def in_f64_too(more: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple("f64" if x == "bf16" else x for x in s) for s in more)


def test_the_scale_is_last() -> None:
    """Nothing that is carried or handed on has it; all that is stored for the caller does."""
    for way in (*WAYS, replace(WAYS[0], aside=False, walk=8)):
        kernels = {k.name: k.program for k in made_of(NO_STATE, replace(way, fine=1)).compiled.kernels}
        assert {n for n, p in kernels.items() if any(x.op is Op.PARAM for x in p.nodes())} == {"grads", "rows"}
        assert {*kernels["grads"].written()} | {*kernels["rows"].written()} >= {"d_q", "d_k", "d_v", "d_g", "d_beta"}


def test_what_the_steps_refuse() -> None:
    p = backward(build(Switches(final_state=True)))
    plan = backward_plan("gathered-turns", p)
    for step, why in ((("scale_last",), "scale_last: d_S starts with what is not multiplied by scale"),
                      (("scale_last", "size"), "scale_last: nothing is multiplied by size"),
                      (("diagonal", "again", "r_again", "bf16"), "diagonal: r_again is not the product of an inverse"),
                      (("diagonal", "scan", "u_again", "bf16"), "diagonal: no kernel is named 'scan'"),
                      (("in_parts", "again", "bf16", "S"), "in_parts: no scan of again carries 'S'")):
        with pytest.raises(steps.IllegalStep, match=why):
            steps.apply(p, (*plan, step))
    inverse = next(n for q in steps.apply(p, plan) for n in q.nodes() if n.op is Op.LOAD and n["tensor"].name == "A")
    for wrong in (0.5 * inverse, elem("max", inverse, 0.0)):                    # no inverse, though made of one
        changed = [q.rebuild(lambda n, _, wrong=wrong: wrong if n is inverse else None) for q in steps.apply(p, plan)]
        with pytest.raises(steps.IllegalStep, match="diagonal: u_again is not the product of an inverse"):
            diagonal(tuple(changed), "again", "u_again", "bf16")
    with pytest.raises(steps.IllegalStep, match="is not linear in scale"):
        steps.apply(build(Switches()).rebuild(lambda n, _: n * n if n.op is Op.PARAM else None), (("scale_last",),))
    with pytest.raises(ValueError, match=r"as_roles\.fine: got 3; accepts 0 to 2"):
        as_roles(whole_scans("sm_90", gradients.backward_of(SMALL), 1, 32, "triton")[0], fine=3)


@pytest.mark.parametrize("fine", [1, 2])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_runs(way: Way, fine: int) -> None:
    """In any order that its synchronisation allows, of which no more is redundant than without."""
    plain, made = (made_of(SMALL, replace(way, fine=n)).compiled.kernels for n in (0, fine))
    for before, kernel in zip(plain, made, strict=True):
        if kernel.name in ("again", "back"):
            p = RolePrinter(kernel).plan
            for chunks in (0, 1, 2, 7):
                execute(p, chunks, chunks == 2, seeds=5)
            assert unseen(p) == unseen(RolePrinter(before).plan)


@pytest.mark.parametrize(("lengths", "heads", "varlen", "states", "late", "way"), [
    ((130, 0, 64, 1), (1, 2), True, True, False, replace(WAYS[0], fine=1)),
    ((193, 65), (2, 2), True, False, True, replace(WAYS[0], fine=2)),
    ((193, 193), (1, 2), False, False, False, replace(WAYS[1], fine=1)),
    ((66, 0, 64), (1, 2), True, True, True, replace(WAYS[1], fine=2)),
    ((330, 0, 64, 130), (1, 2), True, False, False, replace(WAYS[2], fine=1)),
    ((193, 193), (1, 2), False, True, True, replace(WAYS[2], fine=2)),
    ((130, 0, 64, 1), (1, 2), True, False, True, Way(BACK_ONLY, True, walk=8, fine=2))])
def test_emitted_text_computes_gradients(lengths: tuple[int, ...], heads: tuple[int, int], varlen: bool, states: bool,
                                         late: bool, way: Way) -> None:
    """Executed role by role, against float64: ragged tails, empty sequences, products when they are issued or waited for."""
    cell = Cell("", STATES if states else Switches(), "bf16", Layout(lengths, varlen, *heads, 128, 128))
    found, want = executed(made_of(cell, way), cell, late)
    for n, x in found.items():
        assert relative(x, want[n]) < 5e-3, n


def test_an_initial_state_s_gradient_is_scaled_behind_the_scan() -> None:
    """Where no final state has one: what is stored there is no carry as it is."""
    cell = Cell("", Switches(initial_state=True), "bf16", Layout((130, 0, 64, 1), True, 1, 2, 128, 128))
    instance = gradients.backward_of(cell)
    turns = whole_scans("sm_90", instance, 1, 32, "triton", merges="gathered-turns")[0]
    scans = as_roles(turns, AGAIN, BACK_ALONE, (), True, 2, scale_last=True)
    chosen = variant(instance, the_rest_by("triton", inner_as_roles(scans, chunks=2)), "triton", "sm_90")
    found, want = executed(chosen, cell, False)
    assert "initial_state" in found
    for n, x in found.items():
        assert relative(x, want[n]) < 5e-3, n
    again, back = (next(k for k in chosen.compiled.kernels if k.name == name) for name in ("again", "back"))
    store = next(n for n in back.program.roots if n.op is Op.STORE)
    state = next(n for n in again.program.nodes() if n.op is Op.LOAD and n["tensor"].name == "initial_state")
    wrong = store.but((state, *store.args[1:]))
    moved = replace(back, program=replace(back.program, roots=tuple(wrong if n is store else n for n in back.program.roots)))
    assert "is not of one carry's last value, element by element" in str(TILELANG.supports(moved, "sm_90"))
    assert ("scale_last",) in served(turns, instance, WAYS[0]).steps                 # since a GPU has run it


@pytest.mark.parametrize(("way", "name"), [*((replace(way, fine=1), n) for way in WAYS for n in ("again", "back", "grads")),
                                           *((replace(way, fine=2), "again") for way in WAYS)], ids=str)
def test_cuda(tmp_path: Path, way: Way, name: str) -> None:
    """It synchronises as planned, nvcc leaves products asynchronous, and spills what it did without."""
    kernel = next(k for k in made_of(NO_STATE, way).compiled.kernels if k.name == name)
    source = TILELANG.emit(kernel, "sm_90")
    function = getattr(load_source("tilelang", source.kernel, source.hash, source.text), source.kernel)
    cuda, shared = lowered(function, "sm_90", TILELANG.flags(kernel))
    assert shared + 1024 <= SHARED["sm_90"]
    synchronised(kernel, cuda)
    # 52 while G and beta lay token by token (`heads_first`)
    assert spilled(tmp_path, cuda) <= (60 if (name, way.halves, way.segment) == ("back", (), 0) else 0)


@pytest.mark.parametrize(("fine", "most"), [(1, {"k": 3.8e-3, "v": 3.5e-3, "beta": 3.7e-3}), (2, {"q": 3e-3, "g": 3.2e-3})],
                         ids=["1", "2"])
def test_what_the_text_errs_less(fine: int, most: dict[str, float]) -> None:
    """Without a decay: 4.2e-3, 3.9e-3 and 4.1e-3 as products round; with 1 d_q has 3.2e-3 and d_g 4.0e-3."""
    cell = Cell("", Switches(), "bf16", Layout((320,), True, 1, 2, 128, 128))
    found, want = executed(made_of(cell, replace(WAYS[1], fine=fine)), cell, False, "no_decay")
    for n, bound in most.items():
        assert relative(found[n], want[n]) < bound, n


@pytest.mark.parametrize("kind", ["no_decay", "model"])
def test_the_decay_s_gradient_errs_less(kind: str) -> None:
    """By torch, products rounding as the roles' do: root mean squares over draws, for one draw says little."""
    cell = Cell("", Switches(), "bf16", Layout((320,), True, 1, 2, 128, 128))
    instance = gradients.backward_of(cell)
    drawn = [draw(cell, kind, seed) for seed in range(12)]
    wanted = [gradients.expected(cell, x, instance.grads)["g"] for x in drawn]
    errors = []
    for fine in (0, 1, 2):
        chosen = made_of(cell, replace(WAYS[0], fine=fine), inverses=False).schedule.steps       # joined in tf32 all three
        v = variant(instance, Schedule("x", steps=chosen, dot="bf16"), "torch", "torch")
        found = [relative(gradients.run(v, cell, x)["d_g"], want) for x, want in zip(drawn, wanted, strict=True)]
        errors.append((sum(e * e for e in found) / len(found)) ** 0.5)
    assert errors[1] < 0.92 * errors[0] and errors[2] < 0.85 * errors[0]


# ---- Triton -----------------------------------------------------------------------------------------------------------------

GRADS = ("q", "k", "v", "g", "beta")
OF_U, OF_D_R = ("diagonal", "again", "u_again", "bf16"), ("diagonal", "back", "d_r", "bf16")
OF_STATE = ("in_parts", "again", "bf16", "S_again")


def fine_steps(steps: Steps) -> Steps:
    return tuple(s for s in steps if s[0] in ("diagonal", "in_parts"))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_triton_s_backward_is_finer_in_bf16(size: int, arch: str) -> None:
    """Whatever it computes itself; what it is given, the forward made so. On sm_80, where no GPU has run that, it is not."""
    def served(keep: str = "nothing", grads: tuple[str, ...] = GRADS, io: str = "bf16", backend: str = "triton", **on: bool) \
            -> Steps:
        i = Instance(Switches(**on), size, size, io, io, True, grads, keep=keep)                       # type: ignore[arg-type]
        found = fine_steps(default(arch if backend == "triton" else "torch", i, 1, 32, 8192, backend)[0].steps)
        assert arch == "sm_90" or not found
        return found
    if arch == "sm_80":
        assert served() == served("inverse") == served("states") == served("states", grads=()) == ()
        return
    state, forward_s = ((OF_STATE,), (("in_parts", "scan", "bf16", "S"),)) if size == 64 else ((), ())
    for keep in ("nothing", "inverse"):
        assert served(keep) == (OF_U, *state, OF_D_R)
        assert served(keep, grads=()) == ()
    assert served("states") == (OF_D_R,)
    assert served("states", grads=()) == (("diagonal", "scan", "u", "bf16"), *forward_s)
    assert served(grads=("v",)) == (OF_D_R,) and served(grads=("q",))[0] == OF_U
    assert served(io="f16") == served(io="f32") == served(erase=False) == served(backend="torch") == ()


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("name", ["fused", "states", "grouped", "gathered", "gathered-turns"])
def test_what_a_forward_leaves_is_taken_so_too(name: str, keep: str) -> None:
    """Exact in the interpreter, where nothing rounds: an inverse that the forward left is one."""
    f = build(STATES)
    b = backward(f)
    sizes = Sizes(AXES | {"X": 2}, CU)
    given = memory(f, sizes) | memory(b, sizes)
    want = run(b, given, sizes, {"scale": 0.7})
    back = finer(backward_plan(name, b, "f64", 16, 4, keep), "bf16", 64, "sm_90")
    ahead = plan("states", io="f64", chunk=16, block=4, sums=True, leave=left(keep))
    ahead = finer(ahead, "bf16", 64, "sm_90") if keep == "states" else ahead
    kernels = [k for p, made in ((f, ahead), (b, back)) for k in steps.apply(p, in_f64_too(in_f64(made)))]
    got = run_pipeline(kernels, given, sizes, {"scale": 0.7})
    for n in (n for n in want if n.startswith("d_")):
        assert float((got[n] - want[n]).abs().max()) < 1e-10, n


def test_what_a_forward_left_by_another_name_is_no_inverse() -> None:
    p = backward(build())
    made = steps.apply(p, backward_plan("states", p, keep="inverse"))
    inverse = next(n for q in made for n in q.nodes() if n.op is Op.LOAD and n["tensor"].name == "A")
    assert inverse["tensor"].temp == LEFT
    for name in ("G", "S", "kk"):
        other = inverse.but(tensor=replace(inverse["tensor"], name=name))
        changed = tuple(q.rebuild(lambda n, _, other=other: other if n is inverse else None) for q in made)
        with pytest.raises(steps.IllegalStep, match="diagonal: u_again is not the product of an inverse"):
            diagonal(changed, *OF_U[1:])


@pytest.mark.parametrize(("size", "bounds"), [(64, {"q": 0.93, "k": 0.9, "v": 0.9, "beta": 0.9, "g": 0.95}),
                                              (128, {"q": 0.93, "k": 0.93, "v": 0.92, "beta": 0.93})])
def test_what_triton_errs_less(size: int, bounds: dict[str, float]) -> None:
    """By torch, products rounding as Triton's do, on model-like inputs: root mean squares over draws, beside those without.
    (Of g no bound where only `diagonal` is taken: draws of it differ too much.)"""
    cell = Cell("", Switches(final_state=True), "bf16", Layout((320, 80), True, 1, 2, size, size))
    instance = gradients.backward_of(cell)
    drawn = [draw(cell, "model", seed) for seed in range(12)]
    wanted = [gradients.expected(cell, x, instance.grads) for x in drawn]
    served = default("sm_90", instance, 2, 2, 400)[0].steps
    plain = tuple(s for s in served if s not in fine_steps(served))
    errors: list[dict[str, float]] = []
    for made in (plain, served):
        v = variant(instance, Schedule("x", steps=made, dot="bf16"), "torch", "torch")
        found = [gradients.run(v, cell, x) for x in drawn]
        errors.append({n: sum(relative(x[f"d_{n}"], want[n]) ** 2 for x, want in zip(found, wanted, strict=True)) ** 0.5
                       for n in bounds})
    for n, bound in bounds.items():
        assert errors[1][n] < bound * errors[0][n], n
