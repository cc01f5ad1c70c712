"""Every notebook is run once, at scale ci on the CPU; what it says must be what is stored.

All tests that need that run are in this file, so that pytest-xdist (`--dist loadfile`) runs it in one
worker.
"""

from __future__ import annotations

import re
from copy import deepcopy

import pytest

from llmcourse.runner import canonical, maintain, pool
from llmcourse.runner.compare import Difference, compare
from llmcourse.runner.page import verdict_cells

SECONDS = 60


@pytest.fixture
def run(notebook, executed):
    """The outcome of the notebook's run, and the notebook as stored and as run."""
    outcome = executed[notebook.stem]
    assert outcome.ok, f"{notebook.stem} did not run: {outcome.error}"
    return outcome, canonical.read(notebook), canonical.read(outcome.executed_path)


def test_the_notebook_runs_within_a_minute(run, notebook, tmp_path):
    """On two cores of its own. Another notebook shares them at first: a slow run has a second try, alone."""
    outcome, _, _ = run
    if outcome.seconds >= SECONDS:
        outcome = pool.execute_all([notebook], parameters=maintain.STORED, out=tmp_path)[0]
    slow = sorted(outcome.cells, key=lambda cell: -cell.seconds)[:3]
    assert outcome.seconds < SECONDS, f"slowest: {[(cell.line, round(cell.seconds, 1)) for cell in slow]}"


def test_the_verdicts_are_those_stored(run, notebook):
    _, stored, fresh = run
    differences = compare(stored, fresh)
    assert not differences, f"{notebook.name}:\n" + "\n".join(map(str, differences))


def test_one_changed_digit_in_any_verdict_is_reported_in_its_cell(run):
    _, stored, fresh = run
    already = cells(compare(stored, fresh))
    tampered = 0
    for verdict in verdict_cells(stored):
        for digit in {0, -1}:
            if (copy := with_a_changed_digit(stored, verdict.id, digit)) is not None:
                assert cells(compare(copy, fresh)) - already == {verdict.id} - already
                tampered += 1
    assert tampered


def cells(differences: list[Difference]) -> set[str]:
    return {difference.cell for difference in differences}


def with_a_changed_digit(nb, cell_id: str, which: int):
    """A copy of `nb` with one digit of the text of one cell raised by one; None if it shows no digit."""
    copy = deepcopy(nb)
    cell = next(cell for cell in copy.cells if cell.id == cell_id)
    places = [
        (holder, key, digit) for holder, key in _texts(cell) for digit in re.finditer(r"[0-9]", holder[key])
    ]
    if not places:
        return None
    holder, key, digit = places[which]
    text = holder[key]
    holder[key] = text[: digit.start()] + str((int(digit[0]) + 1) % 10) + text[digit.end() :]
    return copy


def _texts(cell):
    for output in cell.outputs:
        if output.output_type == "stream":
            yield output, "text"
        else:
            yield from ((output.data, mime) for mime in output.get("data", {}) if mime.startswith("text/"))
