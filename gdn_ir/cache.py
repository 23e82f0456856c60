"""Where emitted sources are kept: a folder that a user can open. GDN_IR_CACHE moves it; GDN_IR_PRINT=1 prints each source."""
from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType


def folder() -> Path:
    path = Path(os.environ.get("GDN_IR_CACHE") or Path.home() / ".cache" / "gdn_ir")
    path.mkdir(parents=True, exist_ok=True)
    return path


def load_source(backend: str, kernel: str, digest: str, text: str) -> ModuleType:
    """Write a source to the cache folder and import it from there (so that tracebacks and tools can show it)."""
    if os.environ.get("GDN_IR_PRINT") == "1":
        print(text, file=sys.stderr)
    path = folder() / backend / f"{kernel}_{digest}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(text)
        temporary.replace(path)                            # atomic: another process may be reading
    spec = importlib.util.spec_from_file_location(f"gdn_ir_{backend}_{kernel}_{digest}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
