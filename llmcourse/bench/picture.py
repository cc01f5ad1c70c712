"""The README's picture: the ladder of notebook 00 as recorded on a GPU.

python -m llmcourse.bench.picture docs/ladder.svg
"""

from __future__ import annotations

import sys
from pathlib import Path

from llmcourse.bench.records import recorded


def draw(path: Path, *, device: str = "H100") -> None:
    """Write the picture as SVG with its numbers as text. Colours are told apart by the colour-blind too."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    record = recorded("engine_start", device=device)
    rows = [r for r in record.results if "tokens_per_s" in r]
    names = [r["name"].removeprefix("peer: ") for r in rows]
    colours = ["#0072B2" if "chapter" in r else "#BBBBBB" for r in rows]
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llmcourse", "font.family": "sans-serif"}):
        figure = Figure(figsize=(8.6, 3.4), layout="constrained")
        axes = figure.subplots()
        bars = axes.barh(names, [r["tokens_per_s"] for r in rows], color=colours)
        labels = [f"{r['tokens_per_s']:,.0f} tokens/s, {r['tpot_ms']:.1f} ms a token" for r in rows]
        axes.bar_label(bars, labels, padding=4, fontsize=9)
        axes.set(xscale="log", xlim=(20, 40_000), xlabel="tokens per second (log)")
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"SmolLM2-135M through the course's engine: {record.caption}", fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
