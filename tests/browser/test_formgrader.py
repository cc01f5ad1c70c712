"""nbgrader's Formgrader in a real browser, on a course folder that `llmcourse grade` has filled.

The browser reaches nothing but the server, as in a room without internet. Each text that a submission
can put on a page calls `boom`, a function that notes its calls.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from jupyterlab_page import ROOT, SCREENSHOTS, TOKEN, is_local, jupyterlab
from nbformat.v4 import new_code_cell, new_markdown_cell
from playwright.sync_api import Browser, Page, Route

from llmcourse.grading.database import Score
from llmcourse.grading.gradebook import Course
from llmcourse.grading.intake import take_in

sys.path.append(str(Path(__file__).parents[1] / "labs"))
import small_lab
from small_lab import NAME

LAB = SimpleNamespace(name=NAME, title="A small lab", exercises=small_lab.EXERCISES)

# Its keyboard waits for MathJax, its fields for what the gradebook holds.
IS_READY = """() => typeof formgrader !== "undefined"
    && formgrader.loaded && formgrader.grades.loaded && formgrader.comments.loaded"""

ATTACK = """\
$a<b$ <script>boom(1)</script> <img src=x onerror=boom(2)> <svg/onload=boom(3)>
<details open ontoggle=boom(4)>

<iframe srcdoc="<script>parent.boom(5)</script>"></iframe>

```
</code></pre><img src=x onerror=boom(6)>
```
"""


def test_a_person_marks_an_answer_and_no_submission_runs_there(
    book: Course, lab: str, page: Page, hits: list
) -> None:
    page.goto(f"{lab}/formgrader/manage_assignments?token={TOKEN}")
    row = page.locator("tr", has_text=NAME)
    row.wait_for()
    assert row.locator(".num-submissions").inner_text() == "2"

    page.goto(f"{lab}/formgrader/gradebook/{NAME}/{NAME}")
    page.get_by_text("Submission #1", exact=True).click()
    page.wait_for_function(IS_READY)
    text = page.inner_text("body")
    assert "onerror=boom(2)" in text
    assert "✗ shift" in text
    assert "the hidden test of shift" in text  # an instructor sees it
    page.locator("#why-linear").fill("4")
    page.locator("#why-linear").blur()
    page.locator("#why-linear-comment").fill("Right: it *scales*.")
    page.locator("#why-linear-comment").blur()
    marked = wait_until(page, lambda: next((s for s in book.scores(LAB) if is_marked(s)), None))
    assert (marked.points, marked.marks["why-linear"].manual) == (3 + 4, 4)
    assert not marked.marks["why-linear"].needs_review
    page.screenshot(path=SCREENSHOTS / "formgrader.png", full_page=True)
    assert hits == []

    answer = page.evaluate(
        """async url => {
            const headers = {"X-CSRFToken": getCookie("_xsrf")};
            return (await fetch(url, {method: "POST", headers})).text();
        }""",
        f"{lab}/formgrader/api/submission/{NAME}/{marked.student}/autograde",
    )
    assert json.loads(answer)["success"], answer
    again = {s.student: s for s in book.scores(LAB)}[marked.student]
    assert again.points == marked.points

    book.write_marks(LAB)
    page.goto((book.feedback_folder(LAB) / f"{marked.student}.html").as_uri())
    assert "Your instructor: Right: it *scales*." in page.inner_text("main")
    assert "hidden test" not in page.content()
    page.screenshot(path=SCREENSHOTS / "feedback.png", full_page=True)
    page.wait_for_timeout(300)
    assert hits == []


def test_the_detector_of_the_test_above_works(lab: str, page: Page, hits: list) -> None:
    page.goto(f"{lab}/formgrader/manage_assignments?token={TOKEN}")
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=boom(7)>')")
    wait_until(page, lambda: hits == [7])


def is_marked(score: Score) -> bool:
    mark = score.marks["why-linear"]
    return mark.manual is not None and bool(mark.comment)


def wait_until(page: Page, condition: Callable[[], Any]) -> Any:
    last = time.monotonic() + 20
    while not (value := condition()):
        assert time.monotonic() < last, "it did not happen"
        page.wait_for_timeout(100)  # which also lets `boom` be called
    return value


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    """A course folder with two submissions that attack whoever opens them."""
    root = tmp_path_factory.mktemp("formgrader")
    nb = small_lab.solved(small_lab.built(root), ATTACK)
    small_lab.find(nb, "double").source += f"\nprint('''{ATTACK}''')"
    nb.cells += [new_markdown_cell(ATTACK), new_code_cell("'</pre><script>boom(8)</script>'")]
    shown = [
        {"output_type": "stream", "name": "stdout", "text": ATTACK},
        *(
            {"output_type": "display_data", "data": {kind: ATTACK, "text/plain": ATTACK}, "metadata": {}}
            for kind in ("text/html", "image/svg+xml", "text/markdown", "text/latex")
        ),
        {"output_type": "display_data", "data": {"application/javascript": "boom(9)"}, "metadata": {}},
        {"output_type": "error", "ename": ATTACK, "evalue": ATTACK, "traceback": [ATTACK]},
    ]
    marks = {
        "check-double": {"ok": True, "state": "passed", "text": "✓ double · all hold"},
        "check-shift": {"ok": False, "state": "failed", "text": f"✗ shift · wrong\n  {ATTACK}"},
    }
    course = Course(root / "course")
    course.prepare(LAB, root / "solutions" / NAME)
    for student in ("ada lovelace", "bob"):
        folder = root / "in" / student
        folder.mkdir(parents=True)
        (folder / f"{NAME}.ipynb").write_text(nbformat.writes(nb))
        intake = take_in(folder, course.source(LAB), NAME)
        judged = SimpleNamespace(outputs={"double": shown, "own-2": shown}, marks=marks, remarks=[ATTACK])
        course.record(LAB, student, intake, judged)
    yield course
    course.close()


@pytest.fixture(scope="module")
def lab(book: Course, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a JupyterLab that an instructor started in the course folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(book.folder)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        with jupyterlab(tmp_path_factory.mktemp("home"), book.folder) as address:
            patch.undo()
            yield address


@pytest.fixture
def hits() -> list[int]:
    return []


@pytest.fixture
def page(browser: Browser, hits: list[int]) -> Iterator[Page]:
    def only_local(route: Route) -> None:
        url = route.request.url
        _ = route.continue_() if is_local(url) or url.startswith("file:") else route.abort()

    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    window = browser.new_page(viewport={"width": 1200, "height": 1000})
    window.expose_function("boom", lambda number: hits.append(number))
    window.route("**/*", only_local)
    yield window
    window.close()
