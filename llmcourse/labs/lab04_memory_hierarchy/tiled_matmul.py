"""Exercise `tiled_matmul`: each number fetched once for a tile of 16 × 16, and used 16 times."""

from __future__ import annotations

import numpy as np

from llmcourse.grading.kernel_exercise import KernelExercise
from llmcourse.grading.kernel_trial import Launched, launch, moves, no_conflicts, out, per_request, written
from llmcourse.grading.trial import Trial

tiled_matmul = KernelExercise(
    "tiled_matmul",
    title="A matrix product in tiles",
    arguments=("grid", "block", "a", "b", "c", "m", "n", "k"),
    signature="const float* a, const float* b, float* c, int m, int n, int k",
    shapes=(
        "a      float32 [m, k], read;  b  float32 [k, n], read;  c  float32 [m, n], written",
        "m, n, k   any sizes from 1",
        "grid   (⌈n / 16⌉, ⌈m / 16⌉): a block for each tile of c;  block (16, 16)",
        "cost   bytes loaded at most 4·(m·k·⌈n / 16⌉ + k·n·⌈m / 16⌉), each element of c stored",
        "       once; 4 sectors a request where m, n, k are multiples of 16; no bank conflicts",
    ),
    formula="c[i][j] = Σ_p a[i][p] · b[p][j]",
    difficulty=4,
    importance=5,
    minutes=45,
    points=7,
    hints=(
        "16 × 16 threads, one for each element of a tile of c. Threads of a row all need the same row of "
        "a, those of a column the same column of b. If the block fetches 16 × 16 numbers of a and as many "
        "of b, how many products can it form from them? How often must that be repeated along k?",
        "For each of ⌈k / 16⌉ steps: every thread loads one element of a's tile and one of b's into shared "
        "memory; all meet; every thread adds 16 products from the two tiles; all meet again, before "
        "anybody overwrites them. An element outside of a or b counts as 0, so that the sum needs no "
        "guard. Every thread takes part in loading and in both barriers, also if it has no element of c.",
        "row = blockIdx.y * 16 + threadIdx.y, col = blockIdx.x * 16 + threadIdx.x. In step t: "
        "as[threadIdx.y][threadIdx.x] = a[row][t * 16 + threadIdx.x] or 0, bs[threadIdx.y][threadIdx.x] = "
        "b[t * 16 + threadIdx.y][col] or 0, barrier, sum += as[threadIdx.y][p] * bs[p][threadIdx.x] for 16 "
        "p, barrier.",
    ),
)

TRAFFIC = (
    "global_load_bytes",
    "global_store_bytes",
    "global_load_requests",
    "global_load_sectors",
    "global_store_requests",
    "global_store_sectors",
)
BANKS = ("shared_load_bank_conflicts", "shared_store_bank_conflicts")


