"""The backward's two scans as roles: their plans, their text, executed on the CPU against float64; what nvcc makes of it."""
from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from gdn_ir import registry
from gdn_ir.backends.base import SHARED, TORCH, Kernel
from gdn_ir.backends.temporaries import launched, moments
from gdn_ir.backends.tilelang.roles import RolePrinter
from gdn_ir.backends.tilelang.runtime import lowered
from gdn_ir.bench import cases, gradients, role_backward as bench
from gdn_ir.bench.errors import relative
from gdn_ir.cache import load_source
from gdn_ir.compiler import Unsupported, Variant, variant
from gdn_ir.coverage import Cell, Layout
from gdn_ir.nodes import IRError
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.schedules.adjoints import in_segments
from gdn_ir.schedules import adjoints
from gdn_ir.schedules.defaults import whole_scans
from gdn_ir.schedules.execute import execute
from gdn_ir.schedules.pipeline import IllegalStep
from gdn_ir.schedules.role_backward import BACK_ONLY, BOTH, FINE, WAYS, Way, as_roles, served, way
from gdn_ir.schedules.roles import AGAIN, BACK, BACK_ALONE, Event, Roles
from gdn_ir.schedules.schedule import Schedule
from gdn_ir.schedules.steps import apply
from tests import emulated
from tests.test_role_kernels import TILELANG, synchronised, spilled
from tests.test_roles import unseen

STATES = Switches(initial_state=True, final_state=True)
SMALL = Cell("", STATES, "bf16", Layout((130, 0, 64, 1), True, 1, 2, 128, 128))
EVERY = [(kernel, back, halves) for kernel, back in (("again", BACK), ("back", BACK), ("back", BACK_ALONE))
         for halves in (False, True)]
NAMES = [f"{kernel}{' alone' if back is BACK_ALONE else ''}{' in halves' if halves else ''}" for kernel, back, halves in EVERY]


@lru_cache(maxsize=8)
def made_of(cell: Cell, back: Roles = BACK, halves: bool = False, again: Roles = AGAIN, segment: int = 0) \
        -> Variant:
    instance = gradients.backward_of(cell)
    base = whole_scans("sm_90", instance, 1, 32, "triton")[0]
    base = in_segments(base, instance, segment) if segment else base
    return variant(instance, as_roles(base, again, back, BOTH if halves else ()), "triton", "sm_90")


def kernel_of(name: str, back: Roles, halves: bool) -> Kernel:
    return next(k for k in made_of(SMALL, back, halves).compiled.kernels if k.name == name)


@pytest.mark.parametrize(("kernel", "back", "halves"), EVERY, ids=NAMES)
def test_runs(kernel: str, back: Roles, halves: bool) -> None:
    p = RolePrinter(kernel_of(kernel, back, halves)).plan
    assert p.reverse == (kernel == "back")
    for chunks in (0, 1, 2, 7):
        for ragged in (False, True):
            execute(p, chunks, ragged, seeds=10)


# What follows from other synchronisation: rings that one role fills, in turn with others of no more slots, or whose reader
# waits for what is made of them; a fence that a later one, before the same product, makes up for.
IMPLIED = {
    ("again", BACK): {"load: without wait A_free", "load: without wait k_free"},
    ("back", BACK): {"load: without wait A_free", "load: without wait q_free", "load: without fence ragged"},
    ("back", BACK_ALONE): {"load: without wait A_free", "load: without wait k_free", "load: without fence ragged",
                           "state: without wait G_full", "state: without wait k_full", "state: without wait q_full"}}


@pytest.mark.parametrize(("kernel", "back"), IMPLIED, ids=["again", "back", "back alone"])
def test_nothing_derived_is_redundant(kernel: str, back: Roles) -> None:
    """But for what is implied."""
    assert unseen(RolePrinter(kernel_of(kernel, back, True)).plan) == IMPLIED[kernel, back]


