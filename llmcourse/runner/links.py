"""Whether a link in a notebook leads anywhere, found out without going online."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

from llmcourse.runner.page import Page

_HOST = re.compile(r"(?:[\w-]+\.)+[a-z]{2,}(?::\d+)?")
_NEVER_IN_A_URL = re.compile(r"[\s<>\"{}|\\^`]")
_ARXIV_MENTION = re.compile(r"(?:arxiv:|arxiv\.org/(?:abs|pdf)/)\s*([^\s)\]>,;]*)", re.IGNORECASE)
_MONTH = r"\d\d(?:0[1-9]|1[0-2])"
_ARXIV_ID = re.compile(rf"{_MONTH}\.\d{{4,5}}(?:v\d+)?|[a-z-]+(?:\.[A-Z]{{2}})?/{_MONTH}\d{{3}}(?:v\d+)?")


def link_fault(page: Page, target: str) -> tuple[str, str, str] | None:
    """What is wrong with a link of `page`, why that matters and what to try; None for a sound one."""
    parts = urlsplit(target)
    if parts.scheme in ("http", "https") or parts.netloc:
        return _web_fault(target)
    if parts.scheme:
        return (
            f"has the scheme {parts.scheme}",
            "Notebooks link to the web, to files and to headings.",
            "an https or a relative link.",
        )
    goal = page
    if parts.path:
        path = page.path.parent / unquote(parts.path)
        if parts.path.startswith("/") or not path.exists():
            return (
                "leads to no file",
                "It is looked up from the notebook's own folder.",
                "the right relative path, or leaving the link out until the file is there.",
            )
        if path.suffix != ".ipynb":
            return None
        goal = Page.open(path)
    anchors = {heading.anchor for heading in goal.headings}
    if parts.fragment and unquote(parts.fragment) not in anchors:
        return (
            "leads to no heading",
            "An anchor is the heading's text with a dash for each space, capitals kept.",
            "one of: " + ", ".join(f"#{anchor}" for anchor in sorted(anchors)) + ".",
        )
    return None


def malformed_arxiv_ids(source: str) -> list[str]:
    """The numbers after `arXiv:` or in an arXiv address that no paper can have."""
    mentions = (mention.rstrip(".").removesuffix(".pdf") for mention in _ARXIV_MENTION.findall(source))
    return [mention for mention in mentions if not _ARXIV_ID.fullmatch(mention)]


def _web_fault(target: str) -> tuple[str, str, str] | None:
    parts = urlsplit(target)
    if parts.scheme != "https":
        return "is not https", "An unprotected page can be altered on the way.", "the https address."
    if not _HOST.fullmatch(parts.netloc) or _NEVER_IN_A_URL.search(target):
        return "is no web address", "A browser would not find its host.", "copying it from the browser."
    return None
