"""Runs an emitted role kernel on the CPU: its text, as Python, once for each role and block, each in a thread of its own.

One thread stands for all of a role, but in a macro each lane of its warps has one, and they meet where they shuffle, load
matrices together or multiply them; barriers, rings and registers are as on the GPU; bfloat16 rounds. Products run when they
are issued or, with `late`, when they are waited for: both are what tensor cores may do. What lies past a tensor's end is NaN.
"""
from __future__ import annotations

import ast
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ml_dtypes                                           # TileLang brings it
import numpy as np
import torch

from gdn_ir.backends.base import Call, Kernel, Source, blocks
from gdn_ir.backends.tilelang import emit

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "int32": np.int32, "float16": np.float16}
SECONDS = 60


class Buffer(np.ndarray):                                  # type: ignore[type-arg]
    """A tile that can be a key, as the text has it."""
    __hash__ = object.__hash__                             # type: ignore[assignment]


class Addressed(Buffer):
    """The same within a macro, where an element's address may be asked for."""
    asked = threading.local()

    def __getitem__(self, at: Any) -> Any:
        Addressed.asked.last = self, at
        return super().__getitem__(at)


class Warp:
    """32 lanes, each a thread, and what they show each other."""

    def __init__(self) -> None:
        self.meeting, self.shown = threading.Barrier(32, timeout=SECONDS), [None] * 32  # type: ignore[var-annotated]

    def share(self, lane: int, x: Any) -> list[Any]:
        self.meeting.wait()
        self.shown[lane] = x
        self.meeting.wait()
        return list(self.shown)


class Slot:
    """A barrier: phases that have ended, and arrivals in this one."""

    def __init__(self, count: int) -> None:
        self.count, self.ended, self.arrived, self.changed = count, 0, 0, threading.Condition()


def beside(jobs: list[tuple[Callable[..., None], tuple[Any, ...]]], failed: list[BaseException]) -> None:
    """Run all, each in a thread of its own; raises the first of what they add to `failed`."""
    threads = [threading.Thread(target=run, args=given) for run, given in jobs]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if failed:
        raise failed[0]


