"""Where temporaries lie: how long each is needed, who shares memory with whom, and how much that takes."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gdn_ir.backends.base import STORED, Call, Kernel
from gdn_ir.backends.temporaries import (
    APART,
    BLOCK,
    SMALL,
    Place,
    Span,
    _in_groups_place,
    as_large,
    end_of_large,
    in_a_row,
    moments,
    outputs,
    overwritten,
    placed,
    temporaries,
)
from gdn_ir.backends.triton import driver
from gdn_ir.compiler import Instance, variant
from gdn_ir.nodes import Op
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.schedules.defaults import default, whole_scans
from tests.differential import interpreted
from tests.test_driver import Driver

BACKWARD = Instance(Switches(), 128, 128, "bf16", "bf16", True, ("q", "k", "v", "g", "beta"))
FORWARD = Instance(Switches(final_state=True), 128, 128, "bf16", "bf16", True)
MIB = 2 ** 20


SPANS = st.tuples(st.integers(0, 6), st.integers(0, 3), st.integers(0, 5000)).map(lambda x: Span(x[0], x[0] + x[1], x[2]))


def kernels(instance: Instance, heads: int = 32) -> tuple[Kernel, ...]:
    return variant(instance, default("sm_90", instance, 1, heads, 32768)[0], "triton", "sm_90").compiled.kernels


def live(spans: dict[str, Span], now: int) -> list[str]:
    return [n for n, s in spans.items() if s.first <= now <= s.last]


# ---- how much ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("instance", "H", "HV", "apart", "together", "hosted"), [
    (BACKWARD, 16, 32, 1930.3, 1930.3, 1418.3), (BACKWARD, 2, 4, 266.8, 245.5, 161.3),
    (FORWARD, 16, 32, 901.1, 901.1, 645.1), (FORWARD, 2, 4, 112.6, 112.6, 80.6)])
def test_how_much_a_call_allocates(instance: Instance, H: int, HV: int, apart: float, together: float, hosted: float) -> None:
    """MiB at 1x32768: a tensor each, one block, one block and outputs, some over others. No arrangement of the block takes
    less: it is as large as what is needed at its fullest moment. (The backward's is that of both scans and what follows them;
    of few heads, whose scans are in segments, that of grads alone.)"""
    pipeline, call = kernels(instance, HV), Call(1, 32768, 32768, {"H": H, "HV": HV})
    temps, outs = ({n: life.span(call) for n, life in some.items()} for some in (temporaries(pipeline), outputs(pipeline)))
    assert sum(s.size for s in temps.values()) / MIB == pytest.approx(apart, abs=0.06)
    for hosts, over, want in (({}, {}, together), (outs, overwritten(pipeline), hosted)):
        places, size = placed(temps, hosts, over)
        assert size / MIB == pytest.approx(want, abs=0.06)
        left = {n: temps[n] for n, p in places.items() if p.where == BLOCK}
        assert size == max(sum(-(-left[n].size // APART) * APART for n in live(left, now)) for now in range(16))


@pytest.mark.parametrize(("H", "HV", "rows", "block"), [
    (2, 4, ("d_q", "d_k"), 149.0), (2, 4, ("d_k",), 164.3), (16, 32, ("d_q", "d_k"), 1158.1), (16, 32, ("d_k",), 1314.1),
    (2, 2, ("d_k",), 66.1), (2, 8, ("d_q", "d_k"), 353.5)])
def test_u_lies_where_gradients_of_key_heads_will(H: int, HV: int, rows: tuple[str, ...], block: float) -> None:
    """MiB of the block by roles at 1x32768: where two value heads share a key head and d_q and d_k are in a row, u is in both;
    where each has its own, in one of them; four have no room there."""
    pipeline = by_roles(HV)
    over = overwritten(pipeline)
    assert over["u"] == ("d_k", "d_q") and over["d_r"] == ("d_v",)
    call = Call(1, 32768, 32768, {"H": H, "HV": HV})
    temps, outs = ({n: life.span(call) for n, life in some.items()} for some in (temporaries(pipeline), outputs(pipeline)))
    over = as_large(temps | outs, over | {"u": rows})
    assert placed(temps, outs, over)[1] / MIB == pytest.approx(block, abs=0.06)
    assert over.get("u") == (rows[:HV // H] if len(rows) >= HV // H else None)


def by_roles(heads: int, instance: Instance = BACKWARD) -> tuple[Kernel, ...]:
    return variant(instance, default("sm_90", instance, 1, heads, 32768, "tilelang")[0], "tilelang", "sm_90").compiled.kernels


def test_only_who_takes_a_whole_group_writes_over_its_rows() -> None:
    """Not a block of one value head, nor rows of another size, nor a sum of something else, nor a temporary in turn."""
    pipeline = by_roles(4)
    last = next(k for k in pipeline if k.name == "grads")
    (load,) = (n for n in last.program.nodes() if n.op is Op.LOAD and n["tensor"].name == "u")
    stores = {n["tensor"].name: n for n in last.program.nodes() if n.op is Op.STORE}
    assert _in_groups_place(last, load, stores["d_q"]) and not _in_groups_place(last, load, stores["d_v"])
    wide = replace(last, extents=last.extents | {"K": 64})
    other = load.but(tensor=replace(load["tensor"], name="u2"))
    temp = stores["d_q"].but(tensor=replace(stores["d_q"]["tensor"], temp=True))
    alone = replace(last, options=replace(last.options, roles=None))
    for kernel, a, b in ((alone, load, stores["d_q"]), (wide, load, stores["d_q"]), (last, other, stores["d_q"]),
                         (last, load, temp), (last, load.but(tensor=replace(load["tensor"], members=())), stores["d_q"])):
        assert not _in_groups_place(kernel, a, b)


def test_what_lies_in_a_row() -> None:
    """Parts of one tensor that touch; not with a gap, nor where one ends and another piece of memory begins."""
    whole, raw = torch.empty(4, 3, 4), bytearray(96)
    far = dict(zip("abcd", whole)) | {"e": torch.frombuffer(raw, dtype=torch.float32, count=12),
                                      "f": torch.frombuffer(raw, dtype=torch.float32, count=12, offset=48)}
    assert far["f"].data_ptr() == far["e"].data_ptr() + far["e"].nbytes
    assert in_a_row(far, ("b", "a")) == ("a", "b") and in_a_row(far, ("c", "b", "d")) == ("b", "c", "d")
    assert in_a_row(far, ("a", "c")) == ("a",) and in_a_row(far, ("f", "e")) == ("e",) and in_a_row(far, ("d",)) == ("d",)


@given(st.lists(SPANS, max_size=12))
def test_the_block_s_two_parts(temps: list[Span]) -> None:
    """Each temporary is in one of them; all that is not small in the first."""
    few = [s._replace(size=s.size * 2 ** 10) for s in temps]
    places, size = placed({str(i): s for i, s in enumerate(few)}, {})
    parts = {n: (p.at, few[int(n)].size) for n, p in places.items()}
    end = end_of_large(parts)
    assert end % APART == 0 and end <= size
    for at, n in parts.values():
        assert at + n <= end or at >= end
        assert n < SMALL or at + n <= end
    assert end == 0 or any(n >= SMALL for _, n in parts.values())


# ---- how long ---------------------------------------------------------------------------------------------------------------


def test_followers_are_of_one_moment() -> None:
    pipeline = variant(BACKWARD, whole_scans("sm_90", BACKWARD, 1, 32, "triton")[0], "triton", "sm_90").compiled.kernels
    assert [k.name for k in pipeline] == ["solve", "local", "again", "back", "inner", "heads", "grads"]
    assert moments(pipeline) == [1, 2, 3, 3, 3, 4, 4]
    spans = {n: (life.first, life.last) for n, life in temporaries(pipeline).items()}
    assert spans["A"] == (1, 3) and spans["u"] == (3, 4)   # again and back read the one, while inner runs beside them
    assert spans["d_q_parts"] == (3, 4) and spans["d_r"] == (3, 3) and spans["d_S"] == (3, 4)
    assert {spans["again_ready"], spans["back_ready"]} == {(1, 3), (2, 3)}             # from where they are cleared
    one_by_one = tuple(replace(k, awaits=(), beside=False) for k in pipeline)
    assert moments(one_by_one) == [1, 2, 3, 4, 5, 6, 7] and temporaries(one_by_one)["A"].last == 4
    assert {n: life.first for n, life in outputs(pipeline).items()} == {"d_q": 4, "d_v": 3, "d_beta": 3, "d_k": 4, "d_g": 4}


def test_counts_that_no_kernel_clears_are_there_from_the_start() -> None:
    plain = Instance(Switches(erase=False), 128, 128, "bf16", "bf16", True)
    assert temporaries(kernels(plain))["scan_ready"][2:] == (0, 1)


def test_a_lifetime_of_one_kernel_less_is_seen() -> None:
    """Executed by Triton's interpreter, with whatever is not needed overwritten before every kernel: gradients are right; and
    wherever a temporary is said to end one kernel earlier, they are not."""
    cases: list[list[object]] = [["lifetimes", "gated delta rule, f32, varlen", "states"]]
    (found,) = interpreted(cases).values()
    assert float(found["error"]) < 2e-5 and found["unseen"] == [] and found["temporaries"] == 12, found       # type: ignore[arg-type]


def test_a_last_reader_writes_over_what_it_has_read() -> None:
    """Executed by Triton's interpreter: d_r over what back reads of u's gradient (a product lies between), then d_v over d_r
    (element by element); not what another block, or an instruction after, still reads."""
    name = "gated delta rule, f32, varlen"
    found = interpreted([["hosted", name, plan] for plan in ("gathered-turns", "states")])
    assert all(float(str(v.get("error", "nan"))) < 2e-5 for v in found.values()), found
    turns, states = (v["over"] for v in found.values())
    assert turns == {"d_u_o": ["d_r"], "d_r": ["d_v"]} and not {"A", "u", "S_kept", "d_S"} & {*states}


# ---- where ------------------------------------------------------------------------------------------------------------------


@given(st.lists(SPANS, max_size=12), st.lists(SPANS, max_size=3))
def test_none_overlaps_what_lives_beside_it(temps: list[Span], outs: list[Span]) -> None:
    spans, hosts = {str(i): s for i, s in enumerate(temps)}, {f"out {i}": s for i, s in enumerate(outs)}
    places, size = placed(spans, hosts)
    assert places.keys() == spans.keys()
    for n, (where, at) in places.items():
        assert at % APART == 0
        if where == BLOCK:
            assert at + spans[n].size <= size
        else:
            assert at + spans[n].size <= hosts[where].size and spans[n].last < hosts[where].first
    for now in range(10):
        for where in {BLOCK, *hosts}:
            taken = sorted((places[n].at, places[n].at + spans[n].size) for n in live(spans, now)
                           if places[n].where == where and spans[n].size)
            assert all(end <= start for (_, end), (start, _) in zip(taken, taken[1:]))


def test_the_largest_first_and_each_as_low_as_it_goes() -> None:
    """What is done by hand: b takes a's place, for a has ended; c lies in the output until that is written; d behind b."""
    spans = {"d": Span(3, 3, 300), "a": Span(0, 1, 1024), "b": Span(2, 3, 1000), "c": Span(1, 2, 512)}
    places, size = placed(spans, {"o": Span(3, 9, 512)})
    assert places == {"a": Place(BLOCK, 0), "b": Place(BLOCK, 0), "c": Place("o", 0), "d": Place(BLOCK, 1024)} and size == 1536


