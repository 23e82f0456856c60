"""What a forward keeps for its backward: the step that reads it, who computes and checks it, and what torch makes of it."""
from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import library
from torch.utils.checkpoint import checkpoint

import gdn_ir
from gdn_ir import policy, registry
from gdn_ir.autodiff import backward
from gdn_ir.autotune.keys import of_instance, to_instance
from gdn_ir.bench.errors import worst
from gdn_ir.bench.gradients import backward_of, check
from gdn_ir.backends.base import Call
from gdn_ir.backends.temporaries import outputs, placed, temporaries
from gdn_ir.compiler import Instance, Unsupported, variant
from gdn_ir.coverage import Cell, Layout, table
from gdn_ir.interp import Sizes, run, run_pipeline
from gdn_ir.ops import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule, left
from gdn_ir.padding import pad
from gdn_ir.printer import dump, evaluate
from gdn_ir.programs.gated_delta import Switches, build
from gdn_ir.schedules import steps
from gdn_ir.schedules.defaults import default
from gdn_ir.schedules.plans import KEEP, backward_plan, plan
from gdn_ir.schedules.plans import left as names_left
from gdn_ir.schedules.schedule import Schedule
from tests.differential import executed, interpreted
from tests.inputs import error, make
from tests.test_backward import AXES, CU, FAMILY, SMALL, STATES, in_f64, memory

GRADS = ("q", "k", "v", "g", "beta")
KEPT = KEEP[1:]


# ---- the step ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{}, STATES | {"l2norm": True}, STATES | {"beta_sigmoid": True, "neg_eigval": True}])
@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize(("decay", "erase"), FAMILY)
def test_forward_and_backward_are_exact(decay: str, erase: bool, keep: str, flags: dict[str, bool]) -> None:
    """A forward's kernels and then a backward's, which is given what they leave, write what both programs write; padded too."""
    f = build(Switches(decay=decay, erase=erase, **flags))                     # type: ignore[arg-type]
    b = backward(f)
    sizes = Sizes(AXES, CU)
    given = memory(f, sizes) | memory(b, sizes)
    want = run(f, given, sizes, {"scale": 0.7}) | run(b, given, sizes, {"scale": 0.7})
    leave = names_left(keep, decay == "scalar", erase)
    forward = steps.apply(f, in_f64(plan("states", erase, "f64", 16, 4, decay == "scalar", leave=leave, widen=True)))
    assert {t.name for k in forward for t in k.tensors().values() if t.left} == set(leave)
    for name in ("naive", "fused", "states", "grouped", "inside", "merged"):
        kernels = [*forward, *steps.apply(b, in_f64(backward_plan(name, b, "f64", 16, 4, keep, "bf16")))]
        assert all(evaluate(dump(k)) == k for k in kernels)
        assert ("again" in [k.name for k in kernels]) == (keep != "states")
        assert [k.name for k in kernels].count("solve") == erase
        for padded in (False, True)[:1 + (name == "grouped")]:
            some = [pad(k, frozenset({"C", "K", "V"})) for k in kernels] if padded else kernels
            tiles = {"K": 8, "V": 8} if padded else {}
            got = run_pipeline(some, given, Sizes(AXES, CU, tiles), {"scale": 0.7}, padded=padded)
            for n in (*f.written(), *(n for n in b.written() if not b.tensors()[n].temp)):
                assert float((got[n] - want[n]).abs().max()) < 1e-10, (name, n)


@pytest.mark.parametrize("wrt", [("q",), ("v",), ("k", "beta"), ("g",), ("initial_state",)])
@pytest.mark.parametrize("keep", KEPT)
def test_a_backward_reads_no_more_than_it_needs(wrt: tuple[str, ...], keep: str) -> None:
    """Whatever gradients are asked for: it is given some of what is left, and has no solve of its own."""
    b = backward(build(Switches(**STATES)), wrt)           # type: ignore[arg-type]
    kernels = steps.apply(b, backward_plan("states", b, keep=keep))
    given = {t.name for k in kernels for t in k.tensors().values() if t.left}
    assert given and given <= set(names_left(keep)) and not {"solve", *(["again"] if keep == "states" else [])} & {
        k.name for k in kernels}
    assert ("S" in given) == (keep == "states" and wrt not in (("v",), ("initial_state",)))


SEPARATE = ("separate", "d_S", "again", "back")


