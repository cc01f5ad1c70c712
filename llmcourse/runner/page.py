"""A notebook as its gates read it: headings, links, names and the cells that state a verdict."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token
from nbformat import NotebookNode

from llmcourse.runner import canonical

# nbval's own tags and comments, in the spelling of nbval.
UNCHECKED_TAGS = frozenset({"nbval-ignore-output", "nbval-skip"})
UNCHECKED_COMMENTS = frozenset({"NBVAL_IGNORE_OUTPUT", "NBVAL_SKIP", "PYTEST_VALIDATE_IGNORE_OUTPUT"})

_MARKDOWN = MarkdownIt("commonmark").enable("table")
_BARE_URL = re.compile(r"\bhttps?:[^\s<>)\]]*[^\s<>)\].,;:!?]")


@dataclass(frozen=True)
class Heading:
    """A heading of the notebook; `anchor` is what a link to it says after the `#`, in JupyterLab's form."""

    cell: str
    level: int
    text: str

    @property
    def anchor(self) -> str:
        return self.text.replace(" ", "-")


@dataclass(frozen=True)
class Link:
    """The target of a link, a picture or a bare address in a Markdown cell."""

    cell: str
    target: str


@dataclass(frozen=True)
class Page:
    """A notebook, where it lies, and its text on disk."""

    path: Path
    nb: NotebookNode
    text: str

    @classmethod
    def open(cls, path: Path) -> Page:
        nb = canonical.read(path)
        return cls(path, nb, path.read_bytes().decode())

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def code(self) -> list[NotebookNode]:
        return [cell for cell in self.nb.cells if cell.cell_type == "code"]

    @property
    def markdown(self) -> list[NotebookNode]:
        return [cell for cell in self.nb.cells if cell.cell_type == "markdown"]

    @cached_property
    def headings(self) -> list[Heading]:
        found = []
        for cell in self.markdown:
            for mark, inline in _pairs(cell.source):
                if mark.type == "heading_open":
                    found.append(Heading(label(cell), int(mark.tag[1]), _plain(inline)))
        return found

    @cached_property
    def links(self) -> list[Link]:
        return [Link(label(cell), target) for cell in self.markdown for target in _targets(cell.source)]

    def section(self, title: str) -> str:
        """The Markdown from the heading called `title` to the next heading of its level or above."""
        lines: list[str] = []
        level = 0
        for cell in self.markdown:
            starts = {
                token.map[0]: (int(token.tag[1]), _plain(inline))
                for token, inline in _pairs(cell.source)
                if token.type == "heading_open" and token.map
            }
            for number, line in enumerate(cell.source.splitlines()):
                if number in starts:
                    depth, text = starts[number]
                    if level and depth <= level:
                        return "\n".join(lines)
                    if text == title and not level:
                        level = depth
                        continue
                if level:
                    lines.append(line)
        return "\n".join(lines)


def label(cell: NotebookNode) -> str:
    return str(cell.get("id") or "without an id")


def is_checked(cell: NotebookNode) -> bool:
    """Whether nbval would compare this code cell's output."""
    lines = [line.strip() for line in cell.source.splitlines()]
    comments = {line.lstrip("#").strip() for line in lines if line.startswith("#")}
    return not (UNCHECKED_TAGS & set(cell.metadata.get("tags", [])) or UNCHECKED_COMMENTS & comments)


def texts(cell: NotebookNode) -> list[str]:
    """The text a cell printed or returned; the text that stands for a picture does not count."""
    found = []
    for output in cell.outputs:
        if output.output_type == "stream":
            found.append(output.text)
        elif not any(mime.startswith("image/") for mime in output.get("data", {"image/": ""})):
            found.append(output.data.get("text/plain", ""))
    return [text for text in found if text.strip()]


def verdict_cells(nb: NotebookNode) -> list[NotebookNode]:
    """The code cells whose stored text is held against a fresh run."""
    return [cell for cell in nb.cells if cell.cell_type == "code" and is_checked(cell) and texts(cell)]


def _pairs(source: str) -> Iterator[tuple[Token, Token]]:
    tokens = _MARKDOWN.parse(source)
    return pairwise(tokens)


def _plain(inline: Token) -> str:
    return "".join(child.content for child in inline.children or [] if child.type in ("text", "code_inline"))


def _targets(source: str) -> Iterator[str]:
    html = _HtmlTargets()
    for token in _MARKDOWN.parse(source):
        if token.type == "html_block":
            html.feed(token.content)
        linked = 0
        for child in token.children or []:
            linked += child.nesting if child.type in ("link_open", "link_close") else 0
            if child.type == "link_open":
                yield str(child.attrs["href"])
            elif child.type == "image":
                yield str(child.attrs["src"])
            elif child.type == "html_inline":
                html.feed(child.content)
            elif child.type == "text" and not linked:
                yield from _BARE_URL.findall(child.content)
    yield from html.found


class _HtmlTargets(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("href", "src") and value]
