"""Write constraints.txt (for maintainers, after changing a pin).

    .venv/bin/python tools/lock.py           afresh, with Python 3.11 and PyTorch's CPU build
    .venv/bin/python tools/lock.py --add     then with 3.12 and 3.13: adds what only they need

pyproject.toml pins what the course names itself; this file pins all that those packages bring along,
read from the environment it runs in. Left out are the packages of another platform, such as PyTorch's
CUDA libraries: pip adds them there, mostly at versions that PyTorch pins itself.
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
EXTRAS = ("notebook", "cluster", "grade", "test")
ELSEWHERE = re.compile(r"(nvidia|cuda)-|(colorama|pywinpty|appnope)$")

HEADER = """\
# Every package of the course's environment, at the version that it was tested with.
# Written by tools/lock.py from set-ups of [notebook,cluster,grade,test] on Linux; not edited by hand.
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
    """Canonical name → version of the lines of a constraints file that apply to this Python."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    pins = [pin for pin in map(Requirement, lines) if not pin.marker or pin.marker.evaluate()]
    return {str(canonicalize_name(pin.name)): str(pin.specifier).removeprefix("==") for pin in pins}


def unlocked(pins: dict[str, str], needed: dict[str, str]) -> dict[str, str]:
    """What this environment needs and the lock does not hold, the packages of other platforms aside."""
    return {n: v for n, v in needed.items() if n not in pins and not ELSEWHERE.match(n)}


def main() -> int:
    target = ROOT / "constraints.txt"
    needed = closure(direct_requirements())
    if "--add" in sys.argv[1:]:
        text = target.read_text(encoding="utf-8")
        pins = parse(text)
        if wrong := {n: (v, pins[n]) for n, v in needed.items() if pins.get(n, v) != v}:
            print(f"installed and locked versions differ: {wrong}", file=sys.stderr)
            return 1
        only_here = f"; python_version == '{sys.version_info.major}.{sys.version_info.minor}'"
        lines = text.removeprefix(HEADER).splitlines()
        lines += [f"{name}=={version}{only_here}" for name, version in unlocked(pins, needed).items()]
    else:
        lines = [f"{name}=={version}" for name, version in needed.items()]
    target.write_text(HEADER + "".join(f"{line}\n" for line in sorted(lines)), encoding="utf-8")
    print(f"constraints.txt: {len(lines)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
