"""The annotated source: every count beside its line, in text and in HTML, readable in both themes."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from llmcourse.errors import UnknownNameError
from llmcourse.vgpu.annotate import COLUMNS, Annotated
from llmcourse.vgpu.counters import Counters

SOURCE = """\
__global__ void k(float* x, int n) {
  int i = threadIdx.x;
  if (i < n && i > 0)
\tx[i] = x[i] + 1;

  // nothing here
  //
  x[0] = 2;
}
"""


def counted(lines: dict[int, dict[str, int]]) -> Counters:
    counters = Counters()
    for number, counts in lines.items():
        counters.at(number).update(counts)
    return counters


LINES = {
    2: {"instructions": 64, "thread_instructions": 2048},
    4: {
        "instructions": 160,
        "thread_instructions": 2560,
        "global_load_requests": 32,
        "global_load_sectors": 128,
        "global_load_bytes": 2048,
        "global_store_requests": 32,
        "global_store_sectors": 1024,
        "branches": 32,
        "divergent_branches": 5,
    },
    8: {"instructions": 1, "thread_instructions": 1},
}


class Rows(HTMLParser):
    """The cells' text, row by row, and every attribute that was used."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_counts_stand_beside_their_line_in_both_forms() -> None:
    shown = Annotated(SOURCE, counted(LINES), title="k[1, 32]")
    html = Rows(shown._repr_html_()).rows
    assert html[0] == ["line", "instructions ▾", "active of 32", "sectors", "sectors/request", "source"]
    assert html[4] == ["4", "160", "16.0", "1,152", "18.00", "    x[i] = x[i] + 1;"]
    assert html[3] == ["3", "", "", "", "", "  if (i < n && i > 0)"]
    line = next(text for text in repr(shown).splitlines() if "x[i] + 1" in text)
    assert re.split(r"\s{2,}", line.strip()) == [
        "4",
        "160",
        "16.0",
        "1,152",
        "18.00",
        "██████████ │",
        "x[i] = x[i] + 1;",
    ]


def test_every_line_of_the_source_is_there_and_none_is_moved() -> None:
    shown = Annotated(SOURCE, counted(LINES))
    text = [t.split("│ ", 1)[1] if "│ " in t else "" for t in repr(shown).splitlines()[1:]]
    assert text == [line.rstrip() for line in SOURCE.expandtabs(4).splitlines()]


def test_the_columns_of_text_are_aligned() -> None:
    lines = repr(Annotated(SOURCE, counted(LINES), columns=list(COLUMNS))).splitlines()
    assert len({line.index("│") for line in lines[1:]}) == 1
    assert lines[0].index("instructions") + len("instructions ▾") == lines[4].index("160") + 3


def test_columns_that_say_nothing_are_left_out_unless_asked_for() -> None:
    assert "bank conflicts" not in repr(Annotated(SOURCE, counted(LINES)))
    assert "bank conflicts" in repr(Annotated(SOURCE, counted(LINES), columns=["bank_conflicts"]))
    used = LINES | {8: {"shared_load_requests": 4}}
    assert "bank conflicts" in repr(Annotated(SOURCE, counted(used)))  # zero conflicts are worth knowing


def test_any_counter_is_a_column_and_no_other_word_is() -> None:
    assert "2,048" in repr(Annotated(SOURCE, counted(LINES), columns=["global_load_bytes"]))
    with pytest.raises(UnknownNameError, match="sectors_per_request"):
        Annotated(SOURCE, counted(LINES), columns=["speed"])
    with pytest.raises(UnknownNameError):
        Annotated(SOURCE, counted(LINES), heat="speed")


def test_the_hottest_line_follows_the_column_that_is_chosen() -> None:
    lines = {2: {"instructions": 9}, 4: {"instructions": 2, "branches": 1, "divergent_branches": 1}}
    assert Annotated(SOURCE, counted(lines)).hottest() == 2
    assert Annotated(SOURCE, counted(lines), heat="divergent_branches").hottest() == 4
    assert Annotated(SOURCE, counted({})).hottest() is None


def test_stretches_without_counts_can_be_left_out() -> None:
    short = repr(Annotated(SOURCE, counted({2: {"instructions": 1}, 8: {"instructions": 1}}), whole=False))
    numbers = [line.split()[0] for line in short.splitlines()[1:]]
    assert numbers == ["1", "2", "3", "…", "7", "8", "9"]


def test_a_long_source_is_shortened_by_itself() -> None:
    long = SOURCE + "// more\n" * 60
    assert "more" not in repr(Annotated(long, counted(LINES)))
    assert repr(Annotated(long, counted(LINES), whole=True)).count("more") == 60


def test_counts_of_no_line_are_shown_apart() -> None:
    shown = Annotated(
        SOURCE, counted({2: {"instructions": 3}, 0: {"instructions": 4}, 99: {"instructions": 5}})
    )
    assert re.search(r"\b9\b.*not in this source", repr(shown))
    assert Rows(shown._repr_html_()).rows[-1][1] == "9"


def test_the_source_cannot_inject_html() -> None:
    evil = '__global__ void k() { } // </td><script>alert("x")</script> &amp;'
    html = Annotated(evil, counted({1: {"instructions": 1}}), title="<b>k</b>")._repr_html_()
    assert "<script" not in html
    assert "<b>" not in html
    assert Rows(html).rows[1][-1] == evil


def test_html_loads_nothing_and_names_no_colour_of_text() -> None:
    rows = Rows(Annotated(SOURCE, counted(LINES))._repr_html_())
    assert not [n for n, _ in rows.attributes if n in ("src", "href") or n.startswith("on")]
    styles = ";".join(v or "" for n, v in rows.attributes if n == "style")
    assert "url(" not in styles
    assert set(re.findall(r"(?<!-)\bcolor:([^;]*)", styles)) == {"inherit"}


def contrast(text: tuple[float, ...], background: tuple[float, ...]) -> float:
    """WCAG 2.2 contrast ratio of two sRGB colours."""

    def luminance(colour: tuple[float, ...]) -> float:
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)
        ]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(text), luminance(background)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(
    ("text", "page"),
    [((33, 33, 33), (255, 255, 255)), ((222, 222, 222), (17, 17, 17)), ((212, 212, 212), (30, 30, 30))],
)
def test_text_on_the_hottest_line_stays_readable_in_both_themes(text, page) -> None:
    html = Annotated(SOURCE, counted(LINES))._repr_html_()
    shades = [tuple(map(float, s)) for s in re.findall(r"rgba\((\d+),(\d+),(\d+),([\d.]+)\)", html)]
    assert len(shades) == 3
    for r, g, b, opacity in shades:
        mixed = tuple(opacity * c + (1 - opacity) * p for c, p in zip((r, g, b), page, strict=True))
        assert contrast(text, mixed) >= 4.5


def test_the_same_counts_give_the_same_page() -> None:
    first, second = (Annotated(SOURCE, counted(LINES)) for _ in range(2))
    assert first._repr_html_() == second._repr_html_()
    assert repr(first) == repr(second)