@pytest.mark.parametrize("kernel", ["solve", "local"])
def test_who_clears_counts_is_triton_s(kernel: str) -> None:
    """Of scans that are followed: where TileLang made it, nobody would set them to zero."""
    base = whole_scans("sm_90", bench.TIMED, 1, 32, "triton")[0]
    assert any(k.clears for k in variant(bench.TIMED, base, "triton", "sm_90").compiled.kernels)
    with pytest.raises(Unsupported, match=f"tilelang has no part in what runs beside each other, as {kernel} should"):
        changed = base.with_options(**{kernel: replace(base.options(kernel), backend="tilelang")})
        variant(bench.TIMED, changed, "triton", "sm_90")


def test_halves_are_of_both_scans_or_the_adjoint_s() -> None:
    base = whole_scans("sm_90", bench.TIMED, 1, 32, "triton")[0]
    for make, name in ((lambda x: Way(x), "Way"), (lambda x: as_roles(base, halves=x), "as_roles")):
        with pytest.raises(ValueError, match=rf"{name}\.halves: got \('again',\); accepts"):
            make(("again",))


def test_segments_run_beside_nothing() -> None:
    base = whole_scans("sm_90", bench.TIMED, 1, 32, "triton")[0]
    with pytest.raises(ValueError, match=r"as_roles\.aside: got true with .*; accepts a schedule of whole sequences"):
        as_roles(in_segments(base, bench.TIMED, 32), aside=True)
    for how in ({"aside": True}, {"halves": BACK_ONLY}):
        with pytest.raises(ValueError, match=r"Way\.segment: got 32 with halves or aside"):
            Way(segment=32, walk=8, **how)


@pytest.mark.parametrize("walk", [2, 8])
def test_adjoints_in_halves(walk: int) -> None:
    """Beside each other, two blocks a head of the adjoint's scan, one of the states': the kernels that both have else."""
    turns = whole_scans("sm_90", bench.TIMED, 1, 32, "triton", merges="gathered-turns")[0]
    whole, uneven, halves = (variant(bench.TIMED, served(turns, bench.TIMED, Way(x, True, walk=walk)), "triton", "sm_90")
                             for x in ((), BACK_ONLY, BOTH))
    assert Schedule.from_json(uneven.schedule.to_json()) == uneven.schedule
    assert [k.columns for k in uneven.compiled.kernels if k.name in ("again", "back")] == [128, 64]
    hashes = [{x.kernel: x.hash for x in v.sources} for v in (whole, uneven, halves)]
    assert hashes[1] == hashes[0] | {"back": hashes[2]["back"]} and hashes[1] != hashes[0]
    assert "their adjoints in two, beside each other" in str(Way(BACK_ONLY, True))


@pytest.mark.parametrize(("kernel", "back", "halves"), EVERY, ids=NAMES)
def test_cuda(tmp_path: Path, kernel: str, back: Roles, halves: bool) -> None:
    """It synchronises as planned, and nvcc leaves products asynchronous."""
    made = kernel_of(kernel, back, halves)
    source = TILELANG.emit(made, "sm_90")
    function = getattr(load_source("tilelang", source.kernel, source.hash, source.text), source.kernel)
    cuda, shared = lowered(function, "sm_90", TILELANG.flags(made))
    assert shared <= SHARED["sm_90"]
    synchronised(made, cuda)
    assert spilled(tmp_path, cuda) <= (52 if back is BACK_ALONE and not halves else 0)    # addresses, of who loads and stores


@pytest.mark.parametrize(("lengths", "H", "varlen", "states", "back", "halves", "late", "segment"), [
    ((130, 0, 64, 1), 1, True, True, BACK, False, False, 0), ((130, 0, 64, 1), 1, True, True, BACK_ALONE, True, True, 0),
    ((193, 65), 2, True, False, BACK_ALONE, False, False, 0), ((128, 63), 1, True, False, BACK, True, True, 0),
    ((193, 193), 1, False, True, BACK, False, True, 0), ((66,), 2, False, False, BACK_ALONE, True, False, 0),
    ((64, 0, 0), 1, True, True, BACK_ALONE, False, True, 0), ((330, 0, 64, 130), 1, True, False, BACK, False, False, 2),
    ((193, 193), 1, False, True, BACK, True, True, 2)])
