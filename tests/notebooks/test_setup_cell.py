"""The set-up cell: nothing happens outside Colab; inside, nothing that Colab has is replaced.

Colab is imitated by a module called `google.colab`, which Colab's own kernel imports before any cell.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

import llmcourse
from llmcourse import colab
from llmcourse.errors import MissingPackageError, NetworkError, NotebookError
from llmcourse.runner.setup_cell import badge, repository, setup_cell

ROOT = Path(__file__).parents[2]
CONFIGURED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_address_and_the_version_are_those_of_pyproject():
    address = CONFIGURED["urls"]["Repository"]
    assert f'"git+{address}@v{CONFIGURED["version"]}"' in setup_cell()
    assert badge("01_backprop") == (
        f"[Open in Colab](https://colab.research.google.com/github{address.removeprefix('https://github.com')}"
        f"/blob/v{CONFIGURED['version']}/notebooks/01_backprop.ipynb)"
    )


def test_a_fork_changes_one_line(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "llmcourse"\n[project.urls]\nRepository = "https://github.com/ada/fork.git/"\n'
    )
    assert repository(tmp_path / "pyproject.toml") == "https://github.com/ada/fork"
    assert "git+https://github.com/ada/fork@v" in setup_cell("https://github.com/ada/fork")


def test_an_installed_package_knows_its_address_from_its_metadata(tmp_path, monkeypatch):
    info = tmp_path / "llmcourse-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: llmcourse\nVersion: 0.1.0\n"
        "Project-URL: Home, https://example.org\nProject-URL: Repository, https://github.com/ada/installed\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert repository(tmp_path / "pyproject.toml") == "https://github.com/ada/installed"


def test_another_projects_pyproject_beside_the_package_is_not_believed(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "other"\n[project.urls]\nRepository = "https://github.com/other/other"\n'
    )
    info = tmp_path / "llmcourse-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: llmcourse\nVersion: 0.1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(NotebookError, match="address of the course's repository is not known"):
        repository(tmp_path / "pyproject.toml")


@pytest.mark.parametrize("address", ["https://gitlab.com/a/b", "https://github.com/only-owner", "b"])
def test_an_address_that_colab_cannot_open_is_refused(address):
    with pytest.raises(NotebookError, match="cannot be opened in Colab"):
        badge("01_backprop", address)


# ── the cell ─────────────────────────────────────────────────────────────────────────────────────────

HARNESS = """
import json, subprocess, sys
called = []
def stub(command, **options):
    called.append(command)
    return subprocess.CompletedProcess(command, {status}, "", "ERROR: no route")
subprocess.run = stub
{imports}
before = set(sys.modules)
try:
    exec({cell!r}, {{"__name__": "__main__"}})
    ended = ""
except SystemExit as error:
    ended = str(error)
heavy = {{"numpy", "torch", "triton", "matplotlib", "IPython"}} & (set(sys.modules) - before)
with open({report!r}, "w") as file:
    json.dump([called, ended, sorted(heavy)], file)
"""


@pytest.fixture
def run_cell(tmp_path):
    """Run the cell in a fresh Python: commands it called, how it ended, heavy imports, what it printed."""
    (tmp_path / "google" / "colab").mkdir(parents=True)
    (tmp_path / "google" / "colab" / "__init__.py").touch()

    def run(*, in_colab: bool, status: int = 0, missing: tuple[str, ...] = ()):
        report = tmp_path / "report.json"
        imports = "import google.colab\n" if in_colab else ""
        if in_colab:  # the installed package, and what Colab lacks of its requirements
            imports += f"import llmcourse.colab\nllmcourse.colab.missing = lambda: {list(missing)!r}\n"
        script = HARNESS.format(status=status, imports=imports, cell=setup_cell(), report=str(report))
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return *json.loads(report.read_text()), done.stdout + done.stderr

    return run


def test_outside_colab_the_cell_does_nothing_and_says_nothing(run_cell):
    assert run_cell(in_colab=False) == ([], "", [], "")


def test_in_colab_the_cell_installs_the_package_without_its_dependencies_then_what_is_missing(run_cell):
    called, ended, heavy, _ = run_cell(in_colab=True, missing=("gguf==0.19.0",))
    package, rest = called
    assert package[1:] == [
        "-m", "pip", "install", "--quiet", "--no-deps",
        f"git+{CONFIGURED['urls']['Repository']}@v{llmcourse.__version__}",
    ]  # fmt: skip
    assert rest[1:5] == ["-m", "pip", "install", "--quiet"]
    assert rest[-1] == "gguf==0.19.0"
    assert (ended, heavy) == ("", [])


def test_in_colab_with_everything_there_only_the_package_is_installed(run_cell):
    called, ended, _, _ = run_cell(in_colab=True)
    assert len(called) == 1
    assert ended == ""


def test_a_failed_installation_ends_the_cell_with_what_to_do(run_cell):
    called, ended, _, _ = run_cell(in_colab=True, status=1)
    assert len(called) == 1
    assert ended.startswith("pip could not install git+https://")
    assert "Try this cell again" in ended


# ── prepare ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def installed(monkeypatch):
    """`installed(requires, have)`: the course's requirements, and the packages of this machine."""

    def imitate(requires: list[str], have: dict[str, str]) -> None:
        def version(name: str) -> str:
            if name not in have:
                raise colab.metadata.PackageNotFoundError(name)
            return have[name]

        class Package:
            def __init__(self, name: str) -> None:
                self.name, self.version = name, have[name]

        monkeypatch.setattr(colab.metadata, "requires", lambda name: requires)
        monkeypatch.setattr(colab.metadata, "version", version)
        monkeypatch.setattr(colab.metadata, "distributions", lambda: map(Package, have))

    return imitate


