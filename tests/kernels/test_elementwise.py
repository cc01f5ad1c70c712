"""Vector addition, SwiGLU and RoPE: the interpreter against float64, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from against_float64 import DTYPES, check, error, refused, saved_bytes

from llmcourse.errors import DeviceError, ShapeError
from llmcourse.kernels import rope as rope_file
from llmcourse.kernels import swiglu as swiglu_file
from llmcourse.kernels.checks import DtypeError, StrideError
from llmcourse.kernels.counters import counting
from llmcourse.kernels.launch import Plan
from llmcourse.kernels.vector_add import NAIVE, minimum_bytes, vector_add
from llmcourse.models.config import ModelConfig
from llmcourse.models.rope import Rope, rotate


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (37,), (5, 7, 11), (0,), (2049,)])
def test_vectors_add_up(shape, dtype):
    x, y = (torch.randn(shape).to(dtype) for _ in range(2))
    check(lambda x, y: vector_add(x, y, backend="interpret"), lambda x, y: x + y, [x, y])
    check(lambda x, y: vector_add(x, y, backend="interpret", plan=NAIVE), lambda x, y: x + y, [x, y])


def test_addition_moves_three_vectors():
    x = torch.randn(1000)
    with counting() as c:
        vector_add(x, x.clone())
    assert c.bytes == minimum_bytes(1000, 4)


def test_what_addition_cannot_do_is_refused():
    x = torch.randn(4, 8)
    refused(lambda: vector_add(x, torch.randn(8)), ShapeError, "broadcast")
    refused(lambda: vector_add(x, x.half()), DtypeError, "y")
    refused(lambda: vector_add(x, torch.randn(8, 4).T), StrideError, "y")
    refused(lambda: vector_add(x, x, backend="triton"), DeviceError, "cpu")
    refused(lambda: vector_add(x, x, plan=Plan("", block=100)), ShapeError, "power of two")


def exact_swiglu(gate, up=None):
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    return F.silu(gate) * up


def swiglu(*tensors):
    return swiglu_file.swiglu(*tensors, backend="interpret")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (5, 74), (2, 3, 130), (0, 8), (2, 5000)])
def test_swiglu_is_that_of_float64(shape, dtype):
    packed = (torch.randn(shape) * 2).to(dtype)
    gate, up = packed.chunk(2, -1)
    check(swiglu, exact_swiglu, [packed])
    check(swiglu, exact_swiglu, [gate, up])  # views with the packed tensor's row stride
    check(swiglu, exact_swiglu, [gate.contiguous(), up])
    check(swiglu_file.swiglu, exact_swiglu, [packed])
    check(lambda x: swiglu_file.swiglu_naive(x, backend="interpret"), exact_swiglu, [packed], backward=False)


def test_swiglu_keeps_its_inputs_and_moves_what_the_file_says():
    packed = torch.randn(16, 512).bfloat16().requires_grad_()
    assert saved_bytes(lambda: swiglu(packed)) == packed.numel() * 2
    with counting() as c:
        out = swiglu_file.swiglu(packed)
    assert c.bytes == swiglu_file.minimum_bytes(16, 256, 2)
    with counting() as c:
        torch.autograd.grad(out, packed, torch.randn(16, 256).bfloat16())
    assert c.bytes == swiglu_file.minimum_backward_bytes(16, 256, 2)


def test_swiglu_of_large_gates_is_finite():
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]])
    check(swiglu, exact_swiglu, [gate, torch.ones(1, 5)])


def test_what_swiglu_cannot_do_is_refused():
    x = torch.randn(4, 8)
    refused(lambda: swiglu_file.swiglu(torch.randn(4, 7)), ShapeError, "7", "even")
    refused(lambda: swiglu_file.swiglu(x, torch.randn(4, 6)), ShapeError, "up")
    refused(lambda: swiglu_file.swiglu(x, x.half()), DtypeError, "up")
    refused(lambda: swiglu_file.swiglu(x.T, torch.randn(8, 4)), StrideError, "gate")
    refused(lambda: swiglu_file.swiglu(x, backend="triton"), DeviceError, "interpret")


def tables(length, head_dim):
    angles = torch.outer(torch.arange(length), 10000.0 ** -(torch.arange(0, 1, 2 / head_dim)))
    return angles.cos(), angles.sin()


def exact_rope(cos, sin, positions=None):
    def turn(x):
        c, s = cos.double(), sin.double()
        if positions is None:
            c, s = c[: x.shape[2]], s[: x.shape[2]]
        else:
            c, s = c[positions][:, None], s[positions][:, None]
        a, b = x.chunk(2, -1)
        return torch.cat((a * c - b * s, b * c + a * s), -1)

    return turn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 5, 12), (1, 9, 4, 64), (2, 5, 0, 8)])
def test_rope_is_that_of_float64(shape, dtype):
    batch, heads, length, head_dim = shape
    cos, sin = tables(11, head_dim)
    positions = torch.randint(0, 11, (batch, length))
    for x in (
        torch.randn(shape).to(dtype),
        torch.randn(batch, length, heads, head_dim).to(dtype).transpose(1, 2),
        torch.randn(batch, length, 3 * heads, head_dim).to(dtype).transpose(1, 2)[:, heads : 2 * heads],
    ):
        for p in (None, positions, positions.int()):
            check(
                lambda x, p=p: rope_file.rope(x, cos, sin, p, backend="interpret"),
                exact_rope(cos, sin, p),
                [x],
            )
            check(lambda x, p=p: rope_file.rope(x, cos, sin, p), exact_rope(cos, sin, p), [x])
            check(
                lambda x, p=p: rope_file.rope_naive(x, cos, sin, p, backend="interpret"),
                exact_rope(cos, sin, p), [x], backward=False,
            )  # fmt: skip


def test_rope_agrees_with_the_models():
    """The engine's tables hold each angle twice, sin with a minus sign first; half of each is needed."""
    config = ModelConfig(
        vocab_size=8, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=16, max_len=64
    )
    model = Rope(config)
    x, positions = torch.randn(2, 3, 6, 8), torch.randint(0, 40, (2, 6))
    expected = rotate(x, *model(positions))
    out = rope_file.rope(x, model.cos[:, 4:], model.sin[:, 4:], positions, backend="interpret")
    assert error(out, expected) < 1e-6