def test_emitted_text_computes_gradients(lengths: tuple[int, ...], H: int, varlen: bool, states: bool, back: Roles,
                                         halves: bool, late: bool, segment: int) -> None:
    """The emitted text of both scans, executed role by role among the other kernels by torch, against float64: ragged tails,
    empty sequences, with and without states, value heads that share a key head or have their own; whole, or in segments; what
    is behind the last sequence is NaN, and all that the scans write was."""
    cell = Cell("", STATES if states else Switches(), "bf16", Layout(lengths, varlen, H, 2, 128, 128))
    chosen = made_of(cell, back, halves, segment=segment)
    made = chosen.compiled
    assert {m.name for m in made.makers} == {"triton", "tilelang"}
    assert ("local" in {k.name for k in made.kernels}) == (back is BACK)
    found, want = executed(chosen, cell, late)
    for n, x in found.items():
        assert relative(x, want[n]) < 5e-3, n


def executed(chosen: Variant, cell: Cell, late: bool, kind: str = "model") -> tuple[gradients.Tensors, gradients.Tensors]:
    """Gradients by the emitted text of kernels of roles, each executed role by role among the others by torch, and by float64;
    of rows that sequences own."""
    made, lay = chosen.compiled, cell.layout
    x, rows, instance = gradients.make(cell, kind=kind), sum(lay.lengths), chosen.instance
    want = gradients.expected(cell, x, instance.grads)
    if lay.varlen:
        for n in ("q", "k", "v", "g", "beta", "d_o"):
            x[n][rows:] = float("nan")
    call = chosen.call_of(x, len(lay.lengths), x["cu_seqlens"] if lay.varlen else None)
    plain = variant(instance, Schedule("x", steps=chosen.schedule.steps), "torch", "torch").compiled.launches
    for kernel, source, launch in zip(made.kernels, made.sources, plain, strict=True):
        tensors = kernel.program.tensors()
        if kernel.options.roles is None:
            found = launch(x, {"scale": 128 ** -0.5}, call) or {}
            x |= {n: t.to(TORCH[tensors[n].dtype]) for n, t in found.items() if n in tensors}
            continue
        x |= {n: torch.full(call.shape(kernel, tensors[n]), float("nan"), dtype=TORCH[tensors[n].dtype])
              for n in kernel.program.written()}
        emulated.run(kernel, source, x, 128 ** -0.5, call, late)
    parts = {n: slice(None if n.endswith("state") else rows) for n in instance.grads}
    return {n: x[f"d_{n}"][part] for n, part in parts.items()}, {n: want[n][part] for n, part in parts.items()}


def test_the_bench_has_candidates() -> None:
    """As they serve for a shape, with roles for nothing but the scans and what follows them, in no stream of another's."""
    for lengths, _, HV in bench.SHAPES:
        found = bench.candidates(bench.TIMED, len(lengths), HV)
        ways = [*(f"{half}{aside}" for half in ("", "-halves") for aside in ("", "-aside")), "-back-halves-aside"]
        roles = [f"roles{how}{way}" for how in ("", "-alone", "-merged-alone", "-turns-alone") for way in ways]
        one = [f"{how}{way}" for way in ("", ", 8 warps", ", waits", ", 8 warps, waits") for how in ("merged", "turns")]
        inner = [f"roles-turns-alone{way}-inner{n}" for way in ways for n in ("-1", "-2", "")]
        inner += ["gathered-merged-inner", *(f"gathered-turns-inner{n}" for n in ("-1", "-2", "-4", "", "-16"))]
        inner += [f"roles-turns-alone{half}-aside{fine}-inner{n}" for half in ("", "-halves", "-back-halves")
                  for fine in FINE[1:] for n in ("-1", "-2", "")]
        assert {*found} == {"gathered", "gathered, in a row", *one, *roles, *inner}
        for name, s in found.items():
            kernels = variant(bench.TIMED, s, "triton", "sm_90").compiled.kernels
            by_roles = ["again", "back"] * ("roles" in name) + ["grads"] * ("inner" in name)
            assert [k.name for k in kernels if k.options.roles] == by_roles
            assert ("rows" in {k.name for k in kernels}) == ("inner" in name)
            assert [k.name for k in kernels if k.options.aside] == ["again"] * ("aside" in name)
            last = ["inner", "grads"] if name == "gathered" else ["grads"] if "waits" not in name else []
            some = name == "gathered" or name in one
            apart = [] if "roles-merged" in name or "roles-turns" in name else ["back"] if "inner" in name else ["grads"]
            assert [k.name for k in kernels if k.beside] == (["back", *last] if some else apart)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["roles", "roles-alone-aside", "roles-halves", "roles-alone-halves-aside", "roles-turns-alone",
                                  "roles-turns-alone-aside", "gathered-merged-inner", "roles-turns-alone-inner",
                                  "roles-turns-alone-aside-inner", "roles-turns-alone-halves-aside-inner-1",
                                  "roles-turns-alone-back-halves-aside-inner", "roles-turns-segments-2-inner-2",
                                  "roles-turns-alone-aside-finer-inner", "roles-turns-alone-halves-aside-finest-inner-1",
                                  "roles-turns-finest-segments-2-inner-2", "gathered-turns-inner"])
