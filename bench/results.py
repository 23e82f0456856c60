"""Results as JSON: one page for each GPU, suite and dtype, written after every row; which rows a resumed run may skip."""
from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gdn_ir.bench.cases import Row

Record = dict[str, Any]


@dataclass
class Page:
    """runs: {commit, date, versions, rates}, one for each time that something was measured; rows, accuracy and cold: records,
    each with the index of its run as "run"."""
    suite: str
    gpu: str
    dtype: str
    runs: list[Record] = field(default_factory=list)
    accuracy: list[Record] = field(default_factory=list)
    rows: list[Record] = field(default_factory=list)
    cold: list[Record] = field(default_factory=list)

    def records(self) -> Iterator[Record]:
        yield from (*self.accuracy, *self.rows, *self.cold)

    def commit_of(self, record: Record) -> str:
        commit: str = self.runs[record["run"]]["commit"]
        return commit

    @property
    def inputs(self) -> str:
        """The kind that its rows were timed with (`bench/inputs.py`)."""
        return str(self.runs[-1]["inputs"]) if self.runs else "real"

    @property
    def commits(self) -> list[str]:
        """Of what the page holds, oldest first."""
        return list(dict.fromkeys(self.commit_of(r) for r in sorted(self.records(), key=lambda r: r["run"])))

    @property
    def mixed(self) -> str:
        """A warning where the page was not measured at one commit; else nothing."""
        commits = self.commits
        return "" if len(commits) < 2 else f"This page mixes commits: {', '.join(commits)}. Only rows of one commit compare."

    def has(self, part: str, key: Record, commit: str) -> bool:
        """Whether a record with these values was measured at this commit."""
        return any(self.commit_of(r) == commit and _matches(r, key) for r in getattr(self, part))

    def put(self, part: str, key: Record, record: Record) -> None:
        """Adds a record, in the place of an older one with the same key."""
        records: list[Record] = getattr(self, part)
        records[:] = [r for r in records if not _matches(r, key)] + [key | record]

    def write(self, path: Path) -> None:
        """All at once: who reads the file meanwhile, or finds it after a power cut, finds a whole page."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(vars(self) | {"mixed": self.mixed}, indent=1) + "\n")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _matches(record: Record, key: Record) -> bool:
    return all(record.get(k) == v for k, v in key.items())


def key_of(row: Row, dtype: str) -> Record:
    return {"lengths": list(row.lengths), "heads": [row.H, row.HV], "K": row.K, "V": row.V, "dtype": dtype}


def row_of(record: Record) -> Row:
    H, HV = record["heads"]
    return Row(tuple(record["lengths"]), H, HV, record["K"], record["V"])


def read(path: Path) -> Page:
    """A page; raises ValueError naming the file where it is none."""
    try:
        data = json.loads(path.read_text())
        return Page(**{n: data[n] for n in Page.__dataclass_fields__})
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: not a page of results ({type(e).__name__}: {e})") from None


def pages(folder: Path) -> list[Page]:
    """Every page under a folder, by GPU and suite; other JSON files are left alone."""
    found = []
    for path in sorted(folder.glob("*/*.json")):
        if '"runs"' in path.read_text():
            found.append(read(path))
    return found


def path_of(folder: Path, gpu: str, suite: str, dtype: str, inputs: str = "real") -> Path:
    name = "-".join([suite, *([] if dtype == "bf16" else [dtype]), *([] if inputs == "real" else [inputs])])
    return folder / slug(gpu) / f"{name}.json"


def slug(gpu: str) -> str:
    """"h100" for "NVIDIA H100 80GB HBM3": a folder's name."""
    short = re.search(r"\b(GB?[0-9]{3}|[AHBLV][0-9]{1,3}S?)\b", gpu)
    return (short.group(1) if short else re.sub(r"[^A-Za-z0-9]+", "-", gpu.removeprefix("NVIDIA ")).strip("-")).lower()


def commit_here() -> str:
    """Of the checkout that this package runs from, "+" behind it where files were changed; the version of an installed one."""
    import importlib.metadata
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists():
        try:
            def git(*words: str) -> str:
                done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
                return done.stdout.strip()
            changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results", ":!docs")
            return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
        except (OSError, subprocess.CalledProcessError):
            pass
    return f"v{importlib.metadata.version('gdn-ir')}"


# ---- what a row says ------------------------------------------------------------------------------------------------------


def timed(record: Record, kind: str) -> dict[str, Record]:
    """The contenders of a kind ("gdn-ir", "peer", "attention") that were timed on a row, by name."""
    return {n: c for n, c in record["contenders"].items() if c["kind"] == kind and "ms" in c}


def best(record: Record, kind: str) -> str | None:
    """The fastest of a kind; None where none was timed."""
    found = timed(record, kind)
    return min(found, key=lambda n: float(found[n]["ms"])) if found else None


def served(record: Record) -> str | None:
    """Ours as a user gets it: what the registry chooses, where it was timed; else the fastest of ours."""
    name = record.get("served")
    return name if name in timed(record, "gdn-ir") else best(record, "gdn-ir")


def ratio(record: Record) -> float | None:
    """Time of the best peer over ours: above 1 we are faster. None where one is missing."""
    mine, peer = served(record), best(record, "peer")
    if mine is None or peer is None:
        return None
    return float(record["contenders"][peer]["ms"] / record["contenders"][mine]["ms"])
