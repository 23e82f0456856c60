"""Steps that cut a program into kernels.

What guides them is each node's set of carries: a value that needs none can be hoisted out of the scan into a kernel that
runs all chunks at once; one that feeds none can be sunk into such a kernel, given saved states.
"""
from __future__ import annotations

from dataclasses import replace

from gdn_ir.analysis import needs
from gdn_ir.follow import apart
from gdn_ir.nodes import At, Node, Op, Rows, Slot, Tensor, Term, Tile, make
from gdn_ir.program import Note, Program, ScanView, only, substitute, toposort
from gdn_ir.schedules.pipeline import IllegalStep, Pipeline, find, put, refuse, replace_node, step
from gdn_ir.verify import verify


def place_of(scan: ScanView, name: str, axes: tuple[str, ...], dtype: str, temp: bool | str = True) \
        -> tuple[Tensor, tuple[Term, ...]]:
    """Memory for one value of each chunk: a row a token where it lies on the tokens' axis, a slot a chunk where not."""
    on_tokens = scan.tile in axes
    first: Term = Rows(scan.chain, scan.tile) if on_tokens else Slot(scan.chain, scan.tile)
    rest = tuple(a for a in axes if not (on_tokens and a == scan.tile))
    return (Tensor(name, ("T" if on_tokens else "X", "HV", *rest), dtype, temp),
            (first, At("HV"), *(Tile(a) for a in rest)))


def scan_of(name: str, program: Program, value: Node) -> ScanView:
    """The scan over chunks whose body holds a value."""
    for root in program.roots:
        if root.op is Op.SCAN:
            view = ScanView.of(root)
            if value in set(toposort(view.nexts + view.effects)):
                if len(view.chain) != 1:
                    raise refuse(name, program, value, "scans must not be nested")
                return view
    raise refuse(name, program, value, "no scan over chunks computes it")


def chunks_at_once(view: ScanView, effects: tuple[Node, ...]) -> Node:
    """A scan that carries nothing: its chunks run in parallel."""
    return view.with_parts(carries=(), inits=(), nexts=(), effects=effects, reverse=False)


def _join(name: str, pipeline: Pipeline, i: int, kernel: str, effects: tuple[Node, ...]) -> tuple[int, Program] | None:
    """The earlier kernel of that name with effects of the i-th added, and its place; None if there is none. What the kernel
    itself stores is not read back. Refuses effects that read what is written later."""
    for j, earlier in enumerate(pipeline[:i]):
        if earlier.name == kernel:
            if not parallel(earlier):
                raise IllegalStep(f"{name}: {kernel} is a scan, not a kernel that runs all chunks at once")
            view = ScanView.of(earlier.roots[0])
            if view.where:
                raise IllegalStep(f"{name}: {kernel} leaves chunks out, so that what it stores is not there for all")
            own = {make(Op.LOAD, (), tensor=e["tensor"], index=e["index"]): e.args[0] for e in view.effects}
            memo = substitute(effects, own)
            late = {t for p in pipeline[j:] for t in p.written()}
            for n in toposort(memo[e] for e in effects):
                if n.op is Op.LOAD and n["tensor"].name in late:
                    raise refuse(name, pipeline[i], n, f"{kernel} runs before {n['tensor'].name} is written")
            notes = {memo[n]: note for n, note in pipeline[i].notes.items() if n in memo and memo[n].op is not Op.LOAD}
            root = view.with_parts(effects=(*view.effects, *(memo[e] for e in effects)))
            return j, replace(earlier, roots=(root,), notes={**pipeline[i].notes, **notes, **earlier.notes})
    return None


def parallel(p: Program) -> bool:
    """Whether a program is one scan that carries nothing."""
    return len(p.roots) == 1 and p.roots[0].op is Op.SCAN and not p.roots[0]["carries"]


