"""Exercise `block_reduce`: one sum for each block, from registers through shared memory to one thread."""

from __future__ import annotations

import numpy as np

from llmcourse.grading.kernel_exercise import KernelExercise
from llmcourse.grading.kernel_trial import Launched, at_most, launch, no_conflicts, out, written
from llmcourse.grading.trial import Trial

block_reduce = KernelExercise(
    "block_reduce",
    title="A sum for each block",
    arguments=("grid", "block", "x", "sums", "n"),
    signature="const float* x, float* sums, int n",
    shapes=(
        "x      float32 [n], read",
        "sums   float32 [gridDim.x], written: one sum for each block, 0 for one without elements",
        "n      any number of elements, 0 too",
        "grid   1-D, any number of blocks of 32, 64, 96, … 1024 threads; a grid-stride loop",
        "cost   each element loaded once; no global atomics; a warp stores to shared memory",
        "       once, comes to at most 2 barriers and diverges at most 4 times",
    ),
    formula="sums[b] = Σ x[i] over the elements i that the threads of block b take in a grid-stride loop",
    difficulty=4,
    importance=5,
    minutes=40,
    points=6,
    hints=(
        "A block of 96 threads has three warps. You can turn each warp's values into one number in its "
        "lane 0. Where do the three numbers have to go so that one warp can see all of them, and what must "
        "have happened before it looks?",
        "Three stages: each thread adds its elements in a grid-stride loop; each warp adds its threads' "
        "sums by shuffles and its lane 0 puts the result into __shared__ float s[32]; after a barrier that "
        "all threads reach, the first warp adds s[0], …, s[warps - 1], again by shuffles. There are "
        "blockDim.x / 32 of them: what lies above was never written.",
        "In the last stage all 32 lanes of warp 0 take part: v = lane < blockDim.x / 32 ? s[lane] : 0.0f, "
        "then the same 5 steps, then thread 0 stores sums[blockIdx.x] = v. The barrier stands outside of "
        "every if.",
    ),
)

COUNTED = ("global_load_bytes", "global_atomic_requests", "shared_store_requests", "barriers")


def expected(x: np.ndarray, grid: int, block: int) -> np.ndarray:
    """float64 sums of each block's elements."""
    block_of = np.arange(len(x)) // block % grid
    return np.bincount(block_of, weights=x.astype(np.float64), minlength=grid)


def _sum(t: Trial, grid: int, block: int, n: int, watch: tuple[str, ...] = ()) -> Launched:
    x = t.normal(n, dtype=np.float32)
    run = launch(t, grid, block, x, out(grid), n, watch=watch)
    written(t, run.arrays[0], expected(x, grid, block), "sums", rtol=1e-4, atol=2e-4)
    return run


@block_reduce.check("the sum of one block, of one warp or of many")
def one_block(t: Trial) -> None:
    for block in (32, 128, 1024, 32 << t.size(1, 4)):
        _sum(t, 1, block, block)


@block_reduce.check("blocks whose warps are no power of two")
def odd_blocks(t: Trial) -> None:
    for warps in (3, 7, t.odd(9, 31)):
        _sum(t, 1, 32 * warps, 32 * warps)


@block_reduce.check("more elements than threads, in several blocks: each block has a sum of its own")
def many_blocks(t: Trial) -> None:
    _sum(t, 3, 64, 192)
    _sum(t, 2, 128, 1_024)
    _sum(t, t.size(3, 5), 96, 1_000 + t.size(1, 90))


@block_reduce.check("fewer elements than threads, or none: what is missing counts as 0")
def few_elements(t: Trial) -> None:
    _sum(t, 1, 128, t.size(33, 90))
    _sum(t, 3, 64, t.size(1, 60))
    _sum(t, 2, 96, 0)