def _product(t: Trial, m: int, n: int, k: int, watch: tuple[str, ...] = ()) -> Launched:
    a, b = t.normal(m, k, dtype=np.float32), t.normal(k, n, dtype=np.float32)
    grid = (-(-n // 16), -(-m // 16))
    run = launch(t, grid, (16, 16), a, b, out(m, n), m, n, k, watch=watch)
    right = a.astype(np.float64) @ b.astype(np.float64)
    written(t, run.arrays[0], right, "c", rtol=1e-4, atol=1e-4)
    return run


@tiled_matmul.check("sizes that are multiples of 16")
def whole(t: Trial) -> None:
    _product(t, 16, 16, 16)
    _product(t, 32, 16, 48)
    _product(t, 16, 48, 32)


@tiled_matmul.check("sizes that are not")
def edges(t: Trial) -> None:
    _product(t, 16, 16, t.odd(17, 31))
    _product(t, t.odd(17, 31), t.odd(33, 47), 16)
    _product(t, t.odd(1, 15), t.odd(17, 31), t.odd(33, 47))
    _product(t, 1, 1, 1)


@tiled_matmul.check("the tiles are all that is fetched, in whole sectors")
def traffic(t: Trial) -> None:
    m, n, k = 16 * t.size(2, 3), 16 * t.size(2, 3), 16 * t.size(2, 3)
    run = _product(t, m, n, k, TRAFFIC)
    loaded = 4 * (m * k * -(-n // 16) + k * n * -(-m // 16))
    why = f"a for each of {n // 16} columns of tiles, b for each of {m // 16} rows, c once"
    moves(run, loaded, 4 * m * n, why, "one element of either tile for each thread and step.")
    for kind in ("load", "store"):
        per_request(run, kind, 4, "threadIdx.x along the rows of a, b and c: col from x, row from y.")


@tiled_matmul.check("no access to shared memory has a bank conflict")
def banks(t: Trial) -> None:
    run = _product(t, 32, 16, 16 * t.size(1, 3), BANKS)
    no_conflicts(run, "tiles of [16][16], read along a row: bs[p][threadIdx.x].")


def _tiled(
    tiles: str = "__shared__ float as[16][16], bs[16][16];",
    place: str = "int x = threadIdx.x, y = threadIdx.y;",
    steps: str = "(k + 15) / 16",
    load_a: str = "as[y][x] = row < m && t * 16 + x < k ? a[row * k + t * 16 + x] : 0.0f;",
    load_b: str = "bs[y][x] = t * 16 + y < k && col < n ? b[(t * 16 + y) * n + col] : 0.0f;",
    first: str = "__syncthreads();",
    add: str = "for (int p = 0; p < 16; p++) sum += as[y][p] * bs[p][x];",
    second: str = "__syncthreads();",
    store: str = "if (row < m && col < n) c[row * n + col] = sum;",
    start: str = "",
) -> str:
    return f"""
    {tiles}
    {place}
    int row = blockIdx.y * 16 + y, col = blockIdx.x * 16 + x;
    {start}
    float sum = 0.0f;
    for (int t = 0; t < {steps}; t++) {{
        {load_a}
        {load_b}
        {first}
        {add}
        {second}
    }}
    {store}"""


@tiled_matmul.mistake(
    says="there is no barrier between filling the tiles and using them",
    tries="__syncthreads() after both loads.",
    caught_by="whole",
)
def no_first_barrier() -> str:
    return _tiled(first="")


@tiled_matmul.mistake(
    says="there is no barrier after the tiles were used: fast warps overwrite what others still read",
    tries="__syncthreads() at the end of each step as well.",
    caught_by="whole",
)
def no_second_barrier() -> str:
    return _tiled(second="")


@tiled_matmul.mistake(
    says="the sum is set to 0 in every step: only the last tile counts",
    tries="float sum = 0.0f before the loop.",
    caught_by="whole",
)
def sum_restarted() -> str:
    return _tiled(
        load_a="sum = 0.0f;\n        "
        + "as[y][x] = row < m && t * 16 + x < k ? a[row * k + t * 16 + x] : 0.0f;"
    )


@tiled_matmul.mistake(
    says="every step loads the first tiles again",
    tries="t * 16 + threadIdx.x along a, t * 16 + threadIdx.y down b.",
    caught_by="whole",
)
def first_tiles_again() -> str:
    return _tiled(
        load_a="as[y][x] = row < m && x < k ? a[row * k + x] : 0.0f;",
        load_b="bs[y][x] = y < k && col < n ? b[y * n + col] : 0.0f;",
    )


@tiled_matmul.mistake(
    says="b is taken to have rows of k elements",
    tries="(t * 16 + threadIdx.y) * n + col: b is k × n.",
    caught_by="whole",
)
def wrong_pitch() -> str:
    return _tiled(load_b="bs[y][x] = t * 16 + y < k && col < n ? b[(t * 16 + y) * k + col] : 0.0f;")


@tiled_matmul.mistake(
    says="the second tile is read by rows like the first: that multiplies by b transposed",
    tries="as[threadIdx.y][p] * bs[p][threadIdx.x].",
    caught_by="whole",
)
def by_rows() -> str:
    return _tiled(add="for (int p = 0; p < 16; p++) sum += as[y][p] * bs[x][p];")


@tiled_matmul.mistake(
    says="the products are added to what c held before",
    tries="c[…] = sum: nobody has put a 0 there.",
    caught_by="whole",
)
def added_to_rubbish() -> str:
    return _tiled(store="if (row < m && col < n) c[row * n + col] += sum;")


@tiled_matmul.mistake(
    says="the number of steps is rounded down: the last, partial tiles are missing",
    tries="(k + 15) / 16 steps.",
    caught_by="edges",
)
def rounded_down() -> str:
    return _tiled(steps="k / 16")


@tiled_matmul.mistake(
    says="places outside of a and b keep what an earlier step, or nobody, left in the tile",
    tries="0.0f for them: condition ? a[…] : 0.0f.",
    caught_by="edges",
)
def not_filled() -> str:
    return _tiled(
        load_a="if (row < m && t * 16 + x < k) as[y][x] = a[row * k + t * 16 + x];",
        load_b="if (t * 16 + y < k && col < n) bs[y][x] = b[(t * 16 + y) * n + col];",
    )


@tiled_matmul.mistake(
    says="the loads are not guarded: the last tiles reach past the ends",
    tries="0.0f where row ≥ m, col ≥ n, or the place along k is past its end.",
    caught_by="edges",
)
def unguarded_loads() -> str:
    return _tiled(
        load_a="as[y][x] = a[row * k + t * 16 + x];", load_b="bs[y][x] = b[(t * 16 + y) * n + col];"
    )


@tiled_matmul.mistake(
    says="the loads are guarded by the sides of c alone: past the end of k lies the next row",
    tries="t * 16 + threadIdx.x < k and t * 16 + threadIdx.y < k as well.",
    caught_by="edges",
)
def k_unguarded() -> str:
    return _tiled(
        load_a="as[y][x] = row < m ? a[min(row * k + t * 16 + x, m * k - 1)] : 0.0f;",
        load_b="bs[y][x] = col < n ? b[min((t * 16 + y) * n + col, k * n - 1)] : 0.0f;",
    )


@tiled_matmul.mistake(
    says="the store is not guarded: threads without an element of c write all the same",
    tries="if (row < m && col < n) around the store.",
    caught_by="edges",
)
def unguarded_store() -> str:
    return _tiled(store="c[row * n + col] = sum;")


@tiled_matmul.mistake(
    says="threads without an element of c have returned, and the barrier waits for them",
    tries="no return before the loop: they load tiles for the others.",
    caught_by="edges",
)
def returned_early() -> str:
    return _tiled(start="if (row >= m || col >= n) return;")


@tiled_matmul.mistake(
    says="there are no tiles: each thread fetches its whole row and column from global memory",
    tries="16 × 16 numbers of a and of b in shared memory, used 16 times each.",
    caught_by="traffic",
)
def untiled() -> str:
    return """
    int row = blockIdx.y * 16 + threadIdx.y, col = blockIdx.x * 16 + threadIdx.x;
    if (row >= m || col >= n) return;
    float sum = 0.0f;
    for (int p = 0; p < k; p++) sum += a[row * k + p] * b[p * n + col];
    c[row * n + col] = sum;"""


@tiled_matmul.mistake(
    says="threadIdx.x runs down the columns: neighbouring threads are a whole row apart in memory",
    tries="col from threadIdx.x, row from threadIdx.y.",
    caught_by="traffic",
)
def sideways() -> str:
    return _tiled(place="int x = threadIdx.y, y = threadIdx.x;")


@tiled_matmul.mistake(
    says="the tile of b lies transposed in shared memory, its rows 16 apart: 8 lanes and more in one bank",
    tries="bs[p][threadIdx.x]; or rows of 18, which keep 2 × 16 elements apart both ways.",
    caught_by="banks",
)
def transposed_tile() -> str:
    return _tiled(
        load_b="bs[x][y] = t * 16 + y < k && col < n ? b[(t * 16 + y) * n + col] : 0.0f;",
        add="for (int p = 0; p < 16; p++) sum += as[y][p] * bs[x][p];",
    )


@tiled_matmul.alternative("two pairs of tiles in turn, and one barrier a step")
def double_buffered() -> str:
    return _tiled(
        tiles="__shared__ float as_[2][16][16], bs_[2][16][16];",
        load_a="float (*as)[16] = as_[t % 2], (*bs)[16] = bs_[t % 2];\n        "
        "as[y][x] = row < m && t * 16 + x < k ? a[row * k + t * 16 + x] : 0.0f;",
        second="",
    )


@tiled_matmul.alternative("the next tiles wait in registers while these are used")
def prefetched() -> str:
    return """
    __shared__ float as[16][16], bs[16][16];
    const int x = threadIdx.x, y = threadIdx.y, row = blockIdx.y * 16 + y, col = blockIdx.x * 16 + x;
    float sum = 0.0f, next_a = row < m && x < k ? a[row * k + x] : 0.0f;
    float next_b = y < k && col < n ? b[y * n + col] : 0.0f;
    for (int p0 = 0; p0 < k; p0 += 16) {
        as[y][x] = next_a;
        bs[y][x] = next_b;
        __syncthreads();
        const int p1 = p0 + 16;
        next_a = row < m && p1 + x < k ? a[row * k + p1 + x] : 0.0f;
        next_b = p1 + y < k && col < n ? b[(p1 + y) * n + col] : 0.0f;
        for (int p = 0; p < 16; p++) sum = fmaf(as[y][p], bs[p][x], sum);
        __syncthreads();
    }
    if (row < m && col < n) c[row * n + col] = sum;"""


@tiled_matmul.alternative("the tile of b transposed, with rows of 18")
def padded() -> str:
    return _tiled(
        tiles="__shared__ float as[16][16], bs[16][18];",
        load_b="bs[x][y] = t * 16 + y < k && col < n ? b[(t * 16 + y) * n + col] : 0.0f;",
        add="#pragma unroll 4\n        for (int p = 0; p < 16; p++) sum += as[y][p] * bs[x][p];",
    )
