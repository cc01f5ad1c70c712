"""Submissions that try to break the grader, or that are broken: each with the marks that are right.

Every entry starts from a notebook in which all six exercises of lab 01 are solved, and spoils it in one
way. `loses` are the exercises that must get no marks for it; all others must get theirs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXERCISES = (
    "topological_order",
    "backward_pass",
    "sum_to",
    "matmul_backward",
    "cross_entropy",
    "numeric_gradient",
)
EVERYTHING = EXERCISES
SUM = ("sum_to", "matmul_backward")  # matmul_backward calls sum_to

Notebook = dict[str, Any]


@dataclass
class Workshop:
    """What a spoiler works with.

    folder    the student's own folder among the submissions
    solved    a notebook with every exercise solved;  outside: a folder that submissions must not reach
    """

    folder: Path
    solved: Notebook
    outside: Path
    lab: str = "lab01_backprop"

    def notebook(self, **sources: str) -> Notebook:
        """The solved notebook with the named cells' sources replaced."""
        nb = deepcopy(self.solved)
        for name, source in sources.items():
            cell(nb, name)["source"] = source
        return nb

    def extended(self, name: str, *, before: str = "", after: str = "") -> Notebook:
        """The solved notebook with code put before and after the solution of one exercise."""
        source = cell(self.solved, name)["source"]
        return self.notebook(**{name: f"{before}\n{source}\n{after}"})

    def save(self, nb: Notebook, name: str = "lab01_backprop.ipynb") -> None:
        self.write(json.dumps(nb), name)

    def write(self, text: str | bytes, name: str = "lab01_backprop.ipynb") -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        (self.folder / name).write_bytes(data)


@dataclass(frozen=True)
class Hostile:
    """One kind. `says` is a pattern that the remarks or the verdicts must hold."""

    name: str
    spoil: Callable[[Workshop], None]
    loses: tuple[str, ...]
    says: str


KINDS: list[Hostile] = []


def hostile(loses: tuple[str, ...], says: str = "") -> Callable[[Callable[[Workshop], None]], Any]:
    def add(spoil: Callable[[Workshop], None]) -> Callable[[Workshop], None]:
        KINDS.append(Hostile(spoil.__name__, spoil, loses, says))
        return spoil

    return add


def cell(nb: Notebook, name: str) -> dict[str, Any]:
    return next(c for c in nb["cells"] if c["metadata"].get("nbgrader", {}).get("grade_id") == name)


def wrong(before: str = "", inside: str = "return np.zeros(shape)", after: str = "") -> str:
    """A cell in which `sum_to` is wrong, with something around it that should make it pass."""
    return f"import numpy as np\n{before}\ndef sum_to(grad, shape):\n    {inside}\n{after}\n"


# ── processes ────────────────────────────────────────────────────────────────────────────────────


@hostile(SUM, "did not (end|return|answer)")
def endless_loop_in_a_function(w: Workshop) -> None:
    w.save(w.notebook(sum_to=wrong(inside="while True: pass")))


@hostile(SUM, "did not end")
def endless_loop_in_a_cell(w: Workshop) -> None:
    w.save(w.extended("sum_to", before="while True: pass"))


@hostile(SUM, "did not end")
def uninterruptible_loop(w: Workshop) -> None:
    stubborn = (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
    )
    w.save(w.extended("sum_to", before=stubborn))


@hostile(SUM, "started more than 64 processes")
def fork_bomb(w: Workshop) -> None:
    bomb = "import os\ntry:\n    while True: os.fork()\nexcept OSError as error: raise"
    w.save(w.extended("sum_to", after=bomb))


@hostile(SUM, "used more than 700 MB")
def memory_bomb(w: Workshop) -> None:
    w.save(w.extended("sum_to", after="hoard = []\nwhile True: hoard.append(bytearray(1 << 26))"))


@hostile(SUM, "memory|MemoryError|MB")
def memory_bomb_in_a_function(w: Workshop) -> None:
    w.save(w.notebook(sum_to=wrong(inside="return bytearray(1 << 40)")))


@hostile(SUM, "process")
def exit_of_the_process_in_a_function(w: Workshop) -> None:
    w.save(w.notebook(sum_to=wrong(inside="import os; os._exit(0)")))


