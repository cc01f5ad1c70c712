"""A submission at work: cells, calls, every limit with its verdict, and nothing left behind."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from time import monotonic, sleep

import numpy as np
import psutil
import pytest

from llmcourse.errors import SandboxError
from llmcourse.grading import channel, sandbox
from llmcourse.grading.channel import ChannelClosed, ChannelGarbage, ChannelTimeout, MessageTooLarge
from llmcourse.grading.limits import Limits
from llmcourse.grading.plain import NotPlainError, pack
from llmcourse.grading.session import Cell, CellResult, LearnerError, RemoteSubject, Session

SANDBOX = not sandbox.available()
SHORT = Limits(cell_seconds=1.5, call_seconds=1.5, memory_mb=300, processes=20, cpu_seconds=30)

FIRST = Cell("first", "import os, subprocess, sys, time\nimport numpy as np\ndef double(x): return 2 * x")
LAST = Cell("last", "def triple(x): return 3 * x")

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="


@pytest.fixture
def start() -> Iterator[Callable[..., Session]]:
    """Sessions that are closed in the end, and leave no process."""
    sessions: list[Session] = []

    def start(*sources: str, limits: Limits = SHORT, **options) -> Session:
        cells = [FIRST, *(Cell(f"cell{i}", source) for i, source in enumerate(sources)), LAST]
        options = {"sandbox": SANDBOX, "forbidden": ["scipy"]} | options
        sessions.append(Session(cells, limits=limits, **options))
        return sessions[-1]

    before = set(psutil.Process().children(recursive=True))
    yield start
    for session in sessions:
        session.close()
    assert set(psutil.Process().children(recursive=True)) == before


def text(result: CellResult) -> str:
    return "".join(o["text"] for o in result.outputs if o["output_type"] == "stream")


@pytest.fixture(scope="module")
def shared() -> Iterator[Session]:
    """A session in which a test defines what it needs: `define(source)`."""
    define = Cell("define", "def define(source): exec(source, globals())")
    with Session([FIRST, define], limits=SHORT, sandbox=SANDBOX) as session:
        yield session


class TestCells:
    def test_outputs_are_those_of_a_notebook(self, start) -> None:
        session = start(
            "print('to out')\nprint('to err', file=sys.stderr)\nsys.stdout.buffer.write(b'bytes')\n6 * 7",
            "7 * 8;",
            "%timeit -n1 -r1 pass\nimport asyncio\nawait asyncio.sleep(0)\n_",
        )
        _, first, quiet, third, _ = session.run()
        assert [(o.get("name"), o.get("text")) for o in first.outputs[:3]] == [
            ("stdout", "to out\n"),
            ("stderr", "to err\n"),
            ("stdout", "bytes"),
        ]
        assert first.outputs[3] == {
            "output_type": "execute_result",
            "execution_count": 2,
            "data": {"text/plain": "42"},
            "metadata": {},
        }
        assert quiet.outputs == []
        assert "per loop" in text(third)
        assert all(r.ok for r in session.results)

    def test_only_text_and_pictures_come_back(self, start) -> None:
        png = "import base64\nfrom IPython.display import HTML, Image, display\n"
        png += f"data = base64.b64decode({PNG!r})\n"
        session = start(
            png + "display(HTML('<script>alert(1)</script>'), Image(data))",
            "class Page:\n    def _repr_html_(self): return '<script>'\n"
            "    def __repr__(self): return 'page'\nPage()",
            "display({'image/png': 'PHNjcmlwdD4=', 'text/html': '<script>',\n"
            "         'text/plain': 'a\\x1b[31mred\\0'}, raw=True)",
        )
        _, first, page, raw, _ = session.run()
        assert [sorted(o["data"]) for o in first.outputs] == [["text/plain"], ["image/png", "text/plain"]]
        assert "script" not in str([page.outputs, raw.outputs])
        assert page.outputs[0]["data"] == {"text/plain": "page"}
        assert raw.outputs[0]["data"] == {"text/plain": "ared"}

    def test_gigabytes_of_output_cost_neither_memory_nor_room(self, start) -> None:
        session = start("for _ in range(2000): print('x' * 1_000_000)")
        result = session.run()[1]
        assert result.ok
        assert text(result).startswith("xxxxx")
        assert text(result).endswith("… and 1,999,982,000 more characters, not kept\n")
        assert len(text(result)) < SHORT.output_chars + 100
        session.close()
        assert session.peak_mb < 200

    def test_an_error_is_told_by_the_notebooks_own_lines(self, start) -> None:
        session = start("def f(x):\n    return x / 0", "1\nf(1)", "def g(:\n    pass")
        _, _, error, syntax, last = (r.error for r in session.run())
        assert error is not None
        assert (error.kind, error.message, error.line) == ("ZeroDivisionError", "division by zero", 2)
        assert error.trace.splitlines() == [
            "cell cell1, line 2",
            "    f(1)",
            "cell cell0, line 2, in f",
            "    return x / 0",
            "ZeroDivisionError: division by zero",
        ]
        assert syntax is not None
        assert syntax.kind == "SyntaxError"
        assert last is None, "the next cells run all the same"

    def test_a_forbidden_module_cannot_be_imported_and_the_reason_is_given(self, start) -> None:
        session = start(
            "import scipy", "import scipy.linalg", "from llmcourse.labs import open_lab\nopen_lab('01')"
        )
        _, *refused, lab, _ = session.run()
        for result in refused:
            assert result.error.kind == "ModuleNotFoundError"
            assert result.error.message.startswith("scipy is not available when this lab is graded: ")
        assert lab.ok

    def test_questions_to_the_user_and_exits_are_errors_of_the_cell(self, start) -> None:
        session = start("input('name? ')", "sys.exit(3)", "raise KeyboardInterrupt")
        kinds = [r.error and r.error.kind for r in session.run()]
        assert kinds == [None, "StdinNotImplementedError", "SystemExit", "KeyboardInterrupt", None]
        assert session.starts == 1


class TestCalls:
    def test_arrays_travel_both_ways_in_their_layout(self, start) -> None:
        session = start("def look(x): return x * 2, x.flags.c_contiguous, x.flags.f_contiguous, x.dtype.name")
        base = np.arange(24, dtype=np.float32).reshape(4, 6)
        for x in (base, base.T, base[:, ::2], base[0, 0]):
            value, c, f, name = session.call("look", (x,)).value
            np.testing.assert_array_equal(value, x * 2)
            assert (c, f, name) == (x.flags.c_contiguous, x.flags.f_contiguous, "float32")

    def test_written_arguments_and_overruns_are_reported(self, start) -> None:
        session = start("def write(a, b):\n    b[0] = 7\n    return 1")
        call = session.call("write", (np.ones(3), np.ones(3)))
        assert (call.value, call.changed, call.error) == (1, (1,), None)

    def test_a_function_among_the_arguments_runs_at_the_judge(self, start) -> None:
        here: list[int] = []

        def oracle(x, shift=0):
            here.append(os.getpid())
            if len(here) > 3:
                raise ValueError("asked more than 3 times")
            return x + shift

        session = start("def ask(f, n):\n    for i in range(n): r = f(np.ones(2), shift=i)\n    return r")
        np.testing.assert_array_equal(session.call("ask", (oracle, 3)).value, [3.0, 3.0])
        assert here == [os.getpid()] * 3
        refused = session.call("ask", (oracle, 1)).error
        assert (refused.kind, refused.message) == ("ValueError", "asked more than 3 times")

    def test_an_exception_of_the_judges_own_keeps_its_name(self, start) -> None:
        class BudgetError(RuntimeError):
            pass

        def oracle() -> None:
            raise BudgetError("used up")

        session = start(
            "def ask(f):\n    try: f()\n    except RuntimeError as e: return type(e).__name__, str(e)"
        )
        assert session.call("ask", (oracle,)).value == ("BudgetError", "used up")

    def test_a_function_kept_from_an_earlier_call_does_not_answer(self, start) -> None:
        asked = []
        session = start(
            "kept = []\ndef keep(f): kept.append(f)\n"
            "def use(g):\n    try: return kept[0](1)\n    except RuntimeError as e: return str(e)"
        )
        session.call("keep", (asked.append,))
        assert "a call that is over" in session.call("use", (lambda: 0,)).value
        assert asked == []

    def test_time_that_an_oracle_takes_is_not_the_learners(self, start) -> None:
        session = start("def ask(f): return f()")
        assert session.call("ask", (lambda: sleep(1.7) or 5,)).value == 5  # over the limit, but ours

    def test_names_that_are_no_functions_are_told_apart(self, start) -> None:
        session = start("number = 3")
        assert session.defines("double")
        assert not session.defines("number")
        assert not session.defines("missing")
        assert session.call("missing", ()).error.kind == "NameError"
        assert "is a int" in session.call("number", ()).error.message

    @pytest.mark.parametrize(
        ("body", "kind"),
        [
            ("return f(x)", "RecursionError"),
            ("raise MemoryError", "MemoryError"),
            ("raise KeyboardInterrupt", "KeyboardInterrupt"),
            ("raise GeneratorExit", "GeneratorExit"),
            ("sys.exit(1)", "SystemExit"),
            ("input()", "StdinNotImplementedError"),
            ("return object()", "NotPlainError"),
            ("return np.ones(9_000_000)", "MessageTooLarge"),
        ],
    )
    def test_whatever_a_function_raises_is_a_failure_and_the_next_call_works(
        self, shared, body, kind
    ) -> None:
        shared.call("define", (f"def f(x):\n    {body}",))
        assert shared.call("f", (1,)).error.kind == kind
        assert shared.call("double", (4,)).value == 8
        assert shared.starts == 1

    @pytest.mark.parametrize(
        "mischief",
        [
            "sys.stdout = None; sys.stderr = open('/dev/full', 'w'); print = None\n"
            "os.mkdir('d'); os.chdir('d'); os.rmdir('../d')",
            "import locale, random, signal, warnings\n"
            "warnings.simplefilter('error'); np.seterr(all='raise'); locale.setlocale(locale.LC_ALL, 'C')\n"
            "for s in (2, 14, 15): signal.signal(s, signal.SIG_IGN)\n"
            "np.set_printoptions(precision=1); sys.setrecursionlimit(150); random.seed(0); np.random.seed(0)",
            "sys.meta_path.clear(); sys.path.clear(); sys.modules.pop('json')",
            "import threading\ndef work():\n    while True: pass\n"
            "threading.Thread(target=work, daemon=True).start()",
            "os.fork()",
            "import ctypes\nctypes.CDLL(None).fork()",
            "import multiprocessing as m\nwith m.Pool(2) as p: print(p.map(abs, [-1, -2]))",
        ],
    )
    def test_what_a_cell_changes_in_its_process_does_not_break_its_answers(self, start, mischief) -> None:
        session = start(mischief)
        assert [r.note for r in session.run()] == ["", "", ""]
        assert session.results[1].error is None
        np.testing.assert_array_equal(session.call("triple", (np.arange(3),)).value, [0, 3, 6])
        assert session.starts == 1


FORK_BOMB = "while True:\n    try: os.fork()\n    except OSError: pass"
SOCKETS = "import gc, socket\nsockets = [o for o in gc.get_objects() if isinstance(o, socket.socket)]\n"
SOCKETS += "from llmcourse.grading.plain import pack\n"
SOCKETS += "def speak(m): sockets[0].sendall(len(pack(m)).to_bytes(8, 'little') + pack(m))\n"

NO_ANSWER = "sent the judge something that is no answer"

ENDINGS = {
    "by itself": [
        ("os._exit(0)", "ended its own process"),
        ("os._exit(3)", "ended its own process (exit code 3)"),
        ("import ctypes; ctypes.string_at(0)", "was ended by SIGSEGV"),
        ("os.closerange(3, 100)", "closed its connection to the judge"),
    ],
    "by noise": [
        (SOCKETS + "sockets[0].sendall(os.urandom(5000)); time.sleep(60)", NO_ANSWER),
        (SOCKETS + "while True: sockets[0].sendall(bytes(1000))", NO_ANSWER),
        (SOCKETS + "speak({'n': 99, 'outputs': [], 'cut': 0, 'error': None}); time.sleep(60)", NO_ANSWER),
        (SOCKETS + "speak({'n': 2, 'outputs': [{'data': 5}], 'cut': 0, 'error': None})", NO_ANSWER),
        (SOCKETS + "speak({'n': 2, 'outputs': [], 'cut': float('inf'), 'error': None})", NO_ANSWER),
    ],
    "by time": [
        ("while True: pass", "did not end within 1.5 s"),
        (
            "import signal\nfor s in (2, 14, 15): signal.signal(s, signal.SIG_IGN)\n"
            "while True:\n    try: sum(range(10**12))\n    except BaseException: pass",
            "did not end within 1.5 s",
        ),
    ],
    "by memory": [
        ("kept = []\nwhile True: kept.append(np.ones(1_000_000))", "used more than 300 MB"),
        (
            "for _ in range(6):\n    if os.fork() == 0:\n        kept = np.ones(10_000_000); time.sleep(60)\n"
            "time.sleep(60)",
            "used more than 300 MB",
        ),
    ],
    "by number": [
        (
            "import threading\nfor _ in range(30): threading.Thread(target=time.sleep, args=(60,)).start()\n"
            "time.sleep(60)",
            "started more than 20 processes",
        ),
        *(
            [("while True:\n    try: os.fork()\n    except OSError: pass", "started more than 20 processes")]
            * SANDBOX
        ),
    ],
}


class TestVerdicts:
    @pytest.mark.parametrize("group", ENDINGS)
    def test_a_cell_that_ends_its_process_is_named_and_the_others_count(self, start, group) -> None:
        sources, says = zip(*ENDINGS[group], strict=True)
        session = start(*sources)
        notes = [r.note for r in session.run()]
        assert notes == ["", *says, ""]
        assert session.call("double", (2,)).value == 4
        assert session.call("triple", (2,)).value == 6
        assert session.starts == 1 + len(sources)

    def test_processor_time_counts_for_all_processes_together(self, start) -> None:
        source = "for _ in range(3):\n    if os.fork() == 0:\n        while True: pass\ntime.sleep(60)"
        session = start(source, limits=Limits(cell_seconds=15, cpu_seconds=1))
        assert [r.note for r in session.run()] == ["", "used up its 1 s of processor time", ""]

    @pytest.mark.skipif(not SANDBOX, reason="no sandbox")
    def test_files_are_counted(self, start) -> None:
        source = "for i in range(30_000): open(f'f{i}', 'w').close()\ntime.sleep(60)"
        session = start(source, limits=Limits(cell_seconds=15))
        assert [r.note for r in session.run()] == ["", "made more than 20,000 files", ""]

    def test_an_array_in_the_place_of_a_number_is_no_answer(self, start) -> None:
        session = start(SOCKETS, "def garble(x):\n    speak({'n': np.ones(3)}); time.sleep(60)")
        assert session.call("garble", (1,)).error.kind == "BadAnswer"
        assert session.call("double", (2,)).value == 4

    def test_what_the_kernel_refuses_is_an_error_of_the_cell(self, start) -> None:
        session = start("open('big', 'wb').write(bytes(80_000_000))", "bytearray(9 << 30)")
        _, file, memory, _ = session.run()
        assert "File too large" in file.error.message
        assert memory.error.kind == "MemoryError"
        assert session.starts == 1

    def test_a_call_over_a_limit_is_a_failure_and_the_next_works_in_a_new_process(self, start) -> None:
        session = start(
            "def hang(x):\n    while True: pass",
            "def die(x): os._exit(4)",
            "def eat(x):\n    while True: x = np.concatenate([x, x])",
        )
        for name, kind, says in [
            ("hang", "TimeLimit", "hang did not return within 1.5 s"),
            ("die", "ProcessDied", "die ended its own process (exit code 4)"),
        ]:
            error = session.call(name, (np.ones(1000),)).error
            assert (error.kind, error.message) == (kind, says)
            assert session.call("double", (3,)).value == 6
        assert session.call("eat", (np.ones(1000),)).error.kind in ("MemoryLimit", "MemoryError")
        assert session.call("triple", (3,)).value == 9

    def test_a_session_has_so_much_time_and_no_more(self, start) -> None:
        session = start("time.sleep(0.2)", "time.sleep(60)", "1", limits=Limits(wall_seconds=2))
        began = monotonic()
        notes = [r.note for r in session.run()]
        assert notes[:2] == ["", ""]
        assert notes[2] == "used up the 2 s that a submission has"
        assert notes[3:] == ["was not run: the submission used up the 2 s that a submission has"] * 2
        error = session.call("double", (1,)).error
        assert (error.kind, error.message) == ("WallLimit", f"the submission {notes[2]}")
        assert monotonic() - began < 6

    def test_a_cell_that_fails_only_when_run_again_is_marked_too(self, start, tmp_path) -> None:
        """A file on the learner's own disk remembers the first run; in a sandbox nothing could."""
        flag = tmp_path / "flag"
        again = (
            f"import pathlib\nflag = pathlib.Path({str(flag)!r})\nif flag.exists(): os._exit(0)\nflag.touch()"
        )
        session = start(again, "os._exit(1)", sandbox=False)
        session.run()
        assert session.call("triple", (1,)).value == 3
        assert [r.note for r in session.results] == [
            "",
            "ended its own process, when it was run again",
            "ended its own process (exit code 1)",
            "",
        ]

    def test_a_broken_python_is_the_verdict_on_that_cell_alone(self, start) -> None:
        session = start("import builtins, json\nbuiltins.len = builtins.isinstance = json.dumps = None")
        session.run()
        assert not session.results[1].ok
        assert session.call("triple", (2,)).value == 6


