"""A Triton kernel's source with what each line moved beside it, in the look of `vgpu.annotate`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmcourse.errors import UnknownNameError
from llmcourse.vgpu import annotate as cuda

if TYPE_CHECKING:
    from llmcourse.kernels.counters import Counts

_KINDS = ("load", "store", "atomic")

COLUMNS = {
    "loaded": cuda.Column("loaded bytes", lambda c: c.get("load_bytes", 0) if c.get("load_ops", 0) else None),
    "stored": cuda.Column(
        "stored bytes", lambda c: c.get("store_bytes", 0) if c.get("store_ops", 0) else None
    ),
    "atomic": cuda.Column(
        "atomic bytes", lambda c: c.get("atomic_bytes", 0) if c.get("atomic_ops", 0) else None
    ),
    "bytes": cuda.Column("bytes", lambda c: sum(c.get(f"{k}_bytes", 0) for k in _KINDS) or None),
    "sectors": cuda.Column("sectors", lambda c: sum(c.get(f"{k}_sectors", 0) for k in _KINDS) or None),
    "operations": cuda.Column("operations", lambda c: sum(c.get(f"{k}_ops", 0) for k in _KINDS) or None),
    "dot_flops": cuda.Column("dot FLOPs", lambda c: c.get("dot_flops", 0) if c.get("dot_ops", 0) else None),
}
"""Columns by name."""

DEFAULT = ("loaded", "stored", "atomic", "sectors", "dot_flops")


class Annotated(cuda.Annotated):
    """The kernel, and functions of its file that it calls, with counters beside their lines.

    columns   see `COLUMNS`; None for those of `DEFAULT` that hold something
    heat      the column that shades, bytes unless it says otherwise

    Raises   UnknownNameError for a column that does not exist.
    """

    def __init__(self, counts: Counts, *, columns: Sequence[str] | None = None, heat: str = "bytes") -> None:
        for name in (*(columns or ()), heat):
            if name not in COLUMNS:
                raise UnknownNameError(
                    f"there is no column called {name!r}.",
                    f"The columns are {', '.join(COLUMNS)}.",
                    'columns=("loaded", "stored").',
                )
        self.stretches = [(first, _tidy(lines)) for first, lines in counts.sources]
        last = max((first + len(lines) for first, lines in self.stretches), default=1)
        self.lines = [""] * last
        for first, lines in self.stretches:
            self.lines[first - 1 : first - 1 + len(lines)] = lines
        self.counts = {n: dict(c) for n, c in counts.lines.items() if any(c.values())}
        self.title, self.whole = counts.headline(), True
        self.columns = {name: COLUMNS[name] for name in (DEFAULT if columns is None else columns)}
        if columns is None:
            used = {n: c for n, c in self.columns.items() if any(c.text(k) for k in self.counts.values())}
            self.columns = used or {"bytes": COLUMNS["bytes"]}
        self.heat, self._heat = heat, COLUMNS[heat]

    def _shown(self) -> list[int | None]:
        out: list[int | None] = []
        for first, lines in self.stretches:
            if out:
                out.append(None)
            out.extend(range(first, first + len(lines)))
        return out


def _tidy(lines: Sequence[str]) -> list[str]:
    """Source lines without the indentation that all of them have."""
    return textwrap.dedent("".join(lines)).expandtabs(4).rstrip().splitlines()
