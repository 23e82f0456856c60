"""The command line: gdn-ir demo, emit, explain, bench, report; and those about tuning (autotune/cli.py)."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional                     # typer reads Optional on every Python

import typer
from rich.console import Console

from gdn_ir import words
from gdn_ir.autotune import cli as tuning

# what emit and explain are told of a call
Op = Annotated[str, typer.Option(help=f"{words.OP}; a backward where --grads names some")]
Flags = Annotated[str, typer.Option(help=words.FLAGS)]
Dtype = Annotated[str, typer.Option(help="of q, k, v and beta: bf16, f16, f32 or f64")]
Dense = Annotated[bool, typer.Option("--dense", help=words.DENSE)]
Grads = Annotated[str, typer.Option(help=words.GRADS)]
Keep = Annotated[str, typer.Option(help=f"{words.KEEP} (of a backward what GDN_IR_KEEP asks for)")]

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
def emit(shape: Annotated[str, typer.Argument(help=f"a call: {words.SHAPE}; the default schedule depends on it")] = words.ONE,
         backend: Annotated[str, typer.Option(help="triton, tilelang or torch (the one that serves the call, as `explain` "
                                                   "says)")] = "",
         arch: Annotated[str, typer.Option(help="sm_80 or sm_90; of tilelang also cpu (torch has one source)")] = "sm_90",
         op: Op = "",
         flags: Flags = "",
         dtype: Dtype = "bf16",
         K: int = 128, V: int = 128,
         dense: Dense = False,
         grads: Grads = "",
         keep: Keep = "",
         schedule: Annotated[str, typer.Option(help="default (what serves the call); a plan with modest options, such as naive "
                                                    "or states (any other word lists them); roles or roles-fused (tilelang, "
                                                    "sm_90); or a JSON file")] = "default",
         kernel: Annotated[str, typer.Option(help="only this kernel")] = "",
         generated: Annotated[bool, typer.Option("--generated", help="print what the toolchain makes of it: PTX (triton), or "
                                                 "TIR and C (tilelang)")] = False,
         json: Annotated[bool, typer.Option("--json", help="print the schedule instead, to start your own from")] = False,
         ) -> None:
    """Print the source of a variant, for any target, on any machine."""
    from gdn_ir.calls import instances, shapes_of
    from gdn_ir.emission import chosen
    asked = shapes_of(shape, "shape")
    if len(asked) > 1:
        raise ValueError(f"shape: got {shape}; accepts one call")
    ((instance, (one,)),) = instances(op or ("backward" if grads else "forward"), asked, dtype, K, V, flags, dense, grads=grads,
                                      keep=keep, said="shape").items()
    made = chosen(instance, one, backend, arch, schedule)
    if json:
        print(made.schedule.to_json())
        return
    sources = {s.kernel: s.text for s in made.sources}
    if kernel and kernel not in sources:
        raise ValueError(f"--kernel: got {kernel!r}; this schedule has {', '.join(sources)}")
    if generated:
        c = made.compiled
        sources = {k.name: b.generated(k, s, arch) for b, k, s in zip(c.makers, c.kernels, c.sources)
                   if kernel in ("", k.name)}
    print("\n\n".join([sources[kernel]] if kernel else sources.values()), end="")


@app.command()
def explain(shapes: Annotated[Optional[list[str]], typer.Argument(help=f"calls: {words.SHAPES} ({words.ONE})")] = None,
            arch: Annotated[str, typer.Option(help="cpu, sm_80 or sm_90 (this machine's)")] = "",
            op: Op = "",
            flags: Flags = "",
            dtype: Dtype = "bf16",
            K: int = 128, V: int = 128,
            dense: Dense = False,
            grads: Grads = "",
            keep: Keep = "",
            json: Annotated[bool, typer.Option("--json", help="as data: a list, an entry for each call")] = False) -> None:
    """Say which variant serves a call, and why: where its schedule comes from, too."""
    from json import dumps

    from gdn_ir.calls import instances, shapes_of
    from gdn_ir.registry import architecture_here, explained, named
    said = []
    op = op or ("backward" if grads else "forward")
    for s in shapes_of(",".join(shapes or [words.ONE]), "shapes"):
        for i in instances(op, [s], dtype, K, V, flags, dense, grads=grads, keep=keep, said="shapes"):
            said.append(explained(i, named(arch or architecture_here()), len(s.lengths), s.H, s.HV, s.tokens))
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
    from gdn_ir.environment import BadSwitch
    try:
        app()
    except (ValueError, OSError, BadSwitch) as e:
        Console(stderr=True).print(f"gdn-ir: {e}", style="red", markup=False, highlight=False)
        raise SystemExit(2) from None
