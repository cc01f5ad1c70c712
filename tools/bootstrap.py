"""Make `.venv` ready for the course: what `make start` and `make test` do first.

    python tools/bootstrap.py --extras notebook [--torch auto|cpu|cuda] [--exact-python]

Only the standard library is used, since nothing is installed yet. Every step looks at what is there
before it acts, so that the script can be stopped at any moment and run again:

1. `.venv` is kept if its Python runs, is 3.11 to 3.13 and the clone was not moved; else it is rebuilt.
2. Packages that a killed pip left half copied are forgotten, so that pip installs them again.
3. PyTorch first and alone, because there are two builds of one version: PyPI's for Linux brings 3 GB
   of CUDA libraries, which a machine without an NVIDIA GPU does not need.
4. All the rest, at the versions of `constraints.txt`.
5. A stamp inside `.venv` records what was installed from which pins; while it holds, steps 2–4 are skipped.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time

# The only lines that an older Python must understand. The whole file must parse there, so it uses no
# syntax newer than 3.8; what comes below this check may use the library of 3.11.
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(
        "\nPythonError: {} is Python {}.{}.{}.\n"
        "  The course's pinned packages exist for Python 3.11, 3.12 and 3.13 only.\n"
        "  Try installing one of them (python.org, your package manager, or `pyenv install 3.12`), "
        "then: make start PYTHON=python3.12".format(sys.executable, *sys.version_info[:3])
    )

import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
STAMP = VENV / "llmcourse-setup.json"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

PROBE = """
import json, sys
from importlib import metadata
def version(name):
    try: return metadata.version(name)
    except metadata.PackageNotFoundError: return None
try: import pip._internal.cli.main as pip
except Exception: pip = None
print(json.dumps({"python": "%d.%d" % sys.version_info[:2], "pip": pip is not None,
                  "torch": version("torch"), "llmcourse": version("llmcourse")}))
"""

NETWORK_SIGNS = (
    "Retrying (",
    "NewConnectionError",
    "Failed to establish a new connection",
    "Name or service not known",
    "Temporary failure in name resolution",
    "Network is unreachable",
    "ProxyError",
    "ReadTimeoutError",
    "ConnectTimeoutError",
    "IncompleteRead",
    "Connection broken",
    "SSLError",
    "HTTPError",
)


class SetupError(Exception):
    """A set-up that cannot go on: what happened, why, and what to try."""

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(f"{what}\n  {why}\n  Try {fix}")


# ── what is there ────────────────────────────────────────────────────────────────────────────────


def venv_python() -> str:
    return str(VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def child_environment() -> dict[str, str]:
    """The environment without what would point pip at packages outside `.venv`."""
    outside = {"PYTHONHOME", "PYTHONPATH", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_REQUIRE_VIRTUALENV"}
    return {k: v for k, v in os.environ.items() if k not in outside}


def probe() -> dict[str, str | bool | None] | None:
    """What `.venv` holds, or None when its Python does not run."""
    try:
        done = subprocess.run(
            [venv_python(), "-c", PROBE], capture_output=True, text=True, timeout=60, env=child_environment()
        )
        return dict(json.loads(done.stdout))
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def pins_digest() -> str:
    """SHA-256 over the files that decide what is installed."""
    pins = (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    return hashlib.sha256(pins).hexdigest()


def read_stamp() -> dict[str, object]:
    try:
        return dict(json.loads(STAMP.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def write_stamp(extras: set[str]) -> None:
    scratch = STAMP.with_suffix(".tmp")
    stamp = {"pins": pins_digest(), "extras": sorted(extras), "root": str(ROOT)}
    scratch.write_text(json.dumps(stamp, indent=1))
    os.replace(scratch, STAMP)


def has_nvidia_gpu() -> bool:
    """True if the NVIDIA driver answers and lists a GPU; an installed but failing tool does not count."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU " in listed.stdout


# ── pip ──────────────────────────────────────────────────────────────────────────────────────────


def pip(*arguments: str, doing: str) -> None:
    """Run `.venv`'s pip, its progress bars on the screen; raise SetupError with its last lines."""
    command = [venv_python(), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, env=child_environment(), stderr=subprocess.PIPE, text=True, pass_fds=lock_handles()
    )
    said: list[str] = []

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            if line.strip():
                said.append(line.strip())
            if "Retrying (" in line:
                print("  the network does not answer; pip tries again", flush=True)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    listener.join()
    if code:
        raise pip_error(doing, code, said)


