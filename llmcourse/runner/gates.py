"""What every notebook must be before it is shipped, each rule a function that finds what breaks it.

The form that the gates hold a notebook to, for its author:

    first cell    Markdown:  # NN · Title                     NN is the number in the file's name
                             the line that `setup_cell.badge(name)` writes
                             - **You will be able to** …
                             - **Moves** …                    latency, throughput, cost, memory or all
                             - **Prerequisites** …
                             - **Minutes on CPU** …           a number
    second cell   code:      what `setup_cell.setup_cell()` writes, unchanged
    third cell    code, tagged `parameters`:  device = "cpu" and scale = "ci", and no other name
    body          one H1 in the notebook, levels without gaps, no heading twice; 25 to 45 cells in all;
                  code cells of at most 15 lines; at least 8 verdict cells
    plots         the cell ends with `plt.show()`
    links         a heading of the same notebook as `[text](#The-heading-with-dashes)`; files by relative
                  path; the web by https; papers as arXiv:2205.14135
    tail          ## Summary
                  ## Interview questions    each answer folded: <details><summary>question</summary>,
                                            a blank line, the answer, a blank line, </details>
                  ## References

A *verdict cell* states something that must come out the same every time (a shape, a count, a rounded
value, "equal to torch"): its stored text is compared with a fresh run. Times, device names and whatever
else differs between machines go into cells tagged `nbval-ignore-output`. Source shown with `show_source`
is compared too, and does not count among the eight.

`llmcourse notebooks fix` writes the set-up cell, the Colab line and the canonical form;
`llmcourse notebooks store` runs the notebook and stores its outputs.
"""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import unified_diff
from itertools import pairwise
from pathlib import Path

from nbformat import NotebookNode

from llmcourse.errors import CourseError
from llmcourse.runner import canonical
from llmcourse.runner.links import link_fault, malformed_arxiv_ids
from llmcourse.runner.page import Heading, Page, label, verdict_cells
from llmcourse.runner.setup_cell import badge, setup_cell

MIN_VERDICTS = 8
MAX_CODE_LINES = 15
MIN_CELLS, MAX_CELLS = 25, 45
MAX_OUTPUT_BYTES = 400_000

HEAD_ITEMS = ("You will be able to", "Moves", "Prerequisites", "Minutes on CPU")
TAIL = ("Summary", "Interview questions", "References")
MOVES = ("latency", "throughput", "cost", "memory", "all")
PARAMETERS = {"device": ("auto", "cpu", "cuda"), "scale": ("ci", "full")}

RUN_TRACES = ("execution", "papermill", "ExecuteTime", "widgets", "signature", "collapsed", "scrolled")


@dataclass(frozen=True)
class Problem:
    """What a gate found, in three parts, and in which cell (empty: the notebook as a whole)."""

    what: str
    why: str
    fix: str
    cell: str = ""

    def render(self, path: Path) -> str:
        where = f"{path} · cell {self.cell}" if self.cell else str(path)
        return f"{where}: {self.what}\n  {self.why}\n  Try {self.fix}"


Gate = Callable[[Page], list[Problem]]


def check(page: Page) -> list[Problem]:
    """All that keeps a notebook from being shipped."""
    return [problem for gate in GATES for problem in gate(page)]


def canonical_form(page: Page) -> list[Problem]:
    wanted = canonical.dumps(canonical.canonicalise(page.nb))
    if page.text == wanted:
        return []
    changes = unified_diff(page.text.splitlines(), wanted.splitlines(), lineterm="", n=0)
    change = next((line for line in changes if re.match(r"[-+](?![-+]{2} )", line)), "its line endings")
    return [
        Problem(
            f"not in canonical form, first at {change.strip()[:90]}",
            "One form on disk keeps a notebook's history down to what its author changed.",
            "llmcourse notebooks fix.",
        )
    ]


def no_run_traces(page: Page) -> list[Problem]:
    holders = [("", page.nb.metadata)] + [(label(cell), cell.metadata) for cell in page.nb.cells]
    return [
        Problem(
            f"metadata `{key}` is stored",
            "It records when and where somebody ran the notebook, and changes with each run.",
            "llmcourse notebooks fix.",
            cell,
        )
        for cell, metadata in holders
        for key in RUN_TRACES
        if key in metadata
    ]


