"""The feedback page: a student finds marks, reasons and their own work on it, and it can run nothing."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import small_lab
from bs4 import BeautifulSoup
from cpu_time import least
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from llmcourse.grading.database import Mark, Score
from llmcourse.grading.feedback import page
from llmcourse.grading.intake import Intake
from llmcourse.grading.record import judged_notebook

LAB = SimpleNamespace(name=small_lab.NAME, title="A small lab", exercises=small_lab.EXERCISES)
EVIL = "</pre></div><script>boom()</script><img src=x onerror=boom()>"
PNG = "iVBORw0KGgo="


def a_notebook(text: str = "fine", code: str = "def double(x):\n    return x + x") -> dict[str, Any]:
    """A recorded notebook as JSON, `text` wherever a student or a run can put some."""
    shown = [
        {"output_type": "stream", "name": "stdout", "text": [text, "\n"]},
        {"output_type": "display_data", "data": {"text/plain": text}, "metadata": {}},
        {"output_type": "display_data", "data": {"image/png": PNG}, "metadata": {}},
        {"output_type": "error", "ename": text, "evalue": text, "traceback": [text, text]},
    ]
    nb = new_notebook(
        cells=[
            new_code_cell("the_labs_own = 1", id="demo"),
            small_lab.mark(new_code_cell(code, outputs=shown), "double", solution=True),
            new_code_cell(f"'''{text}'''\nmine = 2", id="own-1"),
            small_lab.mark(
                new_code_cell("hidden_test(double)"), "check-double", grade=True, locked=True, points=3
            ),
            small_lab.mark(new_markdown_cell(f"# Why\n\n{text}"), "why", grade=True, solution=True, points=5),
        ]
    )
    marks = {"check-double": {"ok": False, "state": "failed", "text": f"✗ double · {text}"}}
    judged = SimpleNamespace(outputs={}, marks=marks, remarks=[text])
    return json.loads(json.dumps(judged_notebook(Intake(nb, [text]), judged)))


def a_score(**changes: Any) -> Score:
    marks = {
        "double": Mark("double", 3, auto=0),
        "why": Mark("why", 5, by_hand=True, needs_review=True),
    }
    for name, values in changes.items():
        for key, value in values.items():
            setattr(marks[name], key, value)
    return Score("ada", marks)


def words(html: str) -> str:
    return " ".join(BeautifulSoup(html, "html.parser").main.get_text(" ").split())


def test_the_page_shows_marks_verdict_code_outputs_and_remarks() -> None:
    html = page(LAB, a_score(), a_notebook("told"))
    text = words(html)
    assert "0 of 8 points" in text
    for part in (
        "A small lab",
        "ada",
        "Write double",
        "0 / 3",
        "not yet right",
        "✗ double · told",
        "to be marked",
    ):
        assert part in text
    code = BeautifulSoup(html, "html.parser").find_all(class_="code")
    assert [c.get_text().strip() for c in code] == [
        "def double(x):\n    return x + x",
        "'''told'''\nmine = 2",
    ]
    assert f'src="data:image/png;base64,{PNG}"' in html
    assert text.count("told") >= 7


def test_the_page_shows_what_a_person_gave() -> None:
    given = a_score(
        why={"manual": 4.0, "needs_review": False, "comment": "Say\nwhy."},
        double={"manual": 2.0, "extra": 0.5},
    )
    text = words(page(LAB, given, a_notebook()))
    assert "6.5 of 8 points" in text
    assert "Your instructor: Say why." in text
    assert "Points given by your instructor; the checks gave 0." in text
    assert "0.5 extra points" in text
    assert "not final" not in text


def test_hidden_tests_and_the_labs_own_cells_are_not_on_it() -> None:
    html = page(LAB, a_score(), a_notebook())
    assert "hidden_test" not in html
    assert "the_labs_own" not in html


@pytest.mark.parametrize(
    "attack", [EVIL, "<script>boom()</script>", "[x](javascript:boom())", "![x](http://a.b/c.png)"]
)
def test_nothing_of_a_submission_becomes_html(attack) -> None:
    html = page(LAB, a_score(double={"comment": attack}), a_notebook(attack, code=f"'''{attack}'''"))
    soup = BeautifulSoup(html, "html.parser")
    assert not soup.find_all(["script", "iframe", "object", "embed", "form", "svg", "link", "base"])
    assert not [name for tag in soup.find_all(True) for name in tag.attrs if name.startswith("on")]
    assert all(img["src"].startswith("data:image/png;base64,") for img in soup.find_all("img"))
    assert all(a["href"].startswith("#") for a in soup.find_all("a"))
    assert soup.main.get_text().count("boom()") >= 7 or "boom" not in attack


def test_the_policy_allows_pictures_and_styles_and_nothing_else() -> None:
    soup = BeautifulSoup(page(LAB, a_score(), a_notebook()), "html.parser")
    policy = soup.head.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    before = [tag.name for tag in soup.head.find_all(True)]
    assert before.index("meta") < before.index("style")
    assert "charset" in soup.head.find("meta").attrs


def test_a_student_without_a_notebook_has_a_page_too() -> None:
    assert "0 of 8 points" in words(page(LAB, a_score(), {}))


def test_the_same_results_make_the_same_page() -> None:
    assert page(LAB, a_score(), a_notebook()) == page(LAB, a_score(), a_notebook())


def test_a_very_long_answer_is_shown_as_typed() -> None:
    """A parser of Markdown may take very long for what was written to make it."""
    html = page(LAB, a_score(), a_notebook("![" * 50_000 + EVIL))
    assert "![![![" in html
    assert "<script" not in html


@pytest.mark.parametrize("line", ["  \n", " \n", "\t\n", "\n"])
def test_thousands_of_blank_lines_do_not_hold_up_a_class(line) -> None:
    code = (line * 20_000)[:19_000] + "x = 1"

    def shown() -> None:
        assert "x = 1" in words(page(LAB, a_score(), a_notebook(code=code)))

    assert least(shown, within=2.5) < 2.5
