"""The cache on disk: what a key holds, damage, two processes, the bound, moving the folder."""
from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

from gdn_ir import artifacts, cache
from gdn_ir.artifacts import Built, NotCompiled, Store, digest
from gdn_ir.backends import BACKENDS
from gdn_ir.backends.base import Call
from gdn_ir.backends.triton.driver import about
from gdn_ir.compiler import Instance, Variant, variant
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.schedules.defaults import default
from gdn_ir.schedules.schedule import KernelOptions
from tests.inputs import error, expected, make


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GDN_IR_CACHE", str(tmp_path / "cache"))
    return cache.folder()


def native(K: int = 16) -> Variant:
    """A fresh variant, which has not compiled anything."""
    i = Instance(Switches(), K, 16, "f32", "f32", False)
    return variant.__wrapped__(i, default("cpu", i, 1, 2, 64)[0], "tilelang", "cpu")         # type: ignore[attr-defined,no-any-return]


def run(chosen: Variant) -> float:
    """The error of one call."""
    K = chosen.instance.K
    x = make(T=20, K=K, V=16)
    o = torch.full_like(x["v"], float("nan"))
    chosen({n: t[0] for n, t in x.items()} | {"o": o[0]}, K ** -0.5, 1)
    return error(o, expected(x)[0])


