"""Reverse mode over the language: the backward program is derived from the forward one, never written.

One rule for each operation (`VJP`). A scan becomes two: it runs once more, keeping the carries that enter each iteration,
and then a scan in the opposite direction carries their adjoints, computes the body's values again from what was kept, and
writes the gradients of what the body loads. Inside an outer scan both run within its reverse iteration, so that only the
outer carries are kept for a whole sequence. The adjoint of a triangular solve is a transposed solve
(math: (I + M) u = r gives r' = (I + M)^-T u', M' = -strict_lower(r' u^T)); its inner loop is never differentiated.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from gdn_ir.build import broadcast, cumsum, dot, elem, reduce_sum, select, sigmoid, strict_lower, tri_solve, zeros
from gdn_ir.nodes import At, IRError, Node, Op, Rows, Slot, Tensor, Term, Tile, Turn, make, term_scans
from gdn_ir.program import Program, ScanView, only, substitute
from gdn_ir.rewrite import simplify
from gdn_ir.verify import verify

Adjoints = dict[Node, Node]
Rule = Callable[[Node, Node], "tuple[Node | None, ...]"]
VJP: dict[Op, Rule] = {}


def backward(program: Program, wrt: Iterable[str] | None = None) -> Program:
    """The program of the gradients. It reads what `program` reads and `d_<name>` for each tensor that writes, and writes
    `d_<name>` for each tensor in `wrt` (all that are read, by default). Raises IRError naming a node without a derivative."""
    wrt = tuple(program.read() if wrt is None else wrt)
    for name in wrt:
        if name not in program.read():
            raise IRError(f"wrt: got {name!r}; {program.name} reads {', '.join(program.read())}")
    d = _Backward(program, frozenset(wrt))
    stores = [r for r in program.roots if r.op is Op.STORE]
    seeds: dict[Node, Node] = {}
    for s in stores:
        _add(seeds, s.args[0], _load_gradient(s))
    effects: list[Node] = []
    leaves = d.pull(seeds, [r for r in program.roots if r.op is Op.SCAN], effects)
    effects += d.stores(leaves, None)
    missing = [n for n in wrt if n not in d.written]
    if missing:
        raise IRError(f"wrt: the loads of {', '.join(missing)} in {program.name} reach no output")
    roots = tuple(effects)
    return simplify(verify(Program(f"{program.name}_backward", program.grid, roots, only(program.notes, roots))))


class _Backward:
    def __init__(self, program: Program, wrt: frozenset[str]) -> None:
        self.program, self.wrt = program, wrt
        self.written: set[str] = set()

    # -- one level: values outside of the scans below it

    def pull(self, seeds: Adjoints, scans: Iterable[Node], effects: list[Node]) -> Adjoints:
        """Adjoints of the leaves (loads and carries) of a level, from those of its outputs; scans on the way are reversed,
        and what they do is appended to `effects`."""
        adjoint = dict(seeds)
        order = _level([*seeds, *scans])
        varies = _differentiable(order)
        for n in reversed(order):
            if n.op is Op.SCAN:
                finals = [adjoint.get(make(Op.FINAL, (n,), i=i)) for i in range(len(n["carries"]))]
                for init, a in zip(ScanView.of(n).inits, self.reverse(n, finals, effects), strict=True):
                    _add(adjoint, init, a)
            elif n in adjoint and n.op not in (Op.LOAD, Op.CARRY, Op.FINAL) and n in varies:
                if n.op not in VJP:
                    raise IRError(f"autodiff: no derivative of {self.program.describe(n)}")
                try:
                    pulled = VJP[n.op](n, adjoint[n])
                except IRError as e:
                    raise IRError(f"autodiff: {e}\n  in {self.program.describe(n)}") from e
                for x, part in zip(n.args, pulled, strict=True):
                    if part is not None and x in varies:
                        _add(adjoint, x, _fit(part, x.axes))
        return {n: adjoint.get(n, zeros(*n.axes)) for n in order if n.op in (Op.LOAD, Op.CARRY)}

    # -- a scan: run it again keeping its carries, then run it backwards

    def reverse(self, node: Node, finals: list[Node | None], effects: list[Node]) -> list[Node]:
        """Adjoints of a scan's inits, from those of its final carries."""
        view = ScanView.of(node)
        carries = {c["name"]: c for c in view.carry_nodes()}
        again, saved = self.keep(view, carries)
        if again is not None:
            effects.append(again)
        body = substitute(view.nexts + view.effects, saved)
        entering = [make(Op.CARRY, name=f"d_{name}", scan=view.axis, axes=x.axes)
                    for name, x in zip(view.carries, view.inits, strict=True)]
        seeds: Adjoints = {}
        for x, a in zip(view.nexts, entering, strict=True):
            _add(seeds, body[x], a)
        inner = []
        for e in view.effects:
            if e.op is Op.STORE:
                _add(seeds, body[e].args[0], _load_gradient(e))
            else:
                inner.append(body[e])
        inside: list[Node] = []
        leaves = self.pull(seeds, inner, inside)
        kept = set(saved.values())
        inside += self.stores({n: a for n, a in leaves.items() if n not in kept}, view)
        nexts = [leaves.get(saved[carries[name]], zeros(*x.axes)) if name in carries else zeros(*x.axes)
                 for name, x in zip(view.carries, view.inits, strict=True)]
        inits = [zeros(*x.axes) if a is None else a for x, a in zip(view.inits, finals, strict=True)]
        back = make(Op.SCAN, (*inits, *nexts, *inside), axis=view.axis, chain=view.chain, tile=view.tile,
                    carries=tuple(f"d_{name}" for name in view.carries), reverse=not view.reverse)
        effects.append(back)
        return [make(Op.FINAL, (back,), i=i) for i in range(len(inits))]

    def keep(self, view: ScanView, carries: dict[str, Node]) -> tuple[Node | None, dict[Node, Node]]:
        """The scan once more, storing each carry as it enters; and the loads that stand for the carries afterwards."""
        if not carries:
            return None, {}
        fresh = {c: c.but(name=f"{name}_again") for name, c in carries.items()}
        outer = view.axis == view.chain[0]
        # a whole sequence of them for the outermost scan, one scan's worth inside another's iteration
        where: Term = Slot((view.axis,) if len(view.chain) > 1 else view.chain, view.tile) if outer else Turn(view.axis)
        grid = tuple(g for g in self.program.grid if not (outer and g == "N"))
        places, saves = {}, []
        for name, c in carries.items():
            # X': as many as an inner scan over X has iterations, where X is one place for every chunk there is
            tensor = Tensor(f"{name}_kept", ("X" if outer else f"{view.axis}'", *grid, *c.axes), "f32", temp=True)
            index = (where, *(At(g) for g in grid), *(Tile(a) for a in c.axes))
            saves.append(make(Op.STORE, (fresh[c],), tensor=tensor, index=index, sum=()))
            places[c] = (tensor, index)
        nexts = substitute(view.nexts, fresh)
        again = view.with_parts(carries=tuple(f"{name}_again" for name in view.carries),
                                nexts=tuple(_without_stores(nexts[x]) for x in view.nexts), effects=tuple(saves))
        return again, {c: make(Op.LOAD, (again,), tensor=t, index=index) for c, (t, index) in places.items()}

    def stores(self, leaves: Adjoints, view: ScanView | None) -> list[Node]:
        """Stores of the gradients of the loads of one level, summed over the grid points that share a load."""
        found = []
        for n, a in leaves.items():
            if n.op is not Op.LOAD or n["tensor"].name not in self.wrt or n["tensor"].temp:
                continue
            t, index = n["tensor"], n["index"]
            if view is not None and view.axis not in term_scans(index):
                raise IRError(f"autodiff: a load that every iteration of scan {view.axis} shares needs a carried gradient, "
                              f"which is not derived\n  in {self.program.describe(n)}")
            if t.name in self.written:
                raise IRError(f"autodiff: {t.name} is loaded in two ways; only one gradient can be written\n"
                              f"  in {self.program.describe(n)}")
            self.written.add(t.name)
            own = {x.grid for x in index if isinstance(x, At) and x.share is None}
            own |= {"N"} if any(isinstance(x, Rows | Slot) for x in index) else set()
            found.append(make(Op.STORE, (_fit(a, n.axes),), tensor=replace(t, name=f"d_{t.name}"), index=index,
                              sum=tuple(g for g in self.program.grid if g not in own)))
        return found


