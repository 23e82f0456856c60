"""Packs: kernels compiled ahead, on any machine, and loaded where no compiler need be.

A pack is a folder: `artifacts` as in the cache, keyed by recipe, and pack.json, which says with which schedule each shape is
served. `gdn-ir compile` makes one; `load_pack` serves from it, until the process ends. Since N, T, H and HV are arguments of a
kernel, a pack serves every shape of an instance that it has one shape of.
"""
from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdn_ir import artifacts, cache, registry
from gdn_ir.artifacts import Damaged, Store, digest
from gdn_ir.autotune import lookup
from gdn_ir.autotune.keys import Shape, distance, of_instance, of_schedule, program_hash, to_instance, to_schedule
from gdn_ir.compiler import Instance, Variant, variant
from gdn_ir.schedules.defaults import roles_fit
from gdn_ir.schedules.schedule import Schedule

Json = dict[str, Any]
FORMAT = 1
MANIFEST = "pack.json"


@dataclass(frozen=True)
class Entry:
    """How a pack serves a shape. keys: of its kernels' artifacts; why: where the schedule came from when it was made."""
    target: str
    instance: Instance
    backend: str
    shape: Shape
    schedule: Schedule
    keys: tuple[str, ...]
    why: str

    def json(self) -> Json:
        s = self.shape
        return {"target": self.target, "program": program_hash(self.instance), "instance": of_instance(self.instance),
                "backend": self.backend, "shape": {"lengths": list(s.lengths), "H": s.H, "HV": s.HV},
                "schedule": of_schedule(self.schedule), "keys": list(self.keys), "why": self.why}

    @staticmethod
    def of(data: Json) -> Entry:
        s = data["shape"]
        shape = Shape(tuple(s["lengths"]), s["H"], s["HV"])
        return Entry(data["target"], to_instance(data["instance"]), data["backend"], shape, to_schedule(data["schedule"]),
                     tuple(data["keys"]), data["why"])


@dataclass(frozen=True)
class Pack:
    """A loaded pack."""
    path: Path
    entries: tuple[Entry, ...]

    @property
    def store(self) -> Store:
        return Store(self.path / "artifacts", own=False)

    def nearest(self, target: str, instance: Instance, shape: tuple[int, int, int], backend: str) -> Entry | None:
        """The entry of the instance whose shape is nearest to (sequences, heads, tokens); None where it has none. However far,
        and though its sequences be cut otherwise than is best here: a pack is for compiling nothing."""
        found = [e for e in self.entries if (e.target, e.instance, e.backend) == (target, instance, backend)]
        return min(found, key=lambda e: (e.shape.key != shape, distance(e.shape.key, shape)), default=None)

    def holds(self, entry: Entry) -> bool:
        """Whether what this gdn-ir would compile is what the pack holds."""
        return keys_of(variant(entry.instance, entry.schedule, entry.backend, entry.target)) == entry.keys


def keys_of(made: Variant) -> tuple[str, ...]:
    c = made.compiled
    return tuple(digest(b.recipe(k, s, made.arch)) for b, k, s in zip(c.makers, c.kernels, c.sources, strict=True))


def load_pack(path: str | Path) -> Pack:
    """Serve from a pack that `gdn-ir compile` made, before anything that was tuned or compiled here.

    Raises ValueError where `path` holds no pack, or a damaged one; a kernel's own checksums are verified when it is first used.
    """
    path = Path(path).resolve()
    try:
        data = json.loads((path / MANIFEST).read_text())
        given = data.pop("sha256")
        if given != digest(data):
            raise Damaged(f"{MANIFEST} is not what was written")
        if data["format"] != FORMAT:
            raise Damaged(f"format {data['format']}, and this gdn-ir reads {FORMAT}")
        pack = Pack(path, tuple(Entry.of(e) for e in data["entries"]))
    except OSError as e:
        raise ValueError(f"path: got {path}; accepts a folder that gdn-ir compile made ({e})") from None
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ValueError(f"path: got {path}; accepts a whole pack: {e}; make it again with gdn-ir compile") from None
    missing = {k for e in pack.entries for k in e.keys if not (pack.store.root / k).is_dir()}
    if missing:
        raise ValueError(f"path: got {path}; accepts a whole pack: {len(missing)} of its kernels are missing")
    lookup.PACKS[:] = [pack, *(p for p in lookup.PACKS if p.path != path)]
    artifacts.PACKS[:] = [p.store for p in lookup.PACKS]
    registry.forget()
    return pack


def unload_packs() -> None:
    """Serve from no pack any more (kernels that were loaded stay so)."""
    lookup.PACKS.clear()
    artifacts.PACKS.clear()
    registry.forget()


def plan_entries(targets: Iterable[str], work: dict[Instance, list[Shape]], backends: Iterable[str]) \
        -> list[tuple[Entry, Variant]]:
    """What a pack of these will hold: for each target and shape the schedule that would serve there. backends: none for those
    that may serve a call: the one that takes any, and of roles TileLang. Raises ValueError with the reason of the first that
    cannot be served."""
    found, named = [], tuple(backends)
    for target in targets:
        anything = "tilelang" if target == "cpu" else "triton"
        for instance, shapes in work.items():
            for s in shapes:
                for backend in named or (anything, *(("tilelang",) if roles_fit(target, instance, *s.key) else ())):
                    f = lookup.find(target, instance, *s.key, backend)
                    made = variant(instance, f.schedule, backend, target)
                    found.append((Entry(target, instance, backend, s, f.schedule, keys_of(made), f.why), made))
    return found


def write_pack(out: Path, planned: list[tuple[Entry, Variant]]) -> int:
    """Write a pack, all at once, of kernels that are compiled now where the cache lacks them; returns how many it holds."""
    if out.exists():
        raise ValueError(f"-o: got {out}, which exists; accepts a path where nothing is")
    temporary = cache.unfinished(out)
    temporary.mkdir(parents=True)
    try:
        store, held = Store(temporary / "artifacts", own=False), set()
        for entry, made in planned:
            c = made.compiled
            for key, maker, kernel, source in zip(entry.keys, c.makers, c.kernels, c.sources, strict=True):
                if key not in held:
                    store.copy(artifacts.obtain(maker, kernel, source, entry.target), key)
                    held.add(key)
        data = {"format": FORMAT, "entries": [e.json() for e, _ in planned]}
        (temporary / MANIFEST).write_text(json.dumps(data | {"sha256": digest(data)}, indent=1) + "\n")
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return len(held)
