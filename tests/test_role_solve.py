"""The inverses of all chunks as roles, of forwards and backwards: steps, the plan, its text executed on the CPU, what nvcc
makes of it."""
from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
import torch

from gdn_ir.backends import BACKENDS
from gdn_ir.backends.base import SHARED, TORCH, Kernel
from gdn_ir.backends.tilelang.roles import RolePrinter, supports
from gdn_ir.backends.tilelang.runtime import lowered
from gdn_ir.bench import gradients, inputs
from gdn_ir.bench.errors import relative
from gdn_ir.cache import load_source
from gdn_ir.compiler import Instance, Variant, variant
from gdn_ir.coverage import Cell, Layout
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.reference import recurrence
from gdn_ir.schedules.adjoints import TURNS, in_segments
from gdn_ir.schedules.defaults import of_roles, roles_in_one, segmented_roles, whole_scans
from gdn_ir.schedules.execute import execute
from gdn_ir.schedules.role_solve import solve_as_roles
from gdn_ir.schedules.schedule import Schedule
from tests import emulated
from tests.test_role_backward import executed
from tests.test_role_kernels import spilled, synchronised
from tests.test_roles import unseen

STATES = Switches(initial_state=True, final_state=True)


def backward(cell: Cell, segment: int = 0, chunks: int = 2) -> Variant:
    instance = gradients.backward_of(cell)
    base = whole_scans("sm_90", instance, 1, 32, "triton", merges="gathered-turns")[0]
    base = in_segments(base, instance, segment, TURNS) if segment else base
    return variant(instance, solve_as_roles(base, chunks), "triton", "sm_90")


@lru_cache(maxsize=8)
def forward(segment: int = 0, varlen: bool = True, states: bool = True, chunks: int = 2, norm: bool = False) -> Variant:
    s = Switches(initial_state=states, final_state=states, l2norm=norm)
    i = Instance(s, 128, 128, "bf16", "bf16", varlen)
    base = segmented_roles(i, segment) if segment else of_roles(norm=norm)
    return variant(i, solve_as_roles(base, chunks), "tilelang", "sm_90")


def solve(chosen: Variant) -> Kernel:
    return next(k for k in chosen.compiled.kernels if k.name == "solve")


SMALL = Cell("", STATES, "bf16", Layout((130, 0, 64, 1), True, 1, 2, 128, 128))
ALL = {"backward": lambda: solve(backward(SMALL)), "backward in segments": lambda: solve(backward(SMALL, 2)),
       "forward": lambda: solve(forward()), "forward in segments": lambda: solve(forward(2))}


@pytest.mark.parametrize("which", ALL)
def test_runs(which: str) -> None:
    p = RolePrinter(ALL[which]()).plan
    for chunks in (0, 1, 2, 7):
        for ragged in (False, True):
            execute(p, chunks, ragged, seeds=10)


# What other synchronisation implies: the inverse has waited for M, which aux made of the sums; norms have fewer slots than
# these, and who stores reads both.
SCALED, READ = {"inverse: without wait G_full"}, {"load: without wait G_free"}
IMPLIED: dict[str, set[str]] = {"backward": set(), "backward in segments": READ, "forward": SCALED,
                                "forward in segments": READ | SCALED}


@pytest.mark.parametrize("which", ALL)
def test_nothing_derived_is_redundant(which: str) -> None:
    assert unseen(RolePrinter(ALL[which]()).plan) == IMPLIED[which]


@pytest.mark.parametrize(("lengths", "heads", "varlen", "states", "late", "segment"), [
    ((130, 0, 64, 1), (1, 2), True, True, False, 0), ((193, 193), (2, 2), False, False, True, 0),
    ((330, 0, 64, 130), (1, 2), True, True, False, 2)])
def test_emitted_text_computes_gradients(lengths: tuple[int, ...], heads: tuple[int, int], varlen: bool, states: bool,
                                         late: bool, segment: int) -> None:
    """Among the other kernels by torch, against float64; behind the last sequence all is NaN, and all that it writes was."""
    cell = Cell("", STATES if states else Switches(), "bf16", Layout(lengths, varlen, *heads, 128, 128))
    found, want = executed(backward(cell, segment), cell, late)
    for n, x in found.items():
        assert relative(x, want[n]) < 6e-3, n              # the bound of gradients


