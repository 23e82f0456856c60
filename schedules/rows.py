"""What a program makes of rows alone (a normalised q or k), taken out of it, with the gradients of the rows: kernels before and
after all others, and none of these knows that there was such a thing.
"""
from __future__ import annotations

from gdn_ir.nodes import Node, Op, Rows, Tensor, make
from gdn_ir.program import Note, Program, substitute, toposort
from gdn_ir.schedules.groups import made_of, of_shared
from gdn_ir.schedules.partition import scan_of
from gdn_ir.schedules.pipeline import IllegalStep, Pipeline, refuse, step
from gdn_ir.split import linear
from gdn_ir.verify import verify


@step
def wrap(pipeline: Pipeline, tensors: str, dtype: str, before: str, after: str) -> Pipeline:
    """Of tensors (comma-separated) make what is made of each row alone in a kernel `before` all others, and the gradient of the
    row from that of what is made in a kernel `after` them, both stored in `dtype` in between; once for each key head, where
    value heads share it. Legal iff nothing else reads the row, and its gradient is linear in that of what is made (so that it
    can be made of the sum over value heads)."""
    names = tensors.split(",")
    if twice := {p.name for p in pipeline} & {before, after}:
        raise IllegalStep(f"wrap: there is a kernel {', '.join(sorted(twice))} already")
    first: list[tuple[Program, Node]] = []                 # effects of the two kernels, each with the program that it is from
    last: list[tuple[Program, Node]] = []
    for name in names:
        p = next((q for q in pipeline if name in q.read()), None)
        if p is None:
            read = sorted({t for q in pipeline for t in q.read()})
            raise IllegalStep(f"wrap: no kernel reads {name}; they read {', '.join(read)}")
        row = next(n for n in p.nodes() if n.op is Op.LOAD and n["tensor"].name == name)
        value = made_of(p, row, {t.tile for t in row["index"] if isinstance(t, Rows)})
        if value is row:
            raise refuse("wrap", p, row, f"nothing is made of a row of {name} alone")
        kept = Tensor(f"{name}_kept", row["tensor"].dims, dtype, temp=True)
        load = make(Op.LOAD, (), tensor=kept, index=row["index"])
        first.append((p, make(Op.STORE, (value,), tensor=kept, index=row["index"], sum=())))
        for i, q in enumerate(pipeline):
            q, stores = _differentiated(q, f"d_{name}", row, value, dtype)
            last += [(pipeline[i], s) for s in stores]
            q = q.rebuild(lambda n, args, value=value, load=load: load if n is value else None)      # type: ignore[misc]
            if row in set(q.nodes()):
                raise refuse("wrap", q, row, f"{q.name} reads {name} in another way too")
            q = q.with_note(load, name, like=value) if load in set(q.nodes()) else q
            pipeline = (*pipeline[:i], verify(q), *pipeline[i + 1:])
    return (_of_rows(before, first), *pipeline, *([_of_rows(after, last)] if last else []))


def _differentiated(p: Program, name: str, row: Node, value: Node, dtype: str) -> tuple[Program, list[Node]]:
    """A program that stores the gradient of what is made of a row instead of the row's, where it stores that; and the store of
    the row's, made of it."""
    store = next((n for n in p.nodes() if n.op is Op.STORE and n["tensor"].name == name), None)
    if store is None:
        return p, []
    grad = store.args[0]
    for inner in toposort([grad]):                         # the first of which, and of the row, all is made
        if inner.axes == row.axes and inner is not row and inner is not value:
            leaf = make(Op.CARRY, name="", scan="", axes=row.axes)
            whole = substitute([grad], {inner: leaf})[grad]
            if leaf in set(toposort([whole])) and all(n.op is not Op.LOAD or n is row for n in toposort([whole])):
                break
    else:
        raise refuse("wrap", p, grad, f"{name} is not made of one value and the row")
    depends = {leaf}
    for n in toposort([whole]):
        at = [i for i, a in enumerate(n.args) if a in depends]
        if at and not linear(n, at):
            raise refuse("wrap", p, inner, f"{name} is not linear in it")
        depends |= {n} if at else set()
    made = Tensor(f"{name}_made", store["tensor"].dims, dtype, temp=True)
    given = make(Op.LOAD, (), tensor=made, index=store["index"])
    stored = store.but((inner, *store.args[1:]), tensor=made)
    q = p.rebuild(lambda n, args: stored if n is store else None).with_note(inner, name, like=grad)
    last = substitute([grad], {inner: given})[grad]
    return q, [make(Op.STORE, (last,), tensor=store["tensor"], index=store["index"], sum=())]


def _of_rows(kernel: str, effects: list[tuple[Program, Node]]) -> Program:
    """A kernel over key heads, all chunks at once, with effects that knew rows alone; their lines without their names."""
    p, stores = effects[0][0], tuple(e for _, e in effects)
    notes = {n: Note(None, note.lines) for q, _ in effects for n, note in q.notes.items()}
    row = next(n for n in toposort(stores) if n.op is Op.LOAD)
    scan = scan_of("wrap", p, next(n for n in p.nodes() if n.op is Op.LOAD and n["index"] == row["index"]))
    return of_shared(kernel, p, scan, stores, notes)
