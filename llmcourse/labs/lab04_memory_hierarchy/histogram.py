"""Exercise `histogram`: counting in shared memory, then one addition to global memory for each bin."""

from __future__ import annotations

import numpy as np

from llmcourse.grading.kernel_exercise import KernelExercise
from llmcourse.grading.kernel_trial import Launched, Out, at_most, launch
from llmcourse.grading.trial import Trial

histogram = KernelExercise(
    "histogram",
    title="Counting with atomics",
    arguments=("grid", "block", "values", "bins", "n", "nbins"),
    signature="const int* values, int* bins, int n, int nbins",
    shapes=(
        "values   int32 [n], each 0 … nbins - 1, read",
        "bins     int32 [nbins], added to: other launches may have counted before",
        "n        any number of values, 0 too;  nbins   1 … 256",
        "grid     1-D, any number of blocks of any size: a grid-stride loop",
        "cost     each value loaded once; a block adds to each bin of global memory at most",
        "         once: global_atomic_bytes at most 4·nbins·blocks",
    ),
    formula="bins[b] += number of i with values[i] = b",
    difficulty=3,
    importance=3,
    minutes=35,
    points=5,
    hints=(
        "If a thousand threads count into 16 bins of global memory, how many additions does each bin see, "
        "and in which order can they happen? Where could a block keep a count of its own, and what is left "
        "to do for global memory then?",
        "Three stages with a barrier after each of the first two: the threads of a block set shared "
        "counters to 0 (there may be more bins than threads); in a grid-stride loop each value is counted "
        "there with atomicAdd, since two threads can meet in a bin; then the counters are added to bins, "
        "again atomically: other blocks do the same.",
        "__shared__ int mine[256]; for (b = threadIdx.x; b < nbins; b += blockDim.x) mine[b] = 0; barrier; "
        "atomicAdd(&mine[values[i]], 1) in the grid-stride loop; barrier; for (b = …) atomicAdd(&bins[b], "
        "mine[b]).",
    ),
)

COUNTED = ("global_load_bytes", "global_atomic_bytes", "global_store_bytes")


def _count(t: Trial, grid: int, block: int, n: int, nbins: int, watch: tuple[str, ...] = ()) -> Launched:
    values = t.integers(0, nbins, n).astype(np.int32)
    before = t.integers(0, 50, nbins).astype(np.int32)
    run = launch(t, grid, block, values, Out(before), n, nbins, watch=watch)
    right = before + np.bincount(values, minlength=nbins)
    t.close(run.arrays[0], right, "bins", rtol=0, atol=0)
    return run


@histogram.check("one block counts every value")
def one_block(t: Trial) -> None:
    _count(t, 1, 64, 64, 16)
    _count(t, 1, 128, 300 + t.size(1, 90), 7)
    _count(t, 1, 256, t.size(20, 200), 256)


@histogram.check("several blocks count into the same bins")
def many_blocks(t: Trial) -> None:
    _count(t, 3, 64, 192, 10)
    _count(t, t.size(2, 4), 64, 700 + t.odd(1, 99), 32)
    _count(t, 4, 32, 40, 5)


@histogram.check("more bins than threads, odd blocks, nothing to count")
def odd_shapes(t: Trial) -> None:
    _count(t, 2, 32, 200, t.size(65, 256))
    _count(t, 2, 50, 111, 60)
    _count(t, 2, 64, 0, 9)
    _count(t, 1, 64, t.size(1, 20), 1)


@histogram.check("global memory sees one addition for each block and bin")
def cost(t: Trial) -> None:
    grid, nbins, n = t.size(2, 4), 32, 64 * t.size(8, 12)
    run = _count(t, grid, 64, n, nbins, COUNTED)
    why = f"{nbins} bins of 4 bytes, once for each of {grid} blocks"
    at_most(run, "global_atomic_bytes", 4 * nbins * grid, why, "counters in shared memory, added at the end.")
    at_most(run, "global_load_bytes", 4 * n, f"{n} values, each once", "a grid-stride loop.")
    at_most(run, "global_store_bytes", 0, "plain stores lose counts of other blocks", "atomicAdd on bins.")


def _counted(
    clear: str = "for (int b = threadIdx.x; b < nbins; b += blockDim.x) mine[b] = 0;",
    first: str = "__syncthreads();",
    loop: str = "for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += blockDim.x * gridDim.x)",
    count: str = "atomicAdd(&mine[values[i]], 1);",
    second: str = "__syncthreads();",
    flush: str = "for (int b = threadIdx.x; b < nbins; b += blockDim.x) atomicAdd(&bins[b], mine[b]);",
) -> str:
    return f"""
    __shared__ int mine[256];
    {clear}
    {first}
    {loop}
        {count}
    {second}
    {flush}"""


@histogram.mistake(
    says="every value is counted in global memory at once",
    tries="counters in shared memory, and one addition to global memory for each of them.",
    caught_by="cost",
)
def all_global() -> str:
    return """
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += blockDim.x * gridDim.x)
        atomicAdd(&bins[values[i]], 1);"""


