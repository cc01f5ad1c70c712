"""FlashAttention for Hopper by hand: copy engine, asynchronous tensor cores, warps with different jobs.

`flash_forward.py` says *what* to compute and leaves *when* to Triton. Its loop multiplies, waits, computes
the softmax, multiplies again: the tensor cores stand still during the exponentials and the exponentials during
the products, and no better schedule exists for one group of warps that does one thing after the other
(`attention_ceiling.py` says what that costs). Here the *when* is written down, in Gluon, the language below
Triton's: same compiler, but memory layouts, copies, barriers and warps are the program's own.

**Producer and consumers.** One warp (the producer) does nothing but ask the copy engine (TMA) for blocks of K
and V, STAGES of them ahead. Two or three groups of four warps (the consumers) each hold 64 queries and work on
what has come. All share the blocks of K and V, so that a block is fetched once for 128 or 192 queries. The
producer gives its registers to the consumers: 24 a thread for it, 240 (or 160) for them.

**Barriers.** A block changes hands through two barriers in shared memory: `ready` (the copy engine has
written all its bytes) and `free` (every consumer has done with it). A barrier has a phase bit that flips
whenever it completes; whoever waits, waits for a phase. Block number i is in slot i % STAGES, in round
i // STAGES, and the round's lowest bit is the phase to wait for.

**Asynchronous products.** A WGMMA is issued and runs by itself; the warps go on until they wait for it. Before
the softmax of block i a consumer has issued *two* products: the scores of block i and, behind them, the output
of block i − 1. With OVERLAP it waits for the scores only, and the softmax of block i runs beside the output
product of block i − 1 (Shah et al. 2024, arXiv:2407.08608, section 3.2).

**Ping-pong.** With ORDERED, the consumers take turns at issuing: one's products run while another computes
its softmax (section 3.1). A turn is passed on through a barrier of its own.

The registers of a product's left side may be read until the product ends. Older assemblers (ptxas 12.8 and
12.9) can lose track of that where the same registers feed a later product too, so only the weights P, each
used once, go in by registers; the queries stay in shared memory.

Forward only; D 64 and 128 in fp16 and bf16; any lengths (the copy engine fills with zeros beyond the last key,
and clips what is written beyond the last query); what a query sees is as in `attention_reference.py`.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmcourse.errors import CourseError
from llmcourse.kernels.launch import ceil_div

LOG2_E = 1.4426950408889634
ROWS = 64  # queries of a consumer: the M of a WGMMA
REGISTERS = {2: (168, 240), 3: (128, 160)}
PRODUCER_REGISTERS = {2: 24, 3: 32}
"""By number of consumers: registers a thread at the start, of a consumer's thread once the producer has given
up its own, and what is left to the producer. With four warps for the producer (three idle) (consumers + 1) ·
128 threads share 65,536 registers, and counts go in steps of eight."""


def _experimental() -> SimpleNamespace:
    """Gluon, the only experimental part of Triton that the course uses; stand-ins where it is not there."""
    try:
        from triton.experimental import gluon
        from triton.experimental.gluon import language
        from triton.experimental.gluon.language.nvidia import hopper
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    except ImportError:
        from llmcourse.kernels.language import MissingKernel

        def jit(function: Any = None, **_: Any) -> Any:
            return MissingKernel if function is None else MissingKernel(function)

        language = SimpleNamespace(constexpr=object)
        return SimpleNamespace(found=False, jit=jit, language=language, hopper=None, copy_in=None, copy_out=None)
    copies = hopper.tma  # renamed in Triton 3.8
    return SimpleNamespace(
        found=True,
        jit=gluon.jit,
        language=language,
        hopper=hopper,
        copy_in=getattr(copies, "async_load", None) or copies.async_copy_global_to_shared,
        copy_out=getattr(copies, "async_store", None) or copies.async_copy_shared_to_global,
        TensorDescriptor=TensorDescriptor,
    )


gluon = _experimental()
gl, hopper, copy_in, copy_out = gluon.language, gluon.hopper, gluon.copy_in, gluon.copy_out


# ------------------------------------------------------------------------------------------- what to do


@gluon.jit
def my_tiles(tiles, PERSISTENT: gl.constexpr):
    """(first, end, step) of this program's tiles: every num_programs-th, or just one."""
    if PERSISTENT:
        return gl.program_id(0), tiles, gl.num_programs(0)
    else:
        return gl.program_id(0), gl.program_id(0) + 1, 1


