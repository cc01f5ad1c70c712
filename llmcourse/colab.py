"""Colab: install what the course needs and the machine lacks, and touch nothing else.

Colab comes with PyTorch, Triton, NumPy and hundreds of packages that were built to work together. To
replace one of them is the usual way to break a notebook in its first cell. So `prepare` installs only
packages that are absent, at the versions that the course pins in its own metadata, never PyTorch or
Triton; and it hands pip the version of every installed package as a constraint, so that a dependency
of something new cannot replace something old.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from llmcourse.errors import CourseError, MissingPackageError, NetworkError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

LEFT_AS_THEY_ARE = frozenset({"torch", "triton"})


def prepare() -> list[str]:
    """Install the missing packages; returns their requirements. Raises NetworkError, MissingPackageError."""
    wanted = missing()
    if wanted:
        _install(wanted)
        importlib.invalidate_caches()
    return wanted


def missing() -> list[str]:
    """The pinned requirements of the course that are not installed here in any version."""
    return [
        f"{requirement.name}{requirement.specifier}"
        for requirement in _requirements()
        if requirement.name not in LEFT_AS_THEY_ARE and not _installed(requirement.name)
    ]


def _requirements() -> list[Requirement]:
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("llmcourse") or []
    except metadata.PackageNotFoundError as error:
        raise MissingPackageError(
            "llmcourse is imported from a folder; it is not installed.",
            "What it needs is read from the installed package.",
            "the set-up cell as it stands in the notebook, or pip install --no-deps . in the repository.",
        ) from error
    found = [Requirement(line) for line in lines]
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _install(wanted: list[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        constraints = Path(scratch) / "constraints.txt"
        constraints.write_text("\n".join(_pins()))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
        done = subprocess.run([*command, *wanted], capture_output=True, text=True)
    if done.returncode:
        raise _pip_error(wanted, done.stderr)


def _pins() -> list[str]:
    """`name==version` of everything installed, but for versions that pip itself would refuse to read."""
    from packaging.version import InvalidVersion, Version

    pins = {}
    for package in metadata.distributions():
        try:
            pins[package.name] = f"{package.name}=={Version(package.version)}"
        except (InvalidVersion, TypeError):
            continue
    return sorted(pins.values())


def _pip_error(wanted: list[str], stderr: str) -> CourseError:
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR:")] or stderr.splitlines()
    last = errors[-1].removeprefix("ERROR: ") if errors else "it gave no reason"
    what = f"pip could not install {', '.join(wanted)}: {last}"
    if "ResolutionImpossible" in stderr:
        return MissingPackageError(
            what,
            "Nothing that is already installed may be replaced, and these do not fit beside it.",
            "Runtime > Disconnect and delete runtime, then the set-up cell again in the fresh one.",
        )
    return NetworkError(
        what,
        "The notebook needs them, and they come from the package index.",
        "the cell again, after checking that this machine reaches the internet.",
    )
