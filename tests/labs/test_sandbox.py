"""The sandbox's walls, from inside, for a judge that is root and for one that is an ordinary user."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep

import psutil
import pytest
import walls

import llmcourse
from llmcourse.errors import SandboxError
from llmcourse.grading import sandbox, seccomp
from llmcourse.grading.limits import Limits
from llmcourse.grading.session import Cell, Session

ROOT = Path(llmcourse.__file__).resolve().parents[1]
HERE = Path(__file__).parent


def bubblewrap_works() -> bool:
    """Whether this machine lets bubblewrap do anything at all: then all of ours must work."""
    if shutil.which("bwrap") is None:
        return False
    tried = subprocess.run(["bwrap", "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "true"])
    return tried.returncode == 0


needs_sandbox = pytest.mark.skipif(not bubblewrap_works(), reason="no bubblewrap, or not allowed here")


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files that a submission must not see: a gradebook, the repository's, the machine's."""
    gradebook = tmp_path_factory.mktemp("class") / "gradebook.db"
    gradebook.write_text("marks")
    found = [str(gradebook), str(ROOT / "pyproject.toml"), "/etc/passwd", "/etc/shadow", "/var", "/sys"]
    assert all(map(os.path.exists, found))
    return found


@pytest.fixture(scope="module")
def seen(outside: list[str]) -> dict:
    return walls.facts(outside)


