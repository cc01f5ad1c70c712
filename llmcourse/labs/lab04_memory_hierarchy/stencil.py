"""Exercise `stencil`: nine neighbours of each element, fetched once for a whole block."""

from __future__ import annotations

import numpy as np

from llmcourse.grading.kernel_exercise import KernelExercise
from llmcourse.grading.kernel_trial import Launched, launch, moves, no_conflicts, out, unwritten, written
from llmcourse.grading.trial import Trial

R = 4

stencil = KernelExercise(
    "stencil",
    title="Neighbours in shared memory",
    arguments=("grid", "block", "x", "y", "n"),
    signature="const float* x, float* y, int n",
    shapes=(
        "x      float32 [n], read;  y  float32 [n], written;  x is 0 outside of 0 … n - 1",
        "n      any number of elements from 1",
        "grid   1-D, at least n threads in all; blocks of 32, 64, … 1024 threads, one for each",
        "       element",
        "cost   bytes loaded at most 4·(n + 8·blocks): a block's own elements, and 4 on either",
        "       side; each result stored once; no bank conflicts",
    ),
    formula="y[i] = x[i-4] + x[i-3] + … + x[i+4]",
    difficulty=3,
    importance=4,
    minutes=35,
    points=5,
    hints=(
        "A block of 32 threads computes y[32] to y[63]. Which elements of x does it need? How often would "
        "each be loaded if every thread fetched its nine? And how many threads does it take to fetch each "
        "once?",
        "Stage blockDim.x + 8 elements in shared memory, the block's first at place 4: every thread puts "
        "its own at threadIdx.x + 4, and eight threads put one more each, to the left and to the right. "
        "Outside of the array that is 0. After a barrier, which all threads reach, each adds nine places "
        "of the tile.",
        "float tile[1024 + 8]; i as always. tile[threadIdx.x + 4] = i < n ? x[i] : 0; if (threadIdx.x < 4) "
        "{ left = i - 4 → tile[threadIdx.x], right = i + blockDim.x → tile[threadIdx.x + 4 + blockDim.x], "
        "each 0 outside of 0 … n - 1 }; barrier; y[i] = Σ tile[threadIdx.x + d] for d = 0 … 8, if i < n.",
    ),
)

COUNTED = ("global_load_bytes", "global_store_bytes")


def expected(x: np.ndarray) -> np.ndarray:
    wide = np.pad(x.astype(np.float64), R)
    return np.lib.stride_tricks.sliding_window_view(wide, 2 * R + 1).sum(axis=1)


def _blur(t: Trial, grid: int, block: int, n: int, spare: int = 0, watch: tuple[str, ...] = ()) -> Launched:
    x = t.normal(n, dtype=np.float32)
    run = launch(t, grid, block, x, out(n + spare), n, watch=watch)
    written(t, run.arrays[0], np.append(expected(x), unwritten(spare)), "y", rtol=1e-4, atol=1e-4)
    return run


@stencil.check("blocks that are full, one or several")
def full(t: Trial) -> None:
    _blur(t, 1, 64, 64)
    _blur(t, 3, 64, 192)
    warps = t.size(3, 6)
    _blur(t, 2, 32 * warps, 64 * warps)


@stencil.check("a last block that is not full, blocks to spare, arrays shorter than the stencil")
def tail(t: Trial) -> None:
    _blur(t, 2, 64, 64 + t.size(5, 60), spare=9)
    _blur(t, 3, 64, 64 + t.size(1, 3), spare=9)
    _blur(t, 4, 32, 100, spare=9)
    for n in (1, t.size(2, 8)):
        _blur(t, 1, 32, n, spare=9)
    _blur(t, 3, 32, 64 + t.size(28, 31), spare=9)


@stencil.check("a block loads its elements and eight more, each once")
def traffic(t: Trial) -> None:
    grid, block = t.size(2, 4), 128
    n = grid * block
    run = _blur(t, grid, block, n, watch=COUNTED)
    why = f"{n} elements, and 8 more for each of {grid} blocks; {n} results"
    moves(run, 4 * (n + 8 * grid), 4 * n, why, "the sums from the tile in shared memory.")
    no_conflicts(run, "neighbouring threads on neighbouring places of the tile.")


