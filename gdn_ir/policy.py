"""What a user asks of the registry: one backend, or all but some. `use` and `forbid` for a block of code, GDN_IR_BACKEND and
GDN_IR_FORBID for a process; a block's word counts before the process's."""
from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch

from gdn_ir.providers import names

# a backend's name, or names that are forbidden, each after a "-"; "" asks for nothing. One string, so that it can be a key of
# what is memoised and an argument of a custom op.
_asked: ContextVar[str | None] = ContextVar("gdn_ir_policy", default=None)
WHEN_RUN = "?"                                             # in a compiled graph: the policy that holds where it runs
_KEY = "gdn_ir_policy"
_process = (os.environ.get("GDN_IR_BACKEND", ""), os.environ.get("GDN_IR_FORBID", ""))     # as the process was started


def asked() -> str:
    """What holds here."""
    here = _asked.get()
    if here is None and (inherited := _inherited()) and inherited[0] != threading.get_ident():
        here = inherited[1]
    return from_environment(*_process) if here is None else here


def _inherited() -> tuple[int, str] | None:
    """A thread and what holds there: this one, or that which called a backward that torch runs in this one, as on a GPU."""
    return torch._C._get_obj_in_tls(_KEY) if torch._C._is_key_in_tls(_KEY) else None


def _takes_references() -> bool:
    """Whether this torch keeps what it is told to stash without counting that it does, as 2.11 does and 2.13 does not."""
    probe = object()
    before = sys.getrefcount(probe)
    torch._C._stash_obj_in_tls(f"{_KEY}_probe", probe)
    takes = sys.getrefcount(probe) == before
    if takes:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(probe))
    return takes


_TAKES = _takes_references()


def _stash(held: tuple[int, str] | None) -> None:
    if _TAKES:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))
    torch._C._stash_obj_in_tls(_KEY, held)


@contextmanager
def _holding(policy: str) -> Iterator[None]:
    """Here, and in threads in which torch runs a backward that is called here: they share no context variables."""
    token, before = _asked.set(policy), _inherited()
    _stash((threading.get_ident(), policy))
    try:
        yield
    finally:
        _stash(before)
        _asked.reset(token)


@lru_cache(maxsize=16)
def from_environment(backend: str, forbid: str) -> str:
    """Raises ValueError naming the variable that names no backend. GDN_IR_FORBID: names separated by commas."""
    if backend:
        _known("GDN_IR_BACKEND", backend)
    forbidden = [n.strip() for n in forbid.split(",") if n.strip()]
    for name in forbidden:
        _known("GDN_IR_FORBID", name)
    if backend and backend in forbidden:
        raise ValueError(f"GDN_IR_FORBID: got {forbid!r}, and GDN_IR_BACKEND asks for {backend}; accepts other backends")
    return backend or _refusal(forbidden)


def forced(policy: str) -> str | None:
    """The one backend that may serve, if any."""
    return policy if policy and not policy.startswith("-") else None


def forbidden(policy: str) -> tuple[str, ...]:
    return tuple(policy[1:].split("-")) if policy.startswith("-") else ()


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Within the block every call is served by this backend; where it cannot, the call raises its reason."""
    _known("backend", backend)
    with _holding(backend):
        yield


@contextmanager
def automatic() -> Iterator[None]:
    """Within the block nothing is asked for, whatever is around it."""
    with _holding(""):
        yield


@contextmanager
def forbid(*backends: str) -> Iterator[None]:
    """Within the block no call is served by these backends. Blocks add up; inside `use` of another backend they change nothing,
    and `use` of a forbidden one raises ValueError."""
    for name in backends:
        _known("backends", name)
    here = asked()
    if forced(here) in backends:
        raise ValueError(f"backends: got {', '.join(backends)}, and {forced(here)} is asked for here; accepts other backends")
    with _holding(here if forced(here) else _refusal([*forbidden(here), *backends])):
        yield


def _refusal(backends: list[str]) -> str:
    return "".join(f"-{n}" for n in sorted(set(backends)))


def _known(argument: str, backend: str) -> None:
    if backend not in names():
        raise ValueError(f"{argument}: got {backend!r}; accepts {', '.join(names())}")
