"""The gates, held against a bank of planted defects; then every notebook, held against the gates."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_output
from sample_notebook import PIXEL, code, good_notebook

from llmcourse.course import CHAPTERS
from llmcourse.runner import gates
from llmcourse.runner.canonical import canonicalise, dumps
from llmcourse.runner.page import Page, verdict_cells
from llmcourse.runner.setup_cell import setup_cell


@dataclass(frozen=True)
class Defect:
    """A change that makes a good notebook break one rule; `cell` is where the report must point."""

    gate: Callable[[Page], list[gates.Problem]]
    name: str
    plant: Callable[[NotebookNode], object]
    cell: str = ""

    def __str__(self) -> str:
        return f"{self.gate.__name__}: {self.name}"


def at(nb: NotebookNode, name: str) -> NotebookNode:
    return next(cell for cell in nb.cells if cell.id == name)


def edit(name: str, old: str, new: str) -> Callable[[NotebookNode], object]:
    def plant(nb: NotebookNode) -> None:
        cell = at(nb, name)
        assert old in cell.source
        cell.source = cell.source.replace(old, new, 1)

    return plant


def append(name: str, text: str) -> Callable[[NotebookNode], object]:
    return lambda nb: at(nb, name).update(source=at(nb, name).source + text)


def prints(name: str, text: str, stream: str = "stdout") -> Callable[[NotebookNode], object]:
    return lambda nb: at(nb, name).outputs.append(new_output("stream", name=stream, text=text))


def returns(name: str, **data: str) -> Callable[[NotebookNode], object]:
    bundle = {mime.replace("_", "/"): value for mime, value in data.items()}
    return lambda nb: at(nb, name).outputs.append(new_output("display_data", data=bundle))


def tag(*tags: str) -> Callable[[NotebookNode], object]:
    def plant(nb: NotebookNode) -> None:
        for n in range(1, 11):
            at(nb, f"square-{n}").metadata.tags = list(tags)

    return plant


def fail(name: str) -> Callable[[NotebookNode], object]:
    error = new_output("error", ename="ValueError", evalue="no", traceback=["Traceback", "ValueError: no"])
    return lambda nb: at(nb, name).outputs.append(error)


def drop(name: str) -> Callable[[NotebookNode], object]:
    return lambda nb: nb.cells.remove(at(nb, name))


def swap(a: str, b: str) -> Callable[[NotebookNode], object]:
    def plant(nb: NotebookNode) -> None:
        i, j = nb.cells.index(at(nb, a)), nb.cells.index(at(nb, b))
        nb.cells[i], nb.cells[j] = nb.cells[j], nb.cells[i]

    return plant


def lengthen(count: int) -> Callable[[NotebookNode], object]:
    return lambda nb: nb.cells.extend(new_markdown_cell(f"More of it, {n}.") for n in range(count))


G = gates
DEFECTS = [
    Defect(
        G.every_cell_ran,
        "a cell was not run",
        lambda nb: at(nb, "square-2").update(execution_count=None),
        "square-2",
    ),
    Defect(
        G.every_cell_ran,
        "two cells ran in the other order",
        lambda nb: (
            at(nb, "square-2").update(execution_count=5),
            at(nb, "square-3").update(execution_count=4),
        ),
        "square-2",
    ),
    Defect(G.enough_verdicts, "verdicts are ignored", tag("nbval-ignore-output")),
    Defect(G.enough_verdicts, "verdicts are skipped", tag("nbval-skip")),
    Defect(
        G.enough_verdicts,
        "verdicts are ignored by comments",
        lambda nb: [append(f"square-{n}", "\n# NBVAL_IGNORE_OUTPUT")(nb) for n in range(1, 11)],
    ),
    Defect(
        G.enough_verdicts,
        "verdicts are silent",
        lambda nb: [at(nb, f"square-{n}").update(outputs=[]) for n in range(1, 11)],
    ),
    Defect(
        G.enough_verdicts,
        "verdicts are pictures",
        lambda nb: [at(nb, f"square-{n}").update(outputs=at(nb, "plot").outputs) for n in range(1, 11)],
    ),
    Defect(
        G.enough_verdicts,
        "verdicts are listings",
        lambda nb: [append(f"square-{n}", "\nshow_source(f)")(nb) for n in range(1, 11)],
    ),
    Defect(G.short_code, "16 lines", append("square-4", "\nx = 1" * 15), "square-4"),
    Defect(G.right_length, "too long", lengthen(20)),
    Defect(G.right_length, "too short", lambda nb: [drop(f"square-{n}")(nb) for n in range(1, 10)]),
    Defect(G.headings_in_order, "two titles", edit("about-5", "## ", "# "), "about-5"),
    Defect(G.headings_in_order, "no title", edit("head", "# 42", "42")),
    Defect(G.headings_in_order, "a section before the title", edit("head", "# 42", "## First\n\n# 42")),
    Defect(G.headings_in_order, "a level is left out", edit("about-5", "## ", "#### "), "about-5"),
    Defect(G.headings_in_order, "a heading twice", edit("about-5", "number 5", "number 3"), "about-5"),
    Defect(G.headings_in_order, "an underlined title", append("about-5", "\n\nAnother\n======="), "about-5"),
    Defect(
        G.links_lead_somewhere, "no such heading", append("about-2", " [x](#Square-number-99)"), "about-2"
    ),
    Defect(
        G.links_lead_somewhere,
        "an anchor in small letters",
        append("about-2", " [x](#square-number-3)"),
        "about-2",
    ),
    Defect(G.links_lead_somewhere, "no such file", append("about-2", " [x](43_next.ipynb)"), "about-2"),
    Defect(
        G.links_lead_somewhere,
        "no such heading there",
        append("about-2", " [x](42_sample.ipynb#None)"),
        "about-2",
    ),
    Defect(G.links_lead_somewhere, "no such picture", append("about-2", " ![x](images/none.png)"), "about-2"),
    Defect(
        G.links_lead_somewhere,
        "an HTML link to no file",
        append("about-2", ' <a href="none.md">x</a>'),
        "about-2",
    ),
    Defect(G.links_lead_somewhere, "a path from the root", append("about-2", " [x](/etc)"), "about-2"),
    Defect(G.links_lead_somewhere, "plain http", append("about-2", " [x](http://example.org)"), "about-2"),
    Defect(
        G.links_lead_somewhere, "plain http, bare", append("about-2", " See http://example.org/a."), "about-2"
    ),
    Defect(
        G.links_lead_somewhere, "a host without a dot", append("about-2", " [x](https://example)"), "about-2"
    ),
    Defect(
        G.links_lead_somewhere, "a slash too few", append("about-2", " [x](https:/example.org)"), "about-2"
    ),
    Defect(G.links_lead_somewhere, "another scheme", append("about-2", " [x](ftp://example.org)"), "about-2"),
    Defect(G.links_lead_somewhere, "a month 13", append("about-2", " arXiv:2213.14135"), "about-2"),
    Defect(G.links_lead_somewhere, "three digits", append("about-2", " arXiv:2205.141"), "about-2"),
    Defect(
        G.links_lead_somewhere,
        "an address of no paper",
        append("about-2", " <https://arxiv.org/abs/22>"),
        "about-2",
    ),
    Defect(G.setup_cell_first, "another version", edit("setup", "@v", "@v9"), "setup"),
    Defect(G.setup_cell_first, "no set-up cell", drop("setup"), "parameters"),
    Defect(G.setup_cell_first, "not the first", swap("setup", "parameters"), "parameters"),
    Defect(G.setup_cell_first, "no Colab link", edit("head", "[Open in Colab]", "[Open]"), "head"),
    Defect(G.setup_cell_first, "another notebook's link", edit("head", "42_sample", "41_sample"), "head"),
    Defect(G.parameters_cell, "no such tag", lambda nb: at(nb, "parameters").metadata.tags.clear()),
    Defect(
        G.parameters_cell,
        "two of them",
        lambda nb: at(nb, "value").metadata.update(tags=["parameters"]),
        "value",
    ),
    Defect(G.parameters_cell, "a third name", append("parameters", "\nseed = 0"), "parameters"),
    Defect(G.parameters_cell, "one missing", edit("parameters", 'scale = "ci"', ""), "parameters"),
    Defect(G.parameters_cell, "an unknown scale", edit("parameters", '"ci"', '"small"'), "parameters"),
    Defect(G.parameters_cell, "computed", edit("parameters", '"ci"', 'str("ci")'), "parameters"),
    Defect(G.parameters_cell, "does more", append("parameters", "\nprint(scale)"), "parameters"),
    Defect(
        G.no_absolute_paths, "a home in a source", append("square-1", '\nopen("/home/ada/x")'), "square-1"
    ),
    Defect(G.no_absolute_paths, "a home in prose", append("about-1", " Look in `/root`."), "about-1"),
    Defect(
        G.no_absolute_paths, "a scratch folder in an output", prints("square-1", "at /tmp/x1\n"), "square-1"
    ),
    Defect(G.no_absolute_paths, "a Mac's home", prints("square-1", "'/Users/ada/c'\n"), "square-1"),
    Defect(G.no_absolute_paths, "Windows", append("square-1", '\nopen(r"C:\\Users\\ada")'), "square-1"),
    Defect(G.no_absolute_paths, "Windows, escaped", prints("square-1", "'C:\\\\Users\\\\ada'"), "square-1"),
    Defect(
        G.no_absolute_paths,
        "in a table",
        returns("square-1", text_html="<td>/home/ada/m.gguf</td>"),
        "square-1",
    ),
    Defect(G.no_absolute_paths, "a file address", append("about-1", " file:///data/x"), "about-1"),
    Defect(G.no_errors_in_outputs, "an error", fail("square-6"), "square-6"),
    Defect(G.no_errors_in_outputs, "a warning", prints("square-6", "UserWarning: x", "stderr"), "square-6"),
    Defect(
        G.no_errors_in_outputs,
        "a printed traceback",
        prints("square-6", "Traceback (most recent call last):\n"),
        "square-6",
    ),
    Defect(
        G.plots_are_shown,
        "a semicolon instead",
        edit("plot", "plt.plot([1, 2])\nplt.show()", "plt.plot([1, 2]);"),
        "plot",
    ),
    Defect(G.plots_are_shown, "shown too early", append("plot", "\nx = 1"), "plot"),
    Defect(
        G.plots_are_shown,
        "a figure left open by a helper",
        lambda nb: at(nb, "value").update(outputs=at(nb, "plot").outputs),
        "value",
    ),
    Defect(G.head_is_complete, "another number", edit("head", "# 42", "# 41"), "head"),
    Defect(G.head_is_complete, "another separator", edit("head", "42 ·", "42 -"), "head"),
    *(
        Defect(G.head_is_complete, f"without {item}", edit("head", f"- **{item}**", "- "), "head")
        for item in gates.HEAD_ITEMS
    ),
    Defect(
        G.head_is_complete, "an empty item", edit("head", "Prerequisites** none", "Prerequisites**"), "head"
    ),
    Defect(G.head_is_complete, "moves nothing", edit("head", "latency and memory", "me deeply"), "head"),
    Defect(G.head_is_complete, "minutes in words", edit("head", "CPU** 1", "CPU** few"), "head"),
    Defect(G.head_is_complete, "code first", swap("head", "setup"), "setup"),
    *(
        Defect(G.tail_is_complete, f"without {cell}", drop(cell))
        for cell in ("summary", "questions", "references")
    ),
    Defect(G.tail_is_complete, "another order", swap("summary", "references")),
    Defect(
        G.tail_is_complete,
        "an empty section",
        edit("summary", at(good_notebook(), "summary").source, "## Summary"),
    ),
    Defect(G.tail_is_complete, "answers in sight", edit("questions", "<details>", "<details open>")),
    Defect(G.tail_is_complete, "never closed", edit("questions", "\n\n</details>", "")),
    Defect(G.tail_is_complete, "no blank line", edit("questions", "</summary>\n\n", "</summary>\n")),
    Defect(
        G.tail_is_complete,
        "no folds",
        edit("questions", at(good_notebook(), "questions").source, "## Interview questions\n\nWhy?"),
    ),
    Defect(G.outputs_are_small, "half a megabyte of text", prints("square-7", "x" * 500_000), "square-7"),
    Defect(
        G.outputs_are_small, "a huge picture", returns("plot", image_png=PIXEL * 6000, text_plain="p"), "plot"
    ),
]

SOUND = {
    "a comment in a code block is no heading": append(
        "about-1", "\n\n```python\n# 42 · A notebook\n#### deep\n```"
    ),
    "a link with its words in code": append(
        "about-1", " [`here`](#Square-number-3) and <https://example.org/a%20b>"
    ),
    "a link to a file beside it": append(
        "about-1", " [this](42_sample.ipynb) [that](42_sample.ipynb#Summary)"
    ),
    "old arXiv numbers": append(
        "about-1", " arXiv:cs/0301012, arXiv:1706.03762v7, <https://arxiv.org/pdf/2205.14135.pdf>."
    ),
    "a heading with code in it, linked": append("about-1", "\n\n### The `mul` rule\n\n[x](#The-mul-rule)"),
    "a heading of another alphabet, linked": append("about-1", "\n\n### Größe\n\n[x](#Gr%C3%B6%C3%9Fe)"),
    "a web path like a home": append("about-1", " <https://example.org/home/ada>"),
    "a relative path": append("square-1", '\nname = "data/tmp/x" + "../home/x" + "~/root"'),
    "a ratio": append("about-1", " tokens/home and/or a/b"),
    "a newline after a colon": append("square-1", '\ny = f"{1}:\\n"'),
    "pyplot in a function": append("square-1", "\ndef draw(n):\n    return plt.subplots()[0]"),
    "a cell magic": append("square-1", "\n%timeit -n 1 -r 1 1"),
    "a comment after show": append("plot", "\n# done"),
    "items with colons": edit("head", "**Moves** latency", "**Moves:** latency"),
    "fifteen lines": append("square-2", "\nx = 1" * 14),
    "the lab after the references": append("references", "\n\n## The lab that follows\n\nSoon."),
    "a picture with text beside it": returns("square-1", image_png=PIXEL, text_plain="[explorable: move it]"),
}


def test_a_good_notebook_passes_every_gate(good, page_of):
    assert gates.check(page_of(good)) == []


@pytest.mark.parametrize("name", SOUND)
def test_what_only_looks_like_a_defect_passes(name, good, page_of):
    SOUND[name](good)
    assert [problem.what for problem in gates.check(page_of(good))] == []


@pytest.mark.parametrize("defect", DEFECTS, ids=str)
def test_a_planted_defect_is_found_by_its_gate(defect, good, page_of):
    defect.plant(good)
    page = page_of(good)
    found = defect.gate(page)
    assert found
    assert found[0].cell == defect.cell
    assert (
        found[0]
        .render(page.path)
        .startswith(f"{page.path}{f' · cell {defect.cell}' if defect.cell else ''}: ")
    )
    assert "\n  Try " in found[0].render(page.path)
    assert set(found) <= set(gates.check(page))


def test_a_file_out_of_canonical_form_is_found(good, page_of):
    for text in (
        json.dumps(good, indent=1, sort_keys=True),
        dumps(good).rstrip("\n"),
        dumps(good).replace("\n ", "\n  "),
        dumps(good).replace('"name": "python3"', '"name": "my-venv"'),
        dumps(good) + "\n",
        dumps(good).replace("\n", "\r\n"),
    ):
        assert [p.what for p in gates.canonical_form(page_of(good, text))], text[:80]


@pytest.mark.parametrize("key", gates.RUN_TRACES)
def test_a_trace_of_a_run_is_found(key, good, page_of):
    traced = deepcopy(good)
    at(traced, "square-3").metadata[key] = {"start": "now"}
    assert [p.cell for p in gates.no_run_traces(page_of(traced, dumps(traced)))] == ["square-3"]
    traced = deepcopy(good)
    traced.metadata[key] = {"start": "now"}
    assert [p.cell for p in gates.no_run_traces(page_of(traced, dumps(traced)))] == [""]


def test_every_gate_is_held_against_a_defect():
    own_tests = {gates.canonical_form, gates.no_run_traces}
    assert {defect.gate for defect in DEFECTS} | own_tests == set(gates.GATES)


def test_an_empty_notebook_is_refused_without_a_crash(page_of):
    nb = canonicalise(good_notebook())
    nb.cells = []
    assert len(gates.check(page_of(nb))) > 5


def test_the_path_of_the_machine_that_checks_is_found_whatever_its_form(good, page_of):
    page = page_of(good)
    at(good, "square-1").source += f'\nprint("{page.path.resolve().parents[1]}")'
    assert [p.cell for p in gates.no_absolute_paths(page_of(good))] == ["square-1"]


def test_verdict_cells_are_those_that_state_something_in_text():
    nb = good_notebook()
    expected = [f"square-{n}" for n in range(1, 11)] + ["value"]
    assert [cell.id for cell in verdict_cells(nb)] == expected
    assert [c.id for c in verdict_cells(canonicalise(nb))] == expected
    assert code("quiet", "x = 1") not in verdict_cells(nb)


def test_the_set_up_cell_itself_obeys_the_gates():
    assert len(setup_cell().splitlines()) <= gates.MAX_CODE_LINES


def test_a_chapter_marked_ready_has_its_notebook(folder):
    ready = {chapter.name for chapter in CHAPTERS if chapter.ready}
    assert ready == {path.stem for path in folder.glob("*.ipynb")}


def test_the_notebook_passes_every_gate(notebook):
    problems = gates.check(Page.open(notebook))
    assert not problems, "\n\n" + "\n\n".join(problem.render(notebook) for problem in problems)
