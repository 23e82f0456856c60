"""The values of the language: typed, frozen, hash-consed nodes over named axes.

A tile has no order of axes that a reader must remember: `Type.axes` is kept sorted by name, so two tiles over the
same axes have the same type. `C` and its twin `C'` index the same tokens. One node class serves every operation;
`infer` is the single table of typing rules, used when a node is built and again by the verifier after each pass.
"""
from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

REAL = "real"                                              # before the precision pass, every number is a real
FLOATS = ("f64", "f32", "tf32x3", "tf32", "bf16", "f16")   # after it: tf32 and tf32x3 are float32 read by matrix units
DTYPES = (REAL, *FLOATS, "int", "bool", "effect")


class IRError(ValueError):
    """A program that breaks a rule of the language; the message names the node and, where known, its line."""


class Op(Enum):
    CONST = auto()      # a number; attr value
    PARAM = auto()      # a runtime scalar; attr name
    INDEX = auto()      # coordinates along a tile axis; attr axis
    VALID = auto()      # how many coordinates of the axis are real in this tile; attr axis
    LOAD = auto()       # attr tensor, index; args are effects it must follow
    STORE = auto()      # attr tensor, index, sum; args value, *effects it must follow
    ELEM = auto()       # attr fn
    CAST = auto()       # attr dtype
    SELECT = auto()     # condition, if true, if false
    BROADCAST = auto()  # attr axes
    DOT = auto()        # attr over
    REDUCE = auto()     # attr fn, over
    CUMSUM = auto()     # attr axis, reverse
    TWIN = auto()       # attr axis: swaps the names axis and axis' (axis may be a twin itself: C' and C'')
    TRI_SOLVE = auto()  # u with (I + M) u = r; attr axis, block, transpose, merges (or absent): build.py says what
    CARRY = auto()      # what a scan carries into an iteration; attr name, scan, axes
    SCAN = auto()       # args inits, nexts, effects; attr axis, chain, tile, carries, reverse, group (absent where it steps
                        # through chunks; else the grid axis whose points' members, along `axis`, it steps through), idle
                        # (absent, or of an inner scan: "first", "last": iterations around it in which it does not run),
                        # recent (absent, or of an inner scan: an argument after these says how many of its last iterations
                        # run), where (absent, or of a scan that carries nothing: the last argument, a number in memory for
                        # each iteration, is 0 for those that do not run)
    FINAL = auto()      # what a scan carries out; attr i


RUNS_ALONG = {Op.DOT: "over", Op.REDUCE: "over", Op.CUMSUM: "axis", Op.TRI_SOLVE: "axis"}      # attributes that name an axis


def twin(axis: str) -> str:
    """The other name of the same tokens: C -> C', C' -> C."""
    return axis[:-1] if axis.endswith("'") else axis + "'"


def base(axis: str) -> str:
    return axis.rstrip("'")


@dataclass(frozen=True)
class Type:
    """Named axes (sorted) and a dtype; `Type(("C", "K"), "real")` prints as real[C, K]."""
    axes: tuple[str, ...]
    dtype: str = REAL

    def __post_init__(self) -> None:
        if tuple(sorted(set(self.axes))) != self.axes:
            raise IRError(f"axes must be sorted and distinct, got {self.axes}")
        if self.dtype not in DTYPES:
            raise IRError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(self.axes)}]"


# ---- where a tile lies in memory: one term for each dimension of the tensor -------------------------------------------

@dataclass(frozen=True)
class Tile:
    """The dimension is this tile axis."""
    axis: str


@dataclass(frozen=True)
class Part(Tile):
    """The dimension is that part of a tile axis which a scan over its parts (called axis + "#") has reached."""
    scan: str = ""


@dataclass(frozen=True)
class At:
    """The dimension is indexed by a grid axis; with `share`, grid axis // (its size / size of the dimension)."""
    grid: str
    share: str | None = None


@dataclass(frozen=True)
class Rows:
    """Tokens of this sequence: rows of the tile axis in the iteration that the scan axes of `chain` have reached.

    single: chunks of one token, so the tile axis is gone and the row is a scalar.
    """
    chain: tuple[str, ...]
    tile: str
    single: bool = False


@dataclass(frozen=True)
class Slot:
    """One place for each chunk of each sequence (packed over sequences). inner: scan axes that step through the chunks of one
    place: then it is one for each segment of chunks."""
    chain: tuple[str, ...]
    tile: str
    inner: tuple[str, ...] = ()

    def __repr__(self) -> str:                             # programs are known by their text
        return f"Slot(chain={self.chain!r}, tile={self.tile!r}{f', inner={self.inner!r}' if self.inner else ''})"


@dataclass(frozen=True)
class Turn:
    """The iteration number of one scan: scratch that lives inside an outer scan's iteration."""
    scan: str


