"""What students hand in, in every odd form, becomes a clean notebook with a remark, and never an error."""

from __future__ import annotations

import base64
import copy
import json
import os
import resource
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
import small_lab
from cpu_time import least
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_raw_cell
from small_lab import NAME, find, solved

from llmcourse.grading.handed_in import MAX_FILE_MB, find_submissions, safe_id
from llmcourse.grading.inert import checked_png, inert
from llmcourse.grading.intake import Intake, take_in


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> NotebookNode:
    return small_lab.built(tmp_path_factory.mktemp("intake"))


@pytest.fixture
def hand_in(tmp_path: Path, released: NotebookNode) -> Callable[..., Intake]:
    """`hand_in(what)`: take in a notebook, a text or bytes, as the student's file."""

    def give(what: Any, file: str = f"{NAME}.ipynb") -> Intake:
        text = json.dumps(what) if isinstance(what, dict) else what
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        (tmp_path / file).write_bytes(data)
        return taken(tmp_path, released)

    return give


def taken(path: Path, released: NotebookNode) -> Intake:
    """Take in, and hold the result to what is true of every result."""
    intake = take_in(path, released, NAME)
    nb = intake.notebook
    nbformat.validate(nb)
    nbformat.writes(nb).encode()  # every character can be stored
    assert len({cell.id for cell in nb.cells}) == len(nb.cells)
    own = [cell for cell in nb.cells if cell.id.startswith("own-")]
    for cell, theirs in zip((c for c in nb.cells if c not in own), released.cells, strict=True):
        assert cell.metadata == theirs.metadata
        assert cell.cell_type == theirs.cell_type
        meta = theirs.metadata.get("nbgrader", {})
        if meta.get("locked") or (meta.get("grade") and not meta.get("solution")):
            assert cell.source == theirs.source
    assert all("nbgrader" not in cell.metadata for cell in own)
    assert nb.metadata.kernelspec.name == "python3"
    return intake


def says(intake: Intake, *words: str) -> bool:
    return all(word in " | ".join(intake.remarks) for word in words)


def is_untouched(intake: Intake, released: NotebookNode) -> bool:
    return [c.source for c in intake.notebook.cells] == [c.source for c in released.cells]


# ── what is kept ─────────────────────────────────────────────────────────────────────────────────


def test_a_solved_notebook_keeps_its_solutions_and_gets_no_remark(released, hand_in) -> None:
    nb = solved(released)
    nb.cells.insert(5, new_code_cell("helper = 1"))
    nb.cells.append(new_markdown_cell("My **notes**: a<b"))
    intake = hand_in(nb)
    assert intake.remarks == []
    assert intake.found
    kept = intake.notebook.cells
    assert find(intake.notebook, "double").source == "def double(x):\n    return x + x"
    assert kept[5].source == "helper = 1"
    assert kept[-1].source == "My **notes**: a< b"
    assert [c.id for c in kept if c.id.startswith("own")] == ["own-1", "own-2"]


def test_the_untouched_lab_comes_out_as_it_went_in(released, hand_in) -> None:
    intake = hand_in(released)
    assert intake.remarks == []
    assert is_untouched(intake, released)


def test_a_demo_that_was_played_with_keeps_its_tag_and_the_learners_code(released, hand_in) -> None:
    nb = solved(released)
    find(nb, "demo").source = "print(double(5))"
    demo = find(hand_in(nb).notebook, "demo")
    assert (demo.source, demo.metadata.tags) == ("print(double(5))", ["demo"])


def test_the_digest_changes_with_a_solution_and_not_with_an_output(released, hand_in) -> None:
    nb = solved(released)
    first = hand_in(nb).digest
    find(nb, "double").outputs = [nbformat.v4.new_output("stream", text="42")]
    nb.metadata["kernelspec"]["display_name"] = "mine"
    assert hand_in(nb).digest == first
    find(nb, "double").source += "  # more"
    assert hand_in(nb).digest != first


