"""gdn-ir: the chunkwise gated delta rule, written once and compiled. `gdn_ir.ops` has the torch op."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gdn_ir.registry import explain, use

__all__ = ["explain", "use"]


def __getattr__(name: str) -> Any:
    if name in __all__:                                    # imported when first asked for: they bring torch with them
        from gdn_ir import registry
        return getattr(registry, name)
    raise AttributeError(f"module 'gdn_ir' has no attribute {name!r}")
