"""The Hopper rung of FlashAttention on a GPU: every schedule right, at odd lengths, beside memory of NaN."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from llmcourse.kernels.attention_reference import reference
from llmcourse.kernels.flash_hopper import SCHEDULES, Schedule, UnsupportedError, forward
from llmcourse.kernels.gluon_language import gluon

if torch.cuda.get_device_capability()[0] != 9 or not gluon.found:
    pytest.skip("needs sm_90 and Gluon", allow_module_level=True)

TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
SIZES = [(1, 1, 1, 1, 1), (1, 2, 1, 1, 300), (2, 4, 2, 129, 129), (1, 4, 1, 200, 333), (3, 2, 2, 300, 40)]
SIZES += [(2, 8, 2, 1000, 1000), (1, 3, 3, 64, 4097)]


def inputs(batch, heads, kv_heads, queries, keys, head_dim, dtype=torch.bfloat16):
    """q, k, v as windows of tensors that are NaN elsewhere: whoever reads beyond an end shows it."""

    def one(n, length):
        x = torch.full((batch, n, length + 9, head_dim), torch.nan, device="cuda", dtype=dtype)
        x[:, :, :length] = torch.randn(batch, n, length, head_dim, device="cuda")
        return x[:, :, :length]

    return one(heads, queries), one(kv_heads, keys), one(kv_heads, keys)


def assert_right(q, k, v, o, lse, **options):
    exact_o, exact_lse = reference(q.double(), k.double(), v.double(), **options)
    unseen = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, unseen)
    assert not o[unseen].any()
    wrong = (o.double() - exact_o).norm(dim=-1) / exact_o.norm(dim=-1).clamp(min=1e-3)
    assert wrong[~unseen].max() < TOLERANCE[q.dtype] if (~unseen).any() else True
    assert (lse.double() - exact_lse)[~unseen].abs().max() < 2e-3 if (~unseen).any() else True


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_shipped_schedules_are_right_at_any_lengths(head_dim, causal):
    for dtype, sizes in itertools.product(TOLERANCE, SIZES):
        q, k, v = inputs(*sizes, head_dim, dtype)
        assert_right(q, k, v, *forward(q, k, v, causal=causal), causal=causal)


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(2, 128, 2, 3, ordered=False),
        Schedule(2, 128, 2, 3, overlap=False),
        Schedule(2, 64, 4, 8, persistent=True),
        Schedule(3, 64, 3, 1),
        Schedule(3, 64, 3, 2, ordered=False, overlap=False, persistent=True),
    ],
    ids=str,
)
def test_other_schedules_are_right_too(schedule):
    causal = schedule.ordered
    for head_dim, sizes in itertools.product((64, 128), SIZES[2:]):
        q, k, v = inputs(*sizes, head_dim)
        assert_right(q, k, v, *forward(q, k, v, causal=causal, plan=schedule), causal=causal)


def test_random_shapes():
    rng = random.Random(5)
    for _ in range(40):
        kv_heads = rng.randint(1, 3)
        sizes = (rng.randint(1, 3), kv_heads * rng.randint(1, 4), kv_heads)
        sizes += (rng.randint(1, 900), rng.randint(1, 900), rng.choice((64, 128)))
        causal = rng.random() < 0.5
        q, k, v = inputs(*sizes)
        assert_right(q, k, v, *forward(q, k, v, causal=causal), causal=causal)


def test_it_gives_the_same_bits_every_time_and_while_others_run():
    """A race between copies and products would show as a difference now and then."""
    q, k, v = inputs(2, 16, 16, 4096, 4096, 128)
    for causal in (False, True):
        first, lse = forward(q, k, v, causal=causal)
        side = torch.cuda.Stream()
        a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
        for _ in range(30):
            with torch.cuda.stream(side):
                a @ a
            again, lse_again = forward(q, k, v, causal=causal)
            assert torch.equal(first, again)
            assert torch.equal(lse, lse_again)


def test_large_scores_and_heads_between_tokens():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(2, 4, 2, 300, 300, 64))
    assert_right(q, k, v, *forward(q, k, v, causal=True, scale=3.0), causal=True, scale=3.0)


def test_a_cuda_graph_replays_it():
    q, k, v = inputs(1, 4, 4, 512, 512, 64)
    o, _ = forward(q, k, v, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = forward(q, k, v, causal=True)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(captured, forward(q, k, v, causal=True)[0])
    assert not torch.equal(captured, o)


def test_a_float32_tensor_is_refused():
    q, k, v = (x.float() for x in inputs(1, 1, 1, 8, 8, 64))
    with pytest.raises(UnsupportedError, match="float32"):
        forward(q, k, v)
    assert set(SCHEDULES) == set(itertools.product((64, 128), (False, True)))