@gluon.jit
def tile_of(tile, blocks, all_heads, heads, BAND):
    """(batch, head, block of queries) of a tile: the heaviest blocks first, BAND heads side by side."""
    first = tile // (BAND * blocks) * BAND
    inside = tile - first * blocks
    width = gl.minimum(BAND, all_heads - first)
    head = first + inside % width
    return head // heads, head % heads, blocks - 1 - inside // width


@gluon.jit
def blocks_seen(row, rows, S, T, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr):
    """Blocks of keys that the queries row … row + rows − 1 see, at least 1 (whose scores may all be masked)."""
    last = T
    if CAUSAL:
        last = gl.minimum(T, row + rows + T - S)
    return gl.maximum((last + BLOCK_N - 1) // BLOCK_N, 1)


@gluon.jit
def slot(i, STAGES: gl.constexpr):
    """Where block number i lies, and the phase of the barrier that says so."""
    return i % STAGES, (i // STAGES) & 1


# --------------------------------------------------------------------------------------------- producer


@gluon.jit
def produce(descriptors, lse, buffers, barriers, sizes, scale,
            CAUSAL: gl.constexpr, ORDERED: gl.constexpr, OVERLAP: gl.constexpr,
            PERSISTENT: gl.constexpr):  # fmt: skip
    """Ask for the queries of each tile, then for its blocks of K and V, from the last to the first."""
    q_desc, k_desc, v_desc, o_desc = descriptors
    q_buffer, k_buffer, v_buffer = buffers
    q_ready, q_free, k_ready, k_free, v_ready, v_free, turn = barriers
    S, T, heads, group, blocks, tiles, band = sizes
    GROUPS: gl.constexpr = q_buffer.shape[0]
    STAGES: gl.constexpr = k_buffer.shape[0]
    BLOCK_N: gl.constexpr = k_buffer.shape[3]
    D: gl.constexpr = k_buffer.shape[4]
    BYTES: gl.constexpr = BLOCK_N * D * 2
    count = gl.to_tensor(0)
    round_ = gl.to_tensor(0)
    start, end, step = my_tiles(tiles, PERSISTENT)
    for tile in range(start, end, step):
        batch, head, block = tile_of(tile, blocks, tiles // blocks, heads, band)
        row = block * (GROUPS * 64)
        hopper.mbarrier.wait(q_free, (round_ & 1) ^ 1)
        hopper.mbarrier.expect(q_ready, GROUPS * 64 * D * 2)
        for w in gl.static_range(GROUPS):
            copy_in(q_desc, [batch, head, row + w * 64, 0], q_ready, q_buffer.index(w))
        todo = blocks_seen(row, GROUPS * 64, S, T, CAUSAL, BLOCK_N)
        for i in range(todo):
            at = [batch, head // group, (todo - 1 - i) * BLOCK_N, 0]
            stage, phase = slot(count, STAGES)
            ready = k_ready.index(stage)
            hopper.mbarrier.wait(k_free.index(stage), phase ^ 1)
            hopper.mbarrier.expect(ready, BYTES)
            copy_in(k_desc, at, ready, k_buffer.index(stage))
            ready = v_ready.index(stage)
            hopper.mbarrier.wait(v_free.index(stage), phase ^ 1)
            hopper.mbarrier.expect(ready, BYTES)
            copy_in(v_desc, at, ready, v_buffer.index(stage))
            count += 1
        round_ += 1


# -------------------------------------------------------------------------------------------- consumers


@gluon.jit
def take_turn(turn, i, W: gl.constexpr, ORDERED: gl.constexpr):
    """Wait until the group before has issued its products of block i; group 0 begins."""
    if ORDERED:
        hopper.mbarrier.wait(turn.index(W), (i & 1) ^ (1 if W == 0 else 0))


@gluon.jit
def pass_turn(turn, W: gl.constexpr, ORDERED: gl.constexpr):
    if ORDERED:
        hopper.mbarrier.arrive(turn.index((W + 1) % turn.shape[0]), count=1)


@gluon.jit
def issue_scores(q, k_buffer, k_ready, i, layout: gl.constexpr):
    """Begin q·Kᵀ of block number i, as soon as the block has come."""
    STAGES: gl.constexpr = k_buffer.shape[0]
    BLOCK_N: gl.constexpr = k_buffer.shape[3]
    stage, phase = slot(i, STAGES)
    hopper.mbarrier.wait(k_ready.index(stage), phase)
    k = k_buffer.index(stage).reshape([BLOCK_N, k_buffer.shape[4]]).permute([1, 0])
    nothing = gl.zeros([64, BLOCK_N], gl.float32, layout)
    return hopper.warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)


@gluon.jit
def issue_output(p, o, v_buffer, v_ready, i):
    """Begin o + p·V of block number i."""
    STAGES: gl.constexpr = v_buffer.shape[0]
    stage, phase = slot(i, STAGES)
    hopper.mbarrier.wait(v_ready.index(stage), phase)
    v = v_buffer.index(stage).reshape([v_buffer.shape[3], v_buffer.shape[4]])
    return hopper.warpgroup_mma(p, v, o, is_async=True)


@gluon.jit
def release(free, i):
    """This group has done with block number i."""
    hopper.mbarrier.arrive(free.index(i % free.shape[0]), count=1)


@gluon.jit
def softmax(s, m, l, row, column, S, T, scale,
            CAUSAL: gl.constexpr, MASKED: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """(p, m, l, shrink): the weights of a block, and what its maximum makes of the sums before it."""
    if MASKED:
        key = column + gl.arange(0, s.shape[1], gl.SliceLayout(0, layout))
        last = gl.full([64], 0, gl.int32, gl.SliceLayout(1, layout)) + (T - 1)
        if CAUSAL:
            position = row + T - S + gl.arange(0, 64, gl.SliceLayout(1, layout))
            last = gl.minimum(last, position)
        s = gl.where(key[None, :] <= last[:, None], s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, 1))
    base = m_new * scale
    if MASKED:  # a row that has seen no key yet: −∞ − (−∞) would be NaN
        base = gl.where(m_new == float("-inf"), 0.0, base)
    p = gl.exp2(s * scale - base[:, None])
    shrink = gl.exp2(m * scale - base)
    return p, m_new, l * shrink + gl.sum(p, 1), shrink


@gluon.jit
def here(l):
    """l ≥ 0, unchanged, computed before what follows.

    The assembler moves arithmetic freely, and would put the exponentials behind the wait that they are to fill.
    It moves none past an instruction that might be jumped over, as this sleep of no time is, always.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.lt.f32 p, $1, 0f00000000; @p nanosleep.u32 0; mov.f32 $0, $1; }",
        "=f,f", [l], dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def next_block(q, p, o, m, l, i, row, column, buffers, barriers, S, T, scale, W: gl.constexpr,
               CAUSAL: gl.constexpr, MASKED: gl.constexpr, ORDERED: gl.constexpr, OVERLAP: gl.constexpr,
               layout: gl.constexpr):  # fmt: skip
    """Scores and softmax of block number i, and the output of the block before it, whose weights are p."""
    q_buffer, k_buffer, v_buffer = buffers
    q_ready, q_free, k_ready, k_free, v_ready, v_free, turn = barriers
    take_turn(turn, i, W, ORDERED)
    s = issue_scores(q, k_buffer, k_ready, i, layout)
    o = issue_output(p, o, v_buffer, v_ready, i - 1)
    pass_turn(turn, W, ORDERED)
    if OVERLAP:
        s = hopper.warpgroup_mma_wait(1, [s])  # at most one product left: the scores, issued first, are there
        release(k_free, i)
        weights, m, l, shrink = softmax(s, m, l, row, column, S, T, scale, CAUSAL, MASKED, layout)
        l = here(l)
        o = hopper.warpgroup_mma_wait(0, [o])
        release(v_free, i - 1)
    else:
        s, o = hopper.warpgroup_mma_wait(0, [s, o])
        release(k_free, i)
        release(v_free, i - 1)
        weights, m, l, shrink = softmax(s, m, l, row, column, S, T, scale, CAUSAL, MASKED, layout)
    o = o * gl.convert_layout(shrink, gl.SliceLayout(1, o.type.layout))[:, None]
    return gl.convert_layout(weights.to(k_buffer.dtype), p.type.layout), o, m, l


@gluon.jit
def consume(W: gl.constexpr, descriptors, lse, buffers, barriers, sizes, scale,
            CAUSAL: gl.constexpr, ORDERED: gl.constexpr, OVERLAP: gl.constexpr,
            PERSISTENT: gl.constexpr):  # fmt: skip
    """Output and log-sum-exp of this group's 64 queries of each tile."""
    q_desc, k_desc, v_desc, o_desc = descriptors
    q_buffer, k_buffer, v_buffer = buffers
    q_ready, q_free, k_ready, k_free, v_ready, v_free, turn = barriers
    S, T, heads, group, blocks, tiles, band = sizes
    GROUPS: gl.constexpr = q_buffer.shape[0]
    STAGES: gl.constexpr = k_buffer.shape[0]
    BLOCK_N: gl.constexpr = k_buffer.shape[3]
    D: gl.constexpr = k_buffer.shape[4]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    count = gl.to_tensor(0)
    round_ = gl.to_tensor(0)
    start, end, step = my_tiles(tiles, PERSISTENT)
    for tile in range(start, end, step):
        batch, head, block = tile_of(tile, blocks, tiles // blocks, heads, band)
        first = block * (GROUPS * 64)
        row = first + W * 64
        todo = blocks_seen(first, GROUPS * 64, S, T, CAUSAL, BLOCK_N)
        mine = blocks_seen(row, 64, S, T, CAUSAL, BLOCK_N)
        whole = T // BLOCK_N  # blocks that all of the group's queries see whole
        if CAUSAL:
            whole = gl.minimum(whole, gl.maximum(row + 1 + T - S, 0) // BLOCK_N)
        for _ in range(todo - mine):  # later queries see these blocks, this group's do not
            take_turn(turn, count, W, ORDERED)
            pass_turn(turn, W, ORDERED)
            stage, phase = slot(count, STAGES)
            hopper.mbarrier.wait(k_ready.index(stage), phase)
            release(k_free, count)
            hopper.mbarrier.wait(v_ready.index(stage), phase)
            release(v_free, count)
            count += 1
        hopper.mbarrier.wait(q_ready, round_ & 1)
        q = q_buffer.index(W).reshape([64, D])
        m = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
        l = gl.zeros([64], gl.float32, gl.SliceLayout(1, s_layout))
        o = gl.zeros([64, D], gl.float32, o_layout)
        take_turn(turn, count, W, ORDERED)
        s = issue_scores(q, k_buffer, k_ready, count, s_layout)
        pass_turn(turn, W, ORDERED)
        s = hopper.warpgroup_mma_wait(0, [s])
        release(k_free, count)
        weights, m, l, shrink = softmax(s, m, l, row, (mine - 1) * BLOCK_N, S, T, scale, CAUSAL, True, s_layout)
        p = gl.convert_layout(weights.to(k_buffer.dtype), p_layout)
        count += 1
        masked = 1  # without a causal mask only the last block, which ends where the keys end
        if CAUSAL:
            masked = gl.maximum(mine - whole, 1)
            for i in range(1, masked):
                p, o, m, l = next_block(
                    q, p, o, m, l, count, row, (mine - 1 - i) * BLOCK_N, buffers, barriers, S, T, scale, W,
                    CAUSAL, True, ORDERED, OVERLAP, s_layout,
                )  # fmt: skip
                count += 1
        for i in range(masked, mine):
            p, o, m, l = next_block(
                q, p, o, m, l, count, row, (mine - 1 - i) * BLOCK_N, buffers, barriers, S, T, scale, W,
                CAUSAL, False, ORDERED, OVERLAP, s_layout,
            )  # fmt: skip
            count += 1
        o = issue_output(p, o, v_buffer, v_ready, count - 1)
        o = hopper.warpgroup_mma_wait(0, [o])
        release(v_free, count - 1)
        log_sum = gl.where(l > 0, (m * scale + gl.log2(l)) * 0.6931471805599453, float("-inf"))
        inverse = gl.convert_layout(gl.where(l > 0, 1.0 / l, 0.0), gl.SliceLayout(1, o_layout))
        # The queries have been used: their place holds the output on its way to memory.
        q.store((o * inverse[:, None]).to(k_buffer.dtype))
        hopper.fence_async_shared()
        copy_out(o_desc, [batch, head, row, 0], q_buffer.index(W))
        rows = row + gl.arange(0, 64, gl.SliceLayout(1, s_layout))
        gl.store(lse + gl.cast(batch * heads + head, gl.int64) * S + rows, log_sum, mask=rows < S)
        hopper.tma.store_wait(0)
        hopper.mbarrier.arrive(q_free, count=1)
        round_ += 1


# ----------------------------------------------------------------------------------------------- kernel


@gluon.jit(do_not_specialize=["S", "T", "heads", "group", "blocks", "tiles", "band"])
def hopper_kernel(
    q_desc, k_desc, v_desc, o_desc, lse, S, T, heads, group, blocks, tiles, band, scale,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, ORDERED: gl.constexpr,
    OVERLAP: gl.constexpr, PERSISTENT: gl.constexpr, PRODUCER: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """GROUPS · 64 queries of one head a tile; every program takes each num_programs-th tile.

    PRODUCER, CONSUMER   registers a thread
    """
    q_buffer = gl.allocate_shared_memory(q_desc.dtype, [GROUPS] + q_desc.block_type.shape, q_desc.layout)
    k_buffer = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_buffer = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    LAYOUT: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [1], LAYOUT)
    q_free = gl.allocate_shared_memory(gl.int64, [1], LAYOUT)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], LAYOUT)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], LAYOUT)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], LAYOUT)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], LAYOUT)
    turn = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], LAYOUT)
    hopper.mbarrier.init(q_ready, count=1)
    hopper.mbarrier.init(q_free, count=GROUPS)
    for i in gl.static_range(STAGES):
        hopper.mbarrier.init(k_ready.index(i), count=1)
        hopper.mbarrier.init(k_free.index(i), count=GROUPS)
        hopper.mbarrier.init(v_ready.index(i), count=1)
        hopper.mbarrier.init(v_free.index(i), count=GROUPS)
    for w in gl.static_range(GROUPS):
        hopper.mbarrier.init(turn.index(w), count=1)
    descriptors = (q_desc, k_desc, v_desc, o_desc)
    buffers = (q_buffer, k_buffer, v_buffer)
    barriers = (q_ready, q_free, k_ready, k_free, v_ready, v_free, turn)
    sizes = (S, T, heads, group, blocks, tiles, band)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (consume, (0, descriptors, lse, buffers, barriers, sizes, scale, CAUSAL, ORDERED, OVERLAP, PERSISTENT)),
                (consume, (1, descriptors, lse, buffers, barriers, sizes, scale, CAUSAL, ORDERED, OVERLAP, PERSISTENT)),
                (produce, (descriptors, lse, buffers, barriers, sizes, scale, CAUSAL, ORDERED, OVERLAP, PERSISTENT)),
            ],
            [4, 1],
            [CONSUMER, PRODUCER],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (0, descriptors, lse, buffers, barriers, sizes, scale, CAUSAL, ORDERED, OVERLAP, PERSISTENT)),
                (consume, (1, descriptors, lse, buffers, barriers, sizes, scale, CAUSAL, ORDERED, OVERLAP, PERSISTENT)),
                (consume, (2, descriptors, lse, buffers, barriers, sizes, scale, CAUSAL, ORDERED, OVERLAP, PERSISTENT)),
                (produce, (descriptors, lse, buffers, barriers, sizes, scale, CAUSAL, ORDERED, OVERLAP, PERSISTENT)),
            ],
            [4, 4, 1],
            [CONSUMER, CONSUMER, PRODUCER],
        )


