"""CUDA kernels are judged by what their PTX does in the judge's process: values, counters, faults, limits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_time import least

from llmcourse.grading import sandbox
from llmcourse.grading.compare import Mismatch
from llmcourse.grading.kernel_exercise import KernelExercise
from llmcourse.grading.kernel_subject import JudgedKernel
from llmcourse.grading.kernel_trial import (
    at_most,
    launch,
    no_conflicts,
    out,
    per_request,
    unwritten,
    written,
)
from llmcourse.grading.session import Cell, RemoteSubject, Session
from llmcourse.grading.trial import LocalSubject, Trial
from llmcourse.grading.verdict import Verdict, judge
from llmcourse.labs import LABS
from llmcourse.vgpu import cuda
from llmcourse.vgpu.faults import KernelFault, PtxError

ROOT = Path(__file__).parents[2]
START = "from llmcourse.vgpu import cuda"
SIGNATURE = "const float* x, float* y, int n"
TWICE = "int i = blockIdx.x * blockDim.x + threadIdx.x; if (i < n) y[i] = 2 * x[i];"


def kernel(body: str, name: str = "twice", signature: str = SIGNATURE) -> cuda.Kernel:
    return cuda.compile(f"__global__ void {name}({signature}) {{\n{body}\n}}")[name]


def exercise(*watch: str, block: int = 64, shared: int = 0) -> KernelExercise:
    """y = 2x, with one check for the values and one for the traffic."""
    made = KernelExercise(
        "twice",
        title="Twice",
        arguments=("grid", "block", "x", "y", "n"),
        signature=SIGNATURE,
        shapes=("x, y  float32 [n]",),
        formula="y = 2x",
        difficulty=1,
        importance=1,
        minutes=1,
        points=1,
        hints=("?", "!", "2 * x[i]"),
    )

    @made.check("every element is doubled")
    def values(t: Trial) -> None:
        for n in (3 * block, 2 * block + 5):
            x = t.normal(n + 8, dtype=np.float32)
            run = launch(t, 3, block, x, out(n + 8), n, shared=shared)
            written(t, run.arrays[0], np.append(2 * x[:n], unwritten(8)), "y")

    @made.check("each element is loaded once")
    def traffic(t: Trial) -> None:
        x = t.normal(2 * block, dtype=np.float32)
        run = launch(t, 2, block, x, out(2 * block), 2 * block, watch=("global_load_bytes", *watch))
        at_most(run, "global_load_bytes", x.nbytes, "each element once", "one load.")
        per_request(run, "load", 4, "neighbours.")
        no_conflicts(run, "padding.")

    return made


def verdict_on(body: str, *, seed: int = 1, **options: Any) -> Verdict:
    return judge(exercise(**options), LocalSubject(kernel(body), "twice"), seed)


# ── what is handed over ──────────────────────────────────────────────────────────────────────────


def test_a_kernel_answers_a_call_with_three_texts() -> None:
    call = LocalSubject(kernel(TWICE)).call(())
    assert call.error is None
    assert {name: type(text) for name, text in call.value.items()} == {"name": str, "ptx": str, "source": str}
    assert "y[i] = 2 * x[i];" in call.value["source"]


def test_a_right_kernel_passes_and_its_launches_are_the_calls_of_the_verdict() -> None:
    verdict = verdict_on(TWICE)
    assert verdict.ok
    calls = verdict.results[1].calls
    assert [call.costs for call in calls] == [{"global_load_bytes": 512}]
    assert calls[0].args[:2] == (2, 64)


@pytest.mark.parametrize(
    "given",
    [None, 3, "text", {}, {"ptx": 1, "name": 2, "source": 3}, {"ptx": "x", "name": "k"}, [1, 2, 3]],
    ids=repr,
)
def test_what_is_no_kernel_is_a_verdict_that_says_so(given) -> None:
    verdict = judge(exercise(), LocalSubject(lambda: given, "twice"), 1)
    assert verdict.state == "failed"
    assert "is no CUDA kernel" in str(verdict)


def test_a_python_function_of_that_name_is_told_apart_from_a_kernel() -> None:
    verdict = judge(exercise(), LocalSubject(lambda x, y, n: None, "twice"), 1)
    assert "TypeError" in str(verdict)


def test_the_text_is_fetched_once_so_it_cannot_be_another_kernel_for_the_counters() -> None:
    right, lean = kernel(TWICE).as_text(), kernel("").as_text()
    wasteful = kernel(TWICE.replace("2 * x[i]", "x[i] + ((volatile float*)x)[i]")).as_text()
    for texts in ([wasteful, lean, lean], [lean, right, right]):
        subject = LocalSubject(lambda texts=texts: texts.pop(0), "twice")
        assert not judge(exercise(), subject, 1).ok
        assert len(texts) == 2


def test_hand_written_ptx_is_judged_by_what_it_does() -> None:
    text = kernel(TWICE).as_text()
    assert judge(exercise(), LocalSubject(lambda: {**text, "source": ""}, "twice"), 1).ok
    wrong = {**text, "ptx": text["ptx"].replace("add.f32", "mul.f32")}
    assert wrong != text
    assert "y: first difference at [0]" in str(judge(exercise(), LocalSubject(lambda: wrong, "twice"), 1))


# ── faults ───────────────────────────────────────────────────────────────────────────────────────

SHARED = "__shared__ float s[64]; int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;\n"
FAULTS = {
    "out of bounds": ("int i = blockIdx.x * blockDim.x + threadIdx.x;\ny[i] = 2 * x[i];", 3, "thread "),
    "misaligned": (
        "float2 v = ((const float2*)(x + 1))[0]; y[threadIdx.x] = v.x + v.y;",
        2,
        "no multiple of 8",
    ),
    "race": (f"{SHARED}if (i < n) s[t] = 2 * x[i];\nif (i < n) y[i] = s[t ^ 32];", 4, "thread"),
    "uninitialised": (f"{SHARED}if (i < n) y[i] = s[t] + x[i];", 3, "which nobody has written"),
    "divergent barrier": (f"{SHARED}if (t < 40)\n__syncthreads();\nif (i < n) y[i] = 2 * x[i];", 4, "thread"),
    "endless": ("while (n > 0) y[0] = x[0];", 2, "did not end"),
    "assertion": ("if (threadIdx.x == 5) __trap();", 2, "thread 5"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_fails_with_its_line_its_block_and_thread_and_what_to_try(kind) -> None:
    body, line, says = FAULTS[kind]
    verdict = verdict_on(body)
    first = verdict.first_failure
    assert first is not None
    assert first.calls[-1].error.kind.startswith(f"{kind}:")
    text = str(verdict)
    assert f"cell.cu:{line}: " in text
    assert f"{line} │ {body.splitlines()[line - 2].strip()}" in text
    assert "(block " in text
    assert says in text
    assert "\n  Try: " in text


def test_a_kernel_that_does_not_end_is_launched_once_and_answers_in_time() -> None:
    def judged() -> None:
        verdict = verdict_on("for (;;) y[threadIdx.x] += x[threadIdx.x];")
        assert [len(r.calls) for r in verdict.results] == [1, 1]
        assert "did not end" in str(verdict)

    assert least(judged, within=2) < 2


def test_a_launch_that_the_kernel_does_not_fit_is_a_verdict() -> None:
    bounded = "__global__ void __launch_bounds__(32) twice(const float* x, float* y, int n) { y[0] = x[0]; }"
    compiled = cuda.compile(bounded).twice
    assert "__launch_bounds__" in str(judge(exercise(), LocalSubject(compiled, "twice"), 1))
    fewer = kernel("y[0] = 1;", signature="float* y, int n")
    assert "takes 2 arguments" in str(judge(exercise(), LocalSubject(fewer, "twice"), 1))
    large = kernel("__shared__ float s[13000]; s[threadIdx.x] = x[0]; y[0] = s[threadIdx.x];")
    assert "shared memory" in str(judge(exercise(), LocalSubject(large, "twice"), 1))


# ── what is asked of a launch ────────────────────────────────────────────────────────────────────


def test_an_input_that_is_written_an_element_that_is_not_and_one_past_the_end_are_named() -> None:
    assert "argument x was written to" in str(verdict_on("((float*)x)[0] = 1;"))
    assert "y[0] was not written" in str(verdict_on(f"if (threadIdx.x == 0) return; {TWICE}"))
    assert "y[133] is past the end and was written" in str(verdict_on(TWICE.replace("i < n", "i <= n")))


def test_a_counter_beyond_its_bound_is_told_with_its_line() -> None:
    twice_loaded = "int i = blockIdx.x * blockDim.x + threadIdx.x;\nvolatile const float* v = x;\n"
    text = str(verdict_on(f"{twice_loaded}if (i < n) y[i] = v[i] + v[i];"))
    assert "global_load_bytes = 1,024, expected at most 512: each element once" in text
    assert "line 4: if (i < n) y[i] = v[i] + v[i];" in text
    apart = "int i = threadIdx.x * gridDim.x + blockIdx.x;\nif (i < n) y[i] = 2 * x[i];"
    assert "global_load_sectors / global_load_requests = 8, expected at most 4\n  line 3: " in str(
        verdict_on(apart)
    )
    two_in_a_bank = "int p = t * 2 % 64 + t / 32; if (i < n) s[p] = x[i];\nif (i < n) y[i] = 2 * s[p];"
    text = str(verdict_on(SHARED + two_in_a_bank))
    assert "shared_store_bank_conflicts = 4 in 4 requests, expected 0\n  line 3: int p = t * 2 % 64" in text


def test_a_mistake_is_recognised_in_a_kernel_that_is_written_differently() -> None:
    made = exercise()
    made.mistake(says="every thread works", tries="if (i < n).", caught_by="values")(
        lambda: "int i = blockIdx.x * blockDim.x + threadIdx.x; y[i] = 2 * x[i];"
    )
    other = kernel("const unsigned me = threadIdx.x + blockDim.x * blockIdx.x;\n*(y + me) = x[me] + x[me];")
    verdict = judge(made, LocalSubject(other, "twice"), 3)
    assert verdict.sure
    assert "This is what you get when every thread works." in str(verdict)


def test_another_fault_of_the_same_kind_is_not_the_same_mistake() -> None:
    made = exercise()
    made.mistake(says="the load is unguarded", tries="a guard.", caught_by="values")(
        lambda: "int i = blockIdx.x * blockDim.x + threadIdx.x; float v = x[i]; if (i < n) y[i] = 2 * v;"
    )
    other = kernel(
        "int i = blockIdx.x * blockDim.x + threadIdx.x; float v = i < n ? x[i] : 0; y[i + 60] = 2 * v;"
    )
    assert judge(made, LocalSubject(other, "twice"), 3).mistake is None


# ── what a text may cost ─────────────────────────────────────────────────────────────────────────

HEAD = ".version 9.0\n.target sm_80\n.address_size 64\n"
ENTRY = HEAD + ".visible .entry k(.param .u64 a, .param .u64 b, .param .u32 n)\n{\n%s\nret;\n}\n"
CALLS = "".join(f".func f{i}()\n{{\n call f{i + 1},();\n call f{i + 1},();\n}}\n" for i in range(40))
TOO_MUCH = {
    "a billion registers": ENTRY % ".reg .b32 %r<1000000000>;",
    "calls that double": f"{HEAD}{CALLS}.func f40(){{ ret; }}\n.entry k()\n{{ call f0,(); ret; }}\n",
    "a long text": ENTRY % ("//" + "x" * 300_000),
    "many branches": ENTRY
    % (".reg .pred %p;\n" + "".join(f"$L{i}:\n@%p bra $L{999 - i};\n" for i in range(1000))),
    "gigabytes of local memory": ENTRY % ".local .align 4 .b8 x[4000000000];",
    "a large constant": HEAD + ".const .align 4 .b8 x[4000000];\n" + ENTRY % "" + "",
    "half a kernel": (ENTRY % "")[:-6],
    "nothing": "",
    "no PTX": "def k(): pass",
    "an unknown instruction": ENTRY % "wgmma.fence.sync.aligned;",
    "operands that it cannot have": ENTRY % ".reg .b32 %r<9>;\nld.global.f32 %r1;",
    "a label that is not there": ENTRY % "bra $L1;",
}


def verdict_on_ptx(text: str) -> Verdict:
    return judge(exercise(), LocalSubject(lambda: {"name": "k", "ptx": text, "source": ""}, "twice"), 1)


@pytest.mark.parametrize("what", TOO_MUCH)
def test_ptx_that_is_too_much_or_no_ptx_is_a_failing_verdict_at_once(what) -> None:
    def judged() -> None:
        verdict = verdict_on_ptx(TOO_MUCH[what])
        assert verdict.state == "failed"
        assert verdict.first_failure.kind == "Mismatch"

    assert least(judged, within=2) < 2


def test_a_long_straight_kernel_and_a_loop_of_it_end_in_time() -> None:
    adds = "".join(f"add.s32 %r{i}, %r{i - 1}, %r1;\n" for i in range(2, 3000))
    looped = f"mov.u32 %r1, %tid.x;\n$L0:\n{adds}setp.eq.s32 %p, %r1, %r1;\n@%p bra $L0;"
    text = ENTRY % f".reg .pred %p;\n.reg .b32 %r<3000>;\n{looped}"

    def judged() -> None:
        assert "did not end" in str(verdict_on_ptx(text))

    assert least(judged, within=5) < 5


def test_printing_costs_and_says_nothing(capsys) -> None:
    assert verdict_on(f'printf("%*d", 1 << 30, 7); {TWICE}').ok
    assert capsys.readouterr().out == ""


def test_changed_ptx_never_stops_the_judge() -> None:
    text = kernel(
        f"{SHARED}if (i < n) s[t] = x[i]; __syncthreads();\nif (i < n) y[i] = s[t] + s[t];"
    ).as_text()
    rng = np.random.default_rng(7)
    lines = text["ptx"].splitlines()
    body = [i for i, line in enumerate(lines) if line.strip().endswith(";")]
    states = set()
    for _ in range(60):
        changed = list(lines)
        for i in rng.choice(body, 2):
            kind, other = rng.integers(4), changed[rng.choice(body)]
            changed[i] = [
                "",
                changed[i] + "\n" + other,
                changed[i].replace("32", "64"),
                "@%p1 " + changed[i],
            ][kind]
        given = {**text, "ptx": "\n".join(changed)}
        states.add(judge(exercise(), LocalSubject(lambda given=given: given, "twice"), 1).state)
    assert states == {"failed", "passed"}


# ── from another process ─────────────────────────────────────────────────────────────────────────


def cell(body: str, name: str = "twice") -> Cell:
    return Cell(name, f"%%cuda\n__global__ void {name}({SIGNATURE}) {{\n{body}\n}}")


@pytest.mark.parametrize("sandboxed", [False, True])
def test_a_cell_of_a_submission_is_compiled_there_and_judged_here(sandboxed) -> None:
    if sandboxed and sandbox.available():
        pytest.skip("no sandbox")
    cells = [
        Cell("start", START),
        cell(TWICE),
        cell("y[0] = x[n + 8];", "wrong"),
        cell("#error not implemented yet", "todo"),
    ]
    with Session(cells, sandbox=sandboxed) as session:
        assert [r.error for r in session.run()] == [None] * 4
        right = judge(exercise(), RemoteSubject(session, "twice"), 1)
        assert right.ok, str(right)
        wrong = judge(exercise(), RemoteSubject(session, "wrong"), 1)
        assert "cell.cu:3: global load out of bounds" in str(wrong)
        assert judge(exercise(), RemoteSubject(session, "todo"), 1).state == "open"
        assert judge(exercise(), RemoteSubject(session, "nowhere"), 1).missing
        x, y = np.ones(5, np.float32), np.zeros(5, np.float32)
        counters = RemoteSubject(session, "twice")[1, 32](x, y, 5)
        assert y.tolist() == [2.0] * 5
        assert counters.global_load_bytes == 20


def test_a_submission_that_changes_the_machine_of_its_own_process_gains_nothing() -> None:
    forged = f"""
