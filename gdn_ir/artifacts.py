"""What toolchains made of kernels, kept on disk so that nothing is compiled twice, and loaded only when it is whole.

An artifact is a folder named by its key: files (a cubin, a shared library) and about.json, which says what they were made of,
how they are launched, and the checksum of each. Its **recipe** is everything that decides what the code does (source, options,
dtypes, architecture, flags); its key adds the **toolchain**'s versions. A pack is keyed by recipes alone: who loads it needs no
toolchain, and so has no version of one.
"""
from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import subprocess
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdn_ir import cache
from gdn_ir.environment import switched

if TYPE_CHECKING:
    from gdn_ir.backends.base import Backend, Kernel, Source

FORMAT = 1                                                 # of about.json; in the keys of the cache, so that versions share one
ABOUT = "about.json"
LOG = logging.getLogger("gdn_ir")


class NotCompiled(RuntimeError):
    """A kernel would have to be compiled now, and GDN_IR_NO_JIT=1 forbids it, or what compiles it is not installed."""


class Damaged(ValueError):
    """An artifact on disk is not what was written."""


@dataclass(frozen=True)
class Built:
    """What a backend's `build` returns. files: contents by name; launch: what loading them needs to know (JSON)."""
    files: Mapping[str, bytes]
    launch: Mapping[str, Any]


@dataclass(frozen=True)
class Artifact:
    """A built kernel on disk, its checksums seen to be right."""
    folder: Path
    launch: Mapping[str, Any]
    recipe: Mapping[str, Any]
    toolchain: Mapping[str, str]

    def path(self, name: str) -> Path:
        return self.folder / name


@lru_cache(maxsize=16)
def said(program: str) -> str:
    """The last line of what a compiler calls its version (g++ ends with its licence: there the first). Raises OSError or
    CalledProcessError where it cannot be asked."""
    lines = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.strip().splitlines()
    return lines[0 if program == "g++" else -1]


def digest(data: object) -> str:
    """Of JSON data: the same for the same data, on any machine."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Store:
    """A folder of artifacts by key. Safe under concurrent processes: an artifact appears and vanishes whole."""
    root: Path
    own: bool = field(default=True)                        # whether damaged entries may be removed (a pack's may not)

    def get(self, key: str) -> Artifact | None:
        """The artifact, or None where there is none. A damaged one is removed with a warning, and counts as none."""
        place = self.root / key
        why = ""
        while not why:
            try:
                handle = os.open(place, os.O_RDONLY)       # held: no other folder can get its number
            except FileNotFoundError:
                return None
            try:
                found = read(place)
                cache.used(place)
                return found
            except (Damaged, OSError) as e:
                if number(place) == os.fstat(handle).st_ino:       # else another process has put a new one in its place
                    why = ("a file is missing" if isinstance(e, FileNotFoundError) else
                           "it is no folder" if isinstance(e, NotADirectoryError) else str(e))
            finally:
                os.close(handle)
        if not self.own:
            raise Damaged(f"{place}: {why}; make the pack again with gdn-ir compile")
        warnings.warn(f"gdn_ir: the cached kernel in {place} is damaged ({why}); it is compiled again", RuntimeWarning,
                      stacklevel=3)
        cache.remove(place)
        return None

    def put(self, key: str, built: Built, recipe: Mapping[str, Any], toolchain: Mapping[str, str]) -> Artifact:
        """Keep an artifact. Where another process has kept the same one meanwhile, that one stands."""
        temporary = cache.unfinished(self.root / key)
        temporary.mkdir(parents=True)
        try:
            for name, data in built.files.items():
                (temporary / name).write_bytes(data)
            about = {"format": FORMAT, "launch": built.launch, "recipe": recipe, "toolchain": toolchain,
                     "files": {n: hashlib.sha256(d).hexdigest() for n, d in built.files.items()}}
            (temporary / ABOUT).write_text(json.dumps(about | {"sha256": digest(about)}, indent=1) + "\n")
            try:
                temporary.rename(self.root / key)
            except OSError as e:
                if e.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return Artifact(self.root / key, built.launch, recipe, toolchain)

    def copy(self, artifact: Artifact, key: str) -> None:
        """Keep another store's artifact here."""
        files = {n: artifact.path(n).read_bytes() for n in json.loads(artifact.path(ABOUT).read_text())["files"]}
        self.put(key, Built(files, artifact.launch), artifact.recipe, artifact.toolchain)


def number(folder: Path) -> int | None:
    try:
        return folder.stat().st_ino
    except FileNotFoundError:
        return None


def read(folder: Path) -> Artifact:
    """An artifact whose every checksum is right. Raises Damaged, or OSError where it cannot be read."""
    try:
        about = json.loads((folder / ABOUT).read_text())
        given = about.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{ABOUT} is not what was written") from None
    if given != digest(about):
        raise Damaged(f"{ABOUT} is not what was written")
    if about["format"] != FORMAT:
        raise Damaged(f"format {about['format']}, and this gdn-ir reads {FORMAT}")
    for name, wanted in about["files"].items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != wanted:
            raise Damaged(f"{name} is not what was written")
    return Artifact(folder, about["launch"], about["recipe"], about["toolchain"])


def store() -> Store:
    """The store of the cache folder."""
    return Store(cache.folder() / cache.ARTIFACTS)


PACKS: list[Store] = []                                    # those that `gdn_ir.load_pack` loaded, the newest first


def packed(recipe: Mapping[str, Any]) -> bool:
    """Whether a loaded pack holds a kernel."""
    return any((pack.root / digest(recipe)).is_dir() for pack in PACKS)


def at_hand(backend: Backend, kernel: Kernel, source: Source, arch: str) -> bool:
    """Whether `obtain` would give a kernel as a user expects: from a pack, where one was loaded; else by compiling, where that
    is allowed and possible."""
    if packed(backend.recipe(kernel, source, arch)):
        return True
    return not PACKS and not switched("GDN_IR_NO_JIT") and backend.toolchain(arch) is not None


def obtain(backend: Backend, kernel: Kernel, source: Source, arch: str) -> Artifact:
    """A kernel's artifact: from a loaded pack, else from the cache, else built now and kept. Raises NotCompiled where it would
    have to be built and may not (GDN_IR_NO_JIT=1) or cannot be."""
    recipe = backend.recipe(kernel, source, arch)
    for pack in PACKS:
        found = pack.get(digest(recipe))
        if found is not None:
            return found
    toolchain = backend.toolchain(arch)
    if toolchain is None:
        raise NotCompiled(f"{kernel.name} for {arch} is in no loaded pack, and what {backend.name} compiles with is not here")
    key = digest([FORMAT, recipe, toolchain])
    here = store()
    found = here.get(key)
    if found is not None:
        return found
    if switched("GDN_IR_NO_JIT"):
        raise NotCompiled(f"{kernel.name} for {arch} by {backend.name} is neither in the cache nor in a loaded pack")
    began = time.perf_counter()
    LOG.info("compiling %s for %s by %s", kernel.name, arch, backend.name)
    built = backend.build(kernel, source, arch)
    LOG.info("compiled %s for %s by %s in %.1f s", kernel.name, arch, backend.name, time.perf_counter() - began)
    assert built is not None, f"{backend.name} has nothing to build"
    try:
        found = here.put(key, built, recipe, toolchain)
    except OSError as e:
        return Store(cache.fallback(e) / cache.ARTIFACTS).put(key, built, recipe, toolchain)
    cache.trim(here.root.parent)
    return found