@dataclass(frozen=True)
class Members:
    """Several places for each point of a grid axis: those of the dimension that share it, one after another; without an axis,
    all there are. A load sums them, in order; nothing can be stored there."""
    grid: str | None = None


@dataclass(frozen=True)
class Member:
    """The dimension is indexed by that member of a grid point's group which the scan over them has reached: number
    `grid` * (size of the dimension / size of the grid axis) + the iteration. own: by the point itself instead, as At(grid),
    but in each iteration anew: what all members read is then not held from one to the next."""
    grid: str
    scan: str
    own: bool = False


Term = Tile | At | Rows | Slot | Turn | Members | Member


LEFT = "left"


@dataclass(frozen=True)
class Tensor:
    """A named array in memory. `dims` name its dimensions, `dtype` its storage ("io" follows the caller's inputs). temp:
    whether it is what kernels hand to each other; LEFT: what a forward's hand to those of its backward, in memory that the
    caller gives. members: of a dimension and one whose points each have several of its: in memory the first of each come
    before all second (`layout`), so that a group's lie where rows of as many arrays of groups would."""
    name: str
    dims: tuple[str, ...]
    dtype: str = "io"
    temp: bool | str = False
    members: tuple[str, ...] = ()

    def __repr__(self) -> str:                             # programs are known by their text
        more = f", members={self.members!r}" if self.members else ""
        return f"Tensor(name={self.name!r}, dims={self.dims!r}, dtype={self.dtype!r}, temp={self.temp!r}{more})"

    @property
    def layout(self) -> tuple[str, ...]:
        """Its dimensions as they lie in memory, the last fastest; "HV/H": which member of its group."""
        if not self.members:
            return self.dims
        of, group = self.members
        return (f"{of}/{group}", *(group if d == of else d for d in self.dims))

    @property
    def left(self) -> bool:
        return self.temp == LEFT

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(self.dims)}]"


def term_axes(index: tuple[Term, ...]) -> tuple[str, ...]:
    return tuple(sorted(stored_axes(index)))


def stored_axes(index: tuple[Term, ...]) -> tuple[str, ...]:
    """The tile axes an index covers, in the order of the dimensions."""
    return tuple(t.axis if isinstance(t, Tile) else t.tile for t in index
                 if isinstance(t, Tile) or (isinstance(t, Rows) and not t.single))


def term_scans(index: tuple[Term, ...]) -> frozenset[str]:
    found: set[str] = set()
    for t in index:
        if isinstance(t, Rows | Slot):
            found |= set(t.chain)
        elif isinstance(t, Turn | Member | Part):
            found.add(t.scan)
    return frozenset(found)


# ---- elementwise functions ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Fn:
    """An elementwise function: how many arguments, the infix symbol it prints as, and the kind of its result."""
    arity: int
    symbol: str | None = None
    result: str = "same"       # "same" as the arguments, or "bool"


FUNCTIONS: dict[str, Fn] = {
    "add": Fn(2, "+"), "sub": Fn(2, "-"), "mul": Fn(2, "*"), "div": Fn(2, "/"), "neg": Fn(1, "-"),
    "floordiv": Fn(2, "//"), "min": Fn(2), "max": Fn(2),
    "exp": Fn(1), "exp2": Fn(1), "log": Fn(1), "rsqrt": Fn(1), "sigmoid": Fn(1), "softplus": Fn(1),
    "lt": Fn(2, "<", "bool"), "le": Fn(2, "<=", "bool"), "gt": Fn(2, ">", "bool"), "ge": Fn(2, ">=", "bool"),
    "eq": Fn(2, "==", "bool"), "and": Fn(2, "&", "bool"),
}

# ---- nodes ------------------------------------------------------------------------------------------------------------------


