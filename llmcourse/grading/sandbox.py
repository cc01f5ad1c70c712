"""Where submissions run: a bubblewrap sandbox around one process and all that it starts.

    no network    no other processes in sight    no environment of ours    nothing to write but a
    small folder in memory    an unprivileged user without capabilities    fewer system calls

The file system is empty but for Python, its packages and this package, read-only. Of this package the
labs' exercises (with their checks, mistakes and hints) are covered, and so is every module that a lab
forbids. The repository, the gradebook and other submissions are not hidden: they are not there.

Started by root, the process changes to a user of its own (one for each `slot`, since the kernel counts
a user's processes); started by anybody else, it lives in a user namespace. What a whole tree of
processes may use together is watched from outside (`watch`), what one process may use is limited by
the kernel (`limits`).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import site
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import llmcourse
from llmcourse.errors import SandboxError
from llmcourse.grading.limits import MB, Limits

FIRST_UID = 60_600  # of a range that no distribution hands out, and that fits a container's 65,536
SLOTS = 500
HOME = "/home/learner"
FIRST_INSIDE = "/proc/1"
WRITABLE = {HOME: 2, "/tmp": 4, "/dev/shm": 4}  # 1/2, 1/4 and 1/4 of what may be written
OLDEST = (0, 7)  # of bubblewrap: the first that can limit a folder's size

INSTALL = (
    "apt install bubblewrap (Debian, Ubuntu), dnf install bubblewrap (Fedora), pacman -S bubblewrap (Arch)"
)
WHY = (
    "A submission is somebody else's program: outside a sandbox it could read the solutions, "
    "rewrite the gradebook and use the network."
)


# ── whether it can be used ───────────────────────────────────────────────────────────────────────


def available() -> str:
    """Why the sandbox cannot be used on this machine; empty if it can. A sandbox is tried to find out."""
    return _problem()


def require() -> None:
    """Raises SandboxError, with what to install, where the sandbox cannot be used."""
    if problem := available():
        fix = next((hint for sign, hint in HINTS.items() if sign in problem), INSTALL)
        what = f"submissions cannot be run in isolation here: {problem}."
        raise SandboxError(what, WHY, f"{fix}; or --unsafe, if you trust every submission as yourself.")


HINTS = {
    "not Linux": "grading on Linux, in a container or in a virtual machine",
    "uid map": "sysctl kernel.apparmor_restrict_unprivileged_userns=0, as root",
    "Operation not permitted": "allowing user namespaces (in a container: --cap-add SYS_ADMIN "
    "--security-opt seccomp=unconfined --security-opt systempaths=unconfined), or grading as root",
    "Permission denied": "making Python and its packages readable for all users (chmod -R a+rX)",
}


@cache
def _problem() -> str:
    if sys.platform != "linux":
        return f"bubblewrap needs Linux, and this is not Linux ({sys.platform})"
    needed = ["bwrap", "setpriv"] if os.geteuid() == 0 else ["bwrap"]
    if missing := [name for name in needed if shutil.which(name) is None]:
        package = {"bwrap": "bubblewrap", "setpriv": "util-linux (setpriv)"}[missing[0]]
        return f"{package} is not installed"
    told = subprocess.run(["bwrap", "--version"], capture_output=True, text=True).stdout
    if (found := re.search(r"(\d+)\.(\d+)", told)) and tuple(map(int, found.groups())) < OLDEST:
        return f"{told.strip()} is too old, and {'.'.join(map(str, OLDEST))} is needed"
    argv = [sys.executable, "-P", "-s", "-c", "import llmcourse.errors, IPython.core.release, numpy.version"]
    try:
        tried = subprocess.run(
            command(argv, Limits()), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30
        )
    except subprocess.TimeoutExpired:
        return "a sandbox was tried and did not come up within 30 s"
    if tried.returncode:
        said = tried.stderr.strip().splitlines()
        return f"a sandbox was tried and failed ({said[-1] if said else f'exit code {tried.returncode}'})"
    return ""


# ── the command ──────────────────────────────────────────────────────────────────────────────────


def command(
    argv: Sequence[str],
    limits: Limits,
    *,
    hide: Iterable[Path | str] = (),
    slot: int = 0,
    filter_fd: int | None = None,
) -> list[str]:
    """The command line that runs `argv` in a sandbox; open file descriptors are handed through.

    hide        folders and files (Path), modules (str): covered, wherever they would be seen
    slot        which of the users: sandboxes that run side by side need different ones
    filter_fd   an open file with a filter of system calls (see `seccomp`)
    """
    uid = str(FIRST_UID + slot % SLOTS)
    as_root = os.geteuid() == 0
    options = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    options += ["--die-with-parent", "--new-session", "--hostname", "grader", "--cap-drop", "ALL"]
    if as_root:
        options += [w for cap in ("SETUID", "SETGID", "SETPCAP") for w in ("--cap-add", f"CAP_{cap}")]
    else:
        options += ["--unshare-user", "--uid", uid, "--gid", uid]
    options += _file_system(limits, hide)
    options += ["--chdir", HOME, "--clearenv"]
    for name, value in environment().items():
        options += ["--setenv", name, value]
    if filter_fd is not None:
        options += ["--seccomp", str(filter_fd)]
    become = [
        *("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--no-new-privs"),
        *("--inh-caps=-all", "--bounding-set=-all"),
    ]
    return ["bwrap", *options, "--", *(become if as_root else []), *argv]


def environment(home: str = HOME) -> dict[str, str]:
    """All that a submission's process has as its environment. Hashes repeat, so that marks do."""
    from llmcourse.labs.desk import JUDGED_ELSEWHERE

    paths = [str(package_folder().parent), *_package_folders_outside_prefix()]
    return {
        "HOME": home,
        "USER": "learner",
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "TMPDIR": "/tmp",
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "IPYTHONDIR": f"{home}/.ipython",
        "MPLCONFIGDIR": f"{home}/.matplotlib",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        JUDGED_ELSEWHERE: "1",
    }


