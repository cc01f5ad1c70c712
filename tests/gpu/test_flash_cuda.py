"""FlashAttention on a GPU at real sizes: against float64 and torch's back-ends, in graphs, compiled."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from llmcourse.errors import CourseError
from llmcourse.kernels import flash_plan as plans
from llmcourse.kernels.attention_naive import naive_attention
from llmcourse.kernels.attention_reference import reference, reference_varlen
from llmcourse.kernels.flash_attention import attention, attention_varlen
from llmcourse.kernels.flash_plan import Plan, Tiles

CAPABILITY = torch.cuda.get_device_capability()[0] * 10 + torch.cuda.get_device_capability()[1]
DTYPES = [torch.float16] + [torch.bfloat16] * (CAPABILITY >= 80)
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
HOPPER = pytest.mark.skipif(CAPABILITY < 90, reason="needs TMA (sm_90)")
RUNGS = ["pointer"] + ["descriptor"] * (CAPABILITY >= 90)


def error(out, exact):
    """‖out − exact‖ / ‖exact‖, infinite where one has a NaN or an infinity that the other lacks."""
    out, exact = out.double(), exact.double()
    if not torch.equal(out.isfinite(), exact.isfinite()):
        return math.inf
    keep = exact.isfinite()
    return float((out[keep] - exact[keep]).norm() / exact[keep].norm().clamp(min=1e-30))


def inputs(batch, heads, kv_heads, queries, keys, head_dim, dtype=torch.bfloat16, *, heads_last=False):
    """q, k, v; with heads_last as a projection leaves them: [B, S, H, D] seen as [B, H, S, D]."""

    def one(heads, rows):
        if heads_last:
            x = torch.randn(batch, rows, heads, head_dim, device="cuda", dtype=dtype)
            return x.transpose(1, 2)
        return torch.randn(batch, heads, rows, head_dim, device="cuda", dtype=dtype)

    return one(heads, queries), one(kv_heads, keys), one(kv_heads, keys)


def plan_of(rung, head_dim, dtype, *, causal, window=0):
    return plans.plan_for(
        head_dim, dtype, CAPABILITY, causal=causal, window=window, descriptors=rung == "descriptor"
    )


def results(function, tensors, seed=0):
    """[o, lse, dq, dk, dv] for random gradients of o and of the log-sum-exp."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    o, lse = function(*leaves)
    generator = torch.Generator("cuda").manual_seed(seed)
    do = torch.randn(o.shape, generator=generator, device="cuda").to(o.dtype)
    dlse = torch.randn(lse.shape, generator=generator, device="cuda").to(lse.dtype)
    return [o.detach(), lse.detach(), *torch.autograd.grad((o, lse), leaves, (do, dlse))]


def compare(tensors, tolerance, plan=None, **options):
    ours = results(lambda *x: attention(*x, return_lse=True, plan=plan, **options), tensors)
    exact = results(lambda *x: reference(*x, **options), [t.double() for t in tensors])
    for name, a, b in zip(("o", "lse", "dq", "dk", "dv"), ours, exact, strict=True):
        assert a.isnan().sum() == 0, name
        small = float(b[b.isfinite()].norm()) < 1e-3 * math.sqrt(b.numel())  # zero but for rounding
        assert small or error(a, b) <= (2 if name[0] == "d" else 1) * tolerance, name


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whatever_the_shape_results_and_gradients_are_those_of_float64(dtype, rung):
    rng = random.Random(5)
    for _ in range(25):
        kv_heads, group = rng.choice([(1, 1), (2, 1), (1, 4), (2, 3)])
        queries, keys = (rng.choice([1, 2, 17, 64, 127, 128, 129, 200, 513]) for _ in range(2))
        head_dim = rng.choice([32, 40, 64, 80, 96, 128])
        causal = rng.random() < 0.7
        window = rng.choice([0, 0, 1, 60, 300]) if causal else 0
        tensors = inputs(
            2, kv_heads * group, kv_heads, queries, keys, head_dim, dtype, heads_last=rng.random() < 0.5
        )
        plan = plan_of(rung, head_dim, dtype, causal=causal, window=window)
        compare(tensors, TOLERANCE[dtype], plan, causal=causal, window=window)


