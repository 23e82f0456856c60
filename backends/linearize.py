"""The shared linearizer: from a graph to statements in order, with names, homes and inlined expressions.

Every printer walks what this module makes; a backend adds a table from operations to text. A value used once, close by,
and not named by the user is written where it is used, so that emitted code reads like code.
"""
from __future__ import annotations

import keyword
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from gdn_ir.backends.arrange import arranged, is_sum
from gdn_ir.backends.base import Kernel
from gdn_ir.backends.held import FREE, Held
from gdn_ir.nodes import Members, Node, Op, twin
from gdn_ir.program import Line, ScanView, Scopes, token_chains, toposort, uses


@dataclass
class Assign:
    """name = the value of node"""
    name: str
    node: Node


@dataclass
class Write:
    """A store."""
    node: Node


@dataclass
class Loop:
    """A scan: `starts` before it, `body` each iteration, then all carries take their next values at once."""
    scan: ScanView
    carries: list[str]
    starts: list[Node]
    body: list[Stmt] = field(default_factory=list)


Stmt = Assign | Write | Loop


@dataclass(frozen=True)
class Style:
    """Which values a backend wants by name. named: operands of these operations; masks: conditions that are used again;
    rows: what a larger tile would compute again for each of its rows; loads: tiles as they lie in memory, so that a cast stands
    where they are used; sums: loads of several places, which take a loop; rounded: dtypes whose casts it writes out where the
    value meets more than products."""
    named: frozenset[Op] = frozenset()
    masks: bool = True
    rows: bool = False
    loads: bool = False
    sums: bool = False
    rounded: frozenset[str] = frozenset()


PLAIN = Style()


INLINE = (Op.ELEM, Op.CAST, Op.SELECT, Op.TWIN, Op.BROADCAST, Op.CONST, Op.PARAM, Op.INDEX, Op.VALID)


COSTLY = ("exp", "exp2", "log", "rsqrt", "sigmoid", "softplus", "div")

Table = dict[Op, Callable[["Linear", Node], str]]


