"""What serves a call and why; forcing; the command line; the demo."""
from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import gdn_ir
from gdn_ir import cli, demo, demo_train, policy, providers, registry
from gdn_ir.compiler import Instance, Unsupported
from gdn_ir.demo_model import Model, Size
from gdn_ir.ops import chunk_gated_delta_rule
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.schedules.plans import plan
from gdn_ir.schedules.schedule import KernelOptions, Schedule
from tests.inputs import make

F32 = Instance(Switches(), 32, 32, "f32", "f32", False)
BF16 = Instance(Switches(final_state=True), 128, 128, "bf16", "bf16", True)


@pytest.mark.parametrize(("arch", "backend"), [("sm_90", "triton"), ("sm_80", "triton"), ("cpu", "torch")])
def test_the_preferred_backend_serves(arch: str, backend: str) -> None:
    chosen = registry.choose(BF16, arch, 1, 32, 2048)
    assert chosen.backend == backend
    assert {o.backend for o in registry.options(BF16, arch, 1, 32, 2048)} == {"triton", "torch", "tilelang"}


def test_float64_on_a_gpu_falls_back_with_a_warning() -> None:
    wide = Instance(Switches(), 64, 64, "f64", "f64", False)
    with pytest.warns(RuntimeWarning, match=r"triton cannot serve this call, torch does: .*float64"):
        assert registry.choose.__wrapped__(wide, "sm_90", 1, 4, 100).backend == "torch"      # type: ignore[attr-defined]
    with pytest.raises(Unsupported, match=r"triton cannot serve .*float64"):
        registry.choose(wide, "sm_90", 1, 4, 100, "triton")


def test_use_forces_and_ends() -> None:
    with gdn_ir.use("torch"):
        assert registry.forced() == "torch"
        with gdn_ir.use("triton"):
            assert registry.forced() == "triton"
            with pytest.raises(Unsupported, match=r"triton cannot serve gated delta rule, f32, .*: triton lowers to sm_80"):
                chunk_gated_delta_rule(**make())
        assert registry.forced() == "torch"
    assert registry.forced() is None
    with pytest.raises(ValueError, match=r"backend: got 'cuda'; accepts .*torch"), gdn_ir.use("cuda"):
        pass


def test_a_fallback_is_told_once() -> None:
    """However many shapes meet the same reason."""
    wide = Instance(Switches(), 64, 64, "f64", "f64", False)
    registry._warn.cache_clear()
    with pytest.warns(RuntimeWarning, match="torch does") as told:
        for tokens in (101, 102, 103):
            assert registry.choose(wide, "sm_90", 1, 4, tokens).backend == "torch"
    assert len(told) == 1


def test_forbid() -> None:
    x = make()
    with gdn_ir.forbid("tilelang"):
        assert registry.choose(F32, "cpu", 1, 2, 100, policy.asked()).backend == "torch"
        with gdn_ir.forbid("torch"):
            assert policy.asked() == "-tilelang-torch"
            with pytest.raises(Unsupported, match=r"no backend serves .*\n  tilelang: forbidden here\n  torch: forbidden here\n"
                                                  r"  triton: triton lowers"):
                chunk_gated_delta_rule(**x)
            with gdn_ir.use("torch"), gdn_ir.forbid("triton"):           # an inner block's word counts
                chunk_gated_delta_rule(**x)
        said = gdn_ir.explain(H=1, HV=1, T=64, arch="cpu", dtype="f32")
        assert said.chosen == "torch" and "tilelang forbidden: gdn_ir.forbid or GDN_IR_FORBID names it" in str(said)
    assert policy.asked() == ""
    with pytest.raises(ValueError, match="backends: got 'cuda'; accepts triton"), gdn_ir.forbid("cuda"):
        pass
    with gdn_ir.use("torch"), pytest.raises(ValueError, match="torch is asked for here"), gdn_ir.forbid("torch"):
        pass


def test_a_forbidden_backend_stays_forbidden_in_the_backward() -> None:
    """Gradients are computed after the block has ended, and perhaps in another thread."""
    x = make()
    x["v"].requires_grad_()
    with gdn_ir.forbid("tilelang", "triton"):
        o = chunk_gated_delta_rule(**x)[0]
    asked: list[str] = []
    registry.forget()                                      # or a backward like this one has been prepared before
    with pytest.MonkeyPatch.context() as patch:
        serving = registry.serving
        patch.setattr(registry, "serving", lambda *a: (asked.append(a[-2]), serving(*a))[1])
        torch.autograd.grad(o.sum(), x["v"])
    assert asked == ["-tilelang-triton"]


