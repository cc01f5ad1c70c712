"""Exercise `transpose`: both sides of global memory in whole sectors, and no bank conflict in between."""

from __future__ import annotations

import numpy as np

from llmcourse.grading.kernel_exercise import KernelExercise
from llmcourse.grading.kernel_trial import Launched, launch, moves, no_conflicts, out, per_request, written
from llmcourse.grading.trial import Trial

transpose = KernelExercise(
    "transpose",
    title="A transpose through shared memory",
    arguments=("grid", "block", "x", "y", "rows", "cols"),
    signature="const float* x, float* y, int rows, int cols",
    shapes=(
        "x      float32 [rows, cols], read, row after row",
        "y      float32 [cols, rows], written",
        "rows, cols   any sizes from 1",
        "grid   (⌈cols / 32⌉, ⌈rows / 32⌉): a block for each tile of 32 × 32",
        "block  (32, R) threads, R any of 1, 2, 4, 8, 16, 32: each thread moves 32 / R elements",
        "cost   each element loaded and stored once, 4 sectors a request both ways, no bank",
        "       conflicts",
    ),
    formula="y[c][r] = x[r][c]",
    difficulty=3,
    importance=5,
    minutes=40,
    points=6,
    hints=(
        "A warp can read a row of x in 4 sectors. If its 32 lanes store those 32 elements where they "
        "belong in y, how far apart are the places? Which 32 elements of the tile would it have to hold "
        "instead, so that it stores them side by side?",
        "Stage the tile: each warp loads rows of the tile into __shared__ float tile[32][…], all meet, "
        "each warp stores rows of y, which are columns of the tile. A column of a tile of width 32 lies in "
        "one bank; of width 33, in 32 different ones. For the second half blockIdx.x and blockIdx.y change "
        "places, and so do the two bounds.",
        "Load tile[threadIdx.y + j][threadIdx.x] = x[(row + j) * cols + col] for j = 0, blockDim.y, … "
        "below 32, with row from blockIdx.y and col from blockIdx.x; __syncthreads(); then row from "
        "blockIdx.x and col from blockIdx.y, y[(row + j) * rows + col] = tile[threadIdx.x][threadIdx.y + "
        "j], guarded by row + j < cols and col < rows.",
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


def _transpose(t: Trial, rows: int, cols: int, height: int, watch: tuple[str, ...] = ()) -> Launched:
    x = t.normal(rows, cols, dtype=np.float32)
    grid = (-(-cols // 32), -(-rows // 32))
    run = launch(t, grid, (32, height), x, out(cols, rows), rows, cols, watch=watch)
    written(t, run.arrays[0], np.ascontiguousarray(x.T), "y")
    return run


@transpose.check("whole tiles, with blocks of any height")
def whole(t: Trial) -> None:
    _transpose(t, 32, 32, 8)
    _transpose(t, 64, 32, 32)
    _transpose(t, 32, 96, 4)
    _transpose(t, 64, 96, 16)


@transpose.check("matrices whose sides are no multiples of 32")
def edges(t: Trial) -> None:
    _transpose(t, t.odd(33, 63), t.odd(3, 31), 8)
    _transpose(t, t.odd(3, 31), t.odd(65, 95), 8)
    _transpose(t, 1, t.size(40, 90), 4)
    _transpose(t, t.size(40, 90), 1, 32)


@transpose.check("each element is loaded and stored once, and every request takes 4 sectors")
def traffic(t: Trial) -> None:
    rows, cols = 32 * t.size(1, 2), 32 * t.size(2, 3)
    run = _transpose(t, rows, cols, 8, TRAFFIC)
    why = f"{rows} × {cols} elements of 4 bytes, each once"
    moves(run, 4 * rows * cols, 4 * rows * cols, why, "one pass over the tile.")
    for kind, where in (("load", "of x"), ("store", "of y")):
        per_request(run, kind, 4, f"neighbouring threads (threadIdx.x) on neighbours in a row {where}.")


@transpose.check("no access to shared memory has a bank conflict")
def banks(t: Trial) -> None:
    rows, cols = 32 * t.size(1, 2), 32 * t.size(1, 2)
    for height in (8, 32):
        no_conflicts(
            _transpose(t, rows, cols, height, BANKS), "a tile whose columns do not lie in one bank: 33 wide."
        )


def _staged(
    tile: str = "__shared__ float tile[32][33];",
    step: str = "blockDim.y",
    inside: str = "col < cols && row + j < rows",
    load: str = "tile[threadIdx.y + j][threadIdx.x] = x[(row + j) * cols + col];",
    meet: str = "__syncthreads();",
    turn: str = "col = blockIdx.y * 32 + threadIdx.x; row = blockIdx.x * 32 + threadIdx.y;",
    within: str = "col < rows && row + j < cols",
    store: str = "y[(row + j) * rows + col] = tile[threadIdx.x][threadIdx.y + j];",
) -> str:
    return f"""
    {tile}
    int col = blockIdx.x * 32 + threadIdx.x, row = blockIdx.y * 32 + threadIdx.y;
    for (int j = 0; j < 32; j += {step})
        if ({inside}) {load}
    {meet}
    {turn}
    for (int j = 0; j < 32; j += {step})
        if ({within}) {store}"""


@transpose.mistake(
    says="the rows of the tile are 32 apart: each of its columns lies in one bank, and a warp reads a column",
    tries="float tile[32][33]: one column more, which nobody uses. (A row more shifts nothing.)",
    caught_by="banks",
)
def unpadded() -> str:
    return _staged(tile="__shared__ float tile[32][32];")


@transpose.mistake(
    says="the padding of 2 leaves pairs of lanes in one bank",
    tries="33: an odd width visits all 32 banks.",
    caught_by="banks",
)
def padded_by_two() -> str:
    return _staged(tile="__shared__ float tile[32][34];")


@transpose.mistake(
    says="there is no barrier between writing the tile and reading it",
    tries="__syncthreads() between the two loops: other warps wrote what this one reads.",
    caught_by="whole",
)
def no_barrier() -> str:
    return _staged(meet="")


@transpose.mistake(
    says="the elements are stored where they belong without staging: neighbouring lanes are a column apart",
    tries="the tile in shared memory: rows in, columns out.",
    caught_by="traffic",
)
def scattered_store() -> str:
    return """
    int col = blockIdx.x * 32 + threadIdx.x, row = blockIdx.y * 32 + threadIdx.y;
    for (int j = 0; j < 32; j += blockDim.y)
        if (col < cols && row + j < rows) y[col * rows + row + j] = x[(row + j) * cols + col];"""


@transpose.mistake(
    says="the elements are gathered without staging: neighbouring lanes read a row apart",
    tries="the tile in shared memory: rows in, columns out.",
    caught_by="traffic",
)
def gathered_load() -> str:
    return """
    int col = blockIdx.y * 32 + threadIdx.x, row = blockIdx.x * 32 + threadIdx.y;
    for (int j = 0; j < 32; j += blockDim.y)
        if (col < rows && row + j < cols) y[(row + j) * rows + col] = x[col * cols + row + j];"""


@transpose.mistake(
    says="the tile is read as it was written, by rows: the elements in it are not transposed",
    tries="tile[threadIdx.x][threadIdx.y + j]: the second half reads columns.",
    caught_by="whole",
)
def read_by_rows() -> str:
    return _staged(store="y[(row + j) * rows + col] = tile[threadIdx.y + j][threadIdx.x];")


@transpose.mistake(
    says="the tile is stored at its old place: blockIdx.x and blockIdx.y must change places too",
    tries="row from blockIdx.x and col from blockIdx.y in the second half.",
    caught_by="whole",
)
def same_place() -> str:
    return _staged(turn="", within="col < cols && row + j < rows")


@transpose.mistake(
    says="y is taken to have rows as long as those of x",
    tries="(row + j) * rows + col: a row of y has `rows` elements.",
    caught_by="whole",
)
def wrong_pitch() -> str:
    return _staged(store="y[(row + j) * cols + col] = tile[threadIdx.x][threadIdx.y + j];")


@transpose.mistake(
    says="the bounds are not exchanged in the second half",
    tries="col < rows && row + j < cols: y is cols × rows.",
    caught_by="whole",
)
def old_bounds() -> str:
    return _staged(within="col < cols && row + j < rows")


@transpose.mistake(
    says="threads outside of the matrix have returned, and the barrier waits for them",
    tries="a guard on the load and one on the store; no return before the barrier.",
    caught_by="edges",
)
def returned_early() -> str:
    return _staged(meet="if (col >= cols || row >= rows) return;\n    __syncthreads();")


@transpose.mistake(
    says="nothing is guarded: the last tiles reach past the ends of the rows",
    tries="col < cols && row + j < rows for the load, and the exchanged bounds for the store.",
    caught_by="edges",
)
def unguarded() -> str:
    return _staged(inside="true", within="true")


@transpose.mistake(
    says="each thread moves one element: a block of 32 × 8 threads leaves three quarters of its tile",
    tries="a loop over j = 0, blockDim.y, … below 32.",
    caught_by="whole",
)
def no_loop() -> str:
    return _staged(step="32")


@transpose.mistake(
    says="a block is taken to be 8 threads high, whatever the launch says",
    tries="blockDim.y as the loop's step.",
    caught_by="whole",
)
def fixed_height() -> str:
    return _staged(step="8")


@transpose.alternative("a swizzle instead of padding: column c of row r lies at c xor r")
def swizzled() -> str:
    return _staged(
        tile="__shared__ float tile[32][32];",
        load="tile[threadIdx.y + j][threadIdx.x ^ (threadIdx.y + j)] = x[(row + j) * cols + col];",
        store="y[(row + j) * rows + col] = tile[threadIdx.x][(threadIdx.y + j) ^ threadIdx.x];",
    )


@transpose.alternative("the tile is transposed when it is written, not when it is read")
def turned_on_the_way_in() -> str:
    return _staged(
        load="tile[threadIdx.x][threadIdx.y + j] = x[(row + j) * cols + col];",
        store="y[(row + j) * rows + col] = tile[threadIdx.y + j][threadIdx.x];",
    )


@transpose.alternative("a flat tile, rows rotated by their number")
def rotated() -> str:
    return """
    __shared__ float tile[1024];
    const int left = blockIdx.x * 32, top = blockIdx.y * 32, lane = threadIdx.x;
    for (int r = threadIdx.y; r < 32; r += blockDim.y)
        if (left + lane < cols && top + r < rows)
            tile[r * 32 + (lane + r) % 32] = __ldg(&x[(size_t)(top + r) * cols + left + lane]);
    __syncthreads();
    for (int c = threadIdx.y; c < 32; c += blockDim.y)
        if (top + lane < rows && left + c < cols)
            y[(size_t)(left + c) * rows + top + lane] = tile[lane * 32 + (c + lane) % 32];"""
