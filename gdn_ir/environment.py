"""Switches in the environment."""
from __future__ import annotations

import os


class BadSwitch(RuntimeError):
    """What a variable says is neither on nor off. (No ValueError: to who chooses, that is a backend's reason not to serve.)"""


def switched(name: str, default: bool = False) -> bool:
    """Whether a variable is "1" (on) or "0" (off); unset or empty it is the default. Raises BadSwitch where it is something
    else, which would be ignored."""
    text = os.environ.get(name, "")
    if text not in ("", "0", "1"):
        raise BadSwitch(f"{name}: got {text!r}; accepts 1, 0 or nothing")
    return text == "1" if text else default
