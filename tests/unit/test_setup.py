"""The set-up: equal pins everywhere, and a bootstrap that can be stopped anywhere and run again."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from outside import ROOT, assert_three_parts
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


lock = load_tool("lock")

# ── pins ─────────────────────────────────────────────────────────────────────────────────────────


def locked() -> dict[str, str]:
    return lock.parse((ROOT / "constraints.txt").read_text())


def conda_pins(text: str) -> tuple[list[str], list[str]]:
    """The conda packages and the lines for pip of an environment.yml."""
    entries = yaml.safe_load(text)["dependencies"]
    for_pip = next(entry["pip"] for entry in entries if isinstance(entry, dict))
    return [entry for entry in entries if isinstance(entry, str)], for_pip


def disagreements(environment: str) -> list[str]:
    """What an environment.yml asks for that pyproject.toml and constraints.txt do not say."""
    packages, for_pip = conda_pins(environment)
    wrong = [p for p in packages if p.split("=")[0] not in ("python", "pip")]
    if not {"-c constraints.txt", "-e .[notebook]"} <= set(for_pip):
        wrong.append("without -c constraints.txt and -e .[notebook]")
    for line in for_pip:
        if not line.startswith("-"):
            pin = Requirement(line)
            if str(pin.specifier) != f"=={locked().get(canonicalize_name(pin.name))}":
                wrong.append(line)
    return wrong


def test_every_direct_pin_is_exact_and_equals_the_lock() -> None:
    for requirement in lock.direct_requirements():
        assert str(requirement.specifier) == f"=={locked()[canonicalize_name(requirement.name)]}", requirement


def test_conda_asks_for_the_same_pins_and_a_python_in_range() -> None:
    text = (ROOT / "environment.yml").read_text()
    assert disagreements(text) == []
    python = next(p.partition("=")[2] for p in conda_pins(text)[0] if p.startswith("python="))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert Requirement(f"python{project['requires-python']}").specifier.contains(f"{python}.0")


def test_a_pin_of_conda_that_differs_is_found() -> None:
    text = (ROOT / "environment.yml").read_text()
    line = "      - -e .[notebook]"
    assert disagreements(text.replace(line, f"{line}\n      - numpy==1.26.4")) == ["numpy==1.26.4"]
    assert disagreements(text.replace(line, f"{line}\n      - numpy=={locked()['numpy']}")) == []
    assert disagreements(text.replace("-c constraints.txt", "--pre"))


def test_the_lock_holds_what_is_installed_and_nothing_unneeded() -> None:
    pins, needed = locked(), lock.closure(lock.direct_requirements())
    assert {name: version for name, version in needed.items() if pins.get(name, version) != version} == {}
    assert lock.unlocked(pins, needed) == {}
    if sys.platform == "linux" and sys.version_info[:2] == (3, 11):  # what the lock is written with
        assert set(pins) - set(needed) == set()


# ── the wrong Python ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("minor", [6, 8, 10])
def test_bootstrap_is_understood_by_an_older_python(minor: int) -> None:
    ast.parse((ROOT / "tools" / "bootstrap.py").read_text(encoding="utf-8"), feature_version=(3, minor))


@pytest.mark.parametrize("version", [(3, 8, 18), (3, 10, 13), (3, 14, 0)])
def test_a_python_out_of_range_is_told_so(version: tuple[int, int, int]) -> None:
    code = f"import runpy, sys; sys.version_info = {version}; runpy.run_path('tools/bootstrap.py')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert_three_parts(done.stderr, "PythonError")
    assert "Python {}.{}.{}".format(*version) in done.stderr


def older_pythons() -> list[str]:
    """Interpreters below 3.11 that this machine really has; a launcher may be there and not run."""
    found = filter(None, map(shutil.which, ("python3.8", "python3.9", "python3.10")))
    return [p for p in found if subprocess.run([p, "-c", ""], capture_output=True).returncode == 0]


@pytest.mark.parametrize("python", older_pythons())
def test_a_real_older_python_is_told_so(python: str) -> None:
    done = subprocess.run([python, "tools/bootstrap.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert_three_parts(done.stderr, "PythonError")


# ── make ─────────────────────────────────────────────────────────────────────────────────────────


def make(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "PYTHON", "TORCH")}
    return subprocess.run(
        ["make", *arguments], cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone without packages, in a folder whose name has a space."""
    folder = tmp_path / "a clone"
    (folder / "tools").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "tools/bootstrap.py"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)


