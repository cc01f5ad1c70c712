"""`llmcourse doctor`: what this machine can do for the course, and what to do about the rest.

Each check tries the thing itself: NVRTC compiles a kernel, the assets are hashed, PyTorch is imported.
A check says what it found, what a missing part means for which chapters, and what to do. Only Python,
PyTorch and the assets are needed everywhere; without anything else the course still runs, in part.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from llmcourse import __version__, assets
from llmcourse.course import chapter

Status = Literal["ok", "warn", "missing"]
EVERYWHERE = ("python", "torch", "model", "text")
KERNEL = 'extern "C" __global__ void twice(float *x) { x[threadIdx.x] *= 2.0f; }'
INSTALL = "make start, or pip install -c constraints.txt -e '.[notebook]'"


@dataclass(frozen=True)
class Check:
    """One finding. `means` and `do` are empty when `status` is ok; `chapters` are those affected."""

    name: str
    status: Status
    found: str
    means: str = ""
    do: str = ""
    chapters: tuple[str, ...] = ()


def collect() -> list[Check]:
    """All checks, in a fixed order. Takes a few seconds at most; writes nothing."""
    checks: tuple[Callable[[], Check], ...] = (
        _python,
        _torch,
        _gpu,
        _triton,
        _nvrtc,
        _jupyter,
        _grading,
        _memory,
        _disk,
        _model,
        _text,
    )
    return [check() for check in checks]


def healthy(checks: list[Check]) -> bool:
    """True if nothing that every chapter needs is missing."""
    return not any(c.status == "missing" and c.name in EVERYWHERE for c in checks)


def report(as_json: bool) -> int:
    """Print the checks as a table, or as JSON with the keys version, ok and checks. Returns the exit code."""
    checks = collect()
    if as_json:
        found = {
            "version": __version__,
            "ok": healthy(checks),
            "checks": [dataclasses.asdict(c) for c in checks],
        }
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _print(checks)
    return 0 if healthy(checks) else 1


def _print(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    marks = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "missing": ("✗", "red")}
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for check in checks:
        mark, style = marks[check.status]
        cell = Text(check.found)
        if check.means:
            cell.append(f"\n{check.means}", "dim")
        if check.do:
            cell.append(f"\n→ {check.do}", "dim")
        table.add_row(Text(mark, style), Text(check.name, "bold"), cell)
    console = Console()
    console.print(table)
    if not healthy(checks):
        bad = ", ".join(c.name for c in checks if c.status == "missing" and c.name in EVERYWHERE)
        console.print(f"\n[red]Every chapter needs what is missing here: {bad}.[/]")
    elif all(c.status == "ok" for c in checks):
        console.print("\nEvery chapter runs on this machine.")
    else:
        console.print("\nThe course runs on this machine; the marked lines say what is different.")


def _numbers(*names: str) -> tuple[str, ...]:
    return tuple(chapter(name).number for name in names)


def _say(numbers: tuple[str, ...]) -> str:
    return f"chapter{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"


def _load(module: str) -> str | None:
    """Import a module and return None, or the reason why it can't be imported (absent, or broken)."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"not installed ({error})"
    except Exception as error:  # a broken binary raises OSError, RuntimeError, …
        return f"broken ({type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''})"
    return None


def _version(package: str) -> str | None:
    """The version of a package that could be imported, without importing it; None if it is absent."""
    try:
        return metadata.version(package) if importlib.util.find_spec(package) else None
    except (ImportError, ValueError):
        return None


def _python() -> Check:
    found = f"{platform.python_version()} ({sys.executable})"
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Check("python", "ok", found)
    means = "The pinned packages exist for Python 3.11, 3.12 and 3.13 only."
    return Check("python", "missing", found, means, "make start PYTHON=python3.12")


def _torch() -> Check:
    if reason := _load("torch"):
        return Check("torch", "missing", reason, "Every chapter computes with PyTorch.", INSTALL)
    import torch

    if torch.version.cuda:
        build = f"CUDA {torch.version.cuda}"
    else:
        build = f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"
    threads = torch.get_num_threads()
    return Check("torch", "ok", f"{torch.__version__}, {build} build, {threads} threads")


def _gpu() -> Check:
    numbers = _numbers(
        "gpu_architecture",
        "memory_hierarchy",
        "triton_kernels",
        "streams_graphs_transfers",
        "flash_attention",
        "quantization",
        "paged_kv_cache",
        "serving_frameworks",
    )
    means = (
        "Kernels run on the CPU instead, with exact memory counters; GPU times, "
        f"as in {_say(numbers)}, are shown as recorded on an H100."
    )
    if _load("torch"):
        return Check("gpu", "warn", "unknown without torch", means, INSTALL, numbers)
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") and not torch.version.cuda:
            found, do = "there may be one, but this PyTorch is a CPU build", "make start TORCH=cuda"
        elif torch.version.cuda and shutil.which("nvidia-smi"):
            found, do = "the driver gives none to PyTorch", "nvidia-smi, to see what the driver says"
        else:
            found, do = "none", "nothing is to be done; Colab's T4 runs the same notebooks"
        return Check("gpu", "warn", found, means, do, numbers)
    major, minor = torch.cuda.get_device_capability()
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9
    found = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}, {memory:.0f} GB"
    if (count := torch.cuda.device_count()) > 1:
        found += f", {count} of them"
    if (major, minor) < (7, 5):
        old = (
            f"Triton and NVRTC no longer compile for it ({major}.{minor} < 7.5): its times can't be measured."
        )
        return Check("gpu", "warn", found, old, "a T4 or newer, such as Colab's", numbers)
    return Check("gpu", "ok", found)


