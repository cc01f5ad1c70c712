"""`llmcourse run`: every way in which a notebook can fail is named, and nothing is left behind."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell
from notebook_maker import alive, printed, write_notebook
from rich.console import Console

from llmcourse.cli import main
from llmcourse.errors import NotebookError, UnknownNameError
from llmcourse.runner import Event, Outcome, execute, execute_all
from llmcourse.runner.discover import discover, unique_names
from llmcourse.runner.outcome import CellError, CellRun
from llmcourse.runner.pool import available_mb, fits, places_for
from llmcourse.runner.progress import Bars, Lines
from llmcourse.runner.report import write_report

SAY_WHO = "import os, sys, time\nprint('kernel', os.getpid(), flush=True)"  # cell 3 of every notebook below
TIMEOUT = 4.0

# name: (cells from the fourth on, kind of failure or None, the cell that fails, words of the message)
BANK: dict[str, tuple[list[str | nbformat.NotebookNode], str | None, int | None, list[str]]] = {
    "fine": (["ballast = b'x' * 150_000_000\nprint(device, scale)"], None, None, []),
    "expects_an_error": ([new_code_cell("1 / 0", metadata={"tags": ["raises-exception"]})], None, None, []),
    "raises": (
        [new_markdown_cell("text"), "values = [1]\nvalues[3]", "print('never')"],
        "error", 5, ["IndexError: list index out of range"],
    ),
    "does_not_parse": (["def f(:"], "error", 4, ["SyntaxError"]),
    "hangs": (["print('before', flush=True)\ntime.sleep(100)"], "timeout", 4, ["more than 4 s"]),
    "will_not_be_interrupted": (
        ["while True:\n    try:\n        time.sleep(100)\n    except KeyboardInterrupt:\n        pass"],
        "timeout", 4, ["more than 4 s"],
    ),
    "kills_its_kernel": (["os._exit(3)"], "died", 4, ["exit code 3"]),
    "is_killed": (["os.kill(os.getpid(), 9)"], "died", 4, ["SIGKILL", "memory"]),
    "kills_its_worker": (["os.kill(os.getppid(), 9)\ntime.sleep(100)"], "worker", 4, ["SIGKILL"]),
    "prints_for_ever": (["while True:\n    print('x' * 1000)"], "output", 4, ["16 MB"]),
    "calls_exit": (["exit()", "print('never')"], "exit", 4, ["exit()"]),
    "calls_sys_exit": (["sys.exit(0)", "print('never')"], "exit", 4, ["sys.exit(0)"]),
    "has_no_kernel": ([], "start", None, ["'nonesuch'", "python3"]),
    "has_a_broken_kernel": ([], "start", None, ["twice"]),
    "leaves_processes": (
        [
            "import subprocess\nfor own_session in (False, True):\n"
            "    child = subprocess.Popen(['sleep', '300'], start_new_session=own_session)\n"
            "    print('child', child.pid)\ntime.sleep(1)"
        ],
        None, None, [],
    ),
}  # fmt: skip
KERNELS = {"has_no_kernel": "nonesuch", "has_a_broken_kernel": "broken"}


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Every notebook of the bank, in one run."""
    folder = tmp_path_factory.mktemp("bank")
    spec = {"argv": [sys.executable, "-c", "raise SystemExit(1)"], "display_name": "x", "language": "python"}
    (folder / "kernels" / "broken").mkdir(parents=True)
    (folder / "kernels" / "broken" / "kernel.json").write_text(json.dumps(spec))
    paths = [
        write_notebook(folder / f"{name}.ipynb", SAY_WHO, *cells, kernel=KERNELS.get(name, "python3"))
        for name, (cells, *_) in BANK.items()
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder))
        outcomes = execute_all(
            paths, parameters={"scale": "ci"}, jobs=2, cell_timeout=TIMEOUT, out=folder / "out"
        )
    assert [o.name for o in outcomes] == list(BANK)
    return {o.name: o for o in outcomes}


@pytest.mark.parametrize("name", BANK)
def test_a_failure_is_named_by_kind_cell_and_reason(bank: dict[str, Outcome], name: str) -> None:
    _, kind, cell, words = BANK[name]
    outcome = bank[name]
    if kind is None:
        assert outcome.error is None
        assert outcome.ok
        return
    assert not outcome.ok
    assert outcome.error is not None
    assert (outcome.error.kind, outcome.error.cell) == (kind, cell)
    assert all(word in outcome.error.message for word in words), outcome.error.message
    if cell is not None:
        source = nbformat.read(outcome.executed_path.parents[1] / f"{name}.ipynb", 4).cells[cell - 1].source
        assert outcome.error.source == source
        assert outcome.error.line == source.splitlines()[0]


