"""What a user asks: one backend, or all but some (`use` and `forbid` for a block of code, GDN_IR_BACKEND and GDN_IR_FORBID for
a process), and what a forward keeps for its backward (`keep`, GDN_IR_KEEP). A block's word counts before the process's."""
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
from gdn_ir.schedules.plans import KEEP

WHEN_RUN = "?"                                             # in a compiled graph: the policy that holds where it runs
_process = (os.environ.get("GDN_IR_BACKEND", ""), os.environ.get("GDN_IR_FORBID", ""))     # as the process was started
_kept = os.environ.get("GDN_IR_KEEP", "")
NOTHING = KEEP[0]                                          # what is kept where nothing is asked for


def asked() -> str:
    """Which backends, here: one's name, or names that are forbidden, each after a "-"; "" asks for nothing. One string, so that
    it can be a key of what is memoised and an argument of a custom op."""
    here = _backends.here()
    return from_environment(*_process) if here is None else here


def keeping() -> str:
    """What a forward here keeps for its backward (see `keep`)."""
    here = _keep.here()
    return keep_from_environment(_kept) if here is None else here


def kept_by(back: bool) -> str:
    """What a backward here is given where nobody says; a forward by itself leaves nothing."""
    return keeping() if back else NOTHING


def _takes_references() -> bool:
    """Whether this torch keeps what it is told to stash without counting that it does, as 2.11 does and 2.13 does not."""
    probe = object()
    before = sys.getrefcount(probe)
    torch._C._stash_obj_in_tls("gdn_ir_probe", probe)
    takes = sys.getrefcount(probe) == before
    if takes:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(probe))
    return takes


_TAKES = _takes_references()


class _Setting:
    """Something that holds in a block of code, and in threads in which torch runs a backward that is called there: they share
    no context variables."""

    def __init__(self, key: str) -> None:
        self.key, self.value = key, ContextVar[str | None](key, default=None)

    def here(self) -> str | None:
        found = self.value.get()
        if found is None and (inherited := self.inherited()) and inherited[0] != threading.get_ident():
            found = inherited[1]
        return found

    def inherited(self) -> tuple[int, str] | None:
        """A thread and what holds there: this one, or that which called a backward that torch runs in this one, as on a GPU."""
        return torch._C._get_obj_in_tls(self.key) if torch._C._is_key_in_tls(self.key) else None

    def stash(self, held: tuple[int, str] | None) -> None:
        if _TAKES:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))
        torch._C._stash_obj_in_tls(self.key, held)

    @contextmanager
    def holding(self, value: str) -> Iterator[None]:
        token, before = self.value.set(value), self.inherited()
        self.stash((threading.get_ident(), value))
        try:
            yield
        finally:
            self.stash(before)
            self.value.reset(token)


_backends, _keep = _Setting("gdn_ir_policy"), _Setting("gdn_ir_keep")


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


@lru_cache(maxsize=16)
def keep_from_environment(keep: str) -> str:
    """Raises ValueError naming the variable where it asks for what there is not."""
    if keep not in ("", *KEEP):
        raise ValueError(f"GDN_IR_KEEP: got {keep!r}; accepts {', '.join(KEEP)}")
    return keep or NOTHING


def forced(policy: str) -> str | None:
    """The one backend that may serve, if any."""
    return policy if policy and not policy.startswith("-") else None


def forbidden(policy: str) -> tuple[str, ...]:
    return tuple(policy[1:].split("-")) if policy.startswith("-") else ()


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Within the block every call is served by this backend; where it cannot, the call raises its reason."""
    _known("backend", backend)
    with _backends.holding(backend):
        yield


@contextmanager
def automatic() -> Iterator[None]:
    """Within the block nothing is asked for, whatever is around it."""
    with _backends.holding(""):
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
    with _backends.holding(here if forced(here) else _refusal([*forbidden(here), *backends])):
        yield


@contextmanager
def keep(what: str) -> Iterator[None]:
    """Within the block, forwards that will be differentiated keep for their backwards what these would compute again:

        nothing   but the inputs
        inverse   the inverse of each chunk and the sums of the log decay: T HV (64 e + 4) bytes, for T tokens of all sequences,
                  HV value heads and e bytes of an element of q
        states    these, the state that enters each chunk and u: T HV (64 e + 4 + V e + K V e / 64)

    That takes memory from the forward to the backward, and saves the backward a part of its kernels. Where the kernels that
    would serve cannot, nothing is kept, with one warning. A graph of torch.compile keeps what was asked for when it was traced;
    a forward that is checkpointed runs again in its backward, where the same must be asked for."""
    if what not in KEEP:
        raise ValueError(f"what: got {what!r}; accepts {', '.join(KEEP)}")
    with _keep.holding(what):
        yield


def _refusal(backends: list[str]) -> str:
    return "".join(f"-{n}" for n in sorted(set(backends)))


def _known(argument: str, backend: str) -> None:
    if backend not in names():
        raise ValueError(f"{argument}: got {backend!r}; accepts {', '.join(names())}")
