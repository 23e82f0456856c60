"""The interpreter: what a program means, one grid point and one chunk at a time, in float64.

Two readings. *Ideal*: numbers are reals, casts do nothing. *Faithful*: every cast rounds, as the kernel will.
Two layouts. *Exact*: the last chunk is as short as its sequence, so no padding exists. *Padded*: every tile has its full
extent and masked loads give zeros, as in a kernel; the padding pass must have made the two agree.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from gdn_ir.nodes import At, IRError, Member, Members, Node, Op, Part, Rows, Slot, Tensor, Tile, Turn, base, make, stored_axes
from gdn_ir.inverse import doubled
from gdn_ir.program import Program, ScanView, Scopes, token_chains

Array = torch.Tensor


def round_to(x: Array, dtype: str) -> Array:
    """x rounded to a dtype of the language, held in float64."""
    if dtype in ("real", "f64", "int"):
        return x
    if dtype in ("tf32", "tf32x3"):                        # 10 and about 21 explicit bits of mantissa
        mantissa, exponent = torch.frexp(x)
        scale = 2.0 ** (11 if dtype == "tf32" else 22)
        return torch.ldexp(torch.round(mantissa * scale) / scale, exponent)
    return x.to({"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[dtype]).to(torch.float64)


@dataclass
class Sizes:
    """Extents of a call. `axes`: extents by name (C, K, V, H, HV and inner scan axes); cu: sequence boundaries, in tokens."""
    axes: Mapping[str, int]
    cu: list[int]
    tiles: Mapping[str, int] = field(default_factory=dict)      # padded: tile extents where they differ from the axis

    @cached_property
    def sequences(self) -> int:
        return len(self.cu) - 1

    def span(self, chain: tuple[str, ...], tile: str) -> int:
        """Tokens that one iteration of the outermost scan of the chain covers."""
        return math.prod((self.axes[a] for a in chain[1:]), start=self.axes[tile])

    def trips(self, n: int, axis: str, chain: tuple[str, ...], tile: str, done: int = 0) -> int:
        """How often a scan runs for sequence n: an outer one covers the sequence, an inner one has a fixed extent, but `done`
        iterations of those around it are behind it and it ends with the sequence."""
        at = chain.index(axis)
        length, span = self.cu[n + 1] - self.cu[n], self.span(chain[at:], tile)
        left = -(-length // span)
        return left if at == 0 else max(0, min(self.axes[axis], left - done * self.axes[axis]))

    def slot(self, n: int, chunk: int, tile: str, inner: tuple[str, ...] = ()) -> int:
        """Where chunk (or, with `inner`, segment) number `chunk` of sequence n lies among all: distinct without a prefix sum
        over sequences, because floor(a / C) + ceil(b / C) <= floor((a + b) / C) + 1."""
        return self.cu[n] // self.span(("", *inner), tile) + n + chunk

    def slots(self, tile: str, inner: tuple[str, ...] = ()) -> int:
        return self.cu[-1] // self.span(("", *inner), tile) + self.sequences

    def dim(self, name: str) -> int:
        """The extent of a tensor's dimension."""
        if name == "T":
            return self.cu[-1]
        if name == "N":
            return self.sequences
        if name == "X":
            return self.slots("C")
        if name.endswith("#"):                             # how many tiles a split axis has
            a = name[:-1]
            return -(-self.axes[base(a)] // self.tiles.get(a, self.axes[base(a)]))
        return self.axes[base(name)]


def run(program: Program, inputs: Mapping[str, Array], sizes: Sizes, params: Mapping[str, float] | None = None,
        faithful: bool = False, padded: bool = False) -> dict[str, Array]:
    """Run a program; returns every tensor it writes, in float64. Unwritten places hold NaN."""
    program = doubled(program) if faithful else program    # ideally the inverse is what it is, however it is made
    return _Run(program, dict(inputs), sizes, dict(params or {}), faithful, padded).all()


def run_pipeline(programs: list[Program], inputs: Mapping[str, Array], sizes: Sizes,
                 params: Mapping[str, float] | None = None, faithful: bool = False, padded: bool = False) -> dict[str, Array]:
    """Run programs in order, each reading what those before it wrote."""
    memory = dict(inputs)
    written: dict[str, Array] = {}
    for p in programs:
        result = run(p, memory, sizes, params, faithful, padded)
        memory |= result
        written |= result
    return written


class _Env:
    """Values known in one iteration, in the iteration around it, and so on outwards."""

    def __init__(self, parent: _Env | None, axis: str | None, at: int = 0) -> None:
        self.parent, self.axis, self.at = parent, axis, at
        self.values: dict[Node, Array] = {}

    def home(self, deps: frozenset[str]) -> _Env:
        env = self
        while env.parent is not None and env.axis not in deps:
            env = env.parent
        return env


class _Run:
    def __init__(self, program: Program, memory: dict[str, Array], sizes: Sizes, params: dict[str, float],
                 faithful: bool, padded: bool) -> None:
        self.p, self.sizes, self.params, self.faithful, self.padded = program, sizes, params, faithful, padded
        self.scopes = Scopes(program.roots, exact=not padded)
        self.memory = {k: v.to(torch.float64) for k, v in memory.items()}
        self.point: dict[str, int] = {}
        self.sums: set[str] = set()

    def all(self) -> dict[str, Array]:
        p, tensors = self.p, self.p.tensors()
        for name in p.read():
            if name not in self.memory and name not in p.written():
                raise IRError(f"{p.name} reads {name}, which was not given; given: {', '.join(self.memory)}")
        for n in p.nodes():
            if n.op is Op.STORE:
                t: Tensor = n["tensor"]
                if t.name not in self.memory or t.name not in p.read():
                    shape = [self.sizes.slots(i.tile, i.inner) if isinstance(i, Slot) else self.sizes.dim(d)
                             for i, d in zip(n["index"], t.dims, strict=True)]
                    self.memory[t.name] = torch.full(shape, math.nan, dtype=torch.float64)
                if n["sum"]:
                    self.memory[t.name].zero_()
        self.memory = {k: v.clone() if k in p.written() else v for k, v in self.memory.items()}
        grid = [range(self._grid_extent(a)) for a in p.grid]
        for point in itertools.product(*grid):
            self.point = dict(zip(p.grid, point, strict=True))
            env = _Env(None, None)
            for root in p.roots:
                self.value(root, env)
        return {name: self.memory[name] for name in p.written() if name in tensors}

    def _grid_extent(self, axis: str) -> int:
        return self.sizes.dim(axis)

    # -- tiles: where they start, how many coordinates are real, how many there are

    def chunk(self, chain: tuple[str, ...], env: _Env) -> int:
        at: dict[str, int] = {}
        e: _Env | None = env
        while e is not None:
            if e.axis is not None:
                at.setdefault(e.axis, e.at)
            e = e.parent
        chunk = at[chain[0]]
        for a in chain[1:]:
            chunk = chunk * self.sizes.axes[a] + at[a]
        return chunk

    def rows(self, chain: tuple[str, ...], tile: str, env: _Env) -> tuple[int, int]:
        """The first token of the current chunk, and how many of its tokens exist."""
        n, c = self.point["N"], self.sizes.axes[base(tile)]
        start = self.sizes.cu[n] + self.chunk(chain, env) * c
        return start, max(0, min(c, self.sizes.cu[n + 1] - start))

    def extent(self, axis: str, env: _Env) -> tuple[int, int]:
        """Of a tile axis: its first coordinate, and the extent of the tile."""
        start, tile = self._split(axis)
        return start, tile if self.padded else self.valid(axis, env)

    def valid(self, axis: str, env: _Env) -> int:
        """How many coordinates of the tile exist."""
        a = base(axis)
        if a in self.tokens:
            return self.rows(self.tokens[a], a, env)[1]
        start, tile = self._split(axis)
        return min(tile, self.sizes.axes[a] - start)

    def _split(self, axis: str) -> tuple[int, int]:
        """Where a block's part of an axis starts, and its extent; a twin that is not split by itself goes with its base."""
        axis = axis if axis + "#" in self.p.grid else base(axis)
        tile = self.sizes.tiles.get(axis, self.sizes.axes[base(axis)])
        return (self.point[axis + "#"] * tile if axis + "#" in self.p.grid else 0), tile

    @cached_property
    def written(self) -> frozenset[str]:
        return frozenset(self.p.written())

    @cached_property
    def tokens(self) -> dict[str, tuple[str, ...]]:
        return token_chains(self.p.nodes())

    # -- evaluation

    def value(self, node: Node, env: _Env) -> Array:
        home = env.home(self.scopes[node])
        if node not in home.values:
            home.values[node] = self._eval(node, home if node.op is not Op.SCAN else env)
        return home.values[node]

    def _eval(self, n: Node, env: _Env) -> Array:
        if n.op is Op.SCAN:
            return self._scan(n, env)
        if n.op is Op.CARRY:
            raise IRError(f"carry {n['name']} read outside its scan")
        if n.op is Op.FINAL:
            self.value(n.args[0], env)
            return env.home(self.scopes[n.args[0]]).values[n]
        args = [self.value(a, env) for a in n.args]
        match n.op:
            case Op.CONST:
                return torch.tensor(n["value"], dtype=torch.float64)
            case Op.PARAM:
                return torch.tensor(self.params[n["name"]], dtype=torch.float64)
            case Op.INDEX:
                start, extent = self.extent(n["axis"], env)
                return torch.arange(start, start + extent, dtype=torch.float64)
            case Op.VALID:
                start = self._split(n["axis"])[0]
                return torch.tensor(float(start + self.valid(n["axis"], env)), dtype=torch.float64)
            case Op.LOAD:
                return self._load(n, env)
            case Op.STORE:
                self._store(n, args[0], env)
                return torch.tensor(0.0)
            case Op.ELEM:
                return elementwise(n["fn"], *(self._align(a, x.axes, n.axes) for a, x in zip(args, n.args, strict=True)))
            case Op.CAST:
                return round_to(args[0], n["dtype"]) if self.faithful else args[0]
            case Op.SELECT:
                c, a, b = (self._align(a, x.axes, n.axes) for a, x in zip(args, n.args, strict=True))
                return torch.where(c, a, b)
            case Op.BROADCAST:
                shape = [self.extent(a, env)[1] for a in n.axes]
                return self._align(args[0], n.args[0].axes, n.axes).expand(shape)
            case Op.DOT:
                every = sorted(set(n.args[0].axes) | set(n.args[1].axes))
                a, b = (self._align(a, x.axes, tuple(every)) for a, x in zip(args, n.args, strict=True))
                return (a * b).sum(every.index(n["over"]))
            case Op.REDUCE:
                dim = n.args[0].axes.index(n["over"])
                return args[0].sum(dim) if n["fn"] == "sum" else args[0].amax(dim)
            case Op.CUMSUM:
                dim = n.axes.index(n["axis"])
                return args[0].flip(dim).cumsum(dim).flip(dim) if n["reverse"] else args[0].cumsum(dim)
            case Op.TWIN:
                order = [n.args[0].axes.index(_swap(a, n["axis"])) for a in n.axes]
                return args[0].permute(order)
            case Op.TRI_SOLVE:
                return self._tri_solve(n, *args)
        raise IRError(f"no meaning for {n!r}")

    @staticmethod
    def _align(x: Array, axes: tuple[str, ...], to: tuple[str, ...]) -> Array:
        return x[tuple(slice(None) if a in axes else None for a in to)] if to else x

    def _tri_solve(self, n: Node, m: Array, r: Array) -> Array:
        dim, size = n.axes.index(n["axis"]), m.shape[0]
        at = torch.arange(size)
        if n["block"]:
            m = torch.where(at[:, None] // n["block"] == at[None, :] // n["block"], m, 0.0)
        eye = torch.eye(size, dtype=torch.float64)
        front = r.movedim(dim, 0)
        flat = front.reshape(size, math.prod(front.shape[1:]))
        m, upper = (m.T, True) if dict(n.attr).get("transpose") else (m, False)
        u: Array = torch.linalg.solve_triangular(eye + m, flat, upper=upper, unitriangular=True)
        return u.reshape(front.shape).movedim(0, dim)

    def _done(self, view: ScanView, env: _Env) -> int:
        """Iterations of the scans around one, counted as one scan."""
        around = view.chain[:view.chain.index(view.axis)] if not view.group else ()
        return self.chunk(around, env) if around else 0

    def _idle(self, view: ScanView, env: _Env) -> bool:
        if not view.idle:
            return False
        at, around = self._done(view, env), view.chain[:view.chain.index(view.axis)]
        count = self.sizes.trips(self.point["N"], around[-1], view.chain, view.tile)
        return ("first" in view.idle and at == 0) or ("last" in view.idle and at == count - 1)

    def _scan(self, n: Node, env: _Env) -> Array:
        view = ScanView.of(n)
        carries = {c["name"]: c for c in view.carry_nodes()}
        state = [self.value(i, env) for i in view.inits]
        trips = self.sizes.dim(view.axis) // (self.sizes.dim(view.group) if view.group else 1) \
            if view.group or view.parts else \
            self.sizes.trips(self.point["N"], view.axis, view.chain, view.tile, self._done(view, env))
        trips = 0 if self._idle(view, env) else trips
        turns = range(trips)[::-1] if view.reverse else range(trips)
        for i in turns[max(0, trips - int(self.value(view.recent[0], env))):] if view.recent else turns:
            inner = _Env(env, view.axis, i)
            if view.where and not self.value(view.where[0], inner):
                continue
            for name, value in zip(view.carries, state, strict=True):
                if name in carries:
                    inner.values[carries[name]] = value
            state = [self.value(x, inner) for x in view.nexts]
            for e in view.effects:
                self.value(e, inner)
        home = env.home(self.scopes[n])
        for i, value in enumerate(state):
            home.values[make(Op.FINAL, (n,), i=i)] = value
        return torch.tensor(0.0)

    # -- memory

    def _address(self, n: Node, env: _Env) -> tuple[list[slice | int], list[int]]:
        """For each dimension, the coordinates that exist; and for each tile axis, the padding after them."""
        where: list[slice | int] = []
        pad: list[int] = []
        for term, dim in zip(n["index"], n["tensor"].dims, strict=True):
            match term:
                case Tile(axis):
                    start, extent = self.extent(axis, env)
                    # columns of a row-major [C, C'] tile are all stored
                    valid = extent if axis.endswith("'") and base(axis) in self.tokens else self.valid(axis, env)
                    start += extent * self.chunk((term.scan,), env) if isinstance(term, Part) else 0
                    where.append(slice(start, start + valid))
                    pad.append(extent - valid)
                case At(grid, share):
                    group = self.sizes.dim(grid) // self.sizes.dim(dim) if share else 1
                    where.append(self.point[grid] // group)
                case Rows(chain, tile, single):
                    first, valid = self.rows(chain, tile, env)
                    if single:
                        where.append(first)
                        continue
                    where.append(slice(first, first + valid))
                    pad.append((self.sizes.axes[base(tile)] if self.padded else valid) - valid)
                case Slot(chain, tile, inner):
                    where.append(self.sizes.slot(self.point["N"], self.chunk(chain, env), tile, inner))
                case Turn(scan):
                    where.append(self.chunk((scan,), env))
                case Member(grid, scan, own):
                    group = self.sizes.dim(dim) // self.sizes.dim(grid)
                    where.append(self.point[grid] if own else self.point[grid] * group + self.chunk((scan,), env))
                case Members(grid):
                    if grid is None:
                        where.append(slice(None))
                        continue
                    group = self.sizes.dim(dim) // self.sizes.dim(grid)
                    where.append(slice(self.point[grid] * group, (self.point[grid] + 1) * group))
        return where, pad

    def _load(self, n: Node, env: _Env) -> Array:
        where, pad = self._address(n, env)
        tile = self.memory[n["tensor"].name][tuple(where)]
        slices = [t for t, w in zip(n["index"], where, strict=True) if isinstance(w, slice)]
        for i in reversed([i for i, t in enumerate(slices) if isinstance(t, Members)]):
            tile = tile.sum(i)
        if n["tensor"].name in self.written:               # what was read stays as it was, whatever is stored later
            tile = tile.clone()
        padding = [x for p in reversed(pad) for x in (0, p)]
        tile = torch.nn.functional.pad(tile, padding) if any(padding) else tile
        order = stored_axes(n["index"])
        return tile.permute([order.index(a) for a in n.axes])

    def _store(self, n: Node, value: Array, env: _Env) -> None:
        where, _ = self._address(n, env)
        target = self.memory[n["tensor"].name]
        order = stored_axes(n["index"])
        value = value.permute([n.args[0].axes.index(a) for a in order])
        place = target[tuple(where)]
        value = value[tuple(slice(0, s) for s in place.shape)]
        target[tuple(where)] = place + value if n["sum"] else value


def _swap(axis: str, tile: str) -> str:
    return {tile: tile + "'", tile + "'": tile}.get(axis, axis)


ELEMENTWISE: dict[str, Callable[..., Array]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "neg": torch.neg,
    "floordiv": lambda a, b: torch.floor(a / b), "min": torch.minimum, "max": torch.maximum,
    "exp": torch.exp, "exp2": torch.exp2, "log": torch.log, "rsqrt": torch.rsqrt, "sigmoid": torch.sigmoid,
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge, "eq": torch.eq, "and": torch.logical_and,
}


def elementwise(fn: str, *args: Array) -> Array:
    return ELEMENTWISE[fn](*args)
