"""The schedule for a call, from what was measured: for this very shape on this GPU, else for one like it, else on another GPU
of the architecture, else with other versions of the toolchain, else the heuristic's. It always answers, and says where the
answer comes from.

Loaded packs come before all of these: they hold kernels that are compiled already.
"""
from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from gdn_ir.autotune.keys import CLOSE, NEAR, Device, device_here, distance, program_hash
from gdn_ir.autotune.records import Records, Winner, default_path, winners
from gdn_ir.autotune.tables import shipped
from gdn_ir.backends import BACKENDS
from gdn_ir.compiler import Instance, variant
from gdn_ir.environment import switched
from gdn_ir.schedules.defaults import default
from gdn_ir.schedules.plans import Steps
from gdn_ir.schedules.schedule import Schedule

if TYPE_CHECKING:
    from gdn_ir.packs import Pack

PACKS: list[Pack] = []                                     # loaded, the newest first
LEVELS = ("exact", "near", "same architecture", "other toolchain", "heuristic")


@dataclass(frozen=True)
class Found:
    """A schedule and where it comes from: one of LEVELS, or "pack"; why: the same for people; winner: what was measured."""
    schedule: Schedule
    level: str
    why: str
    winner: Winner | None = None


def find(target: str, instance: Instance, sequences: int, heads: int, tokens: int, backend: str) -> Found:
    """The schedule that serves. target: "sm_80", "sm_90", "cpu" or "torch"; sequences, heads (HV), tokens: of the call. Raises
    ValueError where `defaults.default` has none and nothing was tuned."""
    shape = (sequences, heads, tokens)
    for pack in PACKS:
        entry = pack.nearest(target, instance, shape, backend)
        if entry is not None and pack.holds(entry):
            return Found(entry.schedule, "pack", f"compiled ahead for {entry.shape} in {pack.path}: {entry.why}")
    stale = ""
    for level, w in ranked(target, instance, shape, backend):
        try:
            made = {s.kernel: s.hash for s in variant(instance, w.schedule, backend, target).sources}
        except ValueError as e:
            stale = stale or f"; what was tuned for {w.shape} is not legal any more ({e})"
            continue
        if made != dict(w.sources):                        # the compiler has changed: nobody has seen this code run
            stale = stale or (f"; what was tuned for {w.shape} on {w.date} compiles to other code now: gdn-ir tune measures "
                              "it again")
            continue
        return Found(w.schedule, level, provenance(level, w), w if w.how == "measured" else None)
    schedule, why = default(target, instance, sequences, heads, tokens, backend)
    return Found(schedule, "heuristic", f"{why}{stale}")


def ranked(target: str, instance: Instance, shape: tuple[int, int, int], backend: str) -> Iterator[tuple[str, Winner]]:
    """What was tuned for such a call, the best match first: for its very shape; or for one near it that the heuristic takes by
    the same plan, whatever won there if it is close, and only with that plan if not."""
    if not switched("GDN_IR_TUNED", default=True):
        return
    here = device_here(target)
    versions: dict[str, str] | None = None                 # asked for where something was tuned: it may import a compiler
    program, mine = program_hash(instance), None           # mine: the steps that the heuristic gives to this shape
    levels: dict[str, list[tuple[float, int, Winner]]] = {}
    for age, w in enumerate(reversed(known())):            # the newest first
        s = w.subject
        if s.backend != backend or s.device.arch != target or s.instance != instance or w.program != program:
            continue
        far = 0.0 if w.shape.key == shape else distance(w.shape.key, shape) + 1e-9
        if far > NEAR:
            continue
        if far:                                            # cut otherwise, what is best for one may take a third too long
            mine = mine or steps_for(target, instance, shape, backend)         # for the other (docs/performance-log.md)
            if steps_for(target, instance, w.shape.key, backend) != mine or (far > CLOSE and w.schedule.steps != mine):
                continue
        versions = (BACKENDS[backend].toolchain(target) or {}) if versions is None else versions
        level = ("other toolchain" if dict(s.versions) != versions else "same architecture" if not same(s.device, here)
                 else "exact" if far == 0.0 else "near")
        levels.setdefault(level, []).append((far, age, w))
    for level in LEVELS:
        for _, _, w in sorted(levels.get(level, []), key=lambda x: x[:2]):
            yield level, w


def steps_for(target: str, instance: Instance, shape: tuple[int, int, int], backend: str) -> Steps | None:
    """The heuristic's; None where it has no schedule."""
    try:
        return default(target, instance, *shape, backend)[0].steps
    except ValueError:
        return None


def same(a: Device, b: Device | None) -> bool:
    return b is not None and (a.name, a.units) == (b.name, b.units)


def provenance(level: str, w: Winner) -> str:
    """As `explain` says it."""
    where = f"on {w.subject.device.name}" if w.how == "measured" else f"for {w.subject.device.name} by {w.how}, never timed"
    time = f": {w.ms:.4g} ms" if w.ms is not None else ""
    time += f": {w.predicted_ms:.4g} ms predicted" if w.predicted_ms is not None else ""
    gain = f", the heuristic's {w.heuristic_ms:.4g} ms" if w.ms is not None and w.heuristic_ms is not None else ""
    with_ = ", ".join(f"{n} {v}" for n, v in w.subject.versions)
    tuned = f"tuned ({level})" if w.how == "measured" else f"chosen ({level})"
    return f"{tuned} for {w.shape} {where} ({w.date}, {with_}){time}{gain}"


def known() -> list[Winner]:
    """Every winner: those that ship first, then the user's, each the newest last."""
    path = default_path()
    try:
        state = path.stat()
        return [*shipped(), *_own(str(path), state.st_mtime_ns, state.st_size)]
    except FileNotFoundError:                              # nothing was tuned
        pass
    except OSError as e:
        _unreadable(str(e))
    return list(shipped())


@lru_cache(maxsize=16)                                     # once for each reason
def _unreadable(why: str) -> None:
    warnings.warn(f"gdn_ir: cannot read what was tuned here ({why}); what ships serves. GDN_IR_RECORDS names another file",
                  RuntimeWarning, stacklevel=3)


@lru_cache(maxsize=4)
def _own(path: str, modified: int, size: int) -> tuple[Winner, ...]:
    return tuple(winners(Records(Path(path)).read()))
