"""How near `schedules.defaults.way_of_roles` comes to the best way of each shape that was tuned, and how near other constants
would: fitted to the representative shapes alone, and seen on the others.

    python -m gdn_ir.bench.experiments.fit_ways bench/results/h100/tuned.json
"""
from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

from gdn_ir.bench.cases import parse
from gdn_ir.calls import REPRESENTATIVE
from gdn_ir.schedules import defaults
from gdn_ir.schedules.defaults import Takes
from gdn_ir.schedules.role_solve import WALK, walk

Ways = dict[str, dict[str, float]]                         # by shape, milliseconds of each way, as tuned.json names them


def way(shape: str, takes: Takes) -> str:
    """What these constants choose for a shape, by tuned.json's name."""
    ((lengths, _, HV),) = parse(shape, "forward")
    segment, fused = defaults.way_of_roles(len(lengths), HV, sum(lengths), takes)
    short = walk(sum(lengths) * HV // defaults.CHUNK) != WALK
    return f"{'F' if fused else 's' if short else 'S'}{segment}"


def off(ways: Ways, takes: Takes) -> float:
    """What is chosen over what is best, in the geometric mean; a way that was not timed takes as long as the worst."""
    ratios = [ms.get(way(shape, takes), max(ms.values())) / min(ms.values()) for shape, ms in ways.items()]
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def grid() -> list[Takes]:
    values = {"half": (2.1, 2.2, 2.3), "full": (2.2, 2.3, 2.4, 2.6), "fused": (2.9, 3.0, 3.1),
              "fused_of_several": (3.1, 3.2, 3.3, 3.4)}
    return [defaults.TAKES._replace(**dict(zip(values, chosen, strict=True))) for chosen in itertools.product(*values.values())]


def main() -> None:
    ways: Ways = {r["shape"]: r["ms"] for r in json.loads(Path(sys.argv[1]).read_text())["ways"]}
    first = {s: ms for s, ms in ways.items() if s in REPRESENTATIVE.split(",")}
    rest = {s: ms for s, ms in ways.items() if s not in first}
    ranked = sorted(grid(), key=lambda t: off(first, t))
    for name, takes in (("as they are", defaults.TAKES), *((f"fit {i + 1}", t) for i, t in enumerate(ranked[:5]))):
        print(f"{name}: {off(first, takes):.4f} on {len(first)} representative shapes, {off(rest, takes):.4f} on {len(rest)} "
              f"others: {takes}")


if __name__ == "__main__":
    main()