def every_cell_ran(page: Page) -> list[Problem]:
    for number, cell in enumerate(page.code, start=1):
        if cell.execution_count != number:
            came = (
                "was never run" if cell.execution_count is None else f"ran as number {cell.execution_count}"
            )
            return [
                Problem(
                    f"code cell {number} {came}",
                    "A reader runs the cells from top to bottom, and must see what is stored.",
                    "llmcourse notebooks store.",
                    label(cell),
                )
            ]
    return []


def enough_verdicts(page: Page) -> list[Problem]:
    found = sum("show_source(" not in cell.source for cell in verdict_cells(page.nb))
    if found >= MIN_VERDICTS:
        return []
    return [
        Problem(
            f"{found} verdict cells",
            f"A notebook states at least {MIN_VERDICTS} results that a fresh run must reproduce exactly.",
            "printing shapes, counts or rounded values from cells that are not tagged nbval-ignore-output.",
        )
    ]


def short_code(page: Page) -> list[Problem]:
    return [
        Problem(
            f"{lines} lines of code",
            f"A cell holds one idea: at most {MAX_CODE_LINES} lines, blank lines and comments included.",
            "splitting it, or moving code into the package and showing it with show_source.",
            label(cell),
        )
        for cell in page.code
        if (lines := len(cell.source.splitlines())) > MAX_CODE_LINES
    ]


def right_length(page: Page) -> list[Problem]:
    found = len(page.nb.cells)
    if MIN_CELLS <= found <= MAX_CELLS:
        return []
    return [
        Problem(
            f"{found} cells",
            f"A chapter that is read in one sitting has {MIN_CELLS} to {MAX_CELLS}.",
            "joining neighbouring prose." if found > MAX_CELLS else "giving each idea its own cell.",
        )
    ]


def headings_in_order(page: Page) -> list[Problem]:
    problems = []
    titles = [heading for heading in page.headings if heading.level == 1]
    if len(titles) != 1 or page.headings[0].level != 1:
        problems.append(
            Problem(
                f"{len(titles)} headings of level 1, where the first heading should be the only one",
                "The table of contents hangs from one title.",
                "one `# NN · Title` at the top, and ## for the sections.",
                titles[1].cell if len(titles) > 1 else "",
            )
        )
    for before, after in pairwise(page.headings):
        if after.level > before.level + 1:
            problems.append(
                Problem(
                    f"“{after.text}” is at level {after.level} under level {before.level}",
                    "A gap in the levels breaks the table of contents and confuses screen readers.",
                    f"{'#' * (before.level + 1)} {after.text}.",
                    after.cell,
                )
            )
    seen: dict[str, Heading] = {}
    for heading in page.headings:
        if heading.anchor in seen:
            problems.append(
                Problem(
                    f"the heading “{heading.text}” stands already in cell {seen[heading.anchor].cell}",
                    "A link to a heading goes to the first one of that name.",
                    "saying in the heading what is different here.",
                    heading.cell,
                )
            )
        seen.setdefault(heading.anchor, heading)
    return problems


def links_lead_somewhere(page: Page) -> list[Problem]:
    problems = []
    for link in page.links:
        if fault := link_fault(page, link.target):
            what, why, fix = fault
            problems.append(Problem(f"the link {link.target} {what}", why, fix, link.cell))
    for cell in page.markdown:
        for paper in malformed_arxiv_ids(cell.source):
            problems.append(
                Problem(
                    f"“{paper}” is no arXiv number",
                    "They have the form YYMM.NNNNN (since April 2007) or archive/YYMMNNN.",
                    "copying it from the paper's page, as in arXiv:2205.14135.",
                    label(cell),
                )
            )
    return problems


def setup_cell_first(page: Page) -> list[Problem]:
    problems = []
    first = page.code[0] if page.code else None
    if first is None or first.source != setup_cell():
        problems.append(
            Problem(
                "the first code cell is not the course's set-up cell",
                "The same cell opens every notebook, and installs the package in Colab.",
                "llmcourse notebooks fix.",
                label(first) if first else "",
            )
        )
    try:
        wanted = badge(page.name)
    except CourseError as error:
        return [*problems, Problem(error.what.rstrip("."), error.why, error.fix)]
    head = page.nb.cells[0] if page.nb.cells else None
    if head is None or wanted not in head.source.splitlines():
        problems.append(
            Problem(
                "the first cell has no link that opens this notebook in Colab",
                f"It should hold the line {wanted}",
                "llmcourse notebooks fix.",
                label(head) if head else "",
            )
        )
    return problems


