"""FlashAttention for Hopper by hand: copy engine, asynchronous tensor cores, warps with different jobs.

`flash_forward.py` says *what* to compute and leaves *when* to Triton. Its loop multiplies, waits, computes
the softmax, multiplies again: the tensor cores stand still during the exponentials, the exponential units
during the products (`attention_ceiling.py` says what that costs). Here the *when* is written down, in
Gluon: same compiler, but layouts, copies, barriers and warps are the program's own.

**Producer and consumers.** One warp (the producer) does nothing but ask the copy engine (TMA) for blocks of K
and V, STAGES of them ahead. Two or three groups of four warps (the consumers) each hold 64 queries and work
on what has come. All share the blocks, so that a block is fetched once for 128 or 192 queries. The producer
gives its registers to the consumers: it keeps 24 a thread, they have 240 (or 32 and 160).

**Barriers.** A block changes hands through two barriers in shared memory: `ready` (the copy engine has
written all its bytes) and `free` (every consumer has done with it). A barrier has a phase bit that flips
whenever it completes; whoever waits, waits for a phase. Block number i is in slot i % STAGES, in round i //
STAGES, and the round's lowest bit is the phase to wait for.

**Asynchronous products.** A WGMMA is issued and runs by itself; the warps go on until they wait for it.
Before the softmax of block i a consumer has issued *two* products: the scores of block i and behind them
the output of block i − 1. With OVERLAP it waits for the scores only, and the softmax of block i runs beside
the output product of block i − 1 (Shah et al. 2024, arXiv:2407.08608, section 3.2).

**Ping-pong.** With ORDERED the consumers take turns at issuing: one's products run while another computes its
softmax (section 3.1). A turn is passed on through a barrier of its own.

**Blocks from the last to the first.** Only the last blocks are masked, at the diagonal and at the end of the
keys. Taken first, they are out of the way before the loop that has to be fast.

The registers of a product's left side may be read until the product ends. Older assemblers (ptxas 12.8 and
12.9) can lose track of that where the same registers feed a later product too, so only the weights, each used
once, go in by registers; the queries stay in shared memory.

`flash_hopper.py` launches this; `gluon_threads.py` runs it without a GPU and finds mistakes in its barriers.
"""

from __future__ import annotations

from llmcourse.kernels.gluon_language import copy_in, copy_out, gl, gluon, hopper

# fmt: off


# ------------------------------------------------------------------------------------------ what to do


@gluon.jit
def my_tiles(tiles, PERSISTENT: gl.constexpr):
    """(first, end, step) of this program's tiles: every num_programs-th, or just one."""
    if PERSISTENT:
        return gl.program_id(0), tiles, gl.num_programs(0)
    else:
        return gl.program_id(0), gl.program_id(0) + 1, 1


@gluon.jit
def tile_of(tile, blocks, all_heads, heads, band):
    """(batch, head, block of queries) of a tile: the heaviest blocks first, `band` heads side by side."""
    first = tile // (band * blocks) * band
    inside = tile - first * blocks
    width = gl.minimum(band, all_heads - first)
    head = first + inside % width
    return head // heads, head % heads, blocks - 1 - inside // width


