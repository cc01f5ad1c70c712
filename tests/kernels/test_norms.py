"""RMSNorm, LayerNorm and residual addition with RMSNorm: the interpreter against float64, both ways."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from against_float64 import DTYPES, check, error, refused, saved_bytes

from llmcourse.errors import DeviceError, ShapeError
from llmcourse.kernels import add_rms_norm as add_norm
from llmcourse.kernels import layer_norm as ln
from llmcourse.kernels import rms_norm as rms
from llmcourse.kernels.checks import DtypeError, StrideError
from llmcourse.kernels.counters import counting
from llmcourse.kernels.launch import Plan

SHAPES = [(5, 37), (3, 257), (2, 3, 129), (19, 64), (1, 2)]
LOOPED = Plan("looped", block=64)


def exact_rms(x, w):
    return F.rms_norm(x, x.shape[-1:], w, 1e-6)


def exact_layer(x, w, b=None):
    return F.layer_norm(x, x.shape[-1:], w, b, 1e-5)


def exact_add(x, r, w):
    h = x + r
    return exact_rms(h, w), h


def rms_norm(x, w, **options):
    return rms.rms_norm(x, w, backend="interpret", **options)


def layer_norm(x, w, b=None, **options):
    return ln.layer_norm(x, w, b, backend="interpret", **options)


def add_rms_norm(x, r, w, **options):
    return add_norm.add_rms_norm(x, r, w, backend="interpret", **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_float64(shape, dtype):
    x, r = ((torch.randn(shape) * 2 + 0.5).to(dtype) for _ in range(2))
    w, b = (torch.randn(shape[-1]).to(dtype) for _ in range(2))
    # Two numbers normalise to ±1 whatever they are: their gradient is a small difference of large terms.
    backward = shape[-1] > 2
    check(rms_norm, exact_rms, [x, w])
    check(layer_norm, exact_layer, [x, w, b], backward=backward)
    check(layer_norm, exact_layer, [x, w], backward=backward)
    loose = 2.5e-2 if dtype == torch.bfloat16 else None  # h is rounded before it is normalised
    check(add_rms_norm, exact_add, [x, r, w], tolerance=loose)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_is_right_too(dtype):
    x, r, w, b = (torch.randn(s).to(dtype) for s in ((4, 33), (4, 33), (33,), (33,)))
    check(rms.rms_norm, exact_rms, [x, w])
    check(ln.layer_norm, exact_layer, [x, w, b])
    check(add_norm.add_rms_norm, exact_add, [x, r, w], tolerance=2.5e-2 if dtype == torch.bfloat16 else None)


def test_naive_rungs_compute_the_same():
    x, r, w, b = (torch.randn(s) for s in ((4, 33), (4, 33), (33,), (33,)))
    check(lambda *t: rms.rms_norm_naive(*t, backend="interpret"), exact_rms, [x, w], backward=False)
    check(lambda *t: ln.layer_norm_naive(*t, backend="interpret"), exact_layer, [x, w, b], backward=False)
    check(lambda *t: ln.layer_norm_naive(*t, backend="interpret"), exact_layer, [x, w], backward=False)
    check(
        lambda *t: add_norm.add_rms_norm_naive(*t, backend="interpret"), exact_add, [x, r, w], backward=False
    )


def test_looped_rungs_compute_the_same():
    x, r, dy, dh = (torch.randn(5, 300) for _ in range(4))
    w, b = torch.randn(300), torch.randn(300)
    check(lambda *t: rms_norm(*t, plan=LOOPED), exact_rms, [x, w], backward=False)
    check(lambda *t: layer_norm(*t, plan=LOOPED), exact_layer, [x, w, b], backward=False)
    check(lambda *t: add_rms_norm(*t, plan=LOOPED), exact_add, [x, r, w], backward=False)
    plan = Plan("looped", block=64, programs=2)
    _, s = rms.forward(x, w, 1e-6, LOOPED, True)
    for extra in (None, dh):
        for a, b_ in zip(
            rms.backward(x, w, s, dy, extra, plan=plan, interpret=True),
            rms.backward(x, w, s, dy, extra, interpret=True),
            strict=True,
        ):
            assert error(a, b_) < 1e-6
    _, mean, s = ln.forward(x, w, b, 1e-5, LOOPED, True)
    for a, b_ in zip(
        ln.backward(x, w, mean, s, dy, plan=plan, interpret=True),
        ln.backward(x, w, mean, s, dy, interpret=True),
        strict=True,
    ):
        assert error(a, b_) < 1e-6


def test_rows_wider_than_registers_hold():
    x, r = torch.randn(2, 66_001), torch.randn(2, 66_001)
    w, b = torch.randn(66_001), torch.randn(66_001)
    check(rms_norm, exact_rms, [x, w])
    check(layer_norm, exact_layer, [x, w, b])
    check(add_rms_norm, exact_add, [x, r, w])


@pytest.mark.parametrize("programs", [1, 3, 50])
def test_the_gradient_of_the_weight_does_not_depend_on_the_number_of_programs(programs):
    x, dy, w = torch.randn(11, 40), torch.randn(11, 40), torch.randn(40)
    _, s = rms.forward(x, w, 1e-6, rms.forward_plan(40), True)
    expected = rms.backward(x, w, s, dy, interpret=True)
    plan = Plan("row", rows=2, block=64, programs=programs)
    for a, b in zip(rms.backward(x, w, s, dy, plan=plan, interpret=True), expected, strict=True):
        assert error(a, b) < 1e-6


def test_rows_may_lie_apart_and_gradients_in_any_layout():
    whole, w = torch.randn(8, 100), torch.randn(60)
    for view in (whole[:, :60], whole[::2, 20:80]):
        check(rms_norm, exact_rms, [view, w])
        check(layer_norm, exact_layer, [view, w])
        check(add_rms_norm, exact_add, [view, view.clone(), w])
    x = torch.randn(4, 60, requires_grad=True)
    dx, dw = (torch.autograd.grad(rms_norm(x, w).sum(), x)[0] for _ in range(2))
    assert torch.equal(dx, dw)
    (got,) = torch.autograd.grad(layer_norm(x, w).T.sum(0), x, torch.ones(4))
    assert error(got, torch.autograd.grad(exact_layer(x.double(), w.double()).sum(), x)[0]) < 1e-4


def test_no_rows_give_no_rows_and_zero_gradients_of_the_weights():
    x = torch.randn(0, 24, requires_grad=True)
    w, b = torch.randn(24, requires_grad=True), torch.randn(24, requires_grad=True)
    for out, leaves in (
        (rms_norm(x, w), (x, w)),
        (layer_norm(x, w, b), (x, w, b)),
        (add_rms_norm(x, x.detach(), w)[0], (x, w)),
    ):
        assert out.shape == (0, 24)
        for g in torch.autograd.grad(out.sum(), leaves):
            assert not g.any()


def test_layer_norm_keeps_its_digits_far_from_zero():
    """mean(x²) − mean(x)² would lose all of them here."""
    x = torch.randn(3, 500) + 1000
    w = torch.ones(500)
    assert error(layer_norm(x, w), exact_layer(x.double(), w.double())) < 1e-4


def test_a_stream_that_nobody_reads_on_has_no_gradient_to_add():
    x, r = (torch.randn(3, 20, requires_grad=True) for _ in range(2))
    w = torch.randn(20, requires_grad=True)
    y, h = add_rms_norm(x, r, w)
    (a,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (b,) = torch.autograd.grad((y.sum() + 0 * h.sum()), x, retain_graph=True)
    assert torch.allclose(a, b)
    (only_h,) = torch.autograd.grad(h.sum(), x)
    assert torch.equal(only_h, torch.ones(3, 20))


def test_bytes_are_those_that_the_files_say():
    m, n = 24, 768
    x, r = (torch.randn(m, n).bfloat16() for _ in range(2))
    w, b = (torch.randn(n).bfloat16() for _ in range(2))
    for call, launches, expected in (
        (lambda: rms.rms_norm(x, w), 1, rms.minimum_bytes(m, n, 2)),
        (lambda: rms.rms_norm_naive(x, w), 3, rms.naive_bytes(m, n, 2)),
        (lambda: ln.layer_norm(x, w, b), 1, ln.minimum_bytes(m, n, 2)),
        (lambda: ln.layer_norm_naive(x, w, b), 4, ln.naive_bytes(m, n, 2)),
        (lambda: add_norm.add_rms_norm(x, r, w), 1, add_norm.minimum_bytes(m, n, 2)),
        (lambda: add_norm.add_rms_norm_naive(x, r, w), 2, add_norm.naive_bytes(m, n, 2)),
    ):
        with counting() as c:
            call()
        assert (len(c), c.unique_bytes) == (launches, expected)


def test_backward_moves_what_the_file_says_and_its_partial_sums():
    m, n = 40, 256
    x, dy, w = torch.randn(m, n).bfloat16(), torch.randn(m, n).bfloat16(), torch.randn(n).bfloat16()
    _, s = rms.forward(x, w, 1e-6, rms.forward_plan(n), True)
    plan = rms.backward_plan(m, n, 2, x.device)
    with counting() as c:
        rms.backward(x, w, s, dy, interpret=True)
    partial_sums, final_dw = 4 * plan.programs * n, 2 * n
    assert c.unique_bytes == rms.minimum_backward_bytes(m, n, 2) + partial_sums - final_dw


def test_what_is_kept_for_backward():
    m, n = 64, 128
    x, r = (torch.randn(m, n, requires_grad=True) for _ in range(2))
    w = torch.randn(n, requires_grad=True)
    assert saved_bytes(lambda: rms_norm(x, w)) == 4 * (m * n + n + m)
    assert saved_bytes(lambda: layer_norm(x, w)) == 4 * (m * n + n + 2 * m)
    assert saved_bytes(lambda: add_rms_norm(x, r, w)) == 4 * (m * n + n + m)


def test_mixed_formats_of_x_and_weight():
    x, w = torch.randn(3, 50).bfloat16(), torch.randn(50)
    out = rms_norm(x, w)
    assert out.dtype == torch.bfloat16
    leaf = w.clone().requires_grad_()
    (dw,) = torch.autograd.grad(rms_norm(x, leaf).sum(), leaf)
    assert dw.dtype == torch.float32


@pytest.mark.parametrize("norm", [rms.rms_norm, ln.layer_norm])
def test_what_the_kernels_cannot_do_is_refused(norm):
    x, w = torch.randn(4, 8), torch.randn(8)
    refused(lambda: norm(x.double(), w), DtypeError, "float64")
    refused(lambda: norm(x, w.double()), DtypeError, "weight")
    refused(lambda: norm(x, torch.randn(7)), ShapeError, "(7,)", "(8,)")
    refused(lambda: norm(x, torch.randn(16)[::2]), StrideError, "stride 2")
    refused(lambda: norm(x.T, torch.randn(4)), StrideError, "contiguous")
    refused(lambda: norm(x, w.to("meta")), DeviceError, "meta")
    refused(lambda: norm(x, w, backend="triton"), DeviceError, "interpret")


def test_what_addition_cannot_do_is_refused():
    x, w = torch.randn(4, 8), torch.randn(8)
    refused(lambda: add_norm.add_rms_norm(x, torch.randn(1, 8), w), ShapeError, "broadcasting")
    refused(lambda: add_norm.add_rms_norm(x, x.bfloat16(), w), DtypeError, "residual")
    refused(lambda: add_norm.add_rms_norm(x, torch.randn(8, 4).T, w), StrideError, "residual")
    refused(lambda: ln.layer_norm(x, w, torch.randn(9)), ShapeError, "bias")
