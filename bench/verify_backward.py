"""Runs every shipped default of the backward on the GPU at hand against float64 autograd of the recurrence, outputs and
temporaries poisoned, and records errors with the hashes of the sources that made them (as bench/verify.py does forward).

What forwards leave to backwards is checked likewise, forward and backward as one: cells whose names end in "keeps inverse" or
"keeps states"; --only takes these alone. Once all of them are right they may serve (`gdn_ir.registry.KEEP_SEEN`)."""
from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gdn_ir.bench.gradients import FULL, backward_of, check, pipelines, sources
from gdn_ir.bench.inputs import KINDS
from gdn_ir.bench.verify import DENSE, PACKED, PEERS, crowded
from gdn_ir.backends import BACKENDS
from gdn_ir.backends.triton.ptx import TritonPtx
from gdn_ir.coverage import DTYPES, Cell, Layout, table
from gdn_ir.schedules.adjoints import LENGTHS, TURNS, can, in_segments
from gdn_ir.schedules.defaults import TURNS as MERGES, backward_by_roles, whole_scans
from gdn_ir.schedules.plans import KEEP
from gdn_ir.schedules.role_backward import SEGMENT, WAYS
from gdn_ir.schedules.schedule import Schedule

SIZES = ((16, 16), (16, 128), (48, 96), (128, 64), (80, 112), (32, 32), (96, 128), (64, 128), (256, 256), (160, 192), (256, 64),
         (64, 256))

LAYOUTS = {"packed": replace(PACKED, lengths=(700, 0, 64, 129, 1, 63)), "dense": DENSE}
NO_STATE = replace(FULL, initial_state=False)
# of role_backward.WAYS, in the words of rows; what follows the first two is Triton's
ROLES = {"roles": "roles-aside", "roles in a row": "roles"}
THROUGHOUT = {"roles throughout": "roles-aside-throughout", "roles throughout, in a row": "roles-throughout",
              "roles throughout, in halves": "roles-halves-aside-throughout"}
SHORTLY = {n.replace("throughout", "throughout, short walks"): f"{way}-short" for n, way in THROUGHOUT.items()}
UNEVEN = {f"roles throughout, {walk}adjoints in halves": f"roles-back-halves-aside-throughout{name}"
          for walk, name in (("", ""), ("short walks, ", "-short"))}
SINGLY = {"roles throughout, single chunks, in halves": "roles-halves-aside-throughout-single"}
IN_SEGMENTS = {f"roles throughout, segments of {SEGMENT}": "roles-segments-throughout-short",
               f"roles throughout, long walks, segments of {SEGMENT}": "roles-segments-throughout"}
NAMES = ROLES | THROUGHOUT | SHORTLY | UNEVEN | SINGLY | IN_SEGMENTS


def shipped() -> Iterator[tuple[Cell, int | None, str, str, str]]:
    """What is checked: cells, how many scans (sequences x heads) to choose the default schedule for, kind of inputs, what is
    kept of the forward, and how the scans run, where that is not the default's choice ("": as by default): "turns after
    segments of" so many chunks, or one of NAMES."""
    for cell, scans, kind in recomputed():
        yield cell, scans, kind, "nothing", ""
    for keep in KEEP[1:]:
        for cell, scans, kind in recomputed(SIZES[::4]):
            if cell.switches.erase:                        # all that the op serves
                yield replace(cell, name=f"{cell.name}, keeps {keep}"), scans, kind, keep, ""
    for n in LENGTHS:
        for cell, kind in cut(n, KINDS if n == LENGTHS[0] else ()):
            yield cell, None, kind, "nothing", f"turns after segments of {n}"
    for ways in (ROLES, THROUGHOUT, SHORTLY):
        for cell, kind, how in by_roles(*ways):
            yield cell, None, kind, "nothing", how
    for how in (*UNEVEN, *SINGLY):
        alone = (Cell(f"the backward's {how}, {n}, H = HV, bf16", FULL, "bf16", replace(y, H=y.HV)) for n, y in LAYOUTS.items())
        for cell in (*crowded(f"the backward's {how}", *LAYOUTS.values()), *alone):
            if not cell.switches.beta_sigmoid:
                yield cell, None, "model", "nothing", how
        for kind in KINDS:
            yield Cell(f"accuracy of the backward's {how}, bf16", NO_STATE, "bf16", PEERS), None, kind, "nothing", how
    for how in IN_SEGMENTS:
        for cell, kind in cut(SEGMENT, KINDS[1:]):
            walks = ", long walks" * ("long walks" in how)
            yield replace(cell, name=f"{cell.name}, by roles{walks}"), None, kind, "nothing", how


def by_roles(ways: str, row: str, halves: str = "") -> Iterator[tuple[Cell, str, str]]:
    """Scans as roles; heads that share none, too; each kind of inputs. Beside each other, and less in a row; in halves."""
    for how in (ways, *([halves] if halves else [])):
        for cell in crowded(f"the backward's {how}", *LAYOUTS.values()):
            if not (halves and cell.switches.beta_sigmoid):
                yield cell, "model", how
    for layout, lay in LAYOUTS.items():
        yield Cell(f"the backward's {row}, {layout}, bf16", FULL, "bf16", lay), "model", row
        for how in (ways, *([halves] if halves else [])):
            yield Cell(f"the backward's {how}, {layout}, H = HV, bf16", FULL, "bf16", replace(lay, H=lay.HV)), "model", how
    for kind in KINDS:
        yield Cell(f"accuracy of the backward's {ways}, bf16", NO_STATE, "bf16", PEERS), kind, ways


