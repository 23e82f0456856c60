"""A role schedule laid over a program: each event becomes a step that says which node it is of and what memory it touches.

A step touches cells: registers of its role, or a ring in shared memory. What it reads is found by walking the node's arguments
down to values that other events make; all between is computed where it is used. Three rules decide where a value lies:

- a value that another role reads lies in its ring (and in registers too where its own role reads it again, unless it is a
  running sum, an inverse or the matrix that is inverted: of these a thread has no part of its own; a product that takes a
  tile lying across reads it from the ring);
- a product that is used once, in x + product, is added onto x: both lie in the registers of x, which may be such a sum;
- such an x lies where the one product or carry lies that it is made of, element by element.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gdn_ir.nodes import FUNCTIONS, IRError, Node, Op, Rows, Tensor, twin
from gdn_ir.program import Program, ScanView, uses
from gdn_ir.schedules.roles import MAKE, Event, Role, Roles


class IllegalRoles(IRError):
    """A role schedule that this program does not allow; names the event and why."""


@dataclass(frozen=True)
class Access:
    """A cell and the value that is in it: of this chunk, or (ahead: 1) of the next, or (-1) of the one before. ring: the cell
    is a ring's. own: each warp reads only what it wrote there itself."""
    cell: str
    value: str
    ring: bool = False
    ahead: int = 0
    own: bool = False


@dataclass(frozen=True)
class Step:
    """One event of one copy of a role. engine: who touches memory: the role's threads, the tensor cores or the copy engine;
    part: which part of a split axis it is of (None: of all). A product's accesses are its issue's; `complete` has none."""
    event: Event
    node: Node
    engine: str
    reads: tuple[Access, ...] = ()
    writes: tuple[Access, ...] = ()
    part: int | None = None

    @property
    def late(self) -> bool:
        return self.event.late

    @property
    def ragged(self) -> bool:
        """Of what is loaded or stored: whether it has a row for each token, of which a short chunk has fewer."""
        return self.event.do in ("load", "store") and any(isinstance(t, Rows) for t in self.node["index"])

    def __str__(self) -> str:
        return str(self.event)


def expressions(program: Program, names: tuple[tuple[str, str], ...] = ()) -> dict[str, Node]:
    """Every value of a program by what it is written as, in which those of `names` go by their names."""
    found: dict[str, Node] = {}
    text: dict[Node, str] = {}
    table = {expression: name for name, expression in names}
    for n in program.nodes():
        parts = [text[a] for a in n.args]
        match n.op:
            case Op.CONST:
                text[n] = repr(n["value"])
            case Op.LOAD:
                text[n] = called(n["tensor"])
            case Op.CARRY | Op.PARAM:
                text[n] = n["name"]
            case Op.DOT:
                text[n] = " . ".join(parts)
            case Op.ELEM if FUNCTIONS[n["fn"]].symbol and len(parts) == 2:
                left, right = (f"({p})" if " " in p and "(" not in p.split(" ")[0] else p for p in parts)
                text[n] = f"{left} {FUNCTIONS[n['fn']].symbol} {right}"
            case Op.ELEM:
                text[n] = f"{n['fn']}({', '.join(parts)})"
            case Op.CAST:
                text[n] = parts[0] if n["dtype"] in ("f32", "real") else f"{n['dtype']}({parts[0]})"
            case Op.SELECT if padding(n):
                text[n] = parts[1]
            case Op.TWIN | Op.BROADCAST:
                text[n] = parts[0]
            case _:
                text[n] = f"{n.op.name.lower()}({', '.join(parts)})"
        text[n] = table.get(text[n], program.name_of(n) or text[n])
        other = n.op in (Op.TWIN, Op.BROADCAST, Op.STORE) or (padding(n) and n.args[1].op is Op.TWIN)
        if not other and not (n.op is Op.CAST and text[n] in found):
            found[text[n]] = n
    return found


def called(t: Tensor) -> str:
    """A tensor's name in schedules: "k_kept" is what an earlier kernel made of the rows of k."""
    return t.name.removesuffix("_kept") if t.temp else t.name


def padding(n: Node) -> bool:
    """Whether a node masks rows past the end of a sequence, and does nothing else."""
    if n.op is not Op.SELECT:
        return False
    c = n.args[0]
    return c.op is Op.ELEM and c["fn"] == "lt" and c.args[0].op is Op.INDEX and c.args[1].op is Op.VALID


def untwinned(program: Program) -> Program:
    """The program, in which what is rounded is what is stored, along its axes: not its twin."""
    def change(old: Node, args: tuple[Node, ...]) -> Node | None:
        if old.op is not Op.STORE or args[0].op is not Op.TWIN or args[0].args[0].op is not Op.CAST:
            return None
        (rounded,) = args[0].args
        return old.but((rounded.but((rounded.args[0].twin(args[0]["axis"]),)),))
    return program.rebuild(change)


