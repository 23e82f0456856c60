"""The steps a plan is made of: each a legality-checked function from a pipeline of programs to a pipeline of programs.

A step names values of the user's program ("u", "o"; of a derived one also "d_u"), does nothing but what exact algebra allows
(`forget`: float32's), and refuses with the node's name and line. They are in algebra.py (a value computed another way),
sums.py (sums and products rearranged, so that they are fewer), trades.py and chains.py (so that a block holds less),
pieces.py (a value taken apart), partition.py (which kernel computes what), given.py (what a backward reads of its forward),
groups.py (sums over grid points), segments.py (a sequence's scan in parts that run at once), forget.py (what has faded before
a segment's end is left out), within.py (what the rest of a segment needs of each chunk, computed before), rows.py (what is
made of rows alone, taken out) and walks.py (what runs all chunks at once, as roles run it).
"""
from __future__ import annotations

from gdn_ir.schedules import (                          # noqa: F401
    algebra,
    chains,
    forget,
    given,
    groups,
    partition,
    pieces,
    rows,
    segments,
    sums,
    trades,
    walks,
    within,
)
from gdn_ir.schedules.pipeline import STEPS, IllegalStep, Pipeline, apply

__all__ = ["STEPS", "IllegalStep", "Pipeline", "apply"]
