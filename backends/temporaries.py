"""What the kernels of a pipeline hand to each other, and where it lies: temporaries that are never needed at once share memory.

A temporary lives from the first kernel that touches it to the last. Kernels run one after another, and what is counted is when:
a follower runs beside the kernel before it, so that both are one moment. The largest temporary is placed first, each at the
lowest place that nothing alive at one of its moments has: in the memory of an output that is first written later, if it fits
there, and else in the one block that a call allocates. A temporary's last reader may also write something over it
(`overwritten`). What came out is kept for the next call of these sizes.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from gdn_ir.backends.base import STORED, Call, Kernel, Launch
from gdn_ir.nodes import At, Node, Op, Tensor, Tile
from gdn_ir.program import toposort

APART = 256                                                # bytes: temporaries start at multiples, as torch's own tensors do
BLOCK = ""                                                 # where temporaries lie that lie in no output: the block of a call
# Bytes: of a large piece of memory torch gives up to so much more than it was asked for, of what is smaller as much as that. So
# what is smaller is asked for by itself, where it lies at the block's end.
SMALL = 2 ** 20
REST = "the block's end"
HERE = nullcontext()


class Life(NamedTuple):
    """A tensor, a kernel that says how large it is, and the first and the last moment at which it is needed."""
    kernel: Kernel
    tensor: Tensor
    first: int
    last: int

    def span(self, call: Call) -> Span:
        number = math.prod(call.shape(self.kernel, self.tensor))
        return Span(self.first, self.last, number * STORED[self.tensor.dtype].itemsize)


class Span(NamedTuple):
    """What a place must hold: so many bytes, from the first moment to the last."""
    first: int
    last: int
    size: int


class View(NamedTuple):
    """How a temporary's tensor is made: what it lies in, from which byte on, its bytes, dtype and shape."""
    name: str
    where: str
    at: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Place(NamedTuple):
    """where: the output in whose memory a temporary lies, or BLOCK; at: from which byte on."""
    where: str
    at: int


def moments(kernels: Sequence[Kernel]) -> list[int]:
    """When each kernel runs: numbers from 1 on, a follower's that of the kernel that it runs beside; so one after a kernel that
    runs aside. At 0, before all of them, whoever launches them sets counts to zero."""
    before = [False, *(k.options.aside for k in kernels)]
    return list(accumulate(0 if k.beside or aside else 1 for k, aside in zip(kernels, before, strict=False)))


def temporaries(kernels: Sequence[Kernel]) -> dict[str, Life]:
    """What the kernels of a pipeline hand to each other and to no backward, by name."""
    found: dict[str, Life] = {}
    unset = uncleared(kernels)
    for now, k in zip(moments(kernels), kernels, strict=True):
        for t in k.tensors():
            if t.temp and not t.left:
                first = found[t.name].first if t.name in found else 0 if t.name in unset else now
                found[t.name] = Life(k, t, first, now)
    return found


def uncleared(kernels: Iterable[Kernel]) -> set[str]:
    """Counts that no kernel sets to zero."""
    kernels = list(kernels)
    every = {k.counts.name for k in kernels if k.counts} | {t.name for k in kernels for t in k.turns.values()}
    return every - {k.clears.name for k in kernels if k.clears}


def outputs(kernels: Sequence[Kernel]) -> dict[str, Life]:
    """What is written for the caller and never read, from the moment at which it first is: before that it may hold something
    else."""
    found: dict[str, Life] = {}
    read = {n for k in kernels for n in k.program.read()}
    end = len(kernels)
    for now, k in zip(moments(kernels), kernels, strict=True):
        for t in k.tensors():
            if not t.temp and t.name not in read:
                found.setdefault(t.name, Life(k, t, now, end))
    return found


def overwritten(kernels: Sequence[Kernel]) -> dict[str, tuple[str, ...]]:
    """Of temporaries, the tensor that their last reader may write in their place: where a block stores the one it has read the
    other, and nobody else reads that by then. Of one whose groups' members lie apart several, one after another in memory, as
    many as there are members. (Pointers that a compiler takes to be apart then are not; what is loaded is in use before the
    store that is made of it.)"""
    found: dict[str, tuple[str, ...]] = {}
    when, lives = moments(kernels), temporaries(kernels)
    begins = {n: life.first for n, life in (lives | outputs(kernels)).items()}
    for now, k in zip(when, kernels, strict=True):
        nodes = k.program.nodes()
        new = [n for n, at in begins.items() if at == now and n not in k.turns]
        stores = [n for n in nodes if n.op is Op.STORE and n["tensor"].name in new]
        for name in (n for n in k.program.read() if n in lives and lives[n].last == now):
            readers = [x for t, x in zip(when, kernels, strict=True) if t == now and name in x.program.read()]
            loads = [n for n in nodes if n.op is Op.LOAD and n["tensor"].name == name]
            if len(readers) == len(loads) == 1:
                taken = {n for names in found.values() for n in names}
                places = [s["tensor"].name for s in stores if _in_place(loads[0], s)][:1]
                places = places or [s["tensor"].name for s in stores if _in_groups_place(k, loads[0], s)]
                found |= {name: tuple(places)} if places and not taken & {*places} else {}
    return found


