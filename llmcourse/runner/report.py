"""The record of a run: `report.json` for programs, `report.html` for people.

`report.json`, schema 1 (times in seconds, memory in MB):

    schema        1
    date          when the run ended, ISO 8601 with time zone
    ok            whether every notebook ran to its end
    seconds       wall-clock time of the run
    scale, device, jobs, cell_timeout, cluster      as asked for
    machine       {platform, cores, memory_mb}      of the machine that started the run
    versions      {package: version}
    notebooks     a list, in the order asked for:
        name, seconds, attempts, node (where it ran, on a cluster)
        status        "ok", "failed" or "stopped"
        executed      the executed copy, relative to the report, or null
        total_cells   code cells, with the injected parameters
        peak_mb       the most memory that the kernel and its children held, or null
        cells         [{cell, line, seconds, ok}]: those that ran, in order
        error         null, or {kind, message, cell, line, source, traceback} (see `CellError`)

Cells are numbered from 1 as they lie in the source notebook, Markdown cells included.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil

from llmcourse import __version__
from llmcourse.files import write_whole
from llmcourse.runner.outcome import CellRun, Outcome

PACKAGES = ("papermill", "nbclient", "ipykernel", "torch", "triton", "numpy", "matplotlib")


def write_report(out: Path, outcomes: Sequence[Outcome], *, seconds: float, asked: Mapping[str, Any]) -> None:
    """Write `report.json` and `report.html` to the folder `out`, each whole or not at all."""
    report = describe(out, outcomes, seconds=seconds, asked=asked)
    write_whole(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_whole(out / "report.html", page(report))


def remove_report(out: Path) -> None:
    """Take away the report of an earlier run, which would speak for this one if this one were killed."""
    for name in ("report.json", "report.html"):
        (out / name).unlink(missing_ok=True)


def describe(
    out: Path, outcomes: Sequence[Outcome], *, seconds: float, asked: Mapping[str, Any]
) -> dict[str, Any]:
    """The report as plain values."""
    return {
        "schema": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "ok": all(o.ok for o in outcomes),
        "seconds": round(seconds, 2),
        **asked,
        "machine": {
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "memory_mb": round(psutil.virtual_memory().total / 1e6),
        },
        "versions": versions(),
        "notebooks": [_notebook(out, o) for o in outcomes],
    }


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a notebook prints."""
    found = {"llmcourse": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _notebook(out: Path, outcome: Outcome) -> dict[str, Any]:
    plain = outcome.as_dict()
    path = outcome.executed_path
    stopped = outcome.error is not None and outcome.error.kind == "stopped"
    plain["status"] = "ok" if plain.pop("ok") else "stopped" if stopped else "failed"
    plain["seconds"] = round(outcome.seconds, 2)
    plain["executed"] = None if path is None else os.path.relpath(path, out.resolve())
    del plain["executed_path"]
    return plain


# ── the page ─────────────────────────────────────────────────────────────────────────────────────

STYLE = """
:root { color-scheme: light dark; --line: #8884; --ok: #2a7f4f; --bad: #c0392b; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
th.n, td.n { text-align: right; white-space: nowrap }
code, pre { font: 13px/1.45 ui-monospace, monospace }
td code { overflow-wrap: anywhere }
pre { background: var(--soft); padding: .7rem; overflow-x: auto; border-radius: 6px; max-height: 28rem }
.ok { color: var(--ok) } .failed, .stopped { color: var(--bad) }
.bar { width: 14rem } .bar div { background: var(--ok); height: .8rem; border-radius: 2px; min-width: 1px }
.bar .bad { background: var(--bad) }
.error { border-left: 4px solid var(--bad); padding-left: .9rem; margin: .8rem 0 }
.note { opacity: .75; font-size: .9rem }
"""


def page(report: Mapping[str, Any]) -> str:
    """The report as one HTML page that needs no other file."""
    notebooks = report["notebooks"]
    failed = sum(nb["status"] != "ok" for nb in notebooks)
    head = (
        f"{failed} of {len(notebooks)} notebooks failed" if failed else f"{len(notebooks)} notebooks, all ok"
    )
    date = report["date"].replace("T", " ").replace("+00:00", " UTC")
    asked = f"scale {report['scale']}, device {report['device']}, {report['seconds']:.1f} s, {date}"
    used = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    machine = report["machine"]
    where = f"{machine['platform']}, {machine['cores']} cores, {machine['memory_mb'] / 1000:.1f} GB"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(head)}</title><style>{STYLE}</style></head><body>
