"""The interpreter's hold on Triton's private parts, tried on each version that the course supports.

Each version is installed beside the one that is used, in build/ (which git ignores), and kept there. What the
cases count has to be the same under all of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import triton_cases
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("3.6.0", "3.9.0")
"""The oldest and the newest; the version that the course pins runs in `test_counters`."""


@cache
def installed(version: str) -> Path:
    """The folder that holds this version of Triton and nothing else."""
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    folder = build / f"triton-{version}"
    with FileLock(build / f"triton-{version}.lock"):
        if not (folder / "triton" / "__init__.py").exists():
            with tempfile.TemporaryDirectory(dir=build) as scratch:
                target = Path(scratch, "packages")
                command = [
                    sys.executable,
                    "-m",
                    "pip",
                    "install",
                    "--quiet",
                    "--no-deps",
                    "--target",
                    str(target),
                ]
                done = subprocess.run([*command, f"triton=={version}"], capture_output=True, text=True)
                if done.returncode:
                    pytest.fail(
                        f"Triton {version} could not be installed beside this one, so that it is not known "
                        f"whether kernels can be counted with it:\n{done.stderr.strip()[-1500:]}",
                        pytrace=False,
                    )
                os.replace(target, folder)
    return folder


def run(version: str, code: list[str], cache_folder: Path) -> str:
    paths = os.pathsep.join((str(installed(version)), str(ROOT), str(Path(__file__).parent)))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(cache_folder)}
    done = subprocess.run(
        [sys.executable, *code], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, f"Triton {version}\n{done.stderr[-4000:]}"
    return done.stdout.splitlines()[-1]


@cache
def counted_here() -> dict[str, Any]:
    """As JSON brings it: keys are strings."""
    return json.loads(json.dumps({name: case() for name, case in triton_cases.CASES.items()}))


@pytest.mark.parametrize("version", VERSIONS)
def test_every_case_holds_and_counts_the_same(version: str, tmp_path: Path) -> None:
    found = json.loads(run(version, [str(Path(triton_cases.__file__))], tmp_path))
    assert found["version"] == version
    assert found["counters"] == counted_here()


COMPILE = """
import json, torch, triton, triton_cases as cases
from llmcourse.kernels.compile_report import compile_report
from llmcourse.kernels.counters import count

def language():
    parts = (triton.language, triton.language.core, triton.language.tensor)
    return {(part.__name__, name): value for part in parts for name, value in vars(part).items()}

x = torch.randn(4, 64)
h = torch.empty(64, 64, dtype=torch.float16)
count(cases.copy_kernel)[(1,)](x, x, 4, 1, 0, BLOCK=4)  # imports what it needs
before = language()
count(cases.softmax_kernel)[(4,)](x, torch.empty_like(x), 64, 64, BLOCK=64)
assert language() == before
rows = compile_report(cases.softmax_kernel, x, x, 64, 64, BLOCK=1024, num_warps=8, capabilities=(80,))
tile = dict(BM=64, BN=64, BK=32)
tiles = compile_report(cases.matmul_kernel, h, h, h.float(), 64, 64, 64, **tile, capabilities=(90,))
assert rows[80].error is None and tiles[90].error is None, (rows, tiles)
found = [rows[80].registers, rows[80].spills, rows[80].load_widths, tiles[90].tensor_core_opcodes]
print(json.dumps([triton.__version__, *found]))
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_kernels_are_counted_and_compiled_in_one_process(version: str, tmp_path: Path) -> None:
    name, registers, spills, widths, tensor_cores = json.loads(run(version, ["-c", COMPILE], tmp_path))
    assert name == version
    assert registers > 0
    assert spills == 0
    assert widths == {"128": 1}
    assert set(tensor_cores) == {"HGMMA"}