def pip_error(doing: str, code: int, said: list[str]) -> SetupError:
    """Say what a failed pip means: no room, no network, or something that only its own words tell."""
    everything = "\n".join(said)
    broken = [line for line in said if any(sign in line for sign in NETWORK_SIGNS)]
    errors = [line for line in said if line.startswith("ERROR")] or said
    last = "".join(f"\n    {line[:200]}" for line in dict.fromkeys([*broken[-1:], *errors[-2:]]))
    what = f"pip stopped with status {code} while {doing}."
    again = "then the same command again: it goes on where it stopped."
    if "No space left on device" in everything or "Errno 28" in everything or "Errno 122" in everything:
        free = shutil.disk_usage(ROOT).free / 1e9
        why = f"The disk is full ({free:.1f} GB free beside .venv; the set-up takes 4 GB, with CUDA 9):{last}"
        return SetupError(
            what, why, "freeing some space (TMPDIR=/other/disk moves pip's scratch files), " + again
        )
    if broken:
        why = f"The package index could not be reached, or the connection broke:{last}"
        return SetupError(
            what, why, "checking the network (pip reads PIP_INDEX_URL and HTTPS_PROXY), " + again
        )
    return SetupError(what, f"Its last lines:{last or ' (none)'}", "mending what pip names, " + again)


def offered_versions(package: str) -> list[str] | None:
    """Versions that the configured indexes and folders offer; None if this pip cannot say.

    NOTE: `pip install --dry-run --report` would tell the exact file too, but downloads it first (0.5 GB).
    """
    command = [venv_python(), "-m", "pip", "--disable-pip-version-check", "--no-input", "index", "versions"]
    done = subprocess.run(
        [*command, package], cwd=ROOT, env=child_environment(), capture_output=True, text=True
    )
    for line in done.stdout.splitlines():
        if line.startswith("Available versions:"):
            return [v.strip() for v in line.partition(":")[2].split(",")]
    if any(sign in done.stderr for sign in NETWORK_SIGNS):
        raise pip_error(f"asking for {package}", done.returncode, done.stderr.splitlines())
    return None


# ── the steps ────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Announce a step and say how long it took."""
    print(f"── {text}", flush=True)
    start = time.perf_counter()
    yield
    print(f"   done in {time.perf_counter() - start:.1f} s", flush=True)


_lock_file: list[int] = []


def lock_handles() -> list[int]:
    return _lock_file


def take_lock() -> None:
    """Let one set-up at a time work on this clone.

    The lock is the operating system's, on pyproject.toml, and is passed on to pip: it lasts until both
    this process and the pip that it started have ended, however they end.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    handle = os.open(ROOT / "pyproject.toml", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print("Another set-up of this clone is running: waiting for it.", flush=True)
        fcntl.flock(handle, fcntl.LOCK_EX)
    _lock_file.append(handle)


def remove_venv() -> None:
    if VENV.is_symlink() or VENV.is_file():
        VENV.unlink()
    elif VENV.exists():
        shutil.rmtree(VENV)


def ensure_venv(exact_python: bool) -> None:
    """Leave a `.venv` whose Python and pip run, keeping the one there is if it will do."""
    found = probe()
    wanted = "{}.{}".format(*sys.version_info[:2])
    reason = None
    if found is None:
        reason = "its Python does not run" if VENV.exists() or VENV.is_symlink() else "there is none yet"
    elif exact_python and found["python"] != wanted:
        reason = f"it has Python {found['python']}, not {wanted}"
    elif found["python"] not in ("3.11", "3.12", "3.13"):
        reason = f"it has Python {found['python']}"
    elif read_stamp().get("root", str(ROOT)) != str(ROOT):
        reason = "the clone was moved or copied"
    elif not found["pip"]:
        with step("putting pip back into .venv"):
            for record in site_packages("pip-*.dist-info"):  # else ensurepip takes pip for installed
                shutil.rmtree(record)
            command = [venv_python(), "-m", "ensurepip", "--upgrade"]
            subprocess.run(command, capture_output=True, env=child_environment())
        reason = None if (probe() or {}).get("pip") else "it has no pip"
    if reason is None:
        return
    with step(f"building .venv with Python {platform.python_version()} ({reason})"):
        remove_venv()
        made = subprocess.run(
            [sys.executable, "-m", "venv", VENV], capture_output=True, text=True, env=child_environment()
        )
        if made.returncode:
            said = (made.stderr.strip() or made.stdout.strip() or "nothing").splitlines()
            remove_venv()
            if any("ensurepip" in line for line in said):
                raise SetupError(
                    f"{sys.executable} cannot make a virtual environment.",
                    "Its venv module comes in a package of its own on Debian and Ubuntu.",
                    f"sudo apt-get install python{wanted}-venv, or another Python: make start PYTHON=…",
                )
            raise SetupError(
                f"python -m venv stopped with status {made.returncode}.",
                f"It said: {said[-1][:200]}",
                "another Python (make start PYTHON=…), or check the space on this disk.",
            )


def site_packages(pattern: str) -> list[Path]:
    """What matches in `.venv`'s folder of packages."""
    folders = [*VENV.glob("lib/python3*/site-packages"), *VENV.glob("Lib/site-packages")]
    return [path for folder in folders for path in folder.glob(pattern)]