def _level(roots: Iterable[Node]) -> list[Node]:
    """The nodes of one level, arguments first; of a scan only what starts it belongs to the level."""
    order: dict[Node, None] = {}

    def visit(n: Node) -> None:
        if n in order:
            return
        for a in (ScanView.of(n).inits if n.op is Op.SCAN else () if n.op is Op.LOAD else n.args):
            visit(a)
        order[n] = None
    for r in roots:
        visit(r)
    return list(order)


def _differentiable(order: list[Node]) -> set[Node]:
    """Nodes that depend on a load, a carry or a scan."""
    found: set[Node] = set()
    for n in order:
        if n.op in (Op.LOAD, Op.CARRY, Op.SCAN, Op.FINAL) or any(a in found for a in n.args):
            found.add(n)
    return found


def _without_stores(node: Node) -> Node:
    """A value, with the scans beneath it rid of what they store."""
    memo: dict[Node, Node] = {}

    def visit(n: Node) -> Node:
        if n not in memo:
            args = tuple(visit(a) for a in n.args)
            new = n if args == n.args else n.but(args)
            memo[n] = ScanView.of(new).with_parts(effects=()) if n.op is Op.SCAN else new
        return memo[n]
    return visit(node)


def _load_gradient(store: Node) -> Node:
    t: Tensor = store["tensor"]
    return make(Op.LOAD, (), tensor=replace(t, name=f"d_{t.name}"), index=store["index"])


