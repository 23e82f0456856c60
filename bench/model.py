"""A model end to end: forward and training step of a stack like Qwen3-Next's, its op served by us, FLA, FlashQLA or torch.

    python -m gdn_ir.bench.model --out bench/results/h100/model.json          # 8 layers, 8192 tokens, bfloat16
    python -m gdn_ir.bench.model --toy --out toy.json                         # seconds, on a CPU

One model of transformers, built once (dense MLPs in the place of experts), and under the name by which its file calls the op,
one contender after another. Steps are timed in turns. With each time stands its error: logits and gradients against the same
model in the same dtype with transformers' own torch op, which computes in float32.
"""
from __future__ import annotations

import argparse
import datetime
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gdn_ir import ops
from gdn_ir.backends.base import TORCH
from gdn_ir.bench.cases import Row
from gdn_ir.bench.contenders import CONTENDERS, NotTimed, need, versions
from gdn_ir.bench.errors import relative
from gdn_ir.bench.results import commit_here
from gdn_ir.bench.suite import gpu_name

Op = Callable[..., tuple[torch.Tensor, "torch.Tensor | None"]]
REFERENCE = "transformers"
RULE = "torch_chunk_gated_delta_rule"


@dataclass(frozen=True)
class Shape:
    """The model (three layers of the gated delta rule, then one of attention) and its batch."""
    layers: int = 8
    hidden: int = 2048
    mlp: int = 5120
    vocabulary: int = 32768
    H: int = 16
    HV: int = 32
    K: int = 128
    V: int = 128
    attention: tuple[int, int, int] = (16, 2, 256)         # query heads, key heads, width
    batch: int = 1
    tokens: int = 8192


TOY = Shape(4, 32, 32, 64, 2, 4, 16, 16, (2, 1, 16), 1, 24)


def build(shape: Shape, device: str, dtype: torch.dtype) -> Any:
    """The model, randomly initialised."""
    module = modeling()
    heads, kv_heads, width = shape.attention
    kinds = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(shape.layers)]
    config = module.Qwen3NextConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.mlp, num_hidden_layers=shape.layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=width, linear_num_key_heads=shape.H,
        linear_num_value_heads=shape.HV, linear_key_head_dim=shape.K, linear_value_head_dim=shape.V, layer_types=kinds,
        mlp_only_layers=list(range(shape.layers)), use_cache=False)
    torch.manual_seed(0)
    with torch.device(device):
        return module.Qwen3NextForCausalLM(config).to(dtype)


def modeling() -> Any:
    return importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")


def contenders(shape: Shape, device: str) -> dict[str, Callable[[], Op]]:
    """By name, what finds the op; raises NotTimed where it cannot be asked."""
    row = Row((shape.tokens,), shape.H, shape.HV, shape.K, shape.V)
    where = {"q": torch.empty(0, device=device)}

    def peer(package: str, module: str, sizes: bool) -> Callable[[], Op]:
        def find() -> Op:
            need(package, where, row, sizes)
            op: Op = importlib.import_module(module).chunk_gated_delta_rule
            return op
        return find
    return {"gdn-ir": lambda: ops.chunk_gated_delta_rule, "FLA": peer("fla", "fla.ops.gated_delta_rule", False),
            "FlashQLA": peer("flash_qla", "flash_qla", True), REFERENCE: reference}


def reference() -> Op:
    op: Op = getattr(modeling(), RULE).__wrapped__         # past what transformers would take of other packages
    return op


