"""Calls as a user names them on the command line: an op, shapes, flags; `explain`, `emit`, `tune` and `compile` take the same
words."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from gdn_ir.autotune.keys import Shape
from gdn_ir.bench import cases
from gdn_ir.compiler import NAMES, Instance
from gdn_ir.policy import kept_by
from gdn_ir.programs.gated_delta import Switches

GRADIENTS = ("q", "k", "v", "g", "beta")
OPS = ("forward", "backward", "recurrent")                # recurrent: the forward, one token at a time
# twenty that stand for the rest of FORWARD and TRAIN: 8 to 512 scans, 16 to 512 chunks in each
REPRESENTATIVE = ("1x2048:2/8,1x8192:2/8,1x32768:2/8,1x2048:4/16,1x8192:4/16,1x32768:4/16,1x2048:16/32,1x8192:16/32,"
                  "1x32768:16/32,1x8192:16/16,1x32768:16/16,1x2048:16/64,1x8192:16/64,1x32768:16/64,4x2048:8/32,4x8192:16/32,8x1024:16/32,"
                  "8x1024:4/8,8x4096:16/64,8x4096:4/16")


def instances(op: str, shapes: Iterable[Shape], dtype: str, K: int, V: int, flags: str, dense: bool,
              beta: str = "", grads: str = "", keep: str = "nothing", said: str = "--shapes") -> dict[Instance, list[Shape]]:
    """The instances that an operation on shapes takes, each with its shapes. beta: its dtype, where it is another; grads: those
    of a backward, separated by commas; keep: "" for what is asked for here (`policy.kept_by`); said: what the user calls
    shapes. Raises ValueError naming what is wrong."""
    if op not in OPS:
        raise ValueError(f"--op: got {op!r}; accepts {', '.join(OPS)}")
    for name, given in (("dtype", dtype), ("beta", beta or dtype)):
        if given not in NAMES.values():
            raise ValueError(f"--{name}: got {given!r}; accepts {', '.join(NAMES.values())}")
    known = [n for n, f in Switches.__dataclass_fields__.items() if f.type == "bool"]
    words = listed(flags)
    for w in words:
        if w.removeprefix("no-") not in (*known, "decay"):
            raise ValueError(f"--flags: got {w!r}; accepts {', '.join(known)}, decay, each also with no- before it")
    on = {"final_state": op != "backward"} | {w.removeprefix("no-"): not w.startswith("no-") for w in words}
    decay = "scalar" if on.pop("decay", True) else "none"
    switches, named = Switches(decay, **on), listed(grads)
    if named and op != "backward":
        raise ValueError(f"--grads: got {grads!r} with --op {op}; accepts it with --op backward")
    if "initial_state" in named:
        switches = replace(switches, initial_state=True)
    every = tuple(n for n in (*GRADIENTS, "initial_state") if n in Instance(switches, K, V, dtype, dtype, True).program.read())
    if unknown := [n for n in named if n not in every]:
        raise ValueError(f"--grads: got {unknown[0]!r}; accepts {', '.join(every)}")
    found: dict[Instance, list[Shape]] = {}
    for s in shapes:
        if dense and len(set(s.lengths)) > 1:
            raise ValueError(f"{said}: got {s} with --dense; accepts sequences of one length there")
        wanted = (named or every) if op == "backward" else ()
        i = Instance(switches, K, V, dtype, beta or dtype, not dense, wanted, not wanted or s.HV > s.H, op == "recurrent",
                     keep or kept_by(op == "backward"))
        found.setdefault(i, []).append(s)
    return found


def shapes_of(text: str, said: str = "--shapes") -> list[Shape]:
    """As gdn_ir.bench.cases names them; the representative ones where there is no text, all of a suite where that is named."""
    text = text or REPRESENTATIVE
    rows = cases.SUITES[text] if text in cases.SUITES else cases.parse(text, "forward", said)
    return list(dict.fromkeys(Shape(tuple(lengths), H, HV) for lengths, H, HV in rows))


def listed(words: str) -> tuple[str, ...]:
    """Words between commas."""
    return tuple(w.strip() for w in words.split(",") if w.strip())
