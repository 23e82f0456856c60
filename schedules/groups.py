"""Steps for what grid points share: what value heads read of their key head, and gradients of that, sums over them.

    hoist_shared  what is made of a key head's rows alone, once for each, in an earlier kernel
    sum_after     each grid point stores its part, and a last kernel sums the parts
    sum_inside    a block owns a whole group, steps through its members, and stores their sum
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gdn_ir.build import zeros
from gdn_ir.nodes import At, Member, Members, Node, Op, Rows, Tensor, Term, make
from gdn_ir.program import Note, Program, ScanView, only
from gdn_ir.schedules.partition import chunks_at_once, parallel, scan_of
from gdn_ir.schedules.pipeline import IllegalStep, Pipeline, put, refuse, replace_node, step
from gdn_ir.verify import verify


@step
def hoist_shared(pipeline: Pipeline, tensors: str, dtype: str, kernel: str) -> Pipeline:
    """Of tensors (comma-separated) that grid points share (q and k of a key head) compute what is made of each row alone,
    before any product, in a kernel over these, all chunks at once, and store it. Legal iff there is such a thing."""
    names = tensors.split(",")
    if any(q.name == kernel for q in pipeline):
        raise IllegalStep(f"hoist_shared: there is a kernel {kernel} already")
    i = next((i for i, q in enumerate(pipeline) if not parallel(q) and set(names) <= set(q.read())), None)
    if i is None or len(set(names)) < len(names):
        serial = "; ".join(f"{q.name} reads {', '.join(sorted(q.read()))}" for q in pipeline if not parallel(q))
        raise IllegalStep(f"hoist_shared: got tensors {tensors}; accepts some that one serial kernel reads, each once: "
                          f"{serial}")
    p, stores, loads = pipeline[i], [], dict[Node, Node]()
    for name in names:
        row = next(n for n in p.nodes() if n.op is Op.LOAD and n["tensor"].name == name)
        scan = scan_of("hoist_shared", p, row)
        tokens = {t.tile for t in row["index"] if isinstance(t, Rows)}
        value = made_of(p, row, tokens)
        at = next((t for t in row["index"] if isinstance(t, At)), None)
        if at is None or at.share is None or value is row:
            raise refuse("hoist_shared", p, row, f"{name} is no row that grid points share, of which something is made")
        t = row["tensor"]
        kept = Tensor(f"{name}_kept", t.dims, dtype, temp=True)              # roles know it by the name without (events.py)
        stores.append(make(Op.STORE, (value,), tensor=kept, index=row["index"], sum=()))
        loads[value] = make(Op.LOAD, (), tensor=kept, index=row["index"])
    before = of_shared(kernel, p, scan, tuple(stores), p.notes)
    for (value, load), name in zip(loads.items(), names, strict=True):
        p = replace_node(p, value, load).with_note(load, name, like=value)
    return (*pipeline[:i], before, verify(p), *pipeline[i + 1:])


def of_shared(kernel: str, p: Program, scan: ScanView, stores: tuple[Node, ...], notes: Mapping[Node, Note]) -> Program:
    """A kernel over what grid points of a program share (key heads; where nothing is, over its grid), all chunks of its scan at
    once, with these stores."""
    groups = {t.grid: t.share for s in stores for t in s["index"] if isinstance(t, At) and t.share}

    def over_groups(old: Node, args: tuple[Node, ...]) -> Node | None:
        if old.op in (Op.LOAD, Op.STORE):
            return old.but(args, index=tuple(At(t.share) if isinstance(t, At) and t.share else t for t in old["index"]))
        return None
    body = chunks_at_once(scan, stores)
    made = Program(kernel, p.grid, (body,), only(notes, (body,))).rebuild(over_groups)
    return verify(replace(made, grid=tuple(groups.get(g, g) for g in p.grid)))


def made_of(p: Program, row: Node, tokens: set[str]) -> Node:
    """The last value with a row's axes that is made of that row alone, element by element and by sums along it."""
    alone, last = {row}, row
    for n in p.nodes():
        along = n.op is Op.REDUCE and n["over"] not in tokens
        if (along or n.op in (Op.ELEM, Op.CAST, Op.BROADCAST, Op.SELECT)) and \
                set(n.args) & alone and all(a in alone or a.op is Op.CONST for a in n.args):
            alone.add(n)
            last = n if n.axes == row.axes else last
    return last


