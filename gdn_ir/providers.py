"""Variants of third parties: what another package offers the registry beside the backends here.

A package names an object in the entry-point group "gdn_ir.variants":

    [project.entry-points."gdn_ir.variants"]
    mine = "my_package:provider"
"""
from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from gdn_ir.backends.base import Source
from gdn_ir.schedules.schedule import Schedule

if TYPE_CHECKING:
    from gdn_ir.compiler import Instance

GROUP = "gdn_ir.variants"


class Provider(Protocol):
    """name: as `use` and `explain` say it; letters, digits and underscores. first: preferred to the backends here, else after
    them."""
    name: str
    first: bool

    def offer(self, instance: Instance, arch: str, sequences: int, heads: int, tokens: int) -> tuple[Callable[..., None], str]:
        """A callable that takes what `gdn_ir.compiler.Variant.__call__` takes and writes what it writes, and why it is good for
        such calls (a gradient where `instance.grads` names inputs). Raises ValueError with the reason where there is none.
        Called once for each kind of call: it may not depend on tensors."""


@dataclass(frozen=True)
class Offered:
    """What the registry serves of a provider's: to those who ask, a variant without sources."""
    backend: str
    instance: Instance
    run: Callable[..., None]
    schedule: Schedule = field(default_factory=lambda: Schedule("its own"))
    sources: tuple[Source, ...] = ()

    def __call__(self, *args: Any) -> None:
        self.run(*args)


_registered: dict[str, Provider] = {}


def register(provider: Provider) -> None:
    """Offer variants from within a process. Raises ValueError for a name that is taken or no identifier."""
    from gdn_ir.backends import BACKENDS
    if not provider.name.isidentifier() or provider.name in BACKENDS or provider.name in _registered:
        raise ValueError(f"provider.name: got {provider.name!r}; accepts an identifier that no backend has "
                         f"({', '.join(names())} are taken)")
    _registered[provider.name] = provider
    _forget()


def unregister(name: str) -> None:
    """Withdraw what `register` or an entry point brought."""
    providers()
    if _registered.pop(name, None) is None:
        raise ValueError(f"name: got {name!r}; accepts {', '.join(_registered) or 'nothing: no provider is registered'}")
    _forget()


def providers() -> dict[str, Provider]:
    """By name, in the order in which they came; installed packages' are loaded at the first call. One that fails to load is
    left out with a warning: a broken package may not break this one."""
    _load()
    return _registered


def names() -> tuple[str, ...]:
    """Everything that can serve."""
    from gdn_ir.backends import BACKENDS
    return (*BACKENDS, *providers())


@lru_cache(maxsize=1)
def _load() -> None:
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            register(entry.load())
        except Exception as e:
            warnings.warn(f"gdn_ir: the variants of entry point {entry.name} = {entry.value} are left out: "
                          f"{type(e).__name__}: {e}", RuntimeWarning, stacklevel=4)


def _forget() -> None:
    """What was chosen before may not be the best, or not be there, any more."""
    import sys
    registry: Any = sys.modules.get("gdn_ir.registry")
    if registry is not None:
        registry.forget()