@histogram.mistake(
    says="the shared counters are never set to 0",
    tries="mine[b] = 0 for all bins, then a barrier.",
    caught_by="one_block",
)
def not_cleared() -> str:
    return _counted(clear="")


@histogram.mistake(
    says="there is no barrier between clearing the counters and counting",
    tries="__syncthreads() after the counters were set to 0.",
    caught_by="one_block",
)
def no_first_barrier() -> str:
    return _counted(first="")


@histogram.mistake(
    says="there is no barrier between counting and adding the counters to bins",
    tries="__syncthreads() after the loop: other threads still count.",
    caught_by="one_block",
)
def no_second_barrier() -> str:
    return _counted(second="")


@histogram.mistake(
    says="the shared counters are incremented without atomics: two threads read the same count and add 1",
    tries="atomicAdd(&mine[values[i]], 1).",
    caught_by="one_block",
)
def plain_count() -> str:
    return _counted(count="mine[values[i]]++;")


@histogram.mistake(
    says="the block's counts replace those in bins",
    tries="atomicAdd(&bins[b], mine[b]): bins already holds counts.",
    caught_by="one_block",
)
def replaced() -> str:
    return _counted(flush="for (int b = threadIdx.x; b < nbins; b += blockDim.x) bins[b] = mine[b];")


@histogram.mistake(
    says="the counters are added to bins without atomics: blocks overwrite each other's sums",
    tries="atomicAdd(&bins[b], mine[b]).",
    caught_by="many_blocks",
)
def plain_flush() -> str:
    return _counted(flush="for (int b = threadIdx.x; b < nbins; b += blockDim.x) bins[b] += mine[b];")


@histogram.mistake(
    says="each thread counts one value only",
    tries="a grid-stride loop: i += blockDim.x * gridDim.x.",
    caught_by="one_block",
)
def no_loop() -> str:
    return _counted(loop="int i = blockIdx.x * blockDim.x + threadIdx.x; if (i < n)")


@histogram.mistake(
    says="every block counts all values",
    tries="blockIdx.x * blockDim.x + threadIdx.x as the start, blockDim.x * gridDim.x as the step.",
    caught_by="many_blocks",
)
def everything() -> str:
    return _counted(loop="for (int i = threadIdx.x; i < n; i += blockDim.x)")


@histogram.mistake(
    says="only as many counters are cleared and added as the block has threads",
    tries="a loop over the bins with the step blockDim.x.",
    caught_by="odd_shapes",
)
def one_bin_each() -> str:
    return _counted(
        clear="if (threadIdx.x < nbins) mine[threadIdx.x] = 0;",
        flush="if (threadIdx.x < nbins) atomicAdd(&bins[threadIdx.x], mine[threadIdx.x]);",
    )


@histogram.mistake(
    says="only as many counters are added to bins as the block has threads",
    tries="a loop over the bins with the step blockDim.x, at the end as well.",
    caught_by="odd_shapes",
)
def first_bins_only() -> str:
    return _counted(flush="if (threadIdx.x < nbins) atomicAdd(&bins[threadIdx.x], mine[threadIdx.x]);")


@histogram.mistake(
    says="all 256 counters are added to bins, also where there are fewer bins",
    tries="b < nbins.",
    caught_by="one_block",
)
def past_the_bins() -> str:
    return _counted(
        clear="for (int b = threadIdx.x; b < 256; b += blockDim.x) mine[b] = 0;",
        flush="for (int b = threadIdx.x; b < 256; b += blockDim.x) atomicAdd(&bins[b], mine[b]);",
    )


@histogram.mistake(
    says="every thread adds all counters to bins",
    tries="each counter by one thread: b = threadIdx.x, step blockDim.x.",
    caught_by="one_block",
)
def added_by_everyone() -> str:
    return _counted(flush="for (int b = 0; b < nbins; b++) atomicAdd(&bins[b], mine[b]);")


@histogram.mistake(
    says="the loop goes one value too far: i <= n",
    tries="i < n.",
    caught_by="one_block",
)
def one_too_many() -> str:
    return _counted(
        loop="for (int i = blockIdx.x * blockDim.x + threadIdx.x; i <= n; i += blockDim.x * gridDim.x)"
    )


@histogram.alternative("bins that this block never met are left alone")
def only_what_was_met() -> str:
    return _counted(
        flush="""for (int b = threadIdx.x; b < nbins; b += blockDim.x)
        if (int met = mine[b]) atomicAdd(bins + b, met);"""
    )


@histogram.alternative("lanes with the same value count together")
def counted_by_warps() -> str:
    return _counted(
        count="""{
        int value = values[i];
        unsigned here = __activemask(), same = __match_any_sync(here, value);
        if ((threadIdx.x & 31) == __ffs(same) - 1) atomicAdd(&mine[value], __popc(same));
    }"""
    )


@histogram.alternative("the counters cleared all 256, added from the last to the first")
def backwards() -> str:
    return _counted(
        clear="for (unsigned b = threadIdx.x; b < 256; b += blockDim.x) mine[b] = 0;",
        flush="""for (int b = nbins - 1 - (int)threadIdx.x; b >= 0; b -= blockDim.x)
        atomicAdd(&bins[b], mine[b]);""",
    )