@step
def sum_after(pipeline: Pipeline, kernel: str, dtype: str = "f32") -> Pipeline:
    """Stores that are summed over grid points that share them (the value heads of one key head): each point stores its own
    part, in `dtype`, and a kernel after the last of them sums the parts in order. No two blocks write one place, and results
    repeat."""
    programs: list[Program] = []
    stores: list[Node] = []
    notes: dict[Node, Note] = {}
    grid: tuple[str, ...] = ()
    last = 0                                               # the place after the last kernel that stores parts
    for p in pipeline:
        def change(old: Node, args: tuple[Node, ...], p: Program = p) -> Node | None:
            nonlocal grid
            if old.op is not Op.STORE or not old["sum"]:
                return None
            shared = {t.share: t.grid for t in old["index"] if isinstance(t, At) and t.share}
            if set(old["sum"]) != set(shared.values()) or not any(isinstance(t, Rows) for t in old["index"]):
                raise refuse("sum_after", p, old, f"sums over {', '.join(old['sum'])} are not over points that share a row")
            t = old["tensor"]
            dims = tuple(shared.get(d, d) for d in t.dims)
            parts = Tensor(f"{t.name}_parts", dims, dtype, temp=True)
            own = tuple(replace(x, share=None) if isinstance(x, At) else x for x in old["index"])
            own_grid = {g: share for share, g in shared.items()}
            where = tuple(Members(own_grid[x.grid]) if isinstance(x, At) and x.share else x for x in old["index"])
            at = tuple(At(own_grid[x.grid]) if isinstance(x, At) and x.share else x for x in old["index"])
            grid = tuple(own_grid.get(g, g) for g in p.grid)
            total = make(Op.LOAD, (), tensor=parts, index=where)
            stores.append(make(Op.STORE, (total,), tensor=t, index=at, sum=()))
            notes[total] = Note(t.name, p.lines_of(old.args[0]))
            return old.but(args, tensor=parts, index=own, sum=())
        before = len(stores)
        programs.append(verify(p.rebuild(change)))
        last = len(programs) if len(stores) > before else last
    if not stores:
        raise IllegalStep("sum_after: nothing is stored that is summed over grid points")
    scan = next(ScanView.of(r) for p in pipeline for r in p.roots if r.op is Op.SCAN)
    root = chunks_at_once(scan, tuple(stores))
    return (*programs[:last], verify(Program(kernel, grid, (root,), only(notes, (root,)))), *programs[last:])


@step
def sum_inside(pipeline: Pipeline, kernel: str, again: str = "") -> Pipeline:
    """What a kernel stores summed over grid points that share a place (the value heads of one key head), summed by one block:
    the grid runs over the groups (H), a block steps through its group's members (HV / H of them) in order, adds up [C, K] of
    each in float32 registers, and stores once. What all members read is loaded, and what only depends on it computed, once, but
    for the tensors in `again` (comma-separated): each member reads those again, from the cache, and no register holds them.

    A kernel of these must hold all of V: a sum over members of sums over parts of V is not split yet (`gdn_ir.split`).

    Legal iff the kernel runs all chunks at once (the carries of a serial scan are each member's own; `sum_after` sums those).
    """
    i = next((i for i, q in enumerate(pipeline) if q.name == kernel), None)
    if i is None:
        raise IllegalStep(f"sum_inside: no kernel is called {kernel}; there are {', '.join(q.name for q in pipeline)}")
    p = pipeline[i]
    summed = [n for n in p.nodes() if n.op is Op.STORE and n["sum"]]
    if not summed:
        raise IllegalStep(f"sum_inside: {kernel} stores nothing that is summed over grid points")
    if not parallel(p):
        raise refuse("sum_inside", p, summed[0].args[0], f"{kernel} is a serial scan, whose carries are each grid point's own")
    view = ScanView.of(p.roots[0])
    places = [t for n in p.nodes() if n.op in (Op.LOAD, Op.STORE) for t in n["index"]]
    shared = {t.grid: t.share for t in places if isinstance(t, At) and t.share}
    for s in summed:
        if s not in view.effects or len(shared) != 1 or set(s["sum"]) != set(shared):
            raise refuse("sum_inside", p, s.args[0], f"sums over {', '.join(s['sum'])} are not over one kind of group")
    ((axis, group),) = shared.items()

    anew = set(again.split(",")) - {""}
    unknown = anew - {n["tensor"].name for n in p.nodes() if n.op is Op.LOAD
                      and any(isinstance(t, At) and t.share for t in n["index"])}
    if unknown:
        raise IllegalStep(f"sum_inside: {kernel} reads no {', '.join(sorted(unknown))} that its members share")

    def place(t: Term, tensor: str) -> Term:
        if not isinstance(t, At) or t.grid != axis:
            return t
        return Member(group, axis, own=bool(t.share)) if not t.share or tensor in anew else At(group)

    def change(old: Node, args: tuple[Node, ...]) -> Node | None:
        if old.op in (Op.LOAD, Op.STORE):
            more = {"sum": ()} if old in summed else {}
            return old.but(args, index=tuple(place(t, old["tensor"].name) for t in old["index"]), **more)
        if old is view.node:
            own = [e for e, was in zip(args, view.effects, strict=True) if was not in summed]
            sums = [e for e, was in zip(args, view.effects, strict=True) if was in summed]
            return view.with_parts(effects=_over_members(axis, group, own, sums))
        return None
    return put(pipeline, i, replace(p.rebuild(change), grid=tuple(group if g == axis else g for g in p.grid)))


def _over_members(axis: str, group: str, own: list[Node], sums: list[Node]) -> tuple[Node, ...]:
    """A scan over the members of a group (`axis` those, `group` the grid axis of groups) with the effects `own`, and the stores
    `sums` after it, each of the sum of its value over the members."""
    values = [s.args[0] for s in sums]
    names = tuple(f"{s['tensor'].name}_sum" for s in sums)
    carried = [make(Op.CARRY, name=n, scan=axis, axes=x.axes) for n, x in zip(names, values, strict=True)]
    nexts = [c + x for c, x in zip(carried, values, strict=True)]
    scan = make(Op.SCAN, (*(zeros(*x.axes) for x in values), *nexts, *own), axis=axis, chain=(axis,), tile="", carries=names,
                reverse=False, group=group)
    return scan, *(s.but((make(Op.FINAL, (scan,), i=i), *s.args[1:])) for i, s in enumerate(sums))
