"""A cost model: how long a schedule should take on a GPU that nobody has timed it on. Coarse: it ranks, and is never a result.

A kernel whose chunks run at once takes as long as its memory traffic or its products, whichever is more, at the part of the
GPU's rates that such kernels reach. A serial one takes turns: of each block, one chunk after another, and a turn takes at least
the time until its results can be used.
"""
from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from gdn_ir.autotune.keys import Device, Shape, program_hash
from gdn_ir.autotune.prune import BYTES, scans, size
from gdn_ir.autotune.records import Subject, Winner, today
from gdn_ir.backends.base import Call, Kernel, blocks
from gdn_ir.compiler import Instance, Variant, variant
from gdn_ir.nodes import At, Member, Members, Node, Op
from gdn_ir.program import Scopes
from gdn_ir.schedules.defaults import default


@dataclass(frozen=True)
class Rates:
    """Of a GPU, from its data sheet: bytes a second of its memory; operations a second of 16-bit products on matrix units (half
    of it in tf32); clock, in Hz."""
    device: Device
    bytes: float
    flops: float
    clock: float


A100 = Rates(Device("NVIDIA A100-SXM4-80GB", 108, "sm_80"), 2.04e12, 312e12, 1.41e9)
H100 = Rates(Device("NVIDIA H100 80GB HBM3", 132, "sm_90"), 3.35e12, 990e12, 1.98e9)
REACHED_BYTES, REACHED_FLOPS = 0.8, 0.25                   # parts of the rates, as kernels on an H100 did
TURN = 2200.0                                              # clocks of a turn's dependent products and exchanges
SOLVE = 3900.0                                             # clocks of a multiprocessor for an inverse of 64 rows made of blocks
FILL = 4                                                   # turns until a serial kernel's loads are ahead of it
LAUNCH = 3e-6                                              # seconds
FEW, MANY = 8, 512                                         # scans


def sharers(kernel: Kernel, memory: Node, tile: Node, call: Call) -> float:
    """Blocks that read the same tile at about the same time, once from memory and then from the cache: those of other parts of
    a split axis that the tile lacks, and of the value heads that share a key head (or one block, a head after the other)."""
    found = 1.0
    for a in kernel.splits:
        found *= 1 if a in tile.axes else -(-kernel.extents[a] // kernel.tile(a))
    shared = any(t.share if isinstance(t, At) else isinstance(t, Member) and t.own for t in memory["index"])
    return found * (call.heads["HV"] / call.heads["H"] if shared else 1)


def kernel_seconds(kernel: Kernel, call: Call, rates: Rates) -> float:
    """Seconds of one kernel."""
    moved = products = solves = 0.0
    scopes = Scopes(kernel.program.roots)
    for n in kernel.program.nodes():
        times = math.prod(call.heads[s.axis] / call.heads[s.group] for s in kernel.groups if s.axis in scopes[n])
        if n.op in (Op.LOAD, Op.STORE) and {"T", "X", *kernel.segments} & set(n["tensor"].dims):
            tile = n if n.op is Op.LOAD else n.args[0]
            if any(isinstance(t, Members) and t.grid for t in n["index"]):     # one for each value head of a key head
                times *= call.heads["HV"] / call.heads["H"]
            moved += times * size(kernel, tile) * BYTES[n["tensor"].dtype] / sharers(kernel, n, tile, call)
        if n.op is Op.TRI_SOLVE and "merges" in dict(n.attr):
            solves += SOLVE * (kernel.tile(n["axis"]) / 64) ** 2
        if n.op is Op.DOT:
            half = n.args[0].type.dtype in ("bf16", "f16")
            products += times * 2.0 * size(kernel, n) * kernel.tile(n["over"]) * (1 if half else 2)
    count, units = blocks(kernel, call), rates.device.units
    if not scans(kernel):
        return LAUNCH + count * max(moved / (REACHED_BYTES * rates.bytes), products / (REACHED_FLOPS * rates.flops),
                                    solves / (units * rates.clock))
    loop = scans(kernel)[0]
    turns = -(-call.tokens // max(1, call.sequences) // kernel.span(loop))
    turns = FILL + (min(turns, kernel.extents[loop.axis]) if kernel.parallel else turns)       # those of a segment
    busy = min(count, units)
    turn = max(TURN / rates.clock, moved * busy / (REACHED_BYTES * rates.bytes),
               products * units / (REACHED_FLOPS * rates.flops))
    return LAUNCH + -(-count // units) * turns * turn


def milliseconds(made: Variant, call: Call, rates: Rates) -> float:
    """Milliseconds of a variant on a call."""
    return 1e3 * sum(kernel_seconds(k, call, rates) for k in made.compiled.kernels)


def modelled(instance: Instance, shapes: Iterable[Shape], rates: Rates, backend: str = "triton") -> list[Winner]:
    """Of a GPU that nobody has timed: for each shape the better one, by this model, of the schedules that the heuristic has for
    few and for many scans (all of which have been checked); on a tie the heuristic's own."""
    from gdn_ir.backends import BACKENDS
    found, arch = [], rates.device.arch
    subject = Subject(instance, backend, rates.device, tuple((BACKENDS[backend].toolchain(arch) or {}).items()))
    for s in shapes:
        sizes = (len(s.lengths), s.tokens, s.tokens if instance.varlen else s.lengths[0], {"H": s.H, "HV": s.HV})
        schedules = [default(arch, instance, *key, backend)[0] for key in (s.key, (1, FEW, s.tokens), (1, MANY, s.tokens))]
        made = [variant(instance, x, backend, arch) for x in schedules]
        times = [milliseconds(m, Call(*sizes), rates) for m in made]           # each with a memo of its own
        ms, best = min(((t, i) for i, t in enumerate(times)), key=lambda x: (round(x[0], 9), x[1]))
        sources = tuple((x.kernel, x.hash) for x in made[best].sources)
        found.append(Winner(subject, s, schedules[best], sources, None, None, (), today(), "heuristic and cost model",
                            program_hash(instance), round(ms, 4)))
    return found