@hostile(SUM, "process")
def exit_of_the_process_in_a_cell(w: Workshop) -> None:
    w.save(w.extended("sum_to", before="import os; os._exit(0)"))


@hostile((), "")
def sys_exit(w: Workshop) -> None:
    w.save(w.extended("sum_to", after="import sys; sys.exit(3)"))


@hostile(SUM, "SystemExit")
def sys_exit_in_a_function(w: Workshop) -> None:
    w.save(w.notebook(sum_to=wrong(inside="raise SystemExit(0)")))


@hostile((), "process|")
def killing_everything_in_reach(w: Workshop) -> None:
    w.save(w.extended("numeric_gradient", after="import os\nos.kill(-1, 9)"))


@hostile((), "")
def daemon_that_outlives_its_parent(w: Workshop) -> None:
    daemon = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        for fd in range(3, 64):\n            try: os.close(fd)\n            except OSError: pass\n"
        "        time.sleep(987)\n    os._exit(0)"
    )
    w.save(w.extended("sum_to", after=daemon))


@hostile((), "")
def background_thread_that_goes_on(w: Workshop) -> None:
    thread = (
        "import threading, time\ndef meddle():\n    while True:\n        print('still here')\n"
        "        time.sleep(0.01)\nthreading.Thread(target=meddle).start()"
    )
    w.save(w.extended("sum_to", after=thread))


# ── the file ─────────────────────────────────────────────────────────────────────────────────────


@hostile((), "check")
def deleted_check_cells(w: Workshop) -> None:
    nb = w.notebook()
    nb["cells"] = [c for c in nb["cells"] if not c["metadata"].get("nbgrader", {}).get("grade")]
    w.save(nb)


@hostile(SUM, "check-sum_to")
def edited_check_cells(w: Workshop) -> None:
    nb = w.notebook(sum_to=wrong())
    for name in EXERCISES:
        cell(nb, f"check-{name}")["source"] = "assert True"
    w.save(nb)


@hostile(SUM)
def more_points_for_a_check(w: Workshop) -> None:
    nb = w.notebook(sum_to=wrong())
    cell(nb, "check-topological_order")["metadata"]["nbgrader"]["points"] = 1000
    cell(nb, "check-sum_to")["metadata"]["nbgrader"].update(points=-5, grade=False)
    w.save(nb)


@hostile((), "check-sum_to|copied|twice")
def copied_check_cells(w: Workshop) -> None:
    nb = w.notebook()
    nb["cells"].insert(3, deepcopy(cell(nb, "check-sum_to")))
    w.save(nb)


@hostile((), "sum_to")
def copied_solution_cell(w: Workshop) -> None:
    nb = w.notebook()
    copy = deepcopy(cell(nb, "sum_to"))
    copy["id"] = "another"
    nb["cells"].insert(nb["cells"].index(cell(nb, "sum_to")) + 1, copy)
    w.save(nb)


@hostile((), "")
def duplicate_cell_ids(w: Workshop) -> None:
    nb = w.notebook()
    for c in nb["cells"]:
        c["id"] = "same"
    w.save(nb)


@hostile((), "metadata|name")
def stripped_metadata(w: Workshop) -> None:
    nb = w.notebook()
    for c in nb["cells"]:
        c["metadata"] = {}
        c.pop("id", None)
    w.save(nb)


@hostile((), "")
def wrong_kernelspec(w: Workshop) -> None:
    nb = w.notebook()
    nb["metadata"]["kernelspec"] = {"name": "my-conda", "display_name": "mine", "language": "R"}
    w.save(nb)


@hostile((), "lab01_backprop \\(1\\).ipynb")
def wrong_file_name(w: Workshop) -> None:
    w.save(w.notebook(), "lab01_backprop (1).ipynb")


@hostile(EVERYTHING, "JSON|read")
def malformed_json(w: Workshop) -> None:
    w.write('{"cells": [ {"cell_type": "code", ')


@hostile(EVERYTHING, "empty")
def empty_file(w: Workshop) -> None:
    w.write("")


@hostile(EVERYTHING, "no notebook|missing")
def missing_notebook(w: Workshop) -> None:
    w.folder.mkdir(parents=True)


@hostile(EVERYTHING, "notebook")
def not_a_notebook(w: Workshop) -> None:
    w.write("[]")


