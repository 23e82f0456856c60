"""Which variant serves a call, and why: the fastest backend that can, its schedule chosen for the architecture and shape."""
from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache

import torch

from gdn_ir.compiler import Instance, Unsupported, Variant, variant
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.schedules.defaults import default

PREFERENCE = {"cuda": ("triton", "tilelang", "torch"), "cpu": ("tilelang", "torch", "triton")}
_forced: ContextVar[str | None] = ContextVar("gdn_ir_backend", default=None)


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Within the block every call is served by this backend; where it cannot, the call raises its reason."""
    from gdn_ir.backends import BACKENDS
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}; accepts {', '.join(BACKENDS)}")
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> str | None:
    """The backend that `use` asks for here, if any."""
    return _forced.get()


@lru_cache(maxsize=16)
def architecture(device: torch.device) -> str:
    """"cpu", "sm_80" (all of Ampere and Ada, whose least shared memory holds its schedules), "sm_90" (Hopper); the device's own
    name elsewhere, for which no backend but torch has a schedule."""
    if device.type != "cuda":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return "sm_80" if major == 8 else f"sm_{major}{minor}"


@dataclass(frozen=True)
class Option:
    """One backend's answer to a call: a variant and why it has this schedule, or why there is none."""
    backend: str
    variant: Variant | None
    reason: str


@lru_cache(maxsize=4096)
def options(instance: Instance, arch: str, sequences: int, heads: int, tokens: int) -> tuple[Option, ...]:
    """Every backend's answer, the preferred one first. heads: HV; tokens: of all sequences together."""
    kind = "cpu" if arch == "cpu" else "cuda"
    found = []
    for name in PREFERENCE[kind]:
        target = "torch" if name == "torch" else arch       # it has one schedule, wherever it runs
        if instance.grads and arch != "cpu" and name != "torch" and os.environ.get("GDN_IR_UNVERIFIED") != "1":
            found.append(Option(name, None, f"{name}'s backward has not run on all it ships for (GDN_IR_UNVERIFIED=1 lets it)"))
            continue
        try:
            schedule, why = default(target, instance, sequences, heads, tokens, name)
            found.append(Option(name, variant(instance, schedule, name, target), why))
        except ValueError as e:                            # Unsupported, an illegal step, an architecture without a default
            found.append(Option(name, None, str(e)))
    return tuple(found)


@lru_cache(maxsize=4096)
def choose(instance: Instance, arch: str, sequences: int, heads: int, tokens: int, backend: str | None = None) -> Variant:
    """The variant that serves. Raises Unsupported with the backend's reason where one is asked for and cannot serve."""
    every = options(instance, arch, sequences, heads, tokens)
    if backend is not None:
        option = next(o for o in every if o.backend == backend)
        if option.variant is None:
            raise Unsupported(f"{backend} cannot serve {instance}: {option.reason}")
        return option.variant
    for i, option in enumerate(every):
        if option.variant is not None:
            if i and arch != "cpu":                        # on a GPU something faster was to be expected
                warnings.warn(f"gdn_ir: {every[0].backend} cannot serve this call, {option.backend} does: {every[0].reason}",
                              RuntimeWarning, stacklevel=4)
            return option.variant
    raise Unsupported("no backend serves " + str(instance) + "".join(f"\n  {o.backend}: {o.reason}" for o in every))


def explain(*, H: int, HV: int, K: int = 128, V: int = 128, T: int, B: int = 1, sequences: int | None = None,
            dtype: str | torch.dtype = "bf16", arch: str | None = None, grads: tuple[str, ...] = (),
            **switches: bool | str) -> str:
    """Every variant that could serve such a call, and why it is or is not chosen. dtype: "bf16", "f16", "f32", "f64" or
    torch's; sequences: of packed input (None: dense, B of them); arch: "cpu", "sm_80", "sm_90" (None: this machine's);
    grads: of a backward, the inputs whose gradients are asked for; further keywords: `Switches`' fields, such as
    l2norm=True. H and HV: heads of q and of v; T: tokens of a batch row."""
    from gdn_ir.compiler import NAMES
    here = architecture(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    arch = arch or here
    io = NAMES[dtype] if isinstance(dtype, torch.dtype) else dtype
    for name, size, least in (("H", H, 1), ("T", T, 0), ("B", B, 1), ("sequences", sequences or 0, 0)):
        if size < least:
            raise ValueError(f"{name}: got {size}; accepts a number from {least} on")
    if sequences is not None and B != 1:
        raise ValueError(f"B: got {B} with sequences = {sequences}; accepts 1, for packed sequences lie along T")
    unknown = set(switches) - set(Switches.__dataclass_fields__)
    if unknown:
        raise TypeError(f"explain: unknown keyword {', '.join(sorted(unknown))}; accepts, besides its own, "
                        f"{', '.join(Switches.__dataclass_fields__)}")
    if HV < H or HV % H:
        raise ValueError(f"HV: got {HV}; accepts a multiple of H = {H}")
    instance = Instance(Switches(**switches), K, V, io, io, sequences is not None, tuple(grads),  # type: ignore[arg-type]
                        grouped=not grads or H < HV)
    every = options(instance, arch, sequences or B, HV, B * T)
    wanted = forced()
    chosen = next((o for o in every if o.variant is not None and wanted in (None, o.backend)), None)
    kind = f"packed {io}, {sequences} sequences of {T} tokens together" if instance.varlen else f"dense {io}, {B} x {T} tokens"
    what = f"gradients of {' '.join(grads)}: " if grads else ""
    lines = [f"{what}{kind}, H/HV {H}/{HV}, K x V {K} x {V}, on {arch}"]
    for rank, o in enumerate(every):
        if o.variant is None:
            lines.append(f"  {o.backend:<8} cannot: {o.reason}")
            continue
        kernels = ", ".join(f"{s.kernel} {s.hash}" for s in o.variant.sources)
        mark = "chosen" if o is chosen else "not chosen"
        why = f"gdn_ir.use({wanted!r}) asks for it" if o is chosen and wanted else \
            f"first that can serve on {arch}" if o is chosen else f"ranks {rank + 1} of {len(every)} on {arch}"
        lines += [f"  {o.backend:<8} {mark}: {why}", f"           schedule {o.variant.schedule.name}: {o.reason}",
                  f"           kernels: {kernels}"]
    return "\n".join(lines)