def _in_place(load: Node, store: Node) -> bool:
    """Whether a store is to where a load was from, of what is made of that element by element, each by the thread that has it,
    or by way of a product, of which all operands must be there."""
    a, b = load["tensor"], store["tensor"]
    if (a.dims, STORED[a.dtype], load["index"]) != (b.dims, STORED[b.dtype], store["index"]) or store["sum"] or \
            len(load.axes) < 2:                            # rows alone several warps or roles may read, each for itself
        return False
    made: dict[Node, bool | None] = {load: False}          # True by way of a product, None by a sum or twin alone
    for n in toposort([store.args[0]]):
        ways = [made[x] for x in n.args if x in made]
        if True in ways or (n.op is Op.DOT and ways):
            made[n] = True                                 # whatever else is made of it: by then all is there
        elif ways:
            alike = n.axes == load.axes and n.op in (Op.ELEM, Op.CAST, Op.SELECT) and None not in ways
            made[n] = False if alike else None
    return made.get(store.args[0]) is not None


def _in_groups_place(kernel: Kernel, load: Node, store: Node) -> bool:
    """Whether a store of a sum over a group is to where one member's rows of the same chunk are from, which a block of roles,
    who takes all members in turn, has by then."""
    a, b = load["tensor"], store["tensor"]
    if not a.members or kernel.gathers != a.members or store["sum"] != a.members[:1] or len(a.dims) != len(b.dims):
        return False
    alike = not b.temp and STORED[a.dtype] == STORED[b.dtype] and not kernel.splits and load in toposort([store.args[0]])
    for mine, its in zip(load["index"], store["index"], strict=True):
        match mine, its:
            case At(grid, None), At(other, share):
                alike &= (grid, share) == a.members and other == grid
            case Tile(axis), Tile(other):
                alike &= kernel.extents[axis] == kernel.extents[other] and mine.__class__ is its.__class__ is Tile
            case _:
                alike &= mine == its
    return alike


def in_chains(temps: Mapping[str, Span], hosts: Mapping[str, Span], over: Mapping[str, tuple[str, ...]]) \
        -> tuple[dict[str, Span], dict[str, Span], dict[str, str]]:
    """Temporaries and outputs, what is written over each other as one of them, needed from when the first is; and of the others
    which one (the first, where it is several)."""
    spans, part_of = {**temps, **hosts}, dict[str, str]()
    for name in temps:
        ends: tuple[str, ...] = (name,)
        while len(ends) == 1 and {*over.get(ends[0], ("",))} <= spans.keys():
            ends = over[ends[0]]
        if ends != (name,):
            part_of[name] = ends[0]
            for end in ends:
                spans[end] = spans[end]._replace(first=min(spans[end].first, temps[name].first))
    return {n: spans[n] for n in temps if n not in part_of}, {n: spans[n] for n in hosts}, part_of


