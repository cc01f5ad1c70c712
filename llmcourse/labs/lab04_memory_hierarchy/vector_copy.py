"""Exercise `vector_copy`: four floats in one instruction, and the few that are left over."""

from __future__ import annotations

import numpy as np

from llmcourse.grading.kernel_exercise import KernelExercise
from llmcourse.grading.kernel_trial import Launched, at_most, launch, moves, out, unwritten, written
from llmcourse.grading.trial import Trial

vector_copy = KernelExercise(
    "vector_copy",
    title="16 bytes in one instruction",
    arguments=("grid", "block", "x", "y", "n"),
    signature="const float* x, float* y, int n",
    shapes=(
        "x      float32 [n], read;  y  float32 [n], written;  both start at a multiple of 16 bytes",
        "n      any number of elements, 0 too; it need not be a multiple of 4",
        "grid   1-D, any number of blocks of any size: a grid-stride loop",
        "cost   a request moves 128 elements: requests at most ⌈n / 128⌉ + 1, for loads and for",
        "       stores, if blocks are whole warps; each element loaded and stored once",
    ),
    formula="y[i] = x[i]",
    difficulty=2,
    importance=4,
    minutes=25,
    points=4,
    hints=(
        "A warp that loads a float for each lane makes a request for 128 bytes. How many requests does it "
        "take for 1,024 elements? How many, if each lane loads 4 neighbouring floats at once? What about "
        "1,027?",
        "A float4 is four floats in 16 bytes: reinterpret_cast<const float4*>(x) sees x as an array of n / "
        "4 of them, and one load of an element is one instruction. It works as long as the address is a "
        "multiple of 16, which a pointer to x[i] with any i is not. The last n % 4 elements are copied one "
        "by one.",
        "const float4* x4 = reinterpret_cast<const float4*>(x); a grid-stride loop over i < n / 4 with "
        "y4[i] = x4[i]; then the threads with the global numbers 0, 1 and 2 copy element n / 4 * 4 + "
        "number, if that is below n.",
    ),
)

COUNTED = (
    "global_load_requests",
    "global_load_sectors",
    "global_load_bytes",
    "global_store_requests",
    "global_store_bytes",
)
SPARE = 20


def _copy(
    t: Trial, grid: int, block: int, n: int, spare: int = SPARE, watch: tuple[str, ...] = ()
) -> Launched:
    x = t.normal(n + spare, dtype=np.float32)
    run = launch(t, grid, block, x, out(n + spare), n, watch=watch)
    written(t, run.arrays[0], np.append(x[:n], unwritten(spare)), "y")
    return run


@vector_copy.check("multiples of 4, with fewer threads than vectors or more")
def fours(t: Trial) -> None:
    _copy(t, 1, 32, 128)
    _copy(t, 2, 32, 4 * t.size(70, 150))
    _copy(t, 3, 64, 4 * t.size(1, 40))


@vector_copy.check("a remainder of one, two or three elements, or nothing but that, or nothing")
def remainder(t: Trial) -> None:
    for rest in (1, 2, 3):
        _copy(t, 2, 64, 4 * t.size(20, 150) + rest)
        _copy(t, 2, 32, rest)
    _copy(t, 1, 32, 0)
    _copy(t, 1, 64, 7, spare=0)


