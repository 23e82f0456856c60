"""Run as a process of its own: executes real emitted kernels on the CPU, case after case, and writes {case: error or reason}.
Arguments: a backend and an architecture (triton sm_90, by Triton's interpreter, for which TRITON_INTERPRET=1 must be set before
Triton is first imported; or tilelang cpu), and a JSON file of cases, which the results replace."""
from __future__ import annotations

import json
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gdn_ir.bench.errors import worst
from gdn_ir.bench.gradients import backward_of, check, expected, make
from gdn_ir.backends.base import TORCH, Call, Reason
from gdn_ir.coverage import Cell, table
from gdn_ir.compiler import Instance, Unsupported, variant
from gdn_ir.interp import Sizes, run
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.reference import recurrence
from gdn_ir.schedules.defaults import default
from gdn_ir.schedules.plans import backward_plan, plan
from gdn_ir.schedules.schedule import KernelOptions, Schedule
from tests import inputs, mutants, programs
from tests.differential import by_backend, distance

BACKEND, ARCH = sys.argv[1:3] if __name__ == "__main__" else ("triton", "sm_90")


def of_program(name: str) -> dict[str, Any]:
    case = programs.FIXED[name]() if name in programs.FIXED else programs.rand(int(name))
    got = by_backend(case, BACKEND, "f32", ARCH)
    if isinstance(got, Reason):
        return {"declined": str(got)}
    return {"error": distance(got, run(case.program, case.inputs(), case.sizes()))}


def of_cell(cell: Cell, schedule: Schedule | None = None, backend: str = BACKEND, arch: str = ARCH, decay: float = 1.0) \
        -> dict[str, Any]:
    """A cell of the coverage table, outputs poisoned, a tail of unowned rows after packed sequences: its largest error. decay:
    times that of a model."""
    s, lay, dtype = cell.switches, cell.layout, TORCH[cell.io]
    tail = 30 if lay.varlen else 0
    T, N = sum(lay.lengths) + tail, len(lay.lengths)
    x = inputs.make(1, T, lay.H, lay.HV, lay.K, lay.V, dtype)
    x["g"] *= decay
    if s.beta_sigmoid:
        x["beta"] = torch.randn_like(x["beta"])
    cu = torch.tensor([0, *torch.tensor(lay.lengths).cumsum(0).tolist()], dtype=torch.int32)
    S0 = torch.randn(N, lay.HV, lay.K, lay.V) if s.initial_state else None
    want_o, want_S = inputs.expected(x | ({"g": None} if s.decay == "none" else {}), S0, cu, erase=s.erase, l2norm=s.l2norm,
                                     beta_sigmoid=s.beta_sigmoid, neg_eigval=s.neg_eigval)
    tensors = {n: t[0] for n, t in x.items() if not (n == "g" and s.decay == "none")}
    if S0 is not None:
        tensors["initial_state"] = S0.mT.contiguous() if s.state_v_first else S0
    tensors["o"] = torch.full((T, lay.HV, lay.V), float("nan"), dtype=dtype)
    if s.final_state:
        tensors["final_state"] = torch.full((N, lay.HV, *((lay.V, lay.K) if s.state_v_first else (lay.K, lay.V))), float("nan"))
    try:
        chosen = variant(cell.instance, schedule or default(arch, cell.instance, N, lay.HV, T)[0], backend, arch)
    except Unsupported as e:
        return {"declined": str(e)}
    chosen(tensors, lay.K ** -0.5, N, cu if lay.varlen else None)
    errors = [inputs.error(tensors["o"], want_o[0])]
    if s.final_state:
        errors.append(inputs.error(tensors["final_state"].mT if s.state_v_first else tensors["final_state"], want_S))
    clean = not tail or not tensors["o"][-tail:].any()
    return {"error": worst(errors) if clean else float("inf")}


def of_plan(name: str, cell: Cell, chunk: int, segment: int = 32, tile: int | None = None, decay: float = 1.0) \
        -> dict[str, Any]:
    s = cell.instance.switches
    sums = name in ("segments", "gathered-segments") and s.decay != "none"
    steps = plan(name, s.erase, cell.io, chunk, sums=sums, segment=segment) if chunk > 1 else ()
    return of_cell(cell, Schedule(name, chunk, steps).with_options(**{"*": KernelOptions(tile)}), decay=decay)


