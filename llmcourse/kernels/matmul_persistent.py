"""Matrix product through tensor descriptors, and the persistent kernel.

**Tensor descriptors.** A plain-pointer load computes an address in every thread. A descriptor holds base,
shape and strides once, and a tile is asked for by its corner. From Hopper on the request goes to the Tensor
Memory Accelerator (TMA): one thread issues it, the copy runs by itself into shared memory, swizzled as the
tensor cores want it, with zeros beyond the edges; a store is clipped there. No registers for addresses, no
masks, no instructions. The price: 16-byte alignment of the base and of every stride, and the last
dimension contiguous. (Before Hopper Triton turns descriptors back into pointers: right, but no faster.)

**Persistent.** One program a tile pays a start and an end for every tile: the pipeline of loads fills,
runs and drains, and while a tile is written nobody multiplies. A persistent kernel starts one program a
multiprocessor, and each takes tiles number p, p + P, p + 2P … The loop over tiles and the loop along K are
flattened into one, so that the loads of the next tile start while this one is being finished.

**Subtiles.** A tile passes through shared memory on its way out. 128 × 256 of bf16 are 64 KiB, which would
cost a pipeline stage; written in two halves one after the other it takes 32.

`tl.range(..., warp_specialize=True)`, which gives loads and products to different warps, is left out: on
Hopper, Triton 3.6 to 3.9 ignore it with 8 warps and fail to compile this loop with 4. Without it the
persistent rung is within 2 % of cuBLAS in bf16 at 1024³ to 8192³ (record `matmul`).
"""

from __future__ import annotations

from llmcourse.kernels.language import tl, triton
from llmcourse.kernels.matmul_tiled import finish, grouped_tile


@triton.jit
def load_tile(desc, row, column, TRANSPOSED: tl.constexpr):
    """The tile at (row, column) of a matrix whose descriptor is of the matrix, or of its transpose."""
    if TRANSPOSED:
        return desc.load([column, row]).T
    else:
        return desc.load([row, column])


@triton.jit
def write_tile(
    c_desc,
    acc,
    bias,
    scale_a,
    scale_b,
    row,
    column,
    M,
    N,
    stride_sa,
    stride_sb,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUBTILES: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Finish a tile and store it, whole or as a left and a right half (whose columns each thread holds)."""
    rows = row + tl.arange(0, BLOCK_M)
    if SUBTILES == 1:
        columns = column + tl.arange(0, BLOCK_N)
        acc = finish(acc, bias, scale_a, scale_b, rows, columns, M, N, stride_sa, stride_sb, ACTIVATION)
        c_desc.store([row, column], acc.to(c_desc.dtype))
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        columns = column + tl.arange(0, HALF)
        left = finish(left, bias, scale_a, scale_b, rows, columns, M, N, stride_sa, stride_sb, ACTIVATION)
        c_desc.store([row, column], left.to(c_desc.dtype))
        columns += HALF
        right = finish(right, bias, scale_a, scale_b, rows, columns, M, N, stride_sa, stride_sb, ACTIVATION)
        c_desc.store([row, column + HALF], right.to(c_desc.dtype))


@triton.jit
def descriptor_kernel(
    a_desc,
    b_desc,
    c_desc,
    bias,
    scale_a,
    scale_b,
    M,
    N,
    K,
    stride_sa,
    stride_sb,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    SUBTILES: tl.constexpr = 1,
    ACTIVATION: tl.constexpr = "",
    IMPRECISE: tl.constexpr = None,
):
    """One program a tile in the grouped order, all tiles moved by descriptors.

    c_desc has blocks of BLOCK_M × BLOCK_N / SUBTILES (1 or 2).
    """
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a_tile = load_tile(a_desc, row, k, A_TRANSPOSED)
        b_tile = load_tile(b_desc, k, column, B_TRANSPOSED)
        acc = tl.dot(a_tile, b_tile, acc, input_precision="ieee", max_num_imprecise_acc=IMPRECISE)
    write_tile(
        c_desc,
        acc,
        bias,
        scale_a,
        scale_b,
        row,
        column,
        M,
        N,
        stride_sa,
        stride_sb,
        BLOCK_M,
        BLOCK_N,
        SUBTILES,
        ACTIVATION,
    )


@triton.jit
def persistent_kernel(
    a_desc,
    b_desc,
    c_desc,
    bias,
    scale_a,
    scale_b,
    M,
    N,
    K,
    stride_sa,
    stride_sb,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PROGRAMS: tl.constexpr,
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    SUBTILES: tl.constexpr = 1,
    FLATTEN: tl.constexpr = True,
    ACTIVATION: tl.constexpr = "",
    IMPRECISE: tl.constexpr = None,
):
    """PROGRAMS programs share all tiles; otherwise as `descriptor_kernel`."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=FLATTEN):
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
        row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(steps):
            a_tile = load_tile(a_desc, row, step * BLOCK_K, A_TRANSPOSED)
            b_tile = load_tile(b_desc, step * BLOCK_K, column, B_TRANSPOSED)
            acc = tl.dot(a_tile, b_tile, acc, input_precision="ieee", max_num_imprecise_acc=IMPRECISE)
        write_tile(
            c_desc,
            acc,
            bias,
            scale_a,
            scale_b,
            row,
            column,
            M,
            N,
            stride_sa,
            stride_sb,
            BLOCK_M,
            BLOCK_N,
            SUBTILES,
            ACTIVATION,
        )