def _triton() -> Check:
    numbers = _numbers("triton_kernels", "flash_attention", "quantization", "lora", "paged_kv_cache")
    if reason := _load("triton"):
        means = f"Triton kernels can be read but not run: {_say(numbers)}."
        do = INSTALL if sys.platform == "linux" else "Linux, WSL or Colab: Triton is made for Linux only"
        return Check("triton", "warn", reason, means, do, numbers)
    where = "compiled for the GPU" if _has_gpu() else "run on the CPU by its interpreter"
    return Check("triton", "ok", f"{_version('triton') or ''}, kernels {where}".lstrip(", "))


def _has_gpu() -> bool:
    if _load("torch"):
        return False
    import torch

    return bool(torch.cuda.is_available())


def _nvrtc() -> Check:
    numbers = _numbers("gpu_architecture", "memory_hierarchy", "triton_kernels")
    means = f"CUDA C++ cells can be read but not run: {_say(numbers)}."
    do = "Linux, Windows or Colab: NVIDIA makes no NVRTC for macOS" if sys.platform == "darwin" else INSTALL
    if reason := _load("cuda.bindings.nvrtc"):
        return Check("nvrtc", "warn", reason, means, do, numbers)
    from llmcourse.vgpu import headers, nvrtc

    try:
        ptx = nvrtc.compile_source(KERNEL).ptx
        major, minor = nvrtc.version()
    except Exception as error:  # cuda-bindings looks for the library only when it is first called
        return Check("nvrtc", "warn", f"does not compile: {error}", means, do, numbers)
    instructions = sum(line.strip().endswith(";") for line in ptx.splitlines())
    found = f"{major}.{minor}, compiled a test kernel to {instructions} lines of PTX"
    if absent := headers.missing():
        means = f"CUDA C++ without {', '.join(absent)}: half precision and tensor cores do not compile."
        do = "pip install nvidia-cuda-runtime nvidia-cuda-crt"
        return Check("nvrtc", "warn", found, means, do, numbers)
    return Check("nvrtc", "ok", found)


def _jupyter() -> Check:
    versions = {name: _version(name) for name in ("jupyterlab", "ipykernel", "ipywidgets")}
    absent = [name for name, version in versions.items() if version is None]
    if absent:
        means = "Notebooks can't be opened or run, or their widgets stay still; the commands work."
        return Check("jupyter", "warn", f"{', '.join(absent)} not installed", means, INSTALL)
    return Check("jupyter", "ok", ", ".join(f"{name} {version}" for name, version in versions.items()))


def _grading() -> Check:
    """For instructors: a learner needs neither nbgrader nor a sandbox."""
    version = _version("nbgrader")
    if version is None:
        return Check("grading", "ok", "nbgrader not installed; only who grades a class needs it")
    try:
        from llmcourse.grading import sandbox

        problem = sandbox.available()
    except ImportError as error:
        problem = str(error)
    if problem:
        means = "Submissions of a class can't be run in isolation here; your own labs can be checked."
        return Check("grading", "warn", f"nbgrader {version}; {problem}", means, "apt install bubblewrap")
    return Check("grading", "ok", f"nbgrader {version}, submissions run in a sandbox")


def _memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f} GB"
    if memory.available < 2e9:
        means = "A notebook with the model takes about 1.5 GB: it may be stopped by the system."
        return Check("memory", "warn", found, means, "closing other programs and idle notebooks")
    return Check("memory", "ok", found)


def _disk() -> Check:
    folders = {"here": Path.cwd(), "in the cache": assets.cache_folder()}
    free = {where: shutil.disk_usage(_existing(folder)).free for where, folder in folders.items()}
    found = ", ".join(f"{bytes_ / 1e9:.1f} GB free {where}" for where, bytes_ in free.items())
    if min(free.values()) < 1e9:
        means = "Notebooks write checkpoints and reports; the model and the text take 0.3 GB while fetched."
        return Check("disk", "warn", found, means, "freeing space, or LLMCOURSE_CACHE=/path/with/room")
    return Check("disk", "ok", found)


def _existing(folder: Path) -> Path:
    return next(f for f in (folder, *folder.parents) if os.path.exists(f))


def _model() -> Check:
    names = ("start_here", "transformer", "pretraining_to_rlhf", "quantization", "lora", "distillation")
    numbers = _numbers(*names, "pruning", "kv_cache_and_decoding", "speculative_decoding", "capstone")
    return _asset(
        assets.MODEL, f"It is the model that speaks and is taken apart in {_say(numbers)}.", numbers
    )


def _text() -> Check:
    numbers = _numbers("pretraining_to_rlhf", "attention_variants", "distillation")
    return _asset(assets.TEXT, f"It is the text that models are trained on in {_say(numbers)}.", numbers)


def _asset(asset: assets.Asset, means: str, numbers: tuple[str, ...]) -> Check:
    wrong = assets.problem(asset)
    if wrong is None:
        return Check(asset.name, "ok", f"{asset.title}, SHA-256 as expected, in {asset.folder}")
    found = f"not in {assets.cache_folder()}" if wrong == "missing" else f"altered or cut short: {wrong}"
    return Check(asset.name, "missing", found, means, "llmcourse assets fetch", numbers)
