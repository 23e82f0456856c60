"""A page to read from pages of results: docs/performance.md, and performance.html with the plots inside."""
from __future__ import annotations

import html
import io
from pathlib import Path

import matplotlib

from gdn_ir.autotune.tables import shipped
from gdn_ir.bench import results, tables
from gdn_ir.bench.cases import trains
from gdn_ir.bench.plots import PLOTS
from gdn_ir.bench.results import Page

MANY = 40                                                  # rows, past which a page gives the largest error of all
MISSING = {"ratio": "no row holds both a peer and gdn-ir", "roofline": "nothing of gdn-ir was timed",
           "break_even": "no two lengths of one sequence were timed beside attention: gdn-ir bench break-even",
           "cold": "first calls were not measured: gdn-ir bench --cold", "memory": "peak memory is read on a GPU only",
           "energy": "the energy counter was not read: gdn-ir bench --energy 1"}
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;font-size:14px;display:block;overflow-x:auto}th,td{padding:.25rem .6rem;
border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}td.best{font-weight:600}
svg{max-width:100%;height:auto}.warning{background:#fff3cd;border:1px solid #e0c060;padding:.5rem 1rem}figure{margin:1rem 0}"""


def write(folder: Path, out: Path) -> list[Path]:
    """performance.md and performance.html in `out`, from every page under `folder`. Raises ValueError where there is none."""
    pages = results.pages(folder)
    if not pages:
        raise ValueError(f"results: got {folder}, which has no page of results; accepts the folder that gdn-ir bench wrote to")
    blocks = document(pages)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "performance.md", out / "performance.html"]
    paths[0].write_text(markdown(blocks))
    paths[1].write_text(hypertext(blocks))
    return paths


Block = tuple[str, object]                                 # "h1", "h2", "h3", "p", "warning": text; "table": rows; "svg": text


def document(pages: list[Page]) -> list[Block]:
    """What both files say, in order."""
    blocks: list[Block] = [
        ("h1", "Performance"),
        ("p", "Written by `gdn-ir report` from `bench/results/`. Milliseconds are medians of interleaved runs of one process "
              "(CUDA-graph replays unless a cell says otherwise), inputs rotated past L2, q and k of unit length, decays as "
              "Gated DeltaNet makes them, with one head in sixteen that hardly decays. A pass's floor is the larger of its "
              "least bytes over a measured bandwidth and the chunk form's arithmetic over a measured matrix product's "
              "rate. Errors are relative (L2). A contender without a number has its reason below the table.")]
    for gpu in dict.fromkeys(p.gpu for p in pages):
        of_gpu = [p for p in pages if p.gpu == gpu]
        blocks.append(("h2", gpu))
        commits = {c for p in of_gpu for c in p.commits}
        if len(commits) > 1:
            blocks.append(("warning", f"What follows mixes commits ({', '.join(sorted(commits))}): numbers of different ones "
                                      "do not compare. Each table says what it holds."))
        for page in of_gpu:
            blocks += section(page)
        blocks += tuned(gpu)
        for name, (title, plot) in PLOTS.items():
            for train in (False, True):
                these = [p for p in of_gpu if trains(p.suite) == train and p.inputs == "real"]
                if not these:
                    continue
                drawn = plot(these, train)
                blocks.append(("h3", title + (", forward and backward" if train else ", forward")))
                if drawn is None:
                    blocks.append(("p", f"Not shown: {MISSING[name]}."))
                else:
                    text = io.StringIO()
                    with matplotlib.rc_context({"svg.hashsalt": "gdn-ir"}):     # the same plot, the same text
                        drawn.savefig(text, format="svg", metadata={"Date": None})
                    blocks.append(("svg", text.getvalue()[text.getvalue().index("<svg"):]))
    return blocks