<h1 class="{"failed" if failed else "ok"}">{escape(head)}</h1>
<p>{escape(asked)}</p>
{_overview(notebooks)}
{"".join(_section(nb) for nb in notebooks)}
<p class="note">{escape(where)}<br>{escape(used)}</p>
</body></html>
"""


def _overview(notebooks: Sequence[Mapping[str, Any]]) -> str:
    longest = max((nb["seconds"] for nb in notebooks), default=0.0)
    rows = "".join(
        f'<tr><td><a href="#{escape(nb["name"])}">{escape(nb["name"])}</a></td>'
        f'<td class="{nb["status"]}">{nb["status"]}</td>'
        f'<td class="n">{len(nb["cells"])}/{nb["total_cells"]}</td>'
        f'<td class="n">{_memory(nb["peak_mb"])}</td><td class="n">{nb["seconds"]:.1f}</td>'
        f'<td class="bar">{_bar(nb["seconds"], longest, nb["status"] == "ok")}</td></tr>'
        for nb in notebooks
    )
    heads = '<th>notebook<th>status<th class="n">cells<th class="n">peak MB<th class="n">seconds<th>'
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def _section(nb: Mapping[str, Any]) -> str:
    cells = [CellRun(**cell) for cell in nb["cells"]]
    longest = max((cell.seconds for cell in cells), default=0.0)
    rows = "".join(
        f'<tr><td class="n">{cell.cell}</td><td><code>{escape(cell.line)}</code></td>'
        f'<td class="n">{cell.seconds:.2f}</td>'
        f'<td class="bar">{_bar(cell.seconds, longest, cell.ok)}</td></tr>'
        for cell in cells
    )
    link = f'<a href="{quote(nb["executed"])}">executed copy</a>' if nb["executed"] else "no executed copy"
    place = f", on {escape(nb['node'])}" if nb["node"] else ""
    tried = f", attempt {nb['attempts']}" if nb["attempts"] > 1 else ""
    heads = '<th class="n">cell<th>first line<th class="n">seconds<th>'
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    name, status = escape(nb["name"]), nb["status"]
    shown = "" if status == "ok" else " open"
    return (
        f'<h2 id="{name}">{name} <span class="{status}">{status}</span></h2>'
        f'<p class="note">{link}{place}{tried}</p>{_error(nb["error"])}'
        f"<details{shown}><summary>{len(cells)} cells ran</summary>{table}</details>"
    )


def _error(error: Mapping[str, Any] | None) -> str:
    if error is None:
        return ""
    where = f"Cell {error['cell']}: " if error["cell"] is not None else ""
    source = f"<pre>{escape(error['source'])}</pre>" if error["source"] else ""
    trace = (
        f"<details open><summary>Traceback</summary><pre>{escape(error['traceback'])}</pre></details>"
        if error["traceback"]
        else ""
    )
    return f'<div class="error"><p><b>{escape(where + error["message"])}</b></p>{source}{trace}</div>'


def _bar(value: float, longest: float, ok: bool) -> str:
    share = 100 * value / longest if longest else 0.0
    return f'<div class="{"" if ok else "bad"}" style="width:{share:.1f}%"></div>'


def _memory(mb: float | None) -> str:
    return "–" if mb is None else f"{mb:,.0f}"