class Node:
    """One operation. Equal nodes are one object, so equality is identity and a program is a graph without copies."""
    __slots__ = ("op", "args", "attr", "type", "__weakref__")
    op: Op
    args: tuple[Node, ...]
    attr: tuple[tuple[str, Hashable], ...]
    type: Type

    def __getitem__(self, name: str) -> Any:
        for key, value in self.attr:
            if key == name:
                return value
        raise KeyError(f"{self.op.name} has no attribute {name!r}")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("nodes are frozen")

    def __reduce__(self) -> tuple[Callable[..., Node], tuple[Any, ...]]:
        return _rebuild, (self.op, self.args, self.attr)

    @property
    def axes(self) -> tuple[str, ...]:
        return self.type.axes

    @property
    def const(self) -> float | None:
        """The number, if this is a constant."""
        return self["value"] if self.op is Op.CONST else None

    def __repr__(self) -> str:
        attr = ", ".join(f"{k}={v}" for k, v in self.attr)
        return f"{self.op.name}({attr}) : {self.type}"

    # Operators read as mathematics; they build nodes through gdn_ir.build, which also records the line.
    def __add__(self, other: Operand) -> Node: return _elem("add", self, other)
    def __radd__(self, other: Operand) -> Node: return _elem("add", other, self)
    def __sub__(self, other: Operand) -> Node: return _elem("sub", self, other)
    def __rsub__(self, other: Operand) -> Node: return _elem("sub", other, self)
    def __mul__(self, other: Operand) -> Node: return _elem("mul", self, other)
    def __rmul__(self, other: Operand) -> Node: return _elem("mul", other, self)
    def __truediv__(self, other: Operand) -> Node: return _elem("div", self, other)
    def __rtruediv__(self, other: Operand) -> Node: return _elem("div", other, self)
    def __neg__(self) -> Node: return _elem("neg", self)

    def but(self, args: tuple[Node, ...] | None = None, **attr: Hashable) -> Node:
        """This operation over other arguments, or with other attributes."""
        return make(self.op, self.args if args is None else args, **{**dict(self.attr), **attr})

    def twin(self, axis: str) -> Node:
        """This value laid on the twin of `axis` (and on `axis`, if it lay on the twin)."""
        return make(Op.TWIN, (self,), axis=base(axis))


Operand = Node | float | int
_INTERNED: weakref.WeakValueDictionary[Any, Node] = weakref.WeakValueDictionary()
_LISTENERS: list[Callable[[Node], None]] = []       # the active tracers: told of each node as it is built


def make(op: Op, args: tuple[Node, ...] = (), **attr: Hashable) -> Node:
    """The node with these parts: the one that exists, or a new one. Raises IRError if the types do not fit."""
    pairs = tuple(sorted(attr.items()))
    key = (op, args, tuple((k, type(v), v) for k, v in pairs))
    node = _INTERNED.get(key)
    if node is None:
        result = infer(op, args, dict(pairs))
        node = object.__new__(Node)
        for name, value in (("op", op), ("args", args), ("attr", pairs), ("type", result)):
            object.__setattr__(node, name, value)
        _INTERNED[key] = node
    for listener in _LISTENERS:
        listener(node)
    return node


def _rebuild(op: Op, args: tuple[Node, ...], attr: tuple[tuple[str, Hashable], ...]) -> Node:
    return make(op, args, **dict(attr))


def as_node(x: Operand) -> Node:
    return x if isinstance(x, Node) else make(Op.CONST, value=float(x))


def _elem(fn: str, *args: Operand) -> Node:
    return make(Op.ELEM, tuple(as_node(a) for a in args), fn=fn)


# ---- typing rules ---------------------------------------------------------------------------------------------------------


def _union(*args: Node) -> tuple[str, ...]:
    return tuple(sorted({a for n in args for a in n.axes}))


def _agree(op: str, args: tuple[Node, ...]) -> str:
    """The dtype of arguments that must agree; constants take the dtype of what they meet."""
    dtypes = {a.type.dtype for a in args if a.op is not Op.CONST} or {REAL}
    if len(dtypes) > 1 or dtypes & {"effect"}:
        raise IRError(f"{op}: arguments must share one dtype, got {', '.join(str(a.type) for a in args)}")
    return dtypes.pop()


def _numeric(op: str, *args: Node) -> None:
    for a in args:
        if a.type.dtype in ("bool", "effect"):
            raise IRError(f"{op}: needs numbers, got {a.type}")


def _has(op: str, node: Node, axis: str) -> None:
    if axis not in node.axes:
        raise IRError(f"{op}: axis {axis} is not among the axes of {node.type}")


def _memory(op: str, tensor: Tensor, index: tuple[Term, ...]) -> tuple[str, ...]:
    if len(index) != len(tensor.dims):
        raise IRError(f"{op} {tensor.name}: {len(index)} index terms for {len(tensor.dims)} dimensions {tensor.dims}")
    for term, dim in zip(index, tensor.dims, strict=True):
        axis = base(getattr(term, "axis", ""))
        wanted = {Tile: axis, Part: axis, Rows: "T", Slot: "X"}.get(type(term))
        if isinstance(term, Slot) and term.inner:
            wanted = term.chain[-1]
        if wanted is not None and wanted != base(dim):
            raise IRError(f"{op} {tensor.name}: dimension {dim} cannot be indexed by {term}")
    axes = term_axes(index)
    if len(set(axes)) != len(axes):
        raise IRError(f"{op} {tensor.name}: an axis appears twice in {index}")
    return axes