def forget_half_installed() -> None:
    """Remove what a killed pip left: package records without pip's signature, and set-aside folders.

    pip writes INSTALLER after the last file of a package. Without it, the files may be incomplete,
    but pip would take the package for installed.
    """
    for record in site_packages("*.dist-info"):
        if not (record / "INSTALLER").is_file():
            shutil.rmtree(record, ignore_errors=True)
    for leftover in site_packages("~*"):
        shutil.rmtree(leftover, ignore_errors=True)


def torch_pin() -> str:
    """PyTorch's version in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return next(d.partition("==")[2] for d in project["dependencies"] if d.startswith("torch=="))


def torch_will_do(installed: str | None, build: str) -> bool:
    """Whether the installed PyTorch is the pinned version and the wanted build."""
    base, _, local = (installed or "").partition("+")
    if base != torch_pin():
        return False
    on_linux = platform.system() == "Linux"
    return {"auto": True, "cpu": local == "cpu" or not on_linux, "cuda": local != "cpu"}[build]


def install_torch(build: str) -> None:
    """Install the pinned PyTorch: the CPU build where it is wanted and can be had, else PyPI's."""
    version = torch_pin()
    cpu = f"torch=={version}+cpu"
    alone = ("install", "--no-deps")
    if platform.system() == "Linux" and (build == "cpu" or (build == "auto" and not has_nvidia_gpu())):
        if f"{version}+cpu" in (offered_versions("torch") or []):
            return pip(*alone, cpu, doing="installing PyTorch's CPU build")
        try:
            few = ("--retries", "1", "--timeout", "15")
            return pip(*alone, "--index-url", CPU_INDEX, *few, cpu, doing="installing PyTorch's CPU build")
        except SetupError as error:
            if build == "cpu" or "disk is full" in str(error):
                raise
            print(
                f"  {CPU_INDEX} has no build for this machine or can't be reached.\n"
                "  Installing PyPI's build instead: it runs without a GPU too, but brings 3 GB of CUDA.",
                flush=True,
            )
    # `===` compares text: an installed or offered 2.x.y+cpu is not taken for it.
    exactly = "===" if build == "cuda" else "=="
    pip(*alone, f"torch{exactly}{version}", doing="installing PyTorch")


def set_up(extras: set[str], build: str, exact_python: bool) -> None:
    """Bring `.venv` to the pinned state with these extras, doing only what is not done yet."""
    take_lock()
    ensure_venv(exact_python)
    stamp, found = read_stamp(), probe() or {}
    had = stamp.get("extras")
    had = set(had) if isinstance(had, list) else set()
    torch_ready = torch_will_do(str(found.get("torch") or ""), build)
    if stamp.get("pins") == pins_digest() and extras <= had and found.get("llmcourse") and torch_ready:
        return
    if stamp.get("pins") != pins_digest():  # from here on .venv holds neither the old pins nor the new
        STAMP.unlink(missing_ok=True)
    forget_half_installed()
    pinned = ("-c", "constraints.txt")
    with step("installing the build tool"):
        pip("install", "--quiet", *pinned, "setuptools", doing="installing setuptools")
    if not torch_will_do(str((probe() or {}).get("torch") or ""), build):
        with step(f"installing PyTorch {torch_pin()} ({build})"):
            install_torch(build)
    extras = extras | had
    names = ",".join(sorted(extras))
    with step(f"installing the course and its pinned packages [{names}]"):
        pip("install", "--no-build-isolation", *pinned, "-e", f".[{names}]", doing="installing the packages")
    write_stamp(extras)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make .venv ready for the course.")
    parser.add_argument("--extras", default="notebook", help="comma-separated extras of pyproject.toml")
    parser.add_argument("--torch", default="auto", choices=["auto", "cpu", "cuda"], help="PyTorch's build")
    parser.add_argument(
        "--exact-python", action="store_true", help="rebuild a .venv of another Python version"
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        set_up(set(args.extras.split(",")), args.torch, args.exact_python)
    except SetupError as error:
        print(f"\nSetupError: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"\nSetupError: {error}.\n  The set-up could not write in {ROOT}.\n"
            "  Try freeing space or fixing permissions there, then the same command again.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on where it stopped.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
