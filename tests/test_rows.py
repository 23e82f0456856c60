"""What a program makes of rows alone, a normalised q and k, taken out of the backward: exact, and the rest as without it."""
from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from gdn_ir.autodiff import backward
from gdn_ir.bench.errors import relative
from gdn_ir.bench.gradients import FULL, expected, make
from gdn_ir.compiler import Instance, variant
from gdn_ir.coverage import Cell, Layout
from gdn_ir.nodes import Node, Op
from gdn_ir.program import Program
from gdn_ir.programs.gated_delta import Switches, build
from gdn_ir.schedules import steps
from gdn_ir.schedules.defaults import whole_scans
from gdn_ir.schedules.plans import backward_plan
from gdn_ir.schedules.schedule import Schedule
from tests import inputs
from tests.test_back_segments import CHUNK, GRADS, by_interpreter

NORMALISED = replace(FULL, l2norm=True)
CELL = Cell("normalised", NORMALISED, "f64", Layout((0, 50, 1, 33), True, 1, 3, 5, 6))
WRAP = ("wrap", "q,k", "io", "norm", "unnorm")


@pytest.mark.parametrize("name", ["naive", "states", "grouped", "gathered", "gathered-segments", "gathered-merged",
                                  "gathered-turns-segments"])
@pytest.mark.parametrize("H", [1, 3])
def test_exact(name: str, H: int) -> None:
    """In all plans, where value heads share a key head and where each has its own."""
    cell = replace(CELL, layout=replace(CELL.layout, H=H))
    x = make(cell, tail=0)
    x["q"], x["k"] = 3 * x["q"], x["k"] / 5
    p = backward(build(NORMALISED))
    plan = backward_plan(name, p, "f64", CHUNK, 4, segment=3, norm=True)
    kernels = steps.apply(p, plan)
    assert kernels[0].name == "norm" and kernels[-1].name == "unnorm" and set(kernels[-1].written()) == {"d_q", "d_k"}
    assert not {"q", "k"} & {t for k in kernels[1:-1] for t in k.read()}
    got, want = by_interpreter(cell, x, p, plan), expected(cell, x, (*GRADS, "initial_state"))
    assert all(inputs.error(got[f"d_{n}"], w) < (1e-8 if name.endswith("segments") else 1e-12) for n, w in want.items())


def test_the_rest_is_as_if_nothing_were_normalised() -> None:
    """On Hopper: between the two kernels the texts of the op without l2norm, but for the names of tensors."""
    plain = Instance(Switches(), 128, 128, "bf16", "bf16", True, GRADS, True)
    texts = []
    for i in (plain, replace(plain, switches=Switches(l2norm=True))):
        found = variant(i, whole_scans("sm_90", i, 1, 32, "triton")[0], "triton", "sm_90").sources
        lines = {s.kernel: [line for line in s.text.splitlines() if not line.strip().startswith("#")] for s in found}
        texts.append({k: re.sub(r"([qk])_(kept|made|2\b)", r"\1", "\n".join(t)) for k, t in lines.items()})
    for kernel in ("solve", "local", "again", "back", "inner"):          # grads and heads leave rows of no sequence to unnorm
        assert texts[0][kernel] == texts[1][kernel]


@pytest.mark.parametrize(("keep", "grads", "made"), [
    ("inverse", GRADS, ["d_k", "d_q"]), ("states", GRADS, ["d_k", "d_q"]), ("nothing", ("k", "v"), ["d_k"])])
def test_with_what_is_kept_and_asked_for(keep: str, grads: tuple[str, ...], made: list[str]) -> None:
    i = Instance(Switches(l2norm=True), 128, 128, "bf16", "bf16", True, grads, True, keep=keep)
    found = variant(i, whole_scans("sm_90", i, 1, 32, "triton")[0], "triton", "sm_90").compiled.kernels
    assert found[0].name == "norm" and sorted(found[-1].program.written()) == made


def test_within_the_bound_of_gradients() -> None:
    """Rounded as bf16 kernels round, in the mean of several samples: within the bound of gradients, as without (the normalised
    rows are rounded once more, and so d_g is off by a quarter more)."""
    cell = replace(CELL, layout=replace(CELL.layout, lengths=(150, 0, 40), H=1, HV=2, K=32, V=32))
    p = backward(build(NORMALISED))
    instance = Instance(NORMALISED, 32, 32, "bf16", "bf16", True, (*GRADS, "initial_state"), True)
    errors = torch.zeros(2, len(GRADS))
    for seed in range(6):
        torch.manual_seed(seed)
        x = make(cell, tail=0)
        x = {n: t if n in ("cu_seqlens", "g") or t.dtype != torch.float64 else t.bfloat16().double() for n, t in x.items()}
        want = expected(cell, x, GRADS)
        for j, norm in enumerate((False, True)):
            plan = backward_plan("gathered", p, "bf16", 16, norm=norm)
            s = Schedule("x", 16, plan, dot="bf16")
            given = {n: t if n in ("cu_seqlens", "g") or t.dtype != torch.float64 else t.bfloat16() for n, t in x.items()}
            given["g"] = x["g"].float()
            given |= {n: given[n].float() for n in given if "state" in n}
            got = variant(instance, s, "torch", "torch").apply({n: t for n, t in given.items() if n != "cu_seqlens"},
                                                              cell.layout.K ** -0.5, 3, x["cu_seqlens"])
            errors[j] += torch.tensor([relative(got[f"d_{n}"].double(), want[n]) for n in GRADS])
    assert bool((errors / 6 < 6e-3).all()), errors / 6


def test_refusals() -> None:
    p: Program = backward(build(NORMALISED))
    with pytest.raises(steps.IllegalStep, match="wrap: no kernel reads z"):
        steps.apply(p, (("wrap", "z", "io", "norm", "unnorm"),))
    with pytest.raises(steps.IllegalStep, match="wrap: there is a kernel norm, unnorm already"):
        steps.apply(p, (WRAP, WRAP))
    with pytest.raises(steps.IllegalStep, match="nothing is made of a row of q alone"):
        steps.apply(backward(build(FULL)), (WRAP,))

    def broken(tensor: str, change: Callable[[Node, Node], Node]) -> Program:
        """Something else is stored, made of what was and of the row of k."""
        k = next(n for n in p.nodes() if n.op is Op.LOAD and n["tensor"].name == "k")
        return p.rebuild(lambda n, args: n.but((change(args[0], k), *args[1:]))
                         if n.op is Op.STORE and n["tensor"].name == tensor else None)
    with pytest.raises(steps.IllegalStep, match="reads k in another way too"):
        steps.apply(broken("d_q", lambda x, k: x + k), (("wrap", "k", "io", "norm", "unnorm"),))
    with pytest.raises(steps.IllegalStep, match="d_k is not linear in it"):
        steps.apply(broken("d_k", lambda x, k: x + k), (("wrap", "k", "io", "norm", "unnorm"),))