def _tiled(
    own: str = "tile[threadIdx.x + 4] = i < n ? x[i] : 0.0f;",
    halo: str = """if (threadIdx.x < 4) {
        int left = i - 4, right = i + blockDim.x;
        tile[threadIdx.x] = left >= 0 && left < n ? x[left] : 0.0f;
        tile[threadIdx.x + 4 + blockDim.x] = right < n ? x[right] : 0.0f;
    }""",
    meet: str = "__syncthreads();",
    add: str = "for (int d = 0; d < 9; d++) sum += tile[threadIdx.x + d];",
    store: str = "if (i < n) y[i] = sum;",
) -> str:
    return f"""
    __shared__ float tile[1024 + 8];
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    {own}
    {halo}
    {meet}
    float sum = 0.0f;
    {add}
    {store}"""


LEFT = "tile[threadIdx.x] = left >= 0 && left < n ? x[left] : 0.0f;"
RIGHT = "tile[threadIdx.x + 4 + blockDim.x] = right < n ? x[right] : 0.0f;"


@stencil.mistake(
    says="there is no barrier between filling the tile and reading it",
    tries="__syncthreads() after the eight extra elements.",
    caught_by="full",
)
def no_barrier() -> str:
    return _tiled(meet="")


@stencil.mistake(
    says="the elements to the left of the block's own were never put into the tile",
    tries="4 threads that load one element more on either side: i - 4, and i + blockDim.x.",
    caught_by="full",
)
def no_halo() -> str:
    return _tiled(halo="")


@stencil.mistake(
    says="the elements to the right of the block's own are missing",
    tries="i + blockDim.x for the right side, at place threadIdx.x + 4 + blockDim.x.",
    caught_by="full",
)
def left_only() -> str:
    return _tiled(halo=f"if (threadIdx.x < 4) {{ int left = i - 4; {LEFT} }}")


@stencil.mistake(
    says="the first block reads to the left of the array",
    tries="0 where i - 4 is negative.",
    caught_by="full",
)
def before_the_start() -> str:
    return _tiled(halo=f"if (threadIdx.x < 4) {{ int left = i - 4, right = i + blockDim.x;\n"
                  f"        tile[threadIdx.x] = x[left];\n        {RIGHT} }}")  # fmt: skip


@stencil.mistake(
    says="the last block reads to the right of the array",
    tries="0 where i + blockDim.x is n or more.",
    caught_by="full",
)
def past_the_end() -> str:
    return _tiled(halo=f"if (threadIdx.x < 4) {{ int left = i - 4, right = i + blockDim.x;\n"
                  f"        {LEFT}\n        tile[threadIdx.x + 4 + blockDim.x] = x[right]; }}")  # fmt: skip


@stencil.mistake(
    says="outside of the array its first and last elements are repeated",
    tries="0.0f outside of 0 … n - 1.",
    caught_by="full",
)
def clamped() -> str:
    return _tiled(
        own="tile[threadIdx.x + 4] = x[min(i, n - 1)];",
        halo="""if (threadIdx.x < 4) {
        tile[threadIdx.x] = x[min(max(i - 4, 0), n - 1)];
        tile[threadIdx.x + 4 + blockDim.x] = x[min(i + (int)blockDim.x, n - 1)];
    }""",
    )


@stencil.mistake(
    says="the window is one place off: it starts at the place after the first",
    tries="places threadIdx.x to threadIdx.x + 8: the thread's own lies at threadIdx.x + 4.",
    caught_by="full",
)
def one_off() -> str:
    return _tiled(add="for (int d = 1; d < 10; d++) sum += tile[(threadIdx.x + d) % (blockDim.x + 8)];")