class TestNothingIsLeft:
    @pytest.mark.parametrize(
        "sandboxed", [pytest.param(True, marks=pytest.mark.skipif(not SANDBOX, reason="none")), False]
    )
    def test_daemons_and_orphans_end_with_the_session(self, start, sandboxed) -> None:
        daemon = (
            "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
            "        os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(321.5)'])\n"
            "    os._exit(0)\nos.wait(); time.sleep(0.3)"
        )
        session = start(daemon, sandbox=sandboxed)
        assert session.run()[1].ok
        assert _running("time.sleep(321.5)")
        session.close()
        assert not _running("time.sleep(321.5)")

    def test_folders_of_unsandboxed_sessions_are_removed(self, start) -> None:
        session = start("def here(): return os.getcwd()", sandbox=False)
        folder = session.call("here", ()).value
        assert os.path.isdir(folder)
        session.close()
        assert not os.path.exists(folder)

    def test_a_closed_session_answers_no_more(self, start) -> None:
        session = start()
        session.run()
        session.close()
        assert session.call("double", (1,)).error.kind == "Closed"


def _running(command: str) -> bool:
    found = False
    for process in psutil.process_iter(["cmdline", "status"]):
        found |= process.info["status"] != psutil.STATUS_ZOMBIE and command in " ".join(
            process.info["cmdline"] or []
        )
    return found


