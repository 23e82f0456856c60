"""Runs every shipped default on the GPU at hand against the float64 recurrence, outputs poisoned, and records what was seen:
errors and the hashes of the sources that made them. `tests/test_measured.py` holds shipped defaults against these records."""
from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gdn_ir.bench import inputs
from gdn_ir.bench.errors import relative
from gdn_ir.backends import BACKENDS
from gdn_ir.backends.base import TORCH
from gdn_ir.coverage import DTYPES, Cell, Layout, table
from gdn_ir.backends.tilelang.ptx import TileLangPtx
from gdn_ir.backends.triton.ptx import TritonPtx
from gdn_ir.compiler import Unsupported, variant
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.reference import recurrence
from gdn_ir.schedules.defaults import FUSED_LENGTHS, LENGTHS, default, forward_by_roles
from gdn_ir.schedules.role_solve import SHORT, WALK
from gdn_ir.schedules.schedule import Schedule

FULL = Switches(initial_state=True, final_state=True)
PACKED = Layout((300, 0, 64, 129), varlen=True, H=2, HV=4, K=128, V=128)
DENSE = Layout((200, 200), H=1, HV=3, K=128, V=128)
PEERS = Layout((768,), varlen=True, H=2, HV=4, K=128, V=128)         # the shape of the peers' accuracy measurements


SIZES = ((16, 16), (16, 256), (48, 96), (128, 64), (192, 128), (160, 240),
         (32, 32), (80, 112), (96, 160), (144, 32), (256, 16), (64, 256))
TAIL = 70                                                  # rows after the last packed sequence, which must come back as zeros


def shipped(arch: str = "sm_90", backend: str = "triton") -> Iterator[tuple[Cell, int]]:
    """What is checked: cells, and how many scans (sequences x heads) to choose the default schedule for. Of sizes that are not
    in the coverage table, those that the backend serves; of tilelang, whose schedules do not depend on scans, fewer."""
    tilelang = backend == "tilelang"
    for cell in table():
        yield cell, 8
    for io in DTYPES:
        for size in (64, 128, 256):
            for scans in (8,) if tilelang else (8, 512):
                cell = Cell(f"{size} x {size}, {io}, for {scans} scans", FULL, io, replace(PACKED, K=size, V=size))
                if serves(backend, arch, cell):
                    yield cell, scans
    for K, V in SIZES if arch == "sm_90" and not tilelang else SIZES[:6]:
        for io in DTYPES:
            cell = Cell(f"{K} x {V}, {io}", FULL, io, replace(PACKED, K=K, V=V))
            if serves(backend, arch, cell):
                yield cell, 8
    if tilelang and arch == "sm_90":
        yield from ((cell, 512) for cell in crowded())


def crowded(title: str = "roles", packed: Layout = PACKED, dense: Layout = DENSE) -> Iterator[Cell]:
    """Where there are sequences and heads enough for roles (`gdn_ir.schedules.defaults.roles_fit`)."""
    layouts = {"packed": packed, "dense": dense}
    switches = {"": Switches(final_state=True), ", initial state": FULL, ", no final state": Switches(),
                ", initial state alone": Switches(initial_state=True),
                ", negative eigenvalues": Switches(beta_sigmoid=True, neg_eigval=True, final_state=True)}
    switches |= {", normalised in the kernel": replace(FULL, l2norm=True)} if "roles" in title else {}
    for layout, lay in layouts.items():
        for name, s in switches.items():
            yield Cell(f"{title}, {layout}{name}, bf16", s, "bf16", lay)


def cut() -> Iterator[tuple[Cell, Schedule]]:
    """Roles whose inverses are made before, in long walks and short ones: of whole sequences, and where these are cut into
    segments: each length of them, some sequences ending with one and some a token after."""
    walks = {"": WALK, ", short walks": SHORT}
    for how, chunks in walks.items():
        for cell in crowded(f"roles{how}"):
            yield cell, forward_by_roles(cell.instance, chunks=chunks)
    for n in LENGTHS:
        size = 64 * n
        packed, dense = (2 * size + 300, 0, size, 129, size + 1), (size + 300, size + 300)
        layouts = replace(PACKED, lengths=packed), replace(DENSE, lengths=dense)
        for how, chunks in walks.items():
            for cell in crowded(f"segments of {n} by roles{how}", *layouts):
                yield cell, forward_by_roles(cell.instance, n, chunks=chunks)
        for cell in crowded(f"segments of {n} by fused roles", *layouts) if n in FUSED_LENGTHS else ():
            yield cell, forward_by_roles(cell.instance, n, one=True)


def decoding(arch: str) -> Iterator[tuple[Cell, Schedule]]:
    """What `default` gives to calls of one token at a time."""
    for io in DTYPES:
        for size in (64, 128, 256):
            cell = Cell(f"one token at a time, {io}, {size} x {size}", FULL, io, replace(PACKED, K=size, V=size))
            yield cell, default(arch, replace(cell.instance, recurrent=True), 1, 8, 100)[0]


def serves(backend: str, arch: str, cell: Cell) -> bool:
    try:
        variant(cell.instance, default(arch, cell.instance, 1, 8, sum(cell.layout.lengths), backend)[0], backend, arch)
    except Unsupported:
        return False
    return True