@step
def hoist(pipeline: Pipeline, name: str, dtype: str = "io", kernel: str = "") -> Pipeline:
    """Compute a value of the scan in a kernel of its own, all chunks at once, and store it. Legal iff it needs no carry.

    Values hoisted into the same `kernel` share it; every kernel after it that computes the value reads it instead. Out of a
    kernel that runs all chunks at once, a value goes into another named kernel, which halves what one block must hold.
    """
    last, value = find(pipeline, name, "hoist")
    serial = [i for i, q in enumerate(pipeline) if value in set(q.nodes()) and not parallel(q)] or [last]
    p = pipeline[serial[-1]]
    scan = scan_of("hoist", p, value)
    if not scan.carries and kernel in ("", p.name):
        raise refuse("hoist", p, value, f"{name} is in a kernel that runs all chunks at once already")
    kernel, needed = kernel or name, needs(p)[value]
    if needed:
        raise refuse("hoist", p, value, f"{name} needs {', '.join(sorted(needed))}, which the scan carries")
    tensor, where = place_of(scan, f"{name}_kept" if name in p.tensors() else name, value.axes, dtype)
    store = make(Op.STORE, (value,), tensor=tensor, index=where, sum=())
    load = make(Op.LOAD, (), tensor=tensor, index=where)
    first = serial[0]
    joined = _join("hoist", pipeline, first, kernel, (store,))
    body = chunks_at_once(scan, (store,))
    at, before = joined or (first, Program(kernel, p.grid, (body,), only(p.notes, (body,))))
    rest = pipeline[at + 1 if joined else first:]
    return (*pipeline[:at], verify(before),
            *(verify(replace_node(q, value, load) if value in set(q.nodes()) else q) for q in rest))


@step
def lift(pipeline: Pipeline, output: str, kernel: str) -> Pipeline:
    """Store an output from a kernel before this one, all chunks at once. Legal iff it needs no carry."""
    i, value = find(pipeline, output, "lift")
    p = pipeline[i]
    scan = scan_of("lift", p, value)
    needed = needs(p)[value]
    if needed:
        raise refuse("lift", p, value, f"{output} needs {', '.join(sorted(needed))}, which the scan carries")
    stores = tuple(e for e in scan.effects if e.op is Op.STORE and e.args[0] is value)
    if not stores:
        raise refuse("lift", p, value, f"{output} is not stored, so there is nothing to lift")
    left = scan.with_parts(effects=tuple(e for e in scan.effects if e not in stores))
    rest = p.rebuild(lambda n, args: left if n is scan.node else None)
    joined = _join("lift", pipeline, i, kernel, stores)
    if joined:
        return put(put(pipeline, i, rest), *joined)
    body = chunks_at_once(scan, stores)
    return put(pipeline, i, Program(kernel, p.grid, (body,), only(p.notes, (body,))), rest)


@step
def sink(pipeline: Pipeline, output: str, keep: str = "", kernel: str = "", dtype: str = "io") -> Pipeline:
    """Store outputs (names, comma-separated) from a later kernel, all chunks at once, from states saved by the scan (and the
    values named in `keep`; what is not kept is computed again). Legal iff they feed no carry, or need none once the values in
    `keep` are kept."""
    names = output.split(",")
    i, first = find(pipeline, names[0], "sink")
    p = pipeline[i]
    values = [first, *(p.named(n) for n in names[1:])]
    scan = scan_of("sink", p, first)
    kept = [p.named(k) for k in keep.split(",") if k]
    fed = set(toposort(scan.nexts))
    for name, value in zip(names, values, strict=True):
        if value in fed and _carries_below(value, set(kept)):
            raise refuse("sink", p, value, f"{name} feeds {', '.join(scan.carries)}")
        if not any(e.op is Op.STORE and e.args[0] is value for e in scan.effects):
            raise refuse("sink", p, value, f"{name} is not stored, so there is nothing to sink")
    stores = tuple(e for e in scan.effects if e.op is Op.STORE and e.args[0] in values)
    table: dict[Node, Node] = {}
    saves: list[Node] = []
    for node in (*kept, *(c for c in scan.carry_nodes())):
        name = node["name"] if node.op is Op.CARRY else p.name_of(node) or ""
        tensor, where = place_of(scan, f"{name}_kept" if name in p.tensors() else name, node.axes, dtype)
        saves.append(make(Op.STORE, (node,), tensor=tensor, index=where, sum=()))
        table[node] = make(Op.LOAD, (), tensor=tensor, index=where)
    memo = substitute(stores, table)
    used = set(toposort(memo[s] for s in stores))
    saves = [s for s, node in zip(saves, table, strict=True) if table[node] in used]
    out = chunks_at_once(scan, tuple(memo[s] for s in stores))
    notes = {memo[n]: note for n, note in p.notes.items() if n in memo}
    after = Program(kernel or output, p.grid, (out,), only(notes, (out,)))
    body = scan.with_parts(effects=(*(e for e in scan.effects if e not in stores), *saves))
    origins = {s: Note(None, p.lines_of(s.args[0])) for s in saves}
    rest = replace(p, notes={**p.notes, **origins}).rebuild(lambda n, args: body if n is scan.node else None)
    return (*pipeline[:i], verify(rest), verify(after), *pipeline[i + 1:])


