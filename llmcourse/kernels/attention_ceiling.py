"""How fast attention can be on a GPU: the ceiling of each generation of FlashAttention, before anything runs.

For every pair of a query and a key the tensor cores do 4·D FLOPs (a product with k, one with v), and the
special-function units one exponential. Both have a rate. Hopper's tensor cores became three times as fast as
Ampere's, its exponentials did not: 16 a clock in an SM, on both. At D = 64 the exponentials of a pair take as
long as its products.

    one after the other     1 / (1/matmul + 1/(4·D·exp))         444 TFLOP/s (D 64), 571 (D 128)
    side by side            min(matmul, 4·D·exp)                 800 and 800

with matmul = 800 TFLOP/s and exp = 3.9·10¹² a second, an H100's. One group of warps that waits for each of
its products gets no further than the first line; FlashAttention-3 is the way to the second.

What else takes its share:

    matmul instruction   `mma.sync`, all there was before Hopper, reaches about 63 % of what WGMMA does there
    shared memory        every 64 rows of queries (16 or 32 with `mma.sync`) read all of K and V from it
    masked blocks        under a causal mask the blocks at the diagonal are computed whole, half for nothing
    the grid's tail      the last tiles run while other multiprocessors have none left
    a tile's start       until its first block has come nothing is multiplied
    memory               naive attention stores S × T scores, and that is then what takes the time

All of it is arithmetic on published or measured rates; nothing is fitted to a measured attention. `predict`
puts it together for a shape.

Sources   exponentials: CUDA C++ Programming Guide 13.0, table "Throughput of Native Arithmetic Instructions";
          no overlap and overlap: Shah et al. 2024 (arXiv:2407.08608), section 3; `mma.sync` on Hopper: Luo et
          al. 2024 (arXiv:2402.13499); work partitioning: Dao 2023 (arXiv:2307.08691).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from llmcourse.errors import ShapeError, UnknownNameError
from llmcourse.hardware import Gpu, gpu

EXPONENTIALS_PER_CLOCK = 16
"""Of an SM (MUFU.EX2), compute capability 7.0 to 10.0."""

TENSOR_FLOPS_PER_CLOCK = {"7.0": 1024, "7.5": 1024, "8.0": 2048, "8.6": 1024, "8.9": 1024, "9.0": 4096}
"""Of an SM, fp16 with float32 sums, dense. With the published peak it gives the clock behind that peak."""

MMA_SYNC_ON_HOPPER = 0.63
LATENCY = 0.7e-6
"""Seconds from a tile's start to its first product: q, then k, each once through memory at about 0.35 µs."""


@dataclass(frozen=True)
class Rates:
    """What a GPU does in a second.

    matmul        FLOP/s of matrix products of the inputs' format
    exponentials  a second
    shared        bytes/s read from shared memory, all multiprocessors together
    copy          bytes/s of memory, read and written together
    multiprocessors
    itemsize      bytes of an element
    """

    name: str
    matmul: float
    exponentials: float
    shared: float
    copy: float
    multiprocessors: int
    itemsize: int = 2


def clock_of(of: Gpu) -> float:
    """The clock (Hz) of the published 16-bit peak.

    An H100's 989 TFLOP/s are at 1.83 GHz: its boost of 1.98 GHz is not kept while the tensor cores work.
    """
    per_clock = TENSOR_FLOPS_PER_CLOCK.get(of.capability.name)
    if per_clock is None or "fp16" not in of.peak:
        return of.clock
    return min(of.clock, of.peak["fp16"] / (of.sms * per_clock))


def rates(
    of: Gpu | str, dtype: str = "bf16", *, matmul: float | None = None, copy: float | None = None
) -> Rates:
    """A GPU's rates: published ones, or those measured on it where given.

    dtype    a key of `Gpu.peak`
    matmul   FLOP/s of a large product measured there
    copy     bytes/s of a large copy measured there

    Raises   UnknownNameError for a format without a peak.
    """
    of = gpu(of) if isinstance(of, str) else of
    if dtype not in of.peak:
        raise UnknownNameError(
            f"there is no {dtype} peak for the {of.name}.",
            "Products in a format that a GPU has no units for have no ceiling of their own.",
            f"one of {', '.join(of.peak)}.",
        )
    clock = clock_of(of)
    return Rates(
        f"{of.name} {dtype}",
        matmul or of.peak[dtype],
        of.sms * EXPONENTIALS_PER_CLOCK * clock,
        of.shared_bandwidth * clock / of.clock,
        copy or of.bandwidth,
        of.sms,
        1 if dtype in ("fp8", "int8") else 2,
    )