@pytest.mark.parametrize(("taken", "message"), [
    ((SEPARATE, ("given", "u", "io", "r")), "given: r is not a triangular solve"),
    ((SEPARATE, ("given", "nonsense")), "given: gated_delta_rule has no value named 'nonsense'"),
    ((SEPARATE, ("invert", "d_r", "A"), ("given", "A", "io", "u"), ("given", "d_S")), "has no value named 'd_S'"),
    ((SEPARATE, ("factor",), ("regroup",), ("exchange",), ("given", "D", "f32", "u")), "it is not what gated_delta_rule comp"),
])
def test_what_the_forward_did_not_compute(taken: tuple[tuple[str | int, ...], ...], message: str) -> None:
    with pytest.raises(steps.IllegalStep, match=message):
        steps.apply(backward(build()), taken)


def test_any_value_of_the_forward_may_be_given() -> None:
    """Here one that no forward leaves: which are left is for a schedule to say."""
    again, back = steps.apply(backward(build()), (SEPARATE, ("given", "r")))
    assert back.tensors()["r"].left and "r" not in again.read()


def test_another_forward_s_values_are_refused() -> None:
    """Of a derived backward whose forward is said to be another."""
    for other, name, message in ((Switches(beta_sigmoid=True), "u", "it is not what gated_delta_rule computes as u"),
                                 (Switches(initial_state=True), "S", "again does not carry S as gated_delta_rule does"),
                                 (Switches(l2norm=True), "S", "again does not carry S as gated_delta_rule does")):
        b = replace(backward(build()), forward=build(other))
        with pytest.raises(steps.IllegalStep, match=message):
            steps.apply(b, (SEPARATE, ("given", name)))


def test_refusals_without_a_node() -> None:
    with pytest.raises(steps.IllegalStep, match="given: gated_delta_rule is no backward"):
        steps.apply(build(), (("given", "G", "f32"),))
    with pytest.raises(steps.IllegalStep, match="leave: no kernel has a temporary named 'u'; there are G"):
        steps.apply(build(), (("hoist", "G", "f32", "solve"), ("leave", "G", "u")))
    with pytest.raises(ValueError, match="keep: got 'all'; accepts nothing, inverse, states"):
        Instance(Switches(), 64, 64, "f32", "f32", True, keep="all")
    with pytest.raises(ValueError, match="keep: got 'states'; accepts nothing"):
        Instance(Switches(), 64, 64, "f32", "f32", True, recurrent=True, keep="states")
    kept = Instance(Switches(), 64, 64, "f32", "f32", True, keep="states")
    for schedule, what in ((Schedule("x", steps=plan("states", io="f32")), "leave nothing of chunks of 64"),
                           (Schedule("x", 32, plan("states", io="f32", chunk=32, sums=True, leave=kept.left)),
                            "leave A, G, S, total, u of chunks of 32")):
        with pytest.raises(steps.IllegalStep, match=f"keep: states is A, G, total, S, u of chunks of 64, .* {what}"):
            variant(kept, schedule, "torch", "torch")
    assert to_instance(of_instance(kept)) == kept and "keep" not in of_instance(replace(kept, keep="nothing"))


# ---- backends ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize(("decay", "erase"), FAMILY)
def test_torch(decay: str, erase: bool, keep: str) -> None:
    for io, bound in (("f64", 1e-12), ("f32", 1e-5)):
        for flags in ({}, STATES | {"state_v_first": True, "l2norm": True}):
            cell = Cell("x", Switches(decay=decay, erase=erase, **flags), io, SMALL)           # type: ignore[arg-type]
            assert worst(check(cell, "torch", "torch", keep=keep)["errors"].values()) < bound


def test_triton_executed() -> None:
    """By Triton's interpreter: packed with zero lengths, groups, ragged tails, K != V, states either way, flags."""
    names = [c.name for c in table() if c.io == "f32" and (c.name.startswith("gated delta rule,") or "V, K" in c.name
                                                           or "sigmoid" in c.name or "l2norm" in c.name)]
    names += ["delta rule, f32, varlen", "gated delta rule, f16, GVA"]
    cases = [["kept", n, keep] for n in names for keep in KEPT[names.index(n) % 2:][:1 + (n == names[0])]]
    bad = {k: v for k, v in interpreted(cases).items()     # type: ignore[arg-type]
           if "error" not in v or not float(v["error"]) < (2e-5 if "f32" in k else 4.5e-3)}     # type: ignore[arg-type]
    assert not bad, json.dumps(bad, indent=1)[:3000]