def test_rope_keeps_the_layout_and_only_the_tables():
    cos, sin = tables(6, 8)
    x = torch.randn(2, 6, 3, 8).transpose(1, 2).requires_grad_()
    out = rope_file.rope(x, cos, sin, backend="interpret")
    assert out.stride() == x.stride()
    assert saved_bytes(lambda: rope_file.rope(x, cos, sin, backend="interpret")) == 2 * cos.numel() * 4


def test_queries_and_keys_turn_in_one_launch():
    qkv, (cos, sin) = torch.randn(2, 5, 4 + 2 + 2, 8), tables(5, 8)
    with counting() as c:
        out = rope_file.rope(qkv[..., :6, :].transpose(1, 2), cos, sin)
    assert len(c) == 1
    assert c.unique_bytes == rope_file.minimum_bytes(out.numel(), 4, tables=2 * cos.numel() * 4)


def test_a_position_beyond_the_tables_is_refused_here_and_nan_in_a_kernel():
    cos, sin = tables(4, 8)
    x, p = torch.randn(1, 2, 3, 8), torch.tensor([[0, 4, 1]])
    refused(lambda: rope_file.rope(x, cos, sin, p), ShapeError, "0 to 4", "0 to 3")
    plan = rope_file.rope_plan(x)
    out = rope_file.turn(x, cos, sin, p, plan, backward=False, interpret=True)
    assert out[:, :, 1].isnan().all()
    assert not out[:, :, [0, 2]].isnan().any()


def test_what_rope_cannot_do_is_refused():
    cos, sin = tables(6, 8)
    x = torch.randn(1, 2, 5, 8)
    refused(lambda: rope_file.rope(x[0], cos, sin), ShapeError, "(2, 5, 8)")
    refused(lambda: rope_file.rope(torch.randn(1, 2, 5, 7), cos, sin), ShapeError, "even")
    refused(lambda: rope_file.rope(torch.randn(1, 2, 8, 5).transpose(2, 3), cos, sin), StrideError, "x")
    refused(lambda: rope_file.rope(x, cos[:, :3], sin), ShapeError, "cos")
    refused(lambda: rope_file.rope(x, cos.T.contiguous().T, sin), StrideError, "cos")
    refused(lambda: rope_file.rope(torch.randn(1, 2, 7, 8), cos, sin), ShapeError, "7 tokens")
    refused(lambda: rope_file.rope(x, cos, sin, torch.zeros(1, 5)), DtypeError, "long")
    refused(lambda: rope_file.rope(x, cos, sin, torch.zeros(1, 4).long()), ShapeError, "positions")
    refused(lambda: rope_file.rope(x, cos, sin, backend="triton"), DeviceError, "cpu")