class TestSubjects:
    def test_a_remote_function_is_called_like_any_other(self, start) -> None:
        session = start("def fail(x): raise ValueError(f'not {x}')")
        double, fail = RemoteSubject(session, "double"), RemoteSubject(session, "fail")
        assert double(21) == 42
        assert double.call((21,)).value == 42
        with pytest.raises(LearnerError, match="ValueError: not 3") as raised:
            fail(3)
        assert (raised.value.kind, raised.value.message) == ("ValueError", "not 3")

    def test_a_function_that_hung_is_not_called_again(self, start) -> None:
        session = start("def hang(x):\n    while True: pass")
        hang, double = RemoteSubject(session, "hang"), RemoteSubject(session, "double")
        first = hang.call((1,)).error
        began = monotonic()
        assert hang.call((2,)).error == first
        assert monotonic() - began < 0.5
        assert double(1) == 2

    def test_an_object_that_equals_everything_is_refused_by_its_type(self, start) -> None:
        session = start("class Yes:\n    def __eq__(self, other): return True\ndef yes(x): return Yes()")
        error = RemoteSubject(session, "yes").call((1,)).error
        assert error.kind == "NotPlainError"
        assert "Yes" in error.message


def test_a_process_that_does_not_start_is_nobodys_fault_but_the_machines(monkeypatch) -> None:
    monkeypatch.setattr("llmcourse.grading.process.MODULE", "llmcourse.no_such_module")
    with (
        pytest.raises(SandboxError, match="No module named") as raised,
        Session([FIRST], sandbox=False) as session,
    ):
        session.run()
    assert "not the submission's fault" in raised.value.why


