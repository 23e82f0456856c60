"""Measurements on disk: one JSON object a line, appended and never changed. Several processes may append at once; a process
that is killed leaves at most a torn last line, which is skipped and reported.

Every line says what it measured (`subject`) and a `kind`:

    start     what served shapes before a run, tuned for the nearest other one
    compile   seconds, or why a kernel does not compile
    check     errors of all outputs against the oracle, or why there are none
    time      milliseconds, the samples of one round of one candidate
    winner    what a tuning run chose for a shape; lookup.py reads these only
"""
from __future__ import annotations

import datetime
import json
import os
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from gdn_ir.autotune.keys import Device, Shape, of_instance, of_schedule, program_hash, to_instance, to_schedule
from gdn_ir.compiler import Instance
from gdn_ir.schedules.schedule import Schedule

Json = dict[str, Any]
KINDS = ("start", "compile", "check", "time", "winner")


def default_path() -> Path:
    """GDN_IR_RECORDS, or where the system keeps a user's data: unlike the cache, records cannot be made again for free."""
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return Path(os.environ.get("GDN_IR_RECORDS") or data / "gdn_ir" / "records.jsonl")


@dataclass(frozen=True)
class Subject:
    """All that decides whether two measurements may be compared, but the candidate and its shape. space: the hash of the
    search space; versions: of the toolchain, by name."""
    instance: Instance
    backend: str
    device: Device
    versions: tuple[tuple[str, str], ...]
    space: str = ""

    def json(self) -> Json:
        return {"program": program_hash(self.instance), "instance": of_instance(self.instance), "backend": self.backend,
                "device": asdict(self.device), "versions": dict(self.versions), "space": self.space}

    @staticmethod
    def of(data: Json) -> Subject:
        return Subject(to_instance(data["instance"]), data["backend"], Device(**data["device"]),
                       tuple(data["versions"].items()), data["space"])


@dataclass(frozen=True)
class Winner:
    """What was chosen for a shape. sources: hashes of what ran, by kernel; ms: median, in the last measurement; heuristic_ms:
    of the schedule that nobody tuned, in the same; served_ms: in the same, of the one that had been tuned for the nearest shape
    and served this one until then; errors: relative, of each output; how: "measured" or what else."""
    subject: Subject
    shape: Shape
    schedule: Schedule
    sources: tuple[tuple[str, str], ...]
    ms: float | None
    heuristic_ms: float | None
    errors: tuple[tuple[str, float], ...]
    date: str
    how: str = "measured"
    program: str = ""
    predicted_ms: float | None = None                      # by the cost model, where nobody has measured
    served_ms: float | None = None

    def json(self) -> Json:
        s = self.shape
        return {"shape": {"lengths": list(s.lengths), "H": s.H, "HV": s.HV}, "schedule": of_schedule(self.schedule),
                "sources": dict(self.sources), "ms": self.ms,
                "heuristic_ms": self.heuristic_ms, "errors": dict(self.errors), "date": self.date, "how": self.how,
                **{n: x for n in ("predicted_ms", "served_ms") if (x := getattr(self, n)) is not None}}

    @staticmethod
    def of(subject: Json, data: Json) -> Winner:
        s = data["shape"]
        return Winner(Subject.of(subject), Shape(tuple(s["lengths"]), s["H"], s["HV"]), to_schedule(data["schedule"]),
                      tuple(data["sources"].items()), data["ms"], data["heuristic_ms"], tuple(data["errors"].items()),
                      data["date"], data["how"], subject["program"], data.get("predicted_ms"), data.get("served_ms"))


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M")


@dataclass(frozen=True)
class Records:
    """A file of records."""
    path: Path

    def append(self, kind: str, subject: Json, **data: Any) -> None:
        """Add a record; it is on its way to the disk when this returns, whatever becomes of the process."""
        assert kind in KINDS, kind
        line = json.dumps({"kind": kind, "subject": subject, **data})
        text = f'{{"sum": {zlib.crc32(line.encode())}, "record": {line}}}\n'.encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")), open(self.path, "ab+") as f:
            if f.tell() and os.pread(f.fileno(), 1, f.tell() - 1) != b"\n":
                text = b"\n" + text                        # after a torn line, which would swallow this one
            f.write(text)

    def read(self) -> list[Json]:
        """All records, oldest first. Lines that are not what was written are skipped, with one warning that numbers them."""
        good, bad = [], []
        for number, record in self._lines():
            if record is None:
                bad.append(number)
            else:
                good.append(record)
        if bad:
            lines = ", ".join(map(str, bad[:5])) + (" and more" if len(bad) > 5 else "")
            warnings.warn(f"gdn_ir: {self.path}: line {lines} is torn or damaged, and skipped; the other {len(good)} records "
                          "are whole", RuntimeWarning, stacklevel=2)
        return good

    def _lines(self) -> Iterator[tuple[int, Json | None]]:
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return
        for number, line in enumerate(data.split(b"\n"), 1):
            if line.strip():
                yield number, whole(line)


def whole(line: bytes) -> Json | None:
    """The record on a line; None where the line is not what was written."""
    try:
        found = json.loads(line)
        record = found["record"]
        text = json.dumps(record)
        return record if zlib.crc32(text.encode()) == found["sum"] and record["kind"] in KINDS else None
    except (ValueError, KeyError, TypeError):
        return None


def winners(records: list[Json]) -> list[Winner]:
    """What was chosen, the newest last. A winner that this version cannot read (a schedule field that is gone) is left out."""
    found = []
    for r in records:
        if r["kind"] == "winner":
            try:
                found.append(Winner.of(r["subject"], r))
            except (KeyError, TypeError, ValueError):
                continue
    return found
