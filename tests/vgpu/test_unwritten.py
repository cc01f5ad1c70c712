"""A %%cuda cell with the stub of a lab defines kernels that say "not implemented yet", and nothing else."""

import copy

import pytest

from llmcourse.grading.verdict import NotImplementedYet
from llmcourse.labs.catalog import find_lab
from llmcourse.labs.desk import Desk
from llmcourse.vgpu.magic import cuda_magic
from llmcourse.vgpu.unwritten import STUB, unwritten

CELL = f"""__global__ void one(float* x) {{
    {STUB}
}}
template <int N> __global__ void two(float* x) {{ x[0] = N; }}
"""


def test_the_cell_defines_its_kernels_and_says_so(capsys):
    names = {}
    cuda_magic("", CELL, names)
    assert set(names) == {"one", "two"}
    assert capsys.readouterr().out == "one, two: not implemented yet\n"
    assert repr(names["one"]) == "<kernel one: not implemented yet>"


@pytest.mark.parametrize(
    "use",
    [lambda k: k[1, 32](None), lambda k: k(), lambda k: k.ptx, lambda k: k.resources("sm_80")],
    ids=["launch", "call", "ptx", "resources"],
)
def test_using_one_raises_not_implemented_yet(use):
    with pytest.raises(NotImplementedError, match=r"^not implemented yet$"):
        use(unwritten(CELL)["one"])


def test_it_can_be_copied_and_looked_at():
    kernel = copy.copy(unwritten(CELL)["one"])
    assert kernel.__name__ == "one"
    assert not hasattr(kernel, "_repr_html_")


@pytest.mark.parametrize(
    "source",
    [
        "__global__ void f(float* x) { x[0] = 1; }",
        "__global__ void f(float* x) { // #error not implemented yet\n x[0] = 1; }",
        "#error not implemented yet, or ever\n__global__ void f(float* x) { x[0] = 1; }",
        '__global__ void f(float* x) { printf("#error not implemented yet"); }',
    ],
)
def test_other_sources_are_compiled(source):
    assert unwritten(source) == {}


def test_a_lab_takes_it_for_an_open_exercise(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMCOURSE_PROGRESS", str(tmp_path / "progress.json"))
    names = {}
    cuda_magic("", f"__global__ void vector_add(float* c) {{\n{STUB}\n}}", names)
    with pytest.raises(NotImplementedYet):
        Desk(find_lab("03")).check(names["vector_add"])
