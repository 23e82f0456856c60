"""The plans that schedules are made of: the gated delta rule cut into kernels in several ways, each as a list of steps.

    naive     one kernel; the solve row by row
    fused     one kernel; the solve as an inverse, blocks merged by products
    solve     the inverse, its columns scaled by beta, for all chunks at once; then one scan
    states    the inverse; a scan that only carries the state; the output for all chunks at once
    wy        as states, with both halves of u (it is affine in the state) computed for all chunks at once

The kernels are called solve, scan and output.
"""
from __future__ import annotations

Steps = tuple[tuple[str | int, ...], ...]


def plan(name: str, erase: bool = True, io: str = "bf16", chunk: int = 64, block: int = 16, sums: bool = False) -> Steps:
    """The steps of a plan. Without erase there is nothing to solve: what is left of the plan is where the output is computed.
    Float32 inputs merge the inverse's blocks in split tf32, others in tf32. sums: the running sums of the log decay are
    computed beside the inverse, not in the serial scan. Raises ValueError for a name it lacks."""
    merges = {"f64": "f64", "f32": "tf32x3"}.get(io, "tf32")
    invert: Steps = (("invert", "u", "A"), ("merge", "A", chunk, block, merges)) if erase else ()
    shared: Steps = (("hoist", "G", "f32", "solve"), ("hoist", "total", "f32", "solve")) if erase and sums else ()
    # the scan need not read beta: the stored inverse's columns are scaled by it
    hoist: Steps = (("absorb", "u", "A_beta"), ("hoist", "A_beta", "io", "solve"), *shared) if erase else ()
    halves: Steps = (("distribute", "u", "u0", "w"), ("hoist", "u0", "io", "solve"), ("hoist", "w", "io", "solve"), *shared)
    output: Steps = (("sink", "o", "u" if erase else "", "output"),)
    scan: Steps = (("name_kernel", "S", "scan"),)
    table: dict[str, Steps] = {
        "naive": (),
        "fused": (*scan, *invert, ("move_scales",)),
        "solve": (*scan, *invert, *hoist, ("move_scales",)),
        "states": (*scan, *invert, *hoist, *output, ("move_scales",)),
        "wy": (*scan, *invert, *(halves if erase else ()), *output, ("move_scales",)),
    }
    if name not in table:
        raise ValueError(f"plan: got {name!r}; accepts {', '.join(table)}")
    return table[name]
