"""What `ptxas` made of a kernel: the SASS lines that touch memory, branch, wait or multiply matrices."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

TOLD = re.compile(
    r"\b(LDG|STG|LD|ST|LDS|STS|LDL|STL|LDSM|STSM|LDGSTS|ATOM|ATOMG|ATOMS|RED|REDG|REDUX|BAR|BRA|BRX|BSSY|BSYNC|"
    r"WARPSYNC|EXIT|HMMA|IMMA|DMMA|SHFL|VOTE|MATCH|CALL|RET)\b"
)


def disassembler() -> str | None:
    """nvdisasm of a toolkit, or the one that Triton brings."""
    if found := shutil.which("nvdisasm"):
        return found
    for place in (Path("/usr/local/cuda/bin/nvdisasm"), *_of_triton()):
        if place.is_file():
            return str(place)
    return None


def _of_triton() -> list[Path]:
    try:
        import triton
    except ImportError:
        return []
    return [Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"]


def disassemble(cubin: Path) -> str:
    """The whole text, with source lines; empty without a disassembler."""
    tool = disassembler()
    if tool is None:
        return ""
    run = subprocess.run([tool, "-c", "-g", str(cubin)], capture_output=True, text=True, timeout=60)
    return run.stdout


def by_kernel(text: str, *, only_told: bool = True) -> dict[str, list[str]]:
    """kernel → ["line 21: 0180 LDG.E R4, [R4.64]", …]; all instructions if not `only_told`."""
    kernels: dict[str, list[str]] = {}
    lines, source = [], 0
    for row in text.splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.([\w$]+)", row):
            lines = kernels.setdefault(section[1], [])
        elif place := re.search(r'//## File ".*", line (\d+)', row):
            source = int(place[1])
        elif found := re.match(r"\s+/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", row):
            told = TOLD.search(found[2]) or not only_told
            lines += [f"line {source}: {found[1]} {' '.join(found[2].split())}"] if told else []
    return kernels
