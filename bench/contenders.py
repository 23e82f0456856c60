"""Who is measured: every backend of gdn-ir, the peers a user would install instead, and softmax attention.

A contender's `prepare` takes packed inputs (`inputs.make`) and returns a call that gives {"o": [T, HV, V], "final_state":
[N, HV, K, V]}, and the gradients {"dq", "dk", "dv", "dg", "dbeta"} where a backward is asked for. What a peer wants in another
form is converted here, outside of what is timed. Only this folder imports peers, and only when they are asked for.
"""
from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from gdn_ir import registry
from gdn_ir.backends import BACKENDS
from gdn_ir.bench.cases import Row
from gdn_ir.compiler import NAMES, Instance, Unsupported, Variant
from gdn_ir.ops import chunk_gated_delta_rule
from gdn_ir.programs.gated_delta import Switches

os.environ["FLA_FLASH_QLA"] = "0"                          # FLA itself, not what it hands over to FlashQLA

Tensors = dict[str, torch.Tensor]
Call = Callable[[], Tensors]
Forward = Callable[[Tensors], tuple[torch.Tensor, "torch.Tensor | None"]]
LEAVES = ("q", "k", "v", "g", "beta")
SERVED = "served"                                          # of ours: what the registry serves, each pass by whom it will


class NotTimed(Exception):
    """A contender is listed but not measured; the message is the reason."""


@dataclass(frozen=True)
class Contender:
    """kind: "gdn-ir", "peer" or "attention"; package and distribution: what it is imported and installed as."""
    name: str
    kind: str
    prepare: Callable[[Row, Tensors, bool], Call]
    package: str = ""
    distribution: str = ""


def instance(row: Row, dtype: torch.dtype, train: bool) -> Instance:
    """What of ours serves a row: packed, with a final state where nothing is differentiated."""
    io = NAMES[dtype]
    return Instance(Switches(final_state=not train), row.K, row.V, io, io, True)


def backward_of(row: Row, dtype: torch.dtype) -> Instance:
    """The backward of the same, where it is differentiated."""
    forward = instance(row, dtype, True)
    return Instance(forward.switches, row.K, row.V, forward.io, forward.beta, True, LEAVES, row.HV > row.H)


def variant_of(backend: str, row: Row, x: Tensors, train: bool, back: bool = False) -> Variant:
    """The variant of ours that a backend (or, with SERVED, the first that can) serves a row's forward with, or its backward;
    raises NotTimed with its reason where it cannot."""
    wanted = backward_of(row, x["q"].dtype) if back else instance(row, x["q"].dtype, train)
    try:
        chosen = registry.choose(wanted, registry.architecture(x["q"].device), len(row.lengths), row.HV, row.tokens,
                                 "" if backend == SERVED else backend)
    except Unsupported as e:
        raise NotTimed(str(e)) from None
    assert isinstance(chosen, Variant)
    return chosen


def differentiated(forward: Forward, x: Tensors, names: tuple[str, ...] = LEAVES) -> Call:
    """Forward and backward: the gradients of sum(o * do). Nothing but o is differentiated, as in training."""
    leaves = {n: x[n].detach().requires_grad_() for n in names}
    rest = {n: t for n, t in x.items() if n not in leaves}

    def call() -> Tensors:
        o, _ = forward({**rest, **leaves})
        gradients = torch.autograd.grad(o, list(leaves.values()), x["do"].view(o.shape))
        return {"o": o.detach()} | {f"d{n}": d for n, d in zip(leaves, gradients, strict=True)}
    return call


def undifferentiated(forward: Forward, x: Tensors) -> Call:
    def call() -> Tensors:
        with torch.no_grad():
            o, state = forward(x)
        return {"o": o} if state is None else {"o": o, "final_state": state}
    return call


def op_call(op: Callable[..., tuple[torch.Tensor, torch.Tensor | None]], x: Tensors, train: bool) -> Call:
    """An op with flash-linear-attention's arguments: dense batches of one, boundaries in cu_seqlens."""
    def forward(y: Tensors) -> tuple[torch.Tensor, torch.Tensor | None]:
        o, state = op(*(y[n][None] for n in LEAVES), output_final_state=not train, cu_seqlens=y["cu_seqlens"])
        return o.squeeze(0), state                         # a view: o[0]'s backward fills and copies what is timed
    return differentiated(forward, x) if train else undifferentiated(forward, x)


def ours(backend: str, row: Row, x: Tensors, train: bool) -> Call:
    """The public op, served by one backend, or, with SERVED, as it is where nobody asks for one: in a forward and a backward
    that may be two."""
    if not train:
        variant_of(backend, row, x, train)                 # its reason, where it cannot
    call = op_call(chunk_gated_delta_rule, x, train)
    if backend == SERVED:
        return call

    def forced() -> Tensors:
        with registry.use(backend):
            return call()
    return forced


