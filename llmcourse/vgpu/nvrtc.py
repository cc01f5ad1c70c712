"""CUDA C++ → PTX or cubin, by NVIDIA's runtime compiler (NVRTC), which needs neither a driver nor a GPU.

PTX is what the machine of this package runs: NVIDIA's portable instruction set, made here with `-lineinfo`,
so that each instruction knows its line of C++. A cubin is what a GPU runs: PTX assembled for one architecture
by `ptxas`, which sits inside NVRTC and also tells how many registers each kernel takes.

Line N of the source is line N in every message and counter.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

from llmcourse.errors import DeviceError, MissingPackageError
from llmcourse.vgpu.compile_error import CompileError
from llmcourse.vgpu.diagnostics import Diagnostic, read
from llmcourse.vgpu.headers import FIRST, STAND_INS, include_folders

DEFAULT_ARCH = "sm_80"
"""The oldest architecture with all that the course uses: cp.async, bf16 tensor cores, redux.sync."""
SOURCE_NAME = "cell.cu"

Arch = str | int | tuple[int, int] | None


@dataclass(frozen=True)
class Resources:
    """What one kernel takes of an SM, as `ptxas` reports it. Counts are per thread, shared memory per block.

    stack, spill_stores, spill_loads   bytes; a spill is a register that had to be kept in local memory
    """

    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int
    barriers: int


@dataclass(frozen=True)
class Compiled:
    """What a compilation gave.

    ptx        for every architecture; `cubin` empty unless it was asked for
    lowered    name expression (`copy<float>`) → name in the PTX
    resources  by name in the PTX, filled with the cubin
    log        the compiler's own words
    """

    ptx: str
    cubin: bytes
    lowered: Mapping[str, str]
    warnings: tuple[Diagnostic, ...]
    resources: Mapping[str, Resources]
    log: str


def compile_source(
    source: str,
    arch: Arch = None,
    *,
    options: Sequence[str] = (),
    defines: Mapping[str, object] | None = None,
    names: Sequence[str] = (),
    name: str = SOURCE_NAME,
    cubin: bool = False,
) -> Compiled:
    """Compile CUDA C++; the same source and options are compiled once in a process.

    arch      sm_75, "8.0", 80, (8, 0) …; None for `DEFAULT_ARCH`
    options   NVRTC's own, such as --use_fast_math
    defines   macros, as -D gives: {"TILE": 16}
    names     template kernels to instantiate: "copy<float>"
    cubin     also assemble for `arch` and read the kernels' resources

    Raises   CompileError with the source's lines; MissingPackageError without NVRTC (macOS); DeviceError for
             an architecture that it does not know.
    """
    if not isinstance(source, str):
        raise TypeError(f"CUDA C++ source is text, not {type(source).__name__}")
    target = normal_arch(arch)
    given = (*options, *define_options(defines))
    return _compile(source, target, given, tuple(names), name, cubin)


def define_options(defines: Mapping[str, object] | None) -> tuple[str, ...]:
    """{"TILE": 16, "FAST": True} → -DTILE=16, -DFAST=1; None as a value leaves the macro empty."""
    out = []
    for macro, value in (defines or {}).items():
        text = "" if value is None else str(int(value)) if isinstance(value, bool) else str(value)
        out.append(f"-D{macro}={text}")
    return tuple(out)


def normal_arch(arch: Arch) -> str:
    """sm_80 for "sm_80", "compute_80", "8.0", 80 and (8, 0); `DEFAULT_ARCH` for None."""
    if arch is None:
        return DEFAULT_ARCH
    text = "".join(map(str, arch)) if isinstance(arch, tuple) else str(arch).strip().lower()
    found = re.fullmatch(r"(?:sm_|compute_)?(\d+)(?:\.(\d))?([af]?)", text)
    if found is None:
        raise DeviceError(
            f"arch={arch!r} names no GPU architecture.",
            "Architectures are numbered by compute capability: 7.5 is a T4, 8.0 an A100, 9.0 an H100.",
            'arch="sm_75", "sm_80" or "sm_90".',
        )
    return f"sm_{found[1]}{found[2] or ''}{found[3]}"


def library() -> ModuleType:
    """cuda.bindings.nvrtc, with its shared library loaded.

    Raises   MissingPackageError where either is absent.
    """
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except Exception as error:  # absent, or the shared library is not found: each release raises its own
        raise _missing(error) from None
    return nvrtc


def _missing(error: Exception) -> MissingPackageError:
    said = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
    if sys.platform == "darwin":
        return MissingPackageError(
            "CUDA C++ cannot be compiled on macOS.",
            "NVIDIA makes its runtime compiler (NVRTC) for Linux and Windows only.",
            "the same notebook in Colab or on Linux (a virtual machine will do: no GPU is needed).",
        )
    return MissingPackageError(
        f"CUDA C++ cannot be compiled here: {said}.",
        "The compiler (NVRTC) comes in the packages cuda-bindings and nvidia-cuda-nvrtc.",
        "make start, or pip install cuda-bindings nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cuda-crt.",
    )


def version() -> tuple[int, int]:
    """NVRTC's version, as (13, 0). Raises MissingPackageError."""
    _, major, minor = library().nvrtcVersion()
    return major, minor


