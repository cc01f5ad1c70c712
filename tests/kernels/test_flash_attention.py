"""FlashAttention interpreted: values, gradients, masks, bytes, intermediates, torch.compile, refusals."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from against_float64 import error, refused, saved_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from llmcourse.errors import DeviceError, GraphError, ShapeError, UnknownNameError
from llmcourse.kernels import flash_attention as flash
from llmcourse.kernels import flash_backward, flash_cost, flash_forward, flash_hopper
from llmcourse.kernels import flash_plan as plans
from llmcourse.kernels.attention_naive import naive_attention, naive_bytes
from llmcourse.kernels.attention_reference import reference, reference_varlen, visible
from llmcourse.kernels.checks import DtypeError, StrideError
from llmcourse.kernels.counters import counting
from llmcourse.kernels.flash_attention import Sizes, attention, attention_varlen, bytes_moved, flops
from llmcourse.kernels.flash_plan import Plan, Tiles

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
RUNGS = ("pointer", "descriptor")


def small(rung: str = "pointer", heads: int = 2) -> Plan:
    """Tiles so small that little shapes have several, and three kernels with three different tiles."""
    sizes = ((16, 32), (32, 16), (32, 32))
    return Plan(*(Tiles(rung, m, n, 4, 1, heads) for m, n in sizes))


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(
    batch: int, heads: int, kv_heads: int, queries: int, keys: int, head_dim: int, dtype=torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    q = random(batch, heads, queries, head_dim, dtype=dtype)
    k, v = (random(batch, kv_heads, keys, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    return q, k, v


def with_gradients(function, tensors, *, of_lse: bool = True):
    """(o, lse, dq, dk, dv), for random gradients of o and of the log-sum-exp's finite parts."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    o, lse = function(*leaves)
    outs, grads = [o], [random(*o.shape, seed=3).to(o.dtype)]
    if of_lse:
        outs.append(lse)
        grads.append(random(*lse.shape, seed=4).to(lse.dtype))
    return o.detach(), lse.detach(), *torch.autograd.grad(outs, leaves, grads)


def close(ours, exact, tolerance: float) -> None:
    for name, a, b in zip(("o", "lse", "dq", "dk", "dv"), ours, exact, strict=True):
        assert a.shape == b.shape, name
        assert torch.equal(a.isinf(), b.isinf()), name
        finite = b.isfinite()
        small_enough = float((a[finite].double() - b[finite]).norm()) < 10 * tolerance
        assert error(a[finite], b[finite]) <= (2 if name[0] == "d" else 1) * tolerance or (
            small_enough and float(b[finite].norm()) < 1
        ), name


def compare(tensors, plan, tolerance, **options) -> None:
    ours = with_gradients(
        lambda *x: attention(*x, return_lse=True, plan=plan, interpret=True, **options), tensors
    )
    exact = with_gradients(lambda *x: reference(*x, **options), [t.double() for t in tensors])
    close(ours, exact, tolerance)


# values and gradients


@pytest.mark.parametrize("rung", RUNGS)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(data=st.data())
def test_whatever_the_shape_results_and_gradients_are_those_of_float64(rung, data):
    draw = data.draw
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2)]))
    queries, keys = draw(st.integers(1, 50)), draw(st.integers(1, 50))
    head_dim = draw(st.sampled_from([8, 16, 24, 40]))
    causal = draw(st.booleans())
    window = draw(st.sampled_from([0, 1, 7, 33, 1000])) if causal else 0
    tensors = inputs(1, kv_heads * group, kv_heads, queries, keys, head_dim, dtype)
    compare(tensors, small(rung), TOLERANCE[dtype], causal=causal, window=window)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 50), (33, 33), (64, 32), (5, 64)])
def test_lengths_at_the_edges_of_tiles(queries, keys):
    for causal, rung in itertools.product((False, True), RUNGS):
        compare(inputs(1, 2, 1, queries, keys, 16), small(rung), 2e-6, causal=causal, scale=0.4)


def test_the_reference_is_torchs_attention():
    q, k, v = (t.double() for t in inputs(2, 4, 2, 37, 37, 24))
    for causal in (False, True):
        theirs = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        torch.testing.assert_close(reference(q, k, v, causal=causal)[0], theirs, atol=1e-12, rtol=1e-12)
    mask = visible(20, 37, causal=True, window=9)
    theirs = scaled_dot_product_attention(q[:, :, :20], k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(reference(q[:, :, :20], k, v, causal=True, window=9)[0], theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], ids=lambda b: b.name)