def _add(table: Adjoints, node: Node, value: Node) -> None:
    table[node] = table[node] + value if node in table else value


def _fit(a: Node, axes: tuple[str, ...]) -> Node:
    """An adjoint over exactly `axes`: summed over what was repeated, repeated where it is the same."""
    for axis in a.axes:
        if axis not in axes:
            a = reduce_sum(a, axis)
    return broadcast(a, axes)


# ---- the rules -------------------------------------------------------------------------------------------------------------


def rule(op: Op) -> Callable[[Rule], Rule]:
    def register(fn: Rule) -> Rule:
        VJP[op] = fn
        return fn
    return register


ELEMENTWISE: dict[str, Callable[..., tuple[Node | None, ...]]] = {
    "add": lambda n, a, x, y: (a, a),
    "sub": lambda n, a, x, y: (a, -a),
    "mul": lambda n, a, x, y: (a * y, a * x),
    "div": lambda n, a, x, y: (a / y, -(a * n / y)),
    "neg": lambda n, a, x: (-a,),
    "min": lambda n, a, x, y: (select(elem("le", x, y), a, 0.0), select(elem("le", x, y), 0.0, a)),
    "max": lambda n, a, x, y: (select(elem("ge", x, y), a, 0.0), select(elem("ge", x, y), 0.0, a)),
    "exp": lambda n, a, x: (a * n,),
    "log": lambda n, a, x: (a / x,),
    "rsqrt": lambda n, a, x: (-0.5 * a * n * n * n,),
    "sigmoid": lambda n, a, x: (a * n * (1.0 - n),),
    "softplus": lambda n, a, x: (a * sigmoid(x),),
}


@rule(Op.ELEM)
def _elem(n: Node, a: Node) -> tuple[Node | None, ...]:
    if n["fn"] not in ELEMENTWISE:
        return (None,) * len(n.args)                       # comparisons and whole numbers: flat almost everywhere
    return ELEMENTWISE[n["fn"]](n, a, *n.args)


@rule(Op.CAST)
def _cast(n: Node, a: Node) -> tuple[Node | None, ...]:
    return (a,)


@rule(Op.BROADCAST)
def _broadcast(n: Node, a: Node) -> tuple[Node | None, ...]:
    return (a,)


@rule(Op.SELECT)
def _select(n: Node, a: Node) -> tuple[Node | None, ...]:
    return None, select(n.args[0], a, 0.0), select(n.args[0], 0.0, a)


@rule(Op.REDUCE)
def _reduce(n: Node, a: Node) -> tuple[Node | None, ...]:
    if n["fn"] != "sum":
        raise IRError(f"no derivative of a {n['fn']} along an axis")
    return (a,)


@rule(Op.CUMSUM)
def _cumsum(n: Node, a: Node) -> tuple[Node | None, ...]:
    return (cumsum(broadcast(a, n.axes), n["axis"], reverse=not n["reverse"]),)


@rule(Op.TWIN)
def _twin(n: Node, a: Node) -> tuple[Node | None, ...]:
    return (make(Op.TWIN, (a,), axis=n["axis"]),)


@rule(Op.DOT)
def _dot(n: Node, a: Node) -> tuple[Node | None, ...]:
    a = broadcast(a, n.axes)

    def against(x: Node, y: Node) -> Node:
        free = [axis for axis in y.axes if axis not in x.axes]
        return dot(a, y, over=free[0]) if free else a * y
    x, y = n.args
    return against(x, y), against(y, x)


@rule(Op.TRI_SOLVE)
def _tri_solve(n: Node, a: Node) -> tuple[Node | None, ...]:
    (m, r), axis = n.args, n["axis"]
    if n["block"] or dict(n.attr).get("transpose") or axis + "'" in r.axes:
        raise IRError("only a whole solve has a derivative here; differentiate before the schedule rewrites it")
    back = tri_solve(m, broadcast(a, n.axes), axis, transpose=True)
    rest = [x for x in r.axes if x != axis]
    u = n.twin(axis)
    outer = dot(back, u, over=rest[0]) if rest else back * u
    return -strict_lower(_fit(outer, m.axes), axis), back