class Deep(torch.autograd.Function):
    """Its backward calls a backward, and so on: past sixty torch goes on in another thread."""
    seen: list[tuple[int, str]] = []

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, depth: int) -> torch.Tensor:
        ctx.depth = depth
        return x.clone()

    @staticmethod
    def backward(ctx: Any, d: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.depth:
            with torch.enable_grad():
                Deep.apply(torch.ones(1, requires_grad=True), ctx.depth - 1).backward()     # type: ignore[no-untyped-call]
        else:
            Deep.seen.append((threading.get_ident(), policy.asked()))
        return d, None


def test_a_backward_in_a_thread_of_torch_s_own_asks_what_holds_where_it_was_called() -> None:
    def seen() -> tuple[bool, str]:
        Deep.apply(torch.ones(1, requires_grad=True), 100).backward()                      # type: ignore[no-untyped-call]
        thread, asked = Deep.seen.pop()
        return thread != threading.get_ident(), asked
    assert seen() == (True, "")
    with gdn_ir.forbid("triton"):
        assert seen() == (True, "-triton")
        with gdn_ir.use("torch"):
            assert seen() == (True, "torch")
        assert seen() == (True, "-triton")
    assert seen() == (True, "") and policy.asked() == ""


@pytest.mark.parametrize(("variables", "prints"), [
    ({"GDN_IR_BACKEND": "torch"}, "torch"), ({"GDN_IR_FORBID": "tilelang, triton"}, "-tilelang-triton"),
    ({"GDN_IR_BACKEND": "cuda"}, "GDN_IR_BACKEND: got 'cuda'; accepts triton, tilelang, torch"),
    ({"GDN_IR_FORBID": "torch,cuda"}, "GDN_IR_FORBID: got 'cuda'; accepts triton, tilelang, torch"),
    ({"GDN_IR_BACKEND": "torch", "GDN_IR_FORBID": "torch"}, "GDN_IR_FORBID: got 'torch', and GDN_IR_BACKEND asks for torch")])
def test_environment(variables: dict[str, str], prints: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "_process", (variables.get("GDN_IR_BACKEND", ""), variables.get("GDN_IR_FORBID", "")))
    try:
        assert policy.asked() == prints
    except ValueError as e:
        assert prints in str(e)
    with gdn_ir.use("triton"):
        assert policy.asked() == "triton"


def test_environment_of_a_process() -> None:
    code = "import gdn_ir; print(gdn_ir.explain(H=1, HV=1, T=64, arch='cpu', dtype='f32').chosen)"
    for variable in ({"GDN_IR_BACKEND": "torch"}, {"GDN_IR_FORBID": "tilelang"}):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                              env={**os.environ, **variable})
        assert done.stdout == "torch\n"


# ---- third parties ----------------------------------------------------------------------------------------------------------


class Doubling:
    """Offers, for float32 on CPUs, what torch serves times two."""
    name, first = "doubling", True

    def offer(self, instance: Instance, arch: str, sequences: int, heads: int, tokens: int) -> tuple[Callable[..., None], str]:
        if instance.grads or instance.io != "f32" or arch != "cpu":
            raise ValueError("doubles float32 forwards on CPUs only")

        def run(tensors: dict[str, torch.Tensor], *rest: Any) -> None:
            registry.choose(instance, arch, sequences, heads, tokens, "torch")(tensors, *rest)
            tensors["o"].mul_(2)
        return run, "for the test"