def test_the_error_is_no_larger_than_that_of_torchs_own_back_ends(dtype, backend):
    """Of o and of all gradients, against float64 on the same rounded inputs.

    5 % for the order of sums. MATH computes in float32 and rounds o alone; whoever multiplies the weights in
    16 bits, as tensor cores do, rounds once more: √2 at the most, where both roundings are as large.
    """
    slack = 1.05 if backend == SDPBackend.FLASH_ATTENTION else math.sqrt(2)
    tensors = inputs(1, 2, 2, 96, 96, 32, dtype)

    def theirs(q, k, v):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True), q.new_zeros(())

    exact = with_gradients(lambda *x: reference(*x, causal=True), [t.double() for t in tensors], of_lse=False)
    peer = with_gradients(theirs, tensors, of_lse=False)
    ours = with_gradients(
        lambda *x: attention(*x, causal=True, return_lse=True, plan=small(), interpret=True),
        tensors,
        of_lse=False,
    )
    for i, name in ((0, "o"), (2, "dq"), (3, "dk"), (4, "dv")):
        assert error(ours[i], exact[i]) <= slack * error(peer[i], exact[i]), name


@pytest.mark.parametrize("rung", RUNGS)
def test_queries_that_see_no_key_give_zeros_and_a_log_sum_exp_of_minus_infinity(rung):
    tensors = inputs(1, 2, 1, 50, 7, 16)
    o, lse, dq, dk, dv = with_gradients(
        lambda *x: attention(*x, causal=True, return_lse=True, plan=small(rung), interpret=True), tensors
    )
    assert o[:, :, :43].eq(0).all()
    assert lse[:, :, :43].eq(-math.inf).all()
    assert dq[:, :, :43].eq(0).all()
    assert all(t.isfinite().all() for t in (o, lse[:, :, 43:], dq, dk, dv))


def test_without_keys_everything_is_zero():
    q, k, v = inputs(2, 2, 1, 3, 0, 16)
    o, lse, dq, dk, _ = with_gradients(lambda *x: attention(*x, return_lse=True, interpret=True), (q, k, v))
    assert o.eq(0).all()
    assert lse.eq(-math.inf).all()
    assert dq.eq(0).all()
    assert dk.shape == (2, 1, 0, 16)
    assert attention(q[:, :, :0], k, v, interpret=True).shape == (2, 2, 0, 16)


def test_large_scores_do_not_overflow():
    q, k, v = inputs(1, 1, 1, 40, 40, 16)
    compare((60 * q, 60 * k, v), small(), 2e-5, causal=True)


def test_two_halves_merge_by_their_log_sum_exps():
    """What flash decoding and ring attention do: the log-sum-exp says how much each half weighs."""
    q, k, v = inputs(1, 2, 2, 20, 64, 16)
    halves = [
        attention(q, k[:, :, part], v[:, :, part], return_lse=True, plan=small(), interpret=True)
        for part in (slice(0, 40), slice(40, 64))
    ]
    outs, lses = (torch.stack(parts) for parts in zip(*halves, strict=True))
    merged = (outs * lses.softmax(0).unsqueeze(-1)).sum(0)
    torch.testing.assert_close(merged, reference(q, k, v)[0], atol=1e-6, rtol=1e-5)


def test_head_dim_256_forward():
    tensors = inputs(1, 1, 1, 20, 33, 256)
    o = attention(*tensors, causal=True, plan=small(), interpret=True)
    assert error(o, reference(*(t.double() for t in tensors), causal=True)[0]) < 2e-6


# what must be equal


def test_the_descriptor_rung_gives_the_very_numbers_of_the_pointer_rung():
    """With a key/value head for each query head: else dK and dV are summed over heads in another order."""
    for causal, window in ((False, 0), (True, 0), (True, 20)):
        one, other = (
            with_gradients(
                lambda *x, rung=rung, causal=causal, window=window: attention(
                    *x, causal=causal, window=window, return_lse=True, plan=small(rung), interpret=True
                ),
                inputs(1, 2, 2, 45, 61, 24, torch.bfloat16),
            )
            for rung in RUNGS
        )
        assert all(a.equal(b) for a, b in zip(one, other, strict=True))