def need(package: str, x: Tensors, row: Row, sizes: bool = False) -> None:
    """Raises NotTimed where a peer cannot be asked. sizes: it has kernels for K = V = 128 alone."""
    if importlib.util.find_spec(package.split(".")[0]) is None:
        raise NotTimed("not installed")
    if not x["q"].is_cuda:
        raise NotTimed("needs a CUDA GPU")
    if sizes and (row.K, row.V) != (128, 128):
        raise NotTimed(f"has kernels for K = V = 128 only, not {row.K} and {row.V}")


def fla(row: Row, x: Tensors, train: bool) -> Call:
    need("fla", x, row)
    return op_call(importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule, x, train)


def flash_qla(row: Row, x: Tensors, train: bool) -> Call:
    need("flash_qla", x, row, sizes=True)
    return op_call(importlib.import_module("flash_qla").chunk_gated_delta_rule, x, train)


def flashinfer(row: Row, x: Tensors, train: bool) -> Call:
    """Packed without a batch, decays not as logs, float32 gates; its final state is [N, HV, V, K]. It is told the longest
    length, which lets it launch less."""
    need("flashinfer", x, row, sizes=True)
    if train:
        raise NotTimed("has no backward")
    op = importlib.import_module("flashinfer.gdn_prefill").chunk_gated_delta_rule
    decay, beta, longest = torch.exp(x["g"]), x["beta"].float(), max(row.lengths)

    def forward(y: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        o, state = op(y["q"], y["k"], y["v"], decay, beta, output_final_state=True, cu_seqlens=y["cu_seqlens"],
                      max_seqlen=longest)
        return o, state.mT
    return undifferentiated(forward, x)


def attention(kind: str, row: Row, x: Tensors, train: bool) -> Call:
    """Causal softmax attention over as many heads as v has, dense: for time and memory, not for its numbers."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    if len(set(row.lengths)) > 1:
        raise NotTimed("is dense here: needs sequences of one length")
    backend = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[kind]
    shape = (len(row.lengths), row.lengths[0], row.HV, row.V)
    generator = torch.Generator(device=x["v"].device).manual_seed(0)
    y = {n: torch.randn(shape, generator=generator, device=x["v"].device).to(x["v"].dtype).transpose(1, 2)
         for n in ("q", "k", "v", "do")}

    def forward(z: Tensors) -> tuple[torch.Tensor, None]:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(z["q"], z["k"], z["v"], is_causal=True), None
    if not train:
        return undifferentiated(forward, y)
    leaves = [y[n].detach().requires_grad_() for n in ("q", "k", "v")]

    def call() -> Tensors:
        o, _ = forward(dict(zip(("q", "k", "v"), leaves, strict=True)))
        return {"o": o.detach()} | dict(zip(("dq", "dk", "dv"), torch.autograd.grad(o, leaves, y["do"]), strict=True))
    return call


CONTENDERS: dict[str, Contender] = {c.name: c for c in (
    *(Contender(f"gdn-ir {b}", "gdn-ir", partial(ours, b), "gdn_ir", "gdn-ir") for b in BACKENDS),
    Contender(f"gdn-ir {SERVED}", "gdn-ir", partial(ours, SERVED), "gdn_ir", "gdn-ir"),
    Contender("FLA", "peer", fla, "fla", "flash-linear-attention"),
    Contender("FlashQLA", "peer", flash_qla, "flash_qla", "flash-qla"),
    Contender("FlashInfer", "peer", flashinfer, "flashinfer", "flashinfer-python"),
    Contender("attention cuDNN", "attention", partial(attention, "cudnn"), "torch", "torch"),
    Contender("attention flash", "attention", partial(attention, "flash"), "torch", "torch"))}
NAMES_OF = {"--backends": {c.name.removeprefix("gdn-ir "): c for c in CONTENDERS.values() if c.kind == "gdn-ir"},
            "--peers": {c.name.lower().replace(" ", "-"): c for c in CONTENDERS.values() if c.kind != "gdn-ir"}}


def chosen(option: str, text: str) -> list[Contender]:
    """The contenders that --backends or --peers names, separated by commas; "all" and "none" too."""
    every = NAMES_OF[option]
    if text in ("all", "none"):
        return list(every.values()) if text == "all" else []
    wanted = [part.strip().lower() for part in text.split(",")]
    for name in wanted:
        if name not in every:
            raise ValueError(f"{option}: got {name!r}; accepts {', '.join(every)}, several separated by commas, all or none")
    return [every[name] for name in wanted]


def versions(contenders: list[Contender]) -> dict[str, str]:
    """Of torch, Triton, TileLang and what the contenders are installed as; what is not installed says so."""
    found = {}
    for name in dict.fromkeys(["torch", "triton", "tilelang", *(c.distribution for c in contenders)]):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["torch"] = torch.__version__
    return found
