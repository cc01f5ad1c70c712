"""The pages of the project say what the package says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmcourse.bench import recorded
from llmcourse.course import CHAPTERS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: c.name)
def test_the_readme_lists_every_chapter_with_its_status(chapter):
    row = next(line for line in README.splitlines() if line.startswith(f"| {chapter.number} |"))
    assert chapter.title in row
    assert chapter.moves in row
    assert row.endswith(f"| {'ready' if chapter.ready else 'planned'} |")


def test_a_chapter_is_ready_exactly_when_its_notebook_is_there():
    there = {p.stem for p in (ROOT / "notebooks").glob("*.ipynb")}
    assert there == {c.name for c in CHAPTERS if c.ready}


@pytest.mark.parametrize("page", ["README.md", "REFERENCES.md", "CHANGELOG.md"])
def test_links_to_files_lead_somewhere(page):
    prose = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.S)
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", prose):
        assert (ROOT / target).exists(), target


def test_the_readme_names_every_command_of_the_command_line():
    from llmcourse.cli import build_parser

    commands = next(a.choices for a in build_parser()._actions if a.dest == "command")
    missing = [c for c in commands if f"`llmcourse {c}" not in README and c != "assets"]
    assert missing == []


def test_the_picture_shows_the_numbers_of_the_record():
    svg = (ROOT / "docs/ladder.svg").read_text()
    record = recorded("engine_start", device="H100")
    assert record.caption in svg
    for row in record.results:
        if "tokens_per_s" in row:
            assert f"{row['tokens_per_s']:,.0f} tokens/s, {row['tpot_ms']:.1f} ms a token" in svg