def infer(op: Op, args: tuple[Node, ...], attr: dict[str, Any]) -> Type:
    """The type of the node with these parts; raises IRError when the rule of its op is broken."""
    name = op.name.lower()
    match op:
        case Op.CONST:
            return Type(())
        case Op.PARAM:
            return Type(())
        case Op.INDEX:
            return Type((attr["axis"],), "int")
        case Op.VALID:
            return Type((), "int")
        case Op.LOAD:
            stored = attr["tensor"].dtype
            return Type(_memory(name, attr["tensor"], attr["index"]), stored if attr.get("typed") else REAL)
        case Op.STORE:
            value, axes = args[0], _memory(name, attr["tensor"], attr["index"])
            _numeric(f"store {attr['tensor'].name}", value)
            if any(isinstance(t, Members) for t in attr["index"]):
                raise IRError(f"store {attr['tensor'].name}: {attr['index']} is several places; only a load can be of them")
            if value.axes != axes:
                raise IRError(f"store {attr['tensor'].name}: index covers axes {axes}, the value is {value.type}")
            return Type((), "effect")
        case Op.ELEM:
            fn = FUNCTIONS.get(attr["fn"])
            if fn is None or fn.arity != len(args):
                raise IRError(f"elem: no function {attr['fn']!r} of {len(args)} arguments; there are {', '.join(FUNCTIONS)}")
            dtype = _agree(attr["fn"], args)
            if attr["fn"] != "and":
                _numeric(attr["fn"], *args)
            return Type(_union(*args), "bool" if fn.result == "bool" else dtype)
        case Op.CAST:
            _numeric(name, args[0])
            if attr["dtype"] in ("effect", "bool"):
                raise IRError(f"cast: to a number only, got {attr['dtype']}")
            return Type(args[0].axes, attr["dtype"])
        case Op.SELECT:
            if args[0].type.dtype != "bool":
                raise IRError(f"select: the condition must be bool, got {args[0].type}")
            _numeric(name, *args[1:])
            return Type(_union(*args), _agree(name, args[1:]))
        case Op.BROADCAST:
            if not set(args[0].axes) <= set(attr["axes"]):
                raise IRError(f"broadcast: {args[0].type} has axes outside {attr['axes']}")
            return Type(attr["axes"], args[0].type.dtype)
        case Op.DOT:
            a, b, over = *args, attr["over"]
            _has(name, a, over)
            _has(name, b, over)
            _numeric(name, a, b)
            dtype = _agree(name, args)
            return Type(tuple(x for x in _union(a, b) if x != over), dtype if dtype in (REAL, "f64") else "f32")
        case Op.REDUCE:
            _has(name, args[0], attr["over"])
            _numeric(name, args[0])
            if attr["fn"] not in ("sum", "max"):
                raise IRError(f"reduce: fn must be sum or max, got {attr['fn']!r}")
            return Type(tuple(x for x in args[0].axes if x != attr["over"]), args[0].type.dtype)
        case Op.CUMSUM:
            _has(name, args[0], attr["axis"])
            _numeric(name, args[0])
            return args[0].type
        case Op.TWIN:
            a = attr["axis"]
            swap = {a: a + "'", a + "'": a}
            return Type(tuple(sorted(swap.get(x, x) for x in args[0].axes)), args[0].type.dtype)
        case Op.TRI_SOLVE:
            m, r, a = *args, attr["axis"]
            if m.axes != (a, twin(a)):
                raise IRError(f"tri_solve: M must lie on [{a}, {twin(a)}], got {m.type}")
            _has(name, r, a)
            _numeric(name, m, r)
            return Type(r.axes, _agree(name, args))
        case Op.CARRY:
            return Type(attr["axes"], attr.get("dtype", REAL))
        case Op.SCAN:
            n = len(attr["carries"])
            if len(args) < 2 * n:
                raise IRError(f"scan {attr['axis']}: {n} carries need {2 * n} values, got {len(args)}")
            for carry, init, step in zip(attr["carries"], args[:n], args[n:2 * n], strict=True):
                if init.axes != step.axes:
                    raise IRError(f"scan {attr['axis']}: carry {carry} starts as {init.type} and becomes {step.type}")
            end = len(args) - bool(attr.get("recent")) - bool(attr.get("where"))
            for r in args[end:]:
                if r.axes or r.type.dtype in ("bool", "effect"):
                    raise IRError(f"scan {attr['axis']}: which iterations run must be said by one number, got {r.type}")
            for effect in args[2 * n:end]:
                if effect.type.dtype != "effect":
                    raise IRError(f"scan {attr['axis']}: only stores and scans may follow the carries, got {effect!r}")
            return Type((), "effect")
        case Op.FINAL:
            if args[0].op is not Op.SCAN or not 0 <= attr["i"] < len(args[0]["carries"]):
                raise IRError(f"final: carry number {attr['i']} does not exist in {args[0]!r}")
            carried: Node = args[0].args[attr["i"]]
            return carried.type
    raise IRError(f"no typing rule for {op}")
