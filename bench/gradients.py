"""Gradients by a variant, outputs poisoned, beside those of float64 autograd through the token recurrence; on any device."""
from __future__ import annotations

from typing import Any

import torch

from gdn_ir.bench import inputs
from gdn_ir.bench.errors import relative
from gdn_ir.backends.base import TORCH
from gdn_ir.compiler import Instance, Variant, variant
from gdn_ir.coverage import Cell
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.reference import recurrence
from gdn_ir.schedules.defaults import default
from gdn_ir.schedules.schedule import Schedule

Tensors = dict[str, torch.Tensor]


def backward_of(cell: Cell, grads: tuple[str, ...] | None = None) -> Instance:
    """The backward instance of a cell: of all its inputs, unless some are named."""
    i, lay = cell.instance, cell.layout
    every = [n for n in ("q", "k", "v", "g", "beta", "initial_state") if n in i.program.read()]
    return Instance(i.switches, i.K, i.V, i.io, i.beta, i.varlen, grads or tuple(every), lay.HV > lay.H)


def make(cell: Cell, device: str = "cpu", kind: str = "model", tail: int = 70) -> Tensors:
    """Inputs of a cell with `tail` rows that no sequence owns (packed input only), and gradients of its outputs."""
    s, lay, io = cell.switches, cell.layout, TORCH[cell.io]
    lengths = [*lay.lengths, tail] if lay.varlen and tail else list(lay.lengths)
    x = inputs.make(lengths, lay.H, lay.HV, lay.K, lay.V, io, device, kind)
    if len(lengths) > len(lay.lengths):
        x["cu_seqlens"], x["initial_state"] = x["cu_seqlens"][:-1], x["initial_state"][:-1]
    generator = torch.Generator(device=device).manual_seed(1)
    if s.beta_sigmoid:
        x["beta"] = torch.randn(x["beta"].shape, generator=generator, device=device).to(io)
    if s.state_v_first:
        x["initial_state"] = x["initial_state"].mT.contiguous()
    wide = torch.float64 if cell.io == "f64" else torch.float32
    x["g"], x["initial_state"] = x["g"].to(wide), x["initial_state"].to(wide)
    x["d_o"] = torch.randn(x["v"].shape, generator=generator, device=device).to(io)
    x["d_final_state"] = torch.randn(x["initial_state"].shape, generator=generator, device=device).to(wide)
    return x


def expected(cell: Cell, x: Tensors, grads: tuple[str, ...]) -> Tensors:
    """Gradients by autograd through the recurrence in float64, on the CPU."""
    s = cell.switches
    leaves = {n: t.detach().cpu().double().requires_grad_() for n, t in x.items() if n != "cu_seqlens"}
    state = leaves["initial_state"] if s.initial_state else None
    q, k, v = (leaves[n][None] for n in ("q", "k", "v"))
    o, S = recurrence(q, k, v, leaves["g"][None] if s.decay == "scalar" else None,
                      leaves["beta"][None], None, state.mT if state is not None and s.state_v_first else state,
                      x["cu_seqlens"].cpu(), s.erase, s.l2norm, s.beta_sigmoid, s.neg_eigval)
    loss = (o[0] * leaves["d_o"].detach()).sum()
    if s.final_state:
        d_S = leaves["d_final_state"].detach()
        loss = loss + (S * (d_S.mT if s.state_v_first else d_S)).sum()
    return dict(zip(grads, torch.autograd.grad(loss, [leaves[n] for n in grads]), strict=True))


def run(chosen: Variant, cell: Cell, x: Tensors) -> Tensors:
    """The gradients a variant writes over poison."""
    needed = set(chosen.instance.program.read()) | {"q", "v"}
    found = {f"d_{n}": torch.full_like(x[n], float("nan")) for n in chosen.instance.grads}
    lay = cell.layout
    chosen({n: t for n, t in x.items() if n in needed} | found, lay.K ** -0.5, len(lay.lengths),
           x["cu_seqlens"] if lay.varlen else None)
    return found


def check(cell: Cell, backend: str, arch: str, device: str = "cpu", kind: str = "model", schedule: Schedule | None = None,
          grads: tuple[str, ...] | None = None, scans: int | None = None) -> dict[str, Any]:
    """The relative errors of a cell's gradients under a schedule (its default), and the hashes of the sources that ran.
    Rows that no sequence owns must come back as zeros: an error is infinite where they do not."""
    instance, lay = backward_of(cell, grads), cell.layout
    plain = backend.removesuffix("-ptx")
    schedule = schedule or default(arch, instance, 1, scans or len(lay.lengths) * lay.HV, sum(lay.lengths), plain)[0]
    x = make(cell, device, kind)
    chosen = variant(instance, schedule, backend, arch)
    got = run(chosen, cell, x)
    want = expected(cell, x, instance.grads)
    errors = {}
    for n, w in want.items():
        g = got[f"d_{n}"].cpu()
        rows = sum(lay.lengths)
        clean = n == "initial_state" or not bool((g[rows:] != 0).any())
        errors[f"d_{n}"] = relative(g, w) if clean else float("inf")
    return {"cell": cell.name, "io": cell.io, "backend": backend, "arch": arch, "inputs": kind, "schedule": schedule.name,
            "errors": errors, "sources": {s.kernel: s.hash for s in chosen.sources},
            "launched": {s.kernel: str(schedule.options(s.kernel)) for s in chosen.sources}}


FULL = Switches(initial_state=True, final_state=True)
__all__ = ["FULL", "backward_of", "check", "expected", "make", "run"]
