"""The tables of a report: rows of text, the first of them the head."""
from __future__ import annotations

import statistics

from gdn_ir.autotune.records import Winner
from gdn_ir.bench import results
from gdn_ir.bench.results import Page, Record

Table = list[list[str]]


def summary(page: Page) -> str:
    """How ours stands to the best peer over all rows."""
    found = [r for row in page.rows if (r := results.ratio(row))]
    if not found:
        return f"{len(page.rows)} rows."
    mean, ahead = statistics.geometric_mean(found), sum(r > 1 for r in found)
    return (f"{len(page.rows)} rows. The best peer's time over ours, where one was timed: {mean:.2f} in the geometric mean, "
            f"{min(found):.2f} to {max(found):.2f}; ours is the faster on {ahead}.")


def names_of(records: list[Record], has: str) -> list[str]:
    return list(dict.fromkeys(n for r in records for n, c in r["contenders"].items() if c.get(has)))


def table(page: Page) -> Table:
    """The fastest but attention in bold."""
    names = names_of(page.rows, "ms")
    mixed = len(page.commits) > 1
    rows = [["shape, H/HV", "floor", *names, "of the floor", "best peer / ours", *(["commit"] if mixed else [])]]
    for r in page.rows:
        fastest = min((c["ms"] for c in r["contenders"].values() if "ms" in c and c["kind"] != "attention"), default=None)
        mine, faster = results.served(r), results.ratio(r)
        cells = [cell(r["contenders"].get(n, {}), fastest) for n in names]
        part = f"{100 * r['contenders'][mine]['of_floor']:.0f}%" if mine else "-"
        rows.append([str(results.row_of(r)), f"{r['floor']['ms']:.3f}", *cells, part, f"{faster:.2f}" if faster else "-",
                     *([page.commit_of(r)] if mixed else [])])
    return rows


def cell(c: Record, fastest: float | None) -> str:
    if "ms" not in c:
        return "-"
    how = "" if c["how"] == "cuda graph" else f" ({c['how']})"
    spread = max(c["high"] - c["ms"], c["ms"] - c["low"]) / c["ms"]
    text = f"{c['ms']:.3f}" + (f" ±{100 * spread:.0f}%" if spread > 0.02 else "") + how
    return f"**{text}**" if c["ms"] == fastest else text


def exact(page: Page) -> str:
    found = dict.fromkeys(r["reference"]["exact"] for r in page.rows)
    return "; ".join(found) + " (\"of all\": against our own float32 kernels, all tokens)"


def errors(rows: list[Record]) -> Table:
    names = names_of(rows, "errors")
    kinds = list(dict.fromkeys(k for r in rows for c in r["contenders"].values() for k in c.get("errors", {})))
    found = [["shape, H/HV", *(f"{n}, {k}" for n in names for k in kinds)]]
    for r in rows:
        every = [r["contenders"].get(n, {}).get("errors", {}) for n in names]
        found.append([str(results.row_of(r)), *(f"{e[k]:.1e}" if k in e else "-" for e in every for k in kinds)])
    return found


def largest(rows: list[Record]) -> Table:
    """The largest error of each kind over all rows."""
    kinds = list(dict.fromkeys(k for r in rows for c in r["contenders"].values() for k in c.get("errors", {})))
    found = [["", *kinds]]
    for n in names_of(rows, "errors"):
        every = [r["contenders"].get(n, {}).get("errors", {}) for r in rows]
        found.append([n, *(f"{max(e[k] for e in every if k in e):.1e}" if any(k in e for e in every) else "-" for k in kinds)])
    return found


def accuracy(records: list[Record]) -> Table:
    names = names_of(records, "errors")
    kinds = list(dict.fromkeys(k for r in records for c in r["contenders"].values() for k in c.get("errors", {})))
    return [["inputs", *(f"{n}, {k}" for n in names for k in kinds)],
            *([r["inputs"], *(f"{e[k]:.2e}" if k in e else "-" for n in names
                              for e in [r["contenders"].get(n, {}).get("errors", {})] for k in kinds)] for r in records)]


def costs(rows: list[Record]) -> Table:
    names = names_of(rows, "ms")
    found = [["shape, H/HV", *names]]
    for r in rows:
        cells = []
        for n in names:
            c = r["contenders"].get(n, {})
            launches, peak = c.get("launches"), c.get("peak_bytes")
            cells.append(f"{'?' if launches is None else launches} / {'?' if peak is None else f'{peak / 2 ** 20:.0f}'}"
                         if "ms" in c else "-")
        found.append([str(results.row_of(r)), *cells])
    return found


def gains(found: list[Winner]) -> str:
    """What tuning brought to shapes, in words."""
    gained = [w.heuristic_ms / w.ms for w in found if w.ms and w.heuristic_ms]
    before = [w.served_ms / w.ms for w in found if w.ms and w.served_ms]
    near = "" if not before else (f" {len(before)} of them had been served with what was tuned for the nearest shape: "
                                  f"{statistics.geometric_mean(before):.3f}x their own time in the geometric mean, "
                                  f"{max(before):.3f}x at most.")
    return (f"{len(found)} shapes, each timed in turns with the schedule that nobody tuned: "
            f"{statistics.geometric_mean(gained):.3f}x as fast in the geometric mean, {min(gained):.3f}x to "
            f"{max(gained):.3f}x.{near}")


def winners(found: list[Winner]) -> Table:
    rows = [["shape", "ms", "untuned, ms", "gain", "served before, ms", "schedule"]]
    for w in found:
        gain = f"{w.heuristic_ms / w.ms:.3f}" if w.ms and w.heuristic_ms else "-"
        times = ["-" if ms is None else f"{ms:.4f}" for ms in (w.ms, w.heuristic_ms, w.served_ms)]
        options = "; ".join(f"{k} {w.schedule.options(k)}" for k, _ in w.sources)
        rows.append([str(w.shape), *times[:2], gain, times[2], f"chunks of {w.schedule.chunk}: {options}"])
    return rows