# ── files that are no notebooks ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "the file is empty"),
        (" \n\t", "the file is empty"),
        ('{"cells": [ {"cell_type": "code", ', "not whole JSON (line 1)"),
        ("[]", "not a notebook"),
        ("{}", "not a notebook"),
        ('"text"', "not a notebook"),
        ("null", "not a notebook"),
        ('{"cells": 3}', "not a notebook"),
        ('{"cells": null, "worksheets": 7}', "not a notebook"),
        ("[" * 200_000, "nested too deeply"),
        ('{"cells": [' + "[" * 900_000, "size and nesting"),
        ("[" + "[]," * 600_000 + "[]]", "size and nesting"),
        ("9" * 5000, "not whole JSON"),
        (b"\x80\x81\x82", "not whole JSON"),
        (b"\0" * 100, "the file is empty"),
        (b"PK\x03\x04 a zip file", "not whole JSON"),
    ],
)
def test_a_file_that_is_no_notebook_is_said_to_be_none(content, why, released, hand_in) -> None:
    intake = hand_in(content)
    assert not intake.found
    assert len(intake.remarks) == 1
    assert says(intake, why)
    assert is_untouched(intake, released)


def test_a_huge_file_is_not_read(released, tmp_path) -> None:
    with open(tmp_path / f"{NAME}.ipynb", "wb") as file:
        file.truncate(40_000_000_000)  # takes no room: the file has a hole

    def refused() -> None:
        assert says(taken(tmp_path, released), "40,000 MB", f"may have {MAX_FILE_MB} MB")

    assert least(refused, within=1) < 1


def test_a_file_of_many_lists_takes_no_gigabytes(released, hand_in) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    hand_in("[" + "{}," * 6_000_000 + "{}]")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_an_old_notebook_is_read(released, hand_in) -> None:
    code = {
        "cell_type": "code",
        "language": "python",
        "input": "def double(x):\n    return x*2",
        "outputs": [],
    }
    old = {"nbformat": 3, "worksheets": [{"cells": [{"cell_type": "heading", "source": "Hi"}, code]}]}
    intake = hand_in(old)
    assert says(intake, "old format", "double was found by the function")
    assert find(intake.notebook, "double").source == "def double(x):\n    return x*2"


