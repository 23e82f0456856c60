"""Prints a program as Python that evaluates back to the same program (the very same nodes: they are hash-consed)."""
from __future__ import annotations

import math
from typing import Any

from gdn_ir import nodes as ir
from gdn_ir.nodes import FUNCTIONS, Node, Op, Tensor
from gdn_ir.program import Line, Note, Program
from gdn_ir.verify import verify


def dump(program: Program, notes: bool = True) -> str:
    """The program as text; with `notes`, each statement ends in the line of the user's program behind it."""
    names = _names(program)
    lines = [f"{_ident(t.name)}_ = {t!r}" for t in program.tensors().values()]
    for n in program.nodes():
        if n.op is Op.CONST:
            continue
        text = f"{names[n]} = {_expression(n, names)}"
        where = program.lines_of(n)
        lines.append(f"{text:<90}  # {n.type}" + (f"  {where[0]}" if notes and where else ""))
    roots = "".join(f"{names[r]}, " for r in program.roots)
    lines.append(f"program = Program({program.name!r}, {program.grid!r}, ({roots}))")
    return "\n".join(lines) + "\n"


def evaluate(text: str) -> Program:
    """The program that `dump` printed."""
    words = ("Op", "Tensor", "Tile", "Part", "At", "Rows", "Slot", "Turn", "Members", "Member", "make")
    scope: dict[str, Any] = {**{k: getattr(ir, k) for k in words},
                             "Program": Program, "Note": Note, "Line": Line, "inf": math.inf,
                             "const": lambda x: ir.make(Op.CONST, value=float(x))}
    exec(compile(text, "<program>", "exec"), scope)
    return verify(scope["program"])


def _ident(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def _names(program: Program) -> dict[Node, str]:
    names: dict[Node, str] = {}
    taken: set[str] = {f"{_ident(t)}_" for t in program.tensors()} | {"program"}
    for i, n in enumerate(program.nodes()):
        if n.op is Op.CONST:
            names[n] = f"const({n['value']!r})"
            continue
        wanted = _ident(program.name_of(n) or f"n{i}")
        while wanted in taken:
            wanted += "_"
        taken.add(wanted)
        names[n] = wanted
    return names


def _expression(n: Node, names: dict[Node, str]) -> str:
    args = [names[a] for a in n.args]
    fn = FUNCTIONS[n["fn"]] if n.op is Op.ELEM else None
    # an operator between two constants would be Python's own
    if fn and fn.symbol and fn.symbol in "+-*/" and n.args[0].op is not Op.CONST:
        return f"{args[0]} {fn.symbol} {args[1]}" if fn.arity == 2 else f"-{args[0]}"
    attr = "".join(f", {k}={_value(v)}" for k, v in n.attr)
    return f"make(Op.{n.op.name}, ({''.join(a + ', ' for a in args)}){attr})"


def _value(v: Any) -> str:
    return f"{_ident(v.name)}_" if isinstance(v, Tensor) else repr(v)
