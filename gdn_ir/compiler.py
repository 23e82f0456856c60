"""From a program and a schedule to something that runs: plan, fit to extents, machine numbers, padding, split, backend."""
from __future__ import annotations

import math
import sys
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import torch

from gdn_ir.ahead import not_compiled
from gdn_ir.artifacts import NotCompiled
from gdn_ir.autodiff import backward
from gdn_ir.backends.base import TORCH, Backend, Call, Kernel, Launch, Source
from gdn_ir.backends.temporaries import in_order
from gdn_ir.environment import switched
from gdn_ir.follow import beside, clears, first_beside, followers
from gdn_ir.inverse import doubled
from gdn_ir.legalize import collapse, small_products, split_products, ungrouped
from gdn_ir.nodes import RUNS_ALONG, At, IRError, Op, Part, Rows, Tensor, base
from gdn_ir.padding import pad
from gdn_ir.precision import precision, storage
from gdn_ir.program import Program, tile_axes, token_chains
from gdn_ir.programs.gated_delta import Switches, build
from gdn_ir.rewrite import simplify
from gdn_ir.schedules import steps
from gdn_ir.schedules.partition import parallel
from gdn_ir.schedules.plans import CHUNK, KEEP, left
from gdn_ir.schedules.schedule import KernelOptions, Schedule
from gdn_ir.schedules.segments import segments
from gdn_ir.schedules.pipeline import IllegalStep
from gdn_ir.split import in_turn, parts
from gdn_ir.split import split as split_axis

NAMES = {v: k for k, v in TORCH.items()}
LARGEST = 256                                              # of K and of V


class Unsupported(ValueError):
    """A backend declines a kernel; the message is its reason."""


@dataclass(frozen=True)
class Instance:
    """All that is fixed when a kernel of the gated delta rule is compiled. io: dtype of q, k, v, o; beta: of beta.

    grads: inputs whose gradients are computed: then it is the backward, which reads d_o (and d_final_state) and writes d_q, ...
    grouped: in the backward, whether value heads may share a key head (HV > H), so that d_q and d_k are sums over them.
    recurrent: asked for one token at a time, as in decoding (forward only).
    keep: what a forward leaves to its backward, and a backward is given (`schedules.plans.KEEP`): then both take chunks of 64.
    """
    switches: Switches
    K: int
    V: int
    io: str
    beta: str
    varlen: bool
    grads: tuple[str, ...] = ()
    grouped: bool = True
    recurrent: bool = False
    keep: str = "nothing"

    def __post_init__(self) -> None:
        unknown = set(self.grads) - set(program_of(self.switches).read())
        if unknown:
            raise ValueError(f"grads: got {', '.join(sorted(unknown))}; accepts {', '.join(program_of(self.switches).read())}")
        if self.recurrent and self.grads:
            raise ValueError("recurrent: got True with grads; accepts False in a backward")
        if self.keep not in KEEP or (self.recurrent and self.keep != "nothing"):
            raise ValueError(f"keep: got {self.keep!r}; accepts {', '.join(KEEP[:1] if self.recurrent else KEEP)}")
        for name, dtype in (("dtype", self.io), ("beta's dtype", self.beta)):
            if dtype not in TORCH:
                raise ValueError(f"{name}: got {dtype!r}; accepts {', '.join(TORCH)}")
        for name, size in (("K", self.K), ("V", self.V)):
            if not 0 < size <= LARGEST or size % 16:
                raise ValueError(f"{name}: got {size}; accepts a multiple of 16 from 16 to {LARGEST}")

    def __str__(self) -> str:
        name = program_of(self.switches).name.replace("_", " ")
        on = [f for f, v in vars(self.switches).items() if v is True and f != "erase"]
        beta = "" if self.beta == self.io else f" (beta {self.beta})"
        back = [f"gradients of {' '.join(self.grads)}", f"heads {'' if self.grouped else 'not '}grouped"] if self.grads else []
        layout = "packed" if self.varlen else "dense"
        back += ["one token at a time"] if self.recurrent else []
        back += [f"{'given' if self.grads else 'leaves'} {' '.join(self.left) or 'nothing'}"] if self.keep != "nothing" else []
        return ", ".join([name, *back, f"{self.io}{beta}", f"K x V {self.K} x {self.V}", layout, *on])

    @property
    def program(self) -> Program:
        """What it runs, as derived or traced, before any schedule."""
        return backward_of(self.switches, self.grads, self.grouped) if self.grads else program_of(self.switches)

    @property
    def left(self) -> tuple[str, ...]:
        """The tensors that the forward leaves to the backward."""
        return left(self.keep, self.switches.decay == "scalar", self.switches.erase)

    @property
    def sizes(self) -> dict[str, int]:
        return {"K": self.K, "V": self.V}

    @property
    def dtypes(self) -> dict[str, str]:
        wide = {"f32": "f64"} if self.io == "f64" else {}  # in float64, decays and states are float64 too
        return {"io": self.io, "beta": self.beta, **wide}


