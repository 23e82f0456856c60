"""Mutants of our program - a sign, an operand, a dropped term - change every backend's result as the interpreter predicts."""
from __future__ import annotations

import json

import pytest
import torch

from gdn_ir.interp import Sizes, run
from tests.differential import executed, interpreted
from tests.mutants import AXES, CU, MUTANTS, PROGRAM, by_backend, inputs, mutant


def predicted(i: int | None) -> dict[str, torch.Tensor]:
    return run(PROGRAM if i is None else mutant(i), inputs(), Sizes(AXES, CU), {"scale": 0.7})


def test_there_are_many() -> None:
    assert len(MUTANTS) >= 40


def test_nearly_all_change_the_result() -> None:
    """Those that do not are a mask within a mask (M is used strictly below its diagonal, whatever lies above) and the bound on
    log decays, which no input here reaches."""
    before = predicted(None)
    for i, (what, node, _) in enumerate(MUTANTS):
        after = predicted(i)
        if max(float((after[n] - before[n]).abs().max()) for n in before) < 1e-6:
            bound = what.startswith("mask") and node.args[0]["fn"] == "lt"
            assert bound or (what == "mask dropped" and node.args[0]["fn"] == "gt"), PROGRAM.describe(node)


@pytest.mark.parametrize("i", range(len(MUTANTS)))
def test_torch(i: int) -> None:
    want, got = predicted(i), by_backend(mutant(i), "torch", "cpu")
    for n, w in want.items():
        assert float((got[n] - w).abs().max() / w.abs().max().clamp(min=1.0)) < 1e-6, (MUTANTS[i][0], n)


def test_triton() -> None:
    """Each as an emitted kernel, by Triton's interpreter."""
    within(interpreted([["mutant", i] for i in range(len(MUTANTS))]))


def test_tilelang() -> None:
    """Each as native code."""
    within(executed([["mutant", i] for i in range(len(MUTANTS))], "tilelang", "cpu"))


def within(found: dict[str, dict[str, object]]) -> None:
    wrong = {k: v for k, v in found.items() if not float(str(v.get("error", "nan"))) < 1e-4}
    assert not wrong, json.dumps(wrong, indent=1)[:3000]