@pytest.mark.parametrize("name", [name for name in BANK if BANK[name][1] != "start"])
def test_no_process_outlives_its_notebook(bank: dict[str, Outcome], name: str) -> None:
    told = [line.split() for line in printed(bank[name].executed_path).splitlines()]
    pids = [int(words[1]) for words in told if words[0] in ("kernel", "child")]
    assert len(pids) == (3 if name == "leaves_processes" else 1)
    assert [pid for pid in pids if alive(pid)] == []


@pytest.mark.parametrize("name", BANK)
def test_the_executed_copy_is_whole_and_holds_what_ran(bank: dict[str, Outcome], name: str) -> None:
    path = bank[name].executed_path
    assert path is not None
    nbformat.validate(nbformat.read(path, as_version=4))
    assert "never" not in printed(path)
    assert [p for p in path.parent.iterdir() if p.suffix != ".ipynb"] == []


def test_what_a_cell_printed_before_it_was_stopped_is_kept(bank: dict[str, Outcome]) -> None:
    assert "before" in printed(bank["hangs"].executed_path)
    assert len(printed(bank["prints_for_ever"].executed_path)) > 10_000_000


def test_parameters_are_injected_as_far_as_the_notebook_declares_them(bank: dict[str, Outcome]) -> None:
    assert "cpu ci" in printed(bank["fine"].executed_path)


def test_memory_and_time_are_measured(bank: dict[str, Outcome]) -> None:
    assert 150 < bank["fine"].peak_mb < 1000
    assert 0.9 < sum(cell.seconds for cell in bank["leaves_processes"].cells) < TIMEOUT
    assert [cell.cell for cell in bank["raises"].cells] == [2, 2, 3, 5]  # the injected cell counts as 2
    assert [cell.ok for cell in bank["raises"].cells] == [True, True, True, False]


def test_the_traceback_has_no_terminal_colours(bank: dict[str, Outcome]) -> None:
    assert "values[3]" in bank["raises"].error.traceback
    assert "\x1b" not in bank["raises"].error.traceback


def test_widgets_that_capture_output_do_not_stall(tmp_path: Path) -> None:
    output = (
        "out = W.Output()\ndisplay(out)\nwith out:\n    print({0})\n"
        "out.clear_output()\nwith out:\n    print({0})"
    )
    path = write_notebook(
        tmp_path / "widgets.ipynb",
        "import ipywidgets as W\nfrom IPython.display import display",
        *[f"W.interact(lambda x: print({i} * x), x=(0, 10));" for i in range(10)],
        *[output.format(i) for i in range(50)],
    )
    outcome = execute(path, tmp_path / "out", cell_timeout=60)
    assert outcome.ok, outcome.error
    assert len(outcome.cells) == 62
    assert max(cell.seconds for cell in outcome.cells) < 5
    state = nbformat.read(outcome.executed_path, 4).metadata.widgets
    assert "49" in json.dumps(state)


def test_numbers_count_the_cells_of_the_source_without_a_parameters_cell_too(tmp_path: Path) -> None:
    path = write_notebook(tmp_path / "bare.ipynb", "print(1)", "1 / 0", parameters=None)
    outcome = execute(path, tmp_path / "out", parameters={"device": "cpu", "scale": "ci"})
    assert outcome.error.cell == 3
    assert outcome.error.index == 2
    assert str(outcome.error) == "cell 3 (`1 / 0`): ZeroDivisionError: division by zero"