def test_other_encodings_are_read(released, hand_in) -> None:
    text = json.dumps(solved(released, answer="Größe · 数"), ensure_ascii=False)
    for data in (b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16")):
        intake = hand_in(data)
        assert intake.remarks == []
        assert "Größe · 数" in find(intake.notebook, "why-linear").source


def test_bytes_that_are_no_text_are_replaced(released, hand_in) -> None:
    data = json.dumps(solved(released)).encode().replace(b"It adds up", b"It \xff\xfe up")
    intake = hand_in(data)
    assert says(intake, "not text (UTF-8)")
    assert "It �� up" in find(intake.notebook, "why-linear").source


def test_nul_bytes_and_half_surrogates_are_taken_out(released, hand_in) -> None:
    nb = solved(released, answer="half \ud83d of a pair")
    find(nb, "double").source = "def double(x):\0\n    return 2 * x"
    intake = hand_in(json.dumps(nb).replace("return by", "return \\u0000by"))
    assert says(intake, "3 of its cells mended")
    assert find(intake.notebook, "double").source == "def double(x):\n    return 2 * x"
    assert "half � of a pair" in find(intake.notebook, "why-linear").source


@pytest.mark.parametrize("source", [3, None, {"a": 1}, ["x", 3], True])
def test_a_source_that_is_no_text_is_left_out(source, released, hand_in) -> None:
    nb = json.loads(json.dumps(solved(released)))
    nb["cells"][4]["source"] = source
    intake = hand_in(nb)
    assert says(intake, "left out", "double was deleted")
    assert find(intake.notebook, "double").source == find(released, "double").source
    assert "by + x" in find(intake.notebook, "shift").source


@pytest.mark.parametrize("cell", [None, 1, "code", [], {}, {"cell_type": "video", "source": ""}])
def test_a_cell_that_is_none_is_left_out(cell, released, hand_in) -> None:
    nb = json.loads(json.dumps(solved(released)))
    nb["cells"].insert(3, cell)
    intake = hand_in(nb)
    assert len(intake.remarks) == 1
    assert "x + x" in find(intake.notebook, "double").source


@pytest.mark.parametrize(
    "metadata", [None, 3, [], {"nbgrader": 1}, {"nbgrader": {"grade_id": 7}}, {"tags": {}}]
)
def test_metadata_of_any_kind_does_no_harm(metadata, released, hand_in) -> None:
    nb = json.loads(json.dumps(solved(released)))
    for cell in nb["cells"]:
        cell["metadata"] = metadata
    nb["metadata"] = metadata
    assert "x + x" in find(hand_in(nb).notebook, "double").source


def test_very_long_cells_and_very_many_do_not_pass(released, hand_in) -> None:
    nb = solved(released)
    find(nb, "double").source = "x = 1\n" * 30_000
    nb.cells += [new_code_cell(f"a{i} = {i}") for i in range(1500)]
    intake = hand_in(nb)
    assert says(intake, "more than 50,000 characters", "1,512 cells", "the first 300 were kept")
    assert len(intake.notebook.cells) == len(released.cells) + 300
    nb = solved(released)
    nb.cells += [new_markdown_cell("a" * 30_000) for _ in range(9)]
    assert says(hand_in(nb), "of 9 added cells the first 6 were kept")


# ── what the files are ───────────────────────────────────────────────────────────────────────────


def test_no_file_is_said_to_be_none(released, tmp_path) -> None:
    assert says(taken(tmp_path / "nobody", released), "nothing was handed in")
    assert says(taken(tmp_path, released), "no notebook was handed in")


@pytest.mark.parametrize("target", ["/etc/passwd", "solved.ipynb", "nowhere"])
def test_a_link_is_not_followed(target, released, tmp_path) -> None:
    (tmp_path / "solved.ipynb").write_text(json.dumps(solved(released)))
    folder = tmp_path / "ada"
    folder.mkdir()
    os.symlink(target if target.startswith("/") else tmp_path / target, folder / f"{NAME}.ipynb")
    intake = taken(folder, released)
    assert not intake.found
    assert says(intake, "is a link")
    os.symlink(tmp_path / "ada", tmp_path / "eve")
    assert says(taken(tmp_path / "eve", released), "is a link, and links are not followed")
    (tmp_path / "bob").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.ipynb").write_text(json.dumps(solved(released)))
    os.symlink(tmp_path / "outside", tmp_path / "bob" / "sub")
    assert not taken(tmp_path / "bob", released).found


def test_a_pipe_or_a_folder_is_not_waited_for(released, tmp_path) -> None:
    os.mkfifo(tmp_path / f"{NAME}.ipynb")
    intake = taken(tmp_path, released)
    assert says(intake, "is a pipe, not a file")
    assert says(taken(tmp_path / f"{NAME}.ipynb", released), "is a pipe")
    os.unlink(tmp_path / f"{NAME}.ipynb")
    (tmp_path / f"{NAME}.ipynb").mkdir()
    assert says(taken(tmp_path, released), "is a folder, not a file")
    assert says(taken(Path("/dev/zero"), released), "is a device")


def test_a_file_of_another_name_is_graded_with_a_word(released, hand_in) -> None:
    intake = hand_in(solved(released), "lab91 (1).ipynb")
    assert says(intake, "the notebook is lab91 (1).ipynb, not lab91_small.ipynb")
    assert "x + x" in find(intake.notebook, "double").source


def test_of_several_files_the_named_one_counts_else_the_newest(released, tmp_path) -> None:
    for name, answer, age in (("a.ipynb", "first", 50), ("b.ipynb", "second", 10), ("c.ipynb", "third", 30)):
        (tmp_path / name).write_text(json.dumps(solved(released, answer)))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    intake = taken(tmp_path, released)
    assert says(intake, "3 notebooks", "b.ipynb, the newest, was graded")
    assert "second" in find(intake.notebook, "why-linear").source
    (tmp_path / f"{NAME}.ipynb").write_text(json.dumps(solved(released, "named")))
    os.utime(tmp_path / f"{NAME}.ipynb", (1, 1))
    intake = taken(tmp_path, released)
    assert says(intake, "the one named as the lab")
    assert "named" in find(intake.notebook, "why-linear").source


def test_a_notebook_deeper_down_is_found_and_checkpoints_and_other_labs_are_not(released, tmp_path) -> None:
    for place in (".ipynb_checkpoints", "__MACOSX"):
        (tmp_path / place).mkdir()
        (tmp_path / place / f"{NAME}.ipynb").write_text("{}")
    (tmp_path / "lab92_other.ipynb").write_text("{}")
    assert not taken(tmp_path, released).found
    (tmp_path / "upload" / "work").mkdir(parents=True)
    (tmp_path / "upload" / "work" / f"{NAME}.ipynb").write_text(json.dumps(solved(released)))
    assert says(taken(tmp_path, released), "upload/work/lab91_small.ipynb")


def test_a_name_cannot_write_to_the_terminal(released, hand_in) -> None:
    intake = hand_in(solved(released), "\x1b[31mred\n[bold].ipynb")
    assert "\x1b" not in "".join(intake.remarks)
    assert "\n" not in "".join(intake.remarks)


# ── what happened to the cells ───────────────────────────────────────────────────────────────────


def test_edited_deleted_and_copied_checks_are_replaced_by_the_labs(released, hand_in) -> None:
    nb = solved(released)
    find(nb, "check-double").source = "print('3 points')"
    nb.cells.remove(find(nb, "check-shift"))
    assert says(hand_in(nb), "check cell check-double was edited", "check cell check-shift was deleted")
    nb = solved(released)
    nb.cells.insert(7, copy.deepcopy(find(nb, "check-double")))
    intake = hand_in(nb)
    assert says(intake, "check-double was copied")
    assert len(intake.notebook.cells) == len(released.cells)


def test_hidden_tests_in_the_source_do_not_make_a_check_look_edited(released, tmp_path) -> None:
    source = copy.deepcopy(released)
    check = find(source, "check-double")
    check.source = "check(double)\n### BEGIN HIDDEN TESTS\nassert double(1) == 2\n### END HIDDEN TESTS"
    (tmp_path / f"{NAME}.ipynb").write_text(json.dumps(solved(released)))
    intake = take_in(tmp_path, source, NAME)
    assert intake.remarks == []
    assert find(intake.notebook, "check-double").source == check.source


def test_a_deleted_solution_counts_as_not_done(released, hand_in) -> None:
    nb = solved(released)
    nb.cells.remove(find(nb, "double"))
    intake = hand_in(nb)
    assert says(intake, "the cell double was deleted")
    assert find(intake.notebook, "double").source == find(released, "double").source


def test_of_copied_solutions_the_last_that_is_not_the_stub_counts(released, hand_in) -> None:
    nb = solved(released)
    for source in ("def double(x):\n    return 2 * x", find(released, "double").source):
        again = copy.deepcopy(find(nb, "double"))
        again.source, again.id = source, f"copy{len(nb.cells)}"
        nb.cells.append(again)
    intake = hand_in(nb)
    assert says(intake, "2 cells are called double", "the last one counts")
    assert find(intake.notebook, "double").source == "def double(x):\n    return 2 * x"
    assert len(intake.notebook.cells) == len(released.cells) + 1


def test_the_first_half_of_a_split_cell_runs_before_the_second(released, hand_in) -> None:
    """JupyterLab gives both halves of a cell that is split the same metadata."""
    nb = solved(released)
    second = find(nb, "double")
    first = copy.deepcopy(second)
    first.source, first.id = "twice = 2", "first-half"
    nb.cells.insert(nb.cells.index(second), first)
    second.source = "def double(x):\n    return twice * x"
    kept = [c.source for c in hand_in(nb).notebook.cells]
    assert kept.index("twice = 2") + 1 == kept.index("def double(x):\n    return twice * x")


def test_equal_cell_ids_do_not_confuse(released, hand_in) -> None:
    nb = solved(released)
    for cell in nb.cells:
        cell.id = "double"
    intake = hand_in(nb)
    assert "x + x" in find(intake.notebook, "double").source
    assert "by + x" in find(intake.notebook, "shift").source


@pytest.mark.parametrize("keep_ids", [True, False])
def test_without_metadata_cells_are_found_by_id_function_and_place(keep_ids, released, hand_in) -> None:
    nb = solved(released)
    for i, cell in enumerate(nb.cells):
        cell.metadata.pop("nbgrader", None)
        if not keep_ids:
            cell.id = f"{i:08x}"
    intake = hand_in(nb)
    assert says(intake, "had lost nbgrader's metadata")
    assert says(intake, "double was found by the function") == (not keep_ids)
    assert "x + x" in find(intake.notebook, "double").source
    assert "by + x" in find(intake.notebook, "shift").source
    assert "It adds up" in find(intake.notebook, "why-linear").source
    assert len(intake.notebook.cells) == len(released.cells)


def test_one_cell_with_all_functions_is_not_overwritten_by_stubs(released, hand_in) -> None:
    nb = solved(released)
    both = find(nb, "double").source + "\n\n" + find(nb, "shift").source
    nb.cells = [new_code_cell(both)]
    intake = hand_in(nb)
    assert find(intake.notebook, "double").source == both
    assert "NotImplementedError" not in find(intake.notebook, "shift").source
    assert says(intake, "shift stands in the cell of another exercise")


def test_a_solution_in_a_cell_of_its_own_runs_after_the_stub(released, hand_in) -> None:
    nb = copy.deepcopy(released)
    at = nb.cells.index(find(nb, "double"))
    nb.cells.insert(at + 1, new_code_cell("def double(x):\n    return x + x"))
    kept = hand_in(nb).notebook.cells
    assert [kept[at].id, kept[at + 1].id] == ["double", "own-1"]


def test_a_changed_cell_type_is_changed_back(released, hand_in) -> None:
    nb = solved(released)
    nb.cells[nb.cells.index(find(nb, "double"))] = small_lab.mark(
        new_markdown_cell("def double(x):\n    return x + x"), "double", solution=True
    )
    nb.cells[nb.cells.index(find(nb, "why-linear"))] = small_lab.mark(
        new_raw_cell("<script>alert(1)</script>"), "why-linear", solution=True, grade=True, points=50
    )
    intake = hand_in(nb)
    assert says(intake, "the cell double had become markdown, not code", "why-linear had become raw")
    assert find(intake.notebook, "double").cell_type == "code"
    assert find(intake.notebook, "why-linear").source == "< script>alert(1)< /script>"


def test_another_kernel_is_told_and_not_used(released, hand_in) -> None:
    nb = solved(released)
    nb.metadata["kernelspec"] = {"name": "my_conda", "display_name": "Mine", "language": "julia"}
    assert says(hand_in(nb), "the kernel my_conda; it was graded with python3")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_mixture_of_cells_raises(data, released, tmp_path_factory) -> None:
    """Any list of cells with any of the lab's names, ids and kinds gives a clean notebook."""
    names = [c.metadata.get("nbgrader", {}).get("grade_id", c.id) for c in released.cells]
    cell = st.fixed_dictionaries(
        {
            "cell_type": st.sampled_from(["code", "markdown", "raw", "heading", 3]),
            "source": st.one_of(st.sampled_from([c.source for c in released.cells]), st.text(max_size=40)),
            "id": st.sampled_from([*names, "x", 7]),
            "metadata": st.sampled_from([{"nbgrader": {"grade_id": name}} for name in names] + [{}]),
        }
    )
    folder = tmp_path_factory.mktemp("any")
    cells = data.draw(st.lists(cell, max_size=25))
    (folder / f"{NAME}.ipynb").write_text(json.dumps({"cells": cells}))
    taken(folder, released)


# ── Markdown and pictures ────────────────────────────────────────────────────────────────────────

ATTACKS = [
    "<script>boom()</script>",
    "<img src=x onerror=boom()>",
    "<svg/onload=boom()>",
    "<!--><img src=x onerror=boom()>-->",
    "<?xml?><iframe src='javascript:boom()'></iframe>",
    "[a](javascript:boom())",
    "[a]( javascript:boom())",
    "[a](<javascript:boom()>)",
    "[a](java&#115;cript:boom())",
    "[a](JaVaScRiPt&colon;boom())",
    "[a](data:text/html,boom)",
    "![a](vbscript:boom)",
    "[a]: javascript:boom()\n\n[a]",
    "> - [a]:\n>   javascript:boom()\n\n[a]",
    "<javascript:boom()>",
    "<a\nhref=javascript:boom()>x</a>",
    "```\n</code></pre><img src=x onerror=boom()>\n```",
    '[a]: b "x\n```\n"\n<img src=x onerror=boom()>\n```',
    "$$\\href{javascript:boom()}{x}$$",
    "$<img src=x onerror=boom()>$",
    "`` ` <img src=x onerror=boom()> ``",
    "&lt;img src=x onerror=boom()&gt;",
    "<details open ontoggle=boom()>",
    "# <b onmouseover=boom()>x</b>",
    "|a|\n|-|\n|<img src=x onerror=boom()>|",
]


@pytest.mark.parametrize("text", ATTACKS)
def test_markdown_has_no_html_and_no_script_in_any_parser(text) -> None:
    """Judged by two Markdown parsers with HTML switched on and by a parser of HTML."""
    from bs4 import BeautifulSoup
    from markdown_it import MarkdownIt
    from nbconvert.filters import markdown2html

    safe = inert(text)
    for page in (markdown2html(safe), MarkdownIt("commonmark", {"html": True}).enable("table").render(safe)):
        soup = BeautifulSoup(page, "html.parser")
        assert not soup.find_all(["script", "img", "svg", "iframe", "details", "b"])
        for tag in soup.find_all(True):
            assert not [name for name in tag.attrs if name.startswith("on")]
            for name in ("href", "src"):
                assert "script" not in tag.attrs.get(name, "")
                assert not tag.attrs.get(name, "").startswith("data")
        assert "\\href{" not in page


def test_ordinary_markdown_stays_as_it_is() -> None:
    text = "# A *b*\n\n- $a < b$, `x < 3`, 1 <2\n- [web](https://a.b), [up](#A), ![p](attachment:p.png)\n"
    assert inert(text) == text
    assert inert("x[0]: 3, a<b") == "x[0] : 3, a< b"


def png(*parts: tuple[bytes, bytes], size: tuple[int, int] = (2, 1)) -> bytes:
    def part(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0\1\2" * size[1]) if size == (2, 1) else b""
    middle = b"".join(part(*p) for p in parts)
    ends = part(b"IHDR", header), part(b"IDAT", pixels), part(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + ends[0] + middle + ends[1] + ends[2]


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_a_whole_picture_is_kept_without_its_comments() -> None:
    plain = png()
    assert checked_png(encoded(plain)) == encoded(plain)
    assert checked_png(encoded(png((b"tEXt", b"Comment\0<script>")) + b"<script>")) == encoded(plain)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<svg onload=boom()>",
        b"\x89PNG\r\n\x1a\n<script>",
        png()[:-1],
        png()[:40] + b"?" + png()[41:],
        png(size=(100_000, 100_000)),
        png(size=(0, 5)),
        png((b"IHDR", b"again")),
        b"GIF89a" + png(),
    ],
)
def test_what_is_no_whole_picture_is_not_kept(data) -> None:
    assert checked_png(encoded(data)) is None


@pytest.mark.parametrize("value", [None, 3, "é", "!!!", ["a"], "A" * 10_000_000])
def test_what_is_no_text_of_a_picture_is_not_kept(value) -> None:
    assert checked_png(value) is None


def test_a_picture_in_an_answer_is_kept_if_it_is_one(released, hand_in) -> None:
    nb = solved(released, answer="See ![mine](attachment:mine.png).")
    bundle = {"mine.png": {"image/png": encoded(png())}, "bad.svg": {"image/svg+xml": "<svg onload=boom()>"}}
    find(nb, "why-linear")["attachments"] = bundle
    intake = hand_in(nb)
    assert find(intake.notebook, "why-linear").attachments == {"mine.png": bundle["mine.png"]}
    assert says(intake, "not whole PNG pictures")


# ── which submissions there are ──────────────────────────────────────────────────────────────────


def test_three_layouts_are_found_in_a_stable_order(tmp_path) -> None:
    (tmp_path / "zoe" / NAME).mkdir(parents=True)
    (tmp_path / "ada").mkdir()
    for name in ("bob.ipynb", "notes.txt", ".DS_Store"):
        (tmp_path / name).write_text("{}")
    for name in (".git", "__MACOSX"):
        (tmp_path / name).mkdir()
    (tmp_path / "gradebook").mkdir()
    (tmp_path / "gradebook" / "nbgrader_config.py").touch()
    (tmp_path / "eve" / NAME).mkdir(parents=True)
    (tmp_path / "eve" / "nbgrader_config.py").touch()  # with the settings of whoever handed it in
    found = find_submissions(tmp_path, NAME)
    assert [(s.student, s.path.relative_to(tmp_path).as_posix()) for s in found] == [
        ("ada", "ada"),
        ("bob", "bob.ipynb"),
        ("eve", f"eve/{NAME}"),
        ("zoe", f"zoe/{NAME}"),
    ]


def test_links_and_pipes_stay_in_the_list_and_are_refused(released, tmp_path) -> None:
    folder, outside = tmp_path / "in", tmp_path / "outside"
    folder.mkdir()
    (outside / NAME).mkdir(parents=True)
    (outside / NAME / f"{NAME}.ipynb").write_text(json.dumps(solved(released)))
    os.symlink(outside, folder / "eve")
    os.symlink(tmp_path / "nowhere", folder / "gone")
    os.symlink("loop", folder / "loop")
    (folder / "mallory").mkdir()
    os.symlink(outside / NAME, folder / "mallory" / NAME)
    os.mkfifo(folder / "fifo.ipynb")
    found = find_submissions(folder, NAME)
    assert [s.student for s in found] == ["eve", "fifo", "gone", "loop", "mallory"]
    assert [taken(s.path, released).found for s in found] == [False] * 5


def test_ids_are_safe_and_unique_and_the_remark_says_so(tmp_path) -> None:
    given_names = [
        "o'brien",
        "*",
        "..hidden",
        "a\nb",
        "Ada",
        "ada.ipynb",
        "-rf",
        "x" * 200,
        "Zoë Ñ",
        "[a]",
        "%2e",
    ]
    for name in given_names:
        (tmp_path / name).mkdir() if not name.endswith("ipynb") else (tmp_path / name).touch()
    found = {s.student: s for s in find_submissions(tmp_path, NAME)}
    assert len(found) == len({s.casefold() for s in found}) == len(given_names) - 1  # a hidden folder is none
    assert {"Ada", "Zoë Ñ"} <= found.keys()
    for student, submission in found.items():
        assert safe_id(student) == student
        assert not set(student) & set("*?[]{}'\"/\\\n%")
        assert bool(submission.remarks) == (student not in ("Ada", "Zoë Ñ"))


@given(st.text(min_size=1, max_size=120))
@example("\U00020000" * 63)
def test_every_id_is_a_safe_file_name(name) -> None:
    student = safe_id(name.replace("/", "").replace("\0", "") or "x")
    assert 0 < len(student) <= 80
    assert len(f"{student}.json".encode()) <= 255, "what a file system takes as a name"
    assert student[0] not in ".-"
    assert student == student.strip()
    assert not set(student) & set("/\\*?[]\0\n'\"<>&=")
    assert safe_id(student) == student


def test_a_folder_with_another_labs_notebook_is_told_apart_from_an_empty_one(released, tmp_path) -> None:
    other = tmp_path / "ada" / "lab02_other"
    other.mkdir(parents=True)
    (other / "lab02_other.ipynb").write_text("{}")
    assert says(taken(tmp_path / "ada", released), "the folder holds lab02_other.ipynb, of another lab")


def test_an_unreadable_folder_is_not_called_empty(released, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as it is for anybody but root
    assert says(taken(tmp_path, released), "the folder cannot be read")