def test_the_order_of_programs_does_not_change_the_result():
    tensors = inputs(2, 3, 3, 50, 50, 16)
    results = [
        with_gradients(
            lambda *x, heads=heads: attention(
                *x, causal=True, return_lse=True, plan=small(heads=heads), interpret=True
            ),
            tensors,
        )
        for heads in (1, 4, 100)
    ]
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


def test_grouped_heads_equal_repeated_heads():
    q, k, v = inputs(1, 6, 2, 33, 40, 16)
    call = {"causal": True, "return_lse": True, "plan": small(), "interpret": True}
    o, lse, dq, dk, dv = with_gradients(lambda *x: attention(*x, **call), (q, k, v))
    wide = with_gradients(
        lambda *x: attention(*x, **call), (q, *(t.repeat_interleave(3, dim=1) for t in (k, v)))
    )
    assert o.equal(wide[0])
    assert lse.equal(wide[1])
    assert dq.equal(wide[2])
    for ours, theirs in ((dk, wide[3]), (dv, wide[4])):
        torch.testing.assert_close(ours, theirs.view(1, 2, 3, 40, 16).sum(2), atol=2e-6, rtol=1e-5)


def test_a_window_that_holds_everything_is_no_window_and_one_of_1_sees_itself():
    q, k, v = inputs(1, 2, 2, 40, 40, 16)
    call = {"causal": True, "plan": small(), "interpret": True}
    plain = attention(q, k, v, **call)
    assert attention(q, k, v, window=40, **call).equal(plain)
    assert attention(q, k, v, window=None, **call).equal(plain)
    assert attention(q, k, v, window=0, **call).equal(plain)
    assert not attention(q, k, v, window=39, **call).equal(plain)
    torch.testing.assert_close(attention(q, k, v, window=1, **call), v)


LENGTHS = ([0, 17, 1, 40, 0, 5], [3, 17, 50, 33, 0, 0])


