"""Gradients by a variant, outputs poisoned, beside those of float64 autograd through the token recurrence; on any device."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
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


def backward_of(cell: Cell, grads: tuple[str, ...] | None = None, keep: str = "nothing") -> Instance:
    """The backward instance of a cell: of all its inputs, unless some are named. keep: what it is given of the forward."""
    i, lay = cell.instance, cell.layout
    every = [n for n in ("q", "k", "v", "g", "beta", "initial_state") if n in i.program.read()]
    return Instance(i.switches, i.K, i.V, i.io, i.beta, i.varlen, grads or tuple(every), lay.HV > lay.H, keep=keep)


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


def expected(cell: Cell, x: Tensors, grads: tuple[str, ...], outputs: bool = False) -> Tensors:
    """Gradients by autograd through the recurrence in float64, on the CPU; with `outputs` also o and the final state."""
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
    found = dict(zip(grads, torch.autograd.grad(loss, [leaves[n] for n in grads]), strict=True))
    return found | ({"o": o[0].detach(), "final_state": (S.mT if s.state_v_first else S).detach()} if outputs else {})


def left_by(chosen: Variant, cell: Cell, x: Tensors) -> tuple[Tensors, Tensors]:
    """What a forward leaves to its backward, and its outputs, over poison."""
    lay, call = cell.layout, chosen.call_of(x, len(cell.layout.lengths), x["cu_seqlens"] if cell.layout.varlen else None)
    left = {t.name: torch.full(call.shape(k, t), float("nan"), dtype=TORCH[t.dtype], device=x["q"].device)
            for k in chosen.compiled.kernels for t in k.tensors() if t.left}
    like = {"o": x["v"], "final_state": x["initial_state"]}
    outputs = {n: torch.full_like(like[n], float("nan")) for n in chosen.instance.program.written()}
    needed = {*chosen.instance.program.read(), "q", "v"}
    given = {n: t for n, t in x.items() if n in needed}
    chosen(given | outputs | left, lay.K ** -0.5, len(lay.lengths), call.cu_seqlens)
    return left, outputs


@contextmanager
def full_of_nan() -> Iterator[None]:
    """Memory that torch hands out within is full of NaN, whatever is made of its bits: temporaries too are poisoned."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def poison(x: Tensors, grads: tuple[str, ...]) -> Tensors:
    """Memory for gradients, full of NaN; of q and k one after the other, as the op has them, which temporaries may use."""
    found = {f"d_{n}": torch.full_like(x[n], float("nan")) for n in grads}
    if {"q", "k"} <= {*grads}:
        found["d_q"], found["d_k"] = torch.full((2, *x["q"].shape), float("nan"), dtype=x["q"].dtype, device=x["q"].device)
    return found


def run(chosen: Variant, cell: Cell, x: Tensors, left: Tensors = {}) -> Tensors:                   # noqa: B006
    """The gradients a variant writes over poison. left: what it is given of the forward."""
    needed = set(chosen.instance.program.read()) | {"q", "v"}
    found = poison(x, chosen.instance.grads) | left
    lay = cell.layout
    chosen({n: t for n, t in x.items() if n in needed} | found, lay.K ** -0.5, len(lay.lengths),
           x["cu_seqlens"] if lay.varlen else None)
    return {n: t for n, t in found.items() if n not in left}


def check(cell: Cell, backend: str, arch: str, device: str = "cpu", kind: str = "model", schedule: Schedule | None = None,
          grads: tuple[str, ...] | None = None, scans: int | None = None, keep: str = "nothing") -> dict[str, Any]:
    """The relative errors of a cell's gradients under a schedule (its default), and the hashes of the sources that ran.
    Rows that no sequence owns must come back as zeros: an error is infinite where they do not. keep: what the forward, by its
    default, leaves to the backward; its errors and sources are then among the others."""
    instance, lay = backward_of(cell, grads, keep), cell.layout
    x = make(cell, device, kind)
    made = pipelines(cell, instance, backend, arch, scans, schedule)
    chosen = made[-1]
    left, outputs = left_by(made[0], cell, x) if len(made) > 1 else ({}, {})
    got = outputs | run(chosen, cell, x, left)
    want = {n if n in outputs else f"d_{n}": w for n, w in expected(cell, x, instance.grads, bool(outputs)).items()}
    errors = {}
    for n in got:
        g = got[n].cpu()
        rows = sum(lay.lengths)
        clean = n.endswith("state") or not bool((g[rows:] != 0).any())
        errors[n] = relative(g, want[n]) if clean else float("inf")
    return {"cell": cell.name, "io": cell.io, "backend": backend, "arch": arch, "inputs": kind,
            "schedule": chosen.schedule.name, "errors": errors, **sources(made)}


def pipelines(cell: Cell, instance: Instance, backend: str, arch: str, scans: int | None = None,
              schedule: Schedule | None = None) -> list[Variant]:
    """The variant of a backward, under a schedule or its default; before it that of a forward, where that leaves something."""
    lay, plain = cell.layout, backend.removesuffix("-ptx")
    shape = 1, scans or len(lay.lengths) * lay.HV, sum(lay.lengths)
    made = [variant(instance, schedule or default(arch, instance, *shape, plain)[0], backend, arch)]
    if instance.left:
        forward = replace(cell.instance, keep=instance.keep)
        made.insert(0, variant(forward, default(arch, forward, *shape, plain)[0], backend, arch))
    return made


def sources(made: list[Variant]) -> dict[str, dict[str, str]]:
    """Of the kernels of variants: their sources' hashes, and how they are launched."""
    every = [(s, v.schedule.options(s.kernel)) for v in made for s in v.sources]
    return {"sources": {s.kernel: s.hash for s, _ in every}, "launched": {s.kernel: str(o) for s, o in every}}


FULL = Switches(initial_state=True, final_state=True)
__all__ = ["FULL", "backward_of", "check", "expected", "left_by", "make", "pipelines", "run", "sources"]
