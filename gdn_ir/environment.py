"""Switches in the environment."""
from __future__ import annotations

import os


def switched(name: str, default: bool = False) -> bool:
    """Whether a variable is "1" (on) or "0" (off); unset or empty it is the default. Raises RuntimeError where it is something
    else, which would be ignored. (No ValueError: to who chooses, that is a backend's reason not to serve.)"""
    text = os.environ.get(name, "")
    if text not in ("", "0", "1"):
        raise RuntimeError(f"{name}: got {text!r}; accepts 1, 0 or nothing")
    return text == "1" if text else default