# ----------------------------------------------------------------------------------------------- launch


class Plan(NamedTuple):
    """How the kernel is launched; no choice changes the result.

    groups      consumers: 64 queries a tile for each, 2 or 3
    block_n     keys of a block, 64 or 128
    stages      blocks of K and of V in shared memory at once
    band        heads whose tiles are side by side
    ordered     consumers take turns at issuing products (ping-pong)
    overlap     the softmax of a block beside the output product of the block before
    persistent  as many programs as multiprocessors, each with many tiles; else a program a tile
    """

    groups: int = 2
    block_n: int = 128
    stages: int = 2
    band: int = 8
    ordered: bool = True
    overlap: bool = True
    persistent: bool = False

    def shared_bytes(self, head_dim: int) -> int:
        """Shared memory for queries, keys and values; barriers and the compiler's own add less than 2 KiB."""
        return 2 * head_dim * (self.groups * ROWS + 2 * self.stages * self.block_n)


PLANS = {64: Plan(), 128: Plan()}
INTERPRETED = Plan(2, 64, 2, 3)


class UnsupportedError(CourseError, ValueError):
    """Inputs for which there is another rung, but not this one."""


def unsupported(q: Tensor, k: Tensor, v: Tensor, *, interpret: bool = False) -> str:
    """Why this rung cannot take these tensors; empty if it can."""
    if not gluon.found:
        return "this Triton has no Gluon for Hopper (3.6 and later have)"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"WGMMA multiplies 16-bit floats here, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] not in PLANS:
        return f"a head dimension of {q.shape[-1]}, not 64 or 128"
    if not interpret and q.device.type != "meta":
        if not q.is_cuda:
            return "the tensors are on the CPU"
        if torch.cuda.get_device_capability(q.device)[0] != 9:
            return "WGMMA exists on Hopper (sm_90) only"
    for name, x in (("q", q), ("k", k), ("v", v)):
        strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            return f"{name}'s last dimension is not contiguous"
        if x.data_ptr() % 16 or any(stride * x.itemsize % 16 for stride in strides):
            return f"{name}'s rows do not start on multiples of 16 bytes, which the copy engine asks for"
    return ""