class Linear:
    """The statements of a program, and the text of any value within them.

    table: op -> rule(linear, node) -> text, the backend's. reserved: names the backend uses itself.
    A scan that carries nothing has no loop: the grid runs its chunks, so its body is the kernel's.
    """

    def __init__(self, kernel: Kernel, table: Table, reserved: frozenset[str] = frozenset(),
                 style: Style = PLAIN) -> None:
        self._sums, self._order = set[Node](), list[Node]()
        if kernel.options.sparing and any(ScanView.of(s).parts for s in kernel.program.scans()):
            program, self._order = arranged(kernel)
            kernel = replace(kernel, program=program)
            self._sums = {n for n in self._order if is_sum(n)}                 # each a line, so that none waits
            style = replace(style, loads=True)             # tiles are widened where they are used
        self.kernel, self.program, self.table, self.style = kernel, kernel.program, table, style
        program, parallel = kernel.program, kernel.parallel
        self.rest = ""                                     # the printer's name for the dtype of plain arithmetic
        self.names: dict[Node, str] = {}
        self._taken = set(reserved)
        self._scopes = Scopes(program.roots)
        self._nodes = program.nodes()
        self.tokens = token_chains(self._nodes)
        self._uses = uses(self._nodes)
        self.operands = {self.bare(a) for n in self._nodes if n.op in style.named for a in n.args}
        self._blocks: list[tuple[str | None, list[Stmt]]] = [(None, [])]
        self._held = Held(kernel, self._uses) if kernel.options.sparing else None
        for r in self._ordered(parallel.effects if parallel else program.roots):
            self._effect(r)
        self.body = self._blocks[0][1]

    # -- order

    def _effect(self, node: Node) -> None:
        if node in self.names:
            return
        self.names[node] = ""
        if node.op is Op.STORE:
            for a in self._ordered(node.args):
                self._place(a)
            self._home(node).append(Write(node))
            return
        view = ScanView.of(node)
        for i in view.inits + view.recent:
            self._place(i)
        carried = {c["name"]: c for c in view.carry_nodes()}
        loop = Loop(view, [], list(view.inits))
        for name in view.carries:
            text = self.fresh(name)
            loop.carries.append(text)
            if name in carried:
                self.names[carried[name]] = text
        for x in self._ordered(self._beside(view) if view.parts else ()):
            self._place(x)
        self._blocks.append((view.axis, loop.body))
        for x in self._order if view.parts else ():
            self._place(x)
        for e in self._ordered(view.effects):
            self._effect(e)
        for x in view.nexts:
            self._place(x)
        self._blocks.pop()
        self._home(node).append(loop)
        for user in self._uses.get(node, []):
            if user.op is Op.FINAL:
                self.names[user] = loop.carries[user["i"]]

    def _beside(self, view: ScanView) -> tuple[Node, ...]:
        """Sums that neither a loop over parts needs nor need it: made before it, so that no tile is held meanwhile."""
        inside = set(toposort([view.node]))
        return tuple(n for n in self._nodes if n.op is Op.REDUCE and n not in inside and view.node not in set(toposort([n])))

    def _ordered(self, nodes: tuple[Node, ...]) -> Iterator[Node]:
        """The order in which values, or effects, are placed: as they come; or, in a kernel that is to be sparing, each time
        the one after which least is held."""
        if self._held is None or any(n.op is Op.SCAN for n in nodes):
            yield from nodes
            return
        left = list(dict.fromkeys(nodes))
        while left:
            n = min(left, key=self._held.after)
            left.remove(n)
            yield n
            self._held.place(n)

    def _home(self, node: Node) -> list[Stmt]:
        for axis, block in reversed(self._blocks):
            if axis is None or axis in self._scopes[node]:
                return block
        raise AssertionError("the outermost block is home to all")

    def _place(self, node: Node) -> None:
        if node in self.names or node.op in FREE or node.op is Op.CARRY:
            return
        if node.op in (Op.STORE, Op.SCAN):
            self._effect(node)
            return
        for a in self._ordered(node.args):
            self._place(a)
        if node in self.names or node.op is Op.FINAL or self.inlined(node):
            return
        self.names[node] = self.fresh(self.program.name_of(node) or self._default(node))
        self._home(node).append(Assign(self.names[node], node))

    def bare(self, node: Node) -> Node:
        """The value under other names of its axes and casts that change no bit."""
        while self._silent(node) and node.args:
            node = node.args[0]
        return node

    def inlined(self, node: Node) -> bool:
        if node.op in FREE or self._silent(node) or (node.type.dtype == "bool" and not self.style.masks):
            return True
        if node in self.operands or node in self._sums:
            return False
        users = self._uses.get(node, [])
        once = len(users) == 1 and users[0].args.count(node) == 1
        loads = self.style.loads and bool(node.axes)
        if node.op is Op.LOAD:                             # a tile that is only widened is loaded and widened in one line
            several = self.style.sums and any(isinstance(t, Members) for t in node["index"])
            return not loads and not several and once and users[0].op is Op.CAST and self._same_block(node, users[0])
        if loads and node.op is Op.CAST and node.args[0].op is Op.LOAD:
            return True
        if self.style.rows and node.op is Op.ELEM and node["fn"] in COSTLY and any(len(u.axes) > len(node.axes) for u in users):
            return False
        return node.op in INLINE and once and self.program.name_of(node) is None and self._same_block(node, users[0])

    def _silent(self, node: Node) -> bool:
        """Values that cost nothing to write again: arithmetic on coordinates, casts that change no bit, other axis names."""
        if node.op is Op.TWIN and len(node.axes) <= 2:
            return not set(node.axes) >= {node["axis"], twin(node["axis"])}
        same = ("f32", "tf32", "tf32x3", "real")
        if node.op is Op.CAST and node["dtype"] in self.style.rounded and not self._multiplied(node):
            return False
        return (node.op is Op.CAST and node.type.dtype in same and node.args[0].type.dtype in same) or \
            (node.op is Op.ELEM and node["fn"] == "floordiv" and all(a.op in FREE for a in node.args))

    def _multiplied(self, node: Node) -> bool:
        """Whether a value is an operand of products and nothing else."""
        users = self._uses.get(node, [])
        return all(u.op is Op.DOT or (u.op is Op.TWIN and self._multiplied(u)) for u in users)

    def _same_block(self, node: Node, user: Node) -> bool:
        loops = {a for a, _ in self._blocks if a}
        before = user.op is not Op.SCAN or node in ScanView.of(user).inits + ScanView.of(user).recent
        own = self._scopes[user] if before else self._scopes[user] | {user["axis"]}
        return (self._scopes[node] & loops) == (own & loops)

    def _default(self, node: Node) -> str:
        x = node
        while x.op in (Op.CAST, Op.TWIN, Op.BROADCAST):
            x = x.args[0]
        near = self.program.name_of(x) or (x["tensor"].name if x.op is Op.LOAD else self.names.get(x))
        if node is not x and near:
            return f"{near}_{node.type.dtype}" if node.op is Op.CAST else near
        return near or {Op.REDUCE: "total", Op.DOT: "product"}.get(node.op, "x")

    def fresh(self, wanted: str) -> str:
        """A name not used yet, close to the one wanted."""
        wanted = "".join(c if c.isalnum() else "_" for c in wanted).strip("_") or "x"
        if keyword.iskeyword(wanted):
            wanted += "_"
        name, i = wanted, 2
        while name in self._taken:
            name, i = f"{wanted}_{i}", i + 1
        self._taken.add(name)
        return name

    # -- text

    def text(self, node: Node) -> str:
        """The value as an expression: its name, or what it is inlined to."""
        if node in self.names and self.names[node]:
            return self.names[node]
        return self.expression(node)

    def expression(self, node: Node) -> str:
        return self.table[node.op](self, node)

    def lines(self, node: Node) -> tuple[Line, ...]:
        return self.program.lines_of(node)


def listed(items: list[str]) -> str:
    """The text of a tuple."""
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"


def paren(text: str) -> str:
    """The text as one operand: in parentheses unless it is a name, a number, a call or an index already."""
    depth = 0
    for c in text:
        depth += c in "([{"
        depth -= c in ")]}"
        if depth == 0 and c in " -":
            return f"({text})"
    return text


def infix(symbol: str, a: str, b: str) -> str:
    """a symbol b, with parentheses only where precedence asks for them."""
    tight = {"*", "/", "//"}
    left = a if symbol not in tight or _flat(a, tight) else paren(a)
    right = b if symbol == "+" and _flat(b, tight) else (b if symbol == "-" and _flat(b, tight) else paren(b))
    if symbol not in ("+", "-", "*", "/", "//"):
        left, right = paren(a), paren(b)
    return f"{left} {symbol} {right}"


def _flat(text: str, allowed: set[str]) -> bool:
    """Whether every operator outside parentheses is among those allowed."""
    depth, words = 0, []
    for token in text.replace("(", " ( ").replace("[", " [ ").replace(")", " ) ").replace("]", " ] ").split():
        depth += token in "(["
        if depth == 0:
            words.append(token)
        depth -= token in ")]"
    operators = {w for w in words if not any(c.isalnum() or c in "_.'\"" for c in w)}
    return operators <= allowed | {")", "]", ","} and not text.startswith("-")
