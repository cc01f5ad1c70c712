"""The headers that CUDA C++ finds: NVIDIA's, from wheels or an installed toolkit, and stand-ins for C's.

NVRTC compiles for the GPU alone and brings no C library. nvcc users are used to `INFINITY`, `uint32_t` and
`#include <cstdio>`; so that the same cell compiles here, the few headers a kernel can make use of stand here
as text, and one of them is included before every source, as nvcc does with its own.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

NEEDED = ("cuda_fp16.h", "mma.h", "crt/mma.hpp")
"""Two headers of the nvidia-cuda-runtime wheel, and the part of the second that is in nvidia-cuda-crt."""

FIRST = "llmcourse_prelude.h"

_PRELUDE = """\
#pragma once
using int8_t = signed char; using uint8_t = unsigned char;
using int16_t = short; using uint16_t = unsigned short;
using int32_t = int; using uint32_t = unsigned int;
using int64_t = long long; using uint64_t = unsigned long long;
using intptr_t = int64_t; using uintptr_t = uint64_t;
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
"""
_MATH = """\
#pragma once
#define M_PI 3.14159265358979323846
#define M_E 2.7182818284590452354
#define M_SQRT2 1.41421356237309504880
#define M_SQRT1_2 0.70710678118654752440
#define M_LN2 0.69314718055994530942
#define M_LOG2E 1.4426950408889634074
#define M_2_SQRTPI 1.12837916709551257390
"""
_FLOAT = """\
#pragma once
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define DBL_MAX 1.7976931348623157e+308
#define DBL_MIN 2.2250738585072014e-308
#define DBL_EPSILON 2.2204460492503131e-16
"""
_LIMITS = """\
#pragma once
#define CHAR_BIT 8
#define SHRT_MAX 32767
#define SHRT_MIN (-SHRT_MAX - 1)
#define USHRT_MAX 65535
#define INT_MAX 2147483647
#define INT_MIN (-INT_MAX - 1)
#define UINT_MAX 4294967295u
#define LLONG_MAX 9223372036854775807ll
#define LLONG_MIN (-LLONG_MAX - 1)
#define ULLONG_MAX 18446744073709551615ull
"""

STAND_INS: dict[str, str] = {
    FIRST: _PRELUDE,
    **dict.fromkeys(("stdint.h", "cstdint"), "#pragma once\n"),
    **dict.fromkeys(("math.h", "cmath"), _MATH),
    **dict.fromkeys(("float.h", "cfloat"), _FLOAT),
    **dict.fromkeys(("limits.h", "climits"), _LIMITS),
    # printf, assert, memcpy and size_t are built into NVRTC.
    **dict.fromkeys(("stdio.h", "cstdio", "stdlib.h", "cstdlib", "assert.h", "cassert"), "#pragma once\n"),
    **dict.fromkeys(("string.h", "cstring", "stddef.h", "cstddef"), "#pragma once\n"),
    # cooperative_groups.h asks for it; NVRTC knows its macros by itself.
    "nv/target": "#pragma once\n",
}


@lru_cache(maxsize=1)
def include_folders() -> tuple[str, ...]:
    """Folders with CUDA's headers: the wheels' first, whose version is that of NVRTC, then a toolkit's."""
    found: list[Path] = []
    for place in sys.path:
        nvidia = Path(place or ".") / "nvidia"
        if nvidia.is_dir():
            found += sorted(nvidia.glob("cu[0-9]*/include"), reverse=True)
            found += [nvidia / part / "include" for part in ("cuda_runtime", "cuda_nvcc", "cuda_crt")]
    if _absent(found):
        found += [Path(home) / "include" for home in _toolkits()]
    kept = [str(folder) for folder in dict.fromkeys(found) if folder.is_dir()]
    return tuple([*kept, *(f"{f}/cccl" for f in kept if Path(f, "cccl").is_dir())])


def _toolkits() -> list[str]:
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        homes.append(str(Path(nvcc).resolve().parent.parent))
    return [home for home in (*homes, "/usr/local/cuda") if home]


def missing() -> list[str]:
    """Which of CUDA's headers cannot be found; empty where everything is there."""
    return _absent([Path(folder) for folder in include_folders()])


def _absent(folders: Sequence[Path]) -> list[str]:
    return [header for header in NEEDED if not any((folder / header).is_file() for folder in folders)]