def test_damage_is_rebuilt_with_a_warning_and_the_folder_moves(folder: Path, monkeypatch: pytest.MonkeyPatch,
                                                               caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "gdn_ir"):
        assert run(native()) <= 1e-5
    first, last = caplog.messages
    assert re.fullmatch(r"compiling \w+ for cpu by tilelang", first)
    assert re.fullmatch(r"compiled \w+ for cpu by tilelang in .* s", last)
    (kept,) = (folder / cache.ARTIFACTS).iterdir()
    moved = folder.with_name("moved")
    shutil.move(folder, moved)
    monkeypatch.setenv("GDN_IR_CACHE", str(moved))
    monkeypatch.setattr(BACKENDS["tilelang"], "build", lambda *a: pytest.fail("compiled, though it is kept"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(native()) <= 1e-5                       # from where it was moved to
    monkeypatch.undo()
    monkeypatch.setenv("GDN_IR_CACHE", str(moved))
    library = moved / cache.ARTIFACTS / kept.name / "kernel.so"
    harmed = library.read_bytes()[:-100] + bytes(100)
    library.unlink()                                       # what this process has loaded stays mapped
    library.write_bytes(harmed)
    with pytest.warns(RuntimeWarning, match=r"is damaged \(kernel.so is not what was written\); it is compiled again"):
        assert run(native()) <= 1e-5
    assert artifacts.read(library.parent).launch["order"]


@pytest.mark.parametrize(("harm", "why"), [
    ("cut", "about.json is not what was written"), ("launch", "about.json is not what was written"),
    ("text", "about.json is not what was written"), ("missing", "a file is missing"), ("a file", "it is no folder"),
    ("format", "format 0, and this gdn-ir reads 1")])
def test_a_damaged_entry_is_none(tmp_path: Path, harm: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    with monkeypatch.context() as old:
        if harm == "format":
            old.setattr(artifacts, "FORMAT", 0)
        store.put("key", Built({"a": b"abc"}, {"n": 1}), {}, {})
    about = tmp_path / "key" / "about.json"
    text = about.read_text()
    if harm == "missing":
        (tmp_path / "key" / "a").unlink()
    elif harm == "a file":
        shutil.rmtree(tmp_path / "key")
        (tmp_path / "key").write_bytes(b"abc")
    elif harm != "format":
        about.write_text({"cut": text[:40], "launch": text.replace('"n": 1', '"n": 2'), "text": "[]"}[harm])
    with pytest.warns(RuntimeWarning, match=rf"damaged \({re.escape(why)}\); it is compiled again"):
        assert store.get("key") is None
    assert not (tmp_path / "key").exists() and store.get("key") is None
    assert store.put("key", Built({"a": b"abc"}, {"n": 1}), {}, {}).path("a").read_bytes() == b"abc"


def test_the_umask_says_who_can_read_it(folder: Path) -> None:
    """As of any file: a cache may be shared, and a pack is made for others."""
    before = os.umask(0o027)
    try:
        made = artifacts.store().put("key", Built({"a": b"abc"}, {}), {}, {})
        cache.load_source("torch", "f", "2", "x = 1\n")
    finally:
        os.umask(before)
    (source,) = (folder / "torch").glob("*.py")
    assert [p.stat().st_mode & 0o777 for p in (made.folder, made.path("a"), source)] == [0o750, 0o640, 0o640]


def test_a_damaged_source_is_written_again(folder: Path) -> None:
    assert cache.load_source("torch", "f", "0", "x = 1\n").x == 1
    (path,) = (folder / "torch").glob("*.py")
    path.write_text("x = 2\n")
    with pytest.warns(RuntimeWarning, match="is damaged; it is written again"):
        assert cache.load_source("torch", "f", "0", "x = 1\n").x == 1
    assert path.read_text() == "x = 1\n" and not list(folder.rglob("*.pyc"))


def test_keys_hold_everything_that_changes_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    i = Instance(Switches(final_state=True), 64, 64, "bf16", "bf16", True)
    base = default("sm_90", i, 1, 32, 8192)[0].with_options(output=KernelOptions(64, 4, 2))

    def recipe(instance: Instance = i, options: KernelOptions | None = None, arch: str = "sm_90") -> str:
        chosen = variant(instance, base if options is None else base.with_options(output=options), "triton", arch)
        kernel, source = chosen.compiled.kernels[-1], chosen.sources[-1]
        return digest(BACKENDS["triton"].recipe(kernel, source, arch))
    keys = [recipe(), recipe(options=KernelOptions(64, 4, 1)), recipe(options=KernelOptions(64, 8, 2)), recipe(arch="sm_80"),
            recipe(replace(i, beta="f32")), recipe(replace(i, io="f16", beta="f16")), recipe(replace(i, K=128)),
            recipe(options=KernelOptions(64, 4, 2, follows=True))]
    assert len(set(keys)) == len(keys) - 1 and keys[0] == keys[4]              # the output kernel does not read beta
    assert BACKENDS["triton"].toolchain("sm_90") == {"triton": __import__("triton").__version__}
    ptxas = tmp_path / "ptxas"
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(ptxas))
    assert set(BACKENDS["triton"].toolchain("sm_90") or {}) == {"triton"}      # it is not there: Triton takes its own
    ptxas.write_text("#!/bin/sh\necho ptxas; echo Build cuda_13.0")
    ptxas.chmod(0o755)
    assert (BACKENDS["triton"].toolchain("sm_90") or {})["ptxas"] == "Build cuda_13.0"     # wherever it lies
    found = BACKENDS["tilelang"].toolchain("cpu")
    assert found is not None and set(found) == {"tilelang", "g++"}


def test_what_triton_built_is_kept_and_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    i = Instance(Switches(erase=False, decay="none"), 16, 16, "bf16", "bf16", False)
    chosen = variant(i, default("sm_80", i, 1, 32, 8192)[0], "triton", "sm_80")
    kernel, source, b = chosen.compiled.kernels[0], chosen.sources[0], BACKENDS["triton"]
    built = artifacts.obtain(b, kernel, source, "sm_80")
    assert built.path("kernel.cubin").read_bytes()[:4] == b"\x7fELF"
    assert built.launch["num_warps"] == kernel.options.num_warps and built.launch["shared"] > 0
    monkeypatch.setenv("GDN_IR_NO_JIT", "1")
    assert artifacts.obtain(b, kernel, source, "sm_80") == built                # nothing is compiled
    with pytest.raises(NotCompiled, match="scan for sm_90 by triton is neither in the cache nor in a loaded pack"):
        artifacts.obtain(b, kernel, source, "sm_90")
    monkeypatch.setattr(artifacts, "FORMAT", 0)            # another version, at the same cache: it leaves ours alone
    with pytest.raises(NotCompiled), warnings.catch_warnings():
        warnings.simplefilter("error")
        artifacts.obtain(b, kernel, source, "sm_80")


def test_launches_that_need_more_than_arguments_are_refused() -> None:
    class Metadata:
        name, shared, num_warps, num_ctas, global_scratch_size = "f", 0, 4, 1, 512

    class Compiled:
        metadata = Metadata
    with pytest.raises(NotImplementedError, match="global_scratch_size"):
        about(Compiled)


def test_the_least_recently_used_goes_first(folder: Path) -> None:
    store = artifacts.store()
    for i, key in enumerate("abc"):
        store.put(key, Built({"x": bytes(1000)}, {}), {}, {})
        os.utime(store.root / key, (i, i))
    half = store.root / f"d{cache.TEMPORARY}"
    half.mkdir()
    os.utime(half, (0, 0))                                 # left by a process that was killed long ago
    assert store.get("a") is not None                      # used now
    size = sum(size for _, size, _ in cache.entries(folder))
    assert {p.name for p in cache.trim(folder, size - 1)} == {"b", half.name}
    assert {p.name for p in store.root.iterdir()} == {"a", "c"}
    assert not cache.trim(folder, size)
    assert {p.name for p in cache.trim(folder, 0)} == {"c"}                     # a is in use


@pytest.mark.parametrize("size", ["-1", "many"])
def test_a_wrong_size_is_refused(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDN_IR_CACHE_SIZE", size)
    with pytest.raises(ValueError, match=rf"GDN_IR_CACHE_SIZE: got '{size}'; accepts a number of MiB from 0 on"):
        cache.largest()
    monkeypatch.setenv("GDN_IR_CACHE_SIZE", "0.5")
    assert cache.largest() == 2**19


WRITER = """
import sys, time
from gdn_ir import artifacts, cache
store = artifacts.store()
end = time.time() + 1.0
while time.time() < end:
    for key in "abcd":
        found = store.get(key)
        if found is None:
            found = store.put(key, artifacts.Built({"x": key.encode() * 5000}, {}), {}, {})
        cache.trim(store.root.parent, 12000, spare=0.0)
    cache.load_source("torch", "f", "0", "x = 1\\n")
print("done")
"""


def test_processes_share_it(folder: Path) -> None:
    """Three processes that read, write and evict the same entries: none sees a part of one, and no warning of damage comes."""
    running = [subprocess.Popen([sys.executable, "-W", "error", "-c", WRITER], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True) for _ in range(3)]
    for process in running:
        out, err = process.communicate(timeout=60)
        assert out == "done\n", err[-2000:]


def test_a_folder_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*a: object) -> None:
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(cache, "write_whole", full)
    with pytest.warns(RuntimeWarning, match="cannot write the cache folder"), pytest.raises(OSError, match="No space"):
        cache.load_source("torch", "f", "1", "x = 1\n")    # the second place is full too
    monkeypatch.undo()
    monkeypatch.setenv("GDN_IR_CACHE", str(folder))
    put = Store.put
    monkeypatch.setattr(Store, "put", lambda self, *a: full() if self.root.parent == folder else put(self, *a))
    with pytest.warns(RuntimeWarning, match="cannot write the cache folder"):
        assert run(native()) <= 1e-5


def test_no_jit_serves_what_is_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDN_IR_NO_JIT", "1")
    with pytest.raises(NotCompiled):
        run(native(48))


@pytest.mark.parametrize("name", ["triton", "tilelang"])
@pytest.mark.parametrize("shape", [(9,), (9, 2), (9, 2, 16), (0, 2, 16)])
def test_rows_that_no_sequence_owns_are_cleared_without_a_compiler(name: str, shape: tuple[int, ...],
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """And without reading boundaries on the host: fake tensors have none to read."""
    monkeypatch.setitem(sys.modules, name, None)                               # as where it is not installed
    for mode in (contextlib.nullcontext(), FakeTensorMode()):
        with mode:
            x, ends = torch.full(shape, float("nan")), torch.tensor([0, 3, 5], dtype=torch.int32)
            BACKENDS[name].clear_tail(x, Call(2, shape[0], shape[0], {"H": 2, "HV": 2}, ends))
        if not isinstance(x, FakeTensor):
            assert x[:5].isnan().all() and not x[5:].any()
