"""A program: effects in order, over a grid. Traversal, scopes, and rebuilding with notes carried along."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from gdn_ir.nodes import IRError, Node, Op, Rows, Slot, Tensor, base, make, term_scans


@dataclass(frozen=True)
class Line:
    """Where in a user's program a node was written."""
    file: str
    number: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number}"


@dataclass(frozen=True)
class Note:
    """What a program knows of a node beyond its meaning: its name and every line that made it."""
    name: str | None = None
    lines: tuple[Line, ...] = ()

    def join(self, other: Note) -> Note:
        return Note(self.name or other.name, tuple(dict.fromkeys(self.lines + other.lines)))


@dataclass(frozen=True)
class Program:
    """Stores and scans, run for every point of the grid.

    grid: axes whose points are independent; "N" is the sequence, others index heads or tiles.
    roots: the effects, in order. notes: names and lines; not part of what the program means (nor of equality). forward: of a
    backward, the program that it was derived from.
    """
    name: str
    grid: tuple[str, ...]
    roots: tuple[Node, ...]
    notes: Mapping[Node, Note] = field(default_factory=dict, compare=False, repr=False)
    forward: Program | None = field(default=None, compare=False, repr=False)

    @cached_property
    def _order(self) -> tuple[Node, ...]:
        return tuple(toposort(self.roots))

    def nodes(self) -> list[Node]:
        """Every node, arguments first."""
        return list(self._order)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor read or written, by name, in order of first use."""
        found: dict[str, Tensor] = {}
        for n in self.nodes():
            if n.op in (Op.LOAD, Op.STORE):
                t: Tensor = n["tensor"]
                if found.setdefault(t.name, t) != t:
                    raise IRError(f"tensor {t.name} is declared twice: {found[t.name]} and {t}")
        return found

    def written(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(n["tensor"].name for n in self.nodes() if n.op is Op.STORE))

    def read(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(n["tensor"].name for n in self.nodes() if n.op is Op.LOAD))

    def params(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(n["name"] for n in self.nodes() if n.op is Op.PARAM))

    def scans(self) -> tuple[Node, ...]:
        return tuple(n for n in self.nodes() if n.op is Op.SCAN)

    def name_of(self, node: Node) -> str | None:
        note = self.notes.get(node)
        return note.name if note else None

    def lines_of(self, node: Node) -> tuple[Line, ...]:
        note = self.notes.get(node)
        return note.lines if note else ()

    def named(self, name: str) -> Node:
        """The node called `name`; raises IRError listing the names there are."""
        present = set(self.nodes())
        found = [n for n, note in self.notes.items() if note.name == name and n in present]
        if not found:
            names = sorted({str(note.name) for n, note in self.notes.items() if note.name and n in present})
            raise IRError(f"{self.name} has no value named {name!r}; it has {', '.join(names)}")
        return found[0]

    def describe(self, node: Node) -> str:
        """A node for an error message: its name, its op and the line it came from."""
        name, lines = self.name_of(node), self.lines_of(node)
        at = f" at {lines[0]}: {lines[0].text}" if lines else ""
        return f"{name + ' = ' if name else ''}{node!r}{at}"

    def with_note(self, node: Node, name: str, like: Node | None = None) -> Program:
        """This program with `node` called `name` (and, with `like`, said to come from that node's lines)."""
        lines = self.lines_of(node) or (self.lines_of(like) if like is not None else ())
        return replace(self, notes={**self.notes, node: Note(name, lines)})

    def rebuild(self, change: Callable[[Node, tuple[Node, ...]], Node | None], name: str | None = None) -> Program:
        """Map the graph, arguments first. `change(old node, its new arguments)` returns the replacement, or None to
        keep the node over its new arguments. Names and lines follow their nodes."""
        notes = dict(self.notes)
        memo: dict[Node, Node] = {}
        for old in self.nodes():
            args = tuple(memo[a] for a in old.args)
            new = change(old, args) or (old if args == old.args else old.but(args))
            memo[old] = new
            if new is not old and old in notes and new.op is not Op.CONST:
                notes[new] = notes[new].join(notes[old]) if new in notes else notes[old]
            # what the replacement is made of came from the same line
            if new is not old and old in notes:
                spread(notes, new, notes[old], stop=set(args))
        roots = tuple(memo[r] for r in self.roots)
        return replace(self, name=name or self.name, roots=roots, notes=only(notes, roots))


def spread(notes: dict[Node, Note], node: Node, note: Note, stop: set[Node]) -> None:
    """Give the lines of `note` to the unnoted nodes under `node`, down to those in `stop`."""
    for arg in node.args:
        if arg not in stop and arg not in notes and arg.op is not Op.CONST:
            notes[arg] = Note(None, note.lines)
            spread(notes, arg, note, stop)


def only(notes: Mapping[Node, Note], roots: Iterable[Node]) -> dict[Node, Note]:
    return {n: notes[n] for n in toposort(roots) if n in notes}


def toposort(roots: Iterable[Node]) -> list[Node]:
    """Every node under the roots, arguments before users, in a fixed order."""
    order: dict[Node, None] = {}
    stack: list[tuple[Node, bool]] = [(r, False) for r in reversed(list(roots))]
    while stack:
        node, ready = stack.pop()
        if node in order:
            continue
        if ready:
            order[node] = None
        else:
            stack.append((node, True))
            stack.extend((a, False) for a in reversed(node.args) if a not in order)
    return list(order)


def uses(nodes: Iterable[Node]) -> dict[Node, list[Node]]:
    """For each node, the nodes that take it as an argument."""
    users: dict[Node, list[Node]] = {}
    for n in nodes:
        for a in n.args:
            users.setdefault(a, []).append(n)
    return users


def token_chains(nodes: Iterable[Node]) -> dict[str, tuple[str, ...]]:
    """For each tile axis that tokens are cut into, the scan axes that step through its chunks, outermost first."""
    found: dict[str, tuple[str, ...]] = {}
    for n in nodes:
        for t in n["index"] if n.op in (Op.LOAD, Op.STORE) else ():
            # what an outer scan keeps has a slot for each of its own iterations only
            if isinstance(t, Rows | Slot) and len(t.chain) > len(found.get(base(t.tile), ())):
                found[base(t.tile)] = t.chain
    return found


class Scopes:
    """Which scan axes each node varies with: its home is the innermost loop that runs one of them.

    With `exact`, the extent of a tile of tokens varies too: the last chunk is as short as its sequence.
    """

    def __init__(self, roots: Iterable[Node], exact: bool = False) -> None:
        self.of: dict[Node, frozenset[str]] = {}
        order = toposort(roots)
        tokens = token_chains(order)
        for n in order:
            deps = frozenset().union(*(self.of[a] for a in n.args))
            match n.op:
                case Op.LOAD | Op.STORE:
                    deps |= term_scans(n["index"])
                case Op.CARRY:
                    deps |= {n["scan"]}
                case Op.VALID:
                    deps |= set(tokens.get(base(n["axis"]), ()))
                case Op.INDEX | Op.BROADCAST if exact:
                    axes = n["axes"] if n.op is Op.BROADCAST else (n["axis"],)
                    deps = deps.union(*(tokens.get(base(a), ()) for a in axes))
                case Op.SCAN:                              # how often an inner one runs depends on those around it
                    chain = n["chain"]
                    deps |= set(chain[:chain.index(n["axis"])] if n["axis"] in chain else ())
                    deps -= {n["axis"]}
            self.of[n] = deps

    def __getitem__(self, node: Node) -> frozenset[str]:
        return self.of[node]


@dataclass(frozen=True)
class ScanView:
    """The parts of a SCAN node, by name."""
    node: Node
    axis: str
    chain: tuple[str, ...]
    tile: str
    carries: tuple[str, ...]
    reverse: bool
    inits: tuple[Node, ...]
    nexts: tuple[Node, ...]
    effects: tuple[Node, ...]
    group: str = ""            # of a scan over the members of a group: the grid axis whose points are the groups
    idle: tuple[str, ...] = ()                             # iterations around it, "first" or "last", in which it does not run
    recent: tuple[Node, ...] = ()                          # at most one: how many of its last iterations run; else all do
    where: tuple[Node, ...] = ()                           # at most one, of a scan that carries nothing: 0 where none runs

    @property
    def parts(self) -> str:
        """The tile axis whose parts it steps through, if it does."""
        return self.axis[:-1] if self.axis.endswith("#") else ""

    @staticmethod
    def of(node: Node) -> ScanView:
        n = len(node["carries"])
        a, attr = node.args, dict[str, Any](node.attr)
        last = len(a) - bool(attr.get("where"))
        end = last - bool(attr.get("recent"))
        return ScanView(node, node["axis"], node["chain"], node["tile"], node["carries"], node["reverse"],
                        a[:n], a[n:2 * n], a[2 * n:end], attr.get("group", ""), attr.get("idle", ()), a[end:last],
                        a[last:])

    def with_parts(self, **parts: Any) -> Node:
        """The same scan with some of carries, inits, nexts, effects (or reverse) replaced."""
        v = replace(self, **parts)
        rare = (("group", v.group), ("idle", v.idle), ("recent", bool(v.recent)), ("where", bool(v.where)))
        return make(Op.SCAN, v.inits + v.nexts + v.effects + v.recent + v.where, axis=v.axis, chain=v.chain, tile=v.tile,
                    carries=v.carries, reverse=v.reverse, **{k: x for k, x in rare if x})

    def asked(self) -> Node | None:
        """The load that says whether an iteration runs, where that is asked, under whatever casts."""
        node = self.where[0] if self.where else None
        while node is not None and node.op is Op.CAST:
            node = node.args[0]
        return node

    def carry_nodes(self) -> tuple[Node, ...]:
        """The CARRY nodes of the body (those it uses), in the order of `carries`; absent ones are left out."""
        found = {n["name"]: n for n in toposort(self.nexts + self.effects) if n.op is Op.CARRY}
        return tuple(found[c] for c in self.carries if c in found)


def substitute(roots: Iterable[Node], table: Mapping[Node, Node]) -> dict[Node, Node]:
    """Every node under the roots, mapped to itself with `table` applied beneath it."""
    memo: dict[Node, Node] = {}
    for old in toposort(roots):
        args = tuple(memo[a] for a in old.args)
        memo[old] = table[old] if old in table else (old if args == old.args else old.but(args))
    return memo


def tile_axes(program: Program) -> Iterator[str]:
    """The base names of all tile axes that occur, sorted."""
    yield from sorted({base(a) for n in program.nodes() for a in n.axes})