def test_float32_is_computed_in_float32():
    for head_dim, causal in itertools.product((64, 128), (False, True)):
        compare(inputs(1, 2, 1, 150, 150, head_dim, torch.float32), TOLERANCE[torch.float32], causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dim_256_forward(dtype):
    for causal in (False, True):
        tensors = inputs(1, 4, 2, 700, 700, 256, dtype)
        o = attention(*tensors, causal=causal)
        assert error(o, reference(*(t.double() for t in tensors), causal=causal)[0]) < TOLERANCE[dtype]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_error_is_no_larger_than_that_of_torchs_fast_back_ends(dtype, causal, head_dim):
    """At 2048 tokens, of o and all gradients, 5 % for the order of sums; the back-ends that are there."""
    tensors = inputs(1, 4, 4, 2048, 2048, head_dim, dtype)

    def gradients(function, tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        o = function(*leaves)
        do = torch.randn(o.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
        return [o.detach(), *torch.autograd.grad(o, leaves, do.to(o.dtype))]

    exact = gradients(lambda *x: reference(*x, causal=causal)[0], [t.double() for t in tensors])
    ours = gradients(lambda *x: attention(*x, causal=causal), tensors)
    tried = 0
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            with sdpa_kernel(backend):
                peer = gradients(lambda *x: scaled_dot_product_attention(*x, is_causal=causal), tensors)
        except RuntimeError:  # not on this GPU
            continue
        tried += 1
        for name, a, b, e in zip(("o", "dq", "dk", "dv"), ours, peer, exact, strict=True):
            assert error(a, e) <= 1.05 * error(b, e), f"{name} against {backend.name}"
    assert tried


@pytest.mark.parametrize("rung", RUNGS)
def test_nothing_outside_the_tensors_is_read(rung):
    dtype = DTYPES[-1]
    tensors = []
    for t in inputs(2, 4, 2, 333, 451, 64, dtype):
        batch, heads, rows, head_dim = t.shape
        sea = torch.full((batch, heads + 2, rows + 256, head_dim + 16), math.nan, device="cuda", dtype=dtype)
        within = sea[:, 1:-1, 128:-128, 8:-8]
        within.copy_(t)
        tensors.append(within)
    for causal in (False, True):
        compare(tensors, TOLERANCE[dtype], plan_of(rung, 64, dtype, causal=causal), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_sequences_equal_those_of_float64_and_do_not_read_each_other(dtype):
    lengths_q, lengths_k = [0, 300, 1, 77, 0, 513], [5, 300, 700, 64, 0, 0]
    cu_q, cu_k = (
        torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32, device="cuda")
        for n in (lengths_q, lengths_k)
    )
    q = torch.randn(sum(lengths_q), 8, 64, device="cuda", dtype=dtype)
    k, v = torch.randn(2, sum(lengths_k), 2, 64, device="cuda", dtype=dtype)
    for options in ({}, {"causal": True}, {"causal": True, "window": 50}):
        call = {**options, "return_lse": True}
        ours = results(lambda *x, call=call: attention_varlen(*x, cu_q, cu_k, **call), (q, k, v))
        known = {**call, "max_seqlen_q": 513, "max_seqlen_k": 700}
        again = results(lambda *x, call=known: attention_varlen(*x, cu_q, cu_k, **call), (q, k, v))
        exact = results(
            lambda *x, options=options: reference_varlen(*x, cu_q, cu_k, **options),
            [t.double() for t in (q, k, v)],
        )
        for a, b, e in zip(ours, again, exact, strict=True):
            assert a.equal(b)
            assert error(a, e) < 2 * TOLERANCE[dtype]
    spoilt = k.clone()
    spoilt[305:1005] = math.nan  # the third sequence's keys
    o = attention_varlen(q, spoilt, v, cu_q, cu_k)
    others = torch.ones(len(q), dtype=torch.bool, device="cuda")
    others[300] = False
    assert o[others].isfinite().all()
    with pytest.raises(CourseError, match="ends with"):
        attention_varlen(q[:-1], k, v, cu_q, cu_k)


@HOPPER
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_plan_of_the_sweep_gives_the_same(head_dim):
    """Tiles change the order of sums, nothing else."""
    tensors = inputs(1, 4, 2, 700, 700, head_dim)
    exact = results(lambda *x: reference(*x, causal=True), [t.double() for t in tensors])
    for plan in plans.sweep(head_dim, causal=True, heads=(8,)):
        ours = results(lambda *x, plan=plan: attention(*x, causal=True, return_lse=True, plan=plan), tensors)
        for a, e in zip(ours, exact, strict=True):
            assert error(a, e) < 2 * TOLERANCE[torch.bfloat16], plan


@HOPPER
def test_the_descriptor_rung_gives_the_very_numbers_of_the_pointer_rung():
    """With a key/value head for each query head: else dK and dV are summed over heads in another order."""
    for head_dim, causal in itertools.product((64, 128), (False, True)):
        tensors = inputs(2, 4, 4, 500, 700, head_dim)
        tiles = [
            Tiles("pointer", 64, 64, 4, 2),
            Tiles("pointer", 32, 64, 4, 2),
            Tiles("pointer", 64, 64, 4, 2),
        ]
        pointer = Plan(*tiles)
        descriptor = Plan(*(t._replace(rung="descriptor") for t in tiles))
        one, other = (
            results(lambda *x, p=p, c=causal: attention(*x, causal=c, return_lse=True, plan=p), tensors)
            for p in (pointer, descriptor)
        )
        assert all(a.equal(b) for a, b in zip(one, other, strict=True))


@HOPPER
def test_the_hand_written_rung_is_one_too_and_refuses_a_window():
    hopper = pytest.importorskip("llmcourse.kernels.flash_hopper")
    for head_dim, causal in itertools.product((64, 128), (False, True)):
        tensors = inputs(1, 4, 2, 900, 900, head_dim, heads_last=True)
        if hopper.unsupported(*tensors):
            pytest.skip(hopper.unsupported(*tensors))
        own = plan_of("descriptor", head_dim, torch.bfloat16, causal=causal)
        plan = own._replace(forward=Tiles("hopper", 128, 128, 12, 2, 8))
        compare(tensors, TOLERANCE[torch.bfloat16], plan, causal=causal)
        with pytest.raises(CourseError, match="window"):
            attention(*tensors, causal=True, window=5, plan=plan)


def test_gradients_are_the_same_every_time_also_on_two_streams():
    tensors = inputs(2, 8, 2, 1000, 1000, 64, DTYPES[-1])
    first = results(lambda *x: attention(*x, causal=True, return_lse=True), tensors)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for i in range(20):
        with torch.cuda.stream(streams[i % 2]):
            again = results(lambda *x: attention(*x, causal=True, return_lse=True), tensors)
        torch.cuda.synchronize()
        assert all(a.equal(b) for a, b in zip(first, again, strict=True))


def test_a_cuda_graph_captures_forward_and_backward():
    tensors = [t.requires_grad_() for t in inputs(1, 4, 4, 777, 777, 64, DTYPES[-1])]
    do = torch.randn_like(tensors[0])

    def step():
        o = attention(*tensors, causal=True)
        return [o, *torch.autograd.grad(o, tensors, do)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = [t.clone() for t in step()]
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert all(a.equal(b) for a, b in zip(captured, expected, strict=True))


def test_torch_compile_takes_a_model_whole_forward_and_backward():
    q, k, v = (t.requires_grad_() for t in inputs(2, 8, 2, 300, 300, 64, DTYPES[-1], heads_last=True))
    weight = torch.randn(512, 64, device="cuda", dtype=DTYPES[-1])

    def block(q, k, v):
        o = attention(torch.tanh(q), k, v, causal=True)
        return torch.relu(o.transpose(1, 2).reshape(2, 300, 512) @ weight)

    plain, compiled = (
        [out := function(q, k, v), *torch.autograd.grad(out.float().square().sum(), (q, k, v))]
        for function in (block, torch.compile(block, fullgraph=True))
    )
    for a, b in zip(compiled, plain, strict=True):
        assert error(a, b) < 2 * TOLERANCE[DTYPES[-1]]


def test_32768_tokens_take_no_matrix_of_scores():
    q, k, v = (t.requires_grad_() for t in inputs(1, 4, 4, 32_768, 32_768, 64, DTYPES[-1]))
    scores = 4 * 32_768**2 * 2
    attention(q, k, v, causal=True).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention(q, k, v, causal=True).sum().backward()
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < 12 * q.nbytes < scores / 30
    rows = slice(32_700, 32_768)
    exact = reference(q[:, :, rows].double(), k.double(), v.double(), causal=True)[0]
    assert error(attention(q, k, v, causal=True)[:, :, rows], exact) < TOLERANCE[DTYPES[-1]]


def test_tensors_whose_elements_need_64_bit_addresses():
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    batch = 2_200  # 2.3 · 10⁹ elements
    q = torch.randn(batch, 16, 512, 128, device="cuda", dtype=DTYPES[-1])
    k, v = torch.randn(2, batch, 1, 512, 128, device="cuda", dtype=DTYPES[-1])
    last = slice(batch - 2, batch)
    for rung in RUNGS:
        o = attention(q, k, v, causal=True, plan=plan_of(rung, 128, DTYPES[-1], causal=True))
        exact = reference(q[last].double(), k[last].double(), v[last].double(), causal=True)[0]
        assert error(o[last], exact) < TOLERANCE[DTYPES[-1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_naive_rung_is_right_too(dtype):
    for causal in (False, True):
        tensors = inputs(1, 4, 2, 500, 700, 64, dtype)
        o = naive_attention(*tensors, causal=causal)
        exact = reference(*(t.double() for t in tensors), causal=causal)[0]
        assert error(o, exact) < 2 * TOLERANCE[dtype]


def test_tensors_on_two_devices_are_refused():
    q, k, v = inputs(1, 1, 1, 8, 8, 64, torch.float16)
    with pytest.raises(CourseError, match="is on"):
        attention(q, k.cpu(), v)