def lower(program: Program, schedule: Schedule, backend: Backend, arch: str, sizes: Mapping[str, int],
          dtypes: Mapping[str, str], varlen: bool, origin: str = "") -> tuple[Kernel, ...]:
    """The kernels of a program under a schedule. sizes: extents of its tile axes but the tokens'; dtypes: of its tensors'
    storage names ("io" first of all). Raises IllegalStep or IRError naming the node that a step or a pass refuses."""
    io = dtypes["io"]
    rest = "f64" if io == "f64" else "f32"
    tokens = set(token_chains(program.nodes()))
    extents = {**sizes, **{a: schedule.chunk for a in tokens}}
    for a in tile_axes(program):
        if a not in extents:
            raise IRError(f"sizes: axis {a} of {program.name} has no extent; given: {', '.join(sorted(extents))}")
    if schedule.chunk == 1:
        for a in tokens:
            program = collapse(program, a)
    for name, *rest_of_step in schedule.steps:
        if name == "merge" and rest_of_step[1] != schedule.chunk:
            raise steps.IllegalStep(f"merge: doubles blocks up to {rest_of_step[1]} rows, but a chunk has {schedule.chunk}")
    pipeline = planned(program, schedule.steps)
    inner = {p.name: {a for scan in p.scans() for a in scan["chain"][1:]} - extents.keys() for p in pipeline}
    extents |= dict.fromkeys(set().union(*inner.values()), segments(schedule.steps) or 0)
    walks = {str(step[1]): int(step[2]) for step in schedule.steps if step[0] == "walk"}          # of the same name elsewhere
    stray = {name for name, _ in schedule.kernels} - {p.name for p in pipeline} - {"*"}
    if stray:
        raise steps.IllegalStep(f"kernels: no kernel is called {', '.join(sorted(stray))}; the plan makes "
                                f"{', '.join(p.name for p in pipeline)}")
    makers = {p.name: maker(schedule.options(p.name), backend) for p in pipeline}
    whole = {n: {a: e if a in tokens else b.tile(a, e, arch) for a, e in extents.items()} for n, b in makers.items()}
    split: dict[str, int] = {}                             # tiles of V, and of a matrix's columns, by kernel
    turned: dict[str, int] = {}
    for p in pipeline:
        tile, axis = schedule.options(p.name).v_tile, columns(p, tokens)
        if makers[p.name].splits_grid and tile is not None and axis and tile < whole[p.name][base(axis)]:
            (split if axis == "V" else turned)[p.name] = tile
    turns = {p.name: tile for p in pipeline if (tile := schedule.options(p.name).k_tile) and makers[p.name].splits_grid
             and "K" in tile_axes(p) and whole[p.name]["K"] > tile}            # K stepped through
    for name, tile in turns.items():
        if extents["K"] % tile:
            raise steps.IllegalStep(f"kernels: {name}.k_tile: got {tile}; accepts a divisor of K = {extents['K']}, or None")
    pipeline = parts(pipeline, "V", split)
    pipeline = tuple(split_axis(p, str(columns(p, tokens))) if p.name in turned else p for p in pipeline)
    pipeline = tuple(in_turn(p, "K") if p.name in turns else p for p in pipeline)
    extents |= {"K#": extents["K"] // min(turns.values())} if turns else {}
    for p in pipeline:
        if any("V#" in p.tensors()[n].dims for n in p.written()):
            extents["V#"] = -(-extents["V"] // split[p.name])
    followed = followers(pipeline, {p.name for p in pipeline if schedule.options(p.name).follows})
    beside(pipeline, {p.name for p in pipeline if schedule.options(p.name).aside}, followed)
    counting = {j: counts for scans in followed.values() for j, counts in scans.items()}
    cleared: dict[int, Tensor] = {}                        # by the last kernel before the scan that can
    for j, counts in counting.items():
        able = [m for m in range(first_beside(j, followed)) if m not in cleared and clears(pipeline[m], pipeline[j])]
        cleared |= {able[-1]: counts} if able else {}
    kernels: list[Kernel] = []
    for i, p in enumerate(pipeline):
        options = schedule.options(p.name)
        b = maker(options, backend)                        # not of `makers`: a kernel may have come to sum up parts
        own = extents | dict.fromkeys(inner[p.name], walks[p.name]) if p.name in walks else extents
        products = rest if rest == "f64" else schedule.dot if schedule.dot != "io" else b.products(io, arch)
        p = small_products(doubled(p, partial(b.joins, options)), extents)
        p = precision(storage(p, **dtypes), products, rest)
        p = split_products(p) if b.reads_tf32(arch) else p
        p = simplify(p)
        tiles = {a: e if a in tokens else b.tile(a, e, arch) for a, e in own.items() if not a.endswith("#")}
        tiles |= {"V": split[p.name]} if p.name in split else {}
        tiles |= {"K": turns[p.name]} if p.name in turns else {}
        tiles |= {str(columns(p, tokens)): turned[p.name]} if p.name in turned else {}
        padded = {a for a in tile_axes(p) if a in tokens or own[a] % tiles[a]}
        p = pad(p, frozenset(padded))
        whole_tiles = {j: -(-extents["V"] // kernels[j].columns) * kernels[j].columns for j in followed.get(i, ())}
        awaits = tuple((t, whole_tiles[j], bool(pipeline[j].roots[0]["reverse"])) for j, t in followed.get(i, {}).items())
        turn = turns_of(p) if b.in_turn else {}
        if turn and not options.around and len({backwards for _, _, backwards in awaits}) == 2:
            raise steps.IllegalStep(f"kernels: {p.name}.around: got false where it follows two scans, its blocks in turns, "
                                    "who would wait for others that start later; accepts true")
        kernels.append(Kernel(p.name, p, own, tiles, options, varlen, origin, counting.get(i), awaits,
                              cleared.get(i), i in followed, i + 1 in followed, turns=turn))
    return swept(tuple(kernels), backend)


def turns_of(p: Program) -> dict[str, Tensor]:
    """Of what a program of all chunks at once stores summed over grid points that share a row: for each chunk, place and part
    that a loop has reached, how many have stored. (By name.)"""
    found = {}
    for n in p.nodes():
        shares = {t.grid: t.share for t in n["index"] if isinstance(t, At) and t.share} if n.op is Op.STORE and n["sum"] else {}
        if set(shares) == set(n["sum"] if shares else ()) != set() and isinstance(n["index"][0], Rows) and parallel(p):
            parts = (t.scan for t in n["index"] if isinstance(t, Part))
            found[n["tensor"].name] = Tensor(f"{n['tensor'].name}_turn", ("X", *map(str, shares.values()), *parts), "int", True)
    return found


def maker(options: KernelOptions, backend: Backend) -> Backend:
    """Which backend makes a kernel with these options, in a pipeline of `backend`'s."""
    from gdn_ir.backends import BACKENDS
    if options.backend and options.backend not in BACKENDS:
        raise Unsupported(f"backend: got {options.backend!r}; accepts {', '.join(BACKENDS)}")
    return BACKENDS[options.backend] if options.backend else backend


def swept(kernels: tuple[Kernel, ...], backend: Backend) -> tuple[Kernel, ...]:
    """The pipeline, in which the rows past the last sequence of what a serial kernel stores are cleared by a kernel of another
    backend that takes all chunks at once, if there is one (one that comes later, if it can be: until then the memory serves
    others): it need only start one block more for them. Where there is none, roles do it themselves, who stores having time:
    of whole sequences each some of the rows, else in blocks of their own; but not those whose blocks take heads in turn."""
    left = tuple(s for k in kernels if k.varlen and not k.owns_tail for s in k.row_outputs)
    points = {t.grid for s in left for t in s["index"] if isinstance(t, At)}

    def able(k: Kernel) -> bool:
        alone = k.parallel is not None and len(k.parallel.chain) == 1 and not k.splits
        return alone and bool(k.options.backend) and maker(k.options, backend).sweeps and points <= set(k.program.grid)
    behind = max((i for i, k in enumerate(kernels) if {*k.row_outputs} & {*left}), default=0)
    one = next((k for k in (*kernels[behind:], *kernels) if able(k)), None)
    if one is not None and left:
        return tuple(replace(k, sweeps=left) if k is one else k for k in kernels)
    return tuple(replace(k, sweeps=k.row_outputs) if k.options.roles and k.varlen and not k.gathers else k for k in kernels)


def columns(program: Program, tokens: Container[str]) -> str | None:
    """The axis that a kernel's v_tile divides: V; where there is none, that of a matrix's columns, a twin that nothing sums."""
    if "V" in tile_axes(program):
        return "V"
    twins = {a for n in program.nodes() for a in n.axes if a != base(a) and base(a) not in tokens}
    run = {n[RUNS_ALONG[n.op]] for n in program.nodes() if n.op in RUNS_ALONG}
    return min(twins - run, default=None)


@lru_cache(maxsize=64)
def planned(program: Program, plan: tuple[tuple[str | int, ...], ...]) -> steps.Pipeline:
    """A plan applied: the same for all options of its kernels, which a tuner varies by the hundred."""
    return steps.apply(program, plan)


@dataclass(frozen=True)
class Compiled:
    """Kernels of one program, compiled when first called."""
    kernels: tuple[Kernel, ...]
    backend: Backend
    arch: str

    @cached_property
    def makers(self) -> tuple[Backend, ...]:
        """The backend of each kernel."""
        return tuple(maker(k.options, self.backend) for k in self.kernels)

    @property
    def by_address(self) -> bool:
        """Whether no kernel reads anything of a tensor but its address and device."""
        return all(b.by_address for b in self.makers)

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        return tuple(b.emit(k, self.arch) for b, k in zip(self.makers, self.kernels, strict=True))

    @cached_property
    def launches(self) -> tuple[Launch, ...]:
        if switched("GDN_IR_PRINT"):
            print(*(s.text for s in self.sources), sep="\n", file=sys.stderr)
        every = zip(self.makers, self.kernels, self.sources, strict=True)
        return tuple(b.compile(k, s, self.arch) for b, k, s in every)

    @cached_property
    def joined(self) -> Launch:
        """All launches as one."""
        alike = all(b is self.backend for b in self.makers) and not any(k.options.aside for k in self.kernels)
        if alike:
            return self.backend.join(self.kernels, self.launches)
        once = all(b.loads_once or k.options.roles for b, k in zip(self.makers, self.kernels, strict=True))
        return in_order(self.kernels, self.launches, hosted=once)

    @cached_property
    def tails(self) -> tuple[str, ...]:
        """Outputs whose rows past the last sequence no kernel clears."""
        cleared = {n["tensor"].name for k in self.kernels if k.owns_tail for n in k.sweeps}
        left = {n["tensor"].name: None for k in self.kernels if not k.owns_tail for n in k.row_outputs}
        return tuple(n for n in left if n not in cleared)

    def __call__(self, memory: Mapping[str, torch.Tensor], params: Mapping[str, float], call: Call) -> None:
        """Run the kernels in order. memory: contiguous tensors by name, outputs too."""
        if self.backend.functional:
            for name, x in self.apply(memory, params, call).items():
                memory[name].copy_(x)
            return
        self.joined(memory, params, call)
        if call.cu_seqlens is not None:
            for name in self.tails:
                self.backend.clear_tail(memory[name], call)

    def apply(self, memory: Mapping[str, torch.Tensor], params: Mapping[str, float], call: Call) -> dict[str, torch.Tensor]:
        """The functional form, where the backend has one: returns the outputs, and torch can differentiate it."""
        values = dict(memory)
        outputs: dict[str, torch.Tensor] = {}
        for launch in self.launches:
            result = launch(values, params, call)
            if result is None:
                raise Unsupported(f"{self.backend.name} has no functional form: its kernels write into memory")
            values |= result
            outputs |= result
        return {name: outputs[name] for k in self.kernels for t in k.tensors() for name in [t.name]
                if (not t.temp or t.left) and name in k.program.written()}


@lru_cache(maxsize=1024)
def program_of(switches: Switches) -> Program:
    return build(switches)


@lru_cache(maxsize=1024)
def backward_of(switches: Switches, grads: tuple[str, ...], grouped: bool) -> Program:
    program = backward(program_of(switches), grads)
    return program if grouped else replace(ungrouped(program), forward=ungrouped(program_of(switches)))


@dataclass(frozen=True)
class Variant:
    """One way to run an instance: what the registry chooses among. Compilation happens at the first call."""
    backend: str
    instance: Instance
    schedule: Schedule
    arch: str
    compiled: Compiled = field(compare=False, repr=False)
    memos: dict[tuple[int, ...], dict[Any, Any]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.compiled.sources

    def call_of(self, tensors: Mapping[str, torch.Tensor], sequences: int, cu_seqlens: torch.Tensor | None) -> Call:
        *rows, h, _ = tensors["q"].shape
        tokens, hv = math.prod(rows), tensors["v"].shape[-2]
        length = tokens if cu_seqlens is not None else tokens // max(sequences, 1)
        memo = self.memos.get((sequences, tokens, h, hv))
        if memo is None:
            if len(self.memos) >= 4096:                    # as many lengths as the registry remembers
                self.memos.clear()
            memo = self.memos[sequences, tokens, h, hv] = {}
        return Call(sequences, tokens, length, {"H": h, "HV": hv}, cu_seqlens, memo)

    def __call__(self, tensors: Mapping[str, torch.Tensor], scale: float, sequences: int,
                 cu_seqlens: torch.Tensor | None = None) -> None:
        """tensors: packed and contiguous: q, k [T, H, K]; v, o [T, HV, V]; g (float32), beta [T, HV]; initial_state,
        final_state [N, HV, K, V] float32 ([N, HV, V, K] with state_v_first). Writes o and final_state. A backward instance
        takes d_o and d_final_state, shaped as what they are gradients of, and writes d_q, ... (those of `grads`). Where the
        backend is `by_address`, T may also be two dimensions, B and T."""
        self.run(tensors, scale, self.call_of(tensors, sequences, cu_seqlens))

    def run(self, tensors: Mapping[str, torch.Tensor], scale: float, call: Call) -> None:
        """The same for who kept the sizes (and the memo) of such a call."""
        try:
            self.compiled(tensors, {"scale": float(scale)}, call)
        except NotCompiled as e:
            raise not_compiled(self, call, e) from None

    def apply(self, tensors: Mapping[str, torch.Tensor], scale: float, sequences: int,
              cu_seqlens: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The same without writing: returns {"o": ..., "final_state": ...}; differentiable (torch backend only)."""
        return self.compiled.apply(tensors, {"scale": float(scale)}, self.call_of(tensors, sequences, cu_seqlens))


@lru_cache(maxsize=1024)
def variant(instance: Instance, schedule: Schedule, backend: str, arch: str) -> Variant:
    """Lower an instance under a schedule for a backend and an architecture ("sm_80", "sm_90", "cpu", or "torch" for that
    backend). Raises Unsupported with the backend's reason, or IllegalStep where the schedule does not fit the program."""
    from gdn_ir.backends import BACKENDS
    if backend not in BACKENDS:
        raise Unsupported(f"backend: got {backend!r}; accepts {', '.join(BACKENDS)}")
    b = BACKENDS[backend]
    origin = f"{instance}\nschedule {schedule}"
    kernels = lower(instance.program, schedule, b, arch, instance.sizes, instance.dtypes, instance.varlen, origin)
    for k in kernels:
        made_by = maker(k.options, b)
        if made_by.functional != b.functional:
            raise Unsupported(f"backend: {k.name} by {made_by.name} and the rest by {b.name} cannot hand memory to each other")
        reason = made_by.supports(k, arch)
        if reason is not None:
            raise Unsupported(str(reason))
    shared = {t.name for k in kernels for t in k.tensors() if t.left}
    agreed = shared <= set(instance.left) if instance.grads else shared == set(instance.left)
    if not agreed or (shared and schedule.chunk != CHUNK):
        does = "are given" if instance.grads else "leave"
        raise IllegalStep(f"keep: {instance.keep} is {', '.join(instance.left) or 'nothing'} of chunks of {CHUNK}, and the "
                          f"schedule's kernels {does} {', '.join(sorted(shared)) or 'nothing'} of chunks of {schedule.chunk}")
    return Variant(backend, instance, schedule, arch, Compiled(kernels, b, arch))


__all__ = ["NAMES", "TORCH", "Compiled", "Instance", "Unsupported", "Variant", "lower", "variant"]
