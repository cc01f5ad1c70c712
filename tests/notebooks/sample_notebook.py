"""A small notebook that passes every gate, and prints what is stored when it runs."""

from __future__ import annotations

import base64

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from llmcourse.runner import canonical
from llmcourse.runner.setup_cell import badge, setup_cell

NAME = "42_sample"

HEAD = """\
# 42 · A notebook without a fault

{badge}

- **You will be able to** tell a sound notebook from a broken one
- **Moves** latency and memory
- **Prerequisites** none
- **Minutes on CPU** 1"""

QUESTIONS = """\
## Interview questions

<details><summary>Where is the third square?</summary>

In [its section](#Square-number-3), after Dao et al. 2022, arXiv:2205.14135.

</details>"""

REFERENCES = "## References\n\n- Dao et al. 2022, [FlashAttention](https://arxiv.org/abs/2205.14135)"

PIXEL = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
        "1f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
    )
).decode()


def good_notebook() -> NotebookNode:
    cells = [
        new_markdown_cell(HEAD.format(badge=badge(NAME)), id="head"),
        code("setup", setup_cell()),
        code("parameters", 'device = "cpu"\nscale = "ci"', tags=["parameters"]),
    ]
    for n in range(1, 11):
        cells.append(new_markdown_cell(f"## Square number {n}\n\nIt grows.", id=f"about-{n}"))
        cells.append(
            code(f"square-{n}", f'print("square of", {n}, "is", {n} ** 2)', f"square of {n} is {n**2}\n")
        )
    cells[-1].source += "\n# the last of them"
    cells += [
        code("value", "[1, 2, 3]", result="[1, 2, 3]"),
        code("time", "import time\n\ntime.time()", result="12.5", tags=["nbval-ignore-output"]),
        code(
            "plot",
            "import matplotlib.pyplot as plt\n\nplt.plot([1, 2])\nplt.show()",
            picture="<Figure size 640x480 with 1 Axes>",
        ),
        new_markdown_cell("## Summary\n\n| n | square |\n|---|---|\n| 3 | 9 |", id="summary"),
        new_markdown_cell(QUESTIONS, id="questions"),
        new_markdown_cell(REFERENCES, id="references"),
    ]
    for number, cell in enumerate((cell for cell in cells if cell.cell_type == "code"), start=1):
        cell.execution_count = number
    return canonical.canonicalise(new_notebook(cells=cells))


def code(
    name: str,
    source: str,
    printed: str = "",
    *,
    result: str = "",
    picture: str = "",
    tags: list[str] | None = None,
) -> NotebookNode:
    outputs = []
    if printed:
        outputs.append(new_output("stream", name="stdout", text=printed))
    if result:
        outputs.append(new_output("execute_result", data={"text/plain": result}, execution_count=1))
    if picture:
        outputs.append(new_output("display_data", data={"text/plain": picture, "image/png": PIXEL}))
    return new_code_cell(source, id=name, outputs=outputs, metadata={"tags": tags or []})
