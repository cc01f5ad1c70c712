"""The form on disk: the same text for the same page, whoever ran it, wherever."""

from __future__ import annotations

import json
from copy import deepcopy

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook, new_output

from llmcourse.errors import NotebookError
from llmcourse.runner.canonical import WIDGET_VIEW, canonicalise, dumps, read, write

texts = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=40)
ids = st.one_of(
    st.sampled_from(["same", "1a2b3c4d", "not valid!", "", "3f0c2a52-9d3f-4f5e-8a3b-0123456789ab"]),
    st.from_regex(r"[a-z-]{1,12}", fullmatch=True),
)
streams = st.builds(
    lambda name, text: new_output("stream", name=name, text=text),
    st.sampled_from(["stdout", "stderr"]),
    st.one_of(texts, st.sampled_from(["10%\r20%\r100%\n", "\r", "a\rb"])),
)
results = st.builds(
    lambda kind, data: new_output(kind, data=data, metadata={"text/plain": {"a": 1}, "gone": {"b": 2}}),
    st.sampled_from(["execute_result", "display_data"]),
    st.dictionaries(st.sampled_from(["text/plain", "text/html", "image/png", WIDGET_VIEW]), texts),
)
errors = st.builds(lambda value: new_output("error", ename="E", evalue=value, traceback=[value]), texts)


def _code(name, source, count, outputs, tags):
    return nbformat.from_dict(  # unlike new_code_cell, it takes what a hand-edited file may hold
        {
            "cell_type": "code",
            "id": name,
            "source": source,
            "execution_count": count,
            "outputs": outputs,
            "metadata": {"tags": tags, "execution": {"iopub.status.busy": "now"}},
        }
    )


def _markdown(name, source):
    return nbformat.from_dict({"cell_type": "markdown", "id": name, "source": source, "metadata": {}})