def innermost(scan: Node) -> bool:
    """Whether no other scan runs in a scan's iterations."""
    return not any(a.op is Op.SCAN for a in scan.args)


class Laid:
    """A role schedule over a program. `steps`: those of each role's copies, by name ("state0", "aux"), in order."""

    def __init__(self, program: Program, roles: Roles) -> None:
        program = untwinned(program)
        self.program, self.roles = program, roles
        self.named = expressions(program, roles.names)
        for name, expression in roles.names:
            if name not in self.named:
                raise IllegalRoles(f"names: {program.name} computes no {expression!r} (for {name}); it computes "
                                   f"{', '.join(sorted(self.named))}")
        (self.scan,) = (ScanView.of(s) for s in program.scans() if innermost(s))         # around it: segments, all at once
        stores = {n["tensor"].name: n for n in self.scan.effects if n.op is Op.STORE}
        plain = {name.removesuffix("_parts").removesuffix("_made"): n for name, n in stores.items()}     # what others finish
        self.stores = {**plain, **stores}
        self.loaded = {called(n["tensor"]): n for n in program.nodes() if n.op is Op.LOAD}
        self.axes = {r.rows: r.copies for r in roles.roles if r.copies > 1}
        self.rings = {v: ring for ring in roles.rings for v in ring.values}
        self.held: dict[Node, str] = {}                    # nodes that events make, by the value's name
        self.owner: dict[str, Role] = {}
        self.onto: dict[str, str] = {}                     # a product -> the value it is added onto
        self.users = uses(program.nodes())
        self.fetched: dict[tuple[str, Node], str] = {}     # (role, what it fetches) -> its name
        for r in roles.roles:
            for e in r.events:
                if e.do in MAKE:
                    self.make(r, e)
                elif e.do == "fetch":
                    self.fetch(r, e)
        self.matrices = {self.held.get(n.args[0], ""): name for n, name in self.held.items() if n.op is Op.TRI_SOLVE}
        self.passed = {name for n, name in self.held.items() if n.op in (Op.TRI_SOLVE, Op.CUMSUM)} | set(self.matrices)
        self.carried()
        self.homes = self.lie()
        self.steps = {name: tuple(self.of(r, name, i)) for r in roles.roles for i in range(r.copies)
                      for name in [f"{r.name}{i}" if r.copies > 1 else r.name]}
        for r in roles.roles:
            for name in self.instances(r):
                self.check(name)

    # -- which event makes what

    def make(self, r: Role, e: Event) -> None:
        node = self.node(r, e)
        if e.value in self.owner:
            raise IllegalRoles(f"{r.name}: {e}: {self.owner[e.value].name} makes {e.value} already")
        blocks = node.op is Op.TRI_SOLVE and bool(node["merges"])
        if (node.op is Op.DOT) != (e.do == "issue") or (e.do == "load" and node.op is not Op.LOAD) \
                or (node.op is Op.TRI_SOLVE or e.do == "solve") > (blocks and e.do == "solve"):
            raise IllegalRoles(f"{r.name}: {e}: {self.program.describe(node)} is not what one can {e.do}")
        self.owner[e.value] = r
        users = self.users.get(node, [])
        if node.op is Op.DOT and len(users) == 1 and users[0].op is Op.ELEM and users[0]["fn"] == "add":
            (x,) = (a for a in users[0].args if a is not node)
            sum_ = self.held.get(x, "")                    # onto which another product was added
            base = sum_ if sum_ in self.onto and self.owner[sum_] is r else \
                next((name for name, n in self.named.items() if n is x and Event("compute", name) in r.events), None)
            if base is not None:
                self.onto[e.value], node = base, users[0]
        self.held[node] = e.value

    def fetch(self, r: Role, e: Event) -> None:
        node = self.node(r, e)
        if len(node.axes) > 1:
            raise IllegalRoles(f"{r.name}: {e}: {self.program.describe(node)} is not what one can fetch: a number for each "
                               "row, or one")
        if (r.name, node) in self.fetched:
            raise IllegalRoles(f"{r.name}: {e}: it is fetched twice")
        self.fetched[r.name, node] = e.value

    def carried(self) -> None:
        """The carry's next value must be one product added onto what is left of it, in the role that keeps it."""
        self.carry: dict[str, str] = {}                    # the product that ends a chunk -> the carry's name
        for c in self.scan.carry_nodes():
            step = self.scan.nexts[self.scan.carries.index(c["name"])]
            last = self.held.get(step)
            if last not in self.onto:
                raise IllegalRoles(f"the carry {c['name']} must end as x + product, where one role computes x and issues the "
                                   f"product; it ends as {self.program.describe(step)}")
            self.carry[str(last)] = c["name"]
            self.held[c], self.owner[c["name"]] = c["name"], self.owner[str(last)]

    def lie(self) -> dict[str, str]:
        """The registers that hold each value, by the name of the value that they are named for."""
        homes: dict[str, str] = {}
        for product, base in self.onto.items():
            if base in self.onto:
                continue
            x = self.named[base]
            same = [v for v in self.inputs(x) if self.owner[v] is self.owner[base] and self.value(v).type == x.type]
            if len(same) != 1:
                raise IllegalRoles(f"{base} must scale one product or carry, element by element: {product} is added onto it")
            homes[base] = same[0]
        for product, base in self.onto.items():
            homes[product] = homes[base]
        return homes

    def value(self, name: str) -> Node:
        return next(n for n, v in self.held.items() if v == name)

    def node(self, r: Role, e: Event) -> Node:
        # a value may have the name of the tensor that it is made of
        table = self.stores if e.do == "store" else self.loaded if e.do == "fetch" else self.named
        if e.value not in table:
            raise IllegalRoles(f"{r.name}: {e}: no value is called {e.value}; there are {', '.join(sorted(table))}")
        return table[e.value]

    def inputs(self, node: Node) -> tuple[str, ...]:
        """The values that events make, of which a node is computed."""
        found: dict[str, None] = {}

        def walk(n: Node) -> None:
            if n in self.held:
                found.setdefault(self.held[n])
            else:
                for a in n.args:
                    walk(a)
        for a in node.args:
            walk(a)
        return tuple(found)

    def running(self, node: Node) -> str:
        """The running sum, if an event makes one, that ends with the sum `node`."""
        if node.op is not Op.REDUCE or node["fn"] != "sum":
            return ""
        return next((name for x, name in self.held.items()
                     if x.op is Op.CUMSUM and x.args == node.args and not dict(x.attr).get("reverse")), "")

    def across(self, node: Node) -> set[str]:
        """The values that a product reads lying across: tiles with two axes of tokens, of which it takes the twin."""
        found: set[str] = set()

        def walk(n: Node, across: bool) -> None:
            if n in self.held:
                found.update([self.held[n]] if across else [])
                return
            for a in n.args:
                walk(a, across or (n.op is Op.TWIN and {n["axis"], twin(n["axis"])} <= {*n.axes}))
        for a in node.args if node.op is Op.DOT else ():
            walk(a, False)
        return found

    def taken(self, r: Role, node: Node) -> Iterator[str]:
        """What a role has fetched, of that which a node is computed of."""
        if (r.name, node) in self.fetched:
            yield self.fetched[r.name, node]
        for a in node.args:
            if a not in self.held:
                yield from self.taken(r, a)

    # -- what a step touches

    def instances(self, r: Role) -> list[str]:
        return [f"{r.name}{i}" for i in range(r.copies)] if r.copies > 1 else [r.name]

    def split(self, name: str) -> int:
        """How many parts a value is in."""
        axes = self.value(name).axes
        return next((count for axis, count in self.axes.items() if axis in axes), 1)

    def written(self, r: Role, name: str) -> bool:
        """Whether a role computes a value to registers first, and to its ring later."""
        return Event("write", name) in r.events

    def registers(self, role: str, name: str, ahead: int = 0) -> Access:
        return Access(f"{role}:{self.homes.get(name, name)}", name, False, ahead)

    def fetches(self, role: str, name: str) -> Access:
        return Access(f"{role}:fetched {name}", name)

    def keeps(self, name: str, again: bool) -> bool:
        """Whether a value lies in registers: it has no ring, or its role reads it again, or it is added onto another."""
        if name in self.passed:
            if name not in self.rings:
                raise IllegalRoles(f"{name} lies in no thread's registers: it needs a ring")
            return False
        return again or name not in self.rings or name in self.onto

    def ring(self, name: str, part: int | None) -> Access:
        return Access(name if part is None else f"{name}_{part}", name, True)

    def of(self, r: Role, instance: str, copy: int) -> Iterator[Step]:
        here = {e.value for e in r.events if e.do not in ("load", "fetch", "store")}

        def source(name: str, part: int | None, own: bool = True) -> Access:
            """Where a value lies that is read here. What warps read of each other (not own) lies in a ring, their own too."""
            if own and ((name in here and name not in self.passed) or name in self.scan.carries):
                return self.registers(instance, name)
            if name not in self.rings:
                raise IllegalRoles(f"{instance} reads {name}, which {self.owner[name].name} makes: it needs a ring")
            return replace(self.ring(name, part if self.split(name) > 1 else None), own=own and name in here)

        for e in r.events:
            node = self.node(r, e)
            if e.do == "fetch":
                yield Step(e, node, "threads", (), (self.fetches(instance, e.value),))
                continue
            made = node.args[0] if e.do == "store" else node
            while e.do == "store" and made not in self.held and made.op is Op.CAST and made["dtype"] == "f32":
                (made,) = made.args                        # as it is, in more bits
            if e.do == "store" and made not in self.held:
                raise IllegalRoles(f"{instance}: {e}: no event of any role makes what is stored, "
                                   f"{self.program.describe(node.args[0])}")
            what = self.held[made] if e.do == "store" else e.value
            if e.do == "complete" and Event("issue", e.value) not in r.events:
                raise IllegalRoles(f"{instance}: {e}: it is not issued here")
            parts: list[int | None] = [copy] if r.copies > 1 else [*range(self.split(what))] if self.split(what) > 1 else [None]
            for part in parts:
                kept = self.registers(instance, e.value, int(e.value in self.carry))
                across = self.ring(e.value, part if e.value in self.owner and self.split(e.value) > 1 else None)
                again = any(e.value in self.inputs(self.node(r, o)) for o in r.events if o.do in ("compute", "issue", "store"))
                match e.do:
                    case "load":
                        yield Step(e, node, "copy", (), (across,), part)
                    case "store":
                        read = source(what, part)
                        yield Step(e, node, "copy" if read.ring and node.args[0].axes[1:] else "threads", (read,), (), part)
                    case "read":
                        yield Step(e, node, "threads", (across,), (kept,), part)
                    case "write":
                        if Event("compute", e.value) not in r.events or e.value not in self.rings:
                            raise IllegalRoles(f"{instance}: {e}: it is not computed here, or has no ring")
                        yield Step(e, node, "threads", (kept,), (across,), part)
                    case "complete":
                        yield Step(e, node, "threads", (), (), part)
                    case "join":
                        (inverse,) = (n for n in self.inputs(node) if n in self.matrices.values())
                        (matrix,) = (m for m, n in self.matrices.items() if n == inverse)
                        yield Step(e, node, "threads", (*(source(n, part, own=False) for n in self.inputs(node)),
                                                        source(matrix, part, own=False)), (across,), part)
                    case _:
                        made_of = (running,) if (running := self.running(node)) else self.inputs(node)
                        reads = tuple(source(n, part, own=n not in self.across(node)) for n in made_of)
                        reads += (self.registers(instance, self.onto[e.value]),) if e.value in self.onto else ()
                        reads += tuple(self.fetches(instance, n) for n in dict.fromkeys(self.taken(r, node)) if not running)
                        reads += tuple(self.before(instance, node, across) for s in self.stores.values() if s["sum"]
                                       and s.args[0] is node and e.do == "compute")[:1]
                        later = self.written(r, e.value)
                        writes = (*((across,) if e.value in self.rings and not later else ()),
                                  *((kept,) if self.keeps(e.value, again or later) else ()))
                        if e.do == "issue":
                            writes = (kept if e.value not in self.carry else Access(kept.cell, self.carry[e.value], False, 1),)
                        yield Step(e, node, "tensor" if e.do == "issue" else "threads", reads, writes, part)

    def before(self, instance: str, node: Node, ring: Access) -> Access:
        """What is stored summed over the members of a group: the sum of those before lies in the ring's only slot, where each
        thread adds to what it wrote."""
        name = self.held[node]
        if node.op is not Op.CAST or name not in self.rings or self.rings[name].depth != 1 or self.split(name) > 1:
            raise IllegalRoles(f"{instance}: {name} is stored summed: it must be rounded, and have a ring of one slot")
        return replace(ring, ahead=-1, own=True)

    def check(self, instance: str) -> None:
        """What a chunk issues it must complete, and compute of what it fetches."""
        steps = self.steps[instance]
        read = {a.cell for s in steps for a in s.reads}
        for s in steps:
            if s.event.do == "fetch" and s.writes[0].cell not in read:
                raise IllegalRoles(f"{instance}: {s}: it computes nothing of that")
        issued = [s.event.value for s in steps if s.event.do == "issue"]
        if issued:
            ends = [i for i, s in enumerate(steps) if s.event.do == "complete"]
            last = max(i for i, s in enumerate(steps) if s.event.do == "issue")
            after = [s.event.value for s in steps[last:] if s.event.do == "complete"]
            if not ends or not any(v == issued[-1] for v in after):
                raise IllegalRoles(f"{instance}: issue {issued[-1]} is not completed in its chunk")
