"""Whether a candidate is right: every output against the oracle, in float64, with outputs and temporaries poisoned before."""
from __future__ import annotations

from pathlib import Path

import torch

from gdn_ir.backends.base import TORCH
from gdn_ir.bench import gradients
from gdn_ir.bench.errors import bound as bound_of
from gdn_ir.bench.errors import relative
from gdn_ir.compiler import Instance, Variant
from gdn_ir.coverage import Cell, Layout
from gdn_ir.reference import recurrence

Tensors = dict[str, torch.Tensor]


def bound(instance: Instance) -> float:
    """The largest relative error that is right."""
    return bound_of(instance.io, bool(instance.grads))


def hard(instance: Instance, segment: int = 0) -> tuple[int, ...]:
    """Lengths that are hard to get right: ragged and, where packed, one of them nothing. segment: tokens after which kernels
    that cut sequences do so; one is cut then, and ends in a segment of its own."""
    if instance.varlen:
        return (300, 0, 64, 129, *((segment + 30,) if segment else ()))
    return (max(200, segment + 30 if segment else 0),) * 2


def cell(instance: Instance, lengths: tuple[int, ...], H: int = 2, HV: int = 4) -> Cell:
    """A problem of an instance."""
    H = H if instance.grouped else HV
    return Cell(str(instance), instance.switches, instance.io, Layout(lengths, instance.varlen, H, HV, instance.K, instance.V))


def memory(instance: Instance, problem: Cell, device: str, tail: int = 70, kind: str = "model") -> Tensors:
    """What a call of the instance reads (made by gdn_ir.bench.inputs) and writes (NaN)."""
    x = gradients.make(problem, device, kind, tail)
    x["beta"] = x["beta"].to(TORCH[instance.beta])
    given = {n: t for n, t in x.items() if n in {*instance.program.read(), "q", "v", "cu_seqlens"}}
    like = {"o": x["v"], "final_state": x["initial_state"]} | {f"d_{n}": t for n, t in x.items()}
    return given | {n: torch.full_like(like[n], float("nan")) for n in instance.program.written() if n in like}


def outputs(instance: Instance, tensors: Tensors) -> Tensors:
    return {n: tensors[n] for n in instance.program.written() if n in tensors}


def oracle(instance: Instance, problem: Cell, x: Tensors) -> Tensors:
    """The outputs by the token recurrence in float64, or its gradients by autograd."""
    if instance.grads:
        missing = {n: torch.zeros(()) for n in ("d_final_state", "initial_state", "g") if n not in x}
        want = gradients.expected(problem, x | missing, instance.grads)
        return {f"d_{n}": t for n, t in want.items()}
    s, cpu = instance.switches, {n: t.cpu() for n, t in x.items()}
    lay = problem.layout
    ends = torch.tensor([0, *torch.tensor(lay.lengths).cumsum(0).tolist()])
    state = cpu["initial_state"] if s.initial_state else None
    q, k, v, beta = (cpu[n][None] for n in ("q", "k", "v", "beta"))
    o, S = recurrence(q, k, v, cpu["g"][None] if s.decay == "scalar" else None, beta, None,
                      state.mT if state is not None and s.state_v_first else state, ends, s.erase, s.l2norm, s.beta_sigmoid,
                      s.neg_eigval)
    return {"o": o[0]} | ({"final_state": S.mT if s.state_v_first else S} if s.final_state else {})


def save(path: Path, instance: Instance, segment: int = 0) -> None:
    """Inputs, with (packed) rows that no sequence owns, and what they must give, made once for all candidates. Where sequences
    are cut one head hardly decays: of the others nothing would be left to go wrong from one segment to the next."""
    lengths = hard(instance, segment)
    problem = cell(instance, lengths)
    x = memory(instance, problem, "cpu", kind="real" if segment else "model")
    torch.save({"x": x, "want": oracle(instance, problem, x), "lengths": lengths}, path)


def errors(chosen: Variant, path: Path, device: str) -> dict[str, float]:
    """The relative error of each output of one call: infinite where a row that no sequence owns is not zero, NaN where an
    element was not written."""
    data = torch.load(path, weights_only=True)
    x = {n: t.to(device) for n, t in data["x"].items()}
    lengths = data["lengths"]
    with gradients.full_of_nan():
        call(chosen, x, len(lengths))()
    if device == "cuda":
        torch.cuda.synchronize()
    found = {}
    for n, want in data["want"].items():
        got = x[n].cpu()
        rows = sum(lengths)
        clean = "state" in n or not bool((got[rows:] != 0).any())
        found[n] = relative(got, want) if clean else float("inf")
    return found


class call:
    """One call of a variant on memory, again and again."""

    def __init__(self, chosen: Variant, x: Tensors, sequences: int) -> None:
        self.chosen, self.sequences = chosen, sequences
        self.cu = x["cu_seqlens"] if chosen.instance.varlen else None
        self.x = {n: t for n, t in x.items() if n != "cu_seqlens"}
        self.scale = chosen.instance.K ** -0.5

    def __call__(self) -> None:
        self.chosen(self.x, self.scale, self.sequences, self.cu)
