"""Configurations that compile and compute the wrong thing: known by measurement, kept by architecture and Triton version."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

from gdn_ir.backends.base import Kernel, Reason
from gdn_ir.nodes import Node, Op
from gdn_ir.program import ScanView


@dataclass(frozen=True)
class Entry:
    """Deny kernels for which `matches` holds, on `arch`, for Triton from `first` up to `before` (major, minor)."""
    arch: str
    first: tuple[int, int]
    before: tuple[int, int]
    matches: Callable[[Kernel], bool]
    why: str


def narrow(kernel: Kernel) -> int:
    """Columns of the narrowest tile that a product makes of an axis that is split, or stepped through in parts; a large number
    where none is."""
    parts = {v.parts for s in kernel.program.scans() if (v := ScanView.of(s)).parts}
    return min((kernel.tile(a) for a in (*kernel.splits, *parts)), default=1 << 30)


def half(kernel: Kernel) -> bool:
    """Whether products multiply 16-bit numbers."""
    return any(n.op is Op.DOT and n.args[0].type.dtype in ("bf16", "f16") for n in kernel.program.nodes())


def outside_pipeline(kernel: Kernel) -> bool:
    loops = kernel.parallel is None or len(kernel.parallel.chain) > 1          # over the chunks of a sequence or of a segment
    return half(kernel) and narrow(kernel) < 64 and (not loops or kernel.options.num_stages < 2)


def sixteen_over_eight_warps(kernel: Kernel) -> bool:
    return not half(kernel) and narrow(kernel) < 32 and kernel.options.num_warps > 4


def gram_beside_narrow(kernel: Kernel) -> bool:
    """A loop that multiplies a tile with itself (as many columns as rows) and with a narrow one."""
    def loaded(x: Node) -> Node:
        return x.args[0] if x.op is Op.TWIN else x
    grams = any(n.op is Op.DOT and loaded(n.args[0]) is loaded(n.args[1]) for n in kernel.program.nodes())
    return half(kernel) and narrow(kernel) < 64 and grams


ENTRIES = (
    Entry("sm_90", (3, 4), (3, 8), outside_pipeline,
          "Triton miscompiles 16-bit products narrower than 64 columns for Hopper outside of a pipelined loop "
          "(errors near 1, or illegal accesses; compare triton issue 11366)"),
    Entry("sm_90", (3, 4), (3, 8), sixteen_over_eight_warps,
          "Triton miscompiles tf32 products of 16 columns over 8 warps for Hopper (errors near 1, or illegal accesses)"),
    Entry("sm_90", (3, 4), (3, 8), gram_beside_narrow,
          "Triton miscompiles loops that multiply a tile both with itself and with one narrower than 64 columns for Hopper"),
)


@lru_cache(maxsize=1)
def installed() -> tuple[int, int] | None:
    """Major and minor of the Triton at hand, which need not be imported to be asked; None where only a pack can serve."""
    try:
        major, minor = version("triton").split(".")[:2]
    except PackageNotFoundError:
        return None
    return int(major), int(minor)


def denied(kernel: Kernel, arch: str) -> Reason | None:
    """The reason why this kernel must not be built with the Triton at hand; None if nothing is known against it."""
    here = installed()
    for e in ENTRIES:
        if e.arch == arch and here is not None and e.first <= here < e.before and e.matches(kernel):
            return Reason(f"{e.why}: {kernel.name} with v_tile {narrow(kernel)}, num_warps {kernel.options.num_warps}, "
                          f"num_stages {kernel.options.num_stages}")
    return None