@contextmanager
def served_by(op: Op) -> Iterator[None]:
    module = modeling()
    before = getattr(module, RULE)

    def rule(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, *,
             use_qk_l2norm_in_kernel: bool, **_: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        return op(query, key, value, g=g, beta=beta, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)
    setattr(module, RULE, rule)
    try:
        yield
    finally:
        setattr(module, RULE, before)


class Steps:
    """What is timed: a forward without gradients; a training step with AdamW, at a rate of 0 so that weights stay."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        self.model, self.device = build(shape, device, dtype), device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=device == "cuda")
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(shape.vocabulary, (shape.batch, shape.tokens), generator=generator).to(device)

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def forward(self) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self.model(self.tokens).logits
        return logits

    def train(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.tokens, labels=self.tokens).loss.backward()
        self.optimizer.step()

    def gradients(self) -> torch.Tensor:
        """Of every parameter, after `train`, each by its own norm: else the largest would hide the rest."""
        found = [(torch.zeros_like(p) if p.grad is None else p.grad).float().flatten() for p in self.model.parameters()]
        return torch.cat([d / d.norm().clamp(min=1e-30) for d in found])

    def timed(self, call: Callable[[], object]) -> float:
        """Seconds."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def peak(self) -> int | None:
        """The most GPU memory that a training step holds, weights and all, in bytes."""
        if self.device != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        self.train()
        self.wait()
        return torch.cuda.max_memory_allocated()


def measure(shape: Shape, device: str, dtype: torch.dtype, names: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Of each contender: first_step_s (compilation and tuning included, disk caches as they are), forward_ms and step_ms
    (medians), tokens_per_s of both, peak_bytes, and errors; or the reason why it was not timed."""
    steps = Steps(shape, device, dtype)
    found: dict[str, dict[str, Any]] = {}
    with served_by(lambda q, k, v, **_: (v.clone(), None)):
        steps.train()                                      # torch's own first step
    with served_by(reference()):
        logits = steps.forward()
        steps.train()
        gradients = steps.gradients()
    ready: dict[str, Op] = {}
    for name in names:
        try:
            op = contenders(shape, device)[name]()
            with served_by(op):
                first = steps.timed(steps.train)
                errors = {"gradients": relative(steps.gradients(), gradients), "logits": relative(steps.forward(), logits)}
                found[name] = {"first_step_s": first, "peak_bytes": steps.peak(), "errors": errors}
            ready[name] = op
        except NotTimed as e:
            found[name] = {"reason": str(e)}
        except Exception as e:                             # a peer that fails is a result too
            steps.wait()
            found[name] = {"reason": f"{type(e).__name__}: {e}"[:300]}
    for part, call in (("forward", steps.forward), ("step", steps.train)):
        times: dict[str, list[float]] = {name: [] for name in ready}
        for turn in range(rounds + 1):
            for name, op in ready.items():
                with served_by(op):
                    taken = steps.timed(call)
                times[name] += [taken] if turn else []     # the first of all is not counted
        for name, values in times.items():
            middle = statistics.median(values)
            found[name] |= {f"{part}_ms": 1e3 * middle, f"{part}_tokens_per_s": shape.batch * shape.tokens / middle}
    return found


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--toy", action="store_true", help="a model of seconds, for a CPU")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", default="", help="bf16, f16 or f32 (bf16; f32 on a CPU)")
    p.add_argument("--contenders", default="", help="of gdn-ir, FLA, FlashQLA, transformers, by commas (all)")
    p.add_argument("--rounds", type=int, default=10)
    p.add_argument("--commit", default="", help="what is measured (the checkout's)")
    for name in ("layers", "batch", "tokens"):
        p.add_argument(f"--{name}", type=int)
    return p


def main(words: list[str] | None = None) -> None:
    p = parser()
    a = p.parse_args(words)
    changes = {n: getattr(a, n) for n in ("layers", "batch", "tokens") if getattr(a, n) is not None}
    shape = Shape(**(asdict(TOY if a.toy else Shape()) | changes))
    dtype = a.dtype or ("f32" if a.device == "cpu" else "bf16")
    names = [n for n in a.contenders.split(",") if n] or list(contenders(shape, a.device))
    for option, value, accepted in (("--dtype", [dtype], ("bf16", "f16", "f32")),
                                    ("--contenders", names, tuple(contenders(shape, a.device)))):
        for x in value:
            if x not in accepted:
                p.error(f"{option}: got {x!r}; accepts {', '.join(accepted)}")
    for option, number in (("--rounds", a.rounds), *((f"--{n}", x) for n, x in changes.items())):
        if number < 1:
            p.error(f"{option}: got {number}; accepts a number from 1 on")
    found = measure(shape, a.device, TORCH[dtype], names, a.rounds)
    told = versions(list(CONTENDERS.values())) | {"transformers": importlib.import_module("transformers").__version__}
    about = {"commit": a.commit or commit_here(), "gpu": gpu_name(a.device), "dtype": dtype, "shape": asdict(shape),
             "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
             "versions": told}
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(about | {"contenders": found}, indent=1) + "\n")
    for name, row in found.items():
        print(f"{name:<13}" + (row.get("reason") or f"forward {row['forward_tokens_per_s']:10.0f} tokens/s, training "
                               f"{row['step_tokens_per_s']:10.0f}, first step {row['first_step_s']:.1f} s, errors "
                               f"{row['errors']['logits']:.1e} {row['errors']['gradients']:.1e}"))


if __name__ == "__main__":
    main()
