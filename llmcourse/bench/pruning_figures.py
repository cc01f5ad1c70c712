"""What notebook 17 shows of the records `prune` and `sparse24`; where there is none yet, it says so."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from llmcourse.bench.records import Record, recorded
from llmcourse.errors import UnknownNameError
from llmcourse.notebook import Table

COLORS = {"magnitude": "#999999", "wanda": "#0072B2", "wanda+move": "#56B4E9", "sparsegpt": "#009E73"}


def found(name: str, device: str = "H100") -> Record | None:
    """The record, or None where this benchmark has not been recorded on such a device."""
    try:
        return recorded(name, device=device)
    except UnknownNameError:
        return None


def missing(name: str) -> str:
    return f"not recorded yet: `llmcourse bench {name} --device cuda` makes this figure"


def perplexities(record: Record, kind: str) -> dict[str, dict[str, float]]:
    """{pattern: {method: perplexity}} of the rows of one kind ("unstructured" or "pattern")."""
    table: dict[str, dict[str, float]] = {}
    for row in record.results:
        if row.get("kind") == kind:
            table.setdefault(row["pattern"], {})[row["method"]] = row["perplexity"]
    return table


def perplexity_figure(figure: Figure) -> str:
    """Draw perplexity against sparsity into `figure`; the caption, or that there is no record."""
    record = found("prune")
    if record is None:
        figure.text(0.5, 0.5, "not recorded yet", ha="center", color="#999999")
        return missing("prune")
    ax = figure.subplots()
    dense = record.row(kind="dense")["perplexity"]
    for method, color in COLORS.items():
        points = [
            (r["sparsity"], r["perplexity"])
            for r in record.results
            if r.get("kind") == "unstructured" and r["method"] == method
        ]
        if points:
            ax.plot(*zip(*sorted(points), strict=True), "o-", color=color, label=method)
    for row in record.results:
        if row.get("kind") == "pattern" and row["pattern"] == "2:4":
            ax.plot(row["sparsity"], row["perplexity"], "*", color=COLORS[row["method"]], markersize=11)
    ax.axhline(dense, color="black", linestyle="--", linewidth=1)
    ax.text(0.1, dense, "dense ", va="bottom", fontsize=9)
    ax.set_yscale("log")
    ax.set_xlabel("share of the blocks' weights that are zero (stars: 2:4)")
    ax.set_ylabel("perplexity")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return record.caption


def at_best(
    copy: float, flops: float, m: int, n: int = 14336, k: int = 4096, *, share: float = 1, speedup: float = 1
) -> float:
    """Seconds of a 16-bit product of x [m, k] with W [n, k], by bytes or by FLOPs, whichever takes longer.

    copy, flops   bytes and FLOPs a second of the device
    share         of the dense weight's bytes that are read
    speedup       of the multiplication over the dense one
    """
    moved = 2 * (n * k * share + m * (n + k))
    return max(moved / copy, 2 * m * n * k / (flops * speedup))


def structured_table() -> Table | str:
    """Smaller dense models: their perplexity, with and without a fit."""
    record = found("prune")
    if record is None:
        return missing("prune")
    dense = record.row(kind="dense")
    rows: list[tuple[Any, ...]] = [("all", "0%", f"{dense['perplexity']:.1f}", "–", "1.00")]
    plain = {r["name"]: r for r in record.results if r.get("kind") == "structured" and not r["fit"]}
    for r in record.results:
        if r.get("kind") == "structured" and r["fit"]:
            faster = f"{dense['read_seconds'] / r['read_seconds']:.2f}"
            fitted, as_is = f"{r['perplexity']:.1f}", f"{plain[r['name']]['perplexity']:.1f}"
            rows.append((r["name"], f"{r['sparsity']:.0%}", as_is, fitted, faster))
    columns = ["what stays", "of the weights gone", "perplexity", "fitted", "times as fast to read a text"]
    return Table(columns, rows, record.caption)


def times_table(n: int = 14336, k: int = 4096) -> Table | str:
    """µs of a product with W [n, k] for each peer, and the dense time over the best sparse one's."""
    record = found("sparse24")
    if record is None:
        return missing("sparse24")
    cases: dict[int, dict[str, float]] = {}
    for row in record.results:
        if row.get("n") == n and row.get("k") == k and "us" in row and row.get("kind") != "sweep":
            cases.setdefault(row["m"], {})[row["who"]] = row["us"]
    peers = [p for p in ("cublas", "cusparselt", "cutlass", "ours") if any(p in c for c in cases.values())]
    rows = []
    for m, times in sorted(cases.items()):
        gain = {p: times["cublas"] / t for p, t in times.items() if p != "cublas" and "cublas" in times}
        best = max(gain, key=lambda p: gain[p], default="")
        shown = f"{gain[best]:.2f}, {best}" if best else "–"
        rows.append((m, *(f"{times[p]:,.1f}" if p in times else "–" for p in peers), shown))
    return Table(
        [f"rows of x, W {n} × {k}", *(f"{p}, µs" for p in peers), "best over dense"], rows, record.caption
    )