def section(page: Page) -> list[Block]:
    """One suite: what was measured with what, its rows, errors, first calls, and why something is missing."""
    of = "" if page.inputs == "real" else f", {page.inputs} inputs"
    blocks: list[Block] = [("h3", f"{page.suite}, {page.dtype}{of}")]
    if page.mixed:
        blocks.append(("warning", page.mixed))
    used = sorted({r["run"] for r in page.records()})
    for run in (page.runs[i] for i in used):
        used_with = ", ".join(f"{n} {v}" for n, v in run["versions"].items())
        rates = f"memory {run['bytes_per_s'] / 1e12:.3g} TB/s, product {run['flops_per_s'] / 1e12:.3g} TFLOP/s"
        blocks.append(("p", f"Commit {run['commit']}, {run['date']} UTC; {used_with}; {rates}."))
    if page.rows:
        many = len(page.rows) > MANY
        blocks += [("p", tables.summary(page)), ("table", tables.table(page)),
                   ("p", f"Relative errors{', the largest of all rows,' if many else ''} against {tables.exact(page)}:"),
                   ("table", tables.largest(page.rows) if many else tables.errors(page.rows))]
        costs = "Launches of a call, and MiB at once beyond its inputs:"
        blocks += [("p", f"{costs} in {page.suite}.json.")] if many else [("p", costs), ("table", tables.costs(page.rows))]
    if page.accuracy:
        blocks += [("p", "Errors against the token recurrence in float64, T = 768, H/HV 2/4, K = V = 128:"),
                   ("table", tables.accuracy(page.accuracy))]
    if page.cold:
        head = [["first call, seconds", "empty caches", "warm caches", "whole process, empty", "whole process, warm"]]
        body = [[r["contender"], *(f"{r[k]:.1f}" for k in ("cold_s", "warm_s", "cold_process_s", "warm_process_s"))]
                for r in page.cold if "cold_s" in r]
        blocks.append(("table", head + body))
    return blocks + reasons(page)


def tuned(gpu: str) -> list[Block]:
    """What tuning brought on a GPU, of the table that ships: a section for each instance."""
    found = [w for w in shipped() if w.subject.device.name == gpu and w.ms and w.heuristic_ms]
    blocks: list[Block] = []
    for of in dict.fromkeys((w.subject.backend, w.subject.instance) for w in found):
        mine = [w for w in found if (w.subject.backend, w.subject.instance) == of]
        blocks += [("h3", f"Tuned, {of[0]}: {of[1]}"), ("p", tables.gains(mine)), ("table", tables.winners(mine))]
    return blocks


def reasons(page: Page) -> list[Block]:
    """Each reason once, with where it held."""
    found: dict[tuple[str, str], list[str]] = {}
    for r in page.rows:
        for n, c in r["contenders"].items():
            for key in ("reason", "note", "energy"):
                if key in c:
                    found.setdefault((n, c[key]), []).append(str(results.row_of(r)))
    for r in page.cold:
        if "reason" in r:
            found.setdefault((r["contender"], r["reason"]), []).append("first call")
    def places(where: list[str]) -> str:
        return "all rows" if len(where) == len(page.rows) > 1 else ", ".join(where[:4]) + (" ..." if len(where) > 4 else "")
    return [("p", f"{name}, {places(where)}: {why}") for (name, why), where in found.items()]


def markdown(blocks: list[Block]) -> str:
    """Without the plots, which are in the HTML page."""
    lines: list[str] = []
    marks = {"h1": "# ", "h2": "## ", "h3": "### ", "p": "", "warning": "> **"}
    for kind, what in blocks:
        if kind == "table" and isinstance(what, list):
            head, *body = what
            lines += ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)]
        elif kind == "svg":
            lines.append("In [performance.html](performance.html).")
        else:
            lines.append(f"{marks[kind]}{what}" + ("**" if kind == "warning" else ""))
        lines.append("")
    return "\n".join(lines)


def hypertext(blocks: list[Block]) -> str:
    """One file that needs no other."""
    parts = [f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
             f"<title>gdn-ir: performance</title><style>{STYLE}</style>"]
    for kind, what in blocks:
        if kind == "table" and isinstance(what, list):
            head, *body = what
            parts.append("<table><tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in head) + "</tr>")
            for row in body:
                cells = (f'<td class="best">{html.escape(c[2:-2])}</td>' if c.startswith("**") else f"<td>{html.escape(c)}</td>"
                         for c in row)
                parts.append("<tr>" + "".join(cells) + "</tr>")
            parts.append("</table>")
        elif kind == "svg":
            parts.append(f"<figure>{what}</figure>")
        elif kind == "warning":
            parts.append(f'<p class="warning">{html.escape(str(what))}</p>')
        else:
            parts.append(f"<{kind}>{html.escape(str(what)).replace('`', '')}</{kind}>")
    return "\n".join(parts) + "\n</html>\n"