def test_make_alone_says_what_can_be_made() -> None:
    done = make()
    assert done.returncode == 0
    assert all(f"make {target}" in done.stdout for target in ("start", "test", "doctor", "clean"))


def test_make_believes_a_python_only_when_it_ran(clone: Path) -> None:
    shims = clone / "bin"
    for broken in ("python3.12", "python3.13"):
        write_script(shims / broken, "echo 'no such version' >&2; exit 127\n")
    write_script(
        shims / "python3.11", f'[ "$1" = -c ] && exec "{sys.executable}" "$@"; echo "ran: $*"; exit 3\n'
    )
    done = make("start", "TORCH=cpu", cwd=clone, PATH=f"{shims}:/usr/bin:/bin")
    assert done.returncode == 2
    assert "ran: tools/bootstrap.py --extras notebook --torch cpu" in done.stdout
    assert "no such version" not in done.stdout + done.stderr


@pytest.mark.parametrize("python", ["nonesuch", "/bin/false"])
def test_make_names_a_python_that_cannot_be_run(clone: Path, python: str) -> None:
    done = make("start", f"PYTHON={python}", cwd=clone)
    assert done.returncode == 2
    assert_three_parts(done.stderr, "PythonError")
    assert f"{python} cannot be run" in done.stderr


# ── bootstrap, with a pip that only takes notes ──────────────────────────────────────────────────

# Stands for .venv/bin/python. It answers the probe from files beside it, and as pip notes what it is
# asked, fails as told by `fail`, and "installs" by writing those files.
FAKE_PYTHON = """
here="$(dirname "$0")/.."
case "$*" in
*"-m pip"*)
    echo "$*" >> "$here/calls"
    [ -e "$here/slow" ] && sleep "$(cat "$here/slow")"
    case "$*" in
    *"index versions"*)
        [ -e "$here/index" ] && { cat "$here/index"; exit 0; }; echo "Retrying (Retry(total=4)" >&2; exit 1;;
    *download.pytorch.org*) [ -e "$here/no-cpu-index" ] && { echo "Retrying (" >&2; exit 1; };;
    *-e*) [ -e "$here/fail" ] && { cat "$here/fail" >&2; exit 1; }; touch "$here/installed";;
    esac
    case "$*" in *torch==*) echo "$*" | sed 's/.*torch===*//' > "$here/torch";; esac;;
*)
    torch=null; [ -e "$here/torch" ] && torch="\\"$(cat "$here/torch")\\""
    course=null; [ -e "$here/installed" ] && course='"0.1.0"'
    echo "{\\"python\\": \\"3.11\\", \\"pip\\": true, \\"torch\\": $torch, \\"llmcourse\\": $course}";;
esac
"""


