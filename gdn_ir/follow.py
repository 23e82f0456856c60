"""A kernel that follows another: it starts beside the scan before it and takes each chunk as soon as that one has stored it.

A serial scan of few blocks leaves most of a GPU idle, and the kernel after it, which takes all chunks at once, waits for the
last of them though most are long done. Where all that it reads of the scan belongs to its own chunk it need not: the scan
counts, for every few chunks (`TOGETHER`), the columns that it has stored, and the follower waits for that count alone. A kernel
that reads nothing of the one before it waits for nothing: the two run beside each other. Two scans may, and one kernel follow
both.
"""
from __future__ import annotations

from collections.abc import Container, Sequence

from gdn_ir.nodes import IRError, Node, Op, Rows, Slot, Tensor
from gdn_ir.program import Program, ScanView

TOGETHER = 8               # chunks that are counted as one: a count waits for all that was stored before it, 0.4 us on an H100


def apart(before: Program, after: Program) -> bool:
    """Whether neither kernel writes what the other touches."""
    return not (set(before.written()) & {*after.read(), *after.written()} or set(after.written()) & set(before.read()))


def ready(scan: Program, follower: Program) -> Tensor | None:
    """The counts that `follower` waits for: for the first chunk of each few, and each grid point, how many columns of them
    `scan` has stored; None where it need not wait. Raises IRError naming what forbids it: another grid, or a load of what the
    scan stores elsewhere than in the same chunk's turn."""
    if apart(scan, follower):
        return None
    serial, parallel = _only_scan(scan), _only_scan(follower)
    if not serial["carries"]:
        raise IRError(f"follow: {scan.name} takes all its chunks at once, so that there is nothing to follow")
    if parallel["carries"]:
        raise IRError(f"follow: {follower.name} is serial: a follower takes all chunks at once")
    grid, other = _points(scan), _points(follower)
    if grid != other:
        raise IRError(f"follow: {scan.name} has a block for each of {', '.join(grid)}, and {follower.name} for each of "
                      f"{', '.join(other)}")
    if len(serial["chain"]) > 1 or len(parallel["chain"]) > 1:
        raise IRError(f"follow: {scan.name} and {follower.name} must step through chunks in one scan each, not in nested ones")
    if {a for a in scan.grid if a.endswith("#")} - {"V#"} or set(follower.written()) & set(scan.read()):
        raise IRError(f"follow: {scan.name} must be split along V alone, and read nothing that {follower.name} writes")
    if both := set(follower.written()) & set(scan.written()):
        raise IRError(f"follow: {scan.name} and {follower.name} both write {', '.join(sorted(both))}")
    asked = ScanView.of(parallel).asked()
    if asked and asked["tensor"].name in scan.written():
        raise IRError(f"follow: {follower.name} asks which chunks run before it waits for {scan.name}, which says so")
    made = {e["tensor"].name: e for e in ScanView.of(serial).effects if e.op is Op.STORE}
    for n in follower.nodes():
        if n.op is Op.LOAD and n["tensor"].name in scan.written():
            store = made.get(n["tensor"].name)
            if store is None or not _chunk(store) or _chunk(store) != _chunk(n):
                raise IRError(f"follow: {follower.name} reads what {scan.name} does not store chunk by chunk\n  in "
                              f"{follower.describe(n)}")
    return Tensor(f"{scan.name}_ready", ("X", *(a for a in grid if a != "N")), "int", temp=True)


def followers(pipeline: Sequence[Program], names: Container[str]) -> dict[int, dict[int, Tensor]]:
    """For each kernel of these names (but the first) its place in the pipeline, and the places of the scans that it follows
    with the counts that it waits for: of the one before it, and where that follows too, of those beside which that one starts.
    Raises IRError where it cannot, as `ready` does."""
    found = {i: dict[int, Tensor]() for i, p in enumerate(pipeline) if i and p.name in names}
    for i in found:
        for j in range(i - 1, first_beside(i, found) - 1, -1):
            try:
                counts = ready(pipeline[j], pipeline[i])
            except IRError as e:
                if j == i - 1:
                    raise
                late, soon = pipeline[j].name, pipeline[i].name
                raise IRError(f"follow: {soon} could run before {late} has ended, and they meet in memory; {e}") from e
            found[i] |= {j: counts} if counts else {}
    return found


def beside(pipeline: Sequence[Program], names: Container[str], followed: Container[int]) -> None:
    """Raises IRError where one of the kernels of these names cannot run in a stream of its own beside the kernel after it."""
    for i, p in enumerate(pipeline):
        if p.name not in names:
            continue
        after = pipeline[i + 1] if i + 1 < len(pipeline) else None
        if after is None or after.name in names or not apart(p, after) or any(j in followed for j in (i, i + 1, i + 2)):
            raise IRError(f"aside: {p.name} cannot run beside the kernel after it: there is none, they meet in memory, it runs "
                          "aside too, or one of the two, or the next, follows")


def first_beside(i: int, followed: Container[int]) -> int:
    """The place of the first kernel beside which the i-th of a pipeline may run: the last before it that does not follow."""
    while i in followed:
        i -= 1
    return i


def can_follow(scan: Program, follower: Program) -> bool:
    try:
        ready(scan, follower)
    except IRError:
        return False
    return True


def clears(before: Program, scan: Program) -> bool:
    """Whether the kernel before a scan that is followed has a block for each chunk, which can set its count to zero."""
    return len(before.roots) == 1 and before.roots[0].op is Op.SCAN and not before.roots[0]["carries"] and \
        len(before.roots[0]["chain"]) == 1 and _points(before) == _points(scan)


def _points(p: Program) -> tuple[str, ...]:
    return tuple(a for a in p.grid if not a.endswith("#"))


def _only_scan(p: Program) -> Node:
    if (len(p.roots) != 1 and not all(r.op is Op.STORE for r in p.roots[1:])) or p.roots[0].op is not Op.SCAN:
        raise IRError(f"follow: {p.name} is more than one scan over chunks")
    return p.roots[0]


def _chunk(n: Node) -> tuple[object, ...]:
    """The terms by which a place in memory belongs to the chunk at hand, if it does."""
    return tuple(t for t in n["index"] if isinstance(t, Rows | Slot))
