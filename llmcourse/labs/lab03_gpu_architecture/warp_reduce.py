"""Exercise `warp_reduce`: 32 lanes add up their values in 5 steps, through registers."""

from __future__ import annotations

import numpy as np

from llmcourse.grading.compare import Mismatch
from llmcourse.grading.kernel_exercise import KernelExercise
from llmcourse.grading.kernel_trial import Launched, at_most, launch, out, unwritten, written
from llmcourse.grading.trial import Trial

warp_reduce = KernelExercise(
    "warp_reduce",
    title="A sum within a warp",
    arguments=("grid", "block", "x", "sums", "n"),
    signature="const float* x, float* sums, int n",
    shapes=(
        "x      float32 [n], read",
        "sums   float32 [⌈n / 32⌉], written: one sum for each 32 elements, of fewer at the end",
        "n      any number of elements from 1",
        "grid   1-D, with at least n threads in all; blocks of 32, 64, … 1024 threads",
        "cost   no shared memory, no atomics, each element loaded once; at most 2 divergent",
        "       branches a warp, and on average at least 20 of 32 threads active",
    ),
    formula="sums[w] = Σ x[i] over 32·w ≤ i < min(32·w + 32, n)",
    difficulty=3,
    importance=5,
    minutes=25,
    points=5,
    hints=(
        "8 lanes hold 1 2 3 4 5 6 7 8. Every lane adds the value of the lane 4 above it. What do lanes 0 "
        "to 3 hold now? Which two steps of the same kind leave the whole sum in lane 0? And who is to be "
        "asked when only 5 of the 8 lanes have an element?",
        "__shfl_down_sync(mask, value, offset) gives every lane the value of the lane `offset` above it, "
        "without memory. The mask names the lanes that take part, and all of them must reach the line: so "
        "no lane may have left, and the call stands in no branch. A lane without an element takes part "
        "with the number that changes no sum.",
        "float sum = i < n ? x[i] : 0.0f; then for offsets 16, 8, 4, 2, 1: sum += "
        "__shfl_down_sync(0xffffffff, sum, offset). Lane 0 (threadIdx.x % 32 == 0) stores, if its warp has "
        "an element at all.",
    ),
)

COUNTED = (
    "shared_load_requests",
    "shared_store_requests",
    "shared_atomic_requests",
    "global_atomic_requests",
    "global_load_bytes",
)


def expected(x: np.ndarray) -> np.ndarray:
    """float64 sums of 32 elements each."""
    return np.add.reduceat(x.astype(np.float64), np.arange(0, len(x), 32))


