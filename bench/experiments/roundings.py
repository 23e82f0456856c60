"""Which rounding costs the gradients what: each of a backward plan's, in 16 bits, turned off by itself, on a CPU.

    python -m gdn_ir.bench.experiments.roundings --plan gathered-turns --inputs correlated,strong_decay --draws 4

Rounded are operands of products and what kernels hand to each other; sums are float32. Errors are relative, against float64
autograd of the recurrence, root mean squares over draws of the inputs.
"""
from __future__ import annotations

import argparse
from collections.abc import Container
from dataclasses import replace

import torch

from gdn_ir.backends import BACKENDS
from gdn_ir.backends.base import Kernel
from gdn_ir.bench import inputs
from gdn_ir.bench.errors import relative
from gdn_ir.bench.gradients import Tensors, backward_of, expected, make, run
from gdn_ir.bench.verify import PEERS
from gdn_ir.build import cast
from gdn_ir.compiler import Compiled, Variant, lower
from gdn_ir.coverage import Cell
from gdn_ir.nodes import Node, Op
from gdn_ir.nodes import make as node
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.schedules.plans import backward_plan
from gdn_ir.schedules.schedule import Schedule

TORCH = BACKENDS["torch"]


def rounded(k: Kernel) -> list[Node]:
    """The casts of a kernel that round what a product takes."""
    nodes = k.program.nodes()
    stored = {n.args[0] for n in nodes if n.op is Op.STORE}
    return [n for n in nodes if n.op is Op.CAST and n["dtype"] == "bf16" and n.args[0].type.dtype == "f32" and n not in stored]


def wider(kernels: tuple[Kernel, ...], casts: Container[Node] = (), tensors: Container[str] = ()) -> tuple[Kernel, ...]:
    """The kernels without these casts, and with these tensors stored in float32."""
    def change(old: Node, args: tuple[Node, ...]) -> Node | None:
        if old.op is Op.LOAD and old["tensor"].name in tensors:
            return old.but(tensor=replace(old["tensor"], dtype="f32"))
        if old.op is Op.STORE and old["tensor"].name in tensors:
            return old.but((unrounded(args[0]), *args[1:]), tensor=replace(old["tensor"], dtype="f32"))
        if old.op is Op.DOT and any(a.type.dtype == "f32" for a in args):
            return node(Op.DOT, tuple(a if a.type.dtype == "f32" else cast(a, "f32") for a in args), over=old["over"])
        if old.op is Op.CAST:
            return args[0] if old in casts or args[0].type.dtype == old["dtype"] else cast(args[0], old["dtype"])
        return None

    def unrounded(n: Node) -> Node:
        return n.args[0] if n.op is Op.CAST else n.but((unrounded(n.args[0]),)) if n.op is Op.TWIN else n
    return tuple(replace(k, program=k.program.rebuild(change)) for k in kernels)


def draw(cell: Cell, kind: str, seed: int) -> Tensors:
    """Inputs of a cell, and gradients of its outputs."""
    lay = cell.layout
    drawn = inputs.make(list(lay.lengths), lay.H, lay.HV, lay.K, lay.V, device="cpu", kind=kind, seed=seed)
    x = make(cell, kind=kind, tail=0) | drawn
    generator = torch.Generator().manual_seed(1000 + seed)
    return x | {n: torch.randn(x[n].shape, generator=generator).to(x[n].dtype) for n in ("d_o", "d_final_state")}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--plan", default="gathered-turns")
    p.add_argument("--inputs", default="correlated")
    p.add_argument("--draws", type=int, default=4)
    p.add_argument("--final-state", action="store_true", help="it has a gradient too")
    a = p.parse_args()
    cell = Cell("roundings", Switches(final_state=a.final_state), "bf16", PEERS)
    i = backward_of(cell)
    s = Schedule(a.plan, steps=backward_plan(a.plan, i.program, beta="bf16"), dot="bf16")
    kernels = lower(i.program, s, TORCH, "torch", i.sizes, i.dtypes, i.varlen)
    handed = sorted({t.name for k in kernels for t in k.tensors() if t.temp and t.dtype == "bf16"})
    ways = {"all": kernels, **{f"but {name} as it is stored": wider(kernels, tensors={name}) for name in handed}}
    for k in kernels:
        ways |= {f"but {k.program.describe(n.args[0])} in {k.name}".replace("\n", " "): wider(kernels, {n}) for n in rounded(k)}
    for kind in a.inputs.split(","):
        drawn = [draw(cell, kind, seed) for seed in range(a.draws)]
        wanted = [expected(cell, x, i.grads) for x in drawn]
        for what, made in ways.items():
            v = Variant("torch", i, s, "torch", Compiled(made, TORCH, "torch"))
            errors = [{n: relative(g, want[n[2:]]) for n, g in run(v, cell, x).items()}
                      for x, want in zip(drawn, wanted, strict=True)]
            mean = {n: (sum(e[n] ** 2 for e in errors) / len(errors)) ** 0.5 for n in errors[0]}
            print(kind, " ".join(f"{n} {e:.2e}" for n, e in mean.items()), what, flush=True)


if __name__ == "__main__":
    main()