def of_backward(cell: Cell, tile: int | None = None, plan: str = "", heads: tuple[int, int] | None = None,
                sparing: bool = False, segment: int = 32, tokens: int = 0, kind: str = "model",
                turns: int | None = None) -> dict[str, Any]:
    if heads:
        cell = replace(cell, layout=replace(cell.layout, H=heads[0], HV=heads[1]))
    if tokens:
        cell = replace(cell, layout=replace(cell.layout, lengths=(tokens, 0, 1)))
    steps = backward_plan(plan or "states", backward_of(cell).program, cell.io, segment=segment)
    scans = [f"{s}{x}" for s in ("again", "back") for x in ("_transition", "_offset", "_compose", "")]
    split = scans if plan.endswith("segments") else ["*"]
    schedule = Schedule("x", 64, steps).with_options(**{"*": KernelOptions(None, sparing=sparing)}) \
        .with_options(**dict.fromkeys(split, KernelOptions(tile, sparing=sparing)))
    schedule = schedule.with_options(grads=KernelOptions(sparing=True, k_tile=turns, around=True)) if turns else schedule
    found = check(cell, BACKEND, ARCH, kind=kind, schedule=schedule if tile or plan else None)
    return {"error": worst(found["errors"].values())}


def of_heads_first(cell: Cell, plan: str) -> dict[str, Any]:
    """A backward whose temporaries have a head's numbers together."""
    steps = (*backward_plan(plan, backward_of(cell).program, cell.io), ("heads_first",))
    return {"error": worst(check(cell, BACKEND, ARCH, schedule=Schedule("x", 64, steps))["errors"].values())}


def of_lifetimes(cell: Cell, plan: str) -> dict[str, Any]:
    """A backward whose temporaries are overwritten before each kernel at whose moment they are not needed, as those that share
    their memory may do: how far its gradients are from those of the same without. Then each temporary is said to be needed for
    one moment less: which of these the gradients do not show."""
    from gdn_ir.backends import temporaries as module
    instance, lay = backward_of(cell), cell.layout
    steps = backward_plan(plan, instance.program, instance.io)
    compiled = variant(instance, Schedule("x", 64, steps), BACKEND, ARCH).compiled
    lives = module.temporaries(compiled.kernels)
    moments = module.moments(compiled.kernels)
    x = make(cell, tail=0)

    def gradients(said: dict[str, module.Life]) -> dict[str, torch.Tensor]:
        def poisoned(launch: Any, now: int) -> Any:
            def run(memory: Any, *rest: Any) -> None:
                alive = [memory[n] for n, life in said.items() if life.first < now <= life.last]
                held = [t.clone() for t in alive]
                memory["A"].new_empty(0, dtype=torch.uint8).set_(memory["A"].untyped_storage()).fill_(255)       # NaN
                for t, was in zip(alive, held, strict=True):
                    t.copy_(was)
                launch(memory, *rest)
            return run
        launches = [poisoned(launch, now) for launch, now in zip(compiled.launches, moments, strict=True)]
        run = module.in_order(compiled.kernels, launches)
        found = {f"d_{n}": torch.full_like(x[n], float("nan")) for n in instance.grads}
        call = Call(len(lay.lengths), sum(lay.lengths), sum(lay.lengths), {"H": lay.H, "HV": lay.HV}, x["cu_seqlens"])
        run({**x, **found}, {"scale": lay.K ** -0.5}, call)
        return found
    want = {n: t.double() for n, t in expected(cell, x, instance.grads).items()}
    errors = [inputs.error(t, want[n[2:]]) for n, t in gradients(lives).items()]
    short = {n: {**lives, n: life._replace(last=life.last - 1)} for n, life in lives.items()}
    unseen = [n for n, said in short.items() if not any(t.isnan().any() for t in gradients(said).values())]
    return {"error": worst(errors), "unseen": unseen, "temporaries": len(lives)}