def packed(dtype: torch.dtype = torch.float32):
    """Sequences of unequal lengths, some empty, some with more queries than keys."""
    ends = [torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in LENGTHS]
    q = random(sum(LENGTHS[0]), 4, 16, dtype=dtype)
    k, v = (random(sum(LENGTHS[1]), 2, 16, dtype=dtype, seed=seed) for seed in (1, 2))
    return (q, k, v), ends


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 9}], ids=str)
def test_packed_sequences_equal_each_sequence_alone(options):
    tensors, (cu_q, cu_k) = packed()
    call = {**options, "return_lse": True, "plan": small(), "interpret": True}
    ours = with_gradients(lambda *x: attention_varlen(*x, cu_q, cu_k, **call), tensors)

    def one_by_one(q, k, v):
        outs, lses = [], []
        for i in range(len(cu_q) - 1):
            (q0, q1), (k0, k1) = cu_q[i : i + 2].tolist(), cu_k[i : i + 2].tolist()
            alone = (x.transpose(0, 1)[None] for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
            o, lse = attention(*alone, **call)
            outs.append(o[0].transpose(0, 1))
            lses.append(lse[0])
        return torch.cat(outs), torch.cat(lses, 1)

    alone = with_gradients(one_by_one, tensors)
    assert all(a.equal(b) for a, b in zip(ours, alone, strict=True))
    exact = with_gradients(
        lambda *x: reference_varlen(*x, cu_q, cu_k, **options), [t.double() for t in tensors]
    )
    close(ours, exact, 2e-6)


def test_packed_sequences_need_only_be_said_not_to_be_longer_than():
    tensors, (cu_q, cu_k) = packed()
    call = {"causal": True, "interpret": True, "plan": small()}
    exact = attention_varlen(*tensors, cu_q, cu_k, **call)
    assert attention_varlen(*tensors, cu_q, cu_k, max_seqlen_q=99, max_seqlen_k=99, **call).equal(exact)
    q = tensors[0]
    itself = attention_varlen(q, q, q, cu_q, **call)  # without cu_seqlens_k: q's
    assert itself.equal(attention_varlen(q, q, q, cu_q, cu_q, **call))


# memory


@pytest.mark.parametrize("rung", RUNGS)
def test_nothing_outside_the_tensors_is_read(rung):
    """Tensors in a sea of NaN: one number beyond a row, a head or the last key and the result is NaN."""
    tensors = []
    for t in inputs(2, 4, 2, 37, 53, 24):
        batch, heads, rows, head_dim = t.shape
        sea = torch.full((batch, heads + 2, rows + 40, head_dim + 8), math.nan)
        within = sea[:, 1:-1, 20:-20, 4:-4]
        within.copy_(t)
        tensors.append(within)
    with counting(bounds="storage"):  # so that it is the NaNs that tell
        ours = with_gradients(
            lambda *x: attention(*x, causal=True, return_lse=True, plan=small(rung)), tensors
        )
    exact = with_gradients(lambda *x: reference(*x, causal=True), [t.double() for t in tensors])
    close(ours, exact, 2e-6)


def test_packed_sequences_do_not_read_each_other():
    tensors, (cu_q, cu_k) = packed()
    third = slice(int(cu_k[3]), int(cu_k[4]))
    with_nan = [t.clone() for t in tensors]
    for t in with_nan[1:]:
        t[third] = math.nan
    call = {"causal": True, "plan": small(), "interpret": True}
    clean, spoilt = (attention_varlen(*x, cu_q, cu_k, **call) for x in (tensors, with_nan))
    rows = torch.arange(len(clean))
    others = (rows < cu_q[3]) | (rows >= cu_q[4])
    assert spoilt[others].equal(clean[others])


def test_a_packed_sequence_of_tiny_weights_does_not_overflow_its_neighbour():
    """Rows beyond a sequence's end are multiplied by zeros; their statistics must not be the next one's."""
    q, k = torch.ones(10, 1, 16), torch.ones(10, 1, 16)
    q[5:], k[5:] = 10.0, -10.0  # scores of −400: 2^(0 − lse) is infinite
    cu = torch.tensor([0, 5, 10], dtype=torch.int32)
    call = {"return_lse": True, "plan": small(), "interpret": True}
    ours = with_gradients(lambda *x: attention_varlen(*x, cu, **call), (q, k, k))
    exact = with_gradients(lambda *x: reference_varlen(*x, cu, cu), [t.double() for t in (q, k, k)])
    close(ours, exact, 5e-5)  # float32 has 3e-5 between neighbours at 400


@pytest.mark.parametrize("rung", RUNGS)
def test_heads_after_tokens_and_slices_of_one_projection_are_read_where_they_are(rung):
    qkv = random(2, 40, 3, 4, 16)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    o = attention(q, k, v, causal=True, plan=small(rung), interpret=True)
    assert error(o, reference(q.double(), k.double(), v.double(), causal=True)[0]) < 2e-6
    assert o.transpose(1, 2).is_contiguous()  # so that joining the heads copies nothing
    assert qkv.transpose(2, 3)[..., 0, :].stride(-1) == 1
    compare((q, k, v), small(rung), 2e-6, causal=True)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize(
    ("shape", "causal", "window"),
    [
        ((1, 2, 1, 33, 33, 16), True, 0),
        ((2, 2, 2, 7, 50, 24), False, 0),
        ((1, 3, 1, 70, 5, 40), True, 0),
        ((1, 2, 2, 65, 80, 32), True, 9),
        ((1, 2, 2, 30, 8, 32), True, 3),
    ],
)
def test_the_bytes_are_those_of_the_formula(rung, shape, causal, window):
    q, k, v = (t.requires_grad_() for t in inputs(*shape, torch.bfloat16))
    plan, sizes = small(rung), Sizes.of(q, k, causal=causal, window=window)
    with counting() as c:
        o = attention(q, k, v, causal=causal, window=window, plan=plan)
    assert (c.load_bytes, c.store_bytes) == bytes_moved(sizes, plan)
    with counting() as c:
        torch.autograd.grad(o, (q, k, v), torch.randn_like(o))
    assert (c.load_bytes, c.store_bytes) == bytes_moved(sizes, plan, backward=True)
    assert c.atomic_bytes == 0


def test_whole_tiles_compute_the_flops_of_the_formula_and_backward_two_products_more():
    q, k, v = (t.requires_grad_() for t in inputs(1, 2, 1, 64, 96, 16))
    with counting() as c:
        o = attention(q, k, v, plan=small())
    assert c.dot_flops == flops(1, 2, 64, 96, 16)
    with counting() as c:
        torch.autograd.grad(o.sum(), (q, k, v))
    assert c.dot_flops == flops(1, 2, 64, 96, 16, backward=True) * 7 // 5


def test_hidden_tiles_are_not_computed():
    q, k, v = inputs(1, 1, 1, 128, 128, 16)
    plan = small()._replace(forward=Tiles("pointer", 16, 16, 4, 1))
    with counting() as c:
        attention(q, k, v, causal=True, plan=plan)
    assert c.dot_flops == 4 * 16 * (8 * 9 // 2) * 16 * 16  # the tiles on and below the diagonal, of 8 × 8
    with counting() as c:
        attention(q, k, v, causal=True, window=16, plan=plan)
    assert c.dot_flops == 4 * 16 * 15 * 16 * 16  # those of the diagonal and the one below


def test_visible_pairs_are_those_of_the_mask():
    for queries, keys, window in itertools.product((1, 5, 40), (1, 5, 40), (0, 1, 4, 100)):
        mask = visible(queries, keys, causal=True, window=window)
        assert flash_cost.visible_pairs(queries, keys, causal=True, window=window) == int(mask.sum())


class Allocations(TorchDispatchMode):
    """The largest tensor that any torch operation returned, in bytes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and not isinstance(function, torch._ops.OpOverloadPacket):
                self.largest = max(self.largest, t.numel() * t.element_size())
        return out


def test_no_tensor_of_the_size_of_the_scores_is_ever_made():
    q, k, v = inputs(1, 2, 2, 256, 256, 8, torch.bfloat16)
    scores = 2 * 256 * 256 * 2
    plan = Plan(*[Tiles("pointer", 64, 64, 4, 1)] * 3)
    options = {"causal": True, "scale": 0.3, "window": 0, "interpret": True}
    with Allocations() as seen:
        o, lse = flash_forward.forward(q, k, v, tiles=plan.forward, **options)
    assert seen.largest == max(o.nbytes, lse.nbytes) < scores / 30
    with Allocations() as seen:
        flash_backward.backward(torch.ones_like(o), q, k, v, o, lse, None, plan=plan, **options)
    workspace = flash_cost.workspace_bytes(Sizes.of(q, k), plan)
    assert seen.largest == max(o.nbytes, workspace) < scores / 30
    with Allocations() as seen:
        reference(q, k, v, causal=True)
    assert seen.largest >= scores


def test_backward_keeps_q_k_v_o_and_a_number_a_query():
    q, k, v = (t.requires_grad_() for t in inputs(1, 4, 2, 64, 64, 16, torch.bfloat16))
    kept = saved_bytes(lambda: attention(q, k, v, causal=True, plan=small(), interpret=True))
    assert kept == 2 * q.nbytes + k.nbytes + v.nbytes + 4 * 64 * 4


# the naive rung


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(1, 2, 1, 70, 70, 16), (2, 2, 2, 3, 130, 24), (1, 1, 1, 66, 5, 8)])
def test_the_naive_rung_is_right_and_moves_the_matrix_four_times(shape, causal):
    q, k, v = inputs(*shape)
    batch, heads, _, queries, keys, head_dim = shape
    with counting() as c:
        o = naive_attention(q, k, v, causal=causal)
    assert error(o, reference(q.double(), k.double(), v.double(), causal=causal)[0]) < 2e-6
    loaded, stored = naive_bytes(batch, heads, queries, keys, head_dim, 4)
    assert (c.load_bytes, c.store_bytes) == (loaded, stored)
    matrix = batch * heads * queries * keys * 4
    assert c.kernels["softmax_kernel"].bytes == 2 * matrix
    assert c.kernels["scores_kernel"].store_bytes == matrix
    assert [launch.kernel for launch in c] == ["scores_kernel", "softmax_kernel", "values_kernel"]


def test_the_naive_rung_says_that_it_has_no_gradient():
    q, k, v = inputs(1, 1, 1, 8, 8, 16)
    q.requires_grad_()
    refused(lambda: naive_attention(q, k, v, interpret=True), GraphError, "backward", "no_grad")
    assert naive_attention(q, k, v).requires_grad  # the reference has one


@pytest.mark.parametrize(("causal", "ratio"), [(False, 6.8), (True, 12.8)])
def test_at_4096_tokens_the_naive_rung_moves_many_times_the_bytes(causal, ratio):
    plan = plans.plan_for(64, torch.bfloat16, 90, causal=causal)
    sizes = Sizes(1, 1, 1, 4096, 4096, 64, causal=causal)
    found = sum(naive_bytes(1, 1, 4096, 4096, 64, 2)) / sum(bytes_moved(sizes, plan))
    assert found == pytest.approx(ratio, abs=0.05) or plan.forward[1:3] != (128, 64)


# autograd and torch.compile


def test_gradients_of_a_sum_of_the_log_sum_exp_alone_and_of_some_inputs():
    tensors = inputs(1, 2, 1, 20, 33, 16)
    call = {"causal": True, "return_lse": True, "plan": small(), "interpret": True}
    for pick in (
        lambda o, lse: o.sum(),
        lambda o, lse: lse.square().sum(),
        lambda o, lse: o.sum() + lse.sum(),
    ):
        leaves = [t.detach().requires_grad_() for t in tensors]
        wide = [t.detach().double().requires_grad_() for t in tensors]
        ours = torch.autograd.grad(pick(*attention(*leaves, **call)), leaves)
        unused = {"allow_unused": True, "materialize_grads": True}  # v, of the log-sum-exp
        exact = torch.autograd.grad(pick(*reference(*wide, causal=True)), wide, **unused)
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=1e-4)
    q, k, v = (t.detach() for t in tensors)
    k.requires_grad_()
    attention(q, k, v, **call)[0].sum().backward()
    assert k.grad is not None


def test_backward_is_the_same_every_time():
    tensors = inputs(1, 4, 1, 40, 40, 16, torch.float16)
    call = {"causal": True, "return_lse": True, "plan": small(), "interpret": True}
    one, other = (with_gradients(lambda *x: attention(*x, **call), tensors) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(one, other, strict=True))


def test_torch_compile_takes_a_model_whole():
    q, k, v = (t.requires_grad_() for t in inputs(2, 2, 1, 9, 9, 16))
    weight = random(32, 8)

    def block(q, k, v):
        o = attention(q * 0.5, k, v, causal=True, window=5, plan=small(), interpret=True)
        return o.transpose(1, 2).reshape(2, 9, 32) @ weight

    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        out = function(q, k, v)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)


def test_torch_compile_takes_packed_sequences_whole():
    tensors, (cu_q, cu_k) = packed()

    def model(q, k, v):
        return attention_varlen(q, k, v, cu_q, cu_k, causal=True, plan=small(), interpret=True) + 1

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), model(*tensors))


def test_the_operator_keeps_pytorchs_rules():
    """Its schema, its shapes without data, its gradient and its way through compilation, checked by torch."""
    tensors = [t.requires_grad_() for t in inputs(1, 2, 1, 3, 5, 16)]
    torch.library.opcheck(flash.flash_attention, (*tensors, None, None, 0, 0, True, 0.25, 4, "", True))
    q = random(5, 2, 16).requires_grad_()
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    torch.library.opcheck(flash.flash_attention, (q, q, q, cu, cu, 3, 3, True, 0.25, 0, "", True))


def test_cpu_tensors_take_the_reference_unless_the_kernels_are_asked_for():
    tensors = inputs(1, 2, 1, 9, 20, 16)
    with counting() as c:
        pass
    o = attention(*tensors, causal=True)
    assert o.equal(reference(*tensors, causal=True)[0])
    with counting() as c:
        attention(*tensors, causal=True)
    assert [launch.kernel for launch in c] == ["forward_kernel"]


# plans


def test_a_plan_survives_its_text():
    for head_dim, causal in itertools.product((64, 128), (False, True)):
        own = plans.plan_for(head_dim, torch.bfloat16, 90, causal=causal)
        assert own.forward.rung == "descriptor"
        assert Plan.parse(str(own)) == own
        tried = plans.sweep(head_dim, causal=causal)
        assert len(tried) == len(set(tried)) > 50
        assert all(sum(a != b for a, b in zip(plan, own, strict=True)) <= 1 for plan in tried)
        assert {plan.forward.rung for plan in tried} == {"descriptor", "pointer"}


@pytest.mark.parametrize(
    ("capability", "dtype", "descriptors", "rung"),
    [
        (75, torch.float16, False, "pointer"),
        (80, torch.bfloat16, False, "pointer"),
        (89, torch.bfloat16, True, "pointer"),
        (90, torch.bfloat16, True, "descriptor"),
        (90, torch.bfloat16, False, "pointer"),
        (90, torch.float32, True, "pointer"),
        (100, torch.float16, True, "descriptor"),
    ],
)
def test_every_device_has_a_plan(capability, dtype, descriptors, rung):
    for head_dim, window in itertools.product((8, 32, 64, 80, 96, 128, 256), (0, 100)):
        plan = plans.plan_for(
            head_dim, dtype, capability, causal=True, window=window, descriptors=descriptors
        )
        assert {tiles.rung for tiles in plan} == {rung}


@pytest.mark.parametrize(("head_dim", "causal"), plans.HOPPER)
def test_the_hand_written_rung_is_taken_where_it_was_measured_to_be_faster(head_dim, causal):
    by_hand = plans.HOPPER[head_dim, causal]
    choose = {"dtype": torch.bfloat16, "capability": 90, "causal": causal}
    long = plans.plan_for(head_dim, **choose, hopper=True, queries=by_hand.queries)
    assert str(long.forward) == by_hand.tiles
    assert {long.dkdv.rung, long.dq.rung} == {"descriptor"}
    assert Plan.parse(str(long)) == long
    short = plans.plan_for(head_dim, **choose, hopper=True, queries=by_hand.queries - 1)
    assert short.forward.rung == "descriptor"
    assert plans.plan_for(head_dim, **choose, hopper=False) == short
    schedule = flash_hopper.SCHEDULES[head_dim, causal]
    assert flash_hopper.scheduled(long.forward, head_dim, causal) == schedule


def test_a_t4_has_no_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    tensors = inputs(1, 1, 1, 8, 8, 16, torch.bfloat16)
    options = {"causal": True, "window": 0, "packed": False, "interpret": False}
    refused(lambda: flash.chosen_plan("", *tensors, **options), DeviceError, "7.5", "q.half()")
    assert flash.chosen_plan("", *(t.half() for t in tensors), **options).forward.rung == "pointer"


# refusals


def call(q_shape=(1, 4, 8, 16), k_shape=(1, 2, 8, 16), v_shape=None, dtype=torch.float32, **options):
    q, k = torch.zeros(q_shape, dtype=dtype), torch.zeros(k_shape, dtype=dtype)
    v = torch.zeros(v_shape or k_shape, dtype=dtype)
    return attention(q, k, v, **options)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"q_shape": (4, 8, 16)}, ShapeError, ("[batch, heads, tokens, head_dim]", "transpose")),
        ({"v_shape": (1, 2, 9, 16)}, ShapeError, ("(1, 2, 9, 16)", "one value")),
        ({"k_shape": (2, 2, 8, 16)}, ShapeError, ("batch",)),
        ({"k_shape": (1, 2, 8, 24)}, ShapeError, ("head dim",)),
        ({"k_shape": (1, 3, 8, 16)}, ShapeError, ("4 query heads cannot share 3", "2 key/value heads")),
        ({"k_shape": (1, 0, 8, 16)}, ShapeError, ("cannot share 0",)),
        ({"q_shape": (1, 4, 8, 20), "k_shape": (1, 2, 8, 20)}, ShapeError, ("head dim is 20", "zeros to 24")),
        ({"q_shape": (1, 4, 8, 264), "k_shape": (1, 2, 8, 264)}, ShapeError, ("256",)),
        ({"dtype": torch.float64}, DtypeError, ("float64",)),
        ({"scale": 0.0}, ShapeError, ("scale is 0.0",)),
        ({"scale": -1.0}, ShapeError, ("positive",)),
        ({"scale": math.nan}, ShapeError, ("scale is nan",)),
        ({"window": 4}, ShapeError, ("without causal", "causal=True")),
        ({"window": -1, "causal": True}, ShapeError, ("window is -1",)),
        ({"plan": "fast", "interpret": True}, UnknownNameError, ("1 part", "forward, dkdv and dq")),
        ({"plan": "pointer 128x48 w4 s3 h1 |" * 2, "interpret": True}, UnknownNameError, ("powers of two",)),
        (
            {"plan": "pointer 16x16 w4 s1 h1 |" + "hopper 128x128 w12 s2 h1 |" * 2, "interpret": True},
            UnknownNameError,
            ("forward only",),
        ),
    ],
    ids=str,
)
def test_what_cannot_be_attended_to_is_refused_in_three_parts(options, kind, words):
    if "plan" in options:
        options = {**options, "plan": options["plan"].strip(" |")}
        if options["plan"].count("|") == 1:
            options["plan"] += " | pointer 16x16 w4 s1 h1"
    refused(lambda: call(**options), kind, *words)


def test_mixed_formats_and_scattered_heads_are_refused():
    q, k, v = inputs(1, 2, 2, 8, 8, 16)
    refused(lambda: attention(q, k.half(), v), DtypeError, "k is float16", "k.float()")
    refused(lambda: attention(q[..., ::2], k[..., ::2], v[..., ::2]), StrideError, "q.contiguous()")
    refused(lambda: attention(q, k.to("meta"), v), DeviceError, "k is on meta")
    refused(lambda: attention(q.tolist(), k, v), DtypeError, "list")


def test_a_gradient_that_the_kernels_cannot_give_is_refused_before_the_forward_pass():
    q, k, v = inputs(1, 1, 1, 8, 8, 256)
    q.requires_grad_()
    refused(lambda: attention(q, k, v, interpret=True), ShapeError, "128", "no_grad")
    with torch.no_grad():
        assert attention(q, k, v, interpret=True, plan=small()).shape == q.shape


def test_a_descriptor_plan_says_what_the_copy_engine_cannot_read():
    q, k, v = inputs(1, 2, 2, 8, 8, 16, torch.float16)
    shifted = torch.zeros(1, 2, 8, 20, dtype=torch.float16)[..., :16]
    refused(lambda: attention(shifted, k, v, plan=small("descriptor"), interpret=True), StrideError, "2-byte")
    refused(
        lambda: attention(q, k[:, :1].expand(1, 2, 8, 16), v, plan=small("descriptor"), interpret=True),
        StrideError,
        "strides",
    )
    (q, k, v), (cu_q, cu_k) = packed()
    refused(
        lambda: attention_varlen(q, k, v, cu_q, cu_k, plan=small("descriptor"), interpret=True),
        StrideError,
        "packed",
    )


@pytest.mark.parametrize(
    ("numbers", "kind", "words"),
    [
        ([0, 5, 3, 8], ShapeError, ("falls from 5 to 3", "rise from 0 to 8")),
        ([1, 5, 8], ShapeError, ("starts with 1",)),
        ([0, 5, 7], ShapeError, ("ends with 7", "8 rows")),
        ([0, 5, 9], ShapeError, ("ends with 9",)),
        ([], ShapeError, ("N + 1",)),
        ([[0, 8]], ShapeError, ("(1, 2)",)),
    ],
    ids=str,
)
def test_wrong_starts_of_sequences_are_refused_in_three_parts(numbers, kind, words):
    x = torch.zeros(8, 2, 16)
    cu = torch.tensor(numbers, dtype=torch.int32)
    refused(lambda: attention_varlen(x, x, x, cu), kind, "cu_seqlens_q", *words)


def test_other_wrong_arguments_of_packed_sequences_are_refused():
    x = torch.zeros(8, 2, 16)
    cu = torch.tensor([0, 3, 8], dtype=torch.int32)
    refused(lambda: attention_varlen(x, x, x, cu.long()), DtypeError, "int64", ".int()")
    refused(lambda: attention_varlen(x, x, x, cu, cu[[0, 2]]), ShapeError, "2 sequences", "for 1")
    refused(lambda: attention_varlen(x, x, x, cu, max_seqlen_q=4), ShapeError, "has 5 rows", "4 are said")
    refused(lambda: attention_varlen(x[None], x[None], x[None], cu), ShapeError, "flatten(0, 1)")
    refused(lambda: attention_varlen(x, x, x, cu.to("meta")), DeviceError, "meta")
