"""The Colab set-up cell and the Colab link, written from one address.

The address of the repository stands once, in `[project.urls] Repository` of pyproject.toml, and the
version once, in `llmcourse.__version__`. Every notebook's set-up cell and link are made from these
two, so a fork changes one line and runs `llmcourse notebooks fix`.

The link is text, not the usual badge image: an image is fetched from the internet each time the
notebook is opened, and the course opens without one.
"""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

import llmcourse
from llmcourse.errors import NotebookError

PYPROJECT = Path(llmcourse.__file__).resolve().parents[1] / "pyproject.toml"

TEMPLATE = """\
# In Colab this cell installs the course, at the version of this page. Elsewhere it does nothing.
import subprocess
import sys

if "google.colab" in sys.modules:
    course = "git+{address}@v{version}"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", course]
    if subprocess.run(command).returncode:
        sys.exit(f"pip could not install {{course}}: its message is above. Try this cell again.")
    from llmcourse.colab import prepare

    prepare()"""


def repository(pyproject: Path = PYPROJECT) -> str:
    """The repository's address, without a trailing slash.

    A checkout answers from its pyproject.toml; an installed package from its metadata, which was
    written from the same line. Raises NotebookError where neither names a repository.
    """
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == "llmcourse":
            return _required(project.get("urls", {}).get("Repository"))
    try:
        urls = metadata.metadata("llmcourse").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        urls = []
    pairs = (url.partition(",") for url in urls)
    return _required(next((url.strip() for label, _, url in pairs if label.strip() == "Repository"), None))


def setup_cell(address: str | None = None) -> str:
    """The source of the first code cell of every notebook."""
    return TEMPLATE.format(address=address or repository(), version=llmcourse.__version__)


def badge(name: str, address: str | None = None, folder: str = "notebooks") -> str:
    """The line of Markdown that opens notebook `name` of `folder` in Colab, at the version of this package.

    Raises NotebookError when the repository is not on GitHub, the only host that Colab opens by link.
    """
    address = address or repository()
    parts = urlsplit(address)
    if parts.netloc != "github.com" or parts.path.count("/") != 2:
        raise NotebookError(
            f"{address} cannot be opened in Colab.",
            "A Colab link names a notebook by its owner and repository on github.com.",
            "an address such as https://github.com/OWNER/REPOSITORY in [project.urls] of pyproject.toml.",
        )
    page = f"blob/v{llmcourse.__version__}/{folder}/{name.removesuffix('.ipynb')}.ipynb"
    return f"[Open in Colab](https://colab.research.google.com/github{parts.path}/{page})"


def _required(address: str | None) -> str:
    if not address:
        raise NotebookError(
            "the address of the course's repository is not known.",
            "The set-up cell and the Colab links are written from it.",
            'adding Repository = "https://github.com/OWNER/REPOSITORY" to [project.urls] of pyproject.toml.',
        )
    return address.rstrip("/").removesuffix(".git")