def test_on_a_gpu(name: str) -> None:
    """Ragged ends, an empty sequence, states in and out, over poison, against float64 and "gathered"."""
    (cell, kind), made = bench.CHECKS[0], bench.candidates(gradients.backward_of(bench.CHECKS[0][0]), 6, 2, (2,))
    want = gradients.expected(cell, gradients.make(cell, kind=kind), gradients.backward_of(cell).grads)
    assert all(bench.checked((cell, kind), want, {n: made[n] for n in ("gathered", name)})["right"].values())


@pytest.mark.parametrize(("sequences", "heads", "tokens", "how"), [
    (1, 32, 4096, "roles-aside-throughout-short"), (1, 32, 8192, "roles-aside-throughout"),
    (1, 64, 8192, "roles-aside-throughout"), (8, 8, 4096, "roles-halves-aside-throughout-short"),
    (8, 32, 32768, "roles-throughout"), (2, 33, 8192, "roles-aside-throughout"),
    (8, 8, 8192, "roles-halves-aside-throughout-short"), (8, 4, 8192, "roles-aside-throughout-short"),
    (1, 16, 8192, "roles-halves-aside-throughout-short"),
    (1, 16, 32768, "roles-halves-aside-throughout"), (1, 8, 32768, "roles-segments-throughout"),
    (1, 4, 32768, "roles-segments-throughout"), (4, 8, 4096, "roles-halves-aside-throughout-single"),
    (1, 4, 768, "roles-halves-aside-throughout-single"), (1, 4, 8192, 0), (2, 8, 8192, 0), (1, 4, 16384, 16)])
def test_what_serves(sequences: int, heads: int, tokens: int, how: str | int) -> None:
    """Whole heads or halves, beside each other where the blocks of one scan have a multiprocessor each; segments where few
    heads have many tokens; Triton alone in between, in segments of so many chunks. After roles walks of more chunks where there
    are blocks enough."""
    registry.forget()
    option = registry.options(bench.TIMED, "sm_90", sequences, heads, tokens)[0]
    assert isinstance(option.variant, Variant) and (option.backend == "triton") == isinstance(how, int)
    kernels = option.variant.compiled.kernels
    assert [k.name for k in kernels if k.options.roles] == (["solve", "again", "back", "grads"] if isinstance(how, str) else [])
    assert [k.name for k in kernels if k.options.aside] == ["again"] * ("aside" in str(how))
    turns = whole_scans("sm_90", bench.TIMED, sequences, heads, "triton", merges="gathered-turns")[0]
    wanted = served(turns, bench.TIMED, WAYS[how]) if isinstance(how, str) else \
        in_segments(turns, bench.TIMED, how, adjoints.TURNS) if how else turns
    assert [s.hash for s in option.variant.sources] == [s.hash for s in variant(bench.TIMED, wanted, "triton", "sm_90").sources]


@pytest.mark.parametrize("tokens", [8192, 1024])
@pytest.mark.parametrize("flags", [c for n in range(4) for c in combinations(
    ("l2norm", "initial_state", "final_state", "beta_sigmoid", "neg_eigval"), n)], ids=" ".join)
