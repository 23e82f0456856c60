"""Where emitted sources are kept: a folder that a user can open. GDN_IR_CACHE moves it; GDN_IR_PRINT=1 prints each source."""
from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path
from types import ModuleType


def folder() -> Path:
    path = Path(os.environ.get("GDN_IR_CACHE") or Path.home() / ".cache" / "gdn_ir")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        path = Path(_temporary())
        warnings.warn(f"gdn_ir: cannot write the cache folder ({e}); emitted sources go to {path} for now. GDN_IR_CACHE names "
                      "another folder", RuntimeWarning, stacklevel=3)
    return path


@lru_cache(maxsize=1)
def _temporary() -> str:
    return tempfile.mkdtemp(prefix="gdn_ir_")


def load_source(backend: str, kernel: str, digest: str, text: str) -> ModuleType:
    """Write a source to the cache folder and import it from there (so that tracebacks and tools can show it)."""
    if os.environ.get("GDN_IR_PRINT") == "1":
        print(text, file=sys.stderr)
    own = hashlib.sha256(text.encode()).hexdigest()[:8]   # the digest ignores comments, which the file has
    path = folder() / backend / f"{kernel}_{digest}_{own}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(text)
        temporary.replace(path)                            # atomic: another process may be reading
    spec = importlib.util.spec_from_file_location(f"gdn_ir_{backend}_{kernel}_{digest}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
