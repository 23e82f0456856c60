"""The demo's training: a small Gated DeltaNet language model on the bytes of a text, for about a minute."""
from __future__ import annotations

import math
import re
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn import functional as F

from gdn_ir.demo import DEFAULT_TEXT
from gdn_ir.demo_model import Model, Size

Tensor = torch.Tensor


@dataclass(frozen=True)
class Recipe:
    """What is trained and how: batches of sequences of `context` bytes; rate: of AdamW, at its height; sample: bytes of it;
    steps: the least there are, however long they take."""
    size: Size
    batch: int
    context: int
    rate: float
    sample: int = 500
    steps: int = 2


CPU = Recipe(Size(layers=2, width=128, H=2, HV=4, K=32, V=32), batch=8, context=128, rate=6e-3)
GPU = Recipe(Size(layers=6, width=512, H=4, HV=8, K=64, V=64), batch=32, context=512, rate=2e-3)


def text_of(path: Path | None) -> tuple[str, bytes]:
    """A file's bytes, by default the Python language reference that comes with Python; and what to call it."""
    if path is not None:
        return path.name, path.read_bytes()
    try:
        from pydoc_data.topics import topics
    except ImportError:                                    # some distributions leave it out
        return DEFAULT_TEXT.name, DEFAULT_TEXT.read_bytes()
    return "Python's language reference", "\n".join(topics[name] for name in sorted(topics)).encode()


def batch(text: Tensor, r: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random stretches of the text, and the byte after each of theirs: two tensors [batch, context]."""
    starts = torch.randint(0, len(text) - r.context, (r.batch, 1), generator=generator)
    at = starts + torch.arange(r.context + 1)
    found = text[at.to(text.device)]
    return found[:, :-1], found[:, 1:]


def loss_of(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """Nats per byte."""
    return F.cross_entropy(model(x)[0].float().flatten(0, 1), y.flatten())


def optimizer_of(model: Model, rate: float) -> torch.optim.AdamW:
    """Matrices decay; norms, the decay's rate and its bias do not."""
    groups = [[p for p in model.parameters() if (p.ndim > 1) == matrices] for matrices in (True, False)]
    return torch.optim.AdamW([{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}],
                             lr=rate, betas=(0.9, 0.95))


def run(path: Path | None = None, seconds: float = 60.0, console: Console | None = None, recipe: Recipe | None = None) \
        -> list[float]:
    """Train for `seconds` of wall time (what has to be compiled first not counted), print the loss as it falls, that of text
    held out, and a sample. Returns the losses of the steps, in nats per byte."""
    console = console or Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    r = recipe or (GPU if device.type == "cuda" else CPU)
    name, whole = text_of(path)
    if not seconds > 0:
        raise ValueError(f"seconds: got {seconds}; accepts a number above 0")
    if len(whole) < 20 * r.context:
        raise ValueError(f"text: got {name} of {len(whole)} bytes; accepts a text of at least {20 * r.context} to train on")
    text = torch.frombuffer(bytearray(whole), dtype=torch.uint8).long().to(device)
    held = max(len(text) // 20, 2 * r.context)
    text, unseen = text[:-held], text[-held:]
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Model(r.size).to(device)
    s, count = r.size, sum(p.numel() for p in model.parameters())
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    console.print(f"{name}: {len(text)} bytes to learn from, {held} held out; {count / 1e6:.1f} M parameters, {s.layers} "
                  f"layers of width {s.width}, H/HV {s.H}/{s.HV}, K = {s.K}, V = {s.V}, on {where}")
    with console.status("compiling, where this machine has not yet"), precision(device):
        loss_of(model, *batch(text, r, generator)).backward()
    losses = train(model, text, r, seconds, generator, console)
    with precision(device), torch.no_grad():
        ends = [loss_of(model, *batch(unseen, r, generator)).item() for _ in range(8)]
        console.print(f"{len(losses)} steps of {r.batch * r.context} bytes; text held out: {sum(ends) / 8:.2f} nats per byte "
                      f"({sum(ends) / 8 / math.log(2):.2f} bits). A sample, after the first words of it:")
        prompt = prose(unseen)[:r.context // 2]
        drawn = model.sample(prompt, r.sample, 0.6, torch.Generator().manual_seed(0))
    console.print(bytes(prompt.tolist()).decode(errors="replace"), style="dim", end="", markup=False, highlight=False)
    console.print(bytes(drawn).decode(errors="replace"), markup=False, highlight=False)
    return losses


def prose(text: Tensor) -> Tensor:
    """The text from its first paragraph that begins with a word (tables make poor prompts); all of it where it has none."""
    found = re.search(rb"\n\s*\n\s*(?=[A-Z][a-z]+ [a-z])", bytes(text.tolist()))
    return text[found.end():] if found else text


def train(model: Model, text: Tensor, r: Recipe, seconds: float, generator: torch.Generator, console: Console) -> list[float]:
    """Steps until the time is over; the learning rate follows it: up, then down as a cosine."""
    optimizer, losses, said = optimizer_of(model, r.rate), list[float](), 0
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=seconds, loss="")
        start = time.perf_counter()
        while (done := min((time.perf_counter() - start) / seconds, len(losses) / r.steps)) < 1:
            for group in optimizer.param_groups:
                group["lr"] = r.rate * min(1.0, 20 * done + 0.05) * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
            optimizer.zero_grad()
            with precision(text.device):
                loss = loss_of(model, *batch(text, r, generator))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            recent = sum(losses[-20:]) / len(losses[-20:])
            progress.update(task, completed=done * seconds, loss=f"step {len(losses)}, {recent:.2f} nats per byte")
            if done * 6 >= said + 1:                       # what stays on the screen, or in a log
                said = int(done * 6)
                progress.console.print(f"{done * seconds:5.0f} s  step {len(losses):5}  {recent:.2f} nats per byte",
                                       highlight=False)
        progress.update(task, completed=seconds)
    return losses


def precision(device: torch.device) -> AbstractContextManager[object]:
    """On a GPU, products in bfloat16."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")
