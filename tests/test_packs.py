"""Packs: made here, served elsewhere: nothing is compiled, and what cannot be served says what to do."""
from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import gdn_ir
from gdn_ir import artifacts, calls, packs, registry
from gdn_ir.ahead import not_compiled
from gdn_ir.artifacts import NotCompiled
from gdn_ir.autotune import command, lookup
from gdn_ir.autotune.keys import Shape
from gdn_ir.backends import BACKENDS
from gdn_ir.backends.base import Call
from gdn_ir.bench import cases
from gdn_ir.compiler import Instance, variant
from gdn_ir.ops import chunk_gated_delta_rule
from gdn_ir.programs.gated_delta import Switches
from tests.inputs import error, expected, make

BF16 = Instance(Switches(final_state=True), 64, 64, "bf16", "bf16", True)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty cache, and no pack before or after."""
    monkeypatch.setenv("GDN_IR_CACHE", str(tmp_path / "cache"))
    packs.unload_packs()
    yield
    packs.unload_packs()


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack for this processor."""
    out = tmp_path_factory.mktemp("made") / "pack"
    command.compile_ahead("cpu", "1x64:2/2", "forward", "f32", 32, 32, "no-final_state", True, "", "", "", out, 1,
                          Console(quiet=True))
    return out


def test_a_pack_serves_without_compiling(native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it was moved, with an empty cache, compiling forbidden, and shapes that it was not made for."""
    pack = tmp_path / "elsewhere"
    shutil.copytree(native, pack)
    monkeypatch.setenv("GDN_IR_NO_JIT", "1")
    with pytest.raises(NotCompiled, match="neither in the cache nor in a loaded pack"), torch.no_grad():
        chunk_gated_delta_rule(**make())
    assert gdn_ir.load_pack(pack).path == pack
    monkeypatch.setattr(BACKENDS["tilelang"], "toolchain", lambda arch: None)   # as where nothing is installed
    monkeypatch.setattr("shutil.which", lambda *a, **k: None)
    for sizes in ({}, {"B": 2, "T": 37, "H": 1, "HV": 3}):
        x = make(**sizes)
        with torch.no_grad():
            assert error(chunk_gated_delta_rule(**x)[0], expected(x)[0]) <= 1e-5
    text = str(gdn_ir.explain(H=2, HV=2, K=32, V=32, T=100, dtype="f32", arch="cpu"))
    assert "tilelang chosen: first that can serve on cpu" in text
    assert f"schedule recurrent: compiled ahead for 1x64:2/2 in {pack}" in text
    x = make(K=16, V=16)                                   # which it does not hold: another backend serves
    with torch.no_grad():
        assert error(chunk_gated_delta_rule(**x)[0], expected(x)[0]) <= 1e-5
    text = str(gdn_ir.explain(H=2, HV=2, K=16, V=16, T=100, dtype="f32", arch="cpu"))
    assert "tilelang's native code needs tilelang and g++" in text and "torch    chosen" in text


def test_a_pack_serves_calls_that_were_served_before(native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And serves them no more when it is unloaded: its kernels, and nothing to compile others with."""
    x = make()
    with torch.no_grad(), gdn_ir.use("tilelang"):
        chunk_gated_delta_rule(**x)
        monkeypatch.setenv("GDN_IR_CACHE", str(tmp_path / "empty"))
        monkeypatch.setenv("GDN_IR_NO_JIT", "1")
        pack, folders = gdn_ir.load_pack(native), []
        obtain = artifacts.obtain
        monkeypatch.setattr("gdn_ir.backends.tilelang.obtain", lambda *a: (folders.append((f := obtain(*a)).folder), f)[1])
        chunk_gated_delta_rule(**x)
        assert folders and all(f.is_relative_to(pack.path) for f in folders)
        packs.unload_packs()
        with pytest.raises(NotCompiled):
            chunk_gated_delta_rule(**x)


def test_the_error_names_the_shape_and_a_command_that_fixes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = make(T=50, K=32, V=16, H=1, HV=2)
    with monkeypatch.context() as forbidden, torch.no_grad():
        forbidden.setenv("GDN_IR_NO_JIT", "1")
        with pytest.raises(NotCompiled, match=r"1 sequences of 50 tokens together, H/HV 1/2: .*Compile it ahead: gdn-ir") as e:
            chunk_gated_delta_rule(**x, use_qk_l2norm_in_kernel=True)
    found = re.search(r"ahead: (gdn-ir compile .* -o PACK), and", str(e.value))
    assert found
    words = shlex.split(found[1].replace("PACK", str(tmp_path / "pack")))
    done = subprocess.run([sys.executable, "-m", "gdn_ir", *words[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    gdn_ir.load_pack(tmp_path / "pack")
    monkeypatch.setenv("GDN_IR_NO_JIT", "1")
    with torch.no_grad():
        o, _ = chunk_gated_delta_rule(**x, use_qk_l2norm_in_kernel=True)
    assert error(o, expected(x, l2norm=True)[0]) <= 1e-5


@pytest.mark.parametrize("instance", [
    BF16, replace(BF16, switches=Switches("none", False, True, True, True, True, False, True), beta="f32", varlen=False),
    replace(BF16, switches=Switches(), grads=("q", "beta"), grouped=True), replace(BF16, recurrent=True),
])
def test_the_command_in_the_error_means_the_same_instance(instance: Instance) -> None:
    schedule = lookup.default("sm_90", BF16, 1, 2, 64)[0]
    chosen = packs.Variant("triton", instance, schedule, "sm_90", None)        # type: ignore[arg-type]
    text = str(not_compiled(chosen, Call(1, 64, 64, {"H": 1, "HV": 2}), NotCompiled("why")))
    words = shlex.split(text.split("ahead: gdn-ir compile ")[1].split(" -o PACK")[0])
    o = {w: words[i + 1] for i, w in enumerate(words) if w.startswith("--") and w != "--dense"}
    shapes = calls.shapes_of(o["--shapes"])
    K, V, flags = int(o["--K"]), int(o["--V"]), o.get("--flags", "")
    found = calls.instances(o.get("--op", "forward"), shapes, o["--dtype"], K, V, flags,
                              "--dense" in words, o.get("--beta", ""), o.get("--grads", ""))
    assert list(found) == [instance]


def test_kernels_for_gpus_compile_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For both architectures, from the command line; what is found for a shape afterwards is in the pack, for any shape."""
    console = Console(record=True, width=200)
    command.compile_ahead("sm_80,sm_90a", "1x8192:4/8,8x1024:16/64", "forward", "", 64, 64, "", False, "", "", "",
                          tmp_path / "pack", 2, console)
    assert "8 kernels for 4 shapes" in console.export_text()                   # two widths of the scan; the rest is shared
    for about in (tmp_path / "pack" / "artifacts").glob("*/about.json"):
        assert (about.parent / "kernel.cubin").read_bytes()[:4] == b"\x7fELF" and str(tmp_path) not in about.read_text()
    gdn_ir.load_pack(tmp_path / "pack")
    monkeypatch.setenv("GDN_IR_NO_JIT", "1")
    monkeypatch.setattr(BACKENDS["triton"], "toolchain", lambda arch: None)
    binaries = set()
    for lengths, H, HV in cases.FORWARD:
        f = lookup.find("sm_90", BF16, *Shape(tuple(lengths), H, HV).key, "triton")
        assert f.level == "pack"
        c = variant(BF16, f.schedule, "triton", "sm_90").compiled
        binaries |= {artifacts.obtain(c.backend, k, s, "sm_90").folder for k, s in zip(c.kernels, c.sources)}
    assert len(binaries) == 4                              # serve all 171 rows
    assert lookup.find("sm_90", replace(BF16, K=128), 1, 8, 64, "triton").level == "heuristic"


@pytest.mark.parametrize("harm", ["nothing there", "manifest", "missing", "kernel"])
def test_a_damaged_pack_is_refused(native: Path, tmp_path: Path, harm: str) -> None:
    pack = tmp_path / "pack"
    if harm != "nothing there":
        shutil.copytree(native, pack)
        (kernel,) = (pack / "artifacts").iterdir()
        text = (pack / "pack.json").read_text()
    if harm == "manifest":
        (pack / "pack.json").write_text(text.replace('"chunk": 1', '"chunk": 64'))
    if harm == "missing":
        shutil.rmtree(kernel)
    if harm == "kernel":
        (kernel / "kernel.so").write_bytes(b"not a library")
        gdn_ir.load_pack(pack)
        with pytest.raises(ValueError, match=r"kernel.so is not what was written; make the pack again"), torch.no_grad():
            chunk_gated_delta_rule(**make())
        return
    with pytest.raises(ValueError, match=r"path: got .*pack; accepts a (whole pack|folder that gdn-ir compile made)"):
        gdn_ir.load_pack(pack)


def test_a_pack_of_other_code_is_not_served(native: Path, tmp_path: Path) -> None:
    """Made by a version that emitted something else: its schedules are not taken, for its kernels could not be."""
    pack = tmp_path / "pack"
    shutil.copytree(native, pack)
    data = json.loads((pack / "pack.json").read_text())
    data.pop("sha256")
    old = data["entries"][0]["keys"][0]
    data["entries"][0]["keys"] = ["0" * 32]
    (pack / "artifacts" / old).rename(pack / "artifacts" / ("0" * 32))
    (pack / "pack.json").write_text(json.dumps(data | {"sha256": artifacts.digest(data)}))
    gdn_ir.load_pack(pack)
    i = Instance(Switches(), 32, 32, "f32", "f32", False)
    assert lookup.find("cpu", i, 1, 2, 64, "tilelang").level == "heuristic"
    assert registry.options(i, "cpu", 1, 2, 64)[0].variant is not None


@pytest.mark.parametrize(("change", "message"), [
    ({"targets": "sm_75"}, "--target: got 'sm_75'; accepts sm_80, sm_90, cpu"),
    ({"backends": "torch"}, "--backends: got 'torch'; accepts triton, tilelang"),
    ({"grads": "q"}, "--grads: got 'q' with --op forward"),
    ({"op": "backward", "grads": "z"}, "--grads: got 'z'; accepts"),
    ({"dtype": "f64", "targets": "sm_90"}, "float64"),
])
def test_wrong_words(change: dict[str, str], message: str, tmp_path: Path) -> None:
    plain = {"targets": "sm_90", "shapes": "1x64:1/1", "op": "forward", "dtype": "bf16", "K": 32, "V": 32, "flags": "",
             "dense": False, "backends": "", "beta": "", "grads": "", "out": tmp_path / "pack", "workers": 1}
    with pytest.raises(ValueError, match=message):
        command.compile_ahead(**(plain | change))          # type: ignore[arg-type]
    (tmp_path / "pack").mkdir()
    with pytest.raises(ValueError, match=r"-o: got .*pack, which exists"):
        command.compile_ahead(**plain)                     # type: ignore[arg-type]
