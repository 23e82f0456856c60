"""Plots of pages of results. Each takes the pages of one GPU and gives a figure, or None where they lack what it shows."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from gdn_ir.bench import results
from gdn_ir.bench.cases import trains
from gdn_ir.bench.results import Page, Record

# colours that the colour-blind tell apart (Okabe and Ito), and a marker of each one's own
STYLES = {"gdn-ir triton": ("#D55E00", "o"), "gdn-ir tilelang": ("#CC79A7", "s"), "gdn-ir torch": ("#8C564B", "v"),
          "gdn-ir served": ("#56B4E9", "h"), "FLA": ("#0072B2", "D"), "FlashQLA": ("#009E73", "^"),
          "FlashInfer": ("#E69F00", "P"), "attention cuDNN": ("#333333", "x"), "attention flash": ("#888888", "+")}


def style(name: str) -> tuple[str, str]:
    return STYLES.get(name, ("#000000", "*"))


def label_of(record: Record) -> str:
    return str(results.row_of(record))


def rows_of(pages: Iterable[Page], train: bool | None = None, most: int | None = None) -> list[Record]:
    """Rows of all pages; those of the smaller suites first, one for each shape."""
    found: dict[tuple[str, bool], Record] = {}
    for page in sorted(pages, key=lambda p: len(p.rows)):
        if train is None or trains(page.suite) == train:
            for r in page.rows:
                found.setdefault((label_of(r), r["train"]), r)
    rows = list(found.values())
    return rows if most is None else rows[:most]


def contenders_of(rows: Iterable[Record], has: str = "ms",
                  kinds: tuple[str, ...] = ("gdn-ir", "peer", "attention")) -> list[str]:
    """Names that some row has this value of, in the order of STYLES."""
    found = {n for r in rows for n, c in r["contenders"].items() if c["kind"] in kinds and c.get(has) is not None}
    return sorted(found, key=lambda n: (list(STYLES).index(n) if n in STYLES else len(STYLES), n))


def figure(width: float = 8.0, height: float = 4.5) -> tuple[Figure, Axes]:
    fig = Figure(figsize=(width, height), layout="constrained")
    axes = fig.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    return fig, axes


def legend(axes: Axes, columns: int = 3) -> None:
    """Above the axes, where it hides nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, frameon=False, fontsize=9)


