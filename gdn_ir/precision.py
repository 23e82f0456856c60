"""From reals to machine numbers: storage dtypes at loads and stores, one dtype for products' operands, one for the rest.

The schedule decides the dtypes; this pass writes them into the program as casts, so that the interpreter can round as
the kernel will. Casts that a step of the plan wrote (the merges of an inverse) stand as they are.
"""
from __future__ import annotations

from dataclasses import replace

from gdn_ir.build import cast
from gdn_ir.nodes import REAL, Node, Op, Tensor, make
from gdn_ir.program import Program
from gdn_ir.verify import verify


WIDTH = {"bf16": 0, "f16": 0, "tf32": 1, "tf32x3": 2, "f32": 3, "f64": 4, REAL: 5, "int": 5}     # of what a dtype can hold


def storage(program: Program, **dtypes: str) -> Program:
    """Name the dtypes that tensors are stored in: io="bf16" for those that follow the caller's inputs, and so on."""
    def change(old: Node, args: tuple[Node, ...]) -> Node | None:
        if old.op not in (Op.LOAD, Op.STORE):
            return None
        t: Tensor = old["tensor"]
        return old.but(args, tensor=replace(t, dtype=dtypes.get(t.dtype, t.dtype)))
    return program.rebuild(change)


def precision(program: Program, products: str, rest: str = "f32") -> Program:
    """The program with every value typed. products: dtype that operands of Dot are rounded to; rest: all other arithmetic
    and the products' sums. Storage must be named already."""
    def change(old: Node, args: tuple[Node, ...]) -> Node | None:
        if old.op is Op.LOAD:
            return cast(old.but(args, typed=True), rest)
        if old.op is Op.DOT:
            chosen = next((a["dtype"] for a in old.args if a.op is Op.CAST and a["dtype"] != REAL), products)
            return cast(make(Op.DOT, tuple(narrow(a, chosen) for a in args), over=old["over"]), rest)
        if old.op is Op.STORE:
            return old.but((narrow(args[0], old["tensor"].dtype), *args[1:]))
        if old.op is Op.CARRY:
            return old.but(dtype=rest)
        if old.op is Op.CAST and old["dtype"] == REAL:
            return cast(args[0], rest)
        if old.op is Op.SCAN:
            n = 2 * len(old["carries"])
            args = tuple(typed(a, rest) for a in args[:n]) + args[n:]
            return old.but(args)
        if old.op in (Op.ELEM, Op.SELECT, Op.REDUCE, Op.CUMSUM, Op.TRI_SOLVE, Op.BROADCAST, Op.TWIN) \
                and not any(a.type.dtype == "int" for a in args):
            return old.but(tuple(typed(a, rest) for a in args))
        return None
    return verify(program.rebuild(change))


def typed(x: Node, dtype: str) -> Node:
    """x in this dtype, if it is still a real; a bare constant takes the dtype of what it meets."""
    return cast(x, dtype) if x.type.dtype == REAL and x.op is not Op.CONST else x


def narrow(x: Node, dtype: str) -> Node:
    """x rounded to dtype; through a twin, and back over a cast that only widened, so that a tile loaded in this dtype is used
    as it was loaded."""
    if x.op is Op.TWIN:
        return make(Op.TWIN, (narrow(x.args[0], dtype),), axis=x["axis"])
    if x.op is Op.CAST and x.args[0].type.dtype == dtype and WIDTH[dtype] < WIDTH[x.type.dtype]:
        return x.args[0]
    return cast(x, dtype) if x.op is not Op.CONST else x