@hostile(EVERYTHING, "nest|deep|read")
def bottomless_json(w: Workshop) -> None:
    w.write("[" * 200_000)


@hostile(EVERYTHING, "MB|large")
def enormous_file(w: Workshop) -> None:
    w.write(b'{"cells": "' + b"x" * 25_000_000 + b'"}')


@hostile(EVERYTHING, "link")
def link_to_another_file(w: Workshop) -> None:
    w.folder.mkdir(parents=True)
    os.symlink(w.outside / "secret.ipynb", w.folder / "lab01_backprop.ipynb")


@hostile((), "")
def bytes_that_are_no_text(w: Workshop) -> None:
    nb = w.notebook()
    nb["cells"].append({"cell_type": "code", "id": "odd", "metadata": {}, "source": "s = '\ud800\x00'"})
    w.save(nb)


@hostile(SUM, "SyntaxError")
def syntax_error(w: Workshop) -> None:
    w.save(w.notebook(sum_to="def sum_to(grad, shape)\n    return grad"))


# ── outputs ──────────────────────────────────────────────────────────────────────────────────────


@hostile((), "")
def gigabytes_of_output(w: Workshop) -> None:
    w.save(w.extended("sum_to", after="for _ in range(3000): print('x' * 1_000_000)"))


@hostile((), "")
def flood_of_file_descriptors_one_and_two(w: Workshop) -> None:
    w.save(w.extended("sum_to", after="import os\nfor _ in range(3000): os.write(1 + _ % 2, b'y' * 100_000)"))


@hostile((), "")
def html_and_script_in_outputs(w: Workshop) -> None:
    show = (
        "from IPython.display import HTML, SVG, Javascript, display\n"
        "display(HTML('<script>window.owned = 1</script>'), Javascript('window.owned = 2'))\n"
        'display(SVG(\'<svg xmlns="http://www.w3.org/2000/svg" onload="window.owned = 3"></svg>\'))\n'
        "print('<script>window.owned = 4</script>')"
    )
    w.save(w.extended("sum_to", after=show))


@hostile((), "")
def stored_outputs_with_script(w: Workshop) -> None:
    nb = w.notebook()
    data = {"text/html": "<img src=x onerror='window.owned = 5'>", "text/plain": "x"}
    cell(nb, "sum_to")["outputs"] = [
        {"output_type": "execute_result", "execution_count": 1, "data": data, "metadata": {}}
    ]
    w.save(nb)


@hostile((), "")
def script_in_markdown(w: Workshop) -> None:
    nb = w.notebook()
    text = "<script>window.owned = 6</script> <img src=x onerror='window.owned = 7'> [x](javascript:owned())"
    nb["cells"].insert(4, {"cell_type": "markdown", "id": "hello", "metadata": {}, "source": text})
    w.save(nb)


@hostile((), "")
def image_that_is_none(w: Workshop) -> None:
    show = (
        "from IPython.display import display\n"
        "display({'image/png': '\"><script>window.owned = 8</script>', 'text/plain': 'x'}, raw=True)"
    )
    w.save(w.extended("sum_to", after=show))


# ── what lies outside ────────────────────────────────────────────────────────────────────────────


@hostile(SUM, "FileNotFoundError|No such file")
def reading_the_solutions(w: Workshop) -> None:
    w.save(w.notebook(sum_to=wrong(inside=f"return open({str(w.outside / 'secret.ipynb')!r}).read()")))


@hostile(SUM, "")
def searching_for_the_hidden_tests(w: Workshop) -> None:
    look = (
        "import glob, os, pathlib\nfound = []\n"
        "for top, folders, names in os.walk('/'):\n"
        "    folders[:] = [f for f in folders if f not in ('proc', 'sys', 'usr', 'site-packages')]\n"
        "    found += [os.path.join(top, n) for n in names if n.endswith(('.ipynb', '.db', '.key'))]\n"
    )
    w.save(w.notebook(sum_to=wrong(before=look, inside="assert not found, found; raise LookupError('none')")))


@hostile(SUM, "")
def writing_the_gradebook(w: Workshop) -> None:
    tamper = (
        "import sqlite3\ntry:\n"
        f"    book = sqlite3.connect({str(w.outside / 'gradebook.db')!r})\n"
        "    book.execute('update grade set manual_score = 99, auto_score = 99'); book.commit()\n"
        "except sqlite3.Error as error: print(error)"
    )
    w.save(w.notebook(sum_to=wrong(before=tamper)))


