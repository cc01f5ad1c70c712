"""Exercise `grid_stride_saxpy`: any number of elements with any number of threads."""

from __future__ import annotations

import numpy as np

from llmcourse.grading.kernel_exercise import KernelExercise
from llmcourse.grading.kernel_trial import Out, launch, moves, per_request
from llmcourse.grading.trial import Trial

grid_stride_saxpy = KernelExercise(
    "grid_stride_saxpy",
    title="Any array with any grid",
    arguments=("grid", "block", "alpha", "x", "y", "n"),
    signature="float alpha, const float* x, float* y, int n",
    shapes=(
        "x      float32 [n], read",
        "y      float32 [n], read and written",
        "n      any number of elements, 0 too",
        "grid   1-D, any number of blocks of any size: fewer threads than elements, or more",
        "cost   every element of x and y loaded once, of y stored once; 4 sectors a request,",
        "       in every round of the loop",
    ),
    formula="y[i] = alpha * x[i] + y[i]",
    difficulty=2,
    importance=5,
    minutes=20,
    points=4,
    hints=(
        "8 threads, 20 elements, and each thread starts at the element with its own number. Which elements "
        "are left after that, and which of them should thread 3 take so that the 8 threads again work on 8 "
        "neighbouring elements?",
        "All threads step forward together by the number of threads in the whole grid: thread 3 of 8 takes "
        "elements 3, 11 and 19. Threads of a warp then touch neighbouring elements in every round, and a "
        "thread that starts past the end makes no round at all.",
        "Start at the global index as before; the step is blockDim.x * gridDim.x; a for loop with i < n as "
        "its condition needs no other guard.",
    ),
)

WATCH = (
    "global_load_bytes",
    "global_store_bytes",
    "global_load_requests",
    "global_load_sectors",
    "global_store_requests",
    "global_store_sectors",
)
SPARE = 24


def _saxpy(t: Trial, grid: int, block: int, n: int) -> None:
    alpha = np.float32(t.normal())
    x, y = (t.normal(n + SPARE, dtype=np.float32) for _ in range(2))
    run = launch(t, grid, block, alpha, x, Out(y), n)
    expected = np.append(alpha.astype(np.float64) * x[:n] + y[:n], y[n:])
    t.close(run.arrays[0], expected, "y")


@grid_stride_saxpy.check("all elements are done by fewer threads than there are elements")
def fewer(t: Trial) -> None:
    _saxpy(t, 1, 32, 32 * t.size(2, 4))
    _saxpy(t, 3, 32, 96 * 2 + t.size(1, 31))
    _saxpy(t, t.size(2, 4), 64, 1000 + t.odd(1, 99))
    _saxpy(t, 2, t.odd(17, 49), 200)


@grid_stride_saxpy.check("threads without an element touch nothing, also if there are no elements")
def more(t: Trial) -> None:
    _saxpy(t, 3, 64, 65 + t.size(1, 60))
    _saxpy(t, 2, 128, t.size(1, 9))
    _saxpy(t, 1, 32, 0)
    _saxpy(t, 4, 32, 128)


@grid_stride_saxpy.check("each element is loaded and stored once, in every round by neighbouring threads")
def traffic(t: Trial) -> None:
    for grid, block in ((1, 64), (3, 64), (5, 32)):
        n = 64 * t.size(4, 7)
        x, y = (t.normal(n, dtype=np.float32) for _ in range(2))
        run = launch(t, grid, block, np.float32(2), x, Out(y), n, watch=WATCH)
        why = f"{n} elements of x and of y, each once"
        moves(run, 8 * n, 4 * n, why, "blockDim.x * gridDim.x as the step.")
        for kind in ("load", "store"):
            per_request(run, kind, 4, "threads that step together, by the size of the grid.")


@grid_stride_saxpy.mistake(
    says="there is no loop: each thread does one element",
    tries="a loop that goes on by blockDim.x * gridDim.x.",
    caught_by="fewer",
)
def no_loop() -> str:
    return """
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = alpha * x[i] + y[i];"""


@grid_stride_saxpy.mistake(
    says="the loop never steps forward: i stays where it is, and the launch has no end",
    tries="i += blockDim.x * gridDim.x in every round.",
    caught_by="fewer",
)
def no_step() -> str:
    return """
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    while (i < n) y[i] = alpha * x[i] + y[i];"""


