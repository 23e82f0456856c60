"""The surface language: what a program is written with, and the tracer that runs it.

A program is an ordinary Python function over tiles; calling it builds the graph. The tracer records the line behind
every node, and calls a value by the variable it was assigned to.
"""
from __future__ import annotations

import ast
import functools
import linecache
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gdn_ir import nodes as ir
from gdn_ir.nodes import At, IRError, Node, Op, Operand, Rows, Slot, Tensor, Term, Tile, Turn, as_node, base, make, twin
from gdn_ir.program import Line, Note, Program, only

__all__ = ["At", "Node", "Operand", "Rows", "Slot", "Tensor", "Tile", "Tracer", "Turn", "as_node", "base", "broadcast", "cast",
           "cumsum", "decay_mask", "dot", "elem", "exp", "eye", "floordiv", "index", "last", "log", "lower", "maximum",
           "product", "reduce_max", "reduce_sum", "rsqrt", "select", "sigmoid", "softplus", "strict_lower", "tri_solve",
           "zeros"]

_HERE = {__file__, ir.__file__}

# ---- tiles ------------------------------------------------------------------------------------------------------------


def elem(fn: str, *args: Operand) -> Node:
    return make(Op.ELEM, tuple(as_node(a) for a in args), fn=fn)


def exp(x: Operand) -> Node: return elem("exp", x)
def log(x: Operand) -> Node: return elem("log", x)
def rsqrt(x: Operand) -> Node: return elem("rsqrt", x)
def sigmoid(x: Operand) -> Node: return elem("sigmoid", x)
def softplus(x: Operand) -> Node: return elem("softplus", x)
def maximum(x: Operand, y: Operand) -> Node: return elem("max", x, y)
def floordiv(x: Operand, y: Operand) -> Node: return elem("floordiv", x, y)


def index(axis: str) -> Node:
    """The coordinate along a tile axis: position in the chunk for tokens, position in the whole axis otherwise."""
    return make(Op.INDEX, axis=axis)


def cast(x: Node, dtype: str) -> Node:
    return x if x.type.dtype == dtype else make(Op.CAST, (x,), dtype=dtype)


def select(condition: Node, yes: Operand, no: Operand) -> Node:
    """Where the condition holds `yes`, elsewhere `no`; what is not chosen never matters, not even a NaN."""
    return make(Op.SELECT, (condition, as_node(yes), as_node(no)))


def broadcast(x: Operand, axes: Iterable[str]) -> Node:
    x, axes = as_node(x), tuple(sorted(set(axes)))
    return x if x.axes == axes else make(Op.BROADCAST, (x,), axes=axes)


def zeros(*axes: str) -> Node:
    return broadcast(0.0, axes)


def dot(a: Node, b: Node, over: str) -> Node:
    """Contract `over`, which both must have; every other axis stays. An axis both keep is a batch axis and is refused
    by the backends' matrix units, so give one of them its twin."""
    return make(Op.DOT, (a, b), over=over)


def reduce_sum(x: Node, over: str) -> Node: return make(Op.REDUCE, (x,), fn="sum", over=over)
def reduce_max(x: Node, over: str) -> Node: return make(Op.REDUCE, (x,), fn="max", over=over)


def cumsum(x: Operand, axis: str, reverse: bool = False) -> Node:
    """Inclusive running sum along the axis, from its first coordinate (from its last with `reverse`)."""
    x = as_node(x)
    return make(Op.CUMSUM, (x if axis in x.axes else broadcast(x, (*x.axes, axis)),), axis=axis, reverse=reverse)


def last(x: Node, axis: str = "C") -> Node:
    """The value at the last valid coordinate. Of a running sum that is the whole sum, which needs no position."""
    if x.op is Op.CUMSUM and x["axis"] == axis and not x["reverse"]:
        return reduce_sum(x.args[0], axis)
    raise IRError(f"last: only of a running sum along {axis}, got {x!r}")


def lower(x: Operand, axis: str = "C", outside: float = 0.0) -> Node:
    """x[i, j] for i >= j, `outside` above the diagonal; j runs on the twin of the axis."""
    return select(elem("ge", index(axis), index(twin(axis))), x, outside)


def strict_lower(x: Operand, axis: str = "C") -> Node:
    """x[i, j] for i > j, 0 elsewhere."""
    return select(elem("gt", index(axis), index(twin(axis))), x, 0.0)


