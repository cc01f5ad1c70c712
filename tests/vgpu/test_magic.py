"""%%cuda in a real IPython shell: kernels appear, errors are three parts, lines are those of the cell."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("cuda.bindings.nvrtc")
pytest.importorskip("IPython")

from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from llmcourse.vgpu import cuda, magic, native

KERNEL = "__global__ void twice(float* x) {\n  x[threadIdx.x] *= 2;\n}\n"


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> InteractiveShell:
    monkeypatch.setattr(native, "available", lambda: False)  # the summary tells of the machine
    config = Config()
    config.HistoryManager.enabled = False
    shell = InteractiveShell(config=config)
    magic.load_ipython_extension(shell)
    return shell


def run(shell: InteractiveShell, cell: str):
    return shell.run_cell(cell, store_history=False)


def test_kernels_become_callables(shell: InteractiveShell, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(shell, f"%%cuda\n{KERNEL}").success
    said = capsys.readouterr().out
    assert said.startswith("twice: ")
    assert "PTX instructions for sm_80" in said
    assert len(said.splitlines()) == 1
    shell.user_ns["x"] = np.ones(32, "f4")
    assert run(shell, "result = twice[1, 32](x)").success
    assert (shell.user_ns["x"] == 2).all()


def test_line_n_is_line_n_of_the_cell(shell: InteractiveShell) -> None:
    run(shell, f"%%cuda\n\n{KERNEL}")
    kernel = shell.user_ns["twice"]
    assert kernel.source.splitlines()[0] == "// %%cuda"
    x = np.ones(32, "f4")
    result = kernel[1, 32](x)
    assert {n for n, c in result.counters.lines.items() if c["global_load_requests"]} == {4}
    with pytest.raises(cuda.KernelFault) as caught:
        kernel[1, 33](x)
    assert caught.value.line.line == 4


def test_a_name_keeps_the_module_and_options_are_passed(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "template <typename T> __global__ void fill(T* x) { x[threadIdx.x] = VALUE; }"
    names = '--names "fill<float>" --names "fill<int>"'
    line = f"%%cuda tools --arch sm_90 -D VALUE=7 {names} --option=--use_fast_math"
    assert run(shell, f"{line} --show\n{source}").success
    module = shell.user_ns["tools"]
    assert (module.arch, module.options) == ("sm_90", ("--use_fast_math", "-DVALUE=7"))
    assert ".target sm_90" in capsys.readouterr().out
    assert shell.user_ns["fill_int"] is module["fill<int>"]
    assert "fill" not in shell.user_ns
    x = np.zeros(4, "i4")
    shell.user_ns["fill_int"][1, 4](x)
    assert (x == 7).all()


def test_a_single_instance_also_has_its_plain_name(shell: InteractiveShell) -> None:
    run(shell, '%%cuda --names "f<3>"\ntemplate <int N> __global__ void f(int* x) { x[0] = N; }')
    assert shell.user_ns["f"] is shell.user_ns["f_3"]


def test_an_error_fails_the_cell_and_shows_no_python(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(shell, "%%cuda\n__global__ void k(float* x) {\n  x[0] = nothing;\n}\n")
    said = capsys.readouterr()
    text = said.out + said.err
    assert isinstance(result.error_in_exec, cuda.CompileError)
    assert "line 3" in text
    assert "x[0] = nothing;" in text
    assert "Try " in text
    assert "Traceback" not in text
    assert ".py" not in text
    assert "k" not in shell.user_ns


def test_a_launch_that_fails_shows_the_readers_line_and_not_the_packages(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    run(shell, f"%%cuda\n{KERNEL}")
    run(shell, "import numpy as np\ndef mine(n):\n    twice[1, n](np.ones(32, 'f4'))")
    capsys.readouterr()
    for cell, error in (
        ("mine(33)", cuda.KernelFault),
        ("mine(0)", cuda.LaunchError),
        ("twice()", cuda.LaunchError),
    ):
        assert isinstance(run(shell, cell).error_in_exec, error)
        text = "".join(capsys.readouterr())
        assert cell in text
        assert "Try " in text
        assert ".py" not in text
    run(shell, "mine(33)")
    assert "line 3:\x1b[0m twice[1, n](np.ones(32, 'f4'))" in "".join(capsys.readouterr())


def test_a_line_that_cannot_be_read_says_what_it_takes(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in ("--nonsense", "two words", "not-a-name", '--names "f<float>'):
        result = run(shell, f"%%cuda {line}\n{KERNEL}")
        assert isinstance(result.error_in_exec, magic.MagicError), line
        text = "".join(capsys.readouterr())
        assert "%%cuda" in text
        assert "Traceback" not in text


def test_warnings_are_shown_with_their_line(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    run(shell, "%%cuda\n__global__ void k(float* x) {\n  int spare;\n  x[0] = 1;\n}\n")
    assert "warning, line 3" in capsys.readouterr().out


def test_the_extension_loads_by_name_and_by_import(shell: InteractiveShell) -> None:
    config = Config()
    config.HistoryManager.enabled = False
    fresh = InteractiveShell(config=config)
    assert "cuda" not in fresh.magics_manager.magics["cell"]
    assert run(fresh, "%load_ext llmcourse.vgpu.magic").success
    assert "cuda" in fresh.magics_manager.magics["cell"]


def test_importing_cuda_registers_the_magic(monkeypatch: pytest.MonkeyPatch) -> None:
    import IPython

    config = Config()
    config.HistoryManager.enabled = False
    fresh = InteractiveShell(config=config)
    monkeypatch.setattr(IPython, "get_ipython", lambda: fresh)
    magic.register()
    assert "cuda" in fresh.magics_manager.magics["cell"]


def test_outside_of_ipython_nothing_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    import IPython

    monkeypatch.setattr(IPython, "get_ipython", lambda: None)
    magic.register()