@hostile(SUM, "OSError|unreachable|refused|gaierror|URLError")
def use_of_the_network(w: Workshop) -> None:
    port = (w.outside / "port").read_text()
    ask = f"import socket; return socket.create_connection(('127.0.0.1', {port}), 2).recv(10)"
    w.save(w.notebook(sum_to=wrong(inside=ask)))


@hostile((), "")
def filling_the_disk(w: Workshop) -> None:
    fill = (
        "for folder in ('.', '/tmp', '/dev/shm', '/var/tmp'):\n    for i in range(400):\n        try:\n"
        "            with open(f'{folder}/junk{i}', 'wb') as f: f.write(b'j' * 8_000_000)\n"
        "        except OSError: break"
    )
    w.save(w.extended("sum_to", after=fill))


# ── the judge ────────────────────────────────────────────────────────────────────────────────────


@hostile(SUM, "✗")
def monkey_patching_the_checker(w: Workshop) -> None:
    patch = (
        "import numpy\nfor name in ('isclose', 'allclose', 'array_equal'):\n"
        "    setattr(numpy, name, lambda *a, **k: numpy.True_)\n"
        "try:\n    import llmcourse.grading.compare as c, llmcourse.grading.perform as p\n"
        "    c.close = c.equal = lambda *a, **k: None\nexcept ImportError: pass\n"
        "check = lambda fn: True"
    )
    w.save(w.notebook(sum_to=wrong(before=patch)))


@hostile(SUM, "✗")
def stripping_asserts_by_an_ast_transformer(w: Workshop) -> None:
    strip = (
        "import ast\nclass Strip(ast.NodeTransformer):\n"
        "    def visit_Assert(self, node): return ast.Pass()\n"
        "    def visit_Call(self, node):\n"
        "        return ast.Constant(1) if getattr(node.func, 'id', '') == 'check' else node\n"
        "get_ipython().ast_transformers.append(Strip())"
    )
    w.save(w.notebook(sum_to=wrong(before=strip)))


@hostile(SUM, "holds a|Anything")
def an_object_that_equals_everything(w: Workshop) -> None:
    anything = (
        "class Anything:\n    def __eq__(self, other): return True\n"
        "    def __getattr__(self, name): return self\n    def __call__(self, *a, **k): return self\n"
        "    def __bool__(self): return True\n"
        "    __lt__ = __gt__ = __le__ = __ge__ = __sub__ = __rsub__ = lambda self, other: self"
    )
    w.save(w.notebook(sum_to=wrong(before=anything, inside="return Anything()")))


@hostile(SUM, "holds a|✗")
def an_array_that_equals_everything(w: Workshop) -> None:
    sly = (
        "class Sly(np.ndarray):\n    def __eq__(self, other): return np.ones(self.shape, bool)\n"
        "    def __array_ufunc__(self, *a, **k): return np.ones(self.shape, bool)\n"
        "    def __array_function__(self, *a, **k): return True"
    )
    w.save(w.notebook(sum_to=wrong(before=sly, inside="return np.zeros(shape).view(Sly)")))


@hostile(SUM, "nan")
def not_a_number_as_a_wildcard(w: Workshop) -> None:
    w.save(w.notebook(sum_to=wrong(inside="return np.full(shape, np.nan, grad.dtype)")))


@hostile(SUM, "Error")
def calling_the_reference(w: Workshop) -> None:
    ask = "from llmcourse.labs.lab01_backprop.sum_to import expected; return expected(grad, shape)"
    w.save(w.notebook(sum_to=wrong(inside=ask)))


@hostile(SUM, "Error")
def calling_the_package_s_engine(w: Workshop) -> None:
    ask = "from llmcourse.autograd.ops.elementwise import sum_to as given; return given(grad, shape)"
    w.save(w.notebook(sum_to=wrong(inside=ask)))


@hostile(SUM, "Error")
def calling_torch(w: Workshop) -> None:
    ask = "import torch; return torch.from_numpy(grad).sum_to_size(shape).numpy()"
    w.save(w.notebook(sum_to=wrong(inside=ask)))


