"""CUDA C++ source with what each line cost beside it: a heat map that can be read line by line.

       instructions ▾  active of 32  sectors/request
    2              64          32.0                   ████       │ int i = blockIdx.x * 256 + threadIdx.x;
    3             160          31.4             4.00  ██████████ │ if (i < n) y[i] = a * x[i] + y[i];

In Jupyter the same as a table, the lines shaded by one column. Numbers and the length of a bar say all that
the shade says, and the shade is a thin layer over the theme's own background, so that the text keeps its
contrast in light and dark themes. Nothing is loaded from elsewhere; nothing here depends on the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from llmcourse.errors import UnknownNameError
from llmcourse.vgpu.counters import NAMES, Counters
from llmcourse.vgpu.isa import WARP_SIZE

Counts = Mapping[str, int]
HEAT = (230, 90, 0)
MOST = 0.40
"""Opacity of the hottest line: text of either theme keeps a contrast of at least 4.5 to 1 above it."""
BAR = 10
"""Characters of the longest bar."""
LONG = 40
"""Lines of a source that is shown whole."""


@dataclass(frozen=True)
class Column:
    """A number for each line: its heading, its value (None where it does not apply) and its format."""

    heading: str
    value: Callable[[Counts], float | None]
    format: str = ",.0f"

    def text(self, counts: Counts) -> str:
        value = self.value(counts)
        return "" if value is None else format(value, self.format)


def _sum(*names: str) -> Callable[[Counts], float | None]:
    """The sum of counters; None where none of them occurred."""
    return lambda counts: sum(counts.get(n, 0) for n in names) or None


def _ratio(above: Sequence[str], below: Sequence[str]) -> Callable[[Counts], float | None]:
    def value(counts: Counts) -> float | None:
        divisor = sum(counts.get(n, 0) for n in below)
        return sum(counts.get(n, 0) for n in above) / divisor if divisor else None

    return value


_GLOBAL = tuple(f"global_{kind}" for kind in ("load", "store", "atomic"))
_SHARED = tuple(f"shared_{kind}" for kind in ("load", "store", "atomic"))


def _conflicts(counts: Counts) -> float | None:
    """Bank conflicts of a line that uses shared memory: 0 is worth showing there."""
    if not any(counts.get(f"{s}_requests") for s in _SHARED):
        return None
    return float(sum(counts.get(f"{s}_bank_conflicts", 0) for s in _SHARED))


def _divergent(counts: Counts) -> float | None:
    return float(counts.get("divergent_branches", 0)) if counts.get("branches") else None


COLUMNS: dict[str, Column] = {
    "instructions": Column("instructions", _sum("instructions")),
    "active_threads": Column(
        f"active of {WARP_SIZE}", _ratio(["thread_instructions"], ["instructions"]), ",.1f"
    ),
    "sectors": Column("sectors", _sum(*(f"{g}_sectors" for g in _GLOBAL))),
    "sectors_per_request": Column(
        "sectors/request",
        _ratio([f"{g}_sectors" for g in _GLOBAL], [f"{g}_requests" for g in _GLOBAL]),
        ",.2f",
    ),
    "bytes": Column("global bytes", _sum(*(f"{g}_bytes" for g in _GLOBAL))),
    "bank_conflicts": Column("bank conflicts", _conflicts),
    "wavefronts": Column("shared wavefronts", _sum(*(f"{s}_wavefronts" for s in _SHARED))),
    "divergent_branches": Column("divergent", _divergent),
    "barriers": Column("barriers", _sum("barriers")),
    "flops": Column("FLOPs", _sum(*(n for n in NAMES if n.startswith("flops")))),
}
"""Columns by name; any counter's own name is a column too."""

DEFAULT = ("instructions", "active_threads", "sectors", "sectors_per_request", "bank_conflicts")


