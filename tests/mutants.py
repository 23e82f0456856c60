"""Mutants of our program: a sign, an operand, a dropped term; and running one by a backend."""
from __future__ import annotations

import torch

from gdn_ir.backends import BACKENDS
from gdn_ir.backends.base import TORCH, Call
from gdn_ir.compiler import Compiled, lower
from gdn_ir.interp import Sizes
from gdn_ir.nodes import Node, Op, make
from gdn_ir.program import Program
from gdn_ir.programs.gated_delta import Switches, build
from gdn_ir.schedules.plans import plan
from gdn_ir.schedules.schedule import KernelOptions, Schedule
from gdn_ir.verify import verify

AXES, CU = {"C": 16, "K": 16, "V": 16, "H": 1, "HV": 2}, [0, 37, 53]
PROGRAM = build(Switches(initial_state=True, final_state=True))


def mutants() -> list[tuple[str, Node, Node]]:
    """(what changed, the node, what it becomes) for each sum, difference, product and solve of the program."""
    found = []
    for n in PROGRAM.nodes():
        if n.op is Op.ELEM and n["fn"] in ("add", "sub", "mul"):
            x, y = n.args
            other = {"add": "sub", "sub": "add", "mul": "add"}[n["fn"]]
            found.append((f"{n['fn']} -> {other}", n, make(Op.ELEM, (x, y), fn=other)))
            if set(x.axes) == set(n.axes):
                found.append((f"{n['fn']}: right operand dropped", n, x))
            if set(y.axes) == set(n.axes):
                found.append((f"{n['fn']}: left operand dropped", n, y))
        elif n.op is Op.DOT:
            found.append(("product negated", n, -n))
        elif n.op is Op.TRI_SOLVE:
            found.append(("solve dropped", n, n.args[1]))
            found.append(("solve: M negated", n, n.but((-n.args[0], n.args[1]))))
        elif n.op is Op.SELECT:
            found.append(("mask dropped", n, n.args[1]) if set(n.args[1].axes) == set(n.axes) and n.args[2].const == 0.0 else
                         ("mask negated", n, make(Op.SELECT, (n.args[0], -n.args[1], n.args[2]))))
    return found


def inputs() -> dict[str, torch.Tensor]:
    sizes, generator = Sizes(AXES, CU), torch.Generator().manual_seed(0)
    x = {n: 0.4 * torch.randn([sizes.dim(d) for d in t.dims], generator=generator).double()
         for n, t in PROGRAM.tensors().items() if n in PROGRAM.read()}
    return x | {"g": -0.3 * x["g"].abs(), "beta": x["beta"].sigmoid()}


def by_backend(p: Program, name: str, arch: str) -> dict[str, torch.Tensor]:
    """What a backend makes of a mutant: torch in float64, others in float32; outputs poisoned first."""
    b, io = BACKENDS[name], "f64" if name == "torch" else "f32"
    schedule = Schedule("naive", 16, plan("naive"), (("*", KernelOptions(num_warps=1, num_stages=1)),), dot=io)
    kernels = lower(p, schedule, b, arch, AXES, {"io": io, "beta": io}, True)
    call = Call(2, 53, 53, {"H": 1, "HV": 2}, torch.tensor(CU, dtype=torch.int32))
    dtypes = {n: TORCH[io if t.dtype in ("io", "beta") else t.dtype] for n, t in p.tensors().items()}
    memory = {n: x.to(dtypes[n] if io == "f32" else torch.float64) for n, x in inputs().items() if n in dtypes}
    sizes = Sizes(AXES, CU)
    for n in p.written():
        memory[n] = torch.full([sizes.dim(d) for d in p.tensors()[n].dims], float("nan"), dtype=dtypes[n])
    Compiled(kernels, b, arch)(memory, {"scale": 0.7}, call)
    return {n: memory[n].double() for n in p.written()}


MUTANTS = mutants()


def mutant(i: int) -> Program:
    _, node, new = MUTANTS[i]
    return verify(PROGRAM.rebuild(lambda n, args: new if n is node else None))
