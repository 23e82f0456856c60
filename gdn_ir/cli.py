"""The command line: gdn-ir demo, emit, explain."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional                     # typer reads Optional on every Python

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="The chunkwise gated delta rule, written once and compiled.")


@app.command()
def demo(text: Annotated[Optional[Path], typer.Argument(help="a text file (by default one of Python's own)")] = None) -> None:
    """Run the op on real text, on every backend this machine can run."""
    from gdn_ir.demo import run
    if text is not None and not text.is_file():
        raise ValueError(f"text: got {text}; accepts the path of a file")
    run(text)


@app.command()
def emit(backend: str = "triton", arch: str = "sm_90", dtype: str = "bf16", K: int = 128, V: int = 128, varlen: bool = True,
         decay: bool = True, erase: bool = True, l2norm: bool = False, initial_state: bool = False, final_state: bool = True,
         sequences: int = 1, heads: int = 32, tokens: int = 8192,
         schedule: Annotated[str, typer.Option(help="default, naive, another plan's name, or a JSON file")] = "default",
         kernel: Annotated[str, typer.Option(help="only this kernel")] = "") -> None:
    """Print the source of a variant, for any target, on any machine. --heads counts those of v."""
    from gdn_ir.compiler import Instance, variant
    from gdn_ir.programs.gated_delta import Switches
    from gdn_ir.schedules.defaults import default
    from gdn_ir.schedules.plans import plan
    from gdn_ir.schedules.schedule import Schedule
    switches = Switches("scalar" if decay else "none", erase, l2norm, initial_state=initial_state, final_state=final_state)
    instance = Instance(switches, K, V, dtype, dtype, varlen)
    if schedule == "default":
        wanted = default("cpu" if backend == "torch" else arch, instance, sequences, heads, tokens)[0]
    elif Path(schedule).suffix == ".json":
        wanted = Schedule.from_json(Path(schedule).read_text())
    else:
        wanted = Schedule(schedule, steps=plan(schedule, erase, dtype))
    sources = {s.kernel: s.text for s in variant(instance, wanted, backend, arch).sources}
    if kernel and kernel not in sources:
        raise ValueError(f"kernel: got {kernel!r}; this schedule has {', '.join(sources)}")
    print("\n\n".join([sources[kernel]] if kernel else sources.values()), end="")


@app.command()
def explain(H: int = 16, HV: int = 32, K: int = 128, V: int = 128, T: int = 8192, B: int = 1,
            sequences: Annotated[Optional[int], typer.Option(help="packed sequences; without it, dense")] = None,
            dtype: str = "bf16", arch: Annotated[Optional[str], typer.Option(help="cpu, sm_80, sm_90")] = None) -> None:
    """Say which variant serves a shape, and why."""
    from gdn_ir.registry import explain as say
    print(say(H=H, HV=HV, K=K, V=V, T=T, B=B, sequences=sequences, dtype=dtype, arch=arch))


def main() -> None:
    """The entry point: what a user got wrong is said in a line, without a traceback."""
    try:
        app()
    except (ValueError, OSError) as e:
        Console(stderr=True).print(f"gdn-ir: {e}", style="red", markup=False, highlight=False)
        raise SystemExit(2) from None
