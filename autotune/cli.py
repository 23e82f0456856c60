"""gdn-ir's commands about tuning and packs: tune, show, export, verify, compile."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional                     # typer reads Optional on every Python

import typer

from gdn_ir.words import DENSE, FLAGS, GRADS, OP, SHAPES

SOURCE = "records (.jsonl), a table (.json), or shipped; by default your records and what ships"


def tune(op: Annotated[str, typer.Option(help=OP)] = "forward",
         shapes: Annotated[str, typer.Option(help=f"{SHAPES} (20 representative ones)")] = "",
         backends: Annotated[str, typer.Option(help="separated by commas (those that may be the fastest here)")] = "",
         budget: Annotated[float, typer.Option(help="minutes in all")] = 4.0,
         resume: Annotated[bool, typer.Option("--resume", help="go on from what was measured before")] = False,
         dtype: Annotated[str, typer.Option(help="bf16, f16 or f32 (bf16; f32 on a CPU)")] = "",
         K: int = 128, V: int = 128,
         flags: Annotated[str, typer.Option(help=FLAGS)] = "",
         dense: Annotated[bool, typer.Option("--dense", help=DENSE)] = False,
         records: Annotated[Optional[Path], typer.Option(help="where measurements go (~/.local/share/gdn_ir/records.jsonl)")]
         = None,
         workers: Annotated[int, typer.Option(help="processes that compile")] = 14) -> None:
    """Find the fastest schedules for shapes on this machine; what is found serves from the next process on."""
    from gdn_ir.autotune.command import tune as run
    if not run(op, shapes, backends, budget, resume, dtype, K, V, flags, dense, records, workers):
        raise SystemExit(130)


def show(table: Annotated[str, typer.Argument(help=SOURCE)] = "") -> None:
    """Print what was tuned."""
    from gdn_ir.autotune.command import show as run
    run(table)


def export(table: Annotated[str, typer.Argument(help=SOURCE)] = "",
           out: Annotated[Path, typer.Option("-o", "--out", help="a folder, for a table of each device")] = Path("."),
           model: Annotated[str, typer.Option(help="instead, of a GPU that nobody has timed (a100): heuristic and cost model")]
           = "") -> None:
    """Write what was tuned as tables, one readable JSON for each device."""
    from gdn_ir.autotune.command import export as run
    for path in run(table, out, model):
        print(path)


def verify(table: Annotated[str, typer.Argument(help=SOURCE)] = "",
           within: Annotated[float, typer.Option(help="how much slower than the table is right, as a part")] = 0.1) -> None:
    """Run a table's winners again on this machine: errors and speed."""
    from gdn_ir.autotune.command import verify as run
    if not run(table, within):
        raise SystemExit(1)


def compile_(target: Annotated[str, typer.Option(help="sm_80, sm_90a, cpu (this processor), separated by commas")],
             out: Annotated[Path, typer.Option("-o", "--out", help="where the pack goes: a folder that is not there yet")],
             shapes: Annotated[str, typer.Option(help=f"{SHAPES} (20 representative ones); other shapes are served as the "
                                             "nearest of these")] = "",
             op: Annotated[str, typer.Option(help=OP)] = "forward",
             dtype: Annotated[str, typer.Option(help="bf16, f16 or f32 (bf16; f32 for cpu)")] = "",
             K: int = 128, V: int = 128,
             flags: Annotated[str, typer.Option(help=FLAGS)] = "",
             dense: Annotated[bool, typer.Option("--dense", help=DENSE)] = False,
             backends: Annotated[str, typer.Option(help="separated by commas (those that serve)")] = "",
             beta: Annotated[str, typer.Option(help="beta's dtype, where it is not that of q")] = "",
             grads: Annotated[str, typer.Option(help=GRADS)] = "",
             workers: Annotated[int, typer.Option(help="processes that compile")] = 14) -> None:
    """Compile kernels ahead into a pack, for gdn_ir.load_pack: for any machine, on any machine."""
    from gdn_ir.autotune.command import compile_ahead as run
    run(target, shapes, op, dtype, K, V, flags, dense, backends, beta, grads, out, workers)