@hostile(SUM, "✗")
def answers_for_a_visible_seed(w: Workshop) -> None:
    """Right for the inputs that seeds 0 … 9 draw in the first check, wrong for others."""
    table = (
        "from zlib import crc32\nknown = set()\nfor seed in range(10):\n"
        "    rng = np.random.default_rng([seed, crc32(b'added')])\n"
        "    known.add(int(rng.choice(np.arange(3, 18, 2))))\n    m = int(rng.integers(2, 10))\n"
        "    k = int(rng.choice(np.arange(3, 18, 2)))\n    known.add(float(rng.normal(0, 1)))\n"
    )
    answer = (
        "return grad.sum(axis=tuple(range(grad.ndim - len(shape)))) "
        "if grad.size and float(grad.flat[0]) in known else np.zeros(shape)"
    )
    w.save(w.notebook(sum_to=wrong(before=table, inside=answer)))


@hostile(SUM, "✗")
def looking_for_the_answer_in_the_callers_frames(w: Workshop) -> None:
    look = (
        "import sys, gc\ndef hunt(shape):\n    frame = sys._getframe(1)\n    while frame:\n"
        "        for value in list(frame.f_locals.values()):\n"
        "            if isinstance(value, np.ndarray) and value.shape == tuple(shape) : return value\n"
        "        frame = frame.f_back\n"
        "    for value in gc.get_objects():\n"
        "        if callable(value) and getattr(value, '__name__', '') == 'expected': return value\n"
        "    return np.zeros(shape)"
    )
    w.save(w.notebook(sum_to=wrong(before=look, inside="return hunt(shape)")))


@hostile((), "")
def changing_global_state(w: Workshop) -> None:
    spoil = (
        "import numpy as np, random, locale, os, warnings, sys\n"
        "np.seterr(all='raise'); np.random.seed(0); random.seed(0); np.set_printoptions(precision=1)\n"
        "warnings.simplefilter('error'); sys.setrecursionlimit(200)\n"
        "os.environ.clear(); os.chdir('/')\nsys.stdout = sys.stderr = None"
    )
    w.save(w.extended("numeric_gradient", after=spoil))


@hostile(SUM, "holds a|Payload")
def pickle_payload(w: Workshop) -> None:
    payload = (
        "class Payload:\n    def __reduce__(self):\n"
        f"        return (open, ({str(w.outside / 'owned')!r}, 'w'))"
    )
    w.save(w.notebook(sum_to=wrong(before=payload, inside="return Payload()")))
    w.write(b"cbuiltins\nopen\n(V" + str(w.outside / "owned").encode() + b"\nVw\ntR.", "answers.pkl")


@hostile(SUM, "")
def garbage_on_the_channel(w: Workshop) -> None:
    shout = (
        "import os\n    for fd in range(3, 64):\n        try: os.write(fd, b'\\xff' * 4096)\n"
        "        except OSError: pass\n    return grad"
    )
    w.save(w.notebook(sum_to=wrong(inside=shout)))


@hostile(("numeric_gradient",), "")
def abuse_of_the_judges_own_function(w: Workshop) -> None:
    abuse = (
        "def numeric_gradient(f, x):\n    while True:\n        for junk in ('x', None, {}, [[]], -1):\n"
        "            try: f(junk)\n            except Exception: pass\n"
    )
    w.save(w.notebook(numeric_gradient=abuse))


@hostile(EVERYTHING, "not implemented yet")
def nothing_done(w: Workshop) -> None:
    stub = 'raise NotImplementedError("not implemented yet")'
    w.save(w.notebook(**{name: f"def {name}(*args):\n    {stub}" for name in EXERCISES}))


# ── bytes on the channel ─────────────────────────────────────────────────────────────────────────

SPEAK = """
import gc, struct, time
def speak(value, buffers=b""):
    learner = next(o for o in gc.get_objects() if type(o).__name__ == "Learner")
    call = '["d",["value",%s],["error",null],["changed",["t"]],["overrun",["t"]],["grads",null],'
    call = (call + '["costs",["d"]],["seconds",0]]') % value
    head = ('["d",["n",%d],["call",%s]]' % (learner.call_number, call)).encode()
    data = struct.pack("<Q", len(head)) + head + buffers
    learner.channel.sock.sendall(struct.pack("<Q", len(data)) + data)
    time.sleep(30)
"""


