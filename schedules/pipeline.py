"""What steps work on: a pipeline of programs, the table of steps, and how one says no.

A pipeline is a tuple of programs run in order, each one kernel; it starts as the traced (or derived) program alone.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable

from gdn_ir.nodes import IRError, Node
from gdn_ir.program import Program
from gdn_ir.rewrite import simplify
from gdn_ir.verify import verify

Pipeline = tuple[Program, ...]
Step = Callable[..., Pipeline]
STEPS: dict[str, Step] = {}


class IllegalStep(IRError):
    """A schedule's step that this program does not allow; names the step, the node, its line and why."""


def step(fn: Step) -> Step:
    STEPS[fn.__name__] = fn
    return fn


def apply(program: Program, steps: tuple[tuple[str | int, ...], ...]) -> Pipeline:
    """Run the steps in order; every program is simplified and verified after each."""
    pipeline: Pipeline = (simplify(program),)
    for name, *args in steps:
        if name not in STEPS:
            raise IllegalStep(f"no step {name!r}; there are {', '.join(STEPS)}")
        wanted = inspect.signature(STEPS[str(name)])
        try:
            wanted.bind(pipeline, *args)
        except TypeError:
            names = ", ".join(list(wanted.parameters)[1:])
            raise IllegalStep(f"{name}: got {len(args)} arguments, {args}; accepts ({names})") from None
        pipeline = tuple(simplify(p) for p in STEPS[str(name)](pipeline, *args))
    return pipeline


def find(pipeline: Pipeline, name: str, step: str) -> tuple[int, Node]:
    """The program (the last that has it) and the node of a named value."""
    for i in reversed(range(len(pipeline))):
        try:
            return i, pipeline[i].named(name)
        except IRError:
            continue
    raise IllegalStep(f"{step}: no kernel has a value named {name!r}")


def named(pipeline: Pipeline, kernel: str, step: str) -> int:
    """The place of the kernel of that name."""
    at = next((i for i, p in enumerate(pipeline) if p.name == kernel), None)
    if at is None:
        raise IllegalStep(f"{step}: no kernel is named {kernel!r}; there are {', '.join(p.name for p in pipeline)}")
    return at


def refuse(step: str, program: Program, node: Node, why: str) -> IllegalStep:
    return IllegalStep(f"{step}: {why}\n  in {program.describe(node)}")


def replace_node(program: Program, old: Node, new: Node) -> Program:
    """`new` wherever `old` was, under its name."""
    result = program.rebuild(lambda n, args: new if n is old else None)
    return result.with_note(new, program.name_of(old) or "") if new in set(result.nodes()) else result


def put(pipeline: Pipeline, i: int, *programs: Program) -> Pipeline:
    """The pipeline with programs in place of its i-th."""
    return (*pipeline[:i], *(verify(p) for p in programs), *pipeline[i + 1:])