@pytest.mark.parametrize(("lengths", "varlen", "states", "late", "segment", "norm"), [
    ([130, 0, 64, 1], True, True, False, 0, False), ([193, 193], False, False, True, 0, True),
    ([330, 0, 64, 130], True, True, True, 2, False), ([300, 1], True, False, False, 2, True),
    ([193, 193], False, True, False, 2, False)])
def test_emitted_text_computes_the_rule(lengths: list[int], varlen: bool, states: bool, late: bool, segment: int,
                                        norm: bool) -> None:
    """Both kernels of roles, among the others by torch, against float64. Keys longer than 1 grow a state: the bounds of what
    fades are those that torch finds. Rows that no sequence owns are cleared by the scan."""
    chosen = forward(segment, varlen, states, 2, norm)
    x = inputs.make(lengths, 1, 2, device="cpu")
    x["k"] = x["k"] * (1 if norm else 1.2)
    ends, total, more = x["cu_seqlens"], sum(lengths), 200 * varlen
    want = recurrence(*(x[n][None] for n in ("q", "k", "v", "g", "beta")), l2norm=norm,
                      initial_state=x["initial_state"] if states else None, cu_seqlens=ends)
    memory = {n: torch.cat([t, torch.full((more, *t.shape[1:]), float("nan"), dtype=t.dtype)])
              for n, t in x.items() if n in ("q", "k", "v", "g", "beta")}
    memory |= {"initial_state": x["initial_state"], "o": torch.full_like(memory["v"], 7.0),
               "final_state": torch.full_like(x["initial_state"], float("nan"))}
    call = chosen.call_of(memory, len(lengths), ends if varlen else None)
    plain = variant(chosen.instance, Schedule("x", steps=chosen.schedule.steps), "torch", "torch").compiled.launches
    for kernel, source, launch in zip(chosen.compiled.kernels, chosen.sources, plain, strict=True):
        tensors = kernel.program.tensors()
        made = {n: t.to(TORCH[tensors[n].dtype]) for n, t in (launch(memory, {"scale": 128 ** -0.5}, call) or {}).items()
                if n in tensors}
        if kernel.options.roles is None:
            memory |= made
            continue
        memory |= {n: torch.full(call.shape(kernel, t), float("nan"), dtype=TORCH[t.dtype]) for n, t in tensors.items()
                   if t.temp and n in kernel.program.written()}
        emulated.run(kernel, source, memory, 128 ** -0.5, call, late)
        for n in kernel.program.written() if kernel.name == "solve" else ():
            found, wanted = memory[n].double(), made[n].double()
            if n in ("total", "fade"):                     # not every slot is a chunk's
                found, wanted = found[~found.isnan()], wanted[~found.isnan()]
                assert len(found) == 2 * sum(-(-length // 64) for length in lengths)
            else:
                found, wanted = found[:total], wanted[:total]
            assert torch.allclose(found, wanted, rtol=1e-2, atol=5e-3), n
    assert relative(memory["o"][:total], want[0][0]) < 5e-3
    assert not states or relative(memory["final_state"], want[1]) < 5e-3
    assert not varlen or not memory["o"][total:].any()
    assert chosen.compiled.tails == () or not varlen


@pytest.mark.parametrize("which", ["backward", "forward in segments"])
def test_cuda(which: str, tmp_path: Path) -> None:
    """Nothing is synchronised but by the plan, nothing spilled, and as many blocks fit as are meant to."""
    kernel = ALL[which]()
    source = RolePrinter(kernel).source()
    function = getattr(load_source("tilelang", source.kernel, source.hash, source.text), source.kernel)
    cuda, shared = lowered(function, "sm_90", BACKENDS["tilelang"].flags(kernel))
    synchronised(kernel, cuda)
    assert "__launch_bounds__(256, 4)" in cuda and 4 * (shared + 1024) <= SHARED["sm_90"] + 1024
    assert spilled(tmp_path, cuda) == 0


def test_refused() -> None:
    i = Instance(STATES, 128, 128, "bf16", "bf16", True)
    with pytest.raises(ValueError, match="got roles-fused; accepts a schedule that makes the inverses of all chunks at once"):
        solve_as_roles(roles_in_one())
    with pytest.raises(ValueError, match="got roles-fused-64; accepts"):
        solve_as_roles(segmented_roles(i, 64, one=True))
    kernel = solve(forward())
    assert supports(kernel, "sm_90") is None and "sm_90" in str(supports(kernel, "sm_80"))