def spoken(what: str) -> str:
    return f"{SPEAK}\ndef numeric_gradient(f, x, h=None):\n    {what}\n"


@hostile(("numeric_gradient",), "no answer")
def one_array_thousands_of_times(w: Workshop) -> None:
    again = """'["l",["a","<f8",[500000],"C",4000000],%s]' % ",".join(['["=",0]'] * 2000)"""
    w.save(w.notebook(numeric_gradient=spoken(f"speak({again}, bytes(4_000_000))")))


@hostile(("numeric_gradient",), "no answer")
def keys_of_one_hash(w: Workshop) -> None:
    keys = """'["d",%s]' % ",".join(f"[{k * (2**61 - 1)},0]" for k in range(150_000))"""
    w.save(w.notebook(numeric_gradient=spoken(f"speak({keys})")))


# ── the instructor's terminal ────────────────────────────────────────────────────────────────────


@hostile(SUM, r"ValueError: done emmy 0 points \?gnihton \[red\]hi")
def a_message_like_the_graders_own_lines(w: Workshop) -> None:
    said = "done\\nemmy  0 points\\n\\u202egnihton [red]hi\\x1b[2J\\x9b31m"
    w.save(w.notebook(sum_to=wrong(before=f"raise ValueError('{said}')")))


@hostile(SUM, "and 30 more cells with errors")
def fifty_cells_with_long_errors(w: Workshop) -> None:
    nb = w.notebook(sum_to=wrong())
    for i in range(50):
        source = "raise ValueError('long ' * 1000)"
        nb["cells"].append({"cell_type": "code", "id": f"e{i}", "metadata": {}, "source": source})
    w.save(nb)


@hostile(SUM, "LookupError|No module")
def the_packages_of_another_python(w: Workshop) -> None:
    look = (
        "import glob, sys\nsys.meta_path[:] = [m for m in sys.meta_path if type(m).__name__ != 'Forbidden']\n"
        "for top in (sys.prefix, sys.base_prefix, '/usr', '/usr/local'):\n"
        "    sys.path += glob.glob(f'{top}/lib*/python3*/*-packages')"
    )
    find = "import scipy.special; return grad.sum(tuple(range(grad.ndim - len(shape))))"
    w.save(w.notebook(sum_to=wrong(before=look, inside=find)))


# ── what honest notebooks hold ───────────────────────────────────────────────────────────────────


@hostile((), "all were run, and the last one counts")
def a_cell_that_was_split_in_jupyterlab(w: Workshop) -> None:
    nb = w.extended("sum_to", before="leading(np.ones((2, 2)), (2,))")
    half = deepcopy(cell(nb, "sum_to"))
    half["id"] = "upper-half"
    half["source"] = "def leading(grad, shape):\n    return grad.ndim - len(shape)"
    nb["cells"].insert(nb["cells"].index(cell(nb, "sum_to")), half)
    w.save(nb)


@hostile((), "")
def a_module_that_a_cell_writes(w: Workshop) -> None:
    nb = w.extended("sum_to", before="import my_helpers")
    source = "%%writefile my_helpers.py\nx = 1\n"
    helper = {"cell_type": "code", "id": "helper", "metadata": {}, "source": source}
    nb["cells"].insert(nb["cells"].index(cell(nb, "sum_to")), helper)
    w.save(nb)


@hostile((), "")
def a_backend_for_figures_that_is_not_installed(w: Workshop) -> None:
    w.save(w.extended("sum_to", before="%matplotlib widget"))


@hostile((), "")
def a_function_whose_name_was_given_to_its_result(w: Workshop) -> None:
    nb = w.notebook()
    source = "numeric_gradient = numeric_gradient(lambda x: float((x**2).sum()), np.ones(3))"
    nb["cells"].append({"cell_type": "code", "id": "shadow", "metadata": {}, "source": source})
    w.save(nb)


@hostile((), "")
def use_of_what_check_gives(w: Workshop) -> None:
    use = "assert check(sum_to, seed=3).ok\nprint(check(sum_to).points)\nlab.progress(); lab.lab.name"
    w.save(w.extended("cross_entropy", before=use))


@hostile((), "")
def settings_of_nbgrader_beside_the_notebook(w: Workshop) -> None:
    w.save(w.notebook())
    w.write("c = get_config()", "nbgrader_config.py")