class Language:
    """What the emitted text calls T, for one role of a block. first: its first thread; made: what the block has allocated."""

    def __init__(self, sizes: Mapping[str, int], block: int, first: int, warps: int, made: dict[int, Any], late: bool) -> None:
        self.sizes, self.block, self.first, self.warps, self.made, self.late = sizes, block, first, warps, made, late
        self.allocated, self.running = itertools.count(), []  # type: ignore[var-annotated]
        self.here = threading.local()                      # of a thread in a macro: its warp and lane

    prim_func = staticmethod(lambda f: f)
    cast, exp2 = staticmethod(lambda x, dtype: DTYPES[dtype](x)), staticmethod(np.exp2)
    log = staticmethod(np.log)
    exp = staticmethod(np.exp)
    truncmod, truncdiv = staticmethod(lambda a, b: a % b), staticmethod(lambda a, b: a // b)
    ceildiv = staticmethod(lambda a, b: -(-a // b))
    min, max, serial = staticmethod(min), staticmethod(max), staticmethod(range)
    And = staticmethod(lambda a, b: a and b)
    Select = staticmethod(lambda condition, yes, no: yes if condition else no)
    infinity = staticmethod(lambda dtype: np.float32(np.inf))
    float32, int32, bool = float, int, bool
    unroll, vectorized = staticmethod(lambda *bounds, annotations=None: range(*bounds)), staticmethod(range)

    def nothing(self, *_: Any, **__: Any) -> None:
        """What has no counterpart here."""
    Tensor = alloc_var = annotate_layout = Fragment = set_max_nreg = annotate_min_blocks_per_sm = fence_proxy_async = nothing

    def dynamic(self, names: str) -> tuple[int, ...]:
        return tuple(self.sizes[n] for n in names.split(", "))

    @contextmanager
    def Kernel(self, blocks: int, threads: tuple[int, int]) -> Iterator[int]:
        yield self.block

    def get_thread_binding(self, dimension: int = 0) -> int:
        """A warpgroup is a row of threads."""
        row, column = divmod(self.first + getattr(self.here, "thread", 0), 128)
        return row if dimension else column

    # -- what lanes do together

    def macro(self, f: Any) -> Any:
        def run(*arguments: Any) -> None:
            given = [a.view(Addressed) if isinstance(a, Buffer) else a for a in arguments]
            warps, failed = [Warp() for _ in range(self.warps)], []  # type: ignore[var-annotated]

            def lane(i: int) -> None:
                self.here.thread, self.here.warp = i, warps[i // 32]
                try:
                    with np.errstate(all="ignore"):
                        f(*given)
                except BaseException as e:
                    failed.append(e)
                    warps[i // 32].meeting.abort()
            beside([(lane, (i,)) for i in range(32 * self.warps)], failed)
        return run

    def together(self, x: Any) -> tuple[int, list[Any]]:
        lane = self.here.thread % 32
        return lane, self.here.warp.share(lane, x)

    def sync_warp(self) -> None:
        if hasattr(self.here, "warp"):
            self.together(None)

    def shfl_up(self, x: Any, by: int) -> Any:
        lane, all_ = self.together(x)
        return all_[lane - by] if lane >= by else x

    def access_ptr(self, element: Any, kind: str, extent: int) -> Any:
        return Addressed.asked.last

    def ptx_ldmatrix(self, transposed: bool, count: int, source: Any, to: Any) -> None:
        lane, sources = self.together(source)
        for q in range(count):
            for e in range(2):
                row, column = (lane % 4 * 2 + e, lane // 4) if transposed else (lane // 4, lane % 4 * 2 + e)
                tile, (*at, first) = sources[8 * q + row]
                assert first % 8 == 0
                to[0][to[1] + 2 * q + e] = tile[(*at, first + column)]

    def ptx_mma(self, *a: Any) -> None:
        """m16n8k16, of registers as PTX lays them out."""
        left, right, sums = (np.asarray(a[i]) for i in (7, 9, 11))
        assert a[:7] == ("float32", "m16n8k16", "row", "col", "fp16", "fp16", "fp32")
        lane, all_ = self.together((left[a[8]:a[8] + 8].astype(np.float32), right[a[10]:a[10] + 4].astype(np.float32)))
        x, y = np.empty((16, 16), np.float32), np.empty((16, 8), np.float32)
        for i, (l, r) in enumerate(all_):
            for e in range(8):
                x[i // 4 + e // 2 % 2 * 8, i % 4 * 2 + e // 4 * 8 + e % 2] = l[e]
            for e in range(4):
                y[i % 4 * 2 + e // 2 * 8 + e % 2, i // 4] = r[e]
        rows = x[[lane // 4, lane // 4 + 8]] @ y[:, lane % 4 * 2:lane % 4 * 2 + 2]
        sums[a[12]:a[12] + 4] += rows.reshape(4)

    def Parallel(self, *extents: int) -> Any:
        return itertools.product(*map(range, extents)) if len(extents) > 1 else range(*extents)

    # -- memory

    def alloc_fragment(self, shape: tuple[int, ...], dtype: str) -> Any:
        kind = Addressed if hasattr(self.here, "warp") else Buffer
        return np.full(shape, -1 if dtype == "int32" else np.nan, DTYPES[dtype]).view(kind)
    alloc_local = alloc_fragment

    def alloc_shared(self, shape: tuple[int, ...], dtype: str) -> Any:
        return self.made.setdefault(next(self.allocated), self.alloc_fragment(shape, dtype))

    def copy(self, source: Any, to: Any) -> None:
        to[...] = source

    def tma_copy(self, source: Any, to: Any, barrier: Slot) -> None:
        to[...] = source

    def reduce_sum(self, x: Any, to: Any, dim: int) -> None:
        to[...] = x.sum(axis=dim)

    # -- synchronisation and products

    def alloc_barrier(self, counts: list[int]) -> Any:
        return self.made.setdefault(next(self.allocated), [Slot(c) for c in counts])

    def barrier_arrive(self, b: Slot) -> None:
        with b.changed:
            b.arrived += self.warps
            assert b.arrived <= b.count
            if b.arrived == b.count:
                b.ended, b.arrived = b.ended + 1, 0
                b.changed.notify_all()

    def barrier_wait(self, b: Slot, parity: int) -> None:
        with b.changed:
            assert b.changed.wait_for(lambda: b.ended % 2 != parity, SECONDS), "deadlock"

    def wgmma_gemm(self, a: Any, b: Any, to: Any, transpose_A: bool = False, transpose_B: bool = False,
                   clear_accum: bool = False) -> None:
        def product() -> None:
            left, right = (x.T if flip else x for x, flip in ((a, transpose_A), (b, transpose_B)))
            to[...] = left.astype(np.float32) @ right.astype(np.float32) + (0 if clear_accum else to)
        self.running.append(product)
        if not self.late:
            self.wait_wgmma(0)

    def wait_wgmma(self, most: int) -> None:
        while len(self.running) > most:
            self.running.pop(0)()


def array(x: torch.Tensor, beyond: int) -> Any:
    """A tensor as numpy has it, with NaN behind its end."""
    kind = DTYPES[str(x.dtype).removeprefix("torch.")]
    flat = x.view(torch.int16).numpy().view(kind) if x.dtype is torch.bfloat16 else x.numpy()
    if kind is np.int32:
        return flat
    return np.concatenate([flat, np.full((beyond, *flat.shape[1:]), np.nan, kind)])


def run(kernel: Kernel, source: Source, memory: Mapping[str, torch.Tensor], scale: float, call: Call, late: bool) -> None:
    """Run a kernel of roles; its outputs are written to `memory`, each element by one block at most."""
    assert kernel.options.roles is not None
    text = "\n".join(line for line in source.text.splitlines() if not line.startswith("import "))
    program = ast.fix_missing_locations(Chosen().visit(ast.parse(text)))
    sizes = {"tokens": call.tokens, "sequences": call.sequences, "slots": call.slots(kernel.chunk), **call.heads,
             "boundaries": call.sequences + 1, **{f"slots_{d}": call.slots(n) for d, n in kernel.segments.items()}}
    sizes |= {n.replace("/", "_of_"): size for t in kernel.tensors() for n, size in call.groups(t).items()}
    arrays = {f"{t.name}_": array(memory[t.name], kernel.chunk) for t in kernel.tensors()}
    given = {**arrays, "scale": np.float32(scale), "L": call.length, "N": call.sequences, **call.heads}
    given |= {"block0": 0, "blocks": 0}
    if call.cu_seqlens is not None:
        given["cu"] = call.cu_seqlens.numpy()
    warps = [r.warps for r in kernel.options.roles.roles for _ in range(r.copies)]
    failed: list[BaseException] = []

    def role(block: int, i: int, made: dict[int, Any]) -> None:
        language = Language(sizes, block, 32 * sum(warps[:i]), warps[i], made, late)
        space: dict[str, Any] = {"T": language, "tilelang": Layouts}
        try:
            exec(compile(program, f"{kernel.name}, role {i}", "exec"), space)
            with np.errstate(all="ignore"):
                space[kernel.name](*(given[n] for n in emit.signature(kernel)))
            assert not language.running, "a product was never waited for"
        except BaseException as e:
            failed.append(e)
    clean = {f"{n}_": arrays[f"{n}_"].copy() for n in kernel.program.written()}
    whole = {n: x.copy() for n, x in clean.items()}
    for block in range(blocks(kernel, call)):
        for n, x in clean.items():
            arrays[n][...] = x
        made: dict[int, Any] = {}
        beside([(role, (block, i, made)) for i in range(len(warps))], failed)
        for n, x in clean.items():
            bits = f"u{x.dtype.itemsize}"
            mine, theirs = (y.view(bits) != x.view(bits) for y in (arrays[n], whole[n]))
            assert not (mine & theirs).any(), f"two blocks write {n}"
            whole[n][mine] = arrays[n][mine]
    for name in kernel.program.written():
        found = whole[f"{name}_"][:len(memory[name])].astype(np.float32)
        memory[name].copy_(torch.from_numpy(found))


class Chosen(ast.NodeTransformer):
    """Of T.if_then_else only what is chosen is looked at, as on a GPU: the other may lie past a tensor's end."""

    def visit_Call(self, n: ast.Call) -> ast.expr:
        self.generic_visit(n)
        if isinstance(n.func, ast.Attribute) and n.func.attr == "if_then_else":
            condition, yes, no = n.args
            return ast.IfExp(condition, yes, no)
        return n


class Layouts:
    """tilelang.layout: where bytes lie does not matter here."""
    class layout:
        make_swizzled_layout = staticmethod(lambda x: None)
