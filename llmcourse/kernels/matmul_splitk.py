"""Matrix product of a few rows: split along K.

In decoding, A has as many rows as there are sequences in the batch, 1 to 64, and B is a weight matrix. Each
weight is read once and used for M multiply-adds, so that memory is the limit: the best possible time is
the bytes of B over the bandwidth, whatever the tensor cores can do. To draw the whole bandwidth all
multiprocessors must be loading all the time, but one tile-row cut into BLOCK_N columns gives few tiles: 4096
columns at 64 a tile are 64 programs, for the 132 multiprocessors of an H100.

So K is cut as well. SPLITS programs work on the same tile of C, each on its own part of K, and leave
their sums in a workspace [SPLITS, M, N] of float32. The program that finishes last (a counter for each
tile says who) adds them up in order and writes the tile. The order does not depend on who was last, so
the result is the same in every run, which sums collected by atomic addition are not.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmcourse.kernels.language import tl, triton
from llmcourse.kernels.matmul_tiled import finish


@triton.jit
def split_k_kernel(
    a,
    b,
    c,
    workspace,
    counters,
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
    SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr = "",
    IMPRECISE: tl.constexpr = None,
):
    """Program (i, s) adds part s of K to tile i. counters [tiles] of int32 are 0 before and after."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile, part = tl.program_id(0), tl.program_id(1)
    rows = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    length = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    start = part * length
    stop = tl.minimum(start + length, K)
    a += rows.to(tl.int64)[:, None] * stride_am + (start + inner).to(tl.int64)[None, :] * stride_ak
    b += (start + inner).to(tl.int64)[:, None] * stride_bk + columns.to(tl.int64)[None, :] * stride_bn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(start, stop, BLOCK_K):
        a_tile = tl.load(a, mask=(rows[:, None] < M) & (inner[None, :] < stop - k), other=0.0)
        b_tile = tl.load(b, mask=(inner[:, None] < stop - k) & (columns[None, :] < N), other=0.0)
        acc = tl.dot(a_tile, b_tile, acc, input_precision="ieee", max_num_imprecise_acc=IMPRECISE)
        a += BLOCK_K * stride_ak
        b += BLOCK_K * stride_bk
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    c += rows.to(tl.int64)[:, None] * stride_cm + columns[None, :] * stride_cn
    if SPLITS == 1:
        acc = finish(acc, bias, scale_a, scale_b, rows, columns, M, N, stride_sa, stride_sb, ACTIVATION)
        tl.store(c, acc.to(c.dtype.element_ty), mask=inside)
    else:
        sums = workspace + rows[:, None] * N + columns[None, :]
        tl.store(sums + part * M * N, acc, mask=inside)
        # All threads' sums are written before one thread counts this program in (release), and the last
        # program reads the others' sums only after it has seen them all counted (acquire).
        tl.debug_barrier()
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLITS - 1:
            tl.debug_barrier()
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for s in range(SPLITS):
                total += tl.load(sums + s * M * N, mask=inside, other=0.0, cache_modifier=".cg")
            total = finish(
                total, bias, scale_a, scale_b, rows, columns, M, N, stride_sa, stride_sb, ACTIVATION
            )
            tl.store(c, total.to(c.dtype.element_ty), mask=inside)
            tl.store(counters + tile, 0)


RESERVED = 1 << 20


@dataclass
class _Reserve:
    """Zeroed counters of one device, handed out in slices."""

    buffer: Tensor
    used: int = 0
    of_stream: dict[int, Tensor] = field(default_factory=dict)

    def slice(self, tiles: int) -> Tensor | None:
        if self.used + tiles > self.buffer.numel():
            return None
        self.used += tiles
        return self.buffer[self.used - tiles : self.used]


_RESERVES: dict[torch.device, _Reserve] = {}


def counters_for(tiles: int, device: torch.device) -> Tensor:
    """Counters [≥ tiles] that are 0, and that no other launch uses at the same time.

    Launches of one stream run one after the other and leave the counters at 0, so a stream keeps its
    slice. A captured CUDA graph may be replayed on any stream, so every captured launch gets its own; when
    there are none left, or none yet, the graph fills new ones with zeros each time it runs.
    """
    if device.type != "cuda":
        return torch.zeros(tiles, dtype=torch.int32)
    capturing = torch.cuda.is_current_stream_capturing()
    if device not in _RESERVES and not capturing:
        _RESERVES[device] = _Reserve(torch.zeros(RESERVED, dtype=torch.int32, device=device))
        torch.cuda.current_stream(device).synchronize()
    reserve = _RESERVES.get(device)
    held = None
    if reserve is not None and capturing:
        held = reserve.slice(tiles)
    elif reserve is not None:
        stream = torch.cuda.current_stream(device).cuda_stream
        held = reserve.of_stream.get(stream)
        if held is None or held.numel() < tiles:
            held = reserve.slice(max(tiles, 4096))
            if held is not None:
                reserve.of_stream[stream] = held
    return torch.zeros(tiles, dtype=torch.int32, device=device) if held is None else held