class TestChannel:
    @pytest.fixture
    def ends(self) -> Iterator[tuple[channel.Channel, socket.socket]]:
        ours, theirs = channel.pair(max_bytes=1_000_000)
        yield ours, theirs
        ours.close()
        theirs.close()

    def test_messages_arrive_whole_and_in_order(self, ends) -> None:
        ours, theirs = ends
        other = channel.Channel(theirs)
        for message in ({"a": np.arange(5)}, [1, "x", None]):
            other.send(message)
        np.testing.assert_array_equal(ours.receive(monotonic() + 1)["a"], np.arange(5))
        assert ours.receive(monotonic() + 1) == [1, "x", None]

    @pytest.mark.parametrize(
        ("data", "error"),
        [
            (b"", ChannelTimeout),
            (b"\x05\0\0", ChannelTimeout),
            (b"\xff" * 8, ChannelGarbage),
            ((20).to_bytes(8, "little") + b"x" * 20, ChannelGarbage),
            (
                (400_016).to_bytes(8, "little") + (400_000).to_bytes(8, "little") + b"[" * 400_008,
                ChannelGarbage,
            ),
        ],
    )
    def test_noise_and_silence_are_told_apart(self, ends, data, error) -> None:
        ours, theirs = ends
        writer = threading.Thread(target=theirs.sendall, args=(data,))
        writer.start()
        with pytest.raises(error):
            ours.receive(monotonic() + 0.3)
        writer.join()

    def test_a_closed_end_is_noticed_by_both_directions(self, ends) -> None:
        ours, theirs = ends
        theirs.close()
        with pytest.raises(ChannelClosed):
            ours.receive(monotonic() + 1)
        with pytest.raises(ChannelClosed):
            ours.send("x" * 500_000, monotonic() + 1)

    def test_a_reader_that_stops_reading_costs_the_deadline_and_no_more(self, ends) -> None:
        ours, _ = ends
        began = monotonic()
        with pytest.raises(ChannelTimeout):
            ours.send("x" * 900_000, began + 0.3)
        assert monotonic() - began < 2

    def test_what_is_too_large_or_not_plain_is_not_sent(self, ends) -> None:
        ours, theirs = ends
        with pytest.raises(MessageTooLarge):
            ours.send("x" * 2_000_000)
        with pytest.raises(NotPlainError):
            ours.send(object())
        ours.send(1)
        assert theirs.recv(100) == len(pack(1)).to_bytes(8, "little") + pack(1)


def test_what_one_call_leaves_behind_does_not_cost_the_next_its_marks():
    """A thread that the first call starts ends the process while the second is at work."""
    source = (
        "import os, threading, time\n"
        "def mine():\n    threading.Timer(0.3, os._exit, [1]).start()\n    return 1\n"
        "def other():\n    time.sleep(0.6)\n    return 2\n"
        "def always():\n    os._exit(1)\n"
    )
    with Session([Cell("a", source)], slot=77) as session:
        assert session.call("mine", ()).value == 1
        assert session.call("other", ()).value == 2
        assert session.call("always", ()).error.kind == "ProcessDied"
        assert session.call("other", ()).value == 2


def test_processes_that_a_cell_leaves_running_are_the_cells():
    bomb = (
        "import os, time\ntry:\n    while True:\n        if os.fork() == 0: time.sleep(99); os._exit(0)\n"
        "except OSError: pass"
    )
    with Session([Cell("bomb", bomb), Cell("good", "def one():\n    return 1")], slot=78) as session:
        results = session.run()
        assert "processes" in results[0].note
        assert session.call("one", ()).value == 1
        assert session.call("one", ()).value == 1