def _described(x: Tensor, rows: int, interpret: bool) -> Any:
    """A descriptor of [B, H, S, D] with blocks of [1, 1, rows, D]."""
    block = [1, 1, rows, x.shape[-1]]
    if interpret:
        from llmcourse.kernels.gluon_threads import Descriptor

        return Descriptor(x, block)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    # A dimension of one element may have any stride, and the engine looks at it all the same.
    strides = [s if n > 1 else x.shape[-1] for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    return gluon.TensorDescriptor(x, list(x.shape), [*strides, 1], block, layout)


def arguments_of(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Any, scale: float, causal: bool, plan: Plan, interpret: bool
) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """(arguments, constants and compiler options, tiles) of a launch."""
    batch, heads, queries, _ = q.shape
    blocks = ceil_div(queries, ROWS * plan.groups)
    tiles = batch * heads * blocks
    sizes = (queries, k.shape[2], heads, heads // k.shape[1], blocks, tiles, min(plan.band, batch * heads))
    descriptors = (
        _described(q, ROWS, interpret),
        _described(k, plan.block_n, interpret),
        _described(v, plan.block_n, interpret),
        _described(o, ROWS, interpret),
    )
    start, consumer = REGISTERS[plan.groups]
    constants: dict[str, Any] = {
        "GROUPS": plan.groups, "STAGES": plan.stages, "CAUSAL": causal, "ORDERED": plan.ordered,
        "OVERLAP": plan.overlap, "PERSISTENT": plan.persistent, "PRODUCER": PRODUCER_REGISTERS[plan.groups],
        "CONSUMER": consumer,
    }  # fmt: skip
    if not interpret:
        constants |= {"num_warps": 4, "maxnreg": start}
    return (*descriptors, lse, *sizes, scale * LOG2_E), constants, tiles


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    plan: Plan | None = None,
    interpret: bool = False,
) -> tuple[Tensor, Tensor]:
    """(o [B, Hq, S, D], log-sum-exp [B, Hq, S] in float32) of attention.

    q [B, Hq, S, D], k and v [B, Hkv, T, D], Hq a multiple of Hkv, fp16 or bf16, D 64 or 128
    scale       1/√D if None
    interpret   on the CPU, by `gluon_threads`

    Does     4·D FLOPs and one exponential for each visible pair, a query and a key.
    Raises   UnsupportedError with the reason that `unsupported` gives.
    """
    if reason := unsupported(q, k, v, interpret=interpret):
        raise UnsupportedError(
            f"the Hopper rung of FlashAttention cannot run: {reason}.",
            "It is written for one GPU, and for what its copy engine and tensor cores take.",
            "llmcourse.kernels.flash_attention.attention, which takes the best rung that can.",
        )
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if scale < 0:
        q, scale = -q, -scale
    scale = max(scale, 1e-30)  # −∞ (a masked score) times 0 would be NaN
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if 0 in o.shape or k.shape[2] == 0:
        return o.zero_(), lse.fill_(-math.inf)
    plan = plan or (INTERPRETED if interpret else PLANS[q.shape[-1]])
    if interpret:
        from llmcourse.kernels.gluon_threads import Pointer, run

        place: Any = Pointer(lse)
        arguments, constants, tiles = arguments_of(q, k, v, o, place, scale, causal, plan, True)
        run(hopper_kernel, 3 if plan.persistent else tiles, *arguments, **constants)
        return o, lse
    arguments, constants, tiles = arguments_of(q, k, v, o, lse, scale, causal, plan, False)
    programs = tiles
    if plan.persistent:
        programs = min(tiles, torch.cuda.get_device_properties(q.device).multi_processor_count)
    with torch.cuda.device(q.device):
        hopper_kernel[(programs,)](*arguments, **constants)
    return o, lse
