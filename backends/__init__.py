"""The backends, by name."""
from __future__ import annotations

from gdn_ir.backends.base import Backend, Reason
from gdn_ir.backends.tilelang import TileLang
from gdn_ir.backends.torch import Torch
from gdn_ir.backends.triton import Triton

BACKENDS: dict[str, Backend] = {b.name: b for b in (Triton(), TileLang(), Torch())}

__all__ = ["BACKENDS", "Backend", "Reason"]
