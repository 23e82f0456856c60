"""Compiles with TileLang: for CPUs a shared library, blocks shared out among threads; CUDA for a GPU that need not be here."""
from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gdn_ir.artifacts import Built, said
from gdn_ir.cache import folder

# sums may be reordered, to be vectorised; not -ffast-math, which would change denormals for the whole process
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]


MASKED = {"tl.disable_safe_memory_legalize": True}         # every access is masked where it can leave its tensor
LIBRARY = "kernel.so"
FAST = {"tl.enable_fast_math": True}                       # exp as the GPU's own instruction, good to 2 units in the last place
# roles say themselves where they meet, of rings that share no memory
ROLES = {f"tl.disable_{x}": True for x in ("thread_storage_sync", "shared_memory_reuse", "buffer_init_check")}
Flags = Mapping[str, bool]


@lru_cache(maxsize=1)
def processor() -> str:
    """Names this machine's processor: what is compiled for one must not be taken from a cache on another."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return hashlib.sha256("".join(x for x in lines if x.startswith(("flags", "model name"))).encode()).hexdigest()[:12]


def compiler() -> tuple[Any, Any]:
    """TileLang and its TVM."""
    # read when TileLang is first imported: its own scratch is kept beside ours
    os.environ.setdefault("TILELANG_CACHE_DIR", str(folder() / "tilelang_cache"))
    import tilelang
    import tvm                                             # can be imported only after TileLang, which brings it
    tilelang.set_log_level("ERROR")
    logging.getLogger("tilelang.cache.kernel_cache").setLevel(logging.ERROR)       # it warns where two variants share a kernel
    return tilelang, tvm


def cross_compile(function: Any, arch: str, flags: Flags = FAST) -> str:
    """Compile a prim_func for "sm_80" or "sm_90"; returns the CUDA that nvcc accepted. For "cpu", the C that g++ did."""
    with uncached():
        return str((native(function) if arch == "cpu" else cuda(function, arch, flags)).get_kernel_source())


@contextmanager
def uncached() -> Iterator[None]:
    """Within the block TileLang keeps nothing on disk: artifacts are kept, and checked, by gdn_ir.artifacts."""
    tilelang, _ = compiler()
    was = tilelang.env.is_cache_enabled()
    tilelang.disable_cache()
    try:
        yield
    finally:
        if was:
            tilelang.enable_cache()


def cuda(function: Any, arch: str, flags: Flags) -> Any:
    target = {"kind": "cuda", "arch": {"sm_90": "sm_90a"}.get(arch, arch)}
    return compiler()[0].compile(function, target=target, execution_backend="tvm_ffi", pass_configs={**MASKED, **flags})


def lowered(function: Any, arch: str, flags: Flags = FAST) -> tuple[str, int]:
    """The CUDA of a prim_func, which nvcc has not seen, and the bytes of shared memory that it asks for."""
    tilelang, tvm = compiler()
    target = tvm.target.Target({"kind": "cuda", "arch": {"sm_90": "sm_90a"}.get(arch, arch)})
    with target, tvm.transform.PassContext(config={**MASKED, **flags}):
        made = tilelang.lower(function, target=target, enable_device_compile=False)
    wanted = [dict(f.attrs).get("dyn_shared_memory_buf", 0) for f in made.device_mod.functions.values()]
    return str(made.kernel_source), max(int(w) for w in wanted)


def native(function: Any) -> Any:
    """A prim_func as a shared library for this processor."""
    tilelang, tvm = compiler()
    with tvm.target.Target("c"):
        return tilelang.compile(function, target="c", target_host="c", execution_backend="cython", pass_configs=MASKED,
                                compile_flags=FLAGS)


@lru_cache(maxsize=4)
def toolchain(arch: str) -> dict[str, str] | None:
    """Versions of TileLang and of the compiler that it calls; None where one is missing."""
    try:
        found = {"tilelang": version("tilelang")}
        if arch == "cpu":
            return found | {"g++": said("g++")}
        compiler()
        from tilelang.contrib import nvcc
        return found | {"nvcc": said(nvcc.get_nvcc_compiler())}
    except (PackageNotFoundError, OSError, RuntimeError, subprocess.CalledProcessError):
        return None


def build(function: Any, names: list[str], sizes: list[str], arch: str, flags: Flags = FAST) -> Built:
    """A prim_func as a shared library: for CPUs of g++'s, for GPUs one that TileLang's runtime loads.

    names: of its arguments, in order; sizes: of tensors' dimensions that are known at the call, in the order in which they
    first occur: on CPUs TileLang passes them after the arguments."""
    with uncached():
        if arch == "cpu":
            built = native(function)
            source, order = built.adapter.lib_code, [*names, *sizes]
            seen = re.findall(r"(\w+)[,)]", source[source.index(" call("):].split("{")[0])
            assert seen == order, (seen, order)
            library = Path(built.adapter.libpath)
            data = library.read_bytes()
            library.unlink()                               # TileLang leaves it in /tmp; what is mapped stays
            return Built({LIBRARY: data}, {"order": order})
        executable = cuda(function, arch, flags).adapter.get_exportable_executable()
        with tempfile.TemporaryDirectory() as folder:
            executable.export_library(f"{folder}/{LIBRARY}")
            return Built({LIBRARY: Path(folder, LIBRARY).read_bytes()}, {"order": names})


Run = Callable[[Mapping[str, "torch.Tensor | int | float"], int], None]


def for_gpu(built: Any, names: list[str], written: frozenset[str]) -> Run:
    """What calls a compiled function with arguments by name and a number of blocks. written: names of the tensors that it
    writes."""
    def call(given: Mapping[str, torch.Tensor | int | float], blocks: int) -> None:
        # copy engines want addresses that are multiples of 16 bytes
        moved = {n: x.clone() for n, x in given.items() if isinstance(x, torch.Tensor) and x.data_ptr() % 16}
        mine = {**given, **moved, "block0": 0, "blocks": blocks}
        built(*(mine[name] for name in names))
        for name in written & moved.keys():
            given[name].copy_(moved[name])                 # type: ignore[union-attr]
    return call


def library(path: Path) -> Any:
    """The function in a library that `build` made for a GPU; TileLang's runtime is imported for it, and compiles nothing."""
    return compiler()[1].runtime.load_module(str(path))


def for_cpu(path: Path, order: list[str]) -> Run:
    """The same for a library for this processor, the blocks shared out among threads."""
    entry = ctypes.CDLL(str(path)).call

    def call(given: Mapping[str, torch.Tensor | int | float], blocks: int) -> None:
        fixed = {name: pack(given[name]) for name in order if name not in ("block0", "blocks")}
        parts = min(torch.get_num_threads(), blocks)
        bounds = [blocks * i // parts for i in range(parts + 1)]

        def part(first: int, last: int) -> None:
            mine = {**fixed, "block0": ctypes.c_int32(first), "blocks": ctypes.c_int32(last - first)}
            entry(*(mine[name] for name in order))
        if parts == 1:
            part(0, blocks)
        else:
            list(pool(parts, os.getpid()).map(part, bounds[:-1], bounds[1:]))
    return call


def pack(x: torch.Tensor | int | float) -> Any:
    """An argument as C takes it."""
    if isinstance(x, torch.Tensor):
        return ctypes.c_void_p(x.data_ptr())
    return ctypes.c_float(x) if isinstance(x, float) else ctypes.c_int32(x)


@lru_cache(maxsize=4)
def pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process (a fork has none of its parent's)."""
    return ThreadPoolExecutor(threads, thread_name_prefix="gdn_ir")