def parameters_cell(page: Page) -> list[Problem]:
    tagged = [cell for cell in page.code if "parameters" in cell.metadata.get("tags", [])]
    found = _assignments(tagged[0].source) if len(tagged) == 1 else {}
    if found.keys() == PARAMETERS.keys() and all(
        found[name] in allowed for name, allowed in PARAMETERS.items()
    ):
        return []
    what = f"sets {', '.join(f'{k} = {v!r}' for k, v in found.items()) or 'nothing'}"
    return [
        Problem(
            f"{len(tagged)} cells are tagged `parameters`"
            if len(tagged) != 1
            else f"the parameters cell {what}",
            "papermill overwrites `device` and `scale`, and only these, through the one cell with that tag.",
            'a cell tagged parameters with the two lines device = "cpu" and scale = "ci".',
            label(tagged[-1]) if tagged else "",
        )
    ]


def no_absolute_paths(page: Page) -> list[Problem]:
    here = [str(folder) for folder in (page.path.resolve().parent.parent, Path(sys.prefix), Path.home())]
    own = "|".join(re.escape(folder) for folder in here if folder.count(os.sep) > 1)
    absolute = re.compile(f"{_ABSOLUTE}|{own}" if own else _ABSOLUTE, re.VERBOSE | re.MULTILINE)
    return [
        Problem(
            f"{place} holds the path {match.group().strip()}…",
            "It exists on one machine only, and tells readers about that machine.",
            "a path relative to the notebook, or a function of the package that finds the file.",
            label(cell),
        )
        for cell in page.nb.cells
        for place, text in _texts_of(cell)
        if (match := absolute.search(text))
    ]


def no_errors_in_outputs(page: Page) -> list[Problem]:
    problems = []
    for cell in page.code:
        for output in cell.outputs:
            if output.output_type == "error":
                what = f"the output is an error, {output.ename}: {output.evalue.partition(chr(10))[0]}"
            elif output.output_type == "stream" and output.name == "stderr":
                what = f"the cell wrote to stderr: {output.text.strip().partition(chr(10))[0]}"
            elif "Traceback (most recent call last)" in json.dumps(output):
                what = "the output holds a traceback"
            else:
                continue
            problems.append(
                Problem(
                    what,
                    "A shipped notebook runs clean; an error that teaches is caught and printed.",
                    "mending the cause, then llmcourse notebooks store.",
                    label(cell),
                )
            )
    return problems


def plots_are_shown(page: Page) -> list[Problem]:
    return [
        Problem(
            "a plot does not end with plt.show()",
            "Without it the cell also prints its last object, with an address that changes in each run.",
            "plt.show() as the cell's last line.",
            label(cell),
        )
        for cell in page.code
        if _draws(cell) and not _ends_with_show(cell.source)
    ]


def head_is_complete(page: Page) -> list[Problem]:
    head = page.nb.cells[0] if page.nb.cells else None
    source = head.source if head is not None and head.cell_type == "markdown" else ""
    number = page.name.partition("_")[0]
    missing = [] if re.match(rf"# {re.escape(number)} · \S", source) else [f"the title `# {number} · …`"]
    items = {name: _item(source, name) for name in HEAD_ITEMS}
    missing += [f"the item `- **{name}** …`" for name, text in items.items() if not text]
    if items["Moves"] and not re.search(rf"\b({'|'.join(MOVES)})\b", items["Moves"], re.IGNORECASE):
        missing.append(f"one of {', '.join(MOVES)} in the item Moves")
    if items["Minutes on CPU"] and not re.search(r"\d", items["Minutes on CPU"]):
        missing.append("a number in the item Minutes on CPU")
    return [
        Problem(
            f"the first cell lacks {what}",
            "The head tells a reader in one look whether to read this now.",
            "the layout described in llmcourse/runner/gates.py.",
            label(head) if head is not None else "",
        )
        for what in missing
    ]


