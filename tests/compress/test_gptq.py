"""GPTQ, against optimal brain quantization written out: one column at a time, every inverse in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmcourse.compress.calibrate import Inputs
from llmcourse.compress.gptq import damped_factor, gptq
from llmcourse.compress.quantize import Quantized, Scheme, encode, grid, quantize
from llmcourse.errors import ShapeError
from llmcourse.train.fit import one_thread

pytestmark = pytest.mark.usefixtures("single")


@pytest.fixture
def single():
    with one_thread():
        yield


def case(rows: int, columns: int, seen: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the Gram matrix of inputs that go together (float64)."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draw, dtype=torch.float64)
    x = torch.randn(seen, columns, generator=draw, dtype=torch.float64) @ (mix + 2 * torch.eye(columns))
    return torch.randn(rows, columns, generator=draw, dtype=torch.float64), x.T @ x


def written_out(weight: Tensor, gram: Tensor, scheme: Scheme, sequence: Tensor, damping: float) -> Tensor:
    """The paper's equations 2 and 3, without Cholesky, blocks or laziness; the weights that result."""
    w, columns = weight.clone().double(), weight.shape[1]
    size = scheme.group or columns
    h = gram.clone() + damping * gram.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    ordered = not torch.equal(sequence, torch.arange(columns))
    scale, zero = grid(weight, scheme)
    left, out = sequence.tolist(), torch.empty_like(w)
    one = replace(scheme, group=None)
    while left:
        j = left[0]
        if not ordered and j % size == 0:
            scale[:, j // size : j // size + 1], z = grid(w[:, j : j + size], scheme)
            if zero is not None and z is not None:
                zero[:, j // size : j // size + 1] = z
        s = scale[:, j // size, None]
        z = None if zero is None else zero[:, j // size, None]
        q = Quantized(encode(w[:, [j]], s, z, one), s, z, one, (len(w), 1)).dequantize().double()
        inverse = torch.linalg.inv(h[left][:, left])
        w[:, left] -= (w[:, [j]] - q) / inverse[0, 0] * inverse[0]
        out[:, [j]] = q
        left = left[1:]
    return out


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize(
    "scheme", [Scheme(4, 8), Scheme(3, 8, False), Scheme(4), Scheme(2, 5, False)], ids=str
)
def test_every_column_is_rounded_as_in_the_formula_of_the_paper(scheme, order):
    weight, gram = case(7, 23, 60)
    sequence = gram.diagonal().argsort(descending=True, stable=True) if order else torch.arange(23)
    want = written_out(weight, gram, scheme, sequence, 0.01)
    got = gptq(weight, gram, scheme, damping=0.01, block=6, order=order).dequantize(torch.float64)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("order", [False, True])
def test_the_result_does_not_depend_on_the_block(order):
    weight, gram = case(5, 41, 100)
    results = [gptq(weight, gram, Scheme(3, 8), block=b, order=order) for b in (1, 7, 16, 41, 128)]
    for other in results[1:]:
        assert torch.equal(other.codes, results[0].codes)
        assert torch.equal(other.scale, results[0].scale)


def test_the_error_of_the_output_is_well_below_that_of_rounding_to_nearest():
    weight, gram = case(32, 64, 500)
    inputs = Inputs(gram, gram.diagonal().sqrt(), gram.diagonal().sqrt(), 500)
    for scheme in (Scheme(4, 16), Scheme(3, 32, False), Scheme(4, codes="nf4", group=16)):
        rounded = inputs.error(quantize(weight, scheme).dequantize(torch.float64) - weight)
        for order in (False, True):
            fitted = inputs.error(gptq(weight, gram, scheme, order=order).dequantize(torch.float64) - weight)
            assert fitted < 0.65 * rounded


def test_inputs_that_have_nothing_to_do_with_each_other_leave_rounding_to_nearest():
    weight = torch.randn(6, 40, dtype=torch.float64)
    gram = torch.diag(torch.rand(40, dtype=torch.float64) + 0.1)
    for order in (False, True):
        assert torch.equal(
            gptq(weight, gram, Scheme(4, 16), order=order).codes, quantize(weight, Scheme(4, 16)).codes
        )


def test_features_that_are_always_zero_neither_move_nor_are_moved():
    weight, gram = case(6, 16, 50)
    gram[3], gram[:, 3] = 0, 0
    gram[15], gram[:, 15] = 0, 0
    codes = gptq(weight, gram, Scheme(4)).codes
    plain = quantize(weight, Scheme(4)).codes
    assert torch.equal(codes[:, [3, 15]], plain[:, [3, 15]])
    assert torch.isfinite(gptq(weight, torch.zeros_like(gram), Scheme(4)).dequantize()).all()


def test_fewer_rows_than_features_are_enough():
    weight, gram = case(4, 48, 5)
    inputs = Inputs(gram, gram[0], gram[0], 5)
    fitted = gptq(weight, gram, Scheme(4, 16)).dequantize(torch.float64)
    assert inputs.error(fitted - weight) < 0.2 * inputs.error(
        quantize(weight, Scheme(4, 16)).dequantize(torch.float64) - weight
    )


def test_the_factor_holds_the_inverses_of_all_remaining_features():
    _, gram = case(1, 12, 40)
    factor = damped_factor(gram, 0.01)
    h = gram + 0.01 * gram.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    for j in range(12):
        inverse = torch.linalg.inv(h[j:, j:])
        torch.testing.assert_close(factor[j, j:] / factor[j, j], inverse[0] / inverse[0, 0])


def test_the_weight_that_came_is_left_as_it_was_and_float32_will_do():
    weight, gram = case(8, 32, 100)
    before = weight.clone()
    double = gptq(weight, gram, Scheme(4, 8))
    single = gptq(weight.float(), gram.float(), Scheme(4, 8))
    assert torch.equal(weight, before)
    assert (double.codes == single.codes).float().mean() > 0.95


def test_matrices_that_do_not_fit_and_no_damping_are_refused():
    weight, gram = case(4, 8, 20)
    with pytest.raises(ShapeError, match="Gram matrix"):
        gptq(weight, gram[:7, :7], Scheme(4))
    with pytest.raises(ShapeError, match="damping = 0"):
        gptq(weight, gram, Scheme(4), damping=0.0)


def test_a_matrix_that_cannot_be_a_gram_matrix_is_refused():
    weight, gram = case(4, 8, 20)
    for broken in (-gram, gram * torch.nan):
        with pytest.raises(ShapeError, match="not positive definite"):
            gptq(weight, broken, Scheme(4))


@pytest.mark.parametrize("order", [False, True])
def test_grids_may_be_those_of_another_weight(order):
    weight, gram = case(4, 24, 60)
    clipped = weight.clamp(-1, 1)
    found = gptq(weight, gram, Scheme(3, 8), order=order, grids_of=clipped)
    assert torch.equal(found.scale, grid(clipped, Scheme(3, 8))[0])
    with pytest.raises(ShapeError, match="grids of a weight"):
        gptq(weight, gram, Scheme(3, 8), grids_of=clipped[:2])
