"""The tables that ship: one readable JSON for each GPU, made by `gdn-ir export` of a tuning run's records.

    {"device": {"name": ..., "units": ..., "arch": ...},
     "roles": {"solve 1": ..., "again 1": ...},
     "groups": [{"subject": {...}, "winners": [{"shape": ..., "schedule": ..., "ms": ..., "errors": ..., "how": "measured"}]}]}

A kernel's roles are written once and named after the kernel ("solve 2"); by name alone where they are those of `ROLES`. (Should
these change, the winner compiles to other code than its hashes say, and is not served.)
"""
from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from gdn_ir.autotune.keys import Device
from gdn_ir.autotune.records import Winner
from gdn_ir.schedules.roles import AGAIN, BACK_ALONE, FUSED, SOLVED

Json = dict[str, Any]
FOLDER = Path(__file__).parent
ROLES = {n: r.data() for n, r in (("SOLVED", SOLVED), ("FUSED", FUSED), ("AGAIN", AGAIN), ("BACK_ALONE", BACK_ALONE))}


@lru_cache(maxsize=1)
def shipped() -> tuple[Winner, ...]:
    """Winners of every shipped table."""
    return tuple(w for path in sorted(FOLDER.glob("*.json")) for w in read(path))


def read(path: Path) -> list[Winner]:
    """A table's winners. Raises ValueError naming the file where it is no table."""
    try:
        data = json.loads(path.read_text())
        named = ROLES | data.get("roles", {})

        def meant(_: str, roles: Json | str) -> Json:
            return named[roles] if isinstance(roles, str) else roles
        return [Winner.of(g["subject"] | {"device": data["device"]}, with_roles(w, meant))
                for g in data["groups"] for w in g["winners"]]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: not a table of schedules ({type(e).__name__}: {e})") from None


def with_roles(winner: Json, change: Callable[[str, Any], Any]) -> Json:
    """A winner whose kernels' roles are what `change` makes of them and the kernel's name."""
    def changed(kernel: str, options: Json) -> Json:
        roles = options.get("roles")
        return options | ({"roles": change(kernel, roles)} if roles else {})
    schedule = winner["schedule"]
    return winner | {"schedule": schedule | {"kernels": {k: changed(k, o) for k, o in schedule["kernels"].items()}}}


def name_of(kernel: str, roles: Json, named: dict[str, Json]) -> str:
    """The name of a kernel's roles; a new one among those named where they have none."""
    found = next((name for name, data in (ROLES | named).items() if data == roles), None)
    if found is None:
        found = f"{kernel} {1 + sum(n.rsplit(' ', 1)[0] == kernel for n in named)}"
        named[found] = roles
    return found


def text_of(table: Json) -> str:
    """A table as text for people: what fits on a line is on a line."""
    text, inner = json.dumps(table, indent=1), re.compile(r"[\[{]\n[^\[\]{}]*[\]}]")

    def line(match: re.Match[str]) -> str:
        words = " ".join(match[0].split())
        return words[0] + words[1:-1].strip() + words[-1] if len(words) < 110 else match[0]
    steps = re.compile(r'("steps": )\[([^{}]*?)\n\s*\](,\n)')
    return steps.sub(lambda m: f"{m[1]}[{' '.join(m[2].split())}]{m[3]}", inner.sub(line, text)) + "\n"


def to_json(found: Iterable[Winner]) -> dict[Device, Json]:
    """Tables, one for each device: of each subject and shape's key the newest winner."""
    newest: dict[object, Winner] = {}
    for w in found:
        newest[w.subject.device, w.subject.backend, w.subject.instance, w.shape.key] = w
    tables: dict[Device, Json] = {}
    groups: dict[str, Json] = {}
    for w in newest.values():
        table = tables.setdefault(w.subject.device, {"device": asdict(w.subject.device), "roles": {}, "groups": []})
        subject = w.subject.json() | {"program": w.program or w.subject.json()["program"]}
        group = groups.get(json.dumps(subject, sort_keys=True))
        if group is None:
            group = groups[json.dumps(subject, sort_keys=True)] = {"subject": subject, "winners": []}
            table["groups"].append(group)
        group["winners"].append(w.json())
    for table in tables.values():
        for group in table["groups"]:
            group["subject"] = {n: v for n, v in group["subject"].items() if n != "device"}
            group["winners"].sort(key=lambda w: (w["shape"]["HV"], len(w["shape"]["lengths"]), sum(w["shape"]["lengths"])))
            group["winners"] = [with_roles(w, partial(name_of, named=table["roles"])) for w in group["winners"]]
        if not table["roles"]:
            del table["roles"]
    return tables