@grid_stride_saxpy.mistake(
    says="the number of rounds is rounded down: the last, partial round is missing",
    tries="i < n as the loop's condition; no division is needed.",
    caught_by="fewer",
)
def rounded_down() -> str:
    return """
    int stride = blockDim.x * gridDim.x, i = blockIdx.x * blockDim.x + threadIdx.x;
    for (int k = 0; k < n / stride; k++, i += stride) y[i] = alpha * x[i] + y[i];"""


@grid_stride_saxpy.mistake(
    says="the number of rounds is rounded up and nothing guards the last one",
    tries="i < n as the loop's condition; no division is needed.",
    caught_by="fewer",
)
def rounded_up() -> str:
    return """
    int stride = blockDim.x * gridDim.x, i = blockIdx.x * blockDim.x + threadIdx.x;
    for (int k = 0; k < (n + stride - 1) / stride; k++, i += stride) y[i] = alpha * x[i] + y[i];"""


@grid_stride_saxpy.mistake(
    says="the step is one block, so that blocks do each other's elements again",
    tries="blockDim.x * gridDim.x: all threads of the grid step together.",
    caught_by="fewer",
)
def block_stride() -> str:
    return """
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += blockDim.x) y[i] = alpha * x[i] + y[i];"""


@grid_stride_saxpy.mistake(
    says="every block starts at the beginning: blockIdx is forgotten",
    tries="blockIdx.x * blockDim.x + threadIdx.x as the start.",
    caught_by="fewer",
)
def same_start() -> str:
    return """
    for (int i = threadIdx.x; i < n; i += blockDim.x * gridDim.x) y[i] = alpha * x[i] + y[i];"""


@grid_stride_saxpy.mistake(
    says="the step is the number of blocks, not of threads",
    tries="blockDim.x * gridDim.x: gridDim.x alone counts blocks.",
    caught_by="fewer",
)
def grid_only() -> str:
    return """
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x) y[i] = alpha * x[i] + y[i];"""


@grid_stride_saxpy.mistake(
    says="the loop goes one element too far: i <= n",
    tries="i < n: the last element is number n - 1.",
    caught_by="fewer",
)
def one_too_many() -> str:
    return """
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i <= n; i += blockDim.x * gridDim.x)
        y[i] = alpha * x[i] + y[i];"""


@grid_stride_saxpy.mistake(
    says="the first round is not guarded: do … while asks only afterwards",
    tries="for or while, which ask before the first round.",
    caught_by="more",
)
def asks_too_late() -> str:
    return """
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    do { y[i] = alpha * x[i] + y[i]; i += blockDim.x * gridDim.x; } while (i < n);"""


@grid_stride_saxpy.mistake(
    says="each thread takes a stretch of its own: neighbouring threads are a stretch apart",
    tries="interleaving: start at the thread's number, step by the number of threads.",
    caught_by="traffic",
)
def stretches() -> str:
    return """
    int threads = blockDim.x * gridDim.x, each = (n + threads - 1) / threads;
    int first = (blockIdx.x * blockDim.x + threadIdx.x) * each;
    for (int i = first; i < first + each && i < n; i++) y[i] = alpha * x[i] + y[i];"""


@grid_stride_saxpy.mistake(
    says="alpha times the sum of both is stored",
    tries="alpha * x[i] + y[i]: alpha belongs to x.",
    caught_by="fewer",
)
def scaled_both() -> str:
    return """
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += blockDim.x * gridDim.x)
        y[i] = alpha * (x[i] + y[i]);"""


@grid_stride_saxpy.alternative("a while loop with size_t and a fused multiply-add")
def while_loop() -> str:
    return """
    size_t i = threadIdx.x + (size_t)blockIdx.x * blockDim.x;
    while (i < n) { y[i] = fmaf(alpha, x[i], y[i]); i += (size_t)blockDim.x * gridDim.x; }"""


@grid_stride_saxpy.alternative("each block a stretch, its threads side by side in it")
def stretch_of_a_block() -> str:
    return """
    int each = (n + gridDim.x - 1) / gridDim.x;
    each = (each + 31) / 32 * 32;
    int end = min(n, (int)(blockIdx.x + 1) * each);
    for (int i = blockIdx.x * each + threadIdx.x; i < end; i += blockDim.x) y[i] = alpha * x[i] + y[i];"""


@grid_stride_saxpy.alternative("two rounds at a time")
def unrolled() -> str:
    return """
    int threads = blockDim.x * gridDim.x, i = blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + threads < n; i += 2 * threads) {
        float first = alpha * x[i] + y[i], second = alpha * x[i + threads] + y[i + threads];
        y[i] = first;
        y[i + threads] = second;
    }
    if (i < n) y[i] = alpha * x[i] + y[i];"""
