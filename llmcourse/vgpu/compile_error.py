"""`CompileError`: what the compiler found, why it is an error, and what to try.

A compiler tells what it saw. What a learner needs is which word is missing and where it comes from: `half` is
undefined because a header is not included, `main` is refused because the CPU's side is Python here. `advice`
holds what is known about the commonest errors, one entry each.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence

from llmcourse.errors import CourseError
from llmcourse.vgpu.diagnostics import Diagnostic, show

SHOWN = 5
"""Errors printed in full; a missing brace can bring fifty."""


class CompileError(CourseError, ValueError):
    """CUDA C++ that the compiler refuses.

    errors    what it found, in order; `warnings` likewise
    log       its own words, unread
    """

    def __init__(self, found: Sequence[Diagnostic], source: str, log: str) -> None:
        self.errors = tuple(d for d in found if d.kind == "error")
        self.warnings = tuple(d for d in found if d.kind == "warning")
        self.source, self.log = source, log
        count = len(self.errors)
        what = f"{count} error{'' if count == 1 else 's'} in the CUDA C++ source."
        shown = "\n".join(show(d, source) for d in self.errors[:SHOWN])
        if count > SHOWN:
            shown += f"\n  … and {count - SHOWN} more, which may follow from these"
        why, fix = advice(self.errors[0], source)
        super().__init__(f"{what}\n{shown}", why, fix)


_HEADERS = {
    "half": "cuda_fp16.h",
    "__half": "cuda_fp16.h",
    "half2": "cuda_fp16.h",
    "__half2": "cuda_fp16.h",
    "__float2half": "cuda_fp16.h",
    "__half2float": "cuda_fp16.h",
    "__nv_bfloat16": "cuda_bf16.h",
    "__nv_bfloat162": "cuda_bf16.h",
    "nv_bfloat16": "cuda_bf16.h",
    "__float2bfloat16": "cuda_bf16.h",
    "__bfloat162float": "cuda_bf16.h",
    "__nv_fp8_e4m3": "cuda_fp8.h",
    "__nv_fp8_e5m2": "cuda_fp8.h",
    "nvcuda": "mma.h",
    "wmma": "mma.h",
    "cooperative_groups": "cooperative_groups.h",
    "cg": "cooperative_groups.h",
    "__pipeline_memcpy_async": "cuda_pipeline.h",
}
_WORDS = (
    "threadIdx blockIdx blockDim gridDim warpSize __syncthreads __syncwarp __shfl_sync __shfl_down_sync "
    "__shfl_up_sync __shfl_xor_sync __ballot_sync __any_sync __all_sync __activemask __match_any_sync "
    "__popc __ffs __clz __ldg __expf __logf __sinf __cosf __fdividef __threadfence __threadfence_block "
    "atomicAdd atomicSub atomicMax atomicMin atomicExch atomicCAS atomicOr atomicAnd atomicXor expf logf "
    "sqrtf rsqrtf fmaxf fminf fabsf tanhf powf printf assert float double unsigned float2 float4 int4 "
    "__shared__ __global__ __device__ __constant__ __restrict__ INFINITY FLT_MAX size_t"
)
_KNOWN = _WORDS.split()


def advice(found: Diagnostic, source: str) -> tuple[str, str]:
    """(why, what to try) for an error. Every error gets some; the commonest get their own."""
    for pattern, why, fix in _advice(found, source):
        if re.search(pattern, found.message):
            return why, fix
    return (
        "The compiler reads from top to bottom: what follows the first error may be caused by it.",
        "mending the first, and running the cell again.",
    )


def _advice(found: Diagnostic, source: str) -> Iterator[tuple[str, str, str]]:
    line = found.line
    yield (
        r'^expected a ";"',
        "A statement ends with a semicolon; the compiler misses it only at the next word.",
        f"adding ; on line {line}, where the caret points.",
    )
    if name := re.search(r'identifier "(\w+)" is undefined|namespace .* "(\w+)"', found.message):
        yield _unknown_name(name[1] or name[2], source)
    names = r"is not a class or namespace|must be a namespace name|must be a class or namespace"
    if "mma.h" in source and "using namespace nvcuda" not in source:
        yield names, "The header mma.h declares wmma inside the namespace nvcuda.", "using namespace nvcuda;"
    yield (
        names,
        "Names such as nvcuda and cooperative_groups come from CUDA's headers.",
        "#include <mma.h> for nvcuda::wmma, #include <cooperative_groups.h> for cooperative groups.",
    )
    if header := re.search(r'cannot open source file "([^"]+)"', found.message):
        yield r"cannot open source file", *_missing_header(header[1])
    if re.search(r"\bmain\s*\(", source):
        yield (
            r"host function|host variable|__host__|cudaM|identifier",
            "main and everything it calls runs on the CPU; here Python allocates the arrays and launches.",
            "keeping the __global__ and __device__ functions only, and kernel[grid, block](…) in Python.",
        )
    yield (
        r"considered a host function",
        "A function without a mark belongs to the CPU, and kernels call functions of the GPU only.",
        f"__device__ in front of the function on line {line}.",
    )
    yield (
        r"considered a host variable",
        "A global variable without a mark lives in the CPU's memory.",
        f"__device__, __constant__ or constexpr in front of the variable on line {line}.",
    )
    yield (
        r"at the end of the source",
        "Every bracket that is opened has to be closed; the compiler notices at the end.",
        f"closing the one on line {line}, where the caret points.",
    )
    yield (
        r"must have a void return type",
        "A kernel has no caller to return a value to: thousands of threads end at different times.",
        "__global__ void, and a pointer parameter that the result is written to.",
    )
    yield (
        r"must be a modifiable lvalue|const .* cannot be assigned",
        "What is const can be read only.",
        "removing const from the parameter, if the kernel is meant to write to it.",
    )
    yield (
        r"no instance of (overloaded )?function|no operator|does not match|too (few|many) arguments",
        "No version of this function or operator takes arguments of these types.",
        f"comparing the types listed with what line {line} passes; a cast makes one type of another.",
    )
    yield (
        r"class type but it has type",
        "A dot asks for a member of a struct, and this value is none.",
        "indexing a pointer with [ ], or -> for a pointer to a struct.",
    )
    yield (
        r"too much shared data",
        "A block may declare at most 48 KiB of shared memory; more must be asked for at launch.",
        "extern __shared__ float s[]; and kernel[grid, block, nbytes](…).",
    )
    yield (
        r"unrecognized option|invalid value|option",
        "NVRTC knows these options only: https://docs.nvidia.com/cuda/nvrtc/.",
        'options=("--use_fast_math",) for instance; the GPU goes into arch=, macros into defines={}.',
    )
    yield (
        r"already been declared|redefinition|has already been defined",
        "A name stands for one thing in each pair of braces.",
        f"another name on line {line}, or assigning to the variable that exists.",
    )
    yield (
        r"^expected",
        "The grammar of C++ wants something else here; often a bracket before it was not closed.",
        f"counting the brackets on line {line} and the one above.",
    )
    yield (
        r"incomplete type .*fragment",
        "Tensor cores multiply tiles of a few shapes only: 16×16×16, 32×8×16 and 8×32×16 for half and bf16.",
        "wmma::fragment<wmma::matrix_a, 16, 16, 16, half, wmma::row_major>.",
    )


def _unknown_name(name: str, source: str) -> tuple[str, str, str]:
    pattern = re.escape(name)
    if name in _HEADERS:
        return pattern, f"{name} is declared in one of CUDA's headers.", f"#include <{_HEADERS[name]}>."
    if name.startswith("cuda") or name in ("malloc", "free", "cout"):
        return (
            pattern,
            "That function belongs to the CPU's side of CUDA, which is Python here.",
            "torch.empty and torch.zeros for memory, and kernel[grid, block](…) to launch.",
        )
    mine = set(re.findall(r"[A-Za-z_]\w{2,}", source)) - {name}
    close = difflib.get_close_matches(name, [*_KNOWN, *sorted(mine)], n=1, cutoff=0.75)
    folded = [k for k in _KNOWN if k.lower() == name.lower()]
    if folded or close:
        return (
            pattern,
            "C++ tells capitals from small letters, and knows no other spelling.",
            (f"{(folded or close)[0]}."),
        )
    return (
        pattern,
        f"Nothing called {name} is declared above its use, in this scope.",
        f"declaring it, for instance: int {name} = …; or defines={{{name!r}: 16}} for a constant.",
    )


def _missing_header(header: str) -> tuple[str, str]:
    if header.startswith(("cuda/", "thrust/", "cub/", "nv/")):
        return (
            "CUDA's C++ libraries (libcu++, CUB, Thrust) come in a package of their own.",
            "the functions built into the language, or pip install nvidia-cuda-cccl.",
        )
    if header.endswith(".h") and header.startswith(("cuda", "mma", "cooperative", "crt/")):
        return (
            "CUDA's headers come in the packages nvidia-cuda-runtime and nvidia-cuda-crt.",
            "pip install nvidia-cuda-runtime nvidia-cuda-crt; llmcourse doctor says what is missing.",
        )
    return (
        "Code for the GPU sees CUDA's headers only, not those of the C++ library on the CPU.",
        f"removing the line: printf, assert, math and fixed-width integers need no header ({header}).",
    )
