"""Emitted sources: goldens, words that no backend may know, and cross-compilation of the shipped defaults."""
from __future__ import annotations

import io
import os
import re
import tokenize
from pathlib import Path

import pytest

from gdn_ir import backends
from gdn_ir.backends.triton import cross_compile
from gdn_ir.compiler import Instance, variant
from gdn_ir.printer import dump, evaluate
from gdn_ir.programs.gated_delta import Switches, build
from gdn_ir.schedules.defaults import default

GOLDENS = Path(__file__).parent / "goldens"


def instance(dtype: str = "bf16", erase: bool = True) -> Instance:
    return Instance(Switches(erase=erase, final_state=True), 128, 128, dtype, dtype, True)


def golden(name: str, text: str) -> None:
    """Compare with a committed file; GDN_IR_UPDATE_GOLDENS=1 writes it."""
    path = GOLDENS / name
    if os.environ.get("GDN_IR_UPDATE_GOLDENS") == "1":
        GOLDENS.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), f"{name} changed; if that is meant, run again with GDN_IR_UPDATE_GOLDENS=1"


def test_printed_program() -> None:
    text = dump(build(Switches(final_state=True)))
    golden("gated_delta_rule.txt", text)
    assert evaluate(text) == build(Switches(final_state=True))


@pytest.mark.parametrize(("backend", "arch"), [("triton", "sm_90"), ("torch", "torch"), ("tilelang", "cpu")])
def test_emitted_sources(backend: str, arch: str) -> None:
    i = instance("f32" if backend == "tilelang" else "bf16")
    schedule = default(arch, i, 1, 32, 8192)[0]
    text = "\n\n".join(s.text for s in variant(i, schedule, backend, arch).sources)
    golden(f"{backend}_{arch}.txt", text)


def test_backends_do_not_know_what_they_compile() -> None:
    """Outside of comments and docstrings, no backend says the program's words."""
    words = re.compile(r"beta|gate|gated|delta|kkt|decay|\bwy\b", re.IGNORECASE)
    found = []
    for path in Path(backends.__file__).parent.rglob("*.py"):
        tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
        for t in tokens:
            docstring = t.type == tokenize.STRING and t.string.startswith('"""')
            if t.type not in (tokenize.COMMENT,) and not docstring and words.search(t.string):
                found.append(f"{path.name}:{t.start[0]} {t.string}")
    assert not found


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("dtype", "erase", "heads"), [("bf16", True, 8), ("bf16", True, 512), ("f16", True, 8),
                                                       ("f32", True, 8), ("bf16", False, 8)])
def test_defaults_compile_without_a_gpu(arch: str, dtype: str, erase: bool, heads: int) -> None:
    chosen = variant(instance(dtype, erase), default(arch, instance(dtype, erase), 1, heads, 8192)[0], "triton", arch)
    assert len(chosen.sources) == (3 if erase else 2)
    for kernel, source in zip(chosen.compiled.kernels, chosen.sources, strict=True):
        built = cross_compile(kernel, source, arch)
        ptx = built.asm["ptx"] if isinstance(built.asm["ptx"], str) else built.asm["ptx"].decode()
        assert f".target {arch}" in ptx
        assert built.metadata.shared <= {"sm_80": 166912, "sm_90": 232448}[arch]
        if arch == "sm_80":
            assert "mma.sync" in ptx and "wgmma" not in ptx
        elif dtype != "f32" and source.kernel != "solve":  # one warp is too few for warp-group products
            assert "wgmma" in ptx