class Memory(Driver):
    """Takes down what memory is set to zero too."""

    def __init__(self, *kernels: Kernel) -> None:
        super().__init__(*kernels)
        self.zeroed: list[tuple[int, int]] = []

    def cuMemsetD32Async(self, at: int, value: int, number: int, stream: int) -> int:
        self.zeroed.append((at, number))
        return 0


def test_a_kernel_alone_is_given_all_that_it_touches(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pipeline of two backends' kernels; also what elsewhere would be written over."""
    for name, stub in (("current", lambda: -1), ("stream", lambda device: 7),
                       ("workspace", lambda size, device: torch.empty(size, dtype=torch.uint8))):
        monkeypatch.setattr(driver, name, stub)
    pipeline = variant(BACKWARD, whole_scans("sm_90", BACKWARD, 1, 32, "triton", merges="gathered-turns")[0], "triton",
                       "sm_90").compiled.kernels
    assert overwritten(pipeline)
    call = Call(2, 200, 200, {"H": 2, "HV": 4}, torch.tensor([0, 120, 200], dtype=torch.int32))
    for k in pipeline:
        fake = Memory(k)
        monkeypatch.setattr(driver, "driver", lambda fake=fake: fake)
        given = {t.name: torch.zeros(call.shape(k, t), dtype=STORED[t.dtype]) for t in k.tensors()}
        driver.Image(k, b"", {"name": k.name, "shared": 0, "num_warps": 4})(given, {"scale": 0.5}, call)
        ((_, values),) = fake.launched
        assert all(values[n] == x.data_ptr() for n, x in given.items())


@pytest.mark.parametrize("instance", [replace(BACKWARD, K=64, V=64), replace(BACKWARD, K=256, V=256, io="f32", beta="f32"),
                                      Instance(Switches(erase=False), 64, 64, "bf16", "bf16", True)])
def test_what_a_driver_is_given_never_overlaps(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses as kernels get them: what is alive at one moment lies apart, temporaries in outputs too, and the same for all
    kernels; counts start at zero where they lie."""
    for name, stub in (("current", lambda: -1), ("stream", lambda device: 7),
                       ("workspace", lambda size, device: torch.empty(size, dtype=torch.uint8))):
        monkeypatch.setattr(driver, name, stub)
    pipeline = kernels(instance)
    fake = Memory(*pipeline)
    monkeypatch.setattr(driver, "driver", lambda: fake)
    call = Call(2, 200, 200, {"H": 2, "HV": 4}, torch.tensor([0, 120, 200], dtype=torch.int32))
    over = overwritten(pipeline)
    lives = {n: x for n, x in (temporaries(pipeline) | outputs(pipeline)).items() if n not in over}    # they lie there too
    size = {n: life.span(call).size for n, life in lives.items()}
    given = {t.name: torch.zeros(call.shape(k, t), dtype=STORED[t.dtype]) for k in pipeline for t in k.tensors() if not t.temp}
    images = [driver.Image(k, b"", {"name": k.name, "shared": 0, "num_warps": 4}) for k in pipeline]
    driver.Batch(images, temporaries(pipeline))(given, {"scale": 0.5}, call)
    places: dict[str, set[int]] = {n: {values[n] for _, values in fake.launched if n in values} for n in lives}
    assert all(len(at) == 1 and next(iter(at)) % 16 == 0 for at in places.values())
    for now in range(1, len(pipeline) + 1):
        taken: list[Any] = sorted((*places[n], size[n]) for n, life in lives.items() if life.first <= now <= life.last)
        assert all(at + n <= after for (at, n), (after, _) in zip(taken, taken[1:]))
    hosted = [n for n in lives if n in temporaries(pipeline) for out, x in given.items() if out in places
              and 0 <= next(iter(places[n])) - x.data_ptr() < size[out]]
    assert bool(hosted) == bool(instance.grads)
    counts = {n for n, life in temporaries(pipeline).items() if life.first == 0}
    assert {at for at, _ in fake.zeroed} == {at for n in counts for at in places[n]} and bool(counts) == (not instance.grads)
