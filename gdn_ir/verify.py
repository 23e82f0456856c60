"""What must hold of every program, at every stage: one table of rules, run after the tracer and after each pass."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

from gdn_ir.nodes import At, IRError, Member, Members, Node, Op, Rows, Slot, Tile, infer, term_scans
from gdn_ir.program import Program, ScanView, Scopes, toposort

Finding = tuple[Node, str]
RULES: list[Callable[[Program], Iterator[Finding]]] = []


class VerifyError(IRError):
    """A program breaks a rule; the message says which, at which node, from which line."""


def rule(check: Callable[[Program], Iterator[Finding]]) -> Callable[[Program], Iterator[Finding]]:
    RULES.append(check)
    return check


def verify(program: Program) -> Program:
    """The program itself, if it keeps every rule. Raises VerifyError at the first that it breaks."""
    _verify(program)
    return program


@lru_cache(maxsize=1024)
def _verify(program: Program) -> None:
    """Once for equal programs: a tuner lowers the same ones by the hundred."""
    for check in RULES:
        for node, problem in check(program):
            raise VerifyError(f"{program.name}: {problem}\n  in {program.describe(node)}")


@rule
def types_follow(program: Program) -> Iterator[Finding]:
    for n in program.nodes():
        expected = infer(n.op, n.args, dict(n.attr))
        if expected != n.type:
            yield n, f"has type {n.type}, its arguments make it {expected}"


@rule
def roots_are_effects(program: Program) -> Iterator[Finding]:
    for n in program.roots:
        if n.type.dtype != "effect":
            yield n, f"only stores and scans may be roots, got a value of type {n.type}"


@rule
def tensors_agree(program: Program) -> Iterator[Finding]:
    seen: dict[str, Node] = {}
    for n in program.nodes():
        if n.op in (Op.LOAD, Op.STORE):
            first = seen.setdefault(n["tensor"].name, n)
            if first["tensor"] != n["tensor"]:
                yield n, f"tensor {n['tensor']} was declared as {first['tensor']}"
            for t in n["index"]:
                if isinstance(t, At | Member | Members) and t.grid not in (*program.grid, None):
                    yield n, f"index {t} is not on the grid {program.grid}"


@rule
def carries_stay_home(program: Program) -> Iterator[Finding]:
    """A carry is read only inside its scan, under the name and axes the scan gives it."""
    owner: dict[str, Node] = {}
    for scan in program.scans():
        view = ScanView.of(scan)
        if view.axis not in view.chain:
            yield scan, f"scans {view.axis}, which is not in its chain {view.chain}"
        for name, init in zip(view.carries, view.inits, strict=True):
            if name in owner:
                yield scan, f"carry {name!r} belongs to two scans"
            owner[name] = scan
            for carry in toposort(view.nexts + view.effects):
                if carry.op is Op.CARRY and carry["name"] == name:
                    if carry["scan"] != view.axis:
                        yield carry, f"is said to belong to scan {carry['scan']}, but scan {view.axis} carries it"
                    if carry.axes != init.axes:
                        yield carry, f"has axes {carry.axes}, but starts as {init.type}"
            if name in _carries_of(view.inits):
                yield scan, f"carry {name!r} is used to start itself"
    for name in _carries_of(program.roots):
        if name not in owner:
            yield next(n for n in program.nodes() if n.op is Op.CARRY and n["name"] == name), f"carry {name!r} has no scan"


def _carries_of(roots: tuple[Node, ...]) -> dict[str, None]:
    return {n["name"]: None for n in toposort(roots) if n.op is Op.CARRY}


@rule
def idle_scans_are_inner(program: Program) -> Iterator[Finding]:
    """Only the second scan of a chain has a first and a last iteration around it that are those of the sequence. One that does
    not run always has nothing to store."""
    for scan in program.scans():
        view = ScanView.of(scan)
        if view.idle and (view.axis != (*view.chain, "")[1] or not set(view.idle) <= {"first", "last"}):
            yield scan, f"is idle in iterations {view.idle} of no scan around it"
        if view.idle and view.effects:
            yield view.effects[0], f"is not stored in the iterations {view.idle} in which its scan is idle"
        if view.recent and (view.axis == view.chain[0] or view.group):
            yield scan, "runs its last iterations alone, which only an inner scan can"
        if view.recent and view.effects:
            yield view.effects[0], "is not stored in the iterations that its scan leaves out"


@rule
def chunks_left_out_are_alone(program: Program) -> Iterator[Finding]:
    """Backends leave out chunks where the grid runs them: in a program that is one scan over chunks and carries nothing. What
    says so is a number in memory, read before all else."""
    for scan in program.scans():
        view = ScanView.of(scan)
        asked = view.asked()
        if asked and (view.carries or len(view.chain) > 1 or view.group or program.roots != (scan,)):
            yield scan, "leaves out iterations, which only a program of all chunks at once can"
        elif asked and asked.op is not Op.LOAD:
            yield scan, "runs where a value says so that is no number in memory"


@rule
def scopes_close(program: Program) -> Iterator[Finding]:
    scopes = Scopes(program.roots)
    for root in program.roots:
        if scopes[root]:
            yield root, f"varies with scan {', '.join(sorted(scopes[root]))} but stands outside it"
    for scan in program.scans():
        view = ScanView.of(scan)
        for effect in view.effects:
            if effect.op is Op.STORE and view.axis not in term_scans(effect["index"]):
                yield effect, f"is written in every iteration of scan {view.axis}, always at the same place"
        for init in view.inits:
            if view.axis in scopes[init]:
                yield init, f"starts a carry of scan {view.axis} but varies with it"


@rule
def memory_is_ordered(program: Program) -> Iterator[Finding]:
    """A tensor that is read and written has an effect edge from each load to each store, or back."""
    under: dict[Node, frozenset[Node]] = {}
    memory: dict[str, tuple[list[Node], list[Node]]] = {}
    for n in program.nodes():
        mine = frozenset({n}) if n.op in (Op.LOAD, Op.STORE) else frozenset()
        under[n] = mine.union(*(under[a] for a in n.args))
        if n.op in (Op.LOAD, Op.STORE):
            memory.setdefault(n["tensor"].name, ([], []))[n.op is Op.STORE].append(n)
    for loads, stores in memory.values():
        for load in loads:
            for store in stores:
                if store not in under[load] and load not in under[store]:
                    yield store, f"and a load of {store['tensor'].name} have no order; give one of them the other as `after`"


@rule
def members_are_of_groups(program: Program) -> Iterator[Finding]:
    """A member is indexed in the scan over its group, whose points are on the grid."""
    groups: dict[str, str] = {}
    for scan in program.scans():
        view = ScanView.of(scan)
        if view.group and view.group not in program.grid:
            yield scan, f"steps through the members of {view.group}, which is not on the grid {program.grid}"
        groups[view.axis] = view.group
    for n in program.nodes():
        for t in n["index"] if n.op in (Op.LOAD, Op.STORE) else ():
            if isinstance(t, Member) and groups.get(t.scan) != t.grid:
                yield n, f"index {t} is of no scan over the members of {t.grid}"


@rule
def sums_cover(program: Program) -> Iterator[Finding]:
    """Grid points that write the same place must be summed, and only those."""
    for n in program.nodes():
        if n.op is Op.STORE:
            exclusive = {t.grid for t in n["index"] if isinstance(t, At) and t.share is None}
            exclusive |= {t.grid for t in n["index"] if isinstance(t, Member) and not t.own}
            exclusive |= {t.axis + "#" for t in n["index"] if isinstance(t, Tile)}
            if any(isinstance(t, Rows | Slot) for t in n["index"]):
                exclusive.add("N")
            missing = set(program.grid) - exclusive - set(n["sum"])
            if missing:
                yield n, f"is written by every point of {', '.join(sorted(missing))}: say that they are summed"
