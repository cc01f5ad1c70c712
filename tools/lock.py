"""Write constraints.txt: `.venv/bin/python tools/lock.py` (for maintainers, after changing a pin).

pyproject.toml pins what the course names itself; this file pins all that those packages bring along,
read from the environment it runs in. It holds what one platform needs (Linux, CPU build of PyTorch):
elsewhere pip adds the few packages of that platform, such as the CUDA libraries, whose versions
PyTorch pins itself.
"""

import re
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("notebook", "cluster", "test")

HEADER = """\
# Every package of the course's environment, at the version that it was tested with.
# Written by tools/lock.py from a fresh set-up of [notebook,cluster,test] on Linux; not edited by hand.
"""


def direct_requirements() -> list[Requirement]:
    """What pyproject.toml asks for, the extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = list(project["dependencies"])
    for extra in EXTRAS:
        lines += project["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def closure(wanted: Iterable[Requirement]) -> dict[str, str]:
    """Canonical name → installed version of these requirements and of all that they require here.

    PyTorch needs setuptools, and so does building the course itself, which is why it is in the lock.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(r, "") for r in wanted]
    while todo:
        requirement, parent_extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": parent_extra}):
            continue
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            distribution = metadata.distribution(name)
            found[name] = distribution.version.partition("+")[0]
            todo += [(Requirement(line), extra) for line in distribution.requires or ()]
    return found


def parse(text: str) -> dict[str, str]:
    """Canonical name → version of the `name==version` lines of a constraints file."""
    pins = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)$", text, re.MULTILINE)
    return {str(canonicalize_name(name)): version for name, version in pins}


def main() -> int:
    pins = closure(direct_requirements())
    text = HEADER + "".join(f"{name}=={version}\n" for name, version in sorted(pins.items()))
    (ROOT / "constraints.txt").write_text(text, encoding="utf-8")
    print(f"constraints.txt: {len(pins)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