class Fake:
    """A clone whose .venv holds the fake Python."""

    def __init__(self, clone: Path) -> None:
        self.clone, self.venv = clone, clone / ".venv"
        write_script(self.venv / "bin" / "python", FAKE_PYTHON)
        write_script(clone / "bin" / "nvidia-smi", "exit 9\n")  # hides a real one, if there is a GPU
        self.version = load_tool("bootstrap").torch_pin()
        self.tell("index", f"torch (9)\nAvailable versions: 9, {self.version}+cpu, {self.version}")

    def tell(self, name: str, text: str = "") -> None:
        (self.venv / name).write_text(text)

    def set_up(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        (self.venv / "calls").write_text("")
        tools = (
            str(self.clone / "bin") + ":/usr/bin:/bin"
        )  # of which nvidia-smi is none, unless a test adds it
        return subprocess.run(
            [sys.executable, "tools/bootstrap.py", *arguments],
            cwd=self.clone,
            env=os.environ | {"PATH": tools},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[str]:
        """pip's commands since the last set-up began, without the flags that all have."""
        lines = (self.venv / "calls").read_text().splitlines()
        return [line.partition("--no-input ")[2] for line in lines]


@pytest.fixture
def fake(clone: Path) -> Fake:
    return Fake(clone)


def on_linux() -> bool:
    return sys.platform == "linux"


@pytest.mark.skipif(not on_linux(), reason="PyTorch has one build elsewhere")
def test_without_a_gpu_a_cpu_build_that_pip_knows_of_is_taken_and_nothing_else_is_asked(fake: Fake) -> None:
    assert fake.set_up().returncode == 0
    assert fake.calls() == [
        "install --quiet -c constraints.txt setuptools",
        "index versions torch",
        f"install --no-deps torch=={fake.version}+cpu",
        "install --no-build-isolation -c constraints.txt -e .[notebook]",
    ]


@pytest.mark.skipif(not on_linux(), reason="PyTorch has one build elsewhere")
def test_else_the_cpu_index_is_asked_for_torch_alone(fake: Fake) -> None:
    fake.tell("index", f"Available versions: 9, {fake.version}")
    assert fake.set_up().returncode == 0
    index = "--index-url https://download.pytorch.org/whl/cpu"
    assert [c for c in fake.calls() if index in c] == [
        f"install --no-deps {index} --retries 1 --timeout 15 torch=={fake.version}+cpu"
    ]


@pytest.mark.skipif(not on_linux(), reason="PyTorch has one build elsewhere")
def test_where_the_cpu_index_cannot_be_reached_pypis_build_is_taken_with_a_word(fake: Fake) -> None:
    fake.tell("index", f"Available versions: {fake.version}")
    fake.tell("no-cpu-index")
    done = fake.set_up()
    assert done.returncode == 0
    assert "Installing PyPI's build instead" in done.stdout
    assert f"install --no-deps torch=={fake.version}" in fake.calls()
    asked_for = fake.set_up("--torch", "cpu")
    assert asked_for.returncode == 1
    assert_three_parts(asked_for.stderr, "SetupError")


def test_with_a_gpu_pypis_build_is_taken(fake: Fake) -> None:
    write_script(fake.clone / "bin" / "nvidia-smi", "echo 'GPU 0: NVIDIA H100'\n")
    assert fake.set_up().returncode == 0
    assert f"install --no-deps torch=={fake.version}" in fake.calls()


@pytest.mark.skipif(not on_linux(), reason="PyTorch has one build elsewhere")
def test_an_nvidia_smi_that_fails_is_no_gpu(fake: Fake) -> None:
    write_script(fake.clone / "bin" / "nvidia-smi", "echo 'GPU access: driver not loaded'; exit 9\n")
    assert fake.set_up().returncode == 0
    assert f"install --no-deps torch=={fake.version}+cpu" in fake.calls()


def test_asking_for_cuda_replaces_a_cpu_build(fake: Fake) -> None:
    fake.set_up()
    assert fake.set_up("--torch", "cuda").returncode == 0
    assert f"install --no-deps torch==={fake.version}" in fake.calls()


def test_a_finished_set_up_calls_pip_for_nothing(fake: Fake) -> None:
    fake.set_up("--extras", "notebook,test")
    again = fake.set_up("--extras", "notebook")
    assert (again.returncode, again.stdout, fake.calls()) == (0, "", [])


def test_a_further_extra_keeps_the_ones_there_are(fake: Fake) -> None:
    fake.set_up("--extras", "notebook")
    fake.set_up("--extras", "test")
    assert fake.calls()[-1].endswith("-e .[notebook,test]")
    assert not any("torch" in call for call in fake.calls())


def test_an_extra_that_could_not_be_added_leaves_the_rest_ready(fake: Fake) -> None:
    fake.set_up("--extras", "notebook")
    fake.tell("fail", "ERROR: no")
    assert fake.set_up("--extras", "test").returncode == 1
    assert fake.set_up("--extras", "notebook").returncode == 0
    assert fake.calls() == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_pin_installs_again(fake: Fake, name: str) -> None:
    fake.set_up()
    with open(fake.clone / name, "a") as file:
        file.write("# changed\n")
    fake.set_up()
    assert fake.calls()[-1].endswith("-e .[notebook]")


@pytest.mark.parametrize(
    ("pip_says", "what"),
    [
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
            "disk is full",
        ),
        (
            "WARNING: Retrying (Retry(total=0\nERROR: No matching distribution found for x",
            "could not be reached",
        ),
        ("ERROR: Cannot install a and b: they conflict", "they conflict"),
    ],
)
def test_a_failing_pip_is_three_parts_with_its_last_words_and_a_rerun_goes_on(
    fake: Fake, pip_says: str, what: str
) -> None:
    fake.tell("fail", pip_says)
    done = fake.set_up()
    assert done.returncode == 1
    assert_three_parts(done.stderr, "SetupError")
    assert what in done.stderr
    assert pip_says.splitlines()[-1] in done.stderr
    (fake.venv / "fail").unlink()
    assert fake.set_up().returncode == 0
    assert not any("torch" in call for call in fake.calls()), "what was installed is not installed again"


@pytest.mark.skipif(not on_linux(), reason="elsewhere pip is not asked what it offers")
def test_no_network_ends_at_the_first_question(fake: Fake) -> None:
    (fake.venv / "index").unlink()
    done = fake.set_up()
    assert done.returncode == 1
    assert_three_parts(done.stderr, "SetupError")
    assert fake.calls()[-1] == "index versions torch"


def test_what_a_killed_pip_left_half_copied_is_forgotten(fake: Fake) -> None:
    site = fake.venv / "lib" / "python3.11" / "site-packages"
    for name in ("whole-1.dist-info", "half-1.dist-info", "~old-1.dist-info"):
        (site / name).mkdir(parents=True)
        (site / name / "METADATA").touch()
    (site / "whole-1.dist-info" / "INSTALLER").write_text("pip")
    fake.set_up()
    assert [p.name for p in site.iterdir()] == ["whole-1.dist-info"]


def test_two_set_ups_of_one_clone_take_turns(fake: Fake) -> None:
    fake.tell("slow", "0.4")
    first = subprocess.Popen(
        [sys.executable, "tools/bootstrap.py"], cwd=fake.clone, stdout=subprocess.PIPE, text=True
    )
    wait_until(lambda: (fake.venv / "calls").exists())
    second = fake.set_up()
    first.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0)
    assert "waiting for it" in second.stdout
    assert not any("-e" in call for call in fake.calls()[3:])


