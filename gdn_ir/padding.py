"""Padding: what each value holds where a tile is larger than what it covers, and a Select where that would do harm.

A kernel's tiles have fixed extents; the last chunk of a sequence does not fill its tile, nor K = 96 a tile of 128.
Masked loads read zeros there. This pass follows what becomes of them and guards, with a Select and never with a
multiplication (0 * inf is NaN), each consumer that sums along a padded axis. It looks through everything computed in
the op: a gate's padded rows are sigmoid(0), not 0.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gdn_ir.build import elem, index, select
from gdn_ir.interp import elementwise
from gdn_ir.nodes import Node, Op, Rows, Slot, base, make
from gdn_ir.program import Program, ScanView
from gdn_ir.verify import verify


@dataclass(frozen=True)
class Repeat:
    """The padding repeats the last valid coordinate: a running sum of zeros."""


Pad = float | Repeat | None       # a constant, a repetition, or nothing known


@dataclass(frozen=True)
class Holds:
    """What a value holds in the padding of each of its axes (absent: unknown).

    pad: along one axis, where the other axes are valid. finite: no inf or NaN anywhere in the padding, provided the
    valid part has none. drawn: every padded value equals some valid one or a constant (so any function of it is as
    finite as it is on valid data).
    """
    pad: Mapping[str, Pad]
    finite: bool
    drawn: bool

    def on(self, axis: str) -> Pad:
        return self.pad.get(axis)


def pad(program: Program, axes: frozenset[str]) -> Program:
    """The program, right when tiles along `axes` (base names) are larger than what they cover."""
    known: dict[Node, Holds] = {}
    assumed: dict[str, Holds] = {}

    def holds(n: Node) -> Holds:
        if n not in known:
            known[n] = _rule(n, [holds(a) for a in n.args], axes, assumed)
        return known[n]

    def guard(n: Node, axis: str, neutral: float) -> Node:
        if base(axis) not in axes or axis not in n.axes or holds(n).on(axis) == neutral:
            return n
        valid = make(Op.VALID, axis=axis)
        return select(elem("lt", index(axis), valid), n, neutral)

    def change(old: Node, args: tuple[Node, ...]) -> Node | None:
        if old.op is Op.SCAN:
            return old.but(args)
        if old.op is Op.CUMSUM or (old.op is Op.REDUCE and old["fn"] == "sum"):
            return old.but((guard(args[0], old["axis"] if old.op is Op.CUMSUM else old["over"], 0.0),))
        if old.op is Op.REDUCE:
            return old.but((guard(args[0], old["over"], -math.inf),))
        if old.op is Op.TRI_SOLVE and dict(old.attr).get("transpose"):
            # solved from the last row up: what M holds in rows past the end would reach the valid ones
            r = args[1] if holds(args[1]).finite else guard(args[1], old["axis"], 0.0)
            return old.but((guard(args[0], old["axis"], 0.0), r))
        if old.op is Op.DOT:
            a, b, over = *args, old["over"]
            if base(over) not in axes:
                return None
            # one operand must be zero and the other finite; guarding a small operand is cheaper
            zero = [holds(x).on(over) == 0.0 for x in (a, b)]
            fine = [holds(x).finite for x in (a, b)]
            if (zero[0] and fine[1]) or (zero[1] and fine[0]):
                return None
            if not fine[0] or not (zero[1] or fine[1]):
                a = guard(a, over, 0.0)
            if not fine[1] or (holds(a).on(over) != 0.0 and not zero[1]):
                b = guard(b, over, 0.0)
            return make(Op.DOT, (a, b), over=over)
        return None

    # a carry holds at every iteration what its start and its next value both hold: assume the start, check the next
    for scan in program.scans():
        view = ScanView.of(scan)
        for name, init in zip(view.carries, view.inits, strict=True):
            assumed[name] = holds(init)
    while True:
        known.clear()
        result = program.rebuild(change)
        weaker = dict(assumed)
        for scan in result.scans():
            view = ScanView.of(scan)
            for name, init, step in zip(view.carries, view.inits, view.nexts, strict=True):
                weaker[name] = _meet(_meet(holds(init), holds(step)), assumed[name])
        if weaker == assumed:
            return verify(result)
        assumed.update(weaker)


def _meet(a: Holds, b: Holds) -> Holds:
    return Holds({x: p for x, p in a.pad.items() if b.pad.get(x) == p}, a.finite and b.finite, a.drawn and b.drawn)


_RISKY = ("exp", "exp2", "log", "rsqrt", "div", "floordiv")       # finite arguments do not make these finite


def _rule(n: Node, args: list[Holds], axes: frozenset[str], assumed: Mapping[str, Holds]) -> Holds:
    padded = [a for a in n.axes if base(a) in axes]
    if not padded:
        return Holds({}, True, True)
    match n.op:
        case Op.LOAD:
            # columns past the chunk in a stored [C, C'] tile are read as they were written
            tokens = {t.tile for t in n["index"] if isinstance(t, Rows | Slot)}
            whole = {a for a in padded if a.endswith("'") and base(a) in tokens}
            return Holds({a: 0.0 for a in padded if a not in whole}, True, not whole)
        case Op.CARRY:
            return assumed.get(n["name"], Holds({}, True, False))
        case Op.FINAL:                                     # holds what the carry holds at every iteration
            return assumed[n.args[0]["carries"][n["i"]]]
        case Op.INDEX:
            return Holds({}, True, False)
        case Op.BROADCAST | Op.CAST:
            (x,) = args
            new = {a: x.on(a) if a in n.args[0].axes else Repeat() for a in padded}
            value = n.args[0].const
            return Holds({a: value if value is not None else p for a, p in new.items()}, x.finite, x.drawn)
        case Op.TWIN:
            swap = {n["axis"]: n["axis"] + "'", n["axis"] + "'": n["axis"]}
            return Holds({swap.get(a, a): p for a, p in args[0].pad.items()}, args[0].finite, args[0].drawn)
        case Op.CUMSUM:
            zero = args[0].on(n["axis"]) == 0.0 and not n["reverse"]
            new = {a: p for a, p in args[0].pad.items() if a != n["axis"] and (p == 0.0 or isinstance(p, Repeat))}
            new |= {n["axis"]: Repeat()} if zero else {}
            return Holds(new, args[0].finite, args[0].finite and zero and len(padded) == 1)
        case Op.REDUCE:
            return Holds({a: p for a, p in args[0].pad.items() if a != n["over"] and p == 0.0}, args[0].finite, False)
        case Op.DOT:
            # a zero row of one operand makes a zero row of the product, if the other has nothing to spoil it
            new = {a: 0.0 for a in padded for x, y in (args, args[::-1]) if x.on(a) == 0.0 and y.finite}
            return Holds(new, args[0].finite and args[1].finite, False)
        case Op.TRI_SOLVE:
            m, r = args
            a = n["axis"]
            # rows of M past the chunk multiply finite rows of u; columns past it meet rows that do not exist yet
            zero = r.on(a) == 0.0 and m.on(a) == 0.0
            return Holds({x: p for x, p in r.pad.items() if p == 0.0 and (x != a or zero)}, m.finite and r.finite, False)
        case Op.SELECT:
            return _select(n, args, padded)
        case Op.ELEM:
            return _elementwise(n, args, padded)
    return Holds({}, False, False)


def _view(n: Node, h: Holds, axis: str) -> Pad:
    """What an argument shows along an axis of the result: an argument without that axis repeats itself."""
    if n.const is not None:
        return n.const
    return h.on(axis) if axis in n.axes else Repeat()


def _elementwise(n: Node, args: list[Holds], padded: list[str]) -> Holds:
    new: dict[str, Pad] = {}
    for a in padded:
        seen = [_view(x, h, a) for x, h in zip(n.args, args, strict=True)]
        if all(isinstance(p, Repeat) for p in seen):
            new[a] = Repeat()
        elif all(isinstance(p, float) for p in seen):          # a condition that is known holds 1 or 0
            new[a] = float(elementwise(n["fn"], *(torch.tensor(p, dtype=torch.float64) for p in seen)))
        elif n["fn"] == "mul" and any(p == 0.0 and args[1 - i].finite for i, p in enumerate(seen)):
            new[a] = 0.0
        elif all(isinstance(p, Repeat) or x.const is not None for p, x in zip(seen, n.args, strict=True)):
            new[a] = Repeat()
    repeats = all(isinstance(new.get(a), Repeat) for a in padded)
    drawn = repeats or (len(n.args) == 1 and args[0].drawn)
    constants = all(isinstance(new.get(a), float) and math.isfinite(new[a]) for a in padded)       # type: ignore[arg-type]
    finite = all(h.finite for h in args) and (n["fn"] not in _RISKY or (constants and len(padded) == 1))
    sane = all(math.isfinite(p) for p in new.values() if isinstance(p, float))
    return Holds(new, sane and (finite or repeats or (n["fn"] in ("exp", "exp2") and drawn)), drawn)


def _select(n: Node, args: list[Holds], padded: list[str]) -> Holds:
    c, yes, no = n.args
    new: dict[str, Pad] = {}
    guard = _guards(c)
    causal = c.op is Op.ELEM and c["fn"] in ("ge", "gt") and all(x.op is Op.INDEX for x in c.args) \
        and c.args[1]["axis"] == c.args[0]["axis"] + "'"
    for a in padded:
        y, z = _view(yes, args[1], a), _view(no, args[2], a)
        if guard == a or (causal and a == c.args[1]["axis"]):       # valid rows never reach columns past the chunk
            new[a] = z if not isinstance(z, Repeat) else None
        elif args[0].on(a) in (0.0, 1.0):
            new[a] = y if args[0].on(a) else z
        elif y == z:
            new[a] = y
    # under a causal mask, padded rows repeat the last row (which sees every valid column), and the corner its last entry
    repeats = all(isinstance(_view(yes, args[1], a), Repeat) for a in padded)
    drawn = (causal and c["fn"] == "ge" and repeats and no.const is not None) or \
            (guard is not None and padded == [guard] and no.const is not None)
    chosen = args[1].finite or drawn or (guard is not None and padded == [guard])
    return Holds(new, chosen and (math.isfinite(no.const) if no.const is not None else args[2].finite), drawn)


def _guards(c: Node) -> str | None:
    """The axis that a condition keeps to its valid part, if that is what it does."""
    if c.op is Op.ELEM and c["fn"] == "lt" and c.args[0].op is Op.INDEX and c.args[1].op is Op.VALID:
        return str(c.args[0]["axis"])
    return None
