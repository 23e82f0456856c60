"""The command line: gdn-ir demo, emit, explain, bench, report; and those about tuning (autotune/cli.py)."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional                     # typer reads Optional on every Python

import typer
from rich.console import Console

from gdn_ir.autotune import cli as tuning

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="The chunkwise gated delta rule, written once and compiled.")
for command in (tuning.tune, tuning.show, tuning.export, tuning.verify):
    app.command()(command)
app.command("compile")(tuning.compile_)


@app.command()
def demo(text: Annotated[Optional[Path], typer.Argument(help="a text file (by default one of Python's own)")] = None,
         train: Annotated[bool, typer.Option("--train", help="train a small language model on the text instead")] = False,
         seconds: Annotated[float, typer.Option(help="of training")] = 60.0) -> None:
    """Run the op on real text, on every backend this machine can run; or train a model with it."""
    from gdn_ir import demo as variants
    from gdn_ir import demo_train
    if text is not None and not text.is_file():
        raise ValueError(f"text: got {text}; accepts the path of a file")
    if train:
        demo_train.run(text, seconds)
    else:
        variants.run(text)


@app.command()
def emit(backend: Annotated[str, typer.Option(help="triton, tilelang or torch (`explain` says which of them serves a "
                                                   "call)")] = "triton",
         arch: Annotated[str, typer.Option(help="sm_80 or sm_90; of tilelang also cpu (torch has one source)")] = "sm_90",
         dtype: Annotated[str, typer.Option(help="of q, k, v and beta: bf16, f16, f32 or f64")] = "bf16",
         K: int = 128, V: int = 128, varlen: bool = True, decay: bool = True, erase: bool = True, l2norm: bool = False,
         initial_state: bool = False, final_state: bool = True,
         sequences: Annotated[int, typer.Option(help="a call's: the default schedule depends on it")] = 1,
         HV: Annotated[int, typer.Option(help="heads of v: likewise")] = 32,
         T: Annotated[int, typer.Option(help="tokens: likewise")] = 8192,
         H: Annotated[Optional[int], typer.Option(help="heads of q (all of v's by default; likewise)")] = None,
         grads: Annotated[str, typer.Option(help="the backward: gradients of these, such as q,k,v,g,beta,initial_state")] = "",
         keep: Annotated[str, typer.Option(help="what a forward leaves to its backward, or a backward is given: nothing, "
                                                "inverse or states")] = "nothing",
         schedule: Annotated[str, typer.Option(help="default (what this backend serves such a call with); a plan with modest "
                                                    "options, such as naive or states (any other word lists them); roles "
                                                    "or roles-fused (tilelang, sm_90); or a JSON file")] = "default",
         kernel: Annotated[str, typer.Option(help="only this kernel")] = "",
         generated: Annotated[bool, typer.Option("--generated", help="print what the toolchain makes of it: PTX (triton), or "
                                                 "TIR and C (tilelang)")] = False,
         json: Annotated[bool, typer.Option("--json", help="print the schedule instead, to start your own from")] = False,
         ) -> None:
    """Print the source of a variant, for any target, on any machine."""
    from gdn_ir.backends import BACKENDS
    from gdn_ir.compiler import Instance, variant
    from gdn_ir.programs.gated_delta import Switches
    from gdn_ir.schedules.defaults import default, of_roles, roles_in_one
    from gdn_ir.schedules.plans import PLANS, backward_plan, plan
    from gdn_ir.schedules.schedule import Schedule
    if backend not in BACKENDS:
        raise ValueError(f"--backend: got {backend!r}; accepts {', '.join(BACKENDS)}")
    for name, size in (("--sequences", sequences), ("--HV", HV), ("--T", T)):
        if size < 1:
            raise ValueError(f"{name}: got {size}; accepts a number from 1 on")
    switches = Switches("scalar" if decay else "none", erase, l2norm, final_state=final_state,
                        initial_state=initial_state or "initial_state" in names(grads))
    wrt = names(grads)
    if H is not None and (H < 1 or HV < H or HV % H):
        raise ValueError(f"--H: got {H}; accepts a divisor of HV = {HV}")
    instance = Instance(switches, K, V, dtype, dtype, varlen, wrt, grouped=not wrt or (H is not None and H < HV), keep=keep)
    if schedule == "default":
        wanted = default("torch" if backend == "torch" else arch, instance, sequences, HV, T, backend)[0]
    elif Path(schedule).is_file():
        try:
            wanted = Schedule.from_json(Path(schedule).read_text())
        except ValueError as e:
            raise ValueError(f"--schedule {schedule}: {e}") from None
    elif schedule in ("roles", "roles-fused") and not wrt:
        wanted = of_roles(norm=l2norm) if schedule == "roles" else roles_in_one(norm=l2norm)
    else:
        known = PLANS["backward" if wrt else "forward"]
        if schedule not in known:
            more = () if wrt else ("roles", "roles-fused")
            raise ValueError(f"--schedule: got {schedule!r}; accepts default, {', '.join((*known, *more))}, or a JSON file "
                             "that exists")
        steps = backward_plan(schedule, instance.program, dtype, keep=keep, beta=instance.beta) if wrt else \
            plan(schedule, erase, dtype, sums=decay and bool(instance.left), leave=instance.left)
        wanted = Schedule(schedule, steps=steps)
    if json:
        print(wanted.to_json())
        return
    if backend != "tilelang" and any(o.roles for _, o in wanted.kernels):
        raise ValueError(f"--backend: got {backend}; accepts tilelang, for a schedule of roles")
    try:
        chosen = variant(instance, wanted, backend, arch)
    except ValueError as e:                                # which was made for another kind of call, perhaps
        raise ValueError(f"{e}\n  in --schedule {schedule}, for {instance}") from None
    sources = {s.kernel: s.text for s in chosen.sources}
    if kernel and kernel not in sources:
        raise ValueError(f"--kernel: got {kernel!r}; this schedule has {', '.join(sources)}")
    if generated:
        made = chosen.compiled
        sources = {k.name: b.generated(k, s, arch) for b, k, s in zip(made.makers, made.kernels, made.sources)
                   if kernel in ("", k.name)}
    print("\n\n".join([sources[kernel]] if kernel else sources.values()), end="")


def names(listed: str) -> tuple[str, ...]:
    return tuple(n.strip() for n in listed.split(",") if n.strip())


@app.command()
def explain(shapes: Annotated[Optional[list[str]], typer.Argument(help="packed calls, as 8x1024:16/32 (lengths, H/HV), instead "
                                                                  "of H, HV, T, B and sequences")] = None,
            H: int = 16, HV: int = 32, K: int = 128, V: int = 128, T: int = 8192, B: int = 1,
            sequences: Annotated[Optional[int], typer.Option(help="packed sequences; without it, dense")] = None,
            dtype: str = "bf16", arch: Annotated[Optional[str], typer.Option(help="cpu, sm_80, sm_90")] = None,
            final_state: Annotated[bool, typer.Option(help="whether the final state is asked for")] = True,
            l2norm: Annotated[bool, typer.Option("--l2norm", help="whether q and k are normalised in the op")] = False,
            recurrent: Annotated[bool, typer.Option("--recurrent", help="one token at a time, as in decoding")] = False,
            grads: Annotated[str, typer.Option(help="of the backward: gradients of these, such as q,k,v,g,beta")] = "",
            keep: Annotated[str, typer.Option(help="what a forward leaves to its backward, or a backward is given: nothing, "
                                                   "inverse or states")] = "nothing",
            json: Annotated[bool, typer.Option("--json", help="as data: a list, an entry for each call")] = False) -> None:
    """Say which variant serves a shape, and why: where its schedule comes from, too."""
    from json import dumps

    from gdn_ir.bench.cases import parse
    from gdn_ir.registry import explain as say
    if shapes and (H, HV, T, B, sequences) != (16, 32, 8192, 1, None):
        raise ValueError(f"--H, --HV, --T, --B, --sequences: got some beside {', '.join(shapes)}; accepts these or shapes")
    asked = parse(",".join(shapes), "forward", "shapes") if shapes else []
    calls: list[tuple[int, int, int | None, int, int]] = \
        [(sum(lengths), 1, len(lengths), h, hv) for lengths, h, hv in asked] or [(T, B, sequences, H, HV)]
    wrt = names(grads)
    more = {"initial_state": "initial_state" in wrt, "final_state": final_state and not wrt, "l2norm": l2norm}
    said = [say(H=h, HV=hv, K=K, V=V, T=tokens, B=rows, sequences=count, dtype=dtype, arch=arch, recurrent=recurrent, grads=wrt,
                keep=keep, **more) for tokens, rows, count, h, hv in calls]
    print(dumps([s.data() for s in said], indent=1) if json else "\n".join(map(str, said)))


@app.command()
def bench(suite: Annotated[str, typer.Argument(help="forward, forward-core, train, train-core, break-even or break-even-train")]
          = "forward-core",
          shapes: Annotated[str, typer.Option(help='only these: "8x1024:16/32", "3000+5192:16/32" or the index of a row, '
                                              "separated by commas")] = "",
          backends: Annotated[str, typer.Option(help="of ours: triton, tilelang, torch, served (each pass of a training step "
                                                     "by whom it will), all or none (all; no torch on a GPU)")] = "",
          peers: Annotated[str, typer.Option(help="fla, flashqla, flashinfer, attention-cudnn, attention-flash, all or none")]
          = "all",
          dtype: Annotated[str, typer.Option(help="bf16, f16 or f32 (bf16; f32 on a CPU)")] = "",
          device: Annotated[str, typer.Option(help="cuda or cpu (cuda where there is one)")] = "",
          K: int = 128, V: int = 128,
          inputs: Annotated[str, typer.Option(help="of timed rows: real (one head in sixteen hardly decays), model (all do), "
                                                   "no_decay, strong_decay or correlated")] = "real",
          out: Annotated[Path, typer.Option(help="a folder: results go to OUT/GPU/SUITE.json")] = Path("bench/results"),
          resume: Annotated[bool, typer.Option("--resume", help="keep what the file has, skip rows of the same commit and GPU")]
          = False,
          seconds: Annotated[float, typer.Option(help="of replays, for each contender and row")] = 0.15,
          energy: Annotated[float, typer.Option(help="seconds of replays for the energy counter (0: not read)")] = 0.0,
          cold: Annotated[bool, typer.Option("--cold", help="also first calls in fresh processes, with empty and warm caches")]
          = False,
          warm: Annotated[bool, typer.Option("--warm", help="first compile for all rows in parallel processes")] = False,
          workers: Annotated[int, typer.Option(help="of --warm")] = 14,
          accuracy: Annotated[bool, typer.Option(help="also errors on four kinds of input")] = True,
          commit: Annotated[str, typer.Option(help="what is measured (the checkout's)")] = "") -> None:
    """Measure gdn-ir beside its peers and the physical limit, in one run, interleaved."""
    from gdn_ir.bench.command import bench as run
    from gdn_ir.bench.command import plan
    from gdn_ir.bench.results import commit_here
    if workers < 1:
        raise ValueError(f"--workers: got {workers}; accepts a number from 1 on")
    planned = plan(suite, shapes, backends, peers, dtype, device, out, seconds, energy, K, V, inputs)
    if not run(planned, commit or commit_here(), resume, warm, cold, workers, accuracy):
        raise SystemExit(130)


@app.command()
def report(results: Annotated[Path, typer.Argument(help="the folder that bench wrote to")] = Path("bench/results"),
           out: Annotated[Path, typer.Option(help="performance.md and performance.html go here")] = Path("docs")) -> None:
    """Turn results into a page to read, with plots."""
    from gdn_ir.bench.report import write
    for path in write(results, out):
        print(path)


def main() -> None:
    """The entry point: what a user got wrong is said in a line, without a traceback."""
    try:
        app()
    except (ValueError, OSError) as e:
        Console(stderr=True).print(f"gdn-ir: {e}", style="red", markup=False, highlight=False)
        raise SystemExit(2) from None
