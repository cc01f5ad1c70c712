"""Cross-entropy, alone and with the projection before it: the interpreter against float64, both ways."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from against_float64 import DTYPES, check, error, refused, saved_bytes

from llmcourse.errors import DeviceError, ShapeError
from llmcourse.kernels.checks import DtypeError, StrideError
from llmcourse.kernels.counters import counting
from llmcourse.kernels.cross_entropy import (
    cross_entropy,
    cross_entropy_naive,
    gradient,
    linear_cross_entropy,
    losses,
    losses_and_gradient,
    minimum_backward_bytes,
    minimum_bytes,
    naive_bytes,
)
from llmcourse.kernels.launch import Plan


def targets(rows, classes):
    t = torch.randint(0, classes, (rows,))
    if rows > 2:
        t[1] = -100
    return t


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 37), (3, 1000), (7, 130)])
def test_losses_and_gradients_are_those_of_float64(shape, dtype, reduction):
    x, t = (torch.randn(shape) * 3).to(dtype), targets(*shape)

    def exact(x):
        return F.cross_entropy(x, t, reduction=reduction)

    def kernel(x, **options):
        out = cross_entropy(x, t, reduction=reduction, backend="interpret", **options)
        assert out.dtype == torch.float32
        return out

    check(kernel, exact, [x])
    check(lambda x: kernel(x, plan=Plan("online", block=32)), exact, [x])
    check(lambda x: cross_entropy(x, t, reduction=reduction), exact, [x])
    check(
        lambda x: cross_entropy_naive(x, t, reduction=reduction, backend="interpret"),
        exact,
        [x],
        backward=False,
    )


def test_a_vocabulary_of_128k():
    x, t = torch.randn(2, 128_257), torch.tensor([128_256, 5])
    check(lambda x: cross_entropy(x, t, backend="interpret"), lambda x: F.cross_entropy(x, t), [x])


def test_rows_may_lie_apart():
    whole, t = torch.randn(6, 90), targets(6, 60)
    check(
        lambda x: cross_entropy(x, t, backend="interpret"), lambda x: F.cross_entropy(x, t), [whole[:, 20:80]]
    )


def test_in_place_the_gradient_takes_the_memory_of_the_logits():
    leaf, t = torch.randn(4, 30, requires_grad=True), targets(4, 30)
    made = leaf * 1
    (expected,) = torch.autograd.grad(F.cross_entropy(leaf.double(), t), leaf)
    loss = cross_entropy(made, t, inplace=True, backend="interpret")
    (g,) = torch.autograd.grad(loss, made)
    assert g.data_ptr() == made.data_ptr()
    assert error(g, expected) < 1e-6


def test_autograd_notices_that_the_logits_are_gone():
    leaf, t = torch.randn(4, 30, requires_grad=True), targets(4, 30)
    made = leaf * 1
    loss = cross_entropy(made, t, inplace=True, backend="interpret")
    other = (made * made).sum()  # its backward needs the logits
    torch.autograd.grad(loss, made, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(other, leaf)


def test_ignored_rows_are_not_read_and_get_zero():
    x, t = torch.randn(6, 64), torch.full((6,), -100)
    t[2] = 7
    with counting() as c:
        loss = cross_entropy(x, t, reduction="none")
    assert loss.count_nonzero() == 1
    one_row = minimum_bytes(1, 64, 4)
    assert c.load_unique_bytes <= one_row + 5 * 8
    x.requires_grad_()
    (g,) = torch.autograd.grad(cross_entropy(x, t, backend="interpret"), x)
    assert not g[[0, 1, 3, 4, 5]].any()
    t[2] = -100
    assert cross_entropy(x, t, backend="interpret").isnan()
    assert cross_entropy(x, t, reduction="sum", backend="interpret") == 0


def test_no_rows():
    x, t = torch.randn(0, 9, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    out = cross_entropy(x, t, reduction="sum", backend="interpret")
    assert out == 0
    assert torch.autograd.grad(out, x)[0].shape == (0, 9)


def test_rows_of_minus_infinity_beside_the_target():
    x = torch.full((2, 50), -float("inf"))
    x[0, 49] = 2.0
    x[1, :3] = torch.tensor([1.0, 2.0, 3.0])
    t = torch.tensor([49, 1])
    check(
        lambda x: cross_entropy(x, t, backend="interpret", plan=Plan("online", block=16)),
        lambda x: F.cross_entropy(x, t), [x],
    )  # fmt: skip


def test_bytes_are_those_that_the_file_says():
    x, t = torch.randn(24, 768).bfloat16().requires_grad_(), torch.arange(24)
    with counting() as c:
        loss = cross_entropy(x, t)
    assert c.unique_bytes == minimum_bytes(24, 768, 2)
    with counting() as c:
        torch.autograd.grad(loss, x)
    factor = 4  # one number, the same for all rows
    assert c.unique_bytes == minimum_backward_bytes(24, 768, 2) + factor
    with counting() as c:
        cross_entropy_naive(x.detach(), t)
    assert (len(c), c.unique_bytes) == (2, naive_bytes(24, 768, 2))
    assert saved_bytes(lambda: cross_entropy(x, t, backend="interpret")) == 24 * (768 * 2 + 8 + 4) + 8


def test_a_target_outside_the_vocabulary_is_refused_here_and_nan_in_a_kernel():
    x = torch.randn(3, 8)
    for wrong in (8, -1):
        t = torch.tensor([0, wrong, 2])
        refused(lambda t=t: cross_entropy(x, t), ShapeError, "target[1]", "0 to 7")
        loss, lse = losses(x, t, -100, Plan("online", block=8), True)
        assert loss.isnan().tolist() == [False, True, False]
        out = torch.empty_like(x)
        gradient(x, t, lse, torch.ones(3), out, -100, interpret=True)
        assert out.isnan().all(1).tolist() == [False, True, False]
        over = x.clone()
        losses_and_gradient(over, t, loss, -100, Plan("online", block=8), True)
        assert over.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
def test_linear_cross_entropy_is_that_of_float64(dtype, chunk):
    x, w = torch.randn(7, 12).to(dtype), torch.randn(45, 12).to(dtype)
    t = targets(7, 45)
    for reduction in ("mean", "sum"):

        def exact(x, w, r=reduction):
            return F.cross_entropy(x @ w.T, t, reduction=r)

        def kernel(x, w, r=reduction, **options):
            return linear_cross_entropy(
                x, w, t, reduction=r, chunk_rows=chunk, backend="interpret", **options
            )

        check(kernel, exact, [x, w])
        check(
            lambda x, w, k=kernel: k(x, w, sum_dtype=dtype),
            exact,
            [x, w],
            tolerance=3e-2 if dtype == torch.bfloat16 else None,
        )
        check(lambda x, w, r=reduction: linear_cross_entropy(x, w, t, reduction=r), exact, [x, w])


def test_linear_cross_entropy_never_holds_all_logits(monkeypatch):
    rows, width, vocabulary, chunk = 64, 4, 200, 8
    largest = 0
    empty = torch.empty

    def watched(*shape, **options):
        nonlocal largest
        made = empty(*shape, **options)
        if made.shape[-1:] == (vocabulary,):
            largest = max(largest, made.numel())
        return made

    monkeypatch.setattr(torch, "empty", watched)
    x, w = torch.randn(rows, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    t = torch.randint(0, vocabulary, (rows,))
    kept = saved_bytes(
        lambda: linear_cross_entropy(x, w, t, chunk_rows=chunk, backend="interpret").backward()
    )
    assert largest == chunk * vocabulary
    assert kept <= 4 * (rows * width + vocabulary * width) + 8


def test_only_what_is_asked_for_is_computed():
    x, w = torch.randn(5, 4), torch.randn(9, 4)
    t = torch.randint(0, 9, (5,))
    with torch.no_grad():
        assert (
            error(linear_cross_entropy(x, w, t, backend="interpret"), F.cross_entropy((x @ w.T).double(), t))
            < 1e-6
        )
    x.requires_grad_()
    loss = linear_cross_entropy(x, w, t, backend="interpret")
    (g,) = torch.autograd.grad(loss, x)
    assert error(g, torch.autograd.grad(F.cross_entropy(x.double() @ w.double().T, t), x)[0]) < 1e-5


def test_what_the_kernels_cannot_do_is_refused():
    x, w, t = torch.randn(3, 8), torch.randn(8, 8), torch.zeros(3, dtype=torch.int64)
    refused(lambda: cross_entropy(x.double(), t), DtypeError, "float64")
    refused(lambda: cross_entropy(x[None], t), ShapeError, "(1, 3, 8)")
    refused(lambda: cross_entropy(x, t.int()), DtypeError, "target.long()")
    refused(lambda: cross_entropy(x, t[:2]), ShapeError, "(2,)")
    refused(lambda: cross_entropy(x, torch.zeros(6, dtype=torch.int64)[::2]), StrideError, "stride 2")
    refused(lambda: cross_entropy(torch.randn(8, 3).T, t), StrideError, "logits")
    refused(lambda: cross_entropy(x, t, reduction="average"), ShapeError, "'mean'")
    refused(lambda: cross_entropy(x, t, backend="triton"), DeviceError, "cpu")
    refused(lambda: linear_cross_entropy(x, w[:, :4], t), ShapeError, "(8, 4)")
    refused(lambda: linear_cross_entropy(x, w.half(), t), DtypeError, "weight")
    refused(lambda: linear_cross_entropy(x, w, t, chunk_rows=0), ShapeError, "chunk_rows")
    refused(lambda: linear_cross_entropy(x, w, t, sum_dtype=torch.float16), DtypeError, "sum_dtype")
    refused(lambda: linear_cross_entropy(x, w, t, reduction="none"), ShapeError, "'sum'")
    refused(lambda: linear_cross_entropy(x, w, t + 8), ShapeError, "target[0]")
