"""How the ops are made known to torch.

`torch.library.custom_op` would do the same, but imports all of torch._dynamo when an op is first called (seconds), so the op is
defined by torch's own primitives.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def op(name: str) -> Callable[[F], F]:
    """Define an op that writes none of its arguments, "namespace::name", implemented by the function for every device."""
    def define(fn: F) -> F:
        torch.library.define(name, torch.library.infer_schema(fn, mutates_args=()))
        torch.library.impl(name, "default", fn)
        return fn
    return define