def test_native_code_executed() -> None:
    found = executed([["kept", "states [V, K], f32", "states"], ["kept", "gated delta rule, f32, GVA", "inverse"]], "tilelang",
                     "cpu")
    bad = {k: v for k, v in found.items() if "error" not in v or not float(v["error"]) < 2e-5}         # type: ignore[arg-type]
    assert not bad, json.dumps(bad, indent=1)[:3000]


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_kernels_of_a_gpu(arch: str, keep: str) -> None:
    """What is left out, and that the rest is what was there before, but for names."""
    plain, given = (variant(i, default(arch, i, 1, 32, 8192)[0], "triton", arch) for i in
                    (Instance(Switches(), 128, 128, "bf16", "bf16", True, GRADS, keep=k) for k in ("nothing", keep)))
    before, after = ([s.kernel for s in v.sources] for v in (plain, given))
    gone = {"solve"} | ({"again"} if keep == "states" else set())
    own = ["widen"] if (arch, keep) == ("sm_90", "inverse") else []            # no kernel before again could store what it does
    assert after == [*own, *(n for n in before if n not in gone)]
    follows = {k.name: len(k.awaits) for k in given.compiled.kernels if k.awaits}
    assert follows == ({"grads": 1 if keep == "states" else 2} if arch == "sm_90" else {})
    same = {s.kernel: s.hash for s in plain.sources}
    alike = {s.kernel for s in given.sources if s.hash == same.get(s.kernel)}
    if keep == "states":                                   # on Hopper nothing of gathered runs beside another without again
        assert alike == ({"back", "heads"} if arch == "sm_80" else set())
    else:
        assert alike >= {"local", "again", "back", "grads"}


@pytest.mark.parametrize(("keep", "kept", "block"), [("nothing", 0, 1930.3), ("inverse", 132.1, 1798.3),
                                                     ("states", 901.1, 1029.2)])
def test_how_much_is_kept(keep: str, kept: float, block: float) -> None:
    """MiB at 1x32768, 16/32: between forward and backward, and of the backward's block."""
    i = Instance(Switches(), 128, 128, "bf16", "bf16", True, GRADS, keep=keep)
    kernels = variant(i, default("sm_90", i, 1, 32, 32768)[0], "triton", "sm_90").compiled.kernels
    call = Call(1, 32768, 32768, {"H": 16, "HV": 32})
    q, v = torch.empty(1, 32768, 16, 128, dtype=torch.bfloat16, device="meta"), torch.empty(1, 32768, 32, 128, device="meta")
    made = left.empty(keep, True, q, v, None)
    assert sum(x.nbytes for x in made) / 2 ** 20 == pytest.approx(kept, abs=0.06)
    spans, hosts = ({n: life.span(call) for n, life in some.items()} for some in (temporaries(kernels), outputs(kernels)))
    assert placed(spans, hosts)[1] / 2 ** 20 == pytest.approx(block, abs=0.06)
    elements = 64 * 2 + 4 + (0 if keep == "inverse" else 128 * 2 + 128 * 128 * 2 / 64)
    assert keep == "nothing" or kept == pytest.approx(32768 * 32 * elements / 2 ** 20, rel=2e-3)       # as policy.keep says


# ---- torch ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def by_torch() -> Iterator[None]:
    with gdn_ir.use("torch"):
        yield


def leaves_of(**shape: Any) -> dict[str, torch.Tensor]:
    return {n: t.requires_grad_() for n, t in make(**shape).items()}


def gradients(leaves: dict[str, torch.Tensor], op: Callable[..., Any] = chunk_gated_delta_rule, **flags: Any) \
        -> tuple[torch.Tensor, ...]:
    o, S = op(**leaves, output_final_state=True, **flags)
    return torch.autograd.grad(o.sin().sum() + S.cos().sum(), list(leaves.values()))


def saved(o: torch.Tensor) -> int:
    assert o.grad_fn is not None
    return len(o.grad_fn.saved_tensors)                    # type: ignore[attr-defined]


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("cu", [None, [0, 64, 64, 150, 170]])
def test_gradients_through_the_op(keep: str, cu: list[int] | None) -> None:
    """The same as where nothing is kept, dense and packed; what is left has the shapes that kernels give it."""
    leaves = leaves_of(B=1 if cu else 2, T=190, H=1, HV=2, K=16, V=32)
    flags = {"cu_seqlens": torch.tensor(cu)} if cu else {}
    want = gradients(leaves, **flags)
    with gdn_ir.keep(keep):
        o, _ = chunk_gated_delta_rule(**leaves, **flags)
        assert saved(o) == 7 + len(names_left(keep))
        got = gradients(leaves, **flags)
    assert max(error(a, b) for a, b in zip(got, want, strict=True)) < 1e-5
    x = {n: t.detach() for n, t in leaves.items()}
    i = Instance(Switches(), 16, 32, "f32", "f32", cu is not None, keep=keep)
    chosen = variant(i, default("torch", i, 1, 2, 190)[0], "torch", "torch")
    call = chosen.call_of(x, len(cu) - 1 if cu else 2, None)
    shapes = {t.name: call.shape(k, t) for k in chosen.compiled.kernels for t in k.tensors() if t.left}
    made = left.named(keep, True, left.empty(keep, True, x["q"], x["v"], flags.get("cu_seqlens")))
    assert {n: tuple(t.shape) for n, t in made.items()} == shapes