@pytest.fixture
def doubling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Installed by an entry point, beside one that is broken."""
    entries = [importlib.metadata.EntryPoint("a", "tests.test_registry:Nothing", providers.GROUP),
               importlib.metadata.EntryPoint("b", "tests.test_registry:DOUBLING", providers.GROUP)]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries if group == providers.GROUP else [])
    providers._load.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"entry point a = tests.test_registry:Nothing are left out: AttributeError"):
        assert providers.names()[-1] == "doubling"
    yield
    providers.unregister("doubling")


def test_a_third_party_serves(doubling: None) -> None:
    x = make()
    plain = {}
    for name in ("torch", "doubling"):
        with gdn_ir.use(name):
            plain[name] = chunk_gated_delta_rule(**x)[0]
    assert torch.equal(plain["doubling"], 2 * plain["torch"])
    assert torch.equal(chunk_gated_delta_rule(**x)[0], plain["doubling"])        # it asks to be first
    with gdn_ir.forbid("doubling", "tilelang"):
        assert torch.equal(chunk_gated_delta_rule(**x)[0], plain["torch"])
    with gdn_ir.use("doubling"), pytest.raises(Unsupported, match=r"doubling cannot serve .*: doubles float32"):
        chunk_gated_delta_rule(**make(dtype=torch.bfloat16))
    said = gdn_ir.explain(H=1, HV=1, T=64, arch="cpu", dtype="f32")
    assert said.chosen == "doubling" and "schedule its own: for the test" in str(said)
    with pytest.raises(ValueError, match=r"provider\.name: got 'doubling'; accepts an identifier"):
        providers.register(Doubling())


def test_a_withdrawn_third_party_is_gone(doubling: None) -> None:
    x = make()
    doubled = chunk_gated_delta_rule(**x)[0]
    providers.unregister("doubling")
    try:
        with gdn_ir.forbid("tilelang"):
            assert torch.equal(2 * chunk_gated_delta_rule(**x)[0], doubled)    # prepared calls are forgotten too
        assert "doubling" not in str(gdn_ir.explain(H=1, HV=1, T=64, arch="cpu", dtype="f32"))
        with pytest.raises(ValueError, match="name: got 'doubling'; accepts nothing"):
            providers.unregister("doubling")
    finally:
        providers.register(Doubling())


DOUBLING = Doubling()


# ---- explain ----------------------------------------------------------------------------------------------------------------


def test_explain_as_data(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said = gdn_ir.explain(H=2, HV=4, T=64, arch="sm_90", recurrent=True, grads=())
    assert said.call.startswith("dense bf16, 1 x 64 tokens, one token at a time") and said.chosen in ("torch", "triton")
    back = gdn_ir.explain(H=2, HV=4, T=64, arch="cpu", dtype="f32", grads=("q", "v")).data()
    assert back["chosen"] == "tilelang" and "gradients of q v" in back["call"]
    first = gdn_ir.explain(H=16, HV=32, T=2048, sequences=1, arch="sm_90").data()["choices"][0]
    assert first["backend"] == "triton" and first["state"] == "chosen" and set(first["kernels"]) == {"solve", "scan", "output"}
    monkeypatch.setattr(sys, "argv", ["gdn-ir", "explain", "--json", "--arch", "cpu", "--op", "recurrent", "--dtype", "f32"])
    with pytest.raises(SystemExit):
        cli.main()
    assert [call["chosen"] for call in json.loads(capsys.readouterr().out)] == ["tilelang"]


def test_explain() -> None:
    text = str(gdn_ir.explain(H=16, HV=32, T=32768, sequences=1, arch="sm_90"))
    assert "packed bf16, 1 sequence, 32768 tokens together" in text and "tilelang chosen: first that can serve" in text
    assert "each sequence is cut into segments of 64 chunks" in text
    text = str(gdn_ir.explain(H=16, HV=32, T=2048, sequences=1, arch="sm_90"))
    assert "triton   chosen: first that can serve on sm_90" in text and "tiles of 32 columns" in text
    assert "torch    not chosen" in text
    with gdn_ir.use("torch"):
        assert "torch    chosen: gdn_ir.use or GDN_IR_BACKEND asks for it" in str(gdn_ir.explain(H=1, HV=1, T=64, arch="sm_90"))
    assert "tiles of 16 columns" in str(gdn_ir.explain(H=2, HV=8, T=2048, sequences=1, arch="sm_90"))
    assert "triton   cannot: triton lowers to sm_80 and sm_90, not to cpu" in str(gdn_ir.explain(H=1, HV=1, T=64, arch="cpu"))


def test_explain_takes_shapes(command: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = command("explain", "8x1024:16/32", "3000+5192:2/8", "--arch", "sm_90")
    assert code == 0 and "8 sequences, 8192 tokens together, H/HV 16/32" in out and "2 sequences, 8192 tokens" in out
    code, _, err = command("explain", "8by1024")
    assert code == 2 and "got '8by1024'; accepts 8x1024:16/32" in err


def test_other_gpus_are_served_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    for capability, name in (((7, 5), "sm_75"), ((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((12, 0), "sm_120")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d, c=capability: c)
        assert registry.architecture.__wrapped__(device) == name               # type: ignore[attr-defined]
    text = str(gdn_ir.explain(H=1, HV=1, T=64, arch="sm_75"))
    assert "triton   cannot: arch: got 'sm_75'; accepts cpu, sm_80, sm_90" in text and "torch    chosen" in text


@pytest.mark.parametrize(("arguments", "message"), [
    ({"H": 3, "HV": 4}, "HV: got 4; accepts a multiple of H = 3"),
    ({"sequences": 2, "B": 2}, "B: got 2 with sequences = 2; accepts 1"),
    ({"dtype": "int8"}, "dtype: got 'int8'; accepts"),
    ({"dtype": torch.int8}, r"dtype: got 'torch\.int8'; accepts"),
    ({"K": 20}, "K: got 20; accepts a multiple of 16 from 16 to 256"),
    ({"T": -1}, "T: got -1"), ({"grads": "q,k"}, "grads: got 'q,k'; accepts names in a tuple"),
])
def test_explain_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gdn_ir.explain(**({"H": 1, "HV": 1, "T": 64} | arguments))            # type: ignore[arg-type]


# ---- the command line -------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gdn-ir", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err
    return run


@pytest.mark.parametrize("words", [("--kernel", "scan"), ("--arch", "sm_80"), ("--schedule", "naive", "--dtype", "f32"),
                                   ("--grads", "q,k,v,g,beta,initial_state"),
                                   ("--grads", "v", "--schedule", "fused", "--flags", "no-erase"), ("--schedule", "wy"),
                                   ("--backend", "torch", "--flags", "no-erase"), ("--flags", "no-decay"),
                                   ("8x1024:16/32", "--kernel", "scan"), ("--keep", "states"),
                                   ("--keep", "inverse", "--grads", "q,k", "--schedule", "fused")])
def test_emit_prints_what_compiles(command: Callable[..., tuple[int, str, str]], words: tuple[str, ...]) -> None:
    code, out, err = command("emit", *words)
    assert code == 0 and not err
    compile(out, "emitted", "exec")
    assert "# gated_delta.py:" in out and "emitted by gdn-ir" in out


@pytest.mark.parametrize(("words", "seen"), [
    (("--kernel", "scan", "--arch", "sm_80"), (".target sm_80", "mma.sync")),
    (("--backend", "tilelang", "--arch", "cpu", "--dtype", "f32", "--K", "32", "--V", "32"), ("@T.prim_func", "int32_t")),
    (("--backend", "torch", "--dtype", "f32"), ("torch runs the source as it stands",)),
])
def test_emit_generated(command: Callable[..., tuple[int, str, str]], words: tuple[str, ...], seen: tuple[str, ...]) -> None:
    code, out, _ = command("emit", "--generated", *words)
    assert code == 0 and all(s in out for s in seen), out[:500]


def test_explain_of_a_backward(command: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = command("explain", "--grads", "q,k,v,g,beta,initial_state", "--dtype", "f32", "--arch", "cpu")
    assert code == 0 and out.startswith("packed f32, 1 sequence, 8192 tokens together, "
                                        "gradients of q k v g beta initial_state, H/HV 16/32")
    assert "tilelang chosen" in out and "kernels: again" in out
    code, out, _ = command("explain", "--grads", "q,k,v,g,beta", "--dtype", "f32", "--arch", "cpu", "--keep", "states")
    assert code == 0 and "gradients of q k v g beta, given states" in out and "again" not in out
    assert str(gdn_ir.explain(H=1, HV=2, T=64, dtype="f32", arch="cpu", keep="inverse")).startswith(
        "dense f32, 1 x 64 tokens, leaves inverse, H/HV 1/2")


def test_emit_takes_a_schedule_file(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    mine = Schedule("mine", steps=plan("fused")).with_options(scan=KernelOptions(64, 8, 2))
    (tmp_path / "mine.json").write_text(mine.to_json())
    assert Schedule.from_json(command("emit", "--schedule", str(tmp_path / "mine.json"), "--json")[1]) == mine
    code, _, err = command("emit", "--schedule", str(tmp_path / "mine.json"), "--grads", "q,k,v,g,beta")
    assert code == 2 and "for gated delta rule, gradients of q k v g beta" in " ".join(err.split())
    code, out, _ = command("emit", "--schedule", str(tmp_path / "mine.json"))
    assert code == 0 and "schedule mine: chunks of 64" in out and "launched with 8 warps, 2 stages, V in tiles of 64" in out


@pytest.mark.parametrize(("words", "message"), [
    (("emit", "--kernel", "best", "--schedule", "states"), "--kernel: got 'best'; this schedule has solve, scan, output"),
    (("emit", "--schedule", "best"), "--schedule: got 'best'; accepts default, naive, fused"),
    (("emit", "--schedule", "--schedule: got 'none.json'; accepts"), "--schedule: got 'none.json'; accepts"),
    (("emit", "--schedule", "wy", "--grads", "v"), "--schedule: got 'wy'; accepts default, naive, fused, states, grouped,"),
    (("emit", "--grads", "q,w"), "--grads: got 'w'; accepts q, k, v"),
    (("emit", "1x64:3/4"), "shape: got heads 3/4; accepts H/HV with HV a multiple of H"),
    (("emit", "forward"), "shape: got forward; accepts one call"),
    (("emit", "--flags", "no-eraser"), "--flags: got 'no-eraser'; accepts erase,"),
    (("emit", "--grads", "q", "--op", "forward"), "--grads: got 'q' with --op forward; accepts"),
    (("explain", "--dtype", "b"), "--dtype: got 'b'; accepts bf16, f16, f32, f64"),
    (("explain", "--grads", "o"), "--grads: got 'o'; accepts q, k, v"),
    (("emit", "--backend", "cuda"), "--backend: got 'cuda'; accepts triton, tilelang, torch"),
    (("emit", "--op", "recurrent", "--schedule", "states"), "--schedule: got 'states' with --op recurrent; accepts default"),
    (("emit", "--schedule", "roles", "--flags", "no-decay"), "--schedule roles: roles need a decay"),
    (("emit", "--arch", "hopper"), "arch: got 'hopper'; accepts cpu and GPUs'"),
    (("emit", "2000+3000:1/2", "--dense"), "shape: got 2000+3000:1/2 with --dense"),
    (("emit", "--arch", "sm_70", "--backend", "triton"), "arch: got 'sm_70'; accepts cpu, sm_80, sm_90"),
    (("emit", "--dtype", "int8"), "dtype: got 'int8'; accepts"),
    (("emit", "--K", "20"), "K: got 20; accepts"),
    (("explain", "1x64:3/4"), "shapes: got heads 3/4; accepts"),
    (("demo", "/nowhere.txt"), "text: got /nowhere.txt; accepts the path of a file"),
])
def test_wrong_words_get_one_line(command: Callable[..., tuple[int, str, str]], words: tuple[str, ...], message: str) -> None:
    code, out, err = command(*words)
    assert code == 2 and not out and "Traceback" not in err
    assert message in err.replace("\n", " ")


def test_demo_on_a_text(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 5)
    console = Console(record=True, width=160)
    demo.run(text, console)
    page = console.export_text()
    assert "225 bytes as tokens" in page and "torch" in page and "triton" in page
    assert "tilelang is chosen: the first that can serve here" in page and "torch is not chosen" in page
    assert "triton cannot: triton lowers to" in page
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"text: got .*empty.txt, which is empty"):
        demo.run(tmp_path / "empty.txt", console)


def test_demo_trains(tmp_path: Path) -> None:
    """Words that repeat are learnt at once; going on from states is the same as reading it all."""
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten. " * 100)
    size = Size(layers=1, width=32, H=1, HV=2, K=16, V=16)
    small = demo_train.Recipe(size, batch=8, context=64, rate=2e-2, sample=20, steps=60)
    console = Console(record=True, width=160)
    losses = demo_train.run(text, 0.1, console, small)
    page = console.export_text()
    assert len(losses) == 60 and losses[0] > 4 and sum(losses[-5:]) / 5 < 0.5 * losses[0]
    assert "text held out" in page and "nats per byte" in page and "A sample" in page
    (tmp_path / "short.txt").write_text("one two three")
    with pytest.raises(ValueError, match=r"text: got short.txt of 13 bytes; accepts a text of at least 1280"):
        demo_train.run(tmp_path / "short.txt", 1.0, console, small)
    with pytest.raises(ValueError, match=r"seconds: got 0.0; accepts a number above 0"):
        demo_train.run(text, 0.0, console, small)


def test_the_demo_model_goes_on_from_states() -> None:
    torch.manual_seed(0)
    model = Model(Size(layers=2, width=32, H=1, HV=2, K=16, V=16))
    text = torch.randint(0, 256, (2, 20))
    with registry.use("torch"), torch.no_grad():
        whole, _ = model(text)
        first, past = model(text[:, :13], keep=True)
        rest, _ = model(text[:, 13:], past)
    assert torch.allclose(torch.cat([first, rest], 1), whole, atol=1e-4)


def test_demo_makes_what_a_layer_makes() -> None:
    x = demo.layer(b"some text, some text", demo.SMALL, torch.device("cpu"))
    assert torch.allclose(x["q"].norm(dim=-1), torch.ones(1, 20, 2), atol=1e-5)
    assert (x["g"] < 0).all() and (x["beta"] > 0).all() and (x["beta"] < 1).all()
    assert torch.equal(x["v"], demo.layer(b"some text, some text", demo.SMALL, torch.device("cpu"))["v"])


def test_importing_the_package_is_light() -> None:
    """`import gdn_ir` brings neither torch nor Triton; a first use does."""
    code = "import sys, gdn_ir, json; print(json.dumps([m in sys.modules for m in ('torch', 'triton')]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [False, False]


def test_no_peer_is_imported_unasked() -> None:
    """Ops, layer, registry and integrations that are not enabled leave other libraries alone, and torch's compiler unloaded."""
    code = ("import sys, torch, gdn_ir.ops, gdn_ir.nn, gdn_ir.registry\nlight = 'torch._dynamo' not in sys.modules\n"
            "import gdn_ir.integrations.fla, gdn_ir.integrations.transformers\n"
            "print(light, [m for m in ('fla', 'transformers', 'flash_qla', 'flashinfer') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True []\n"


def test_what_no_gpu_has_run_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GDN_IR_UNVERIFIED", raising=False)
    back, one = replace(BF16, grads=("q", "k", "v", "g", "beta")), replace(BF16, recurrent=True)
    rows = replace(BF16, io="f32", beta="f32", K=64, V=64)

    def served(instance: Instance, arch: str, tokens: int = 8192) -> list[str]:
        return [o.backend for o in registry.options(instance, arch, 1, 32, tokens) if o.variant is not None]
    assert served(back, "sm_90") == ["tilelang", "triton", "torch"] and served(back, "sm_80") == ["torch"]
    assert served(replace(back, io="f16", beta="f16"), "sm_90") == ["triton", "torch"]               # no roles
    assert served(one, "sm_90") == served(one, "sm_80") == ["triton", "torch"]
    assert served(rows, "sm_90") == served(rows, "sm_80") == ["triton", "tilelang", "torch"]
    first = registry.options(back, "sm_80", 1, 32, 8192)[0]
    assert "triton's backward has not run on all it ships for on sm_80 (GDN_IR_UNVERIFIED=1 lets it)" in first.reason
    for name in ("GDN_IR_UNVERIFIED", "GDN_IR_TUNED"):
        with monkeypatch.context() as m, pytest.raises(RuntimeError, match=f"{name}: got 'yes'; accepts 1, 0 or nothing"):
            m.setenv(name, "yes")
            registry.forget()
            registry.options(back, "sm_80", 1, 4, 64)
    monkeypatch.setenv("GDN_IR_UNVERIFIED", "1")
    assert served(back, "sm_80", 8191)[0] == "triton"


def test_architectures_by_name() -> None:
    assert [registry.named(a) for a in ("cpu", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100")] == \
        ["cpu", "sm_80", "sm_80", "sm_80", "sm_90", "sm_100"]
    with pytest.raises(ValueError, match="arch: got 'gfx942'; accepts cpu and GPUs'"):
        gdn_ir.explain(H=1, HV=1, T=64, arch="gfx942")


def test_what_threads_inherit_is_kept() -> None:
    """By torch, which not every version counts: else it is freed while it is looked at."""
    for _ in range(3):
        with registry.use("torch"):
            gc.collect()
            held = policy._backends.inherited()
            assert held == (threading.get_ident(), "torch") and sys.getrefcount(held) >= 3      # torch's, ours, the argument
        assert sys.getrefcount(held) >= 2