@dataclass(frozen=True)
class Generation:
    """A way of computing attention.

    tensor       share of the matmul rate that its matrix instruction reaches
    overlap      products and exponentials side by side, not one after the other
    block_m      queries of a tile; block_n: keys of a block
    rows         queries that share one reading of a key from shared memory
    products     matrix products of a pair backward, 2·D FLOPs each. Five are needed; with two kernels (one
                 for dK and dV, one for dQ) scores and dP are computed twice
    exponentials of a pair, backward
    programs     tiles at a time on a multiprocessor; from 2 on the start of one is hidden behind another
    stores       S × T numbers written to memory, and as many read, forward (naive attention); as often again
                 backward
    """

    says: str
    tensor: float = 1.0
    overlap: bool = False
    block_m: int = 128
    block_n: int = 128
    rows: int = 64
    products: int = 7
    exponentials: int = 2
    programs: int = 2
    stores: int = 0


GENERATIONS = {
    "naive": Generation(
        "scores and weights in memory, a kernel for each step",
        block_m=1, block_n=1 << 30, products=5, exponentials=0, stores=2,
    ),
    "flash": Generation(
        "tiles in registers, products by mma.sync, one after the other (FlashAttention-2)",
        MMA_SYNC_ON_HOPPER, block_n=64, rows=32, products=5, exponentials=1,
    ),
    "wgmma": Generation("tiles in registers, products by WGMMA, one after the other (Triton's loop)"),
    "overlapped": Generation(
        "the same, products beside exponentials (FlashAttention-3, flash_hopper.py)",
        overlap=True, programs=1,
    ),
    "one kernel": Generation(
        "side by side, and backward in one kernel, which adds its parts of dQ in memory (FlashAttention-3)",
        overlap=True, programs=1, products=5, exponentials=1,
    ),
}  # fmt: skip
"""The ladder. Sizes of tiles are typical ones; `dataclasses.replace` makes those of a plan."""


def limits(r: Rates, g: Generation, head_dim: int, *, backward: bool = False) -> dict[str, float]:
    """Seconds a pair of a query and a key that each resource takes, were it alone."""
    d = head_dim
    products = g.products if backward else 2
    exponentials = g.exponentials if backward else 1
    # A product of [rows, D] by [D, N] reads its right side for every `rows` rows, and its left side, if that
    # is in shared memory too (q), for every block of keys.
    reads = products * d * r.itemsize / g.rows + d * r.itemsize / g.block_n
    passes = 2 * g.stores * (2 if backward else 1)
    found = {
        "matmul": 2 * products * d / (r.matmul * g.tensor),
        "exponentials": exponentials / r.exponentials,
        "shared memory": 0.0 if g.stores else reads / r.shared,
        "memory": passes * r.itemsize / r.copy,
    }
    return {name: seconds for name, seconds in found.items() if seconds}


def seconds_per_pair(r: Rates, g: Generation, head_dim: int, *, backward: bool = False) -> float:
    """Seconds a computed pair: what does not overlap added, what overlaps at its largest.

    Reading shared memory is part of a product and runs beside it. Memory and exponentials of the naive way
    are in kernels of their own, where the memory hides the exponentials.
    """
    parts = limits(r, g, head_dim, backward=backward)
    product = max(parts["matmul"], parts.get("shared memory", 0.0))
    beside = max(parts.get("exponentials", 0.0), parts.get("memory", 0.0))
    return max(product, beside) if g.overlap else product + beside


def ceiling(r: Rates, g: Generation, head_dim: int, *, backward: bool = False) -> float:
    """FLOP/s by visible pairs (4·D forward, 10·D backward) of a long sequence without a mask."""
    return (10 if backward else 4) * head_dim / seconds_per_pair(r, g, head_dim, backward=backward)