def test_ctrl_c_stops_pip_too_and_says_that_it_can_go_on(fake: Fake) -> None:
    fake.tell("slow", "30")
    running = subprocess.Popen(
        [sys.executable, "tools/bootstrap.py"], cwd=fake.clone, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: (fake.venv / "calls").exists())
    running.terminate()
    _, errors = running.communicate(timeout=20)
    assert running.returncode == 130
    assert "goes on where it stopped" in errors
    assert "Traceback" not in errors


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# ── bootstrap, with real virtual environments ────────────────────────────────────────────────────


def test_a_venv_whose_python_is_gone_is_rebuilt_and_one_without_pip_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = load_tool("bootstrap")
    venv = tmp_path / "a clone" / ".venv"
    monkeypatch.setattr(tool, "VENV", venv)
    monkeypatch.setattr(tool, "STAMP", venv / "stamp.json")

    def ensured() -> str:
        tool.ensure_venv(exact_python=False)
        found = tool.probe()
        assert found is not None
        assert found["pip"] is True
        return capsys.readouterr().out

    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to("/no/such/python")
    assert "its Python does not run" in ensured()
    (venv / "kept").touch()
    assert ensured() == ""
    (next(venv.glob("lib/python3*/site-packages")) / "pip" / "_internal" / "cli" / "main.py").unlink()
    assert "putting pip back" in ensured()
    assert (venv / "kept").exists()