@vector_copy.check("a quarter of the requests, and each element once")
def requests(t: Trial) -> None:
    for grid, block, n in ((1, 64, 128 * t.size(4, 7)), (3, 32, 128 * t.size(3, 5) + 3)):
        run = _copy(t, grid, block, n, watch=COUNTED)
        moves(
            run, 4 * n, 4 * n, f"{n} elements, each once", "the rest by as many threads as it has elements."
        )
        why = f"⌈{n} / 128⌉ requests of a warp" + (", and one for the rest" if n % 4 else "")
        for name in ("global_load_requests", "global_store_requests"):
            tries = "float4: reinterpret_cast<const float4*>(x)[i]."
            at_most(run, name, -(-n // 128) + (n % 4 > 0), why, tries)


def _vector(
    count: str = "n / 4",
    body: str = "y4[i] = x4[i];",
    rest: str = "int last = n / 4 * 4 + first;\n    if (last < n) y[last] = x[last];",
    step: str = "blockDim.x * gridDim.x",
) -> str:
    return f"""
    const float4* x4 = reinterpret_cast<const float4*>(x);
    float4* y4 = reinterpret_cast<float4*>(y);
    int first = blockIdx.x * blockDim.x + threadIdx.x;
    for (int i = first; i < {count}; i += {step}) {body}
    {rest}"""


@vector_copy.mistake(
    says="the last n % 4 elements are not copied",
    tries="a plain copy of elements n / 4 * 4 … n - 1 after the loop.",
    caught_by="remainder",
)
def no_rest() -> str:
    return _vector(rest="")


@vector_copy.mistake(
    says="the number of vectors is rounded up: the last one reaches past the end",
    tries="n / 4 whole vectors, then the rest one by one.",
    caught_by="remainder",
)
def rounded_up() -> str:
    return _vector(count="(n + 3) / 4", rest="")


@vector_copy.mistake(
    says="the rest is looked for at n / 4, which counts vectors",
    tries="n / 4 * 4: elements, not vectors, lie before the rest.",
    caught_by="remainder",
)
def rest_by_vectors() -> str:
    return _vector(rest="int last = n / 4 + first;\n    if (first < n % 4) y[last] = x[last];")


@vector_copy.mistake(
    says="every thread copies the rest",
    tries="the threads with the global numbers 0 to n % 4 - 1, one element each.",
    caught_by="requests",
)
def rest_by_everyone() -> str:
    return _vector(rest="for (int last = n / 4 * 4; last < n; last++) y[last] = x[last];")


@vector_copy.mistake(
    says="every block copies the rest: threadIdx.x is no number in the grid",
    tries="blockIdx.x * blockDim.x + threadIdx.x as the number that picks the thread.",
    caught_by="requests",
)
def rest_by_every_block() -> str:
    return _vector(rest="int last = n / 4 * 4 + threadIdx.x;\n    if (last < n) y[last] = x[last];")


@vector_copy.mistake(
    says="the elements are copied one by one",
    tries="float4: one instruction moves four.",
    caught_by="requests",
)
def one_by_one() -> str:
    return """
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += blockDim.x * gridDim.x) y[i] = x[i];"""


@vector_copy.mistake(
    says="the elements are copied in pairs",
    tries="float4: the widest access has 16 bytes.",
    caught_by="requests",
)
def in_pairs() -> str:
    return """
    int first = blockIdx.x * blockDim.x + threadIdx.x;
    for (int i = first; i < n / 2; i += blockDim.x * gridDim.x)
        reinterpret_cast<float2*>(y)[i] = reinterpret_cast<const float2*>(x)[i];
    if (first == 0 && n % 2) y[n - 1] = x[n - 1];"""


@vector_copy.mistake(
    says="a thread copies four neighbours with four instructions: as many requests as before, and wider ones",
    tries="one load of a float4, not four of a float.",
    caught_by="requests",
)
def four_instructions() -> str:
    return """
    for (int i = 4 * (blockIdx.x * blockDim.x + threadIdx.x); i < n; i += 4 * blockDim.x * gridDim.x)
        for (int j = i; j < i + 4 && j < n; j++) y[j] = x[j];"""


@vector_copy.mistake(
    says="vectors are taken from any element on: most of those addresses are no multiples of 16",
    tries="indexing the float4 pointer: its element i starts at 16·i bytes.",
    caught_by="fours",
)
def misaligned() -> str:
    return _vector(
        count="n - 3",
        body="*reinterpret_cast<float4*>(y + i) = *reinterpret_cast<const float4*>(x + i);",
    )


@vector_copy.mistake(
    says="the index of a float4 is multiplied by 4: it counts vectors already",
    tries="x4[i]: the compiler multiplies by the size of a float4.",
    caught_by="fours",
)
def four_times_four() -> str:
    return _vector(body="y4[4 * i] = x4[4 * i];")


@vector_copy.mistake(
    says="there is no loop: each thread copies one vector",
    tries="i += blockDim.x * gridDim.x while i < n / 4.",
    caught_by="fours",
)
def no_loop() -> str:
    return _vector(step="n + 1")


@vector_copy.mistake(
    says="the loop runs over n vectors, four times as many as there are",
    tries="i < n / 4.",
    caught_by="fours",
)
def n_vectors() -> str:
    return _vector(count="n", rest="")


@vector_copy.alternative("the last thread of the grid takes the rest")
def rest_by_the_last() -> str:
    return _vector(
        rest="""int back = gridDim.x * blockDim.x - 1 - first;
    if (back < (n & 3)) y[n - 1 - back] = x[n - 1 - back];"""
    )


@vector_copy.alternative("vectors of four integers, which have the same bytes")
def as_integers() -> str:
    return """
    const unsigned count = n >> 2, threads = gridDim.x * blockDim.x;
    unsigned i = threadIdx.x + blockDim.x * blockIdx.x;
    if (i < (n & 3)) y[4 * count + i] = x[4 * count + i];
    for (; i < count; i += threads) ((uint4*)y)[i] = __ldg((const uint4*)x + i);"""


@vector_copy.alternative("two vectors a round")
def two_a_round() -> str:
    return _vector(
        step="2 * blockDim.x * gridDim.x",
        body="""{
        int j = i + blockDim.x * gridDim.x;
        float4 one = x4[i];
        if (j < n / 4) y4[j] = x4[j];
        y4[i] = one;
    }""",
    )