def decay_mask(G: Node, axis: str = "C") -> Node:
    """exp(G_i - G_j) for i >= j, 0 above. The argument is masked, not the value: above the diagonal exp overflows."""
    return exp(lower(G - G.twin(axis), axis, outside=-math.inf))


def product(x: Node, y: Node, axis: str = "C") -> Node:
    """The matrix product of two tiles on [axis, axis']."""
    t, shifted = twin(axis), make(Op.TWIN, (make(Op.TWIN, (y,), axis=twin(axis)),), axis=axis)    # y on [C', C'']
    return make(Op.TWIN, (dot(x, shifted, over=t),), axis=t)


def eye(axis: str = "C") -> Node:
    return select(elem("eq", index(axis), index(twin(axis))), 1.0, 0.0)


def tri_solve(m: Node, r: Node, axis: str = "C", block: int | None = None, transpose: bool = False,
              merges: tuple[int, int, str] | None = None) -> Node:
    """u with (I + M) u = r along `axis`, M strictly lower on [axis, axis']. With `block`, only the diagonal blocks of
    that size take part; with `transpose`, (I + M)^T u = r. merges, where r is the identity: how the inverse is made, from those
    of blocks of so many rows, up to so many, by products of this dtype (`gdn_ir.inverse.doubled`)."""
    more = {n: x for n, x in (("transpose", transpose), ("merges", merges)) if x}
    return make(Op.TRI_SOLVE, (m, r), axis=axis, block=block, **more)


# ---- the tracer -----------------------------------------------------------------------------------------------------------