@gluon.jit
def blocks_seen(row, rows, S, T, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr):
    """Blocks of keys that queries row … row + rows − 1 see; at least 1, of which all may be masked."""
    last = T
    if CAUSAL:
        last = gl.minimum(T, row + rows + T - S)
    return gl.maximum((last + BLOCK_N - 1) // BLOCK_N, 1)


@gluon.jit
def slot(i, STAGES: gl.constexpr):
    """Where block number i lies, and the phase of the barrier that says so."""
    return i % STAGES, (i // STAGES) & 1


# -------------------------------------------------------------------------------------------- producer


@gluon.jit
def produce(q_desc, k_desc, v_desc, buffers, q_barriers, k_barriers, v_barriers, sizes,
            CAUSAL: gl.constexpr, PERSISTENT: gl.constexpr):
    """Ask for the queries of each tile, then for its blocks of K and V."""
    q_ready, q_free = q_barriers
    k_ready, k_free = k_barriers
    v_ready, v_free = v_barriers
    q_buffer, k_buffer, v_buffer = buffers
    S, T, heads, group, blocks, tiles, band = sizes
    GROUPS: gl.constexpr = q_buffer.shape[0]
    STAGES: gl.constexpr = k_buffer.shape[0]
    BLOCK_N: gl.constexpr = k_buffer.shape[3]
    D: gl.constexpr = k_buffer.shape[4]
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
            hopper.mbarrier.expect(ready, BLOCK_N * D * 2)
            copy_in(k_desc, at, ready, k_buffer.index(stage))
            ready = v_ready.index(stage)
            hopper.mbarrier.wait(v_free.index(stage), phase ^ 1)
            hopper.mbarrier.expect(ready, BLOCK_N * D * 2)
            copy_in(v_desc, at, ready, v_buffer.index(stage))
            count += 1
        round_ += 1


# ------------------------------------------------------------------------------------------- consumers


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
def softmax(s, top, total, row, column, S, T, scale,
            CAUSAL: gl.constexpr, MASKED: gl.constexpr, layout: gl.constexpr):
    """(weights, top, total, shrink) of a block's scores.

    top     largest score of each query so far;  total   sum of its weights, 2^(scale·(score − top))
    shrink  what the new top makes of everything summed before
    """
    if MASKED:
        key = column + gl.arange(0, s.shape[1], gl.SliceLayout(0, layout))
        last = gl.full([64], 0, gl.int32, gl.SliceLayout(1, layout)) + (T - 1)
        if CAUSAL:
            position = row + T - S + gl.arange(0, 64, gl.SliceLayout(1, layout))
            last = gl.minimum(last, position)
        s = gl.where(key[None, :] <= last[:, None], s, float("-inf"))
    new_top = gl.maximum(top, gl.max(s, 1))
    base = new_top * scale
    if MASKED:  # a row that has seen no key yet: −∞ − (−∞) would be NaN
        base = gl.where(new_top == float("-inf"), 0.0, base)
    weights = gl.exp2(s * scale - base[:, None])
    shrink = gl.exp2(top * scale - base)
    return weights, new_top, total * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def here(total):
    """total ≥ 0, unchanged, and all that it depends on, computed before what follows.

    The assembler moves arithmetic freely, and would put the exponentials behind the wait that they are to
    fill. It moves none past an instruction that might be jumped over, as this sleep of no time is, always.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.lt.f32 p, $1, 0f00000000; @p nanosleep.u32 0; mov.f32 $0, $1; }",
        "=f,f", [total], dtype=gl.float32, is_pure=False, pack=1,
    )


@gluon.jit
def next_block(q, p, o, top, total, i, row, column, k_buffer, v_buffer, k_barriers, v_barriers, turn,
               S, T, scale, W: gl.constexpr, CAUSAL: gl.constexpr, MASKED: gl.constexpr,
               ORDERED: gl.constexpr, OVERLAP: gl.constexpr, layout: gl.constexpr):
    """(p, o, top, total) with scores and softmax of block number i, and the output of the block before it.

    p   weights: of the block before, and returned of this one
    """
    k_ready, k_free = k_barriers
    v_ready, v_free = v_barriers
    take_turn(turn, i, W, ORDERED)
    s = issue_scores(q, k_buffer, k_ready, i, layout)
    o = issue_output(p, o, v_buffer, v_ready, i - 1)
    pass_turn(turn, W, ORDERED)
    if OVERLAP:
        s = hopper.warpgroup_mma_wait(1, [s])  # one product may be left: the scores were issued first
        release(k_free, i)
        weights, top, total, shrink = softmax(s, top, total, row, column, S, T, scale, CAUSAL, MASKED, layout)
        total = here(total)
        o = hopper.warpgroup_mma_wait(0, [o])
        release(v_free, i - 1)
    else:
        s, o = hopper.warpgroup_mma_wait(0, [s, o])
        release(k_free, i)
        release(v_free, i - 1)
        weights, top, total, shrink = softmax(s, top, total, row, column, S, T, scale, CAUSAL, MASKED, layout)
    o = o * gl.convert_layout(shrink, gl.SliceLayout(1, o.type.layout))[:, None]
    return gl.convert_layout(weights.to(k_buffer.dtype), p.type.layout), o, top, total


@gluon.jit
def consume(W: gl.constexpr, o_desc, lse, buffers, q_barriers, k_barriers, v_barriers, turn, sizes, scale,
            CAUSAL: gl.constexpr, ORDERED: gl.constexpr, OVERLAP: gl.constexpr, PERSISTENT: gl.constexpr):
    """Output and log-sum-exp of group W's 64 queries of each tile."""
    q_ready, q_free = q_barriers
    k_ready, k_free = k_barriers
    v_ready, v_free = v_barriers
    q_buffer, k_buffer, v_buffer = buffers
    S, T, heads, _group, blocks, tiles, band = sizes
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
        top = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
        total = gl.zeros([64], gl.float32, gl.SliceLayout(1, s_layout))
        o = gl.zeros([64, D], gl.float32, o_layout)
        take_turn(turn, count, W, ORDERED)
        s = issue_scores(q, k_buffer, k_ready, count, s_layout)
        pass_turn(turn, W, ORDERED)
        s = hopper.warpgroup_mma_wait(0, [s])
        release(k_free, count)
        column = (mine - 1) * BLOCK_N
        weights, top, total, _ = softmax(s, top, total, row, column, S, T, scale, CAUSAL, True, s_layout)
        p = gl.convert_layout(weights.to(k_buffer.dtype), p_layout)
        count += 1
        masked = 1  # without a causal mask only the last block, where the keys end
        if CAUSAL:
            whole = gl.minimum(T, gl.maximum(row + 1 + T - S, 0)) // BLOCK_N  # seen by all of the group
            masked = gl.maximum(mine - whole, 1)
            for i in range(1, masked):
                p, o, top, total = next_block(
                    q, p, o, top, total, count, row, column - i * BLOCK_N, k_buffer, v_buffer, k_barriers,
                    v_barriers, turn, S, T, scale, W, CAUSAL, True, ORDERED, OVERLAP, s_layout,
                )
                count += 1
        for i in range(masked, mine):
            p, o, top, total = next_block(
                q, p, o, top, total, count, row, column - i * BLOCK_N, k_buffer, v_buffer, k_barriers,
                v_barriers, turn, S, T, scale, W, CAUSAL, False, ORDERED, OVERLAP, s_layout,
            )
            count += 1
        o = issue_output(p, o, v_buffer, v_ready, count - 1)
        o = hopper.warpgroup_mma_wait(0, [o])
        release(v_free, count - 1)
        log_sum = gl.where(total > 0, (top * scale + gl.log2(total)) * 0.6931471805599453, float("-inf"))
        inverse = gl.convert_layout(gl.where(total > 0, 1.0 / total, 0.0), gl.SliceLayout(1, o_layout))
        # The queries have been used: their place holds the output on its way to memory.
        q.store((o * inverse[:, None]).to(k_buffer.dtype))
        hopper.fence_async_shared()
        copy_out(o_desc, [batch, head, row, 0], q_buffer.index(W))
        rows = row + gl.arange(0, 64, gl.SliceLayout(1, s_layout))
        gl.store(lse + gl.cast(batch * heads + head, gl.int64) * S + rows, log_sum, mask=rows < S)
        hopper.tma.store_wait(0)
        hopper.mbarrier.arrive(q_free, count=1)
        round_ += 1


# ---------------------------------------------------------------------------------------------- kernel


@gluon.jit
def barriers_for(NUMBER: gl.constexpr, GROUPS: gl.constexpr):
    """(ready, free) of each of NUMBER slots."""
    ready = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], hopper.mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], hopper.mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        hopper.mbarrier.init(ready.index(i), count=1)
        hopper.mbarrier.init(free.index(i), count=GROUPS)
    return ready, free