def placed(temps: Mapping[str, Span], hosts: Mapping[str, Span], over: Mapping[str, tuple[str, ...]] = {}) \
        -> tuple[dict[str, Place], int]:
    """Where each temporary lies, and how large the block is. hosts: outputs in whose memory they may lie until those begin.
    over: what is written in whose place."""
    temps, hosts, part_of = in_chains(temps, hosts, over)
    found: dict[str, Place] = {}
    ends = {n: -(-s.size // APART) * APART for n, s in temps.items()}
    for name in sorted(temps, key=lambda n: -temps[n].size):                   # in the pipeline's order where they are equal
        first, last, size = temps[name]
        beside = [n for n in found if temps[n].first <= last and first <= temps[n].last]
        for where in (*(n for n, host in hosts.items() if last < host.first), BLOCK):
            at = 0
            for start, end in sorted((found[n].at, found[n].at + ends[n]) for n in beside if found[n].where == where):
                if at + size <= start:
                    break
                at = max(at, end)
            if where == BLOCK or at + size <= hosts[where].size:
                found[name] = Place(where, at)
                break
    size = max((p.at + ends[n] for n, p in found.items() if p.where == BLOCK), default=0)
    return found | {n: Place(end, 0) if end in hosts else found[end] for n, end in part_of.items()}, size


def in_a_row(memory: Mapping[str, torch.Tensor], names: Iterable[str]) -> tuple[str, ...]:
    """These tensors in the order in which they lie one right after another in one piece of memory; the first alone, if they
    do not."""
    at = sorted(names, key=lambda n: memory[n].data_ptr())
    for a, b in pairwise(at):
        x, y = memory[a], memory[b]
        if x.data_ptr() + x.nbytes != y.data_ptr() or x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr():
            return (at[0],)
    return tuple(at)


def as_large(spans: Mapping[str, Span], over: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Of what may be written in a temporary's place, as many as are just as large."""
    found = {}
    for name, names in over.items():
        sizes = [*accumulate(spans[n].size for n in names)]
        if spans[name].size in sizes:
            found[name] = names[:sizes.index(spans[name].size) + 1]
    return found


def end_of_large(parts: Mapping[str, tuple[int, int]]) -> int:
    """Where the block's first part ends, which has all that is not small, and whatever else begins in it. parts: where in the
    block each begins, and its bytes."""
    end = max((at + size for at, size in parts.values() if size >= SMALL), default=0)
    while (reach := max((at + size for at, size in parts.values() if at < end), default=0)) > end:
        end = reach
    return -(-end // APART) * APART


def in_order(kernels: Sequence[Kernel], launches: Sequence[Launch], hosted: bool = False) -> Launch:
    """A pipeline's launches one after another, their temporaries parts of one block; hosted: or of outputs, and over each
    other, where each block of a kernel reads what it needs of a tensor once (`Backend.loads_once`; roles do)."""
    temps, unset = temporaries(kernels), uncleared(kernels)
    hosts, over = (outputs(kernels), overwritten(kernels)) if hosted else ({}, {})
    several = {n: names for n, names in over.items() if len(names) > 1}

    def planned(call: Call, rows: Mapping[str, tuple[str, ...]]) -> tuple[dict[str, int], list[View]]:
        """Bytes of the block's two parts, and of each temporary how a tensor of it is made."""
        spans, free = ({n: life.span(call) for n, life in some.items()} for some in (temps, hosts))
        places, total = placed(spans, free, as_large({**spans, **free}, {**over, **rows}))
        large = end_of_large({n: (p.at, spans[n].size) for n, p in places.items() if p.where == BLOCK})
        places |= {n: Place(REST, p.at - large) for n, p in places.items() if p.where == BLOCK and p.at >= large}
        views = [View(name, *places[name], spans[name].size, STORED[t.dtype], call.shape(k, t))
                 for name, (k, t, *_) in temps.items()]
        return {BLOCK: large, REST: total - large}, views

    def run(memory: Mapping[str, torch.Tensor], params: Mapping[str, float], call: Call) -> None:
        device = next(iter(memory.values())).device
        rows = {n: in_a_row(memory, names) for n, names in several.items()}
        key = ("temporaries", *rows.values())
        if (plan := call.memo.get(key)) is None:
            plan = call.memo[key] = planned(call, rows)
        sizes, views = plan
        every, bases = dict(memory), dict[str, torch.Tensor]()
        for where in dict.fromkeys(v.where for v in views):
            bases[where] = torch.empty(sizes[where], dtype=torch.uint8, device=device) if where in sizes else \
                memory[where].view(-1).view(torch.uint8)
        for v in views:                                    # of outputs in a row the first's memory goes on in the next's
            base = bases[v.where]
            every[v.name] = base.as_strided((v.size,), (1,), base.storage_offset() + v.at).view(v.dtype).view(v.shape)
        for name in unset:
            every[name].zero_()
        elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if elsewhere else HERE:                 # launches go to the tensors' device
            launched(kernels, launches, every, params, call, device.type == "cuda")
    return run


def launched(kernels: Sequence[Kernel], launches: Sequence[Launch], memory: Mapping[str, torch.Tensor],
             params: Mapping[str, float], call: Call, cuda: bool) -> None:
    """One after another; what runs aside in another stream, from what is before it to the end of the kernel after it."""
    aside: torch.cuda.Stream | None = None
    for kernel, launch in zip(kernels, launches, strict=True):
        if kernel.options.aside and cuda:
            here = torch.cuda.current_stream()
            aside = stream(here.device_index, here.cuda_stream)
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                launch(memory, params, call)
            continue
        try:
            launch(memory, params, call)
        finally:                                           # whatever became of it: memory that is given back is at rest
            if aside is not None:
                torch.cuda.current_stream().wait_stream(aside)
                aside = None


@lru_cache(maxsize=64)
def stream(device: int, beside: int) -> torch.cuda.Stream:
    """What runs aside of one stream of a device."""
    return torch.cuda.Stream(device)
