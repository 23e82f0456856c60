"""What a schedule is: plain data that decides how a program runs, and nothing about what it computes."""
from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class KernelOptions:
    """How one kernel of the plan runs. v_tile: columns of V a block owns (None: all); the rest goes to the grid."""
    v_tile: int | None = None
    num_warps: int = 4
    num_stages: int = 2

    def __str__(self) -> str:
        tile = f", V in tiles of {self.v_tile}" if self.v_tile else ""
        return f"{self.num_warps} warp{'s' * (self.num_warps > 1)}, {self.num_stages} stage{'s' * (self.num_stages > 1)}{tile}"

    def __post_init__(self) -> None:
        for name, value, ok in (("v_tile", self.v_tile, self.v_tile is None or _power_of_two(self.v_tile)),
                                ("num_warps", self.num_warps, self.num_warps in (1, 2, 4, 8, 16)),
                                ("num_stages", self.num_stages, 1 <= self.num_stages <= 8)):
            if not ok:
                raise ValueError(f"KernelOptions.{name}: got {value!r}; accepts a power of two "
                                 "(v_tile also None; num_warps to 16; num_stages is any number from 1 to 8)")


def _power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@dataclass(frozen=True)
class Schedule:
    """chunk: tokens a chunk (C). steps: the plan, applied in order; each is a step's name and its arguments (see
    `gdn_ir.schedules.steps.STEPS`). kernels: options by kernel name; "*" serves those not named. dot: dtype that the
    operands of products are rounded to ("io": as the inputs are stored)."""
    name: str
    chunk: int = 64
    steps: tuple[tuple[str | int, ...], ...] = ()
    kernels: tuple[tuple[str, KernelOptions], ...] = (("*", KernelOptions()),)
    dot: str = "io"

    def __post_init__(self) -> None:
        if not (self.chunk == 1 or (_power_of_two(self.chunk) and 16 <= self.chunk <= 256)):
            raise ValueError(f"Schedule.chunk: got {self.chunk}; accepts 1 or a power of two from 16 to 256")
        if self.dot not in ("io", "f64", "f32", "tf32x3", "tf32", "bf16", "f16"):
            raise ValueError(f"Schedule.dot: got {self.dot!r}; accepts io, f64, f32, tf32x3, tf32, bf16, f16")

    def options(self, kernel: str) -> KernelOptions:
        table = dict(self.kernels)
        return table.get(kernel, table.get("*", KernelOptions()))

    def with_options(self, **kernels: KernelOptions) -> Schedule:
        return replace(self, kernels=tuple({**dict(self.kernels), **kernels}.items()))

    def __str__(self) -> str:
        """As a person reads it: the plan's steps, one after another, and the products' operands where they are not io's."""
        steps = "; ".join(" ".join(str(part) for part in step) for step in self.steps) or "the program as it is"
        return f"{self.name}: chunks of {self.chunk}{'' if self.dot == 'io' else f', products in {self.dot}'}; {steps}"

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Schedule:
        """The schedule that `to_json` wrote. Raises ValueError naming a field that is unknown or out of range."""
        data: dict[str, Any] = json.loads(text)
        unknown = set(data) - set(Schedule.__dataclass_fields__)
        if unknown or "name" not in data:
            raise ValueError(f"Schedule: {'unknown field ' + ', '.join(sorted(unknown)) if unknown else 'name is missing'}; "
                             f"it has {', '.join(Schedule.__dataclass_fields__)}")
        if "steps" in data:
            data["steps"] = tuple(tuple(s) for s in data["steps"])
        if "kernels" in data:
            data["kernels"] = tuple((k, KernelOptions(**o)) for k, o in data["kernels"])
        return Schedule(**data)
