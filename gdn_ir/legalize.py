"""Fitting a program to extents: axes of extent 1 vanish, and products too small for matrix units become sums.

With chunks of one token the chunkwise program becomes the decode step by these rules alone.
"""
from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace

from gdn_ir.build import broadcast, cast, dot, reduce_sum
from gdn_ir.nodes import At, Node, Op, Rows, as_node, base
from gdn_ir.program import Program
from gdn_ir.rewrite import simplify
from gdn_ir.verify import verify


def collapse(program: Program, axis: str) -> Program:
    """The program for extent 1 of a tokens' axis: the axis and its twins are gone."""
    def gone(a: str) -> bool:
        return base(a) == axis

    def change(old: Node, args: tuple[Node, ...]) -> Node | None:
        match old.op:
            case Op.LOAD | Op.STORE:
                index = tuple(replace(t, single=True) if isinstance(t, Rows) and t.tile == axis else t for t in old["index"])
                return old.but(args, index=index)
            case Op.INDEX if gone(old["axis"]):
                return as_node(0.0)
            case Op.TWIN | Op.CUMSUM if gone(old["axis"]):
                return args[0]
            case Op.TRI_SOLVE if gone(old["axis"]):
                return args[1]                             # strictly lower of 1 x 1 is nothing
            case Op.REDUCE if gone(old["over"]):
                return args[0]
            case Op.DOT if gone(old["over"]):
                return args[0] * args[1]
            case Op.BROADCAST:
                return broadcast(args[0], (a for a in old["axes"] if not gone(a)))
            case Op.CARRY:
                return old.but(axes=tuple(a for a in old["axes"] if not gone(a)))
            case Op.SELECT if all(x.const is not None for x in args[0].args):
                # masks between positions have become comparisons of constants
                a, b = (float(x["value"]) for x in args[0].args)
                holds = {"ge": a >= b, "gt": a > b, "le": a <= b, "lt": a < b, "eq": a == b}[args[0]["fn"]]
                return args[1] if holds else args[2]
        return None
    return simplify(program.rebuild(change))


def ungrouped(program: Program) -> Program:
    """The program for as many points of each shared grid axis as the dimensions that share it have (HV = H): nothing is
    shared, so nothing is summed over the points that shared it."""
    def change(old: Node, args: tuple[Node, ...]) -> Node | None:
        if old.op not in (Op.LOAD, Op.STORE):
            return None
        shared = {t.share: t.grid for t in old["index"] if isinstance(t, At) and t.share}
        if not shared:
            return None
        t = replace(old["tensor"], dims=tuple(shared.get(d, d) for d in old["tensor"].dims))
        index = tuple(replace(x, share=None) if isinstance(x, At) else x for x in old["index"])
        new: dict[str, Hashable] = {"tensor": t, "index": index}
        if old.op is Op.STORE:
            new["sum"] = tuple(g for g in old["sum"] if g not in shared.values())
        return old.but(args, **new)
    return verify(program.rebuild(change))


def small_products(program: Program, extents: Mapping[str, int], least: int = 16) -> Program:
    """Products that matrix units cannot take, as Reduce(mul): an operand without an axis of its own, a shared axis that
    is not contracted, or an extent under `least`."""
    def change(old: Node, args: tuple[Node, ...]) -> Node | None:
        if old.op is not Op.DOT:
            return None
        over = old["over"]
        a, b = (set(x.axes) - {over} for x in args)
        fits = len(a) == len(b) == 1 and not a & b and all(extents[base(x)] >= least for x in (*a, *b, over))
        return None if fits else reduce_sum(args[0] * args[1], over)
    return verify(program.rebuild(change))


def split_products(program: Program) -> Program:
    """Products of float32 for matrix units that read tf32: dot(x, y) -> dot(X, Y) + (dot(X, y - Y) + dot(x - X, Y)), capitals
    rounded to tf32. What is dropped is smaller than float32 resolves."""
    def change(old: Node, args: tuple[Node, ...]) -> Node | None:
        if old.op is not Op.DOT or old.args[0].type.dtype != "tf32x3":
            return None
        (X, x), (Y, y) = (parts(a) for a in args)
        over = old["over"]
        return dot(X, Y, over) + (dot(X, y, over) + dot(x, Y, over))

    def parts(a: Node) -> tuple[Node, Node]:
        if a.op is Op.TWIN:
            high, low = parts(a.args[0])
            return a.but((high,)), a.but((low,))
        value = a.args[0] if a.op is Op.CAST else a
        high = cast(value, "tf32")
        return high, cast(value - cast(high, value.type.dtype), "tf32")
    return verify(program.rebuild(change))