@lru_cache(maxsize=256)
def _compile(
    source: str, arch: str, options: tuple[str, ...], names: tuple[str, ...], name: str, cubin: bool
) -> Compiled:
    nvrtc = library()
    _check_arch(nvrtc, arch)
    # An architecture by its virtual name stops at PTX; by its real name it goes on to the cubin.
    target = arch if cubin else arch.replace("sm_", "compute_")
    arguments = [
        f"--gpu-architecture={target}",
        "-lineinfo",
        f"--pre-include={FIRST}",
        "-D_CG_LIMIT_INCLUDED_DEPENDENCIES",  # cooperative groups without libcu++: 0.05 s instead of 0.9 s
        *(f"-I{folder}" for folder in include_folders()),
        # From NVRTC's own cache (where there is a driver) a cubin comes without what ptxas said of it.
        *(["--ptxas-options=-v", "--no-cache"] if cubin else []),
        *options,
    ]
    program = _created(nvrtc, source, name)
    try:
        for expression in names:
            _checked(nvrtc, nvrtc.nvrtcAddNameExpression(program, expression.encode()))
        (result,) = nvrtc.nvrtcCompileProgram(program, len(arguments), [a.encode() for a in arguments])
        log = _text(nvrtc, program, "ProgramLog")
        found = read(log, name, source)
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            if not any(d.kind == "error" for d in found):
                found.append(Diagnostic("error", log.strip() or f"NVRTC answered {result.name}"))
            raise CompileError(found, source, log)
        lowered = {
            expression: _checked(nvrtc, nvrtc.nvrtcGetLoweredName(program, expression.encode()))[0].decode()
            for expression in names
        }
        ptx = _source_first(_local_names(_text(nvrtc, program, "PTX")), name)
        binary = _bytes(nvrtc, program, "CUBIN") if cubin else b""
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    warnings = tuple(d for d in found if d.kind == "warning")
    return Compiled(ptx, binary, lowered, warnings, read_resources(log), log)


def _check_arch(nvrtc: ModuleType, arch: str) -> None:
    (supported,) = _checked(nvrtc, nvrtc.nvrtcGetSupportedArchs())
    if int(re.sub(r"\D", "", arch)) not in supported:
        known = ", ".join(f"sm_{a}" for a in supported)
        raise DeviceError(
            f"this NVRTC ({'.'.join(map(str, nvrtc.nvrtcVersion()[1:]))}) does not compile for {arch}.",
            f"It compiles for {known}.",
            'arch="sm_75" for a T4, "sm_80" for an A100, "sm_90" for an H100.',
        )


def _created(nvrtc: ModuleType, source: str, name: str) -> Any:
    headers = {n: text.encode() for n, text in STAND_INS.items()}
    (program,) = _checked(
        nvrtc,
        nvrtc.nvrtcCreateProgram(
            source.encode(),
            name.encode(),
            len(headers),
            list(headers.values()),
            [n.encode() for n in headers],
        ),
    )
    return program


def _checked(nvrtc: ModuleType, answer: tuple[Any, ...]) -> tuple[Any, ...]:
    result, *values = answer
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC answered {result.name}")
    return tuple(values)


def _bytes(nvrtc: ModuleType, program: Any, what: str) -> bytes:
    (size,) = _checked(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program))
    # The binding writes into these bytes. They must be ours alone: Python keeps one object for each single
    # byte, so b" " * 1 would be everyone's space, and would read "\0" ever after.
    out = bytes(size + 2)
    _checked(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, out))
    return out[:size]


def _text(nvrtc: ModuleType, program: Any, what: str) -> str:
    return _bytes(nvrtc, program, what).decode(errors="replace").rstrip("\0 \n") + "\n"


def _local_names(ptx: str) -> str:
    """The PTX without this machine's folders: `.file 1 "/home/me/cell.cu"` → `.file 1 "cell.cu"`."""
    return re.sub(r'(\.file\s+\d+\s+")[^"]*[/\\]([^"/\\]+")', r"\1\2", ptx)


def _source_first(ptx: str, name: str) -> str:
    """The PTX with the source as file 1, by which the machine knows it from the headers."""
    found = re.search(rf'\.file\s+(\d+)\s+"{re.escape(re.split(r"[/]", name)[-1])}"', ptx)
    if found is None or found[1] == "1":
        return ptx
    swap = {"1": found[1], found[1]: "1"}
    return re.sub(r"(\.loc\s+|\.file\s+|inlined_at\s+)(\d+)\b", lambda m: m[1] + swap.get(m[2], m[2]), ptx)


def read_resources(log: str) -> dict[str, Resources]:
    """Resources by kernel from what `ptxas -v` writes."""
    out: dict[str, Resources] = {}
    for part in re.split(r"(?=Compiling entry function ')", log)[1:]:
        head = re.match(r"Compiling entry function '([^']+)'", part)
        assert head is not None

        def number(pattern: str, part: str = part) -> int:
            found = re.search(pattern, part)
            return int(found[1]) if found else 0

        out[head[1]] = Resources(
            registers=number(r"Used (\d+) registers"),
            shared=number(r"(\d+) bytes smem"),
            stack=number(r"(\d+) bytes stack frame"),
            spill_stores=number(r"(\d+) bytes spill stores"),
            spill_loads=number(r"(\d+) bytes spill loads"),
            barriers=number(r"used (\d+) barriers"),
        )
    return out
