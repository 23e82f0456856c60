"""What is not worth compiling, and why: reasons that can be counted. Bounds are lower bounds of what a kernel takes, so that
nothing that fits is thrown away."""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from gdn_ir.artifacts import digest
from gdn_ir.autotune.space import Candidate
from gdn_ir.backends.base import SHARED, Call, Kernel, blocks
from gdn_ir.compiler import Instance, Unsupported, Variant, variant
from gdn_ir.nodes import Node, Op
from gdn_ir.program import ScanView

REGISTERS = 255                                            # of 32 bits, that one thread can use
BYTES = {"bf16": 2, "f16": 2, "f32": 4, "tf32": 4, "f64": 8}
REASONS = ("illegal step", "declined", "shared memory", "registers", "waves", "same code")


@dataclass(frozen=True)
class Ready:
    """A candidate worth compiling. keys: digests of its kernels' recipes; code: of all of them and of which kernels have a
    stream of their own, what results are kept by."""
    candidate: Candidate
    variant: Variant
    keys: tuple[str, ...]

    @property
    def code(self) -> str:
        return digest([*self.keys, *(k.name for k in self.variant.compiled.kernels if k.options.aside)])

    @property
    def sources(self) -> dict[str, str]:
        return {s.kernel: s.hash for s in self.variant.sources}


def ready(candidate: Candidate, instance: Instance, backend: str, arch: str) -> Ready | str:
    """A candidate lowered and keyed, or the reason (one of REASONS, then a colon and details) why it is not worth compiling."""
    try:
        made = variant(instance, candidate.schedule, backend, arch)
    except Unsupported as e:
        return f"declined: {e}"
    except ValueError as e:
        return f"illegal step: {e}"
    for k in made.compiled.kernels:
        if arch in SHARED:
            if (need := shared_bytes(k)) > SHARED[arch]:
                return f"shared memory: {k.name} takes at least {need} bytes, of {SHARED[arch]}"
            if (need := registers(k)) > REGISTERS:
                return f"registers: {k.name} carries {need} for each thread, of {REGISTERS}"
    c = made.compiled
    keys = tuple(digest(b.recipe(k, s, arch)) for b, k, s in zip(c.makers, c.kernels, c.sources, strict=True))
    return Ready(candidate, made, keys)


def size(kernel: Kernel, node: Node) -> int:
    """Elements of a value's tile."""
    found = 1
    for a in node.axes:
        found *= kernel.tile(a)
    return found


def scans(kernel: Kernel) -> list[ScanView]:
    """The serial loops of a kernel."""
    views = [ScanView.of(s) for s in kernel.program.scans()]
    return [v for v in views if not v.group and not (kernel.parallel and v.node is kernel.parallel.node)]


def shared_bytes(kernel: Kernel) -> int:
    """A lower bound of shared memory: of a serial loop's tiles that products read, as many copies as are in flight beside the
    one in use."""
    if not scans(kernel):
        return 0
    read = {a for n in kernel.program.nodes() if n.op is Op.DOT for a in n.args if a.op is Op.LOAD}
    return sum(size(kernel, n) * BYTES[n.type.dtype] for n in read) * (kernel.options.num_stages - 1)


def registers(kernel: Kernel) -> int:
    """A lower bound of registers for each thread: what a serial loop carries from one turn to the next."""
    carried = [sum(size(kernel, n) for n in s.nexts) for s in scans(kernel)]
    return max(carried, default=0) // (32 * kernel.options.num_warps)


def idle(made: Variant, call: Call, units: int, narrowest: int) -> str | None:
    """The reason why a candidate is not worth timing on a shape: a serial kernel with fewer blocks than half the
    multiprocessors, where narrower tiles would make more of them (narrowest: the least v_tile of the space)."""
    for k in made.compiled.kernels:
        if k.splits and scans(k) and k.options.v_tile is not None and k.options.v_tile > narrowest:
            count = blocks(k, call)
            if count * 2 < units:
                return f"waves: {k.name} has {count} blocks for {units} multiprocessors"
    return None


class Pruned(Counter[str]):
    """How many candidates went for which reason."""

    def add(self, reason: str) -> None:
        self[reason.split(":", 1)[0]] += 1

    def __str__(self) -> str:
        return ", ".join(f"{self[r]} {r}" for r in REASONS if self[r]) or "none"