@block_reduce.check("warps add through registers, and meet once or twice")
def cost(t: Trial) -> None:
    grid, warps = t.size(2, 3), 4
    n, all_warps = 2 * grid * 32 * warps, grid * warps
    run = _sum(t, grid, 32 * warps, n, watch=COUNTED)
    shuffles = "shuffles within a warp; shared memory only for one number from each warp."
    at_most(run, "global_load_bytes", 4 * n, f"{n} elements, each once", "a grid-stride loop.")
    at_most(run, "global_atomic_requests", 0, "each block has a sum of its own", "a plain store by thread 0.")
    at_most(run, "shared_store_requests", all_warps, f"one for each of {all_warps} warps", shuffles)
    at_most(run, "barriers", 2 * all_warps, f"two for each of {all_warps} warps", shuffles)
    at_most(run, "divergent_branches", 4 * all_warps, f"4 for each of {all_warps} warps", shuffles)
    no_conflicts(run, "one number from each warp, side by side.")


SUM = "for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffff, sum, offset);"


TAKE = """for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += blockDim.x * gridDim.x)
        sum += x[i];"""


def _staged(
    take: str = TAKE,
    meet: str = "if (lane == 0) s[warp] = sum;\n    __syncthreads();",
    last: str = f"if (warp == 0) {{ sum = lane < blockDim.x / 32 ? s[lane] : 0.0f;\n    {SUM} }}",
    store: str = "if (threadIdx.x == 0) sums[blockIdx.x] = sum;",
    kind: str = "float",
) -> str:
    return f"""
    __shared__ float s[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    {kind} sum = 0;
    {take}
    {SUM}
    {meet}
    {last}
    {store}"""


@block_reduce.mistake(
    says="there is no barrier between the warps that write and the warp that reads",
    tries="__syncthreads() after s[warp] = …, for all threads.",
    caught_by="one_block",
)
def no_barrier() -> str:
    return _staged(meet="if (lane == 0) s[warp] = sum;")


@block_reduce.mistake(
    says="the barrier stands in the branch of lane 0: the other lanes never come to it",
    tries="__syncthreads() after the if, not in it.",
    caught_by="one_block",
)
def barrier_in_branch() -> str:
    return _staged(meet="if (lane == 0) { s[warp] = sum; __syncthreads(); }")


@block_reduce.mistake(
    says="the last stage reads 32 numbers, and only as many were written as the block has warps",
    tries="lane < blockDim.x / 32 ? s[lane] : 0.0f.",
    caught_by="one_block",
)
def unwritten_read() -> str:
    return _staged(last=f"if (warp == 0) {{ sum = s[lane];\n    {SUM} }}")


@block_reduce.mistake(
    says="only the lanes that have a number reach the last shuffles, and their mask names all 32",
    tries="all lanes of the first warp, those without a number with 0.0f.",
    caught_by="one_block",
)
def shuffle_in_branch() -> str:
    return _staged(last=f"if (threadIdx.x < blockDim.x / 32) {{ sum = s[lane];\n    {SUM} }}")


@block_reduce.mistake(
    says="the last stage is missing: the first warp's sum is stored for that of the block",
    tries="a second round of shuffles, over the warps' sums in shared memory.",
    caught_by="one_block",
)
def first_warp_only() -> str:
    return _staged(last="")


@block_reduce.mistake(
    says="the last stage adds 8 warps' sums, and a block can have 32",
    tries="offset 16 in the last stage too: there may be 32 warps.",
    caught_by="one_block",
)
def eight_warps() -> str:
    return _staged(
        last="""if (warp == 0) { sum = lane < blockDim.x / 32 ? s[lane] : 0.0f;
    for (int offset = 4; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffff, sum, offset); }"""
    )


@block_reduce.mistake(
    says="the sums are kept in an int, which drops all that is behind the point",
    tries="float sum.",
    caught_by="one_block",
)
def in_an_int() -> str:
    return _staged(kind="int")


@block_reduce.mistake(
    says="the blocks add to what sums held before",
    tries="a plain store: the block's sum is complete, and nobody has put a 0 there.",
    caught_by="one_block",
)
def added_to_rubbish() -> str:
    return _staged(store="if (threadIdx.x == 0) atomicAdd(&sums[blockIdx.x], sum);")