@pytest.fixture
def pip(monkeypatch):
    """Record pip's calls, with the constraints they were given; `pip.fail(message)` makes it fail."""

    class Pip:
        def __init__(self) -> None:
            self.calls: list[tuple[list[str], list[str]]] = []
            self.error = ""

        def __call__(self, command, **options):
            constraints = Path(command[command.index("--constraint") + 1]).read_text().splitlines()
            self.calls.append((command, constraints))
            return subprocess.CompletedProcess(command, bool(self.error), "", self.error)

    recorder = Pip()
    monkeypatch.setattr(colab.subprocess, "run", recorder)
    return recorder


REQUIRES = [
    "gguf==0.19.0",
    "numpy==2.4.6",
    "torch==2.13.0",
    'triton==3.7.1; sys_platform == "linux"',
    'pywin32==306; sys_platform == "win32"',
    'nbval==0.11.0; extra == "test"',
]


def test_only_absent_packages_are_installed_at_the_courses_pins(installed, pip):
    installed(REQUIRES, {"numpy": "2.0.2", "torch": "2.9.0+cu126", "triton": "3.5.0"})
    assert colab.prepare() == ["gguf==0.19.0"]
    (command, constraints) = pip.calls[0]
    assert command[-1] == "gguf==0.19.0"
    assert constraints == ["numpy==2.0.2", "torch==2.9.0+cu126", "triton==3.5.0"]


def test_torch_and_triton_are_never_installed_even_when_absent(installed, pip):
    installed(REQUIRES, {"gguf": "0.19.0", "numpy": "2.0.2"})
    assert colab.prepare() == []
    assert pip.calls == []


def test_a_version_that_pip_cannot_read_is_no_constraint(installed, pip):
    installed(["gguf==0.19.0"], {"distro-info": "1.1build1-x~y"})
    colab.prepare()
    assert pip.calls[0][1] == []


def test_a_lost_connection_is_an_error_in_three_parts(installed, pip):
    installed(["gguf==0.19.0"], {})
    pip.error = (
        "WARNING: Retrying\nERROR: Could not find a version that satisfies the requirement gguf==0.19.0\n"
    )
    with pytest.raises(NetworkError, match=r"pip could not install gguf==0\.19\.0: Could not find") as error:
        colab.prepare()
    assert "\n  Try the cell again" in str(error.value)


def test_a_package_that_does_not_fit_beside_the_installed_ones_is_named(installed, pip):
    installed(["gguf==0.19.0"], {"numpy": "1.0"})
    pip.error = "ERROR: Cannot install gguf\nERROR: ResolutionImpossible: for help visit\n"
    with pytest.raises(MissingPackageError, match="do not fit beside it"):
        colab.prepare()


def test_a_checkout_that_is_not_installed_says_so(monkeypatch):
    def absent(name):
        raise colab.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(colab.metadata, "requires", absent)
    with pytest.raises(MissingPackageError, match="is not installed"):
        colab.prepare()


# ── for real ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def machine(tmp_path):
    """The Python of a new environment that sees all packages of this one but llmcourse and gguf.

    They lie in a folder of links outside the environment, as Colab's lie outside the user's reach: pip
    counts them as installed and can't remove them.
    """
    lent = tmp_path / "lent"
    lent.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.lower().startswith(("gguf", "llmcourse", "__editable__")):
            (lent / entry.name).symlink_to(entry)
    (lent / "google").unlink(missing_ok=True)
    (lent / "google" / "colab").mkdir(parents=True)
    (lent / "google" / "colab" / "__init__.py").touch()
    venv.create(tmp_path / "venv", symlinks=True)
    own = tmp_path / "venv" / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    (own / "lent.pth").write_text(f"{lent}\n")
    return tmp_path / "venv" / "bin" / "python", own


@pytest.fixture
def published(tmp_path):
    """The address of a git repository that holds this checkout, tagged with its version."""
    source = tmp_path / "published"
    shutil.copytree(ROOT / "llmcourse", source / "llmcourse", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    for command in (
        ["init", "-q"],
        ["add", "-A"],
        ["commit", "-qm", "all"],
        ["tag", f"v{llmcourse.__version__}"],
    ):
        subprocess.run([*git, *command], cwd=source, check=True, capture_output=True)
    return source.as_uri()


def test_for_real_the_cell_installs_the_package_and_what_is_missing_and_leaves_the_rest_alone(
    machine, published
):
    python, own = machine
    # The address comes from the cell itself, so what runs is the cell as it stands in every notebook.
    cell = setup_cell().replace(repository(), published)
    where = "import importlib.metadata as m; print([(d, m.version(d)) for d in ('torch', 'numpy')])"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}

    def run(code: str) -> str:
        done = subprocess.run(
            [python, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    before = run(where)
    run(f"import google.colab\n{cell}\nimport gguf, llmcourse.models")
    assert run(where) == before
    installed = {path.name.partition("-")[0] for path in own.glob("*.dist-info")}
    assert installed == {"gguf", "llmcourse"}
