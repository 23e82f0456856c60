"""What `gdn-ir bench` does: options checked before anything runs, then the phases in turn."""
from __future__ import annotations

import datetime
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from gdn_ir.backends.base import TORCH
from gdn_ir.bench import cases, cold, inputs, results
from gdn_ir.bench import floor as floors
from gdn_ir.bench.cases import Row
from gdn_ir.bench.contenders import SERVED, Contender, chosen, versions
from gdn_ir.bench.results import Page
from gdn_ir.bench.suite import ACCURACY, Run, attempt, gpu_name, perform
from gdn_ir.compiler import Instance
from gdn_ir.programs.gated_delta import Switches

ATTENTION = "softmax attention: in the suites break-even, or where --peers names it"
SLOW = "slow on a GPU: ask for it with --backends torch"


def plan(suite: str, shapes: str, backends: str, peers: str, dtype: str, device: str, out: Path, seconds: float, energy: float,
         K: int, V: int, kind: str = "real") -> Run:
    """What the options ask for. Raises ValueError naming the first that it cannot take, what it got and what it accepts."""
    if suite not in cases.SUITES:
        raise ValueError(f"suite: got {suite!r}; accepts {', '.join(cases.SUITES)}")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    device = device or here
    if device not in ("cuda", "cpu") or (device == "cuda" and here == "cpu"):
        raise ValueError(f"--device: got {device!r}; accepts cpu{', cuda' if here == 'cuda' else ' (this machine has no GPU)'}")
    dtype = dtype or ("bf16" if device == "cuda" else "f32")
    if dtype not in ("bf16", "f16", "f32"):
        raise ValueError(f"--dtype: got {dtype!r}; accepts bf16, f16, f32")
    for name, number, least in (("--seconds", seconds, 0.0), ("--energy", energy, 0.0)):
        if not least <= number <= 60:
            raise ValueError(f"{name}: got {number}; accepts seconds from {least:g} to 60")
    if kind not in (kinds := ("real", *inputs.KINDS)):
        raise ValueError(f"--inputs: got {kind!r}; accepts {', '.join(kinds)}")
    Instance(Switches(), K, V, dtype, dtype, True)         # raises where K or V is none that an op accepts
    rows = [Row(tuple(lengths), H, HV, K, V) for lengths, H, HV in cases.parse(shapes, suite)]
    ours = chosen("--backends", backends or "all")
    if not cases.trains(suite):                            # a forward is served by one of the backends: it is timed as that
        if SERVED in backends.split(","):
            raise ValueError(f"--backends: got {backends!r} for {suite}; accepts {SERVED} in the suites that train")
        ours = [c for c in ours if c.name != f"gdn-ir {SERVED}"]
    contenders = ours + chosen("--peers", peers)
    if not contenders:
        raise ValueError("--backends, --peers: got none of either; accepts at least one contender")
    skipped = {"gdn-ir torch": SLOW} if device == "cuda" and not backends else {}
    if peers == "all" and not suite.startswith("break-even"):
        skipped |= {c.name: ATTENTION for c in contenders if c.kind == "attention"}
    path = results.path_of(out, gpu_name(device), suite, dtype, kind)
    return Run(suite, list(dict.fromkeys(rows)), contenders, dtype, device, path, seconds, energy, kind, skipped)


def page_for(run: Run, resume: bool) -> Page:
    """A new page; with resume the one that is there, if it is of the same GPU."""
    if not (resume and run.path.exists()):
        return Page(run.suite, run.gpu, run.dtype)
    page = results.read(run.path)
    if page.gpu != run.gpu:
        raise ValueError(f"--resume: {run.path} is of {page.gpu}, and this is {run.gpu}; accepts a page of this GPU: name "
                         "another folder with --out")
    return page


def bench(run: Run, commit: str, resume: bool = False, warm: bool = False, with_cold: bool = False, workers: int = 14,
          accuracy: bool = True, console: Console | None = None) -> bool:
    """All phases: compile ahead (warm), rates, accuracy and rows, first calls (with_cold). False where Ctrl-C ended it."""
    console = console or Console()
    page = page_for(run, resume)
    told = versions(run.contenders)
    console.print(f"{run.suite} on {run.gpu}, {run.dtype}, commit {commit}: {len(run.rows)} rows, into {run.path}",
                  highlight=False)
    console.print(", ".join(f"{n} {v}" for n, v in told.items()), highlight=False)
    active = [c for c in run.contenders if c.name not in run.skipped]
    try:
        if warm:
            cold.warm_up(active, [*run.rows, *([ACCURACY] if accuracy else [])], run.dtype, run.device, run.train, workers,
                         lambda text: console.print(text, highlight=False, markup=False))
        rates = floors.measure(run.device, TORCH[run.dtype])
    except KeyboardInterrupt:
        return False
    console.print(f"measured: memory {rates.bytes / 1e12:.3f} TB/s, "
                  f"{run.dtype} matrix product {rates.flops / 1e12:.1f} TFLOP/s")
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M")
    page.runs.append({"commit": commit, "date": date, "versions": told, "bytes_per_s": rates.bytes, "flops_per_s": rates.flops,
                      "inputs": run.inputs})
    index = len(page.runs) - 1
    if not perform(run, page, index, rates, console, inputs.KINDS if accuracy else ()):
        return False
    return not with_cold or first_calls(run, page, index, console)


def first(task: cold.Task, _: Contender) -> results.Record:
    return cold.cold_and_warm(task)


def first_calls(run: Run, page: Page, index: int, console: Console) -> bool:
    """The cold phase: every contender on the first row of the run, with empty caches and with warm ones."""
    row = run.rows[0]
    try:
        for c in run.contenders:
            key = {"contender": c.name} | results.key_of(row, run.dtype)
            if page.has("cold", key, page.runs[index]["commit"]):
                continue
            task = cold.Task(c.name, (row,), run.dtype, run.device, run.train)
            found = attempt(run, c, partial(first, task))
            page.put("cold", key, {"run": index} | found)
            page.write(run.path)
            console.print(f"first call, {c.name}, {row}: " + (found.get("reason") or
                          f"{found['cold_process_s']:.1f} s cold, {found['warm_process_s']:.1f} s warm"), highlight=False)
    except KeyboardInterrupt:
        console.print("stopped; --resume goes on from here")
        return False
    return True