def of_hosted(cell: Cell, plan: str) -> dict[str, Any]:
    """A backward whose temporaries lie in outputs and over each other; outputs are parts of larger tensors."""
    from gdn_ir.backends.temporaries import in_order, overwritten
    instance, lay = backward_of(cell), cell.layout
    steps = backward_plan(plan, instance.program, instance.io)
    turns = {"grads": KernelOptions(sparing=True, k_tile=16)} if plan == "gathered-turns" else {}
    compiled = variant(instance, Schedule("x", 64, steps).with_options(**turns), BACKEND, ARCH).compiled
    x = make(cell, tail=0)
    found = {f"d_{n}": torch.full((64 + x[n].numel(),), float("nan"))[64:].view(x[n].shape) for n in instance.grads}
    call = Call(len(lay.lengths), sum(lay.lengths), sum(lay.lengths), {"H": lay.H, "HV": lay.HV}, x["cu_seqlens"])
    in_order(compiled.kernels, compiled.launches, hosted=True)({**x, **found}, {"scale": lay.K ** -0.5}, call)
    want = expected(cell, x, instance.grads)
    return {"error": worst([inputs.error(t, want[n[2:]].double()) for n, t in found.items()]),
            "over": overwritten(compiled.kernels)}


def of_mutant(i: int) -> dict[str, Any]:
    p = mutants.mutant(i)
    want = run(p, mutants.inputs(), Sizes(mutants.AXES, mutants.CU), {"scale": 0.7})
    return {"error": distance(mutants.by_backend(p, BACKEND, ARCH), want)}


def of_correlated(schedule: Schedule, top: float) -> dict[str, Any]:
    """Keys of cosine 0.99 and beta up to `top`, in float32."""
    x = inputs.correlated(top, 200)
    o, S = recurrence(*(x[n][None] for n in ("q", "k", "v")), None, x["beta"][None], 0.125)
    instance = Instance(Switches(decay="none", final_state=True), 64, 32, "f32", "f32", False)
    got = {"o": torch.full_like(x["v"], float("nan")), "final_state": torch.full((1, 1, 64, 32), float("nan"))}
    variant(instance, schedule, BACKEND, ARCH)(x | got, 0.125, 1)
    return {"error": worst((inputs.error(got["o"], o[0]), inputs.error(got["final_state"], S)))}


def main() -> None:
    """Cases: ["program", name], ["cell", name], ["recurrent", cell's name], ["backward", cell's name] (also: V in tiles of a
    number, a plan's name, heads, whether sparing, chunks of a segment, tokens, kind of inputs, columns of K that grads
    steps through),
    ["lifetimes", cell's name, plan's name], ["hosted", ...], ["heads first", ...],
    ["kept", cell's name, what is kept], ["plan", plan's name, cell's name, chunk] (also: chunks of a segment, and V in tiles of
    a number), ["mutant", number] or ["correlated", plan's name, top of beta]."""
    cells = {c.name: c for c in table()}
    found = {}
    for case in json.loads(Path(sys.argv[3]).read_text()):
        try:
            if case[0] == "program":
                found[json.dumps(case)] = of_program(case[1])
            elif case[0] == "cell":
                found[json.dumps(case)] = of_cell(cells[case[1]])
            elif case[0] == "recurrent":
                cell = cells[case[1]]
                one = replace(cell.instance, recurrent=True)
                found[json.dumps(case)] = of_cell(cell, default(ARCH, one, 1, cell.layout.HV, 1, BACKEND)[0])
            elif case[0] == "backward":
                found[json.dumps(case)] = of_backward(cells[case[1]], *case[2:])
            elif case[0] == "kept":
                errors = check(cells[case[1]], BACKEND, ARCH, keep=case[2])["errors"].values()
                found[json.dumps(case)] = {"error": worst(errors)}
            elif case[0] == "lifetimes":
                found[json.dumps(case)] = of_lifetimes(cells[case[1]], case[2])
            elif case[0] == "heads first":
                found[json.dumps(case)] = of_heads_first(cells[case[1]], case[2])
            elif case[0] == "hosted":
                found[json.dumps(case)] = of_hosted(cells[case[1]], case[2])
            elif case[0] == "mutant":
                found[json.dumps(case)] = of_mutant(case[1])
            elif case[0] == "correlated":
                found[json.dumps(case)] = of_correlated(Schedule(case[1], steps=plan(case[1], io="f32")), case[2])
            else:
                _, name, which, chunk, *cut = case
                found[json.dumps(case)] = of_plan(name, cells[which], chunk, *cut)
        except Exception:
            found[json.dumps(case)] = {"failed": traceback.format_exc(limit=-3)}
    Path(sys.argv[3]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
