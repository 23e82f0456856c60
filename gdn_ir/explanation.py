"""What `gdn_ir.explain` found out, for a person and as data."""
from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Choice:
    """One backend's part in it. state: "chosen", "not chosen" (it could), "cannot" or "forbidden"; why: of that. schedule, its
    reason and kernels (name, hash of the source) where there is a variant; a third party's has no kernels to name."""
    backend: str
    state: str
    why: str
    schedule: str | None = None
    reason: str = ""
    kernels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, repr=False)
class Explanation:
    """call: what was asked about; choices: every backend, the preferred one first. printed it is a page to read."""
    call: str
    arch: str
    choices: tuple[Choice, ...]

    @property
    def chosen(self) -> str | None:
        """The backend that serves; None where none can."""
        return next((c.backend for c in self.choices if c.state == "chosen"), None)

    def data(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return {"call": self.call, "arch": self.arch, "chosen": self.chosen,
                "choices": [asdict(c) | {"kernels": dict(c.kernels)} for c in self.choices]}

    def __str__(self) -> str:
        lines = [f"{self.call}, on {self.arch}"]
        for c in self.choices:
            lines.append(f"  {c.backend:<8} {c.state}: {c.why}")
            if c.schedule is not None:
                lines.append(f"           schedule {c.schedule}: {c.reason}")
            if c.kernels:
                lines.append(f"           kernels: {', '.join(' '.join(k) for k in c.kernels)}")
        return "\n".join(lines)

    __repr__ = __str__
