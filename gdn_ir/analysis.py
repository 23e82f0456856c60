"""What a program lets a schedule do: which axes are parallel, which carries a value needs and feeds, what it costs."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gdn_ir.nodes import RUNS_ALONG, Node, Op, Rows, Slot, base
from gdn_ir.program import Program, ScanView, tile_axes, toposort


def contracted_axes(program: Program) -> frozenset[str]:
    """Tile axes (base names) that something sums, runs or solves along."""
    return frozenset(base(n[RUNS_ALONG[n.op]]) for n in program.nodes() if n.op in RUNS_ALONG)


def parallel_axes(program: Program) -> frozenset[str]:
    """Tile axes that nothing contracts: each of their coordinates is independent, so they can be split over the grid."""
    return frozenset(tile_axes(program)) - contracted_axes(program)


def needs(program: Program) -> dict[Node, frozenset[str]]:
    """The carries each node depends on within its own scan."""
    found: dict[Node, frozenset[str]] = {}
    for n in program.nodes():
        own = frozenset({n["name"]}) if n.op is Op.CARRY else frozenset()
        found[n] = own.union(*(found[a] for a in n.args)) if n.op not in (Op.SCAN, Op.FINAL) else frozenset()
    return found


def feeds(program: Program) -> dict[Node, frozenset[str]]:
    """The carries whose next value depends on each node, within its own scan."""
    found: dict[Node, set[str]] = {n: set() for n in program.nodes()}
    for scan in program.scans():
        view = ScanView.of(scan)
        for name, step in zip(view.carries, view.nexts, strict=True):
            for n in toposort([step]):
                found[n].add(name)
    return {n: frozenset(s) for n, s in found.items()}


def role(program: Program, node: Node) -> str:
    """How a scan binds a value: "hoistable" (needs no carry: all chunks at once, before), "sinkable" (feeds none: all chunks
    at once, after, from saved carries), or "serial"."""
    if not needs(program)[node]:
        return "hoistable"
    return "serial" if feeds(program)[node] else "sinkable"


@dataclass(frozen=True)
class Cost:
    """Of one chunk of one head (one grid point). flops: of products, 2 m n k each, a solve with n right-hand sides counting as
    the product with the inverse it stands for; bytes: each tensor tile moved once."""
    flops: int
    bytes: int


def cost(program: Program, extents: Mapping[str, int], sizes: Mapping[str, int] | None = None) -> Cost:
    """What a program costs a chunk and head. extents: of its tile axes; sizes: bytes of an element by storage dtype (2 for
    "io" and "beta", 4 for the rest, by default). Loads and stores outside of the scan over chunks are not counted."""
    extents = {**extents, **{twin: extents[a] for a in extents for twin in (a + "'", a + "''")}}
    sizes = {"io": 2, "beta": 2, "bf16": 2, "f16": 2, "f32": 4, "f64": 8} | dict(sizes or {})
    views = [ScanView.of(s) for s in program.scans()]
    inside = {n for v in views for n in toposort(v.nexts + v.effects)} or set(program.nodes())
    flops = moved = 0

    def count(*axes: str) -> int:
        total = 1
        for a in axes:
            total *= extents[a]
        return total
    for n in inside:
        if n.op is Op.DOT:
            flops += 2 * count(*n.axes, n["over"])
        elif n.op is Op.TRI_SOLVE:
            flops += 2 * count(*n.axes, n["axis"])
        elif n.op in (Op.LOAD, Op.STORE):
            axes = n.axes if n.op is Op.LOAD else n.args[0].axes
            if any(isinstance(t, Rows | Slot) for t in n["index"]):
                moved += count(*axes) * sizes[n["tensor"].dtype]
    return Cost(flops, moved)