class Annotated:
    """Source lines with counters beside them. Displays as HTML in Jupyter and as aligned text elsewhere.

    source    CUDA C++ as it was compiled; counters come by its line numbers
    columns   see `COLUMNS`; None for those of `DEFAULT` that hold something
    heat      the column that shades; None for the first
    whole     False leaves out stretches of lines without counters; None does so in a source of over 40 lines

    Raises   UnknownNameError for a column that does not exist.
    """

    def __init__(
        self,
        source: str,
        counters: Counters,
        *,
        columns: Sequence[str] | None = None,
        heat: str | None = None,
        whole: bool | None = None,
        title: str = "",
    ) -> None:
        self.lines = source.expandtabs(4).splitlines()
        self.counts: dict[int, Counts] = {n: dict(c) for n, c in counters.lines.items() if any(c.values())}
        self.title, self.whole = title, len(self.lines) <= LONG if whole is None else whole
        chosen = DEFAULT if columns is None else columns
        self.columns = {name: column(name) for name in chosen}
        if columns is None:
            useful = {n: c for n, c in self.columns.items() if any(c.text(k) for k in self.counts.values())}
            self.columns = useful or {"instructions": COLUMNS["instructions"]}
        self.heat = heat or next(iter(self.columns), "instructions")
        self._heat = column(self.heat)

    def hottest(self) -> int | None:
        """The number of the line with the most in the heat column; None if nothing was counted."""
        shares = self.shares()
        return max(shares, key=lambda n: (shares[n], -n)) if shares else None

    def shares(self) -> dict[int, float]:
        """Each line's value in the heat column, over the largest of all lines."""
        values = {n: v for n, c in self.counts.items() if (v := self._heat.value(c))}
        most = max(values.values(), default=0.0)
        return {n: v / most for n, v in values.items()} if most else {}

    def _shown(self) -> list[int | None]:
        """Line numbers to show, None for a gap."""
        everything = range(1, len(self.lines) + 1)
        if self.whole:
            return list(everything)
        near = [n for n in everything if any(n + d in self.counts for d in (-1, 0, 1))]
        out: list[int | None] = []
        for n in near:
            if out and out[-1] is not None and n > out[-1] + 1:
                out.append(None)
            out.append(n)
        return out

    def _elsewhere(self) -> Counts:
        """Counts of lines that the source does not have: code of headers that the compiler gave no caller."""
        total: dict[str, int] = {}
        for n, counts in self.counts.items():
            if not 1 <= n <= len(self.lines):
                for name, count in counts.items():
                    total[name] = total.get(name, 0) + count
        return total

    def __repr__(self) -> str:
        shares = self.shares()
        rows: list[tuple[str, list[str], str, str]] = []
        for n in self._shown():
            counts = self.counts.get(n, {}) if n is not None else {}
            cells = [c.text(counts) for c in self.columns.values()]
            bar = "█" * max(1, round(BAR * shares[n])) if n in shares and n is not None else ""
            rows.append(("…" if n is None else str(n), cells, self.lines[n - 1] if n else "", bar))
        if other := self._elsewhere():
            rows.append(("", [c.text(other) for c in self.columns.values()], "(not in this source)", ""))
        headings = [f"{c.heading} ▾" if n == self.heat else c.heading for n, c in self.columns.items()]
        widths = [
            max(len(heading), *(len(r[1][i]) for r in rows), 0) if rows else len(heading)
            for i, heading in enumerate(headings)
        ]
        gutter = max((len(r[0]) for r in rows), default=1)
        out = [self.title] if self.title else []
        head = "  ".join(h.rjust(w) for h, w in zip(headings, widths, strict=True))
        out.append(f"{' ' * gutter}  {head}".rstrip())
        for number, cells, text, bar in rows:
            body = "  ".join(c.rjust(w) for c, w in zip(cells, widths, strict=True))
            out.append(f"{number:>{gutter}}  {body}  {bar:{BAR}} │ {text}".rstrip())
        return "\n".join(out)

    def _repr_html_(self) -> str:
        shares = self.shares()
        number = "text-align:right;padding:0 .6em;white-space:nowrap;font-variant-numeric:tabular-nums"
        code = "text-align:left;padding:0 .6em;white-space:pre-wrap;font-family:monospace"
        heads = "".join(
            f'<th scope="col" style="{number}">{escape(c.heading)}{" ▾" if n == self.heat else ""}</th>'
            for n, c in self.columns.items()
        )
        body = []
        for n in self._shown():
            counts = self.counts.get(n, {}) if n is not None else {}
            share = shares.get(n, 0.0) if n is not None else 0.0
            cells = "".join(f'<td style="{number}">{c.text(counts)}</td>' for c in self.columns.values())
            text = escape(self.lines[n - 1]) if n is not None else "⋯"
            body.append(
                f'<tr{_shade(share)}><th scope="row" style="{number};font-weight:normal;opacity:.75">'
                f'{n or ""}</th>{cells}<td style="{code}">{text}</td></tr>'
            )
        if other := self._elsewhere():
            cells = "".join(f'<td style="{number}">{c.text(other)}</td>' for c in self.columns.values())
            body.append(f'<tr><th></th>{cells}<td style="{code}">(not in this source)</td></tr>')
        caption = (
            f'<caption style="text-align:left">{escape(self.title)}; shaded by {escape(self._heat.heading)}'
            "</caption>"
        )
        return (
            '<table style="border-collapse:collapse;font-size:90%;margin:0;color:inherit">'
            f'{caption}<thead><tr><th scope="col" style="{number}">line</th>{heads}'
            f'<th scope="col" style="{code}">source</th></tr></thead><tbody>{"".join(body)}</tbody></table>'
        )


def _shade(share: float) -> str:
    """A row's attribute: the theme's background, tinted by the line's share of the heat."""
    if share <= 0:
        return ' style="background:transparent"'  # Jupyter stripes tables: a stripe would look like heat
    opacity = 0.04 + (MOST - 0.04) * share
    return f' style="background:rgba({HEAT[0]},{HEAT[1]},{HEAT[2]},{opacity:.2f})"'


def column(name: str) -> Column:
    """A column by name: one of `COLUMNS`, or a counter. Raises UnknownNameError."""
    if name in COLUMNS:
        return COLUMNS[name]
    if name in NAMES:
        return Column(name.replace("_", " "), _sum(name))
    raise UnknownNameError(
        f"there is no column called {name!r}.",
        f"The columns are {', '.join(COLUMNS)}; each counter's name is one as well.",
        'columns=("instructions", "sectors_per_request").',
    )