def test_an_executed_copy_never_replaces_its_source(course: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = course / "notebooks" / "01_backprop.ipynb"
    before = source.read_bytes()
    assert main(["run", "01", "--out", "notebooks"]) == 1
    assert "would lie where 01_backprop.ipynb itself lies" in capsys.readouterr().err
    with pytest.raises(NotebookError):
        execute(source, course / "notebooks")
    assert source.read_bytes() == before


# ── several at once ──────────────────────────────────────────────────────────────────────────────


def test_notebooks_run_at_once_in_an_environment_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine.json"
    monkeypatch.setenv("LLMCOURSE_PROGRESS", str(mine))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    meet = (
        "import os, time\nfrom pathlib import Path\nfrom llmcourse.course import mark_read\n"
        "Path('{0}.here').touch()\nend = time.time() + 30\n"
        "while not Path('{1}.here').exists():\n    assert time.time() < end\n    time.sleep(0.05)\n"
        "print(mark_read('01'))\n"
        "print(os.environ['OMP_NUM_THREADS'], os.environ['PYTHONHASHSEED'], os.getcwd())"
    )
    paths = [
        write_notebook(tmp_path / "src" / f"{one}.ipynb", meet.format(one, other))
        for one, other in (("a", "b"), ("b", "a"))
    ]
    outcomes = execute_all(paths, parameters={}, jobs=2, out=tmp_path / "out")
    assert [o.error for o in outcomes] == [None, None]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    for outcome in outcomes:
        assert f"{threads} 0 {tmp_path / 'src'}" in printed(outcome.executed_path)
        assert "Read: 01_backprop" in printed(outcome.executed_path)
    assert not mine.exists()


def test_notebooks_that_do_not_fit_in_memory_together_take_turns(tmp_path: Path) -> None:
    paths = [write_notebook(tmp_path / f"{n}.ipynb", "1", memory_mb=1e9) for n in "ab"]
    events: list[tuple[str, str]] = []
    execute_all(
        paths, parameters={}, jobs=2, out=tmp_path / "out", on_event=lambda e: events.append((e.kind, e.name))
    )
    marks = [event for event in events if event[0] in ("started", "finished")]
    assert marks == [("started", "a"), ("finished", "a"), ("started", "b"), ("finished", "b")]


@given(st.lists(st.tuples(st.floats(0, 1e4), st.floats(0, 1e4))), st.floats(1, 1e4), st.floats(0, 1e5))
def test_what_running_notebooks_expect_is_never_given_away(
    running: list[tuple[float, float]], need: float, available: float
) -> None:
    if fits(need, running, available):
        left = available - need
        for expected, held in running:
            left -= max(0.0, expected - held)
        assert left >= -1e-6


def test_memory_that_a_container_is_denied_is_not_available(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("2000000000\n")
    (tmp_path / "memory.current").write_text("1800000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 300000000\n")
    assert available_mb(tmp_path) == pytest.approx(500)
    (tmp_path / "memory.max").write_text("max\n")
    assert available_mb(tmp_path) > 500


def test_jobs_are_bounded_by_notebooks_and_must_be_positive() -> None:
    assert places_for(8, 3) == 3
    assert places_for(1, 3) == 1
    with pytest.raises(NotebookError, match="--jobs 0"):
        places_for(0, 3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_takes_its_kernels_with_it(tmp_path: Path, number: signal.Signals) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    write_notebook(
        tmp_path / "slow.ipynb",
        "import os\nopen('pid', 'w').write(str(os.getpid()))",
        "import time; time.sleep(300)",
    )
    run = subprocess.Popen(
        [sys.executable, "-m", "llmcourse.cli", "run", "slow.ipynb", "--out", "out"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(scratch)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # A shell that starts the tests in the background has them ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        kernel = int((tmp_path / "pid").read_text())
        assert alive(kernel)
        run.send_signal(number)
        _, said = run.communicate(timeout=60)
        wait_until(lambda: not alive(kernel))
        wait_until(lambda: not list(scratch.glob("llmcourse-*")))
    finally:
        run.kill()
    if number is signal.SIGKILL:
        return
    assert run.returncode == 130
    assert b"Stopped." in said
    assert b"Traceback" not in said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["notebooks"][0]["status"] == "stopped"


# ── names ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with two notebooks in notebooks/."""
    monkeypatch.chdir(tmp_path)
    for name in ("00_start_here", "01_backprop"):
        write_notebook(tmp_path / "notebooks" / f"{name}.ipynb", "print(device, scale)", memory_mb=700)
    return tmp_path


@pytest.mark.parametrize(
    "name", ["1", "01", "backprop", "01_backprop", "01_backprop.ipynb", "notebooks/01_backprop.ipynb"]
)
def test_a_notebook_is_found_by_number_name_or_path(course: Path, name: str) -> None:
    (found,) = discover([name, "01"])
    assert found.path == course / "notebooks" / "01_backprop.ipynb"
    assert (found.name, found.memory_mb) == ("01_backprop", 700)


def test_no_name_means_every_notebook_in_order(course: Path) -> None:
    assert [notebook.name for notebook in discover([])] == ["00_start_here", "01_backprop"]


@pytest.mark.parametrize("name", ["nonesuch", "07", "elsewhere/x.ipynb"])
def test_an_unknown_name_lists_what_there_is_and_exits_1(
    course: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["run", name]) == 1
    said = capsys.readouterr().err
    assert "UnknownNameError" in said
    assert "Try one of 00_start_here, 01_backprop." in said
    assert not (course / "build").exists()


def test_a_folder_without_notebooks_is_said_to_be_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownNameError, match="no notebook in"):
        discover([])


def test_a_course_notebook_must_declare_its_parameters(course: Path) -> None:
    write_notebook(course / "notebooks" / "01_backprop.ipynb", parameters='device = "cpu"')
    (course / "notebooks" / "00_start_here.ipynb").write_text("{half a fi")
    with pytest.raises(NotebookError) as caught:
        discover([])
    assert "2 of 2" in caught.value.what
    assert "01_backprop.ipynb: no parameter scale" in caught.value.why
    assert "00_start_here.ipynb: NotJSONError" in caught.value.why
    assert discover([str(write_notebook(course / "mine.ipynb", parameters=None))])


def test_files_of_one_name_in_two_folders_get_two_names() -> None:
    assert unique_names([Path("a/x.ipynb"), Path("b/x.ipynb"), Path("y.ipynb")]) == ["x", "x_2", "y"]


# ── what is said and kept ────────────────────────────────────────────────────────────────────────


def test_the_command_reports_and_exits_by_what_happened(
    course: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = r"""raise ValueError('<script>alert(1)</script> \x1b[31mred')"""
    write_notebook(course / "bad one.ipynb", bad)
    assert main(["run", "01", "bad one.ipynb", "--cell-timeout", "60"]) == 1
    out, err = capsys.readouterr()
    assert "01_backprop: ok in" in out
    assert "bad one: cell 3 failed" in out
    assert "NotebookError: 1 of 2 notebooks failed." in err
    assert "bad one: cell 3 (`raise ValueError(" in err
    assert "Try `llmcourse run 'bad one.ipynb' --cell-timeout 60`" in err
    assert "build/run/bad one.ipynb" in err

    report = json.loads((course / "build/run/report.json").read_text())
    assert (report["schema"], report["ok"], report["scale"], report["device"]) == (1, False, "ci", "cpu")
    assert [nb["status"] for nb in report["notebooks"]] == ["ok", "failed"]
    assert report["notebooks"][1]["error"]["cell"] == 3
    assert (course / "build/run" / report["notebooks"][0]["executed"]).is_file()
    assert "papermill" in report["versions"]

    page = Page((course / "build/run/report.html").read_text())
    assert "script" not in page.tags
    assert "<script>alert(1)</script> red" in page.text
    assert "\x1b" not in page.text

    assert main(["run", "01"]) == 0
    assert json.loads((course / "build/run/report.json").read_text())["ok"]


def test_a_report_is_replaced_as_a_whole_and_leaves_no_scratch(tmp_path: Path) -> None:
    asked = {"scale": "ci", "device": "cpu", "jobs": None, "cell_timeout": 1.0, "cluster": None}
    error = CellError("error", "E: <b>", 2, "line", "source & more", "trace")
    outcome = Outcome("n", False, 1.0, None, error, [CellRun(2, "x < y", 0.5, False)], 3, 12.0, "host", 2)
    for _ in range(2):
        write_report(tmp_path, [outcome], seconds=1.0, asked=asked)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]
    page = Page((tmp_path / "report.html").read_text())
    assert "b" not in [tag for tag in page.tags if page.tags.count(tag) > 1]
    assert "E: <b>" in page.text
    assert "source & more" in page.text
    assert Outcome.from_dict(outcome.as_dict()) == outcome


EVENTS = [
    Event("started", "n", total=2),
    Event("cell", "n", cell=2, line="first [bold]line[/bold]"),
    Event("cell_done", "n", cell=2, seconds=1.0),
    Event("cell", "n", cell=3, line="second"),
    Event("cell_done", "n", cell=3, line="second", seconds=2.0, ok=False),
    Event("finished", "n", seconds=3.0, ok=False, message="cell 3 (`second`): no"),
]


def test_a_log_gets_plain_lines() -> None:
    log = io.StringIO()
    with Lines(1, log) as shown:
        for event in EVENTS:
            shown(event)
    assert log.getvalue().splitlines() == [
        "n: started, 2 cells",
        "n: cell 3 failed after 2.0 s: second",
        "n: FAILED after 3.0 s: cell 3 (`second`): no [1/1]",
    ]


def test_a_terminal_gets_a_bar_with_the_current_cell() -> None:
    screen = io.StringIO()
    with Bars(1, Console(file=screen, force_terminal=True, width=120)) as shown:
        for event in EVENTS:
            shown(event)
            shown.progress.refresh()
    assert "first [bold]line[/bold]" in screen.getvalue()
    assert "1/2" in screen.getvalue()
    assert "FAILED after 3.0 s: cell 3 (`second`): no" in screen.getvalue()


class Page(HTMLParser):
    """The tags and the text of an HTML page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def wait_until(condition: object, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.05)
