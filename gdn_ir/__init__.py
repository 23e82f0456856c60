"""gdn-ir: the chunkwise gated delta rule, written once and compiled. `gdn_ir.ops` has the torch ops, `gdn_ir.nn` the layer.

Importing this brings no torch; `ops`, `nn`, `explain`, `use`, `forbid`, `keep`, `load_pack` and `__version__` are fetched when
first asked for.
"""
from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gdn_ir.packs import load_pack
    from gdn_ir.policy import keep
    from gdn_ir.registry import explain, forbid, use

__all__ = ["explain", "forbid", "keep", "load_pack", "use"]


def __getattr__(name: str) -> Any:
    if name == "load_pack":
        from gdn_ir.packs import load_pack
        return load_pack
    if name == "keep":
        from gdn_ir.policy import keep
        return keep
    if name in __all__:
        from gdn_ir import registry
        return getattr(registry, name)
    if name in ("ops", "nn"):
        return importlib.import_module(f"gdn_ir.{name}")
    if name == "__version__":
        return importlib.metadata.version("gdn-ir")
    raise AttributeError(f"module 'gdn_ir' has no attribute {name!r}")
