"""Mutants of our program - a sign, an operand, a dropped term - change every backend's result as the interpreter predicts."""
from __future__ import annotations

import pytest
import torch

from gdn_ir.backends import BACKENDS
from gdn_ir.backends.base import Call
from gdn_ir.compiler import Compiled, lower
from gdn_ir.interp import Sizes, run
from gdn_ir.nodes import Node, Op, make
from gdn_ir.program import Program
from gdn_ir.programs.gated_delta import Switches, build
from gdn_ir.rewrite import simplify
from gdn_ir.schedules.plans import plan
from gdn_ir.schedules.schedule import Schedule
from gdn_ir.verify import verify

AXES, CU = {"C": 16, "K": 16, "V": 16, "H": 1, "HV": 2}, [0, 37, 53]
PROGRAM = build(Switches(initial_state=True, final_state=True))


def mutants() -> list[tuple[str, Node, Node]]:
    """(what changed, the node, what it becomes) for each sum, difference, product and solve of the program."""
    found = []
    for n in PROGRAM.nodes():
        if n.op is Op.ELEM and n["fn"] in ("add", "sub", "mul"):
            x, y = n.args
            other = {"add": "sub", "sub": "add", "mul": "add"}[n["fn"]]
            found.append((f"{n['fn']} -> {other}", n, make(Op.ELEM, (x, y), fn=other)))
            if set(x.axes) == set(n.axes):
                found.append((f"{n['fn']}: right operand dropped", n, x))
            if set(y.axes) == set(n.axes):
                found.append((f"{n['fn']}: left operand dropped", n, y))
        elif n.op is Op.DOT:
            found.append(("product negated", n, -n))
        elif n.op is Op.TRI_SOLVE:
            found.append(("solve dropped", n, n.args[1]))
            found.append(("solve: M negated", n, make(Op.TRI_SOLVE, (-n.args[0], n.args[1]), **dict(n.attr))))
        elif n.op is Op.SELECT:
            found.append(("mask dropped", n, n.args[1]) if set(n.args[1].axes) == set(n.axes) and n.args[2].const == 0.0 else
                         ("mask negated", n, make(Op.SELECT, (n.args[0], -n.args[1], n.args[2]))))
    return found


def inputs() -> dict[str, torch.Tensor]:
    sizes, generator = Sizes(AXES, CU), torch.Generator().manual_seed(0)
    x = {n: 0.4 * torch.randn([sizes.dim(d) for d in t.dims], generator=generator).double()
         for n, t in PROGRAM.tensors().items() if n in PROGRAM.read()}
    return x | {"g": -0.3 * x["g"].abs(), "beta": x["beta"].sigmoid()}


def by_torch(p: Program) -> dict[str, torch.Tensor]:
    b = BACKENDS["torch"]
    kernels = lower(p, Schedule("naive", 16, plan("naive"), dot="f64"), b, "cpu", AXES, {"io": "f64", "beta": "f64"}, True)
    call = Call(2, 53, 53, {"H": 1, "HV": 2}, torch.tensor(CU, dtype=torch.int32))
    return Compiled(kernels, b, "cpu").apply(inputs(), {"scale": 0.7}, call)


MUTANTS = mutants()


def test_there_are_many() -> None:
    assert len(MUTANTS) >= 40


@pytest.mark.parametrize("i", range(len(MUTANTS)))
def test_mutant(i: int) -> None:
    what, node, new = MUTANTS[i]
    mutant = verify(PROGRAM.rebuild(lambda n, args: new if n is node else None))
    sizes = Sizes(AXES, CU)
    before, after = run(PROGRAM, inputs(), sizes, {"scale": 0.7}), run(mutant, inputs(), sizes, {"scale": 0.7})
    change = max(float((after[n] - before[n]).abs().max()) for n in before)
    if change == 0.0 or simplify(mutant).roots == simplify(PROGRAM).roots:
        # a mask within a mask: M is used strictly below its diagonal whatever lies above
        assert what == "mask dropped" and node.args[0]["fn"] == "gt", PROGRAM.describe(node)
        return
    assert change > 1e-6, (what, PROGRAM.describe(node))
    got = by_torch(mutant)
    for n in before:
        scale = after[n].abs().max().clamp(min=1.0)
        assert float((got[n] - after[n]).abs().max() / scale) < 1e-6, (what, PROGRAM.describe(node))
