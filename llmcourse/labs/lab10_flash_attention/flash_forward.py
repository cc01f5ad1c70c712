"""Exercise `flash_forward`: attention in one Triton kernel, which stores no score."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.perform import Call
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import DOTS, at_minimum, run, tensor
from llmcourse.kernels.language import tl, triton
from llmcourse.labs.lab10_flash_attention.flash_bytes import expected as least_bytes
from llmcourse.labs.lab10_flash_attention.reference import attention, visible

flash_forward = Exercise(
    "flash_forward",
    title="FlashAttention, forward, in Triton",
    arguments=("q", "k", "v", "causal", "block_m", "block_n"),
    shapes=(
        "q         float32, float16 or bfloat16 tensor [Hq, S, D], contiguous; D is 16, 32, 64 or 128",
        "k, v      tensors [Hkv, T, D] of the same format, contiguous; S ≤ T; Hq a multiple of Hkv:",
        "          query head h uses key/value head h // (Hq / Hkv)",
        "causal    if True, query i sees keys 0 … i + T − S, else all",
        "block_m, block_n   queries of a tile, keys of a block: powers of 2 from 16",
        "returns   (out [Hq, S, D] of q's format, lse [Hq, S] in float32), contiguous",
        "cost      q is read and out and lse are written once; for each tile of queries the blocks of k",
        "          and v that it sees a key of are read once, and no others (the count of flash_bytes)",
    ),
    formula="s = q·kᵀ / √D   lse[h, i] = log Σ_j exp s[i, j]   out[h, i] = Σ_j exp(s[i, j] − lse[h, i])·v_j",
    difficulty=5,
    importance=5,
    minutes=60,
    points=8,
    hints=(
        "It is online_attention with a program for each tile of queries and head: which three things stay in "
        "registers from the first block to the last? Where does a causal tile's loop end, so that it neither "
        "reads a block that nobody sees nor misses one?",
        "Grid (tiles, heads). A program loads its q tile [BM, D], masked at S, and walks over blocks of "
        "keys: the block of k as [D, BN] (so that tl.dot takes it as it is), scores [BM, BN], −inf where "
        "j ≥ T or, if causal, j > i + T − S. m and l are [BM], acc is [BM, D], all in float32. A causal loop "
        "ends behind the last key of the tile's last query: min(T, min((tile + 1)·BM, S) + T − S). Every "
        "query sees key 0, so m is never −inf behind the first block. p goes to v's format before the second "
        "tl.dot.",
        "s = tl.dot(qt, kt) * scale; s = tl.where((j < T) & (j <= i + T - S), s, -inf); new = "
        "tl.maximum(m, tl.max(s, axis=1)); p = tl.exp(s - new[:, None]); keep = tl.exp(m - new); l = l * "
        "keep + tl.sum(p, axis=1); acc = tl.dot(p.to(vt.dtype), vt, acc * keep[:, None]); m = new. Behind "
        "the loop: store acc / l[:, None] where i < S, and m + tl.log(l).",
    ),
)


def expected(q: Any, k: Any, v: Any, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """Head by head in float64."""
    group = len(q) // len(k)
    mask = visible(q.shape[1], k.shape[1], causal)
    found = [attention(q[h], k[h // group], v[h // group], mask) for h in range(len(q))]
    return np.stack([out for out, _ in found]), np.stack([lse for _, lse in found])


def inputs(
    t: Trial, heads: Any, S: int, T: int, D: int = 16, dtype: str = "float32", scale: float = 1.0
) -> Any:
    hq, hkv = heads if isinstance(heads, tuple) else (heads, heads)
    sizes = ((hq, S), (hkv, T))
    q, k = (tensor(t, h, n, D, dtype=dtype, scale=scale) for h, n in sizes)
    return q, k, tensor(t, hkv, T, D, dtype=dtype)


def compare(t: Trial, args: Any, causal: bool, bm: int, bn: int, rtol: float = 1e-4, watch: Any = ()) -> Call:
    q, k, v = args
    call = run(t, q, k, v, causal, bm, bn, watch=watch)
    out, lse = t.pair(call.value, 2, "(out, lse)")
    want, want_lse = expected(q, k, v, causal)
    t.close(out, want, "out", rtol=rtol, atol=rtol)
    t.close(lse, want_lse, "lse", rtol=rtol, atol=rtol)
    return call


@flash_forward.check("queries and keys that fill their blocks")
def whole(t: Trial) -> None:
    compare(t, inputs(t, 1, 16, 48), False, 16, 16)
    compare(t, inputs(t, 1, 32, 32, 32), False, 16, 32)


@flash_forward.check("any number of queries and keys, one too")
def odd(t: Trial) -> None:
    S = t.odd(17, 31)
    compare(t, inputs(t, 1, S, t.odd(33, 47)), False, 16, 16)
    compare(t, inputs(t, 1, 1, 1), False, 16, 16)


@flash_forward.check("causal, with tiles higher than blocks are wide, and the other way round")
def causal(t: Trial) -> None:
    compare(t, inputs(t, 1, 64, 64), True, 32, 16)
    S = t.odd(33, 47)
    compare(t, inputs(t, 1, S, S), True, 16, 32)


@flash_forward.check("causal behind a cache: fewer queries than keys")
def cached(t: Trial) -> None:
    S = t.odd(17, 25)
    compare(t, inputs(t, 1, S, S + t.odd(3, 25)), True, 16, 16)
    compare(t, inputs(t, 1, 1, t.odd(33, 47)), True, 16, 16)


@flash_forward.check("several heads, and query heads that share keys and values")
def heads(t: Trial) -> None:
    compare(t, inputs(t, 3, 17, 17), True, 16, 16)
    compare(t, inputs(t, (4, 2), 9, 17), False, 16, 16)


@flash_forward.check("scores of hundreds, and queries that like no key at all")
def extreme(t: Trial) -> None:
    q, k, v = inputs(t, 1, 16, 33, scale=6)
    compare(t, (q, k, v), False, 16, 16, rtol=1e-3)
    compare(t, (-q.abs() - 3, k.abs() + 6, v), False, 16, 16, rtol=1e-3)


@flash_forward.check("float16 and bfloat16 come and go, float32 accumulates")
def formats(t: Trial) -> None:
    for dtype, rtol in (("float16", 4e-3), ("bfloat16", 2e-2)):
        args = inputs(t, 1, 16, 33, dtype=dtype)
        call = compare(t, args, False, 16, 16, rtol)
        for name, value, wanted in zip(("out", "lse"), call.value, (dtype, "float32"), strict=True):
            told = str(getattr(value, "dtype", "none")).removeprefix("torch.")
            t.equal(told, wanted, f"number format of {name}")
    q, k, v = inputs(t, 1, 16, 32, dtype="float16")  # no weight is small: l is about 32, sums above 65,504
    v = (v.float() * 0.01 + 5000).half()
    call = run(t, q * 0.1, k * 0.1, v, False, 16, 16)
    out, _ = t.pair(call.value, 2, "(out, lse)")
    t.close(out, expected(q * 0.1, k * 0.1, v, False)[0], "out, with sums above 65,504", rtol=4e-3)


@flash_forward.check("no score goes to memory, and a causal tile reads no block that it does not see")
def traffic(t: Trial) -> None:
    for causal_, S, T, bm, bn in (
        (False, t.odd(33, 47), t.odd(49, 63), 32, 16),
        (True, 64, 64, 16, 32),
        (True, t.odd(33, 47), t.odd(49, 63), 16, 16),
    ):
        args = inputs(t, 1, S, T)
        call = compare(t, args, causal_, bm, bn, watch=DOTS)
        stores = S * 16 * 4 + 4 * S
        seen = "that it sees a key of" if causal_ else "of keys"
        at_minimum(
            call,
            loads=least_bytes(S, T, 16, bm, bn, causal_, 4) - stores,
            stores=stores,
            reads=f"q once, and K and V for each tile of queries: the blocks {seen}",
            writes="out and lse once",
        )
        flops = call.costs["kernel_dot_flops"]
        pairs = int(visible(S, T, causal_).sum())
        t.holds(
            flops >= 4 * 16 * pairs,
            f"tl.dot does {flops:,} FLOPs, expected 4·D for each of {pairs:,} visible scores and more",
            "tl.dot for q·kᵀ and for p·v: it is what tensor cores run.",
        )


# ── mistakes: one kernel, one fault at a time ────────────────────────────────────────────────────────


@triton.jit
def flash_kernel(
    q, k, v, out, lse, S, T, group, scale,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, FAULT: tl.constexpr = "",
):  # fmt: skip
    """A tile of queries of one head. `FAULT` names what is wrong with it."""
    tile, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // group
    if FAULT == "heads":
        kv_head = head % (tl.num_programs(1) // group)
    i = tile * BM + tl.arange(0, BM)
    d = tl.arange(0, D)
    rows = (head * S + i[:, None]) * D + d[None, :]
    there = i >= 0 if FAULT == "rows_unmasked" else i < S
    qt = tl.load(q + rows, mask=there[:, None], other=0.0)
    m = tl.full((BM,), 0.0 if FAULT == "zero_m" else -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros(
        (BM, D), tl.float16 if FAULT == "narrow" and v.dtype.element_ty == tl.float16 else tl.float32
    )
    shift = T - S
    if FAULT == "top_left":
        shift = 0
    end = T
    if CAUSAL and FAULT != "all_blocks":
        end = tl.minimum(T, tl.minimum((tile + 1) * BM, S) + shift)
        if FAULT == "one_too_few":
            end = tl.minimum(T, tl.maximum(tile * BM + shift, 1))
    for start in range(0, end, BN):
        j = start + tl.arange(0, BN)
        inside = j < T
        loaded = j >= 0 if FAULT == "keys_unmasked" else inside
        kt = tl.load(k + (kv_head * T + j[None, :]) * D + d[:, None], mask=loaded[None, :], other=0.0)
        vt = tl.load(v + (kv_head * T + j[:, None]) * D + d[None, :], mask=loaded[:, None], other=0.0)
        s = tl.dot(qt, kt, input_precision="ieee")
        if FAULT != "unscaled":
            s = s * scale
        if FAULT == "base_two_scores":
            s = s * 0.6931471805599453
        visible = i[:, None] >= 0
        if FAULT != "zeros_outside":
            visible = inside[None, :]
        if CAUSAL and FAULT != "last_only":
            visible = visible & (j[None, :] <= i[:, None] + shift)
        if CAUSAL and FAULT == "last_only":
            visible = visible & ((j[None, :] <= i[:, None] + shift) | (start + BN < end))
        if CAUSAL and FAULT == "strict":
            visible = visible & ((j[None, :] < i[:, None] + shift) | (j[None, :] == 0))
        s = tl.where(visible, s, -float("inf"))
        new = tl.maximum(m, tl.max(s, axis=1))
        p = tl.exp(s - new[:, None])
        keep = tl.exp(m - new)
        shrunk = total if FAULT == "l_kept" else total * keep
        total = shrunk + tl.sum(p, axis=1)
        if FAULT == "acc_kept":
            acc = tl.dot(p.to(vt.dtype), vt, acc, input_precision="ieee")
        elif FAULT == "narrow":
            acc = (acc * keep[:, None] + tl.dot(p.to(vt.dtype), vt, input_precision="ieee")).to(acc.dtype)
        else:
            acc = tl.dot(p.to(vt.dtype), vt, acc * keep[:, None], input_precision="ieee")
        m = new
    o = acc
    if FAULT != "undivided":
        o = acc / total[:, None]
    sum_log = m + tl.log(total)
    if FAULT == "lse_base_two":
        sum_log = sum_log * 1.4426950408889634
    if FAULT == "lse_without_m":
        sum_log = tl.log(total)
    stored = i >= 0 if FAULT == "store_unmasked" else i < S
    tl.store(out + rows, o.to(out.dtype.element_ty), mask=stored[:, None])
    tl.store(lse + head * S + i, sum_log, mask=i < S)


def launched(
    q: Any,
    k: Any,
    v: Any,
    causal: bool,
    bm: int,
    bn: int,
    fault: str = "",
    scale: Any = None,
    dtype: Any = None,
) -> Any:
    """The wrapper that most solutions have: a grid of tiles by heads."""
    import torch

    hq, S, D = q.shape
    out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.device)
    lse = torch.empty((hq, S), dtype=torch.float32, device=q.device)
    flash_kernel[(-(-S // bm), hq)](
        q, k, v, out, lse, S, k.shape[1], hq // len(k), D**-0.5 if scale is None else scale,
        D=D, BM=bm, BN=bn, CAUSAL=causal, FAULT=fault,
    )  # fmt: skip
    return out, lse


@flash_forward.mistake(
    says="the accumulator was not rescaled when the maximum changed",
    tries="acc * tl.exp(m − new)[:, None] before tl.dot(p, v) is added.",
    caught_by="whole",
)
def acc_not_rescaled(q: Any, k: Any, v: Any, causal: bool, block_m: int, block_n: int) -> Any:
    return launched(q, k, v, causal, block_m, block_n, "acc_kept")


@flash_forward.mistake(
    says="the sum l was not rescaled when the maximum changed",
    tries="l * tl.exp(m − new) before the block's sum is added.",
    caught_by="whole",
)
def l_not_rescaled(q: Any, k: Any, v: Any, causal: bool, block_m: int, block_n: int) -> Any:
    return launched(q, k, v, causal, block_m, block_n, "l_kept")


@flash_forward.mistake(
    says="the scores are not scaled by 1/√D",
    tries="tl.dot(q, k) * scale, with scale = D ** -0.5 from the wrapper.",
    caught_by="whole",
)
def unscaled(q: Any, k: Any, v: Any, causal: bool, block_m: int, block_n: int) -> Any:
    return launched(q, k, v, causal, block_m, block_n, "unscaled")


@flash_forward.mistake(
    says="the scale is applied twice, so that scores are divided by D",
    tries="the scale once: on q, or on the scores.",
    caught_by="whole",
)
def scaled_twice(q: Any, k: Any, v: Any, causal: bool, block_m: int, block_n: int) -> Any:
    return launched(q, k, v, causal, block_m, block_n, scale=1 / q.shape[2])


@flash_forward.mistake(
    says="tl.exp2 is used on scores that were not multiplied by log2(e)",
    tries="scale · 1.4427 for exp2, and lse = (m + log2 l) · 0.6931; or tl.exp and tl.log.",
    caught_by="whole",
)
def exp2_of_plain_scores(q: Any, k: Any, v: Any, causal: bool, block_m: int, block_n: int) -> Any:
    out, lse = launched(q, k, v, causal, block_m, block_n, "base_two_scores")
    return out, lse * 1.4426950408889634


@flash_forward.mistake(
    says="lse is a logarithm to base 2",
    tries="lse · ln 2 ≈ 0.6931 at the end.",
    caught_by="whole",
)
def lse_in_base_two(q: Any, k: Any, v: Any, causal: bool, block_m: int, block_n: int) -> Any:
    return launched(q, k, v, causal, block_m, block_n, "lse_base_two")


@flash_forward.mistake(
    says="lse is log l alone, relative to a maximum that nobody knows later",
    tries="m + tl.log(l).",
    caught_by="whole",
)
def lse_without_m(q: Any, k: Any, v: Any, causal: bool, block_m: int, block_n: int) -> Any:
    return launched(q, k, v, causal, block_m, block_n, "lse_without_m")


@flash_forward.mistake(
    says="the output is not divided by l",
    tries="acc / l[:, None] behind the loop.",
    caught_by="whole",
)
def undivided(q: Any, k: Any, v: Any, causal: bool, block_m: int, block_n: int) -> Any:
    return launched(q, k, v, causal, block_m, block_n, "undivided")


@flash_forward.mistake(
    says="queries past S are loaded without a mask",
    tries="mask=i[:, None] < S, other=0.0 in the load of q.",
    caught_by="odd",
)
def rows_unmasked(q: Any, k: Any, v: Any, causal: bool, block_m: int, block_n: int) -> Any:
    return launched(q, k, v, causal, block_m, block_n, "rows_unmasked")


@flash_forward.mistake(
    says="queries past S are stored: the last tile writes into the next head, or past the end",
    tries="mask=i[:, None] < S in tl.store.",
    caught_by="odd",
)
def store_unmasked(q: Any, k: Any, v: Any, causal: bool, block_m: int, block_n: int) -> Any:
    return launched(q, k, v, causal, block_m, block_n, "store_unmasked")


@flash_forward.mistake(
    says="keys past T are loaded without a mask",
    tries="mask=j < T, other=0.0 in the loads of k and v.",
    caught_by="odd",
)
def keys_unmasked(q: Any, k: Any, v: Any, causal: bool, block_m: int, block_n: int) -> Any:
    return launched(q, k, v, causal, block_m, block_n, "keys_unmasked")


@flash_forward.mistake(
    says="keys past T count: they were loaded as 0, and exp(0 − m) is no 0",
    tries="tl.where(j < T, s, −inf) on the scores: a mask on the load is not enough.",
    caught_by="odd",
)
def zeros_outside(q: Any, k: Any, v: Any, causal: bool, block_m: int, block_n: int) -> Any:
    return launched(q, k, v, causal, block_m, block_n, "zeros_outside")


@flash_forward.mistake(
    says="only the last block is masked, and the diagonal of a tile that is higher crosses several",
    tries="the comparison j <= i + T − S in every block that the diagonal may cross.",
    caught_by="causal",
)
def last_block_only(q: Any, k: Any, v: Any, causal: bool, block_m: int, block_n: int) -> Any:
    return launched(q, k, v, causal, block_m, block_n, "last_only")


@flash_forward.mistake(
    says="the loop ends at the tile's first query: one block too many is skipped",
    tries="the tile's last query, (tile + 1) · BM − 1, which sees the most keys.",
    caught_by="causal",
)
def one_block_too_few(q: Any, k: Any, v: Any, causal: bool, block_m: int, block_n: int) -> Any:
    return launched(q, k, v, causal, block_m, block_n, "one_too_few")


@flash_forward.mistake(
    says="a query does not see its own key",
    tries="j <= i + T − S: the key at the query's own position is visible.",
    caught_by="causal",
)
def strictly_before(q: Any, k: Any, v: Any, causal: bool, block_m: int, block_n: int) -> Any:
    return launched(q, k, v, causal, block_m, block_n, "strict")


@flash_forward.mistake(
    says="query i is taken to see keys 0 … i, though T − S keys lie in front of the first query's own",
    tries="j <= i + T − S.",
    caught_by="cached",
)
def top_left(q: Any, k: Any, v: Any, causal: bool, block_m: int, block_n: int) -> Any:
    return launched(q, k, v, causal, block_m, block_n, "top_left")


@flash_forward.mistake(
    says="query heads are dealt out to key/value heads in turn: h % Hkv",
    tries="h // (Hq // Hkv): neighbours share.",
    caught_by="heads",
)
def heads_in_turn(q: Any, k: Any, v: Any, causal: bool, block_m: int, block_n: int) -> Any:
    return launched(q, k, v, causal, block_m, block_n, "heads")


@flash_forward.mistake(
    says="the maximum begins at 0: where all scores are far below it, everything underflows",
    tries='tl.full((BM,), -float("inf"), tl.float32).',
    caught_by="extreme",
)
def begins_at_zero(q: Any, k: Any, v: Any, causal: bool, block_m: int, block_n: int) -> Any:
    return launched(q, k, v, causal, block_m, block_n, "zero_m")


@flash_forward.mistake(
    says="the accumulator is float16, which ends at 65,504",
    tries="tl.zeros((BM, D), tl.float32).",
    caught_by="formats",
)
def narrow_accumulator(q: Any, k: Any, v: Any, causal: bool, block_m: int, block_n: int) -> Any:
    return launched(q, k, v, causal, block_m, block_n, "narrow")


@flash_forward.mistake(
    says="the output is float32, whatever came in",
    tries="torch.empty_like(q).",
    caught_by="formats",
)
def widened(q: Any, k: Any, v: Any, causal: bool, block_m: int, block_n: int) -> Any:
    import torch

    return launched(q, k, v, causal, block_m, block_n, dtype=torch.float32)


@flash_forward.mistake(
    says="causal blocks are masked and not skipped: half of what is read is thrown away",
    tries="a loop that ends behind the last key that the tile's last query sees.",
    caught_by="traffic",
)
def nothing_skipped(q: Any, k: Any, v: Any, causal: bool, block_m: int, block_n: int) -> Any:
    return launched(q, k, v, causal, block_m, block_n, "all_blocks")


@flash_forward.mistake(
    says="torch computes it: the scores go to memory, and no kernel runs",
    tries="a kernel in which scores live from one tl.dot to the next.",
    caught_by="traffic",
)
def by_torch(q: Any, k: Any, v: Any, causal: bool, block_m: int, block_n: int) -> Any:
    import torch

    group = len(q) // len(k)
    k, v = k.repeat_interleave(group, 0).float(), v.repeat_interleave(group, 0).float()
    s = q.float() @ k.mT * q.shape[2] ** -0.5
    if causal:
        mask = torch.ones(s.shape[1:], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        s = s.masked_fill(~mask, -float("inf"))
    return (s.softmax(-1) @ v).to(q.dtype), s.logsumexp(-1)


# ── other right solutions ────────────────────────────────────────────────────────────────────────────


@flash_forward.alternative("one loop, a mask in every block")
def one_loop(q: Any, k: Any, v: Any, causal: bool, block_m: int, block_n: int) -> Any:
    return launched(q, k, v, causal, block_m, block_n)


@triton.jit
def two_loops_kernel(
    q, k, v, out, lse, S, T, group, scale_log2,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    head, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    i, d, n = tile * BM + tl.arange(0, BM), tl.arange(0, D), tl.arange(0, BN)
    qt = tl.load(q + (head * S + i)[:, None] * D + d, mask=(i < S)[:, None], other=0.0)
    k += (head // group) * T * D
    v += (head // group) * T * D
    m = tl.full((BM,), -float("inf"), tl.float32)
    total, acc = tl.zeros((BM,), tl.float32), tl.zeros((BM, D), tl.float32)
    end = tl.minimum(T, tl.minimum(tile * BM + BM, S) + T - S) if CAUSAL else T
    seen_by_all = (tl.minimum(T, tile * BM + T - S + 1) if CAUSAL else T) // BN * BN
    for start in range(0, seen_by_all, BN):
        kt = tl.load(k + (start + n)[:, None] * D + d)
        s = tl.dot(qt, tl.trans(kt), input_precision="ieee") * scale_log2
        new = tl.maximum(m, tl.max(s, axis=1))
        p, keep = tl.exp2(s - new[:, None]), tl.exp2(m - new)
        vt = tl.load(v + (start + n)[:, None] * D + d)
        total, m = total * keep + tl.sum(p, axis=1), new
        acc = tl.dot(p.to(vt.dtype), vt, acc * keep[:, None], input_precision="ieee")
    for start in range(seen_by_all, end, BN):
        j = start + n
        kt = tl.load(k + j[:, None] * D + d, mask=(j < end)[:, None], other=0.0)
        s = tl.dot(qt, tl.trans(kt), input_precision="ieee") * scale_log2
        s = tl.where(j[None, :] < end, s, -float("inf"))
        if CAUSAL:
            s = tl.where(j[None, :] <= i[:, None] + T - S, s, -float("inf"))
        new = tl.maximum(m, tl.max(s, axis=1))
        p, keep = tl.exp2(s - new[:, None]), tl.exp2(m - new)
        vt = tl.load(v + j[:, None] * D + d, mask=(j < end)[:, None], other=0.0)
        total, m = total * keep + tl.sum(p, axis=1), new
        acc = tl.dot(p.to(vt.dtype), vt, acc * keep[:, None], input_precision="ieee")
    o = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + (head * S + i)[:, None] * D + d, o, mask=(i < S)[:, None])
    tl.store(lse + head * S + i, (m + tl.log2(total)) * 0.6931471805599453, mask=i < S)


@flash_forward.alternative("whole blocks without a mask, then those at the edge; base 2; long tiles first")
def two_loops(q: Any, k: Any, v: Any, causal: bool, block_m: int, block_n: int) -> Any:
    import torch

    hq, S, D = q.shape
    out, lse = torch.empty_like(q), torch.empty(hq, S, dtype=torch.float32, device=q.device)
    two_loops_kernel[(hq, -(-S // block_m))](
        q, k, v, out, lse, S, k.shape[1], hq // len(k), D**-0.5 * 1.4426950408889634,
        D=D, BM=block_m, BN=block_n, CAUSAL=causal,
    )  # fmt: skip
    return out, lse
