"""Programs unlike the gated delta rule, through the interpreter and every backend: four fixed ones and 200 random ones."""
from __future__ import annotations

import json

import pytest

from gdn_ir.backends.base import Reason
from gdn_ir.interp import run
from gdn_ir.nodes import Op, base
from gdn_ir.padding import pad
from gdn_ir.precision import precision, storage
from gdn_ir.printer import dump, evaluate
from gdn_ir.program import tile_axes
from tests import programs
from tests.differential import by_backend, distance, executed, interpreted

RANDOM = [str(i) for i in range(200)]


def case_of(name: str) -> programs.Case:
    return programs.FIXED[name]() if name in programs.FIXED else programs.rand(int(name))


@pytest.mark.parametrize("name", programs.FIXED)
def test_fixed(name: str) -> None:
    check(name)


@pytest.mark.parametrize("start", range(0, 200, 20))
def test_random(start: int) -> None:
    for name in RANDOM[start:start + 20]:
        check(name)


def check(name: str) -> None:
    """Text and back; padded as exact; float64 torch as the interpreter (states are stored in float32)."""
    case = case_of(name)
    want = run(case.program, case.inputs(), case.sizes())
    assert evaluate(dump(case.program)) == case.program
    guarded = pad(precision(storage(case.program, io="f64"), "f64", "f64"), frozenset(tile_axes(case.program)))
    sizes = case.sizes()
    sizes.tiles = {a: 64 for a in case.axes if any(base(x) == a for n in guarded.nodes() for x in n.axes)}
    assert distance(run(guarded, case.inputs(), sizes, padded=True), want) < 1e-12, name
    got = by_backend(case, "torch", "f64", "cpu")
    assert not isinstance(got, Reason), (name, got)
    assert distance(got, want) < 1e-6, name


def test_random_programs_are_not_all_alike() -> None:
    cases = [programs.rand(i) for i in range(200)]
    ops = {n.op for c in cases for n in c.program.nodes()}
    assert {Op.DOT, Op.CUMSUM, Op.REDUCE, Op.SELECT, Op.TRI_SOLVE, Op.TWIN, Op.CARRY, Op.ELEM} <= ops
    assert len({c.program.roots for c in cases}) > 190


@pytest.mark.parametrize("backend", ["triton", "tilelang"])
def test_executed(backend: str, printed: list[str]) -> None:
    """Every one of them as an emitted kernel in float32: by Triton's interpreter, and as native code."""
    cases: list[list[object]] = [["program", n] for n in (*programs.FIXED, *RANDOM)]
    found = interpreted(cases) if backend == "triton" else executed(cases, "tilelang", "cpu")
    declined = {k: v for k, v in found.items() if "declined" in v}
    failed = {k: v for k, v in found.items() if "failed" in v or ("error" in v and not float(str(v["error"])) < 1e-4)}
    ran = len(found) - len(declined) - len(failed)
    printed.append(f"programs unlike ours, {backend}: {ran} executed, {len(declined)} declined, {len(failed)} failed")
    assert not failed, json.dumps(failed, indent=1)[:3000]
    assert len(declined) <= 0.05 * len(found), json.dumps(declined, indent=1)[:3000]
