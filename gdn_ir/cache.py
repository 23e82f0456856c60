"""The cache on disk: a folder that a user can open, move or delete at any time.

    FOLDER/triton, tilelang, torch     emitted sources, which Python imports from there
    FOLDER/artifacts                   what toolchains made of them (artifacts.py)

GDN_IR_CACHE names the folder; GDN_IR_CACHE_SIZE bounds it (MiB, 1024 by default; the least recently used goes first);
GDN_IR_PRINT=1 also prints each source when it is used.
"""
from __future__ import annotations

import hashlib
import importlib.machinery
import os
import shutil
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

from filelock import FileLock, Timeout

SOURCES = ("triton", "tilelang", "torch")
ARTIFACTS = "artifacts"
TEMPORARY = ".tmp"                                         # suffix of what is not yet whole
ABANDONED = 3600.0                                         # seconds after which such a thing belongs to no live process


def folder() -> Path:
    path = Path(os.environ.get("GDN_IR_CACHE") or Path.home() / ".cache" / "gdn_ir")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        return fallback(e)
    return path


def fallback(e: OSError) -> Path:
    """Where things go when the folder cannot be written: a folder of this process, with a warning."""
    path = Path(_temporary())
    warnings.warn(f"gdn_ir: cannot write the cache folder ({e}); kernels are kept in {path} for now. GDN_IR_CACHE names "
                  "another folder", RuntimeWarning, stacklevel=4)
    return path


@lru_cache(maxsize=1)
def _temporary() -> str:
    return tempfile.mkdtemp(prefix="gdn_ir_")


def largest() -> int:
    """Bytes that the cache may hold. Raises ValueError where GDN_IR_CACHE_SIZE is not a number of MiB."""
    text = os.environ.get("GDN_IR_CACHE_SIZE") or "1024"
    try:
        size = float(text)
        if size >= 0:
            return int(size * 2**20)
    except ValueError:
        pass
    raise ValueError(f"GDN_IR_CACHE_SIZE: got {text!r}; accepts a number of MiB from 0 on")


def unfinished(path: Path) -> Path:
    """Where a thing is made before it appears at `path`: a name that no process has. (mkdtemp's own are closed to other users,
    whatever the umask, and so would be what is renamed from them.)"""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}{TEMPORARY}")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file all at once: whoever reads it meanwhile finds the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = unfinished(path)
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_source(backend: str, kernel: str, digest: str, text: str) -> ModuleType:
    """Import a source from the cache folder, so that tracebacks and tools can show it; written there first where what lies
    there is not this text."""
    own = hashlib.sha256(text.encode()).hexdigest()[:8]   # the digest ignores comments, which the file has
    name = f"{kernel}_{digest}_{own}.py"
    path = folder() / backend / name
    data = text.encode()
    try:
        try:
            found = path.read_bytes()
        except FileNotFoundError:
            found = None
        if found is not None and found != data:
            warnings.warn(f"gdn_ir: {path} is damaged; it is written again", RuntimeWarning, stacklevel=2)
        if found != data:
            write_whole(path, data)
        used(path)
    except OSError as e:
        path = fallback(e) / backend / name
        write_whole(path, data)
    module = module_from_spec(importlib.machinery.ModuleSpec(f"gdn_ir_{backend}_{kernel}_{digest}", None, origin=str(path)))
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    exec(compile(text, str(path), "exec"), module.__dict__)   # from memory: no bytecode is left behind to be trusted later
    return module


# ---- the bound --------------------------------------------------------------------------------------------------------------


def used(path: Path) -> None:
    """Note that an entry was used now: the bound takes the least recently used first."""
    with suppress(OSError):                                # read-only, or evicted by another process this moment
        os.utime(path)


def entries(root: Path) -> Iterator[tuple[float, int, Path]]:
    """Of everything in the cache: when it was last used, its bytes, and where it is (a source's file, an artifact's folder)."""
    for kind in (*SOURCES, ARTIFACTS):
        for path in (root / kind).glob("*"):
            try:
                if path.is_dir():
                    yield path.stat().st_mtime, sum(f.stat().st_size for f in path.iterdir()), path
                else:
                    yield path.stat().st_mtime, path.stat().st_size, path
            except OSError:                                # gone since it was listed
                continue


def remove(path: Path) -> None:
    """Take an entry away all at once; who has opened it keeps what is open."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    doomed = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        path.rename(doomed)
    except OSError:                                        # another process was faster
        return
    shutil.rmtree(doomed, ignore_errors=True)


def trim(root: Path, limit: int | None = None, spare: float = 60.0) -> list[Path]:
    """Remove the least recently used entries until at most `limit` bytes are left (GDN_IR_CACHE_SIZE), but none that was used
    in the last `spare` seconds, for it may be about to be loaded; and what killed processes left half written. Returns what
    went. Does nothing where another process is at it."""
    limit = largest() if limit is None else limit
    gone = []
    try:
        with FileLock(root / "trim.lock", timeout=0):
            found, now = sorted(entries(root)), time.time()
            total = sum(size for _, size, _ in found)
            for when, size, path in found:
                half = path.name.endswith(TEMPORARY)
                if (half and now - when > ABANDONED) or (not half and total > limit and now - when > spare):
                    remove(path)
                    gone.append(path)
                    total -= size
    except (Timeout, OSError):
        pass
    return gone