@pytest.mark.usefixtures("by_torch")
def test_nothing_is_kept_where_no_gradient_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("memory for a backward that there is not")
    monkeypatch.setattr(left, "empty", refuse)
    with gdn_ir.keep("states"):
        chunk_gated_delta_rule(**make())
        with torch.no_grad():
            chunk_gated_delta_rule(**leaves_of())
        o, _ = fused_recurrent_gated_delta_rule(**leaves_of(T=3))              # chunks of one token leave nothing of use
        assert saved(o) == 7
        with pytest.raises(AssertionError, match="memory for a backward"):
            chunk_gated_delta_rule(**leaves_of())


@pytest.mark.usefixtures("by_torch")
def test_who_says_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block before the process; a mistake in either is named."""
    assert policy.keeping() == "nothing"
    monkeypatch.setattr(policy, "_kept", "inverse")
    assert policy.keeping() == "inverse" and saved(chunk_gated_delta_rule(**leaves_of())[0]) == 10
    with gdn_ir.keep("nothing"):
        assert policy.keeping() == "nothing" and saved(chunk_gated_delta_rule(**leaves_of())[0]) == 7
        with gdn_ir.keep("states"):
            assert policy.keeping() == "states"
    monkeypatch.setattr(policy, "_kept", "everything")
    with pytest.raises(ValueError, match="GDN_IR_KEEP: got 'everything'; accepts nothing, inverse, states"):
        chunk_gated_delta_rule(**leaves_of())
    with pytest.raises(ValueError, match="what: got 'all'; accepts nothing, inverse, states"), gdn_ir.keep("all"):
        pass


@pytest.mark.usefixtures("by_torch")
def test_no_decay_and_no_tokens() -> None:
    leaves = leaves_of()
    del leaves["g"]
    want = gradients(leaves, g=None)
    with gdn_ir.keep("states"):
        assert saved(chunk_gated_delta_rule(**leaves, g=None)[0]) == 10
        assert max(error(a, b) for a, b in zip(gradients(leaves, g=None), want, strict=True)) < 1e-5
        none = leaves_of(T=0)
        assert all(not g.any() for g in gradients(none))


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("keep", KEPT)
def test_opcheck(keep: str) -> None:
    x = make(HV=4)
    flags = (False, False, False, False)
    library.opcheck(torch.ops.gdn_ir.chunk_forward_keeping, (*x.values(), 0.1, None, None, None, True, *flags, False, keep))
    kept = torch.ops.gdn_ir.chunk_forward_keeping(*x.values(), 0.1, None, None, None, True, *flags, False, keep)[2:]
    args = (torch.randn(1, 100, 4, 32), torch.randn(1, 4, 32, 32), *x.values(), 0.1, None, None, *flags, "q k v g beta",
            "torch", kept, keep)
    library.opcheck(torch.ops.gdn_ir.chunk_backward, args)


@pytest.mark.usefixtures("by_torch")
def test_compiled() -> None:
    """Two nodes in a graph of torch's, for any length."""
    leaves = leaves_of()
    want = gradients(leaves)
    with gdn_ir.keep("states"):
        torch._dynamo.reset()
        op = torch.compile(chunk_gated_delta_rule, fullgraph=True, backend="aot_eager", dynamic=True)
        assert max(error(a, b) for a, b in zip(gradients(leaves, op), want, strict=True)) < 1e-5
        longer = leaves_of(T=333)
        assert max(error(a, b) for a, b in zip(gradients(longer, op), gradients(longer), strict=True)) < 1e-5


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant: bool) -> None:
    """The forward runs again and keeps again; what the first kept is let go."""
    leaves = leaves_of()
    want = gradients(leaves)
    with gdn_ir.keep("states"):
        def op(**x: Any) -> Any:
            return checkpoint(lambda q, k, v, g, beta: chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True),
                              *(x[n] for n in GRADS), use_reentrant=reentrant)
        if reentrant:                                      # which does not go with autograd.grad
            o, S = op(**leaves)
            (o.sin().sum() + S.cos().sum()).backward()
            got = tuple(x.grad for x in leaves.values())
        else:
            got = gradients(leaves, op)
    assert max(error(a, b) for a, b in zip(got, want, strict=True)) < 1e-5     # type: ignore[arg-type]