def cut(chunks: int, kinds: tuple[str, ...] = ()) -> Iterator[tuple[Cell, str]]:
    """Segments of that many chunks: some sequences end with one, some a token after; and of kinds of inputs."""
    size = 64 * chunks
    packed = Layout((size + 300, 0, 129, size + 1), True, 1, 2, 128, 128)
    dense = Layout((size + 200, size + 200), False, 1, 2, 128, 128)
    for cell in crowded(f"segments of {chunks}", packed, dense):
        if can(backward_of(cell)):
            yield cell, "model"
    for kind in kinds:
        yield Cell(f"accuracy of segments of {chunks}, bf16", replace(FULL, initial_state=False), "bf16", packed), kind


def schedule_of(cell: Cell, how: str, arch: str) -> Schedule | None:
    """Of a cell whose scans run so; None where its default is wanted."""
    instance = backward_of(cell)
    if not how:
        return None
    if how in NAMES:
        return backward_by_roles(instance, WAYS[NAMES[how]])
    return in_segments(whole_scans(arch, instance, 1, 8, "triton", merges=MERGES)[0], instance, int(how.split()[-1]), TURNS)


def backend_of(how: str) -> str:
    return "tilelang" if how.startswith("roles") else "triton"


def recomputed(sizes: tuple[tuple[int, int], ...] = SIZES) -> Iterator[tuple[Cell, int | None, str]]:
    """What is checked where a backward is given nothing. sizes: K and V, besides those of the table."""
    for cell in table():
        yield cell, None, "model"
    for cell in crowded("128 x 128, in place of roles", PACKED, DENSE):
        yield cell, None, "model"
    for io in DTYPES:
        for size in (64, 128):
            for scans in (8, 512):
                for heads in ((2, 4), (4, 4)):
                    lay = replace(PACKED, K=size, V=size, H=heads[0], HV=heads[1])
                    name = f"{size} x {size}, {io}, H/HV {heads[0]}/{heads[1]}, for {scans} scans"
                    yield Cell(name, FULL, io, lay), scans, "model"
        for K, V in sizes:
            yield Cell(f"{K} x {V}, {io}", FULL, io, replace(PACKED, K=K, V=V)), None, "model"
        for kind in KINDS:
            yield Cell(f"accuracy, {io}", replace(FULL, initial_state=False), io, PEERS), None, kind


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return (row["cell"], row["inputs"], row["arch"], *(tuple(sorted(row[n].items())) for n in ("sources", "launched")))


def ahead(cell: Cell, scans: int | None, kind: str, keep: str, how: str, arch: str) -> dict[str, Any]:
    """What a row will say of the sources that it ran."""
    made = pipelines(cell, backward_of(cell, keep=keep), backend_of(how), arch, scans, schedule_of(cell, how, arch))
    return {"cell": cell.name, "inputs": kind, "arch": arch, **sources(made)}


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--out", required=True)
    p.add_argument("--commit", required=True)
    p.add_argument("--arch", default="sm_90", help="sm_80 runs from PTX")
    p.add_argument("--part", default="0/1", help="i/n: the i-th of n parts, to run in n processes")
    p.add_argument("--only", default="", help="cells whose names have one of these in them, separated by semicolons")
    p.add_argument("--resume", default="", help="a page of results: what it has of the very same sources is not run again")
    a = p.parse_args()
    known = {key(r) for r in json.loads(Path(a.resume).read_text())["rows"] if "failed" not in r} if a.resume else set()
    BACKENDS["triton-ptx"] = TritonPtx()
    torch.use_deterministic_algorithms(True, warn_only=True)                  # torch.empty gives NaN: temporaries are poisoned
    part, parts = (int(i) for i in a.part.split("/"))
    rows: list[dict[str, Any]] = []
    only = a.only.split(";")
    wanted = (c for c in shipped() if any(name in c[0].name for name in only) and (not c[4] or a.arch == "sm_90"))
    if known:
        wanted = (c for c in list(wanted) if key(ahead(*c, a.arch)) not in known)
    for i, (cell, scans, kind, keep, how) in enumerate(wanted):
        if i % parts != part:
            continue
        backend = backend_of(how) if a.arch == "sm_90" else "triton-ptx"
        try:
            rows.append(check(cell, backend, a.arch, "cuda", kind, schedule_of(cell, how, a.arch), scans=scans, keep=keep))
            torch.cuda.synchronize()
        except Exception as e:
            rows.append({"cell": cell.name, "backend": backend, "arch": a.arch, "inputs": kind,
                         "failed": f"{type(e).__name__}: {e}"[:400]})
        last = rows[-1]
        print(last["cell"], kind, last.get("failed") or {n: f"{e:.1e}" for n, e in last["errors"].items()}, flush=True)
        about = {"commit": a.commit, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
                 "backend": BACKENDS["triton"].version()}
        Path(a.out).write_text(json.dumps(about | {"rows": rows}, indent=0))


if __name__ == "__main__":
    main()