def _carries_below(value: Node, kept: set[Node]) -> bool:
    """Whether a value needs a carry, apart from what is kept."""
    if value in kept:
        return False
    return value.op is Op.CARRY or any(_carries_below(a, kept) for a in value.args if value.op is not Op.SCAN)


@step
def name_kernel(pipeline: Pipeline, value: str, kernel: str) -> Pipeline:
    """Call the kernel that computes a value by another name."""
    i, _ = find(pipeline, value, "name_kernel")
    return put(pipeline, i, replace(pipeline[i], name=kernel))


@step
def move(pipeline: Pipeline, kernel: str, before: str) -> Pipeline:
    """Run a kernel just before an earlier one. Legal iff neither that one nor any in between meets it in memory."""
    names = [p.name for p in pipeline]
    if not {kernel, before} <= set(names) or names.index(before) >= names.index(kernel):
        raise IllegalStep(f"move: {before} must come before {kernel}, got {', '.join(names)}")
    i, j = names.index(before), names.index(kernel)
    moved = pipeline[j]
    for p in pipeline[i:j]:
        if not apart(p, moved):
            met = next(n for n in moved.nodes() if n.op in (Op.LOAD, Op.STORE) and
                       n["tensor"].name in (*p.written(), *(p.read() if n.op is Op.STORE else ())))
            raise refuse("move", moved, met, f"{kernel} and {p.name}, which comes before it, meet in {met['tensor'].name}")
    return (*pipeline[:i], moved, *pipeline[i:j], *pipeline[j + 1:])


# ---- several scans ----------------------------------------------------------------------------------------------------------


@step
def separate(pipeline: Pipeline, value: str, *kernels: str) -> Pipeline:
    """The program that computes a value, cut between its scans into kernels of these names, in order. Legal iff scans hand
    on to later ones through memory alone, whole sequences of it: kernels run one after another, so nothing else is ordered."""
    i, node = find(pipeline, value, "separate")
    p = pipeline[i]
    scans = [r for r in p.roots if r.op is Op.SCAN]
    if len(scans) != len(kernels):
        raise refuse("separate", p, node, f"{p.name} has {len(scans)} scans for {len(kernels)} names of kernels")
    alone = p.rebuild(lambda n, args: n.but(()) if n.op is Op.LOAD and args else None)       # kernels run in order
    parts = []
    for name, scan in zip(kernels, [r for r in alone.roots if r.op is Op.SCAN], strict=True):
        roots = tuple(r for r in alone.roots if r is scan or (r.op is Op.STORE and scan in set(toposort([r]))))
        others = [n for n in toposort(roots) if n.op is Op.SCAN and n is not scan]
        if others:
            raise refuse("separate", p, others[0], f"{name} starts from what another scan ends with")
        parts.append(Program(name, p.grid, roots, only(alone.notes, roots), p.forward))
    if sum(len(q.roots) for q in parts) != len(p.roots):
        raise refuse("separate", p, p.roots[-1], "an effect belongs to no scan")
    return put(pipeline, i, *parts)