def test_what_roles_do_not_serve_says_why(flags: tuple[str, ...], tokens: int) -> None:
    """Of all flags, with and without the initial state's gradient: what is chosen for roles can be made of them."""
    registry.forget()
    switches = Switches(**dict.fromkeys(flags, True))
    for grads in {bench.TIMED.grads, (*bench.TIMED.grads, *(["initial_state"] if switches.initial_state else []))}:
        instance = replace(bench.TIMED, switches=switches, grads=grads)
        option = next(o for o in registry.options(instance, "sm_90", 1, 32, tokens) if o.backend == "tilelang")
        if switches.neg_eigval and not switches.beta_sigmoid:
            assert "not doubled (neg_eigval) alone" in option.reason
        else:
            assert isinstance(option.variant, Variant), option.reason


@pytest.mark.parametrize(("change", "sequences", "heads", "tokens", "how"), [
    ({"varlen": False}, 4, 4, 32768, "segments would take longer"), ({"varlen": True}, 4, 4, 32768, Way(segment=32, walk=8)),
    ({"varlen": False}, 4, 16, 8192, Way((), True, walk=2)), ({"varlen": True}, 4, 16, 8192, Way(BOTH, True, walk=2)),
    ({"varlen": True}, 1, 64, 8192, Way((), True, walk=8)), ({"grouped": False}, 1, 16, 8192, Way(BOTH, True, walk=8)),
    ({"switches": Switches(l2norm=True)}, 1, 8, 32768, "nothing normalised"), ({"grouped": False}, 1, 8, 32768, "that share"),
    ({"switches": Switches(beta_sigmoid=True)}, 2, 32, 8192, Way((), True, fine=0)),
    ({"switches": Switches(beta_sigmoid=True)}, 4, 32, 8192, Way(fine=0)),
    ({"switches": Switches(l2norm=True)}, 1, 32, 8192, Way((), True, walk=8)),
    ({"switches": Switches(l2norm=True, final_state=True)}, 1, 32, 8192, Way((), True, walk=8)),
    ({"switches": Switches(beta_sigmoid=True)}, 1, 4, 768, "beta comes as logits")])
def test_what_a_call_is_changes_how_it_is_served(change: dict[str, Any], sequences: int, heads: int, tokens: int,
                                                 how: Way | str) -> None:
    """Packed sequences may be unequal, which dense ones are not; heads that share none have twice the blocks; of what was
    normalised, and of heads that share none, no GPU has run segments; of a beta that is a logit roles make no gradient."""
    found = way(replace(bench.TIMED, **change), sequences, heads, tokens, 132)
    assert how in found if isinstance(how, str) and isinstance(found, str) else found == how


TIMED_AT = ("9b76abe", "337dec3", "9dd118f", "aaca00f", "b880f3a")     # of role_inner.json
# what took more than 1.05 times as long as the fastest that was timed beside it, with plain arithmetic
SLOWER = {("8x1024", 4): 1.065, ("8x4096", 8): 1.06, ("3000+5192", 16): 1.07}


def candidate(how: Way) -> str:
    turns = whole_scans("sm_90", bench.TIMED, 1, 32, "triton", merges="gathered-turns")[0]
    return bench.called(served(turns, bench.TIMED, how, inverses=False))             # Triton's, as when they were timed


def test_ways_are_those_that_were_fastest() -> None:
    """Over TRAIN's shapes and others, as timed on an H100 with what else might serve: its time, where it was timed; of pages
    from before arithmetic was finer, that of the same way without."""
    pages = json.loads((Path(bench.__file__).parent / "results" / "h100" / "role_inner.json").read_text())
    seen = 0
    for row in (r for page in pages if page["commit"] in TIMED_AT for r in page["rows"]):
        ((lengths, _, HV),) = cases.parse(f"{row['shape']}:{row['heads'][0]}/{row['heads'][1]}", "train")
        found = way(replace(bench.TIMED, varlen=True), len(lengths), HV, sum(lengths), 132)
        size = adjoints.segment_of(len(lengths), HV, sum(lengths), 132)
        every = {candidate(replace(w, fine=fine)) for w in WAYS.values() for fine in (0, w.fine)}
        mine = f"gathered-turns-segments-{size}" if size else "turns"
        if isinstance(found, Way):
            mine = next((n for n in (candidate(found),) if n in row["plans"]), candidate(replace(found, fine=0)))
        times = {n: p["ms"] for n, p in row["plans"].items() if "ms" in p and (n in every or "inner" not in n)}
        if mine in times:
            seen += 1
            ratio = times[mine] / min(times.values())
            assert ratio < SLOWER.get((row["shape"], HV), 1.05), (row["shape"], HV, mine, times)
    assert seen > 30