# -------------------------------------------------------------------------------- what shapes take away


def blocks_of_tiles(queries: int, keys: int, g: Generation, *, causal: bool) -> list[int]:
    """Blocks of keys that each tile of queries computes, from the first queries to the last.

    Query i is at position keys − queries + i and sees keys up to there.
    """
    found = []
    for row in range(0, queries, g.block_m):
        last = keys
        if causal:
            last = min(keys, max(0, keys - queries + min(row + g.block_m, queries)))
        found.append(-(-last // g.block_n))
    return found


def visible_share(queries: int, keys: int, g: Generation, *, causal: bool) -> float:
    """Visible pairs over computed ones: 1 where no block is masked or at an edge. Naive: all are computed."""
    if queries == 0 or keys == 0:
        return 1.0
    visible = queries * keys
    if causal:
        before = max(0, keys - queries)
        full = min(queries, keys)
        visible = full * before + full * (full + 1) // 2
    if g.stores:
        return visible / (queries * keys)
    return visible / (sum(blocks_of_tiles(queries, keys, g, causal=causal)) * g.block_m * g.block_n)


def grid_share(work: Sequence[float], slots: int) -> float:
    """Busy share of `slots` places that take pieces of work in this order, each as it becomes free."""
    total = sum(work)
    if not total:
        return 1.0
    free = [0.0] * slots
    for piece in work:
        heapq.heappush(free, heapq.heappop(free) + piece)
    return total / (slots * max(free))


@dataclass(frozen=True)
class Prediction:
    """The ceiling for a shape.

    flops_per_s   FLOPs of visible pairs over the least time
    ideal         the same for a long sequence without a mask
    visible       share of the computed pairs that are visible
    grid          share of the multiprocessors' time that has work
    start         share of a tile's time that is not its start
    limited_by    the resource that takes the most of a pair's time
    """

    flops_per_s: float
    ideal: float
    visible: float
    grid: float
    start: float
    limited_by: str


def predict(
    r: Rates,
    g: Generation,
    *,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    head_dim: int,
    causal: bool = False,
    backward: bool = False,
) -> Prediction:
    """The least time of an attention, as FLOP/s of its visible pairs, and what it is made of.

    heads   of queries; sharing keys among them changes bytes, not FLOPs
    Raises  ShapeError without a pair of a query and a key.
    """
    if min(batch, heads, queries, keys, head_dim) < 1:
        raise ShapeError(
            f"batch {batch}, {heads} heads, {queries} queries, {keys} keys, head dim {head_dim}.",
            "A rate is FLOPs over time, and without a pair of a query and a key there are none.",
            "at least 1 of each.",
        )
    ideal = ceiling(r, g, head_dim, backward=backward)
    parts = limits(r, g, head_dim, backward=backward)
    limited_by = max(parts, key=lambda name: parts[name])
    visible = visible_share(queries, keys, g, causal=causal)
    if g.stores:  # kernels over whole matrices, whose grids are large
        return Prediction(ideal * visible, ideal, visible, 1.0, 1.0, limited_by)
    blocks = blocks_of_tiles(queries, keys, g, causal=causal)
    of_a_block = (
        seconds_per_pair(r, g, head_dim, backward=backward) * g.block_m * g.block_n * r.multiprocessors
    )
    alone = LATENCY if g.programs == 1 else 0.0
    work = [
        b * of_a_block * g.programs + alone
        for b in sorted(blocks, reverse=True)
        for _ in range(batch * heads)
    ]
    grid = grid_share(work, r.multiprocessors * g.programs)
    start = 1 - alone * len(work) / sum(work)
    return Prediction(ideal * visible * grid * start, ideal, visible, grid, start, limited_by)


def l2_demand(flops_per_s: float, block_m: int, itemsize: int = 2) -> float:
    """Bytes/s that tiles of `block_m` queries ask of the L2 cache at this rate: K and V once for each tile.

    4·D FLOPs a pair and 2·D·itemsize / block_m bytes: the head dimension cancels out. At 700 TFLOP/s and 128
    queries that is 5.5 TB/s, about all that an H100's L2 gives.
    """
    return flops_per_s * itemsize / (2 * block_m)