class Tracer:
    """Records one program. Declare tensors, scan over chunks, store results, then call `program()`.

    grid: the grid axes; tokens: the tile axis that tokens are cut into and the scan axes that step through them,
    outermost first; shared: {dimension: grid axis} for dimensions that several grid points share (GVA).
    """

    def __init__(self, name: str, grid: Iterable[str] = ("N", "HV"), tile: str = "C", chain: tuple[str, ...] = ("X",),
                 shared: dict[str, str] | None = None) -> None:
        self.name, self.grid, self.tile, self.chain = name, tuple(grid), tile, chain
        self.shared = shared or {}
        self.effects: list[list[Node]] = [[]]
        self.notes: dict[Node, Note] = {}
        self.carries: set[str] = set()
        self._depth = 0

    def address(self, tensor: Tensor) -> tuple[Term, ...]:
        """The index terms that the names of the dimensions imply."""
        def term(dim: str) -> Term:
            if dim == "T":
                return Rows(self.chain, self.tile)
            if dim == "X":
                return Slot(self.chain, self.tile)
            if dim in self.grid:
                return At(dim)
            return At(self.shared[dim], share=dim) if dim in self.shared else Tile(dim)
        return tuple(term(d) for d in tensor.dims)

    def param(self, name: str) -> Node:
        """A runtime scalar."""
        return make(Op.PARAM, name=name)

    def load(self, tensor: Tensor, index: tuple[Term, ...] | None = None, after: Iterable[Node] = ()) -> Node:
        return make(Op.LOAD, tuple(after), tensor=tensor, index=index or self.address(tensor))

    def store(self, tensor: Tensor, value: Node, index: tuple[Term, ...] | None = None, after: Iterable[Node] = ()) -> Node:
        """Write a tile. Grid axes that the tensor lacks are summed over, in a fixed order."""
        index = index or self.address(tensor)
        kept = {t.grid for t in index if isinstance(t, At) and t.share is None} | \
               ({"N"} if any(isinstance(t, Rows | Slot) for t in index) else set())
        node = make(Op.STORE, (value, *after), tensor=tensor, index=index, sum=tuple(g for g in self.grid if g not in kept))
        self.effects[-1].append(node)
        return node

    def scan(self, body: Callable[..., Node | tuple[Node, ...] | None], reverse: bool = False, axis: str | None = None,
             **inits: Node) -> tuple[Node, ...]:
        """Run `body(carry, ...)` once a chunk; it returns the new carries, in order. Returns the final ones."""
        axis = axis or self.chain[len(self.effects) - 1]
        for name in inits:
            if name in self.carries:
                raise IRError(f"scan: a carry named {name!r} exists already; names of carries are unique in a program")
            self.carries.add(name)
        carries = tuple(make(Op.CARRY, name=n, scan=axis, axes=x.axes) for n, x in inits.items())
        self.effects.append([])
        result = body(*carries)
        nexts = () if result is None else result if isinstance(result, tuple) else (result,)
        effects = self.effects.pop()
        if len(nexts) != len(inits):
            raise IRError(f"scan over {axis}: the body returned {len(nexts)} values for carries {', '.join(inits)}")
        nexts = tuple(broadcast(n, c.axes) if set(n.axes) < set(c.axes) else n for n, c in zip(nexts, carries, strict=True))
        node = make(Op.SCAN, (*inits.values(), *nexts, *effects), axis=axis, chain=self.chain, tile=self.tile,
                    carries=tuple(inits), reverse=reverse)
        self.effects[-1].append(node)
        return tuple(make(Op.FINAL, (node,), i=i) for i in range(len(inits)))

    def scan_chunks(self, body: Callable[..., Node | tuple[Node, ...] | None], reverse: bool = False, **inits: Node) \
            -> tuple[Node, ...]:
        """Scan over all chunks of a sequence: one scan for each axis of the chain, nested; outer carries are named
        after their axis."""
        def nest(depth: int, carried: tuple[Node, ...]) -> tuple[Node, ...]:
            axis = self.chain[depth]
            if depth == len(self.chain) - 1:
                return self.scan(body, reverse, axis, **dict(zip(inits, carried, strict=True)))
            names = (f"{name}_{axis}" for name in inits)
            return self.scan(lambda *outer: nest(depth + 1, outer), reverse, axis, **dict(zip(names, carried, strict=True)))
        return nest(0, tuple(inits.values()))

    @contextmanager
    def recording(self) -> Iterator[Tracer]:
        """While open, nodes that are built are noted with the line of the code that built them."""
        ir._LISTENERS.append(self._note)
        try:
            yield self
        finally:
            ir._LISTENERS.remove(self._note)

    def _note(self, node: Node) -> None:
        frame = sys._getframe(2)
        while frame.f_back is not None and (frame.f_code.co_filename in _HERE or "functools" in frame.f_code.co_filename):
            frame = frame.f_back
        file, number = frame.f_code.co_filename, frame.f_lineno
        start, name, text = _statement(file, number)
        line = Line(Path(file).name, start, text)
        old = self.notes.get(node, Note())
        # the last node built by an assignment is the value it names
        if name is not None and node.op is not Op.CONST and (old.name is None or node.op is Op.CARRY):
            for other, note in list(self.notes.items()):
                if note.name == name and line in note.lines:
                    self.notes[other] = Note(None, note.lines)
            self.notes[node] = Note(name, (*old.lines, line) if line not in old.lines else old.lines)
        else:
            self.notes[node] = old.join(Note(None, (line,)))
        if node.op is Op.CARRY:
            self.notes[node] = Note(node["name"], self.notes[node].lines)

    def program(self) -> Program:
        """What was recorded, verified."""
        from gdn_ir.verify import verify
        roots = tuple(self.effects[0])
        # one name, one node: a variable bound twice keeps its name for the last value; carries come first
        taken: dict[str, Node] = {}
        notes = only(self.notes, roots)
        for n, note in notes.items():
            if note.name and (note.name not in taken or taken[note.name].op is not Op.CARRY):
                taken[note.name] = n
        notes = {n: note if note.name is None or taken[note.name] is n else Note(None, note.lines) for n, note in notes.items()}
        return verify(Program(self.name, self.grid, roots, notes))


@functools.lru_cache(maxsize=4096)
def _statement(file: str, number: int) -> tuple[int, str | None, str]:
    """The statement at a line: its first line, the variable it assigns (if one), and its text on one line."""
    best: ast.stmt | None = None
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.Expr | ast.Return | ast.AugAssign) \
                and node.lineno <= number <= (node.end_lineno or node.lineno):
            best = node if best is None or node.lineno >= best.lineno else best
    if best is None:
        return number, None, linecache.getline(file, number).strip()
    target = best.targets[0] if isinstance(best, ast.Assign) else None
    name = target.id if isinstance(target, ast.Name) else None
    lines = [linecache.getline(file, i) for i in range(best.lineno, (best.end_lineno or best.lineno) + 1)]
    text = " ".join(s.split("  #")[0].strip() for s in lines)
    return best.lineno, name, text


@functools.lru_cache(maxsize=64)
def _tree(file: str) -> ast.Module:
    try:
        return ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return ast.Module(body=[], type_ignores=[])