@stencil.mistake(
    says="the window has eight elements, not nine",
    tries="d = 0 … 8: four on either side, and the element itself.",
    caught_by="full",
)
def eight() -> str:
    return _tiled(add="for (int d = 0; d < 8; d++) sum += tile[threadIdx.x + d];")


@stencil.mistake(
    says="threads past the end have returned before the barrier",
    tries="0.0f for their place in the tile, and a guard on the store alone.",
    caught_by="tail",
)
def returned_early() -> str:
    return _tiled(own="if (i >= n) return;\n    tile[threadIdx.x + 4] = x[i];")


@stencil.mistake(
    says="places of threads past the end are left unwritten",
    tries="i < n ? x[i] : 0.0f.",
    caught_by="tail",
)
def not_filled() -> str:
    return _tiled(own="if (i < n) tile[threadIdx.x + 4] = x[i];")


@stencil.mistake(
    says="the store is not guarded: threads past the end write their sums too",
    tries="if (i < n) around the store.",
    caught_by="tail",
)
def unguarded_store() -> str:
    return _tiled(store="y[i] = sum;")


@stencil.mistake(
    says="every thread fetches its nine neighbours from global memory",
    tries="a tile in shared memory, and sums from there.",
    caught_by="traffic",
)
def from_global() -> str:
    return """
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float sum = 0.0f;
    for (int d = -4; d <= 4; d++) if (i + d >= 0 && i + d < n) sum += x[i + d];
    y[i] = sum;"""


@stencil.mistake(
    says="every thread loads its neighbours on both sides, not only the first few",
    tries="if (threadIdx.x < 4) around the extra loads.",
    caught_by="traffic",
)
def three_each() -> str:
    return """
    __shared__ float tile[1024 + 8];
    int i = blockIdx.x * blockDim.x + threadIdx.x, left = i - 4, right = i + 4;
    float a = left >= 0 && left < n ? x[left] : 0.0f, b = i < n ? x[i] : 0.0f;
    float c = right < n ? x[right] : 0.0f;
    tile[threadIdx.x] = a;
    __syncthreads();
    tile[threadIdx.x + 4] = b;
    __syncthreads();
    tile[threadIdx.x + 8] = c;
    __syncthreads();
    float sum = 0.0f;
    for (int d = 0; d < 9; d++) sum += tile[threadIdx.x + d];
    if (i < n) y[i] = sum;"""


@stencil.alternative("a loop that fills the tile, whatever its size")
def filled_by_a_loop() -> str:
    return """
    __shared__ float tile[1032];
    const int start = blockIdx.x * blockDim.x - 4;
    for (int place = threadIdx.x; place < blockDim.x + 8; place += blockDim.x) {
        int at = start + place;
        tile[place] = at < 0 || at >= n ? 0.f : x[at];
    }
    __syncthreads();
    const int i = start + 4 + threadIdx.x;
    if (i >= n) return;
    float sum = tile[threadIdx.x + 4];
    for (int d = 1; d <= 4; ++d) sum += tile[threadIdx.x + 4 - d] + tile[threadIdx.x + 4 + d];
    y[i] = sum;"""


@stencil.alternative("the first four threads load the left side, the last four the right side")
def both_ends() -> str:
    return _tiled(
        halo=f"""int left = i - 4, right = i + 4;
    if (threadIdx.x < 4) {LEFT}
    if (threadIdx.x >= blockDim.x - 4) tile[threadIdx.x + 8] = right < n ? x[right] : 0.0f;"""
    )


@stencil.alternative("eight threads, one extra element each")
def eight_threads() -> str:
    return _tiled(
        halo="""if (threadIdx.x < 8) {
        int place = threadIdx.x < 4 ? threadIdx.x : threadIdx.x + blockDim.x;
        int at = (int)(blockIdx.x * blockDim.x) + place - 4;
        tile[place] = at >= 0 && at < n ? x[at] : 0.0f;
    }""",
        add="#pragma unroll\n    for (int d = 8; d >= 0; d--) sum += tile[threadIdx.x + d];",
    )
