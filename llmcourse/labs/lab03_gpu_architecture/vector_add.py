"""Exercise `vector_add`: one thread for each element, and none for what is not there."""

from __future__ import annotations

import numpy as np

from llmcourse.grading.kernel_exercise import KernelExercise
from llmcourse.grading.kernel_trial import launch, moves, out, per_request, unwritten, written
from llmcourse.grading.trial import Trial

vector_add = KernelExercise(
    "vector_add",
    title="One thread, one element",
    arguments=("grid", "block", "a", "b", "c", "n"),
    signature="const float* a, const float* b, float* c, int n",
    shapes=(
        "a, b   float32 [n], read",
        "c      float32 [n], written",
        "n      any number of elements from 1",
        "grid   1-D, with at least n threads in all; blocks of any size",
        "cost   every element of a and b loaded once, of c stored once; 4 sectors a request",
    ),
    formula="c[i] = a[i] + b[i]",
    difficulty=1,
    importance=5,
    minutes=15,
    points=3,
    hints=(
        "A block of 4 threads, and the launch has 3 blocks. Write down threadIdx.x of all 12 threads. Which "
        "number do you need, and what do you have to add to threadIdx.x in block 1 and in block 2 to get it?",
        "i = (threads in the blocks before mine) + (my place in my block). The first is blockIdx.x times "
        "the size of a block, blockDim.x. When n is 10 there are 12 threads: two of them must do nothing, "
        "or they write into memory that is not c's.",
        "int i = blockIdx.x * blockDim.x + threadIdx.x;   then, for i < n only, c[i] = a[i] + b[i].",
    ),
)

SPARE = 40  # elements of the arrays beyond n: they are nobody's business
GLOBAL_BYTES = ("global_load_bytes", "global_store_bytes")


def _add(t: Trial, grid: int, block: int, n: int, spare: int = 0) -> None:
    a, b = (t.normal(n + spare, dtype=np.float32) for _ in range(2))
    run = launch(t, grid, block, a, b, out(n + spare), n)
    written(t, run.arrays[0], np.append(a[:n] + b[:n], unwritten(spare)), "c")


@vector_add.check("every element is the sum, where the threads are as many as the elements")
def exact(t: Trial) -> None:
    for grid, block in ((1, 32), (3, 64), (t.size(3, 5), 96), (2, t.odd(17, 61)), (1, 1)):
        _add(t, grid, block, grid * block)


@vector_add.check("threads past the end touch nothing")
def tail(t: Trial) -> None:
    _add(t, 3, 64, 130 + t.size(0, 50), SPARE)
    _add(t, 5, 64, 129, SPARE)  # whole blocks to spare
    _add(t, 1, 128, t.size(1, 31), SPARE)
    _add(t, 2, 128, 1)
    _add(t, 4, 33, 100)


@vector_add.check("each element is loaded and stored once, by neighbouring threads")
def traffic(t: Trial) -> None:
    grid, block = t.size(3, 6), 64
    n = grid * block
    a, b = (t.normal(n, dtype=np.float32) for _ in range(2))
    watch = (*GLOBAL_BYTES, "global_load_sectors", "global_store_sectors")
    run = launch(t, grid, block, a, b, out(n), n, watch=watch)
    moves(run, 8 * n, 4 * n, f"{n} elements of a, of b and of c", "one element for each thread.")
    for kind in ("load", "store"):
        per_request(run, kind, 4, "an index in which threadIdx.x stands alone: neighbours share sectors.")


@vector_add.mistake(
    says="every thread works, also those past the end",
    tries="if (i < n) around the work: the last block has threads to spare.",
    caught_by="tail",
)
def unguarded() -> str:
    return "int i = blockIdx.x * blockDim.x + threadIdx.x; c[i] = a[i] + b[i];"


@vector_add.mistake(
    says="the guard lets one thread too many through: i <= n",
    tries="i < n: the last element is number n - 1.",
    caught_by="tail",
)
def one_too_many() -> str:
    return "int i = blockIdx.x * blockDim.x + threadIdx.x; if (i <= n) c[i] = a[i] + b[i];"


@vector_add.mistake(
    says="the guard stops one element early: i < n - 1",
    tries="i < n: the last element is number n - 1.",
    caught_by="exact",
)
def one_too_few() -> str:
    return "int i = blockIdx.x * blockDim.x + threadIdx.x; if (i < n - 1) c[i] = a[i] + b[i];"


@vector_add.mistake(
    says="blockIdx is forgotten: every block works on the first elements",
    tries="blockIdx.x * blockDim.x + threadIdx.x: each block has its own stretch of the array.",
    caught_by="exact",
)
def first_block_only() -> str:
    return "int i = threadIdx.x; if (i < n) c[i] = a[i] + b[i];"


@vector_add.mistake(
    says="blockIdx is multiplied by the number of blocks, not by the size of a block",
    tries="blockDim.x for the threads in a block; gridDim.x is how many blocks there are.",
    caught_by="exact",
)
def grid_for_block() -> str:
    return "int i = blockIdx.x * gridDim.x + threadIdx.x; if (i < n) c[i] = a[i] + b[i];"


@vector_add.mistake(
    says="blockIdx is added where it should be multiplied by the size of a block",
    tries="blockIdx.x * blockDim.x: there are that many threads in the blocks before yours.",
    caught_by="exact",
)
def block_added() -> str:
    return "int i = blockIdx.x + threadIdx.x; if (i < n) c[i] = a[i] + b[i];"


@vector_add.mistake(
    says="a block is taken to have 256 threads, whatever the launch says",
    tries="blockDim.x: the size of a block is the launch's to choose.",
    caught_by="exact",
)
def fixed_block() -> str:
    return "int i = blockIdx.x * 256 + threadIdx.x; if (i < n) c[i] = a[i] + b[i];"


@vector_add.mistake(
    says="the sums are added to what c held before",
    tries="=, not +=: nobody has put a zero into c.",
    caught_by="exact",
)
def accumulated() -> str:
    return "int i = blockIdx.x * blockDim.x + threadIdx.x; if (i < n) c[i] += a[i] + b[i];"


@vector_add.mistake(
    says="blocks and threads have changed places in the index: neighbours are gridDim.x elements apart",
    tries="blockIdx.x * blockDim.x + threadIdx.x: the 32 threads of a warp then share 4 sectors.",
    caught_by="traffic",
)
def interleaved() -> str:
    return "int i = threadIdx.x * gridDim.x + blockIdx.x; if (i < n) c[i] = a[i] + b[i];"


@vector_add.mistake(
    says="every thread loops over the whole array",
    tries="no loop: the launch has a thread for each element.",
    caught_by="traffic",
)
def everyone_does_everything() -> str:
    return "for (int i = 0; i < n; i++) c[i] = a[i] + b[i];"


@vector_add.alternative("an early return")
def early_return() -> str:
    return """
    unsigned i = blockDim.x * blockIdx.x + threadIdx.x;
    if (i >= n) return;
    c[i] = a[i] + b[i];"""


@vector_add.alternative("a grid-stride loop, which here runs once")
def grid_stride() -> str:
    return """
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
        c[i] = a[i] + b[i];"""


@vector_add.alternative("restricted pointers, moved to the thread's element")
def moved_pointers() -> str:
    return """
__device__ __forceinline__ int place() { return blockIdx.x * blockDim.x + threadIdx.x; }
__global__ void vector_add(const float* __restrict__ a, const float* __restrict__ b, float* c, int n) {
    const int left = n - place();
    if (left > 0) *(c + place()) = __ldg(a + place()) + *(b + place());
}"""
