"""What a measurement is of, as JSON: the program, the call's shape, the GPU. Measurements compare only where these agree."""
from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch

from gdn_ir.artifacts import digest
from gdn_ir.compiler import Instance
from gdn_ir.printer import dump
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.schedules.schedule import Schedule

Json = dict[str, Any]
CHUNK = 64                                                 # tokens; what serial length is counted in
NEAR = 1.0                                                 # octaves: the farthest that a winner serves ...
CLOSE = 0.25                                               # ... and that it does with a plan that is not the heuristic's


@dataclass(frozen=True)
class Shape:
    """A call's: lengths of its sequences, H heads of q and k, HV heads of v. What is served depends on `key` alone, for the
    host never reads cu_seqlens."""
    lengths: tuple[int, ...]
    H: int
    HV: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def key(self) -> tuple[int, int, int]:
        """Sequences, heads, tokens."""
        return len(self.lengths), self.HV, self.tokens

    def __str__(self) -> str:
        one = len(set(self.lengths)) == 1
        return f"{f'{len(self.lengths)}x{self.lengths[0]}' if one else '+'.join(map(str, self.lengths))}:{self.H}/{self.HV}"


def octaves(sequences: int, heads: int, tokens: int) -> tuple[float, float]:
    """log2 of the scans that run side by side, and of the chunks that each takes in turn: what decides a schedule."""
    return math.log2(max(1, sequences * heads)), math.log2(max(1.0, tokens / max(1, sequences) / CHUNK))


def distance(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    """Between two shapes' keys, in octaves; serial length counts half."""
    (p, s), (q, t) = octaves(*a), octaves(*b)
    return abs(p - q) + abs(s - t) / 2


# ---- programs ---------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def program_hash(instance: Instance) -> str:
    """Of the program as derived or traced: it changes when what is computed changes, not when a schedule does."""
    return digest(dump(instance.program, notes=False))[:16]


def of_instance(instance: Instance) -> Json:
    """An instance as JSON: its flags are those switches that differ from their defaults."""
    plain = asdict(Switches())
    flags = {n: v for n, v in asdict(instance.switches).items() if v != plain[n]}
    back = {"grads": list(instance.grads), "grouped": instance.grouped} if instance.grads else {}
    back |= {"recurrent": True} if instance.recurrent else {}
    back |= {"keep": instance.keep} if instance.keep != "nothing" else {}
    return {"flags": flags, "K": instance.K, "V": instance.V, "io": instance.io, "beta": instance.beta,
            "varlen": instance.varlen, **back}


def to_instance(data: Json) -> Instance:
    """The instance that `of_instance` wrote. Raises TypeError or ValueError where it is none."""
    return Instance(Switches(**data["flags"]), data["K"], data["V"], data["io"], data["beta"], data["varlen"],
                    tuple(data.get("grads", ())), data.get("grouped", True), data.get("recurrent", False),
                    data.get("keep", "nothing"))


def of_schedule(schedule: Schedule) -> Json:
    found: Json = json.loads(schedule.to_json())
    return found


def to_schedule(data: Json) -> Schedule:
    return Schedule.from_json(json.dumps(data))


# ---- devices ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """What kernels ran on. units: multiprocessors of a GPU, cores that this process may use of a CPU."""
    name: str
    units: int
    arch: str


def device_here(arch: str) -> Device | None:
    """The device of an architecture at hand; None where there is none (a schedule for it can still be looked up).

    A process is taken to have one model of GPU for each architecture: this is the current device's, wherever a call's tensors
    are, and the registry keeps what it chose by architecture. Beside an H100, an H200 is served with what suits the one that
    was current at the first call of its kind: right, if not the fastest."""
    if arch in ("cpu", "torch") and not (arch == "torch" and torch.cuda.is_available()):
        return Device(processor_name(), len(os.sched_getaffinity(0)), arch)
    if not torch.cuda.is_available():
        return None
    from gdn_ir.registry import architecture
    here = torch.device("cuda", torch.cuda.current_device())
    if arch not in ("torch", architecture(here)):
        return None
    about = torch.cuda.get_device_properties(here)
    return Device(about.name, about.multi_processor_count, arch)


@lru_cache(maxsize=1)
def processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown processor"