@step
def keep(pipeline: Pipeline, name: str, copy: str, dtype: str = "io") -> Pipeline:
    """Read a value instead of computing it again: an earlier kernel has it, called `copy`, and stores it. Legal iff the two
    are the same once what the earlier kernel stores is read back."""
    i, value = find(pipeline, name, "keep")
    j, same = find(pipeline[:i], copy, "keep")
    p, earlier = pipeline[i], pipeline[j]
    scan = scan_of("keep", earlier, same)
    stored = {e.args[0]: e.args[0].op is not Op.LOAD and make(Op.LOAD, (), tensor=e["tensor"], index=e["index"])
              for e in scan.effects if e.op is Op.STORE}
    back = substitute([same], {n: load for n, load in stored.items() if load and n is not same})
    if back[same] is not value:
        raise refuse("keep", p, value, f"it is not what {earlier.name} computes as {copy}")
    tensor, where = place_of(scan, f"{name}_kept" if name in p.tensors() else name, value.axes, dtype)
    store = make(Op.STORE, (same,), tensor=tensor, index=where, sum=())
    body = scan.with_parts(effects=(*scan.effects, store))
    noted = earlier.rebuild(lambda n, args: body if n is scan.node else None)
    load = make(Op.LOAD, (), tensor=tensor, index=where)
    return put(put(pipeline, j, noted), i, replace_node(p, value, load))


@step
def members_apart(pipeline: Pipeline, tensor: str, group: str) -> Pipeline:
    """Lay a temporary's rows of value heads out by their place in a key head's group (`Tensor.layout`): who has read a group's
    of a chunk can store rows of key heads over them. Legal iff it has rows of grid points that share this group's elsewhere."""
    found = [n for p in pipeline for n in p.nodes() if n.op in (Op.LOAD, Op.STORE) and n["tensor"].name == tensor]
    grids = {t.grid for n in found for t in n["index"] if isinstance(t, At) and not t.share}
    shared = {t.grid for p in pipeline for n in p.nodes() if n.op in (Op.LOAD, Op.STORE) for t in n["index"]
              if isinstance(t, At) and t.share == group}
    if not found or not all(n["tensor"].temp is True and isinstance(n["index"][0], Rows) for n in found) or \
            len(grids) != 1 or not grids <= shared:
        raise IllegalStep(f"members_apart: got {tensor!r}, {group!r}; accepts a temporary with rows of points that share "
                          f"{group}")

    def change(old: Node, args: tuple[Node, ...]) -> Node | None:
        if old.op in (Op.LOAD, Op.STORE) and old["tensor"].name == tensor:
            return old.but(args, tensor=replace(old["tensor"], members=(*grids, group)))
        return None
    return tuple(verify(p.rebuild(change)) for p in pipeline)


@step
def heads_first(pipeline: Pipeline) -> Pipeline:
    """Lay out all temporaries that have one number for each token and head with the tokens of a head together: a chunk's are
    then in one place, where they were as many heads apart. (Tokens times heads fit 32 bits: of more the inverses alone would
    take 256 GiB.)"""
    def change(old: Node, args: tuple[Node, ...]) -> Node | None:
        if old.op in (Op.LOAD, Op.STORE) and old["tensor"].temp is True and len(old["index"]) == 2:
            rows, at = old["index"]
            if isinstance(rows, Rows) and isinstance(at, At):
                tensor = replace(old["tensor"], dims=old["tensor"].dims[::-1])
                return old.but(args, tensor=tensor, index=(at, rows))
        return None
    return tuple(verify(p.rebuild(change)) for p in pipeline)


@step
def store_as(pipeline: Pipeline, tensor: str, dtype: str) -> Pipeline:
    """Keep a temporary in another dtype."""
    def change(old: Node, args: tuple[Node, ...]) -> Node | None:
        if old.op in (Op.LOAD, Op.STORE) and old["tensor"].name == tensor:
            return old.but(args, tensor=replace(old["tensor"], dtype=dtype))
        return None
    if not any(tensor in p.tensors() and p.tensors()[tensor].temp for p in pipeline):
        raise IllegalStep(f"store_as: no kernel has a temporary named {tensor!r}")
    return tuple(verify(p.rebuild(change)) for p in pipeline)