import llmcourse.vgpu.machine, llmcourse.vgpu.counters, llmcourse.grading.perform as perform
llmcourse.vgpu.machine.execute = lambda *args, **kwargs: None
llmcourse.vgpu.counters.Counters.total = property(lambda self: {{}})
perform.perform = lambda *args: perform.Call((), value=True)
twice = cuda.compile('''__global__ void twice({SIGNATURE}) {{ }}''').twice"""
    with Session([Cell("start", START), Cell("forged", forged)], sandbox=False) as session:
        verdict = judge(exercise(), RemoteSubject(session, "twice"), 1)
    assert verdict.state == "failed"
    assert "y[0] was not written" in str(verdict)


def test_control_characters_in_a_source_do_not_reach_the_message() -> None:
    text = kernel("y[threadIdx.x] = x[n + 8];").as_text()
    source = text["source"].replace("y[thr", "\x1b[31m\x07y[thr")
    verdict = judge(exercise(), LocalSubject(lambda: {**text, "source": source}, "twice"), 1)
    assert "y[threadIdx.x] = x[n + 8];" in str(verdict)
    assert not any(c in str(verdict) for c in "\x1b\x07")


def test_a_kernel_can_be_run_by_itself_with_limits() -> None:
    text = kernel(TWICE).as_text()
    judged = JudgedKernel.from_plain(text, "twice")
    x, y = np.arange(4, dtype=np.float32), np.zeros(4, np.float32)
    assert judged.run(1, 32, (x, y, 4)).global_store_bytes == 16
    assert y.tolist() == [0, 2, 4, 6]
    with pytest.raises(KernelFault, match="element 4 of x"):
        judged.run(1, 32, (x, np.zeros(9, np.float32), 9), names=("x", "y", "n"))
    with pytest.raises(PtxError, match="no kernel called"):
        JudgedKernel("twice", "thrice", text["ptx"])
    with pytest.raises(Mismatch):
        JudgedKernel.from_plain(None, "twice")


@pytest.mark.parametrize("lab", [lab for lab in LABS if lab.number in ("03", "04")], ids=lambda lab: lab.name)
def test_the_bank_has_the_signatures_that_the_notebook_has(lab) -> None:
    """Else mistakes would be compared with kernels that take other arguments."""
    nb = json.loads((ROOT / "labs" / lab.name / f"{lab.name}.ipynb").read_text(encoding="utf-8"))
    cells = {cell["id"]: "".join(cell["source"]) for cell in nb["cells"]}
    kernels = [e for e in lab.exercises if isinstance(e, KernelExercise)]
    assert len(kernels) >= 4
    for made in kernels:
        assert f"__global__ void {made.name}({made.signature}) {{" in cells[made.name]
        names = [part.split()[-1].lstrip("*") for part in made.signature.split(",")]
        assert list(made.arguments) == ["grid", "block", *names]


def test_a_check_of_a_kernel_imports_no_torch() -> None:
    """It takes seconds, and a learner waits for them."""
    script = (
        "import sys\n"
        "from llmcourse.grading.trial import LocalSubject\n"
        "from llmcourse.grading.verdict import judge\n"
        "from llmcourse.labs import find_lab\n"
        "e = find_lab('03').exercise('grid_stride_saxpy')\n"
        "assert judge(e, LocalSubject(e.alternatives[0].fn, e.name), 1).ok\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