@pytest.fixture(scope="module")
def seen_by_ordinary_user(outside: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The same, where the judge has no privileges: in a mount namespace in which Python and the
    repository can be reached by everybody, as on any ordinary machine."""
    if os.geteuid() != 0:
        pytest.skip("the tests run as an ordinary user already")
    stash = tmp_path_factory.mktemp("stash")
    needed = [Path(p) for p in dict.fromkeys([sys.base_prefix, sys.prefix, str(ROOT)])]
    blocked = {a for p in needed for a in p.parents if not a.stat().st_mode & 0o001}
    lines = ["set -e", "mount --make-rprivate /"]
    for i, path in enumerate(needed):
        lines += [f"mkdir {stash}/{i}", f"mount --bind {path} {stash}/{i}"]
    lines.append(f"exec 9<{stash}")  # still open when something is mounted over its path
    for path in sorted(blocked):
        lines.append(f"[ -x {path}/. ] && mount -t tmpfs -o mode=755 none {path}")
    for i, path in enumerate(needed):
        lines += [f"mkdir -p {path}", f"mount --bind /proc/self/fd/9/{i} {path}"]
    program = f"{sys.executable} {HERE / 'walls.py'} {' '.join(outside)}"
    lines.append(f"cd /; exec setpriv --reuid=1234 --regid=1234 --clear-groups {program}")
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", "\n".join(lines)],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if "SandboxError" in done.stderr or "mount:" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(params=["by this user", "by an ordinary user"])
def found(request: pytest.FixtureRequest) -> dict:
    return request.getfixturevalue("seen" if request.param == "by this user" else "seen_by_ordinary_user")


@needs_sandbox
def test_the_sandbox_can_be_used_wherever_bubblewrap_can() -> None:
    assert sandbox.available() == ""
    sandbox.require()


@needs_sandbox
class TestWalls:
    def test_the_user_is_unprivileged_and_can_gain_nothing(self, found: dict) -> None:
        assert all(number >= 1000 for number in found["ids"][:3])
        assert 0 not in found["ids"]
        assert found["capabilities"] == [0, 0, 0, 0]
        assert found["no new privileges"] == "1"

    def test_there_is_no_network(self, found: dict) -> None:
        assert found["interfaces"] == ["lo"]
        assert found["internet"] == f"OSError {errno.ENETUNREACH}"
        assert found["loopback"].startswith("ConnectionRefusedError")  # the judge's machine listens there
        assert found["abstract socket"].startswith("ConnectionRefusedError")
        assert found["netlink"] == f"OSError {errno.EAFNOSUPPORT}"

    def test_no_other_process_is_in_sight_or_within_reach(self, found: dict) -> None:
        """The judge's environment and its files would be found at the sandbox's own first process."""
        assert len(found["processes"]) == 2
        assert found["first process"] == []
        assert found["open files"] == ["/dev/null", "socket"]
        if seccomp.program():
            assert found["memory of the first process"] == os.strerror(errno.EPERM)

    def test_nothing_of_the_judges_environment_is_passed_on(self, found: dict) -> None:
        assert set(found["environment"]) <= {*sandbox.environment(), "PWD", "LC_CTYPE"}

    def test_only_its_own_folders_can_be_written_to(self, found: dict) -> None:
        own = ("/home/learner", "/tmp", "/dev/shm")
        assert found["writable"]
        assert all(path.startswith(own) for path in found["writable"])

    def test_all_that_it_writes_stays_within_its_share(self, found: dict) -> None:
        written = [bytes_ for bytes_, _ in found["written"]]
        assert all(why == errno.ENOSPC for _, why in found["written"])
        assert 0.9 * 256e6 < sum(written) <= 256e6

    def test_of_the_repository_only_the_package_is_there(self, found: dict, outside: list[str]) -> None:
        # Python itself may lie in the repository: `make start` puts it there.
        python = [p.relative_to(ROOT).parts[0] for p in (Path(sys.prefix),) if p.is_relative_to(ROOT)]
        assert found["beside the package"] == sorted(["llmcourse", *python])
        assert found["outside"] == [False] * len(outside)

    def test_exercises_and_forbidden_modules_are_covered(self, found: dict) -> None:
        assert found["catalog"]
        assert found["exercises"] == []
        assert list(ROOT.glob("llmcourse/labs/lab*/*")), "there is something to cover"
        assert found["hidden"] == {name: [] for name in walls.FORBIDDEN}
        assert all(sandbox.module_paths(name) for name in walls.FORBIDDEN)

    @pytest.mark.skipif(not seccomp.program(), reason="no filter for this processor")
    def test_memory_and_privileges_cannot_be_had_by_rare_system_calls(self, found: dict) -> None:
        refused = ("user namespace", "new process in a user namespace", "shared segment", "mount")
        assert {name: found[name] for name in refused} == dict.fromkeys(refused, os.strerror(errno.EPERM))
        assert found["memfd"] == f"PermissionError {errno.EPERM}"

    def test_no_device_but_the_harmless_ones_is_there(self, found: dict) -> None:
        harmless = {"core", "fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout"}
        assert set(found["devices"]) <= harmless | {"tty", "urandom", "zero"}


@needs_sandbox
class TestHiding:
    def test_a_folder_within_what_python_needs_can_be_hidden(self) -> None:
        command = sandbox.command(["/bin/ls", "/usr/share"], Limits(), hide=[Path("/usr/share")])
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""

    def test_hiding_what_is_not_visible_leaves_no_trace(self, tmp_path: Path) -> None:
        (tmp_path / "solutions").mkdir()
        command = sandbox.command(["/bin/ls", "/tmp"], Limits(), hide=[tmp_path / "solutions"])
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert tmp_path.parts[2] not in listed

    def test_a_module_file_is_hidden_with_its_compiled_form(self) -> None:
        names = {p.suffix for p in sandbox.module_paths("wave")}
        assert names >= {".py"}
        assert sandbox.module_paths("no_such_module_anywhere") == []

    def test_a_module_is_hidden_in_the_packages_of_every_python_in_sight(
        self, tmp_path: Path, monkeypatch
    ) -> None:
        """A submission that adds the base interpreter's packages to its path must not find it there."""
        packages = tmp_path / "base" / "lib" / "python3.11" / "site-packages"
        for name in ("hidden_there", "shown"):
            (packages / name).mkdir(parents=True)
            (packages / name / "answer.py").touch()
        monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "base"))
        look = ["/bin/ls", str(packages / "shown"), str(packages / "hidden_there")]
        command = sandbox.command(look, Limits(), hide=["hidden_there"])
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert listed.count("answer.py") == 1
        assert listed.index("answer.py") > listed.index("shown:")