def _sum(t: Trial, grid: int, block: int, n: int, spare: int = 0, watch: tuple[str, ...] = ()) -> Launched:
    x = t.normal(n, dtype=np.float32)
    run = launch(t, grid, block, x, out(-(-n // 32) + spare), n, watch=watch)
    right = np.append(expected(x), unwritten(spare))
    written(t, run.arrays[0], right, "sums", rtol=1e-4, atol=1e-4)
    return run


@warp_reduce.check("every warp stores the sum of its 32 elements, in blocks of any number of warps")
def full(t: Trial) -> None:
    _sum(t, 1, 32, 32)
    _sum(t, 1, 128, 128)
    _sum(t, 3, 96, 288)
    warps = t.size(2, 6)
    _sum(t, 2, 32 * warps, 64 * warps)


@warp_reduce.check("a last warp with fewer elements adds those it has; warps without any store nothing")
def tail(t: Trial) -> None:
    for n in (1, 31, 33, 64 + t.size(1, 31)):
        _sum(t, 2, 64, n, spare=2)
    _sum(t, 5, 32, 70, spare=2)


@warp_reduce.check(
    "the sum moves through registers: nothing shared, nothing atomic, each element loaded once"
)
def through_registers(t: Trial) -> None:
    n = 128 * t.size(2, 4)
    run = _sum(t, n // 128, 128, n, watch=COUNTED)
    tries = "__shfl_down_sync, which reads another lane's register."
    for name in COUNTED[:-1]:
        at_most(run, name, 0, "a shuffle needs no memory", tries)
    at_most(run, "global_load_bytes", 4 * n, f"{n} elements, each once", tries)


@warp_reduce.check("the lanes of a warp stay together")
def together(t: Trial) -> None:
    n = 128 * t.size(2, 4)
    run = _sum(t, n // 128, 128, n)
    at_most(
        run,
        "divergent_branches",
        2 * (n // 32),
        f"2 for each of {n // 32} warps, for the end of the array and for the lane that stores",
        "all lanes in every step: those above the half add what nobody needs.",
    )
    if (active := run.counters.active_threads) < 20:
        text = f"thread_instructions / instructions = {active:.3g} of 32 threads, expected at least 20"
        raise Mismatch(text, tries="work for all lanes: 5 steps of 32 additions, not 31 of one.")


@warp_reduce.mistake(
    says="the last step is missing: offset > 1 leaves out the neighbour",
    tries="offset > 0: offsets 16, 8, 4, 2 and 1.",
    caught_by="full",
)
def last_step_missing() -> str:
    return _down("for (int offset = 16; offset > 1; offset /= 2)")


@warp_reduce.mistake(
    says="the first step is missing: the steps begin with offset 8",
    tries="offset 16: half a warp.",
    caught_by="full",
)
def first_step_missing() -> str:
    return _down("for (int offset = 8; offset > 0; offset /= 2)")


@warp_reduce.mistake(
    says="the steps begin with offset 32: no lane is 32 above, each gets its own value and counts it twice",
    tries="offset 16: half a warp.",
    caught_by="full",
)
def one_step_too_many() -> str:
    return _down("for (int offset = 32; offset > 0; offset /= 2)")


@warp_reduce.mistake(
    says="values move up and the lane at the bottom stores",
    tries="__shfl_down_sync: lane 0 then has the sum.",
    caught_by="full",
)
def moved_up() -> str:
    return _down("for (int offset = 16; offset > 0; offset /= 2)").replace("shfl_down", "shfl_up")


@warp_reduce.mistake(
    says="the sums of a block's warps are stored in one place, that of the block",
    tries="the warp's number in the whole grid: i / 32.",
    caught_by="full",
)
def by_block() -> str:
    return _down(store="if (threadIdx.x % 32 == 0 && i < n) sums[blockIdx.x] = sum;")


@warp_reduce.mistake(
    says="the warp's number in its block is taken for that in the grid",
    tries="i / 32, with blockIdx in i.",
    caught_by="full",
)
def by_warp_of_block() -> str:
    return _down(store="if (threadIdx.x % 32 == 0 && i < n) sums[threadIdx.x / 32] = sum;")


@warp_reduce.mistake(
    says="only the first thread of each block stores: the other warps' sums are lost",
    tries="threadIdx.x % 32 == 0: lane 0 of every warp.",
    caught_by="full",
)
def first_thread_only() -> str:
    return _down(store="if (threadIdx.x == 0 && i < n) sums[i / 32] = sum;")


@warp_reduce.mistake(
    says="every lane stores what it has, and only lane 0 has the sum",
    tries="if (threadIdx.x % 32 == 0) around the store.",
    caught_by="full",
)
def everyone_stores() -> str:
    return _down(store="if (i < n) sums[i / 32] = sum;")


@warp_reduce.mistake(
    says="the shuffle stands in a branch that half of the lanes skip",
    tries="the shuffle for all lanes; what the upper lanes add then does no harm.",
    caught_by="full",
)
def in_a_branch() -> str:
    return """
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    float sum = i < n ? x[i] : 0.0f;
    for (int offset = 16; offset > 0; offset /= 2)
        if (threadIdx.x % 32 < offset) sum += __shfl_down_sync(0xffffffff, sum, offset);
    if (threadIdx.x % 32 == 0 && i < n) sums[i / 32] = sum;"""


@warp_reduce.mistake(
    says="threads past the end have returned, and the shuffle waits for them",
    tries="i < n ? x[i] : 0.0f: a lane without an element takes part with 0.",
    caught_by="tail",
)
def returned_early() -> str:
    return _down(load="if (i >= n) return;\n    float sum = x[i];")


@warp_reduce.mistake(
    says="threads past the end load what is not there",
    tries="i < n ? x[i] : 0.0f.",
    caught_by="tail",
)
def unguarded_load() -> str:
    return _down(load="float sum = x[i];")


@warp_reduce.mistake(
    says="threads past the end take the last element, which is then counted often",
    tries="0.0f for a lane without an element.",
    caught_by="tail",
)
def last_again() -> str:
    return _down(load="float sum = x[min(i, n - 1)];")


@warp_reduce.mistake(
    says="warps without an element store a sum too, past the end of sums",
    tries="i < n in the condition of the store.",
    caught_by="tail",
)
def unguarded_store() -> str:
    return _down(store="if (threadIdx.x % 32 == 0) sums[i / 32] = sum;")


@warp_reduce.mistake(
    says="the values go through shared memory",
    tries="__shfl_down_sync: a lane can read another's register.",
    caught_by="through_registers",
)
def shared_tree() -> str:
    return """
    __shared__ float s[1024];
    int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32;
    s[threadIdx.x] = i < n ? x[i] : 0.0f;
    __syncwarp();
    for (int offset = 16; offset > 0; offset /= 2) {
        if (lane < offset) s[threadIdx.x] += s[threadIdx.x + offset];
        __syncwarp();
    }
    if (lane == 0 && i < n) sums[i / 32] = s[threadIdx.x];"""


@warp_reduce.mistake(
    says="32 lanes add to one place in memory, one after the other",
    tries="shuffles: 5 steps in which all lanes add at once.",
    caught_by="through_registers",
)
def atomic() -> str:
    return """
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (threadIdx.x % 32 == 0 && i < n) sums[i / 32] = 0.0f;
    __syncwarp();
    if (i < n) atomicAdd(&sums[i / 32], x[i]);"""


@warp_reduce.mistake(
    says="one lane adds all 32 elements while the others wait",
    tries="shuffles: 5 steps for all lanes, not 32 for one.",
    caught_by="together",
)
def one_lane_works() -> str:
    return """
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (threadIdx.x % 32 != 0 || i >= n) return;
    float sum = 0.0f;
    for (int j = i; j < i + 32 && j < n; j++) sum += x[j];
    sums[i / 32] = sum;"""


@warp_reduce.alternative("a butterfly: every lane ends with the sum")
def butterfly() -> str:
    return """
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    float sum = 0.0f;
    if (i < n) sum = x[i];
    #pragma unroll
    for (int mask = 1; mask < 32; mask <<= 1) sum += __shfl_xor_sync(~0u, sum, mask);
    if ((threadIdx.x & 31) == 0 && i < n) sums[i >> 5] = sum;"""


@warp_reduce.alternative("an inclusive scan upwards; the top lane stores")
def scan() -> str:
    return """
    int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % warpSize;
    float sum = i < n ? x[i] : 0.0f;
    for (int offset = 1; offset < 32; offset *= 2) {
        float below = __shfl_up_sync(0xffffffff, sum, offset);
        sum += lane >= offset ? below : 0.0f;
    }
    if (lane == 31 && i - 31 < n) sums[i / 32] = sum;"""


@warp_reduce.alternative("a device function, its steps written out")
def written_out() -> str:
    return """
__device__ float warp_sum(float v) {
    v += __shfl_down_sync(0xffffffff, v, 16);
    v += __shfl_down_sync(0xffffffff, v, 8);
    v += __shfl_down_sync(0xffffffff, v, 4);
    v += __shfl_down_sync(0xffffffff, v, 2);
    return v + __shfl_down_sync(0xffffffff, v, 1);
}
__global__ void warp_reduce(const float* x, float* sums, int n) {
    int warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    float total = warp_sum(32 * warp + lane < n ? x[32 * warp + lane] : 0.0f);
    if (lane == 0 && 32 * warp < n) sums[warp] = total;
}"""


def _down(
    steps: str = "for (int offset = 16; offset > 0; offset /= 2)",
    load: str = "float sum = i < n ? x[i] : 0.0f;",
    store: str = "if (threadIdx.x % 32 == 0 && i < n) sums[i / 32] = sum;",
) -> str:
    return f"""
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    {load}
    {steps} sum += __shfl_down_sync(0xffffffff, sum, offset);
    {store}"""