@block_reduce.mistake(
    says="the threads are halved again and again, which loses some where their number is no power of two",
    tries="warps: a block is a whole number of them, whatever that number is.",
    caught_by="odd_blocks",
)
def halved() -> str:
    return """
    __shared__ float s[1024];
    float sum = 0.0f;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += blockDim.x * gridDim.x) sum += x[i];
    s[threadIdx.x] = sum;
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) s[threadIdx.x] += s[threadIdx.x + half];
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = s[0];"""


@block_reduce.mistake(
    says="there is no loop: each thread takes one element",
    tries="i += blockDim.x * gridDim.x while i < n.",
    caught_by="many_blocks",
)
def no_loop() -> str:
    return _staged(take="int i = blockIdx.x * blockDim.x + threadIdx.x; if (i < n) sum = x[i];")


@block_reduce.mistake(
    says="every block adds up the whole array",
    tries="blockIdx.x * blockDim.x + threadIdx.x as the start, blockDim.x * gridDim.x as the step.",
    caught_by="many_blocks",
)
def everything() -> str:
    return _staged(take="for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[i];")


@block_reduce.mistake(
    says="all blocks store in the first place",
    tries="sums[blockIdx.x].",
    caught_by="many_blocks",
)
def first_place() -> str:
    return _staged(store="if (threadIdx.x == 0) sums[0] = sum;")


@block_reduce.mistake(
    says="threads without an element have returned before the barrier",
    tries="no return: a thread without elements has the sum 0 and takes part.",
    caught_by="few_elements",
)
def returned_early() -> str:
    return _staged(
        take="""int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    for (; i < n; i += blockDim.x * gridDim.x) sum += x[i];"""
    )


@block_reduce.mistake(
    says="a block without elements leaves its place as it was",
    tries="a store by every block; an empty sum is 0.",
    caught_by="few_elements",
)
def empty_left_out() -> str:
    return _staged(store="if (threadIdx.x == 0 && blockIdx.x * blockDim.x < n) sums[blockIdx.x] = sum;")


@block_reduce.mistake(
    says="every thread's sum goes through shared memory, with a barrier for each step",
    tries="shuffles within a warp: they need neither memory nor a barrier.",
    caught_by="cost",
)
def shared_tree() -> str:
    return """
    __shared__ float s[1024];
    float sum = 0.0f;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += blockDim.x * gridDim.x) sum += x[i];
    s[threadIdx.x] = sum;
    for (int step = 512; step > 0; step /= 2) {
        __syncthreads();
        if (threadIdx.x < step && threadIdx.x + step < blockDim.x) s[threadIdx.x] += s[threadIdx.x + step];
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = s[0];"""


@block_reduce.alternative("butterflies, and the last stage in every warp")
def butterflies() -> str:
    return """
__device__ float add_up(float v) {
    for (int mask = 16; mask; mask >>= 1) v += __shfl_xor_sync(0xffffffff, v, mask);
    return v;
}
__global__ void block_reduce(const float* x, float* sums, int n) {
    __shared__ float of_warp[32];
    float v = 0;
    for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += x[i];
    v = add_up(v);
    if ((threadIdx.x & 31) == 0) of_warp[threadIdx.x >> 5] = v;
    __syncthreads();
    v = add_up((threadIdx.x & 31) < (blockDim.x >> 5) ? of_warp[threadIdx.x & 31] : 0.f);
    if (threadIdx.x == blockDim.x - 1) sums[blockIdx.x] = v;
}"""


@block_reduce.alternative("thread 0 adds the warps' sums one by one")
def one_by_one() -> str:
    return _staged(
        last="if (threadIdx.x == 0) for (int w = 1; w < blockDim.x / 32; w++) sum += s[w];",
    )


@block_reduce.alternative("the warps add to one shared number, atomically")
def shared_atomic() -> str:
    return f"""
    __shared__ float total;
    if (threadIdx.x == 0) total = 0.0f;
    __syncthreads();
    float sum = 0.0f;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += blockDim.x * gridDim.x) sum += x[i];
    {SUM}
    if (threadIdx.x % 32 == 0) atomicAdd(&total, sum);
    __syncthreads();
    if (threadIdx.x == 0) sums[blockIdx.x] = total;"""