def tail_is_complete(page: Page) -> list[Problem]:
    sections = [heading.text for heading in page.headings if heading.level == 2]
    if [text for text in sections if text in TAIL] != list(TAIL):
        return [
            Problem(
                f"the sections {', '.join(TAIL)} are not all there, in this order",
                "A chapter ends with its measured numbers, questions to test oneself, and its sources.",
                "adding what is missing: ## "
                + ", ## ".join(text for text in TAIL if text not in sections)
                + ".",
            )
        ]
    problems = []
    for title in TAIL:
        if not page.section(title).strip():
            problems.append(Problem(f"the section {title} is empty", "It has no text.", "writing it."))
    if fault := _folding_fault(page.section("Interview questions")):
        problems.append(
            Problem(
                f"the interview questions: {fault}",
                "An answer in sight is not a question any more.",
                "<details><summary>question</summary>, a blank line, the answer, a blank line, </details>.",
            )
        )
    return problems


def outputs_are_small(page: Page) -> list[Problem]:
    return [
        Problem(
            f"outputs of {size / 1000:,.0f} kB",
            f"Above {MAX_OUTPUT_BYTES / 1000:,.0f} kB a cell a notebook opens slowly.",
            "a smaller figure (dpi, figsize), or printing fewer rows.",
            label(cell),
        )
        for cell in page.code
        if (size := len(json.dumps(cell.outputs, ensure_ascii=False).encode())) > MAX_OUTPUT_BYTES
    ]


GATES: tuple[Gate, ...] = (
    canonical_form,
    no_run_traces,
    every_cell_ran,
    enough_verdicts,
    short_code,
    right_length,
    headings_in_order,
    links_lead_somewhere,
    setup_cell_first,
    parameters_cell,
    no_absolute_paths,
    no_errors_in_outputs,
    plots_are_shown,
    head_is_complete,
    tail_is_complete,
    outputs_are_small,
)

_ABSOLUTE = r"""
    (?<![\w.~-])/(?:home|root|tmp|Users|usr|opt|mnt|media|var|private|content|workspace)
        (?:/[\w.@+-]+|/?(?=["'`\s]|$))
  | \b[A-Za-z]:(?:\\{1,2}|/)(?:Users|Windows|Program|Documents|Temp|tmp)
  | file:///"""


def _assignments(source: str) -> dict[str, object]:
    """Names and literal values set at the top of a cell; anything else counts under its own text."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return {source: None}
    found: dict[str, object] = {}
    for statement in body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=value)):
                found[name] = value
            case _:
                found[ast.unparse(statement)] = None
    return found


def _texts_of(cell: NotebookNode) -> Iterator[tuple[str, str]]:
    yield "the source", cell.source
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            yield "the output", output.text
        elif output.output_type == "error":
            yield "the output", "\n".join(output.traceback)
        else:
            for mime, value in output.data.items():
                if not mime.startswith("image/") or mime == "image/svg+xml":
                    yield "the output", value if isinstance(value, str) else json.dumps(value)


def _draws(cell: NotebookNode) -> bool:
    """Whether a cell draws with pyplot itself (functions that it only defines draw later)."""
    for output in cell.outputs:
        if output.get("data", {}).get("text/plain", "").startswith("<Figure"):
            return True
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "plt"
        and node.func.attr != "close"
        for node in _walk_top_level(cell.source)
    )


def _walk_top_level(source: str) -> Iterator[ast.AST]:
    try:
        waiting: list[ast.AST] = list(ast.parse(source).body)
    except SyntaxError:  # a cell with a magic
        return
    while waiting:
        node = waiting.pop()
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield node
            waiting += ast.iter_child_nodes(node)


def _ends_with_show(source: str) -> bool:
    lines = [line for line in source.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return bool(lines) and lines[-1].strip() == "plt.show()"


def _item(source: str, name: str) -> str:
    found = re.search(rf"^[-*] \*\*{re.escape(name)}:?\*\*[: ]*(.*(?:\n {{2,}}.*)*)", source, re.MULTILINE)
    return found[1].strip() if found else ""


def _folding_fault(section: str) -> str:
    counts = Counter(re.findall(r"<(/?(?:details|summary))>", section))
    if not counts["details"]:
        return "no folded answer, or one that is open from the start"
    if len({counts[tag] for tag in ("details", "/details", "summary", "/summary")}) > 1:
        return "a <details> or <summary> is not closed"
    if re.search(r"</summary>[^\n]*\n(?!\s*\n)", section) or re.search(r"[^\n]\n</details>", section):
        return "Markdown inside <details> needs a blank line before and after it"
    return ""
