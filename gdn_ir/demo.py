"""The demo: real text through a Gated DeltaNet layer's projections, then the op on every backend this machine can run."""
from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from gdn_ir import registry
from gdn_ir.backends import BACKENDS
from gdn_ir.compiler import NAMES, Instance
from gdn_ir.ops import chunk_gated_delta_rule
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.reference import recurrence

Tensor = torch.Tensor
DEFAULT_TEXT = Path(argparse.__file__)                     # a text that every machine with Python has


@dataclass(frozen=True)
class Shape:
    """Of the layer: heads of q and k, of v, their sizes, and how many tokens of the text are read."""
    H: int
    HV: int
    K: int
    V: int
    tokens: int
    width: int
    dtype: torch.dtype


QWEN3_NEXT = Shape(16, 32, 128, 128, 4096, 2048, torch.bfloat16)
SMALL = Shape(2, 4, 64, 64, 1024, 128, torch.float32)


def layer(text: bytes, shape: Shape, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """q, k, v, g, beta [1, T, ...] as a Gated DeltaNet layer (arXiv 2412.06464, section 3.4) makes them from embedded bytes:
    linear, depthwise causal convolution of width 4, SiLU; q and k of unit length; g = -exp(A_log) softplus(a + dt_bias)."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*size: int) -> Tensor:
        drawn: Tensor = torch.randn(*size, generator=generator) / size[-1] ** 0.5
        return drawn.to(device)
    x = torch.randn(256, shape.width, generator=generator).to(device)[torch.tensor(list(text), device=device)]
    x = torch.nn.functional.rms_norm(x, (shape.width,))

    def mixed(heads: int, size: int) -> Tensor:
        y = (x @ weight(heads * size, shape.width).T).T[None]
        y = torch.nn.functional.conv1d(torch.nn.functional.pad(y, (3, 0)), weight(heads * size, 1, 4), groups=heads * size)
        return torch.nn.functional.silu(y)[0].T.reshape(1, len(text), heads, size)
    q, k = (torch.nn.functional.normalize(mixed(shape.H, shape.K), dim=-1) for _ in range(2))
    rate = 16 * torch.rand(shape.HV, generator=generator).to(device)
    step = torch.exp(torch.rand(shape.HV, generator=generator).to(device) * 4.6 - 6.9)               # from 1e-3 to 0.1
    a = x @ weight(shape.HV, shape.width).T + torch.log(torch.expm1(step))
    return {"q": q.to(shape.dtype), "k": k.to(shape.dtype), "v": mixed(shape.HV, shape.V).to(shape.dtype),
            "g": -(rate * torch.nn.functional.softplus(a))[None],
            "beta": torch.sigmoid(x @ weight(shape.HV, shape.width).T)[None].to(shape.dtype)}


def milliseconds(x: dict[str, Tensor], repeats: int = 5) -> float:
    """Median wall-clock time of one call, the host's part included."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        chunk_gated_delta_rule(**x)                        # type: ignore[arg-type]
        if x["q"].is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def run(path: Path | None = None, console: Console | None = None) -> None:
    """Print the table: variant, schedule, time, error against the float64 recurrence, the choice and its reason."""
    console = console or Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = QWEN3_NEXT if device.type == "cuda" else SMALL
    path = path or DEFAULT_TEXT
    whole = path.read_bytes()
    text = whole[:shape.tokens]
    if not text:
        raise ValueError(f"text: got {path}, which is empty; accepts any file of at least one byte")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    read = f"{len(text)} bytes" if len(text) == len(whole) else f"the first {len(text)} of {len(whole)} bytes"
    console.print(f"{path.name}: {read} as tokens; H/HV {shape.H}/{shape.HV}, K = {shape.K}, V = {shape.V}, "
                  f"{str(shape.dtype).removeprefix('torch.')}, on {where}")
    x = layer(text, shape, device)
    with console.status("the token recurrence in float64, for comparison"):
        host = {n: t.cpu() for n, t in x.items()}
        o, S = (t.to(device) for t in recurrence(host["q"], host["k"], host["v"], host["g"], host["beta"]))
    io = NAMES[shape.dtype]
    instance = Instance(Switches(final_state=True), shape.K, shape.V, io, io, False)
    options = {o.backend: o for o in registry.options(instance, registry.architecture(device), 1, shape.HV, len(text))}
    chosen = registry.choose(instance, registry.architecture(device), 1, shape.HV, len(text)).backend
    table, reasons = Table("backend", "schedule", "ms", "error of o", "error of final state"), []
    for name in sorted(BACKENDS, key=lambda b: b != chosen):
        option = options.get(name)
        if option is None or option.variant is None:
            table.add_row(name, *"----")
            reasons.append(f"{name} cannot: {option.reason if option else 'not for this device'}")
            continue
        with registry.use(name), torch.no_grad():
            found, state = chunk_gated_delta_rule(**x, output_final_state=True)         # type: ignore[arg-type]
            ms = milliseconds(x)
        assert state is not None
        errors = [float((a.double() - b).norm() / b.norm()) for a, b in ((found, o), (state, S))]
        why = f"{name} is chosen: the first that can serve here" if name == chosen else f"{name} is not chosen"
        reasons.append(f"{why}. Its schedule: {option.reason}")
        table.add_row(name, option.variant.schedule.name, f"{ms:.2f}", *(f"{e:.1e}" for e in errors))
    console.print(table)
    console.print("Errors are relative (L2) to the token recurrence in float64; times are of one call, host included.")
    console.print("\n".join(reasons), highlight=False)
