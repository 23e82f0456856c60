"""Checks and times role kernels on the GPU at hand: the scan of the plan "solve", or "fused", from a schedule of roles.

    python -m gdn_ir.bench.roles --out DIR --commit HASH [--variants shipped,turns,...] [--roles FILE ...] [--solve tilelang]

Each variant (some are named here; --roles reads one from a file) is checked against the float64 recurrence and our own Triton
kernels, and timed only if it passes: the kernel that inverts, the scan, and both. All that runs on the GPU runs in a child
process with a time limit: roles that wait for each other for ever would hang it.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gdn_ir.autotune.measure import copies_beyond_l2, graph_ms
from gdn_ir.backends.base import TORCH, Call
from gdn_ir.backends.temporaries import temporaries
from gdn_ir.bench import inputs
from gdn_ir.bench.errors import relative, worst
from gdn_ir.bench.results import slug
from gdn_ir.compiler import Instance, variant
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.reference import recurrence
from gdn_ir.schedules.defaults import default, of_roles, roles_in_one
from gdn_ir.schedules.roles import FUSED, SOLVED, Event, Ring, Roles, Turn
from gdn_ir.schedules.schedule import KernelOptions

Tensors = dict[str, torch.Tensor]
ARCH, SCALE = "sm_90", 128 ** -0.5
SHAPES = (([4096] * 8, 16, 64), ([1024] * 8, 16, 32), ([32768], 16, 32))
BOUNDS = {"model": 4.5e-3, "no_decay": 5e-3, "strong_decay": 4.5e-3, "correlated": 1.3e-2}
LONG = 5e-3                                                # between two bf16 kernels, on model-like inputs
SOLVE = {"triton": KernelOptions(None, 1, 1, backend="triton"), "tilelang": KernelOptions(None, 4, 1)}


class Pair:
    """The two kernels of an instance, and what they hand to each other; or one, where its roles solve too."""

    def __init__(self, roles: Roles, solve: str, varlen: bool = True, states: bool = True) -> None:
        switches = Switches(initial_state=states, final_state=True)
        self.instance = Instance(switches, 128, 128, "bf16", "bf16", varlen)
        inside = any(e.do == "solve" for r in roles.roles for e in r.events)
        made = variant(self.instance, roles_in_one(roles) if inside else of_roles(roles, SOLVE[solve]), "tilelang", ARCH)
        self.kernels, self.launches, self.call_of = made.compiled.kernels, made.compiled.launches, made.call_of

    def memory(self, x: Tensors, fill: float) -> tuple[Tensors, Call]:
        """Inputs, and outputs and temporaries full of `fill`."""
        ends = x["cu_seqlens"]
        call = self.call_of(x, len(ends) - 1, ends if self.instance.varlen else None)
        memory = {n: x[n] for n in ("q", "k", "v", "g", "beta", "initial_state")}
        memory["o"] = torch.full_like(x["v"], fill)
        memory["final_state"] = torch.full_like(x["initial_state"], fill)
        for name, (kernel, t, *_) in temporaries(self.kernels).items():
            memory[name] = torch.full(call.shape(kernel, t), fill, dtype=TORCH[t.dtype], device=ends.device)
        return memory, call

    def run(self, memory: Tensors, call: Call, which: tuple[int, ...] = ()) -> Tensors:
        for i in which or range(len(self.launches)):
            self.launches[i](memory, {"scale": SCALE}, call)
        return {n: memory[n] for n in ("o", "final_state")}


def states_plan(x: Tensors, io: str = "bf16") -> Callable[[], Tensors]:
    """Our kernels by Triton, as they ship."""
    instance = Instance(Switches(initial_state=True, final_state=True), 128, 128, io, io, True)
    N, HV, tokens = len(x["cu_seqlens"]) - 1, x["v"].shape[1], x["v"].shape[0]
    chosen = variant(instance, default(ARCH, instance, N, HV, tokens)[0], "triton", ARCH)
    out = {"o": torch.empty_like(x["v"]), "final_state": torch.empty_like(x["initial_state"])}

    def call() -> Tensors:
        chosen({**x, **out}, SCALE, N, x["cu_seqlens"])
        return out
    return call


def exact(x: Tensors, states: bool) -> Tensors:
    q, k, v, g, beta = (x[n][None].cpu() for n in ("q", "k", "v", "g", "beta"))
    o, S = recurrence(q, k, v, g, beta, initial_state=x["initial_state"].cpu() if states else None,
                      cu_seqlens=x["cu_seqlens"].cpu())
    return {"o": o[0].cuda(), "final_state": S.cuda()}


def judged(kind: str, errors: dict[str, float]) -> list[float]:
    """What a bound is for. Of correlated keys that is o: the state, which is this plan's in whatever kernels (and compared with
    Triton's below), errs by 1.57e-2 and more, as the peers' does."""
    return [e for n, e in errors.items() if kind != "correlated" or n == "o"]


def check(roles: Roles, solve: str) -> dict[str, Any]:
    """Against float64 on short sequences, every output and temporary poisoned; bitwise repeats; a neighbour full of NaN; and
    against our Triton kernels on long ones."""
    rows: list[dict[str, Any]] = []
    cases = [(kind, [768], varlen, states) for kind in inputs.KINDS for varlen, states in ((True, True), (False, False))]
    cases += [(kind, [300, 0, 64, 129, 1, 63, 65], True, states) for kind in inputs.KINDS for states in (True, False)]
    cases += [("model", [704, 64], True, True), ("model", [190, 190], False, True)]
    for kind, lengths, varlen, states in cases:
        pair = Pair(roles, solve, varlen, states)
        x = inputs.make(lengths, 2, 4, kind=kind)
        wanted = exact(x, states)
        memory, call = pair.memory(x, float("nan"))
        found = {n: t.clone() for n, t in pair.run(memory, call).items()}
        errors = {n: relative(found[n], wanted[n]) for n in wanted}
        same = True
        for _ in range(100):
            again = pair.run(memory, call)
            same &= all(torch.equal(again[n], found[n]) for n in found)
        rows.append({"inputs": kind, "lengths": lengths, "varlen": varlen, "initial_state": states, "errors": errors,
                     "repeats": same, "passes": bool(same and worst(judged(kind, errors)) <= BOUNDS[kind])})
        print(rows[-1], flush=True)

    pair = Pair(roles, solve)                              # only the first sequence is asked for; all after it is NaN
    x = inputs.make([100, 64], 2, 4)
    first = {**x, "cu_seqlens": x["cu_seqlens"][:2].contiguous(), "initial_state": x["initial_state"][:1].contiguous()}
    clean = {n: t.clone() for n, t in pair.run(*pair.memory(first, 7.0)).items()}
    for n in ("q", "k", "v", "g", "beta"):
        first[n] = first[n].clone()
        first[n][100:] = float("nan")
    beside = pair.run(*pair.memory(first, 7.0))
    rest = 0 if pair.kernels[0].sweeps else 7              # of no sequence: cleared, or left
    alone = torch.equal(beside["o"][:100], clean["o"][:100]) and torch.equal(beside["final_state"], clean["final_state"]) \
        and bool((beside["o"][100:] == rest).all())
    print("neighbours untouched:", alone, flush=True)

    for lengths, H, HV in (([4096] * 3 + [4095, 1, 2049], 16, 32), ([32768], 4, 8)):
        x = inputs.make(lengths, H, HV)
        memory, call = pair.memory(x, float("nan"))
        found, other = pair.run(memory, call), states_plan(x)()
        errors = {n: relative(found[n], other[n]) for n in other}
        rows.append({"against": "triton", "lengths": lengths, "heads": [H, HV], "errors": errors,
                     "passes": worst(errors.values()) <= LONG})
        print(rows[-1], flush=True)
    return {"rows": rows, "neighbours": alone, "passes": alone and all(r["passes"] for r in rows)}


def time(roles: Roles, solve: str) -> list[dict[str, Any]]:
    """Milliseconds of each kernel, of both, and of what ships for Triton; the least of three medians, in turns."""
    pair, rows = Pair(roles, solve), []
    for lengths, H, HV in SHAPES:
        xs = [inputs.make(lengths, H, HV, seed=i) for i in range(copies_beyond_l2(sum(lengths) * (2 * H + 2 * HV) * 256))]
        ready = [pair.memory(x, 0.0) for x in xs]
        calls: dict[str, list[Callable[[], object]]] = {
            "solve": [lambda m=m, c=c: pair.run(m, c, (0,)) for m, c in ready],       # type: ignore[misc]
            "scan": [lambda m=m, c=c: pair.run(m, c, (1,)) for m, c in ready],        # type: ignore[misc]
            "both": [lambda m=m, c=c: pair.run(m, c) for m, c in ready],              # type: ignore[misc]
            "triton": [states_plan(x) for x in xs]}
        if len(pair.launches) == 1:
            calls = {"scan": calls["both"], **{n: calls[n] for n in ("both", "triton")}}
        for call in calls["both"]:
            call()
        other = states_plan(xs[0])()
        errors = {n: relative(ready[0][0][n], other[n]) for n in other}
        ms: dict[str, list[float]] = {n: [] for n in calls}
        for _ in range(3):
            for n in calls:
                ms[n].append(graph_ms(calls[n], 11))
        best = {n: min(t) for n, t in ms.items()}
        waves = -(-len(lengths) * HV // torch.cuda.get_device_properties(0).multi_processor_count)
        rows.append({"lengths": lengths, "heads": [H, HV], "ms": best, "rounds": ms, "errors_against_triton": errors,
                     "us_per_chunk_of_a_block": 1e3 * best["scan"] / (waves * -(-lengths[0] // 64))})
        print({**rows[-1], "lengths": f"{len(lengths)}x{lengths[0]}"}, flush=True)
        del calls, ready, xs
    return rows


def child(what: str, roles: Roles, solve: str, seconds: int) -> dict[str, Any]:
    """The result of a part, in a process of its own; its last line of output is JSON."""
    command = [sys.executable, "-m", "gdn_ir.bench.roles", "--child", what, "--solve", solve]
    try:
        done = subprocess.run(command, input=json.dumps(roles.data()), stdout=subprocess.PIPE, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as e:
        print(e.stdout.decode() if isinstance(e.stdout, bytes) else e.stdout, flush=True)
        return {"failed": f"no end within {seconds} s: a deadlock, if not a compilation"}
    print(done.stdout, flush=True)
    if done.returncode:
        return {"failed": f"exit code {done.returncode}"}
    return {"result": json.loads(done.stdout.strip().rsplit("\n", 1)[-1])}


def compile_all(roles: Roles, solve: str) -> str:
    for varlen, states in ((True, True), (True, False), (False, False), (False, True)):
        Pair(roles, solve, varlen, states)
    return "compiled"


def with_rings(base: Roles = SOLVED, **depths: int) -> Roles:
    """The shipped roles with other depths of rings, by the first value in them."""
    return replace(base, rings=tuple(Ring(r.values, depths.get(r.values[0], r.depth)) for r in base.rings))


def with_events(role: str, *events: str) -> Roles:
    """The shipped roles, of which one does other things, or in another order."""
    new = tuple(map(Event.of, events))
    return replace(SOLVED, roles=tuple(replace(r, events=new) if r.name == role else r for r in SOLVED.roles))


def with_registers(base: Roles, **registers: int) -> Roles:
    return replace(base, roles=tuple(replace(r, registers=registers.get(r.name, registers["rest"])) for r in base.roles))


VARIANTS = {
    "shipped": SOLVED,
    "fused": FUSED,                                        # one kernel: the inverse too
    "fused_deep": with_rings(FUSED, k=4),
    "fused_80": with_registers(FUSED, state=192, aux=80, rest=48),         # aux reads ahead, who solves has fewer
    "deeper": with_rings(q=3, A_beta=3, v=3, o16=2),
    # the states take turns at the tensor cores: one multiplies by its state while the other computes what it writes
    "turns": replace(SOLVED, turns=(Turn("state0", Event.of("issue u"), "state1", Event.of("issue SK")),)),
    # as the experiment's: less runs under products
    "plain": with_events("state", "compute S16", "issue SK", "compute o16 late", "read v", "complete SK", "compute R",
                         "issue u", "issue QS", "compute decayed", "complete QS", "compute u16", "compute W",
                         "compute entering", "issue written", "issue inside", "complete inside"),
    # both products by the state at once, what is left of it under them
    "early": with_events("state", *(str(e) for r in FUSED.roles if r.name == "state" for e in r.events)),
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, help="a folder: results go to OUT/GPU/role_kernels.json")
    p.add_argument("--commit", help="what is measured")
    p.add_argument("--variants", default="shipped", help=f"of {', '.join(VARIANTS)}, or all")
    p.add_argument("--roles", action="append", type=Path, default=[], help="a file with roles as JSON; may be repeated")
    p.add_argument("--solve", choices=tuple(SOLVE), default="triton", help="whose kernel inverts")
    p.add_argument("--only", choices=("check", "time"))
    p.add_argument("--seconds", type=int, default=120, help="for the check; timing gets twice as long")
    p.add_argument("--child", choices=("compile", "check", "time"))
    a = p.parse_args()
    parts = {"compile": compile_all, "check": check, "time": time}
    if a.child:
        print(json.dumps(parts[a.child](Roles.of(json.load(sys.stdin)), a.solve)))
        return
    if not a.out or not a.commit:
        p.error("--out and --commit are required")
    gpu = torch.cuda.get_device_name()
    variants = {n: VARIANTS[n] for n in (VARIANTS if a.variants == "all" else a.variants.split(","))}
    variants |= {f.name: Roles.of(json.loads(f.read_text())) for f in a.roles}
    page: dict[str, Any] = {"commit": a.commit, "gpu": gpu, "torch": torch.__version__, "solve": a.solve, "variants": []}
    path = a.out / slug(gpu) / "role_kernels.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, roles in variants.items():
        row: dict[str, Any] = {"name": name, "roles": roles.data()}
        page["variants"].append(row)
        row["compile"] = child("compile", roles, a.solve, 300)         # before, so that the check's limit is one of the kernel
        if a.only != "time" and "failed" not in row["compile"]:
            row["check"] = child("check", roles, a.solve, a.seconds)
        if a.only != "check" and (a.only == "time" or row.get("check", {}).get("result", {}).get("passes")):
            row["time"] = child("time", roles, a.solve, 2 * a.seconds)
        path.write_text(json.dumps(page, indent=0) + "\n")


if __name__ == "__main__":
    main()
