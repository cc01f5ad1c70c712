"""Round-to-nearest: grids, groups and packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmcourse.compress.quantize import TENSOR, Quantized, Scheme, grid, pack, quantize, unpack
from llmcourse.errors import ShapeError

GROUPS = [None, TENSOR, 1, 5, 32, 200]


def weight(rows=7, columns=67, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)


def by_hand(w, scheme):
    """Each group on its own, in float64 NumPy, with the scale as it is stored."""
    out = np.empty(w.shape)
    columns = w.shape[1]
    size = columns if scheme.group in (None, TENSOR) else scheme.group
    for row in range(w.shape[0]):
        for start in range(0, columns, size):
            part = w[row, start : start + size].double().numpy()
            whole = w.double().numpy() if scheme.group == TENSOR else part
            if scheme.symmetric:
                step = np.abs(whole).max() / (2 ** (scheme.bits - 1) - 1)
                low, high, zero = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1, 0
            else:
                step = (max(whole.max(), 0) - min(whole.min(), 0)) / (2**scheme.bits - 1)
                low, high = 0, 2**scheme.bits - 1
            step = float(torch.tensor(step, dtype=torch.float32).bfloat16()) or 1.0
            if not scheme.symmetric:
                zero = np.clip(np.rint(-np.float32(min(whole.min(), 0)) / np.float32(step)), low, high)
            codes = np.clip(np.rint(part.astype(np.float32) / np.float32(step)) + zero, low, high)
            out[row, start : start + size] = (codes - zero) * step
    return torch.from_numpy(out)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_codes_are_the_nearest_points_of_each_groups_grid(bits, group):
    w, scheme = weight(), Scheme(bits, group)
    torch.testing.assert_close(
        quantize(w, scheme).dequantize(torch.float64), by_hand(w, scheme), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_an_asymmetric_grid_covers_least_to_most(bits, group):
    w = weight() + 0.3
    scheme = Scheme(bits, group, symmetric=False)
    q = quantize(w, scheme)
    scale = (
        q.scale.float()
        .expand(w.shape[0], -1)
        .repeat_interleave(w.shape[1] if group in (None, TENSOR) else group, dim=1)[:, : w.shape[1]]
    )
    # Half a step from rounding, half from the rounded zero, and the scale's own rounding (2^-9 of 2^b steps).
    bound = (1 + 2.0 ** (bits - 9)) * scale
    assert ((q.dequantize() - w).abs() <= bound).all()
    torch.testing.assert_close(
        q.dequantize(torch.float64), by_hand(w, scheme), atol=1.01 * scale.max().item(), rtol=0
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_a_symmetric_error_is_at_most_half_a_step(bits):
    w = weight(9, 128)
    q = quantize(w, Scheme(bits, 32))
    step = q.scale.float().repeat_interleave(32, dim=1)
    assert ((q.dequantize() - w).abs() <= step * (0.5 + 1e-3)).all()


def test_numbers_on_the_grid_are_kept_exactly():
    codes = torch.randint(-7, 8, (6, 64))
    codes[:, ::32] = 7
    w = codes * torch.tensor([[0.25], [0.5], [1], [2], [4], [8]])
    assert torch.equal(quantize(w, Scheme(4, 32)).dequantize(), w)


def test_smaller_groups_and_more_bits_err_less_and_cost_more():
    w = weight(32, 256)
    errors, sizes = [], []
    for scheme in (Scheme(3, 128), Scheme(4, TENSOR), Scheme(4), Scheme(4, 64), Scheme(4, 16), Scheme(8)):
        q = quantize(w, scheme)
        errors.append((q.dequantize() - w).square().mean().item())
        sizes.append(q.nbytes)
    assert errors[1:] == sorted(errors[1:], reverse=True)
    assert sizes[1:] == sorted(sizes[1:])
    assert errors[0] > errors[3]
    assert sizes[0] < sizes[1]


def test_normal_float_beats_even_steps_on_normal_weights():
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    error = {
        s.codes: (quantize(w, s).dequantize() - w).square().mean().item()
        for s in (Scheme(4, 64), Scheme(4, 64, codes="nf4"), Scheme(4, 64, codes="fp4"))
    }
    assert error["nf4"] < error["fp4"] < error["int"]


@pytest.mark.parametrize("codes", ["nf4", "fp4", "fp8_e4m3", "fp8_e5m2"])
def test_codebook_codes_survive_packing_and_reach_both_ends(codes):
    scheme = Scheme(4 if codes in ("nf4", "fp4") else 8, 32, codes=codes)
    w = weight(5, 64)
    q = quantize(w, scheme)
    again = Quantized.from_packed(q.packed(), q.scale, None, scheme, q.shape)
    assert torch.equal(again.dequantize(), q.dequantize())
    torch.testing.assert_close(q.dequantize().abs().amax(), w.abs().amax(), rtol=0.01, atol=0)


def test_a_group_of_zeros_stays_zero():
    w = weight(3, 64)
    w[1] = 0
    for scheme in (Scheme(4, 32), Scheme(4, 32, symmetric=False), Scheme(8), Scheme(4, 32, codes="nf4")):
        back = quantize(w, scheme).dequantize()
        assert back.isfinite().all()
        assert not back[1].any()


@given(bits=st.integers(2, 8), rows=st.integers(1, 4), columns=st.integers(1, 41), seed=st.integers(0, 99))
def test_packing_leaves_no_gaps_and_loses_nothing(bits, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, -(-columns * bits // 8))
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, columns), codes)
    # The row as one long binary number: code i at bits i·b and up.
    for row in range(rows):
        number = sum(int(c) << (i * bits) for i, c in enumerate(codes[row]))
        assert int.from_bytes(bytes(packed[row].tolist()), "little") == number


def test_the_low_half_of_a_byte_comes_first():
    q = quantize(torch.tensor([[1.0, -2.0, 7.0, 0.0]]), Scheme(4))
    assert q.codes.tolist() == [[1, -2, 7, 0]]
    assert q.packed().tolist() == [[(1 + 8) | (-2 + 8) << 4, (7 + 8) | (0 + 8) << 4]]


def test_bytes_are_those_of_codes_scales_and_zeros():
    w = weight(16, 128)
    assert quantize(w, Scheme(4, 64)).nbytes == 16 * 64 + 16 * 2 * 2
    assert quantize(w, Scheme(4, 64, symmetric=False)).nbytes == 16 * 64 + 16 * 2 * 3
    assert quantize(w, Scheme(8)).bits_per_weight == 8 + 16 / 128


def test_scales_are_chosen_for_the_sixteen_bits_they_are_kept_in():
    scale, _ = grid(weight(), Scheme(8))
    assert scale.dtype == torch.bfloat16


def test_a_bfloat16_weight_is_quantized_as_the_same_numbers_in_float32():
    w = weight().bfloat16()
    for scheme in (Scheme(4, 32), Scheme(8, symmetric=False)):
        assert torch.equal(quantize(w, scheme).codes, quantize(w.float(), scheme).codes)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Scheme(1), "1 bits"),
        (lambda: Scheme(9), "9 bits"),
        (lambda: Scheme(4, 0), "groups of 0"),
        (lambda: Scheme(4, -2), "groups of -2"),
        (lambda: Scheme(8, codes="nf4"), "nf4"),
        (lambda: Scheme(4, codes="fp5"), "fp5"),
        (lambda: quantize(torch.ones(3), Scheme(4)), r"shape \[3\]"),
        (lambda: quantize(torch.ones(3, 3, dtype=torch.int8), Scheme(4)), "int8"),
        (lambda: quantize(torch.tensor([[1.0, torch.inf]]), Scheme(4)), r"inf at \[0, 1\]"),
        (lambda: quantize(torch.tensor([[torch.nan, 1.0]]), Scheme(4, symmetric=False)), r"nan at \[0, 0\]"),
    ],
)
def test_what_cannot_be_quantized_is_refused_with_the_numbers(make, says):
    with pytest.raises(ShapeError, match=says):
        make()