def package_folder() -> Path:
    """Where this package lies."""
    return Path(os.path.abspath(llmcourse.__file__)).parent


def _package_folders_outside_prefix() -> list[str]:
    """Folders of packages that Python finds beside its own, such as the user's."""
    own = [sys.prefix, sys.base_prefix, "/usr"]
    known = {*site.getsitepackages(), site.getusersitepackages()}
    found = [p for p in sys.path if p in known or Path(p).name in ("site-packages", "dist-packages")]
    return [p for p in dict.fromkeys(found) if os.path.isdir(p) and not _inside(Path(p), map(Path, own))]


@dataclass
class _Mounts:
    """Mounts collected in any order and made from the root down, so that the deeper ones stay visible."""

    memory: dict[Path, int]  # writable folders: size in bytes
    binds: set[Path] = field(default_factory=set)  # seen as they are, read-only
    empty: set[Path] = field(default_factory=set)

    def bind(self, path: Path) -> None:
        if path.exists():
            self.binds.add(path)

    def cover(self, path: Path) -> None:
        """Hide `path` where it can be seen: under its real name or, behind a link, under the given one."""
        for place in (Path(os.path.realpath(path)), path):
            if place.exists() and _inside(place, self.binds):
                self.empty.add(place)
                return

    def options(self) -> list[str]:
        made: set[Path] = {Path("/"), Path("/dev"), Path("/proc")}
        options: list[str] = []
        for place in sorted({*self.binds, *self.empty, *self.memory}, key=lambda p: len(p.parts)):
            for parent in [p for p in reversed(place.parents) if p not in made]:
                if not _inside(parent, self.binds) or _inside(parent, self.empty):
                    options += ["--perms", "0755", "--dir", str(parent)]
                made.add(parent)
            made.add(place)
            if place in self.memory:
                options += ["--size", str(self.memory[place]), "--perms", "1777", "--tmpfs", str(place)]
            elif place not in self.empty:
                options += ["--ro-bind", str(place), str(place)]
            elif place.is_dir():
                options += ["--size", "65536", "--perms", "0755", "--tmpfs", str(place)]
            else:
                options += ["--ro-bind", "/dev/null", str(place)]
        for place in sorted(p for p in self.empty if p.is_dir()):
            options += ["--remount-ro", str(place)]
        return options


def _file_system(limits: Limits, hide: Iterable[Path | str]) -> list[str]:
    # The first process inside is bubblewrap's own. It is outside the filter of system calls, and runs as
    # the same user where the judge is not root: what /proc would give of it must not be reached.
    options: list[str] = ["--dev", "/dev", "--proc", "/proc", "--size", "65536", "--tmpfs", FIRST_INSIDE]
    mounts = _Mounts({Path(folder): limits.scratch_mb * MB // share for folder, share in WRITABLE.items()})
    mounts.bind(Path("/usr"))
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        if os.path.islink(f"/{name}"):
            options += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
        else:
            mounts.bind(Path(f"/{name}"))
    for also in ("/etc/ld.so.cache", "/etc/alternatives", "/etc/fonts", "/nix/store"):
        mounts.bind(Path(also))
    for folder in (sys.base_prefix, sys.prefix, *_package_folders_outside_prefix()):
        mounts.bind(Path(folder))
    for prefix in _prefixes_of_the_interpreter():
        if not _inside(prefix, mounts.binds):
            mounts.bind(prefix)
    package = package_folder()
    if (package.parent / "pyproject.toml").is_file():
        mounts.cover(package.parent)  # a checkout, with solutions, within something that was bound
    mounts.bind(package)
    for exercises in package.glob("labs/lab*"):
        mounts.cover(exercises)
    for hidden in hide:
        found = [hidden] if isinstance(hidden, Path) else module_paths(hidden)
        if isinstance(hidden, str):  # also what our own Python would not find, and a changed sys.path would
            parts = hidden.replace(".", "/")
            found += [
                f / end for f in _package_folders(frozenset(mounts.binds)) for end in (parts, f"{parts}.py")
            ]
        for path in found:
            mounts.cover(path)
    read_only = [word for place in (FIRST_INSIDE, "/dev", "/") for word in ("--remount-ro", place)]
    return [*options, *mounts.options(), *read_only]


@cache
def _package_folders(binds: frozenset[Path]) -> list[Path]:
    """The package folders of every Python in `binds`: the base interpreter's, other environments'."""
    inside = [f"{top}lib*/python3*/*-packages" for top in ("", "local/", "envs/*/", "pkgs/*/")]
    found = {folder for bind in binds for pattern in inside for folder in bind.glob(pattern)}
    return sorted({*found, *(bind for bind in binds if bind.name.endswith("-packages"))})


def _prefixes_of_the_interpreter() -> list[Path]:
    """The installation of each link on the way from `sys.executable` to the program itself."""
    link, prefixes = Path(sys.executable), []
    for _ in range(10):
        prefixes.append(link.parent.parent)
        if not link.is_symlink():
            break
        link = Path(os.path.normpath(link.parent / os.readlink(link)))
    return [p for p in prefixes if p != Path("/")]


def module_paths(name: str) -> list[Path]:
    """The folder of package `name`, or a module's file with its compiled forms; none if not installed."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations:
        return [Path(folder) for folder in spec.submodule_search_locations]
    if not spec.has_location or spec.origin is None:
        return []
    source = Path(spec.origin)
    return [source, *source.parent.glob(f"__pycache__/{source.stem}.*.pyc")]


def _inside(path: Path, folders: Iterable[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)