def oracle(cell: Cell, x: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    s, cpu = cell.switches, {n: t.cpu() for n, t in x.items()}
    q, k, v, g, beta = (cpu[n][None] for n in ("q", "k", "v", "g", "beta"))
    state = cpu["initial_state"] if s.initial_state else None
    o, S = recurrence(q, k, v, g if s.decay == "scalar" else None, beta, None, state, cpu["cu_seqlens"], erase=s.erase,
                      l2norm=s.l2norm, beta_sigmoid=s.beta_sigmoid, neg_eigval=s.neg_eigval)
    return o[0].cuda(), S.cuda()


def run(cell: Cell, schedule: Schedule, backend: str, arch: str, x: dict[str, torch.Tensor]) \
        -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The outputs after the call, poisoned before it, and the hashes of the sources that ran."""
    s, lay = cell.switches, cell.layout
    chosen = variant(cell.instance, schedule, backend, arch)
    tensors = {n: x[n] for n in ("q", "k", "v", "beta")} | ({"g": x["g"]} if s.decay == "scalar" else {})
    if s.initial_state:
        tensors["initial_state"] = x["initial_state"].mT.contiguous() if s.state_v_first else x["initial_state"]
    outputs = {"o": torch.full_like(x["v"], float("nan"))}
    if s.final_state:
        state = (len(lay.lengths), lay.HV, *((lay.V, lay.K) if s.state_v_first else (lay.K, lay.V)))
        outputs["final_state"] = torch.full(state, float("nan"), device="cuda")
    chosen(tensors | outputs, lay.K ** -0.5, len(lay.lengths), x["cu_seqlens"] if lay.varlen else None)
    torch.cuda.synchronize()
    return outputs, {src.kernel: src.hash for src in chosen.sources}


def check(cell: Cell, schedule: Schedule, backend: str, arch: str, kind: str = "model") -> dict[str, Any]:
    lay = cell.layout
    lengths = [*lay.lengths, TAIL] if lay.varlen else list(lay.lengths)
    x = inputs.make(lengths, lay.H, lay.HV, lay.K, lay.V, TORCH[cell.io], kind=kind)
    if lay.varlen:
        x["cu_seqlens"], x["initial_state"] = x["cu_seqlens"][:-1], x["initial_state"][:-1]
    if cell.switches.beta_sigmoid:
        x["beta"] = torch.randn_like(x["beta"])
    try:
        outputs, hashes = run(cell, schedule, backend, arch, x)
    except Exception as e:
        why = f"{type(e).__name__}: {e}"[:400]
        return {"cell": cell.name, "backend": backend, "arch": arch, "inputs": kind, "failed": why}
    o, S = oracle(cell, x)
    errors = {"o": relative(outputs["o"], o)}
    if "final_state" in outputs:
        state = outputs["final_state"]
        errors["final_state"] = relative(state.mT if cell.switches.state_v_first else state, S)
    return {"cell": cell.name, "io": cell.io, "backend": backend, "arch": arch, "inputs": kind, "schedule": schedule.name,
            "errors": errors, "sources": hashes, "launched": {k: str(schedule.options(k)) for k in hashes}}


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--out", required=True)
    p.add_argument("--commit", required=True)
    p.add_argument("--arch", default="sm_90", help="sm_80 runs from PTX")
    p.add_argument("--backend", default="triton", help="triton or tilelang")
    p.add_argument("--part", default="0/1", help="i/n: the i-th of n parts, to run in n processes")
    p.add_argument("--only", default="", help="cells whose names have one of these in them, separated by semicolons")
    a = p.parse_args()
    backend = a.backend if a.arch == "sm_90" else f"{a.backend}-ptx"
    if a.arch != "sm_90":
        BACKENDS.update({b.name: b for b in (TritonPtx(), TileLangPtx())})
    part, parts = (int(i) for i in a.part.split("/"))
    rows: list[dict[str, Any]] = []
    jobs = [(cell, default(a.arch, cell.instance, 1, scans, sum(cell.layout.lengths), a.backend)[0], "model")
            for cell, scans in shipped(a.arch, a.backend)]
    for io in DTYPES if a.backend == "triton" else ("bf16", "f16"):
        cell = Cell(f"accuracy, {io}", replace(FULL, initial_state=False), io, PEERS)
        jobs += [(cell, default(a.arch, cell.instance, 1, 4, 768, a.backend)[0], kind) for kind in inputs.KINDS]
    if (a.backend, a.arch) == ("tilelang", "sm_90"):
        cell = Cell("accuracy of roles, bf16", replace(FULL, initial_state=False), "bf16", PEERS)
        jobs += [(cell, default(a.arch, cell.instance, 1, 512, 768, a.backend)[0], kind) for kind in inputs.KINDS]
        jobs += [(cell, schedule, "model") for cell, schedule in cut()]
        cell = replace(cell, name="accuracy of segments by roles, bf16")
        jobs += [(cell, forward_by_roles(cell.instance, LENGTHS[0]), kind) for kind in inputs.KINDS]
    for io in (DTYPES if a.backend == "triton" else ("bf16", "f16")) if a.arch == "sm_90" else ():
        jobs += [(Cell(f"naive {k} x {k}, {io}", FULL, io, replace(PACKED, K=k, V=k)), Schedule("naive"), "model")
                 for k in (64, 128)]
    if a.backend == "triton":
        jobs += [(cell, schedule, "model") for cell, schedule in decoding(a.arch)]
    only = a.only.split(";")
    for i, (cell, schedule, kind) in enumerate(j for j in jobs if any(name in j[0].name for name in only)):
        if i % parts == part:
            rows.append(check(cell, schedule, backend, a.arch, kind))
            about = {"commit": a.commit, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
                     "backend": BACKENDS[a.backend].version()}
            Path(a.out).write_text(json.dumps(about | {"rows": rows}, indent=0))


if __name__ == "__main__":
    main()
