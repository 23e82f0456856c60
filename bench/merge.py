"""Joins the parts of a result that several processes wrote, and prints what is out of bounds."""
from __future__ import annotations

import json
import sys
from pathlib import Path

from gdn_ir.bench.errors import worst


def main() -> None:
    out, *parts = sys.argv[1:]
    results = [json.loads(Path(p).read_text()) for p in parts]
    rows = sorted((r for x in results for r in x["rows"]), key=lambda r: (r["cell"], r["inputs"]))
    Path(out).write_text(json.dumps(results[0] | {"rows": rows}, indent=0) + "\n")
    bad = [r for r in rows if "failed" in r or not worst(r["errors"].values()) <= (1e-4 if "f32" in r["cell"] else 4.5e-3)]
    print(out, len(rows), "rows,", len(bad), "over the bounds of model-like inputs")
    for r in bad:
        print(" ", r["cell"], r["inputs"], r.get("schedule"), r.get("errors"), r.get("failed", "")[:200])


if __name__ == "__main__":
    main()