@pytest.mark.usefixtures("by_torch")
def test_mapped() -> None:
    """Gradients of several losses at once are computed without what was kept; a mapped forward keeps beneath the map."""
    leaves = leaves_of(T=70)
    many = torch.randn(3, *leaves["v"].shape)
    with gdn_ir.keep("states"):
        o, _ = chunk_gated_delta_rule(**leaves)
        together = torch.func.vmap(lambda d_o: torch.autograd.grad(o, leaves["k"], d_o, retain_graph=True)[0])(many)
        for d_o, got in zip(many, together, strict=True):
            assert error(got, torch.autograd.grad(o, leaves["k"], d_o, retain_graph=True)[0]) < 1e-5
        mapped = torch.func.vmap(lambda q: chunk_gated_delta_rule(q, *(leaves[n] for n in GRADS[1:]))[0])
        q = torch.randn(2, *leaves["q"].shape, requires_grad=True)
        (got,) = torch.autograd.grad(mapped(q).sin().sum(), q)
    alone = [chunk_gated_delta_rule(**(leaves | {"q": x}))[0].sin().sum() for x in q]
    assert error(got, torch.autograd.grad(sum(alone, torch.zeros(())), q)[0]) < 1e-5


def test_what_no_gpu_has_run_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one warning; with GDN_IR_UNVERIFIED=1, or once it has run, it is kept."""
    monkeypatch.setattr(registry, "architecture", lambda _: "sm_90")
    asked = (torch.device("cpu"), torch.bfloat16, torch.bfloat16, 128, 128, 16, 32, False, True, *[False] * 6, "triton",
             "states")
    try:
        for seen, unverified, kept in ((frozenset(), "0", "nothing"), (frozenset(), "1", "states"),
                                       (frozenset({("triton", "sm_90", "states")}), "0", "states")):
            registry.forget()
            registry._warn_kept.cache_clear()
            monkeypatch.setattr(registry, "KEEP_SEEN", seen)
            monkeypatch.setenv("GDN_IR_UNVERIFIED", unverified)
            why = "nothing is kept for the backward, though states is asked for: triton's backward that is given states has not"
            warned = pytest.warns(RuntimeWarning, match=why) if kept == "nothing" else nullcontext()
            with warned:
                assert registry.keeps(*asked) == kept
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert registry.keeps(*asked) == "states"
            anything = (*asked[:-2], "", "states")         # where roles would serve without, too
            assert [registry.keeps(*anything[:5], hv // 2, hv, *anything[7:]) for hv in (8, 32, 64)] == ["states"] * 3
        instance = Instance(Switches(), 128, 128, "bf16", "bf16", False, keep="inverse")
        with pytest.raises(Unsupported, match="triton's forward that leaves inverse has not run on all it ships for on sm_90"):
            registry.choose(instance, "sm_90", 1, 32, 256, "triton")
        assert [o.backend for o in registry.options(instance, "sm_90", 1, 32, 256)] == ["triton", "tilelang", "torch"]
    finally:
        registry.forget()


def test_every_combination_lowers() -> None:
    """For GPUs: sizes that split V, dtypes, subsets of gradients."""
    for io, (K, V), keep in itertools.product(("bf16", "f32"), ((64, 64), (256, 160)), KEPT):
        for arch, backend in (("sm_90", "triton"), ("sm_80", "triton"), ("sm_90", "tilelang")):
            for grads in ((), ("q",), ("v", "g"), GRADS):
                if backend == "tilelang" and K > 128:
                    continue
                i = Instance(Switches(), K, V, io, io, True, grads, keep=keep)
                made = variant(i, default(arch, i, 1, 8, 100, backend)[0], backend, arch)
                assert math.prod(len(s.text) for s in made.sources) > 0


def test_a_cell_of_the_verifier() -> None:
    """A row says of both what ran: the sources of the forward stand beside the backward's."""
    cell = Cell("x, bf16", Switches(final_state=True), "bf16", Layout((40, 0, 30), True, 1, 2, 16, 16))
    row = check(cell, "torch", "torch", keep="states")
    assert set(row["errors"]) == {"o", "final_state", *(f"d_{n}" for n in GRADS)} and worst(row["errors"].values()) < 6e-3
    assert list(row["sources"]) == ["solve", "scan", "output", "local", "back", "inner", "grads", "heads"]
    assert backward_of(cell, keep="states").left == ("A", "G", "total", "S", "u")
