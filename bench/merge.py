"""Joins the parts of a result that several processes wrote, later rows in the place of earlier; prints what is out of bounds.

    python -m gdn_ir.bench.merge OUT PARTS...        # OUT may be among the parts
"""
from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from gdn_ir.bench.errors import bound, worst
from gdn_ir.coverage import DTYPES


def merged(pages: list[dict[str, Any]]) -> dict[str, Any]:
    """The first page with the rows of all; a row of another commit than the first page's says so."""
    rows: dict[tuple[str | int, ...], dict[str, Any]] = {}
    for page in pages:
        seen: Counter[tuple[str, ...]] = Counter()         # a page may hold several rows of one name
        for r in page["rows"]:
            commit, name = r.get("commit", page["commit"]), (r["cell"], r["inputs"], r["backend"], r["arch"])
            seen[name] += 1
            key = (*name, seen[name])
            other = {"commit": commit} if commit != pages[0]["commit"] else {}
            rows[key] = {n: x for n, x in r.items() if n != "commit"} | other
    return pages[0] | {"rows": [rows[key] for key in sorted(rows)]}


def right(row: dict[str, Any]) -> bool:
    """Whether a row is within its bound. Earlier rows say their io in the cell's name alone."""
    if "failed" in row:
        return False
    io = row.get("io") or next(io for io in DTYPES if io in row["cell"])
    return worst(row["errors"].values()) <= bound(io, any(n.startswith("d_") for n in row["errors"]))


def main() -> None:
    out, *parts = sys.argv[1:]
    page = merged([json.loads(Path(p).read_text()) for p in parts])
    Path(out).write_text(json.dumps(page, indent=0) + "\n")
    rows = page["rows"]
    bad = [r for r in rows if not right(r)]
    print(out, len(rows), "rows,", len(bad), "over the bounds of model-like inputs")
    for r in bad:
        print(" ", r["cell"], r["inputs"], r.get("schedule"), r.get("errors"), r.get("failed", "")[:200])


if __name__ == "__main__":
    main()
