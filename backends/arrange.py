"""The order of statements in a loop over parts of a tile axis, in which a block holds little at once: found by search.

The loop's ends (stores, sums that it carries, and each sum of tiles on the way) are placed one after another, each with what it
needs. What is weighed is what registers hold and what shared memory does, where operands of products lie, as long as that is
more than there is room for; and then for how long registers hold it. In which order a sum's addends are added is searched too.
"""
from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterator
from dataclasses import replace

from gdn_ir.backends.base import Kernel
from gdn_ir.backends.held import Held
from gdn_ir.nodes import Node, Op
from gdn_ir.program import Program, ScanView, Scopes, substitute, uses
from gdn_ir.verify import verify

EASILY = 128                                               # registers of a thread that tiles may fill: half of all
ROOM = 40 << 10                                            # bytes of shared memory that the loop's tiles may fill
WAYS = 100                                                 # orders that the search keeps
Cost = tuple[int, int, int]


def arranged(kernel: Kernel) -> tuple[Program, list[Node]]:
    """A kernel's program, its sums in the order of the best way that was found, and the ends of its loop over parts in that
    order."""
    found = [(search(kernel, p), p) for p in _associations(kernel.program)]
    (_, order), program = min(found, key=lambda f: f[0][0])
    return program, order


def is_sum(n: Node) -> bool:
    """Whether a node adds tiles."""
    return n.op is Op.ELEM and n["fn"] in ("add", "sub") and len(n.axes) > 1


def search(kernel: Kernel, program: Program) -> tuple[Cost, list[Node]]:
    """The order of the loop's ends in which the most that registers hold at once is least, if it is more than they hold easily;
    then the most that shared memory holds, likewise; then what registers hold from end to end, summed up; as far as a search of
    few ways at a time finds it. A product that is only added is added where it is made. Sets of nodes are bits of a number."""
    scan = next(s for s in program.scans() if ScanView.of(s).parts)
    view, scopes, measure = ScanView.of(scan), Scopes(program.roots), Held(kernel, uses(program.nodes()))
    nodes = [n for n in program.nodes() if view.axis in scopes[n]]
    ends = list(dict.fromkeys([*view.effects, *view.nexts, *(n for n in nodes if is_sum(n))]))
    bit = {n: 1 << i for i, n in enumerate(nodes)}
    below: dict[Node, int] = {}
    for n in nodes:
        below[n] = bit[n] | functools.reduce(operator.or_, (below.get(a, 0) for a in n.args), 0)
    first = {n: sum(bit[e] for e in ends if e is not n and bit[e] & below[n]) for n in ends}       # ends below it
    costs = []
    for n in nodes:
        users = [u for u in measure.takers(n) if u in bit]
        added = n.op is Op.DOT and len(users) == 1 and users[0].op is Op.ELEM and users[0]["fn"] == "add"
        if measure.size(n) and not added:
            plain, dots = (sum({bit[u] for u in users if (u.op is Op.DOT) == dot}) for dot in (False, True))
            costs.append((bit[n], plain, dots, measure.size(n)))

    def held(done: int) -> tuple[int, int]:
        made = [cost for cost in costs if cost[0] & done]
        return sum(size for _, plain, _, size in made if plain & ~done), sum(size for *_, dots, size in made if dots & ~done)
    easily = kernel.options.num_warps * 32 * EASILY * 4
    ways: dict[int, tuple[Cost, list[Node]]] = {0: ((easily, ROOM, 0), [])}
    for _ in ends:
        found: dict[int, tuple[Cost, list[Node]]] = {}
        for done, (cost, order) in ways.items():
            for n in (n for n in ends if not bit[n] & done and first[n] & done == first[n]):
                after = done | below[n]
                now, then = held(after & ~bit[n]), held(after)
                new = max(cost[0], now[0], then[0]), max(cost[1], now[1], then[1]), cost[2] + then[0]
                if after not in found or new < found[after][0]:
                    found[after] = new, [*order, n]
        ways = dict(sorted(found.items(), key=lambda way: way[1][0])[:WAYS])
    return min(ways.values(), key=lambda way: way[0])


def _associations(program: Program) -> Iterator[Program]:
    """The program with the longest of its sums of three or four tiles added in each order (a first pair has but one)."""
    users = uses(program.nodes())

    def addends(n: Node) -> list[Node]:
        inner = is_sum(n) and n["fn"] == "add"
        return [x for a in n.args for x in (addends(a) if len(users[a]) == 1 else [a])] if inner else [n]
    sums = [n for n in program.nodes() if is_sum(n) and 3 <= len(addends(n)) <= 4]
    yield program
    root = max(sums, key=lambda n: len(addends(n)), default=None)
    if root is not None:
        parts = addends(root)
        for order in itertools.permutations(range(len(parts))):
            if order[0] < order[1]:
                memo = substitute(program.roots, {root: functools.reduce(operator.add, (parts[i] for i in order))})
                notes = {memo.get(n, n): note for n, note in program.notes.items()}
                yield verify(replace(program, roots=tuple(memo[r] for r in program.roots), notes=notes))