@gluon.jit(do_not_specialize=["S", "T", "heads", "group", "blocks", "tiles", "band"])
def hopper_kernel(q_desc, k_desc, v_desc, o_desc, lse, S, T, heads, group, blocks, tiles, band, scale,
                  GROUPS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, ORDERED: gl.constexpr,
                  OVERLAP: gl.constexpr, PERSISTENT: gl.constexpr, PRODUCER: gl.constexpr,
                  CONSUMER: gl.constexpr):
    """GROUPS · 64 queries of one head a tile, `blocks` tiles a head.

    group               query heads that share a head of keys and values
    PRODUCER, CONSUMER  registers a thread
    """
    q = gl.allocate_shared_memory(q_desc.dtype, [GROUPS] + q_desc.block_type.shape, q_desc.layout)  # noqa: RUF005
    k = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)  # noqa: RUF005
    v = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)  # noqa: RUF005
    q_all = barriers_for(1, GROUPS)
    qb = (q_all[0].index(0), q_all[1].index(0))
    kb = barriers_for(STAGES, GROUPS)
    vb = barriers_for(STAGES, GROUPS)
    turn = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], hopper.mbarrier.MBarrierLayout())
    for w in gl.static_range(GROUPS):
        hopper.mbarrier.init(turn.index(w), count=1)
    kept = (q, k, v)
    sizes = (S, T, heads, group, blocks, tiles, band)
    # Written out, since constants in a tuple that has a name become variables.
    if GROUPS == 2:
        gl.warp_specialize([
            (consume, (0, o_desc, lse, kept, qb, kb, vb, turn, sizes, scale,
                      CAUSAL, ORDERED, OVERLAP, PERSISTENT)),
            (consume, (1, o_desc, lse, kept, qb, kb, vb, turn, sizes, scale,
                      CAUSAL, ORDERED, OVERLAP, PERSISTENT)),
            (produce, (q_desc, k_desc, v_desc, kept, qb, kb, vb, sizes, CAUSAL, PERSISTENT)),
        ], [4, 1], [CONSUMER, PRODUCER])
    else:
        gl.warp_specialize([
            (consume, (0, o_desc, lse, kept, qb, kb, vb, turn, sizes, scale,
                      CAUSAL, ORDERED, OVERLAP, PERSISTENT)),
            (consume, (1, o_desc, lse, kept, qb, kb, vb, turn, sizes, scale,
                      CAUSAL, ORDERED, OVERLAP, PERSISTENT)),
            (consume, (2, o_desc, lse, kept, qb, kb, vb, turn, sizes, scale,
                      CAUSAL, ORDERED, OVERLAP, PERSISTENT)),
            (produce, (q_desc, k_desc, v_desc, kept, qb, kb, vb, sizes, CAUSAL, PERSISTENT)),
        ], [4, 4, 1], [CONSUMER, CONSUMER, PRODUCER])