def test_scans_in_two_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that runs again starts behind what is before it, the adjoint's beside it, and inner behind both; they share no
    memory. Where they would meet, or something follows, it is refused; JSON keeps it."""
    def made(base: Schedule) -> Variant:
        return variant(bench.TIMED, base, "triton", "sm_90")
    base = whole_scans("sm_90", bench.TIMED, 1, 32, "triton")[0]
    schedule = as_roles(base, aside=True)
    kernels, said = made(schedule).compiled.kernels, list[str]()
    assert moments(kernels) == [1, 2, 3, 3, 4, 5, 5] and Schedule.from_json(schedule.to_json()) == schedule

    class Stream:
        device_index, cuda_stream = 0, 0

        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            said.append(f"{self.name} waits for {other.name}")
    here, there = Stream("here"), Stream("aside")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: here)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: nullcontext(said.append(f"in {s.name}")))
    monkeypatch.setattr("gdn_ir.backends.temporaries.stream", lambda *_: there)
    launches = [lambda *_, name=k.name: said.append(name) for k in kernels]
    launched(kernels, launches, {}, {}, None, True)        # type: ignore[arg-type]
    assert said == ["solve", "local", "aside waits for here", "in aside", "again", "back", "here waits for aside", "inner",
                    "heads", "grads"]

    def broken(*_: object) -> None:
        raise RuntimeError("no launch")
    breaks = [broken if k.name == "back" else x for k, x in zip(kernels, launches, strict=True)]
    with pytest.raises(RuntimeError, match="no launch"):   # what runs aside is waited for all the same
        launched(kernels, breaks, {}, {}, None, True)      # type: ignore[arg-type]
    assert said[-2:] == ["again", "here waits for aside"]
    for kernel in ("solve", "back", "heads", "grads"):
        options = {kernel: replace(schedule.options(kernel), aside=True)}
        with pytest.raises(IRError, match=f"aside: {kernel} cannot run beside"):
            made(as_roles(base).with_options(**options))
    with pytest.raises(IRError, match="aside: again cannot run beside"):
        made(base.with_options(again=replace(base.options("again"), aside=True)))


def changed(roles: Roles, role: str, before: str, after: str) -> Roles:
    """One event of a role replaced by another, or (after == "") left out."""
    def events(found: tuple[Event, ...]) -> tuple[Event, ...]:
        return tuple(Event.of(after) if str(e) == before else e for e in found if after or str(e) != before)
    return replace(roles, roles=tuple(replace(r, events=events(r.events)) if r.name == role else r for r in roles.roles))


@pytest.mark.parametrize(("again", "back", "why"), [
    (changed(AGAIN, "state", "compute S16", ""), BACK, "store S_kept: no event of any role makes what is stored"),
    (changed(AGAIN, "state", "write S16", "write R"), BACK, "write R: it is not computed here, or has no ring"),
    (AGAIN, changed(BACK, "state", "issue QX", ""), "the carry d_S must end as x \\+ product"),
    (AGAIN, changed(BACK, "sums", "fetch G early", "fetch q early"), "fetch q early: .* is not what one can fetch")])
def test_declines(again: Roles, back: Roles, why: str) -> None:
    with pytest.raises(Unsupported, match=why):
        made_of(SMALL, back, True, again)


def test_products_are_last() -> None:
    """`accumulate` puts them there, and says so where there is nothing to add onto."""
    p = gradients.backward_of(SMALL).program
    (once,) = apply(p, (("accumulate", "d_S"),))
    assert apply(once, (("accumulate", "d_S"),)) == (once,) and once != p
    with pytest.raises(IllegalStep, match="accumulate: no scan carries 'x', a sum of products"):
        apply(p, (("accumulate", "x"),))