class RebuildError(Exception):
    """Raised in place of a rebuild."""


@pytest.fixture
def tool(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The bootstrap of a clone whose .venv is in order, which raises where it would rebuild it."""

    def rebuild() -> None:
        raise RebuildError

    tool = load_tool("bootstrap")
    monkeypatch.setattr(tool, "VENV", fake.venv)
    monkeypatch.setattr(tool, "STAMP", fake.venv / "stamp.json")
    monkeypatch.setattr(tool, "remove_venv", rebuild)
    tool.ensure_venv(exact_python=False)
    return tool


def test_a_venv_of_a_clone_that_was_moved_is_rebuilt(tool: ModuleType, fake: Fake) -> None:
    fake.tell("stamp.json", '{"root": "/elsewhere"}')
    with pytest.raises(RebuildError):
        tool.ensure_venv(exact_python=False)


@pytest.mark.parametrize(("version", "by_name"), [("3.10", False), ("3.13", True)])
def test_a_venv_of_another_python_is_rebuilt_if_too_old_or_asked_for_by_name(
    version: str, by_name: bool, tool: ModuleType, fake: Fake
) -> None:
    if version == "{}.{}".format(*sys.version_info[:2]):
        version = "3.12"
    write_script(fake.venv / "bin" / "python", f'echo \'{{"python": "{version}", "pip": true}}\'\n')
    with pytest.raises(RebuildError):
        tool.ensure_venv(exact_python=by_name)


def test_a_venv_of_another_python_in_range_is_kept(tool: ModuleType, fake: Fake) -> None:
    write_script(fake.venv / "bin" / "python", 'echo \'{"python": "3.13", "pip": true}\'\n')
    tool.ensure_venv(exact_python=False)


# ── what else a clone needs ──────────────────────────────────────────────────────────────────────


def test_ci_runs_make_test_and_nothing_less() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert script.read_text().rstrip().endswith("make test")
    recipe = make("--dry-run", "test").stdout
    steps = ["assets fetch", "ruff check", "ruff format --check", "mypy", "pytest -n 2 --dist loadfile"]
    positions = [recipe.index(step) for step in steps]
    assert positions == sorted(positions)
    assert "--extras notebook,cluster,grade,test" in recipe


@pytest.mark.parametrize(
    ("there", "installed"),
    [
        (("chromium", "bwrap", "initdb"), ()),
        (("google-chrome", "initdb"), ("bubblewrap",)),
        (("initdb",), ("chromium", "bubblewrap")),
    ],
)
def test_ci_installs_what_pip_does_not_bring_and_is_missing(
    there: tuple[str, ...], installed: tuple[str, ...], tmp_path: Path
) -> None:
    tools, notes = tmp_path / "bin", tmp_path / "notes"
    tools.mkdir()
    for name in ("bash", "dirname", "env"):
        (tools / name).symlink_to(str(shutil.which(name)))
    for name in ("apt-get", "make", *there):
        write_script(tools / name, f'echo "{name} $*" >> "{notes}"\n')
    write_script(tools / "id", "echo 0\n")
    bash = str(shutil.which("bash"))
    done = subprocess.run(
        [bash, ROOT / ".ci" / "run"], env={"PATH": str(tools)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = notes.read_text().splitlines()
    assert said.pop() == "make test"
    assert [line.split()[:2] for line in said] == [["apt-get", "update"], ["apt-get", "install"]] * bool(
        installed
    )
    assert tuple(said[-1].split()[-len(installed) :] if installed else ()) == installed


def test_code_and_prose_have_their_licences() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert "creativecommons.org/licenses/by/4.0" in (ROOT / "LICENSE-prose").read_text()