@needs_sandbox
def test_sandboxes_side_by_side_have_different_users() -> None:
    source = Cell("who", "import os\ndef uid(): return os.getuid()")
    with Session([source], slot=3) as a, Session([source], slot=4) as b:
        assert a.call("uid", ()).value + 1 == b.call("uid", ()).value


@pytest.mark.parametrize("sandboxed", [pytest.param(True, marks=needs_sandbox), False])
def test_a_judge_that_is_killed_takes_the_submission_along(sandboxed: bool, tmp_path: Path) -> None:
    source = "while True: pass"
    if sandboxed:
        source = "import subprocess\nsubprocess.Popen(['sleep', '300'])\n" + source
    program = (
        "from llmcourse.grading.session import Cell, Session\n"
        f"with Session([Cell('loop', {source!r})], sandbox={sandboxed}) as session: session.run()"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    judge = psutil.Popen([sys.executable, "-c", program], env=env, cwd=tmp_path)
    try:
        assert _soon(lambda: any(_spins(p) for p in judge.children(recursive=True)))
        below = judge.children(recursive=True)
        assert len(below) == (4 if sandboxed else 1)  # bwrap, bwrap, python, sleep
    finally:
        judge.kill()
        judge.wait()
    assert _soon(lambda: not any(_lives(p) for p in below))


def _spins(process: psutil.Process) -> bool:
    """Whether it has worked for longer than its start takes."""
    try:
        return process.cpu_times().user > 0.7
    except psutil.Error:
        return False


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _soon(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    until = monotonic() + seconds
    while monotonic() < until:
        if condition():
            return True
        sleep(0.05)
    return False


class TestWhetherItCanBeUsed:
    @pytest.fixture(autouse=True)
    def _asked_afresh(self):
        sandbox._problem.cache_clear()
        yield
        sandbox._problem.cache_clear()

    def test_without_bubblewrap_the_reader_is_told_what_to_install(self, monkeypatch) -> None:
        monkeypatch.setattr(shutil, "which", lambda name: None)
        monkeypatch.setattr(sys, "platform", "linux")
        with pytest.raises(SandboxError) as raised:
            sandbox.require()
        assert "bubblewrap is not installed" in raised.value.what
        for word in ("apt install bubblewrap", "dnf install", "pacman -S", "; or --unsafe"):
            assert word in raised.value.fix

    def test_another_system_than_linux_is_named(self, monkeypatch) -> None:
        monkeypatch.setattr(sys, "platform", "darwin")
        assert "not Linux" in sandbox.available()

    def test_a_sandbox_that_fails_when_tried_is_reported_in_its_own_words(
        self, monkeypatch, tmp_path
    ) -> None:
        fake = tmp_path / "bwrap"
        fake.write_text(
            "#!/bin/sh\n[ $1 = --version ] && echo bubblewrap 0.9.0 && exit\n"
            "echo bwrap: setting up uid map: Permission denied >&2; exit 1\n"
        )
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        with pytest.raises(SandboxError) as raised:
            sandbox.require()
        assert "setting up uid map: Permission denied" in raised.value.what
        assert "apparmor_restrict_unprivileged_userns" in raised.value.fix

    def test_a_bubblewrap_that_is_too_old_is_refused(self, monkeypatch, tmp_path) -> None:
        fake = tmp_path / "bwrap"
        fake.write_text("#!/bin/sh\necho bubblewrap 0.4.1\n")
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        assert "bubblewrap 0.4.1 is too old" in sandbox.available()


def test_the_filter_of_system_calls_is_whole_for_each_processor() -> None:
    """Every jump lands within the program, and the last instruction answers."""
    for machine in seccomp.MACHINES:
        program = seccomp.program(machine)
        steps = [program[i : i + 8] for i in range(0, len(program), 8)]
        assert len(program) % 8 == 0
        for position, step in enumerate(steps):
            code, if_true, if_false = int.from_bytes(step[:2], "little"), step[2], step[3]
            if code & 0x07 == 0x05:
                assert position + 1 + max(if_true, if_false) < len(steps)
        assert int.from_bytes(steps[-1][:2], "little") == seccomp.RETURN
    assert seccomp.program("a machine that nobody has") == b""
