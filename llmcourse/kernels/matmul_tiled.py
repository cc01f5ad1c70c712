"""Matrix product by tiles, through plain pointers: the naive order and the grouped order.

C [M, N] is cut into tiles of BLOCK_M × BLOCK_N, one program for each. A program walks along K in steps of
BLOCK_K, loads a slice of A and a slice of B, and adds their product to an accumulator in float32 that it
keeps in registers; nothing but the finished tile is written.

What a program reads is the same in both kernels: BLOCK_M rows of A and BLOCK_N columns of B, so that all
programs together ask for M·N·K·(1/BLOCK_M + 1/BLOCK_N) elements. That is far more than the matrices hold,
and it is the L2 cache that must serve the rest. Which programs run *at the same time* decides whether it
can. The hardware starts them in order of their number, about one for each multiprocessor:

    naive, row by row            grouped, in bands of GROUP_M rows (here 3)
    0  1  2  3  4  5  6  7       0  3  6  9 12 15 18 21
    8  9 10 11 12 13 14 15       1  4  7 10 13 16 19 22
   16 17 18 19 20 21 22 23       2  5  8 11 14 17 20 23

Nine programs at work need 2 tile-rows of A and all 8 tile-columns of B in the naive order, and 3 and 3 in
the grouped one. `llmcourse.kernels.matmul_plan.wave_bytes` counts it for any shape.

On a T4 (sm_75) Triton's `tl.dot` uses no tensor cores: it compiles to ordinary fused multiply-adds. The
CUDA C++ twin (`tensor_cores.cu`) uses them there, through WMMA.
"""

from __future__ import annotations

from llmcourse.kernels.language import tl, triton


@triton.jit
def naive_kernel(
    a,
    b,
    c,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_cm,
    stride_cn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """C = A·B, one program a tile, tiles numbered row by row. A, B, C of any strides; C's type decides."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m = tl.program_id(0) // tiles_n
    tile_n = tl.program_id(0) % tiles_n
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    # Row numbers times a stride can exceed 2³¹ elements: 64-bit before the product, not after.
    a += rows.to(tl.int64)[:, None] * stride_am + inner[None, :] * stride_ak
    b += inner[:, None] * stride_bk + columns.to(tl.int64)[None, :] * stride_bn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a_tile = tl.load(a, mask=(rows[:, None] < M) & (inner[None, :] < K - k), other=0.0)
        b_tile = tl.load(b, mask=(inner[:, None] < K - k) & (columns[None, :] < N), other=0.0)
        acc = tl.dot(a_tile, b_tile, acc, input_precision="ieee")
        a += BLOCK_K * stride_ak
        b += BLOCK_K * stride_bk
    c += rows.to(tl.int64)[:, None] * stride_cm + columns.to(tl.int64)[None, :] * stride_cn
    tl.store(c, acc.to(c.dtype.element_ty), mask=(rows[:, None] < M) & (columns[None, :] < N))


@triton.jit
def grouped_tile(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile when tiles are numbered down bands of GROUP_M rows, band after band."""
    band = tile // (GROUP_M * tiles_n)
    first = band * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)  # the last band may be lower
    within = tile - first * tiles_n
    return first + within % height, within // height


@triton.jit
def finish(
    acc,
    bias,
    scale_a,
    scale_b,
    rows,
    columns,
    M,
    N,
    stride_sa,
    stride_sb,
    ACTIVATION: tl.constexpr,
):
    """The epilogue, while the tile is still in registers: scales, bias, activation; all in float32.

    A scale of one number for the whole tensor has stride 0, one for each row (or column) stride 1.
    """
    if scale_a is not None:
        acc *= tl.load(scale_a + rows * stride_sa, mask=rows < M, other=0.0)[:, None]
        acc *= tl.load(scale_b + columns * stride_sb, mask=columns < N, other=0.0)[None, :]
    if bias is not None:
        acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "relu":
        acc = tl.maximum(acc, 0.0)
    elif ACTIVATION == "gelu":
        acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
    elif ACTIVATION == "silu":
        acc = acc * tl.sigmoid(acc)
    return acc


@triton.jit
def grouped_kernel(
    a,
    b,
    c,
    bias,
    scale_a,
    scale_b,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_cm,
    stride_cn,
    stride_sa,
    stride_sb,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    ACTIVATION: tl.constexpr = "",
    IMPRECISE: tl.constexpr = None,
):
    """C = epilogue(A·B) in the grouped order; any shapes and strides, so also the fallback of other rungs.

    bias [N]; scale_a and scale_b in float32, both or neither; None leaves a step of the epilogue out.
    IMPRECISE   fp8 only: how many products Hopper's tensor cores may add at their own 14 bits before the
                sum goes to a float32 accumulator; None for all of K
    """
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    a += rows.to(tl.int64)[:, None] * stride_am + inner[None, :] * stride_ak
    b += inner[:, None] * stride_bk + columns.to(tl.int64)[None, :] * stride_bn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a_tile = tl.load(a, mask=(rows[:, None] < M) & (inner[None, :] < K - k), other=0.0)
        b_tile = tl.load(b, mask=(inner[:, None] < K - k) & (columns[None, :] < N), other=0.0)
        acc = tl.dot(a_tile, b_tile, acc, input_precision="ieee", max_num_imprecise_acc=IMPRECISE)
        a += BLOCK_K * stride_ak
        b += BLOCK_K * stride_bk
    acc = finish(acc, bias, scale_a, scale_b, rows, columns, M, N, stride_sa, stride_sb, ACTIVATION)
    c += rows.to(tl.int64)[:, None] * stride_cm + columns.to(tl.int64)[None, :] * stride_cn
    tl.store(c, acc.to(c.dtype.element_ty), mask=(rows[:, None] < M) & (columns[None, :] < N))
