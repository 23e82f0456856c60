"""What a schedule is: plain data that decides how a program runs, and nothing about what it computes."""
from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace

from gdn_ir.schedules.roles import Roles


@dataclass(frozen=True)
class KernelOptions:
    """How one kernel of the plan runs. v_tile: columns of V a block owns (None: all); the rest goes to the grid. follows:
    whether it starts beside the scan before it (`gdn_ir.follow`): at once where it reads nothing of it, else each chunk as
    soon as that has stored it. roles: what its warps do, where they do not all do the same (then it decides their number, and
    how far loads run ahead). backend: which makes this kernel, where it is another than makes the rest. sparing: whether its
    statements stand in an order in which a block holds little at once, not in the program's. k_tile: columns of K that a block
    has at a time (None: all): it steps through K in such parts (of a kernel that takes all chunks at once). around: whether its
    blocks take the chunks of each sequence from the middle outwards, all sequences in turn: so they come from two scans, one of
    which goes backwards. aside: whether it runs in a stream of its own beside the kernel after it, where neither reads nor
    writes what the other writes."""
    v_tile: int | None = None
    num_warps: int = 4
    num_stages: int = 2
    follows: bool = False
    roles: Roles | None = None
    backend: str = ""
    sparing: bool = False
    k_tile: int | None = None
    around: bool = False
    aside: bool = False

    def __str__(self) -> str:
        tile = f", V in tiles of {self.v_tile}" if self.v_tile else ""
        tile += f", by {self.backend}" if self.backend else ""
        tile += f", K in turn in tiles of {self.k_tile}" if self.k_tile else ""
        tile += ", beside the kernel after it" if self.aside else ""
        if self.roles:
            return f"roles {', '.join(r.name for r in self.roles.roles)}{tile}"
        tile += ", chunks from the middle" if self.around else ""
        more = tile + (", follows the scan before it" if self.follows else "") + (", sparing" if self.sparing else "")
        return f"{self.num_warps} warp{'s' * (self.num_warps > 1)}, {self.num_stages} stage{'s' * (self.num_stages > 1)}{more}"

    def __post_init__(self) -> None:
        for name, value, ok in (("v_tile", self.v_tile, self.v_tile is None or _power_of_two(self.v_tile)),
                                ("k_tile", self.k_tile, self.k_tile is None or _power_of_two(self.k_tile)),
                                ("num_warps", self.num_warps, self.num_warps in (1, 2, 4, 8, 16)),
                                ("num_stages", self.num_stages, self.num_stages in range(1, 9))):
            if not ok:
                raise ValueError(f"KernelOptions.{name}: got {value!r}; accepts a power of two "
                                 "(v_tile and k_tile also None; num_warps to 16; num_stages is any number from 1 to 8)")
        for name, given, kind, accepts in (("follows", self.follows, bool, "true or false"),
                                           ("sparing", self.sparing, bool, "true or false"),
                                           ("around", self.around, bool, "true or false"),
                                           ("aside", self.aside, bool, "true or false"),
                                           ("backend", self.backend, str, "a backend's name, or nothing")):
            if not isinstance(given, kind):
                raise ValueError(f"KernelOptions.{name}: got {given!r}; accepts {accepts}")

    def data(self) -> dict[str, object]:
        """As JSON has it: without what is not asked for."""
        plain: dict[str, object] = {"v_tile": self.v_tile, "num_warps": self.num_warps, "num_stages": self.num_stages}
        plain |= {"follows": True} if self.follows else {}
        plain |= {"backend": self.backend} if self.backend else {}
        plain |= {"sparing": True} if self.sparing else {}
        plain |= {"k_tile": self.k_tile} if self.k_tile else {}
        plain |= {"around": True} if self.around else {}
        plain |= {"aside": True} if self.aside else {}
        return plain | ({"roles": self.roles.data()} if self.roles else {})


def _power_of_two(n: object) -> bool:
    return isinstance(n, int) and n > 0 and n & (n - 1) == 0


@dataclass(frozen=True)
class Schedule:
    """chunk: tokens a chunk (C). steps: the plan, applied in order; each is a step's name and its arguments (see
    `gdn_ir.schedules.steps.STEPS`). kernels: options by kernel name; "*" serves those not named; a v_tile wider than V is V.
    dot: dtype that the operands of products are rounded to ("io": as the inputs are stored)."""
    name: str
    chunk: int = 64
    steps: tuple[tuple[str | int, ...], ...] = ()
    kernels: tuple[tuple[str, KernelOptions], ...] = (("*", KernelOptions()),)
    dot: str = "io"

    def __post_init__(self) -> None:
        if not (self.chunk == 1 or (_power_of_two(self.chunk) and 16 <= self.chunk <= 256)):
            raise ValueError(f"Schedule.chunk: got {self.chunk!r}; accepts 1 or a power of two from 16 to 256")
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
        return json.dumps({**asdict(self), "kernels": {name: o.data() for name, o in self.kernels}}, indent=1)

    @staticmethod
    def from_json(text: str) -> Schedule:
        """The schedule that `to_json` wrote, or a part of it: a name, and fields that differ from the defaults. Raises
        ValueError naming the field that is missing, unknown or out of range."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as e:
            raise ValueError(f"Schedule: not JSON: {e}") from None
        check_fields(Schedule, data, "Schedule")
        if not isinstance(data.get("name"), str):
            raise ValueError(f"Schedule.name: got {data.get('name')!r}; accepts a string")
        steps, kernels = data.get("steps", []), data.get("kernels", {"*": {}})
        if not isinstance(steps, list) or not all(isinstance(s, list) and s and isinstance(s[0], str) for s in steps):
            raise ValueError(f"Schedule.steps: got {steps!r}; accepts a list of steps, each a list of its name and arguments")
        if not isinstance(kernels, dict):
            raise ValueError(f"Schedule.kernels: got {kernels!r}; accepts an object of options by kernel name")
        for kernel, o in kernels.items():
            check_fields(KernelOptions, o, f"Schedule.kernels[{kernel!r}]")
        options = tuple((kernel, KernelOptions(**{**o, "roles": Roles.of(o["roles"])} if o.get("roles") else o))
                        for kernel, o in kernels.items())
        return Schedule(**{**data, "steps": tuple(tuple(s) for s in steps), "kernels": options})


def check_fields(kind: type[Schedule] | type[KernelOptions], data: object, name: str) -> None:
    """Refuse what is not an object with fields of the dataclass."""
    names = [f.name for f in fields(kind)]
    known = ", ".join(names)
    if not isinstance(data, dict):
        raise ValueError(f"{name}: got {data!r}; accepts an object with {known}")
    unknown = set(data) - set(names)
    if unknown:
        raise ValueError(f"{name}: unknown field {', '.join(sorted(unknown))}; accepts {known}")