def bars(rows: list[Record], names: list[str], value: Callable[[Record, str], float | None], text: str,
         labels: list[str] | None = None) -> tuple[Figure, Axes]:
    """Grouped horizontal bars, a group for each row from the top, the value at each bar's end. text: how it is written."""
    count = max(1, len(names))
    fig, axes = figure(8.0, 1.2 + len(rows) * (0.24 * count + 0.2))
    axes.grid(False)
    axes.grid(True, axis="x", color="#dddddd", linewidth=0.6)
    size = 0.8 / count
    for i, name in enumerate(names):
        shown = [(j, v) for j, r in enumerate(rows) if (v := value(r, name)) is not None]
        drawn = axes.barh([j + (i - (count - 1) / 2) * size for j, _ in shown], [v for _, v in shown], size * 0.92,
                          color=style(name)[0], label=name)
        axes.bar_label(drawn, fmt=text, fontsize=8, padding=2)
    axes.set_yticks(range(len(rows)), labels or [label_of(r) for r in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.1)
    legend(axes, 4)
    return fig, axes


def ratio(pages: list[Page], train: bool = False) -> Figure | None:
    """Ours over the best peer, for each shape."""
    rows = [r for r in rows_of(pages, train) if results.ratio(r) is not None]
    if not rows:
        return None
    values = [float(results.ratio(r) or 0.0) for r in rows]
    many = len(rows) > 40
    fig, axes = figure(8.0, 1.4 + (0.17 if many else 0.26) * len(rows))
    axes.grid(False)
    axes.grid(True, axis="x", color="#dddddd", linewidth=0.6)
    axes.barh(range(len(rows)), values, 0.7, color=[style("gdn-ir triton")[0] if v >= 1 else "#999999" for v in values])
    edge = max(1.05, *values)
    for i, (v, r) in enumerate(zip(values, rows)):
        peer = str(results.best(r, "peer"))                # beside the bars, clear of the line at 1
        text = f"{v:.2f}   {peer} {r['contenders'][peer]['ms']:.3f} ms"
        axes.text(edge * 1.02, i, text, fontsize=6 if many else 8, va="center")
    axes.axvline(1.0, color="#333333", linewidth=1.0)
    axes.set_yticks(range(len(rows)), [label_of(r) for r in rows], fontsize=6 if many else 9)
    axes.set_ylim(len(rows) - 0.5, -0.6)
    axes.set_xlim(0, edge * 1.4)
    axes.set_xlabel("time of the best peer / time of gdn-ir (above 1: gdn-ir is faster)")
    return fig


def roofline(pages: list[Page], train: bool = False) -> Figure | None:
    """What part of the measured limits each contender reaches."""
    rows = [r for r in rows_of(pages, train) if results.served(r)]
    runs = [run for p in pages for run in p.runs[-1:]]
    if not rows or not runs:
        return None
    bandwidth, peak = (max(float(run[n]) for run in runs) for n in ("bytes_per_s", "flops_per_s"))
    at = [r["floor"]["flops"] / r["floor"]["bytes"] for r in rows]
    ridge = peak / bandwidth
    low, high = min(*at, ridge) / 2, max(*at, ridge) * 2
    fig, axes = figure()
    axes.plot([low, ridge, high], [low * bandwidth / 1e12, peak / 1e12, peak / 1e12], color="#333333", linewidth=1.2,
              label=f"measured limits: {number(bandwidth / 1e12)} TB/s, {number(peak / 1e12)} TFLOP/s")
    for name in contenders_of(rows, kinds=("gdn-ir", "peer")):
        points = [(x, r["floor"]["flops"] / r["contenders"][name]["ms"] / 1e9) for x, r in zip(at, rows)
                  if "ms" in r["contenders"].get(name, {})]
        colour, marker = style(name)
        axes.plot(*zip(*points), linestyle="none", color=colour, marker=marker, markersize=6, alpha=0.85, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain(axes.xaxis)
    plain(axes.yaxis)
    axes.set_xlabel("least arithmetic / least bytes (FLOP per byte)")
    axes.set_ylabel("arithmetic of the chunk form / time (TFLOP/s)")
    legend(axes, 2)
    return fig


def break_even(pages: list[Page], train: bool = False) -> Figure | None:
    """Time by length of one sequence, against softmax attention, at the heads that most lengths were measured with."""
    own = [p for p in pages if p.suite.startswith("break-even")]           # the others lack attention
    rows = [r for r in rows_of(own or pages, train) if len(r["lengths"]) == 1]
    by_heads: dict[tuple[int, ...], list[Record]] = {}
    for r in rows:
        by_heads.setdefault(tuple(r["heads"]), []).append(r)
    most = max(by_heads, key=lambda heads: len(by_heads[heads]), default=())
    rows = sorted(by_heads.get(most, []), key=lambda r: r["lengths"][0])
    if len(rows) < 2 or not contenders_of(rows, kinds=("attention",)):
        return None
    fig, axes = figure()
    for name in contenders_of(rows):
        points = [(r["lengths"][0], r["contenders"][name]["ms"]) for r in rows if "ms" in r["contenders"].get(name, {})]
        colour, marker = style(name)
        axes.plot(*zip(*points), color=colour, marker=marker, markersize=6, linewidth=1.4, label=name,
                  linestyle="--" if name.startswith("attention") else "-")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({r["lengths"][0] for r in rows})
    axes.set_xticks(lengths, [str(n) for n in lengths])
    plain(axes.yaxis)
    axes.set_xlabel(f"tokens of one sequence (H/HV {rows[0]['heads'][0]}/{rows[0]['heads'][1]})")
    axes.set_ylabel("milliseconds, forward" + (" and backward" if train else ""))
    legend(axes, 3)
    return fig


def cold(pages: list[Page], train: bool = False) -> Figure | None:
    """A fresh process up to the end of the first call, with empty caches and with warm ones."""
    measured = [[r for r in p.cold if "cold_s" in r] for p in pages if trains(p.suite) == train]
    records = max(measured, key=len) if measured else []
    if not records:
        return None
    fig, axes = figure(8.0, 1.4 + 0.55 * len(records))
    axes.grid(False)
    axes.grid(True, axis="x", color="#dddddd", linewidth=0.6)
    for offset, key, colour, label in ((-0.2, "cold_process_s", "#0072B2", "empty caches"),
                                       (0.2, "warm_process_s", "#E69F00", "warm caches")):
        drawn = axes.barh([i + offset for i in range(len(records))], [r[key] for r in records], 0.36, color=colour, label=label)
        axes.bar_label(drawn, fmt="%.1f s", fontsize=8, padding=2)
    axes.set_yticks(range(len(records)), [r["contender"] for r in records])
    axes.set_ylim(len(records) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.set_xlabel(f"seconds from the start of Python to the end of the first call ({label_of(records[0])})")
    legend(axes)
    return fig


def memory(pages: list[Page], train: bool = False) -> Figure | None:
    """Peak memory of a call beyond its inputs."""
    rows = rows_of(pages, train, 8)
    names = contenders_of(rows, "peak_bytes")
    if not names:
        return None
    fig, axes = bars(rows, names, lambda r, n: scaled(r, n, "peak_bytes", 2.0 ** -20), "%.0f")
    axes.set_xlabel("MiB at once beyond the inputs (temporaries and outputs)")
    return fig


def energy(pages: list[Page], train: bool = False) -> Figure | None:
    rows = [r for r in rows_of(pages, train) if any("microjoules_per_token" in c for c in r["contenders"].values())][:8]
    names = contenders_of(rows, "microjoules_per_token")
    if not names:
        return None
    fig, axes = bars(rows, names, lambda r, n: scaled(r, n, "microjoules_per_token", 1.0), "%.1f")
    axes.set_xlabel("microjoules per token (NVML's counter of the whole GPU)")
    return fig


def scaled(record: Record, name: str, key: str, factor: float) -> float | None:
    value = record["contenders"].get(name, {}).get(key)
    return None if value is None else float(value) * factor


def number(x: float) -> str:
    return f"{x:.3g}"


def plain(axis: Any) -> None:
    """Ticks of a logarithmic axis as plain numbers."""
    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


PLOTS: dict[str, tuple[str, Callable[[list[Page], bool], Figure | None]]] = {
    "ratio": ("Against the best peer", ratio), "roofline": ("Against the physical limit", roofline),
    "break_even": ("Against softmax attention, by length", break_even), "cold": ("First calls", cold),
    "memory": ("Memory", memory), "energy": ("Energy", energy)}