tags = st.sampled_from(["b", "a", "nbval-skip", "injected-parameters"])
code_cells = st.builds(
    _code,
    ids,
    texts,
    st.none() | st.integers(1, 30),
    st.lists(streams | results | errors, max_size=4),
    st.lists(tags),
)
markdown_cells = st.builds(_markdown, ids, texts)
notebooks = st.builds(
    lambda cells, metadata: nbformat.from_dict(
        {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    ),
    st.lists(code_cells | markdown_cells, max_size=6),
    st.dictionaries(st.sampled_from(["widgets", "papermill", "llmcourse"]), st.just({"memory_mb": 900})),
)


@given(notebooks)
def test_a_second_time_changes_nothing(nb):
    once = canonicalise(nb)
    assert dumps(canonicalise(once)) == dumps(once)
    assert dumps(canonicalise(nbformat.reads(dumps(once), as_version=4))) == dumps(once)


@given(notebooks)
def test_the_result_is_valid_and_its_cells_can_be_told_apart(nb):
    result = canonicalise(nb)
    nbformat.validate(result)
    names = [cell.id for cell in result.cells]
    assert len(set(names)) == len(names)


@given(notebooks)
def test_no_source_is_lost_and_the_given_notebook_is_left_alone(nb):
    before = deepcopy(nb)
    result = canonicalise(nb)
    assert nb == before
    kept = [
        c for c in nb.cells if c.source.strip() and "injected-parameters" not in c.metadata.get("tags", [])
    ]
    assert [c.source for c in result.cells] == [c.source.strip("\n") for c in kept]


def test_the_text_is_what_jupyter_would_write(tmp_path, good):
    write(tmp_path / "ours.ipynb", good)
    nbformat.write(nbformat.read(tmp_path / "ours.ipynb", 4), tmp_path / "theirs.ipynb")
    assert (tmp_path / "ours.ipynb").read_text() == (tmp_path / "theirs.ipynb").read_text()


def test_who_ran_it_and_when_leaves_no_trace(good):
    ran = deepcopy(good)
    ran.metadata.update(
        papermill={"duration": 3.2, "input_path": "a.ipynb"},
        widgets={"state": {"f00": {}}},
        kernelspec={"name": "my-venv", "display_name": "My venv"},
        language_info={"name": "python", "version": "3.12.1", "nbconvert_exporter": "python"},
    )
    for cell in ran.cells:
        cell.metadata.update(
            execution={"iopub.status.busy": "2026-11-22"}, papermill={"status": "completed"}, collapsed=False
        )
    injected = new_code_cell('device = "cpu"', execution_count=4, metadata={"tags": ["injected-parameters"]})
    ran.cells.insert(3, injected)
    for number, cell in enumerate([c for c in ran.cells if c.cell_type == "code"], start=1):
        cell.execution_count = number
    assert dumps(canonicalise(ran)) == dumps(good)


def test_the_memory_a_notebook_needs_is_kept():
    nb = new_notebook(metadata={"llmcourse": {"memory_mb": 2500, "mood": "good"}})
    assert canonicalise(nb).metadata.llmcourse == {"memory_mb": 2500}


def test_a_widget_leaves_its_picture_and_its_text_but_no_name_in_a_dead_kernel():
    view = {"model_id": "0f1e2d3c4b5a", "version_major": 2, "version_minor": 0}
    data = {WIDGET_VIEW: view, "text/plain": "[explorable: move it]", "image/png": "AAAA"}
    result = new_output("execute_result", data=data, execution_count=1)
    bare = new_output("display_data", data={WIDGET_VIEW: view})
    nb = new_notebook(cells=[new_code_cell("x", execution_count=1, outputs=[result, bare])])
    stored = canonicalise(nb).cells[0].outputs
    assert [sorted(out.data) for out in stored] == [["image/png", "text/plain"]]
    assert "model_id" not in dumps(canonicalise(nb))


def test_an_id_that_someone_chose_stays_and_a_random_one_becomes_words():
    nb = new_notebook()
    nb.cells = [
        _markdown("1a2b3c4d", "Some prose\n## Résumé of *all* we measured"),
        _code("3f0c2a52-9d3f-4f5e-8a3b-0123456789ab", "# the gradient, by hand\nx = 1", None, [], []),
        _code("chosen", "y = x + 1", None, [], []),
        _code("chosen", "y = x + 1", None, [], []),
        _code("0a0a0a0a", "y = x + 1", None, [], []),
        _code("!", "…", None, [], []),
    ]
    assert [cell.id for cell in canonicalise(nb).cells] == [
        "resume-of-all-we-measured",
        "the-gradient-by-hand",
        "chosen",
        "y-x-1",
        "y-x-1-2",
        "code",
    ]


def test_an_inserted_cell_does_not_rename_the_others(good):
    more = deepcopy(good)
    more.cells.insert(5, new_code_cell("print(5)"))
    names = [cell.id for cell in canonicalise(more).cells]
    assert [*names[:5], *names[6:]] == [cell.id for cell in good.cells]


def test_runs_in_order_are_counted_from_one():
    assert [c.execution_count for c in canonicalise(_counted(3, None, 7, 9)).cells] == [1, None, 2, 3]


def test_runs_in_another_order_keep_their_numbers_to_be_seen():
    assert [c.execution_count for c in canonicalise(_counted(3, 9, 7)).cells] == [3, 9, 7]


def test_a_result_is_numbered_like_its_cell():
    nb = _counted(4, 6)
    nb.cells[1].outputs = [new_output("execute_result", data={"text/plain": "1"}, execution_count=6)]
    assert canonicalise(nb).cells[1].outputs[0].execution_count == 2


def test_pieces_of_one_stream_are_joined_and_a_progress_bar_keeps_its_last_state():
    pieces = [new_output("stream", name="stdout", text=text) for text in ("1%\r5", "0%\r100%\n", "done\n")]
    nb = new_notebook(cells=[new_code_cell("x", execution_count=1, outputs=pieces)])
    assert [out.text for out in canonicalise(nb).cells[0].outputs] == ["100%\ndone\n"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"nbformat": 4}',
        "\x00\xff",
        '{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [1]}',
    ],
)
def test_a_file_that_is_no_notebook_is_named(tmp_path, text):
    path = tmp_path / "broken.ipynb"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(NotebookError, match=r"broken\.ipynb cannot be read"):
        read(path)


def test_writing_is_whole_or_not_at_all(tmp_path, good, monkeypatch):
    path = tmp_path / "page.ipynb"
    assert write(path, good)
    assert not write(path, good)
    before = path.read_text()

    def no_room(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", no_room)
    good.cells[0].source += "!"
    with pytest.raises(OSError, match="No space"):
        write(path, good)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["page.ipynb"]
    assert json.loads(before)["nbformat_minor"] == 5


def _counted(*counts):
    return new_notebook(cells=[new_code_cell(f"x = {i}", execution_count=n) for i, n in enumerate(counts)])
