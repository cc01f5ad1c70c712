"""Many adapters in one batch: against float64, against the loop, and as machine code for three GPUs."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from llmcourse.errors import ShapeError
from llmcourse.kernels import multi_lora as ml
from llmcourse.kernels import multi_lora_segments as seg
from llmcourse.kernels.checks import DtypeError, StrideError
from llmcourse.kernels.compile_report import CAPABILITIES, compile_report
from llmcourse.kernels.counters import counting

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHAPES = [
    # rows, features, parts of y, rank, columns of y, adapters
    (5, 67, ((0, 33),), 3, 33, 4),
    (7, 130, ((0, 40), (57, 70), (70, 99)), 16, 99, 6),
    (1, 16, ((3, 4),), 1, 9, 1),
    (3, 1100, ((0, 300), (310, 617)), 5, 620, 2),
]


def drawn(shape: tuple[Any, ...], dtype: torch.dtype, seed: int = 0):
    rows, features, parts, rank, columns, adapters = shape
    g = torch.Generator().manual_seed(seed)
    held = sum(end - first for first, end in parts)
    pairs = [
        (
            (torch.randn(len(parts), rank, features, generator=g) / features**0.5).to(dtype),
            (torch.randn(held, rank, generator=g) / rank**0.5).to(dtype),
            0.5 + i,
        )
        for i in range(adapters)
    ]
    x = torch.randn(rows, features, generator=g).to(dtype)
    y = torch.randn(rows, columns, generator=g).to(dtype)
    ids = torch.randint(-1, adapters, (rows,), generator=g)
    return y, x, ids, ml.stack(pairs, parts)


def expected(y, x, ids, bank) -> torch.Tensor:
    """Row by row in float64."""
    out = y.double()
    for i, g in enumerate(ids.tolist()):
        offset = 0
        for p, (first, end) in enumerate(bank.parts):
            if g >= 0:
                b = bank.b[g, offset : offset + end - first].double()
                out[i, first:end] += bank.scale[g].double() * (b @ (bank.a[g, p].double() @ x[i].double()))
            offset += end - first
    return out


def agree(got: torch.Tensor, want: torch.Tensor) -> None:
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double(), want, atol=tolerance * 10, rtol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_row_gets_its_own_adapters_correction_whatever_the_plan(shape, dtype):
    y, x, ids, bank = drawn(shape, dtype)
    want = expected(y, x, ids, bank)
    agree(ml.reference(y.clone(), x, ids, bank), want)
    for plan in (None, ml.Plan(3, 16, 16), ml.Plan(2, 64, 32)):
        agree(ml.multi_lora(y.clone(), x, ids, bank, backend="interpret", plan=plan), want)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stretches_of_rows_get_their_adapters_correction(shape, dtype):
    y, x, _, bank = drawn(shape, dtype)
    last = bank.a.shape[0] - 1
    lengths, adapters = [len(x) - len(x) // 2, 0, len(x) // 2], [last, 0, -1]
    ids = torch.tensor(adapters).repeat_interleave(torch.tensor(lengths))
    want = expected(y, x, ids, bank)
    agree(seg.reference(y.clone(), x, lengths, adapters, bank), want)
    agree(seg.multi_lora_segments(y.clone(), x, lengths, adapters, bank, backend="interpret"), want)


def test_a_stretch_longer_than_a_tile_and_rows_between_others():
    y, x, _, bank = drawn((75, 40, ((0, 24),), 4, 24, 3), torch.float32)
    lengths, adapters = [1, 41, 33], [2, 0, 1]
    ids = torch.tensor(adapters).repeat_interleave(torch.tensor(lengths))
    got = seg.multi_lora_segments(y.clone(), x, lengths, adapters, bank, backend="interpret")
    agree(got, expected(y, x, ids, bank))


def test_tiles_never_reach_over_a_border_and_cover_what_has_an_adapter():
    tiles = seg.tiles_of([70, 3, 5], [1, -1, 0], 32)
    assert tiles == [(0, 32, 1), (32, 64, 1), (64, 70, 1), (73, 78, 0)]


def test_rows_and_results_may_be_slices_of_wider_tensors():
    y, x, ids, bank = drawn(SHAPES[1], torch.float32)
    wide_x, wide_y = torch.zeros(7, 150), torch.full((7, 120), 7.0)
    wide_x[:, :130], wide_y[:, :99] = x, y
    got = ml.multi_lora(wide_y[:, :99], wide_x[:, :130], ids, bank, backend="interpret")
    agree(got, expected(y, x, ids, bank))
    assert (wide_y[:, 99:] == 7).all()


def test_gathering_and_batched_products_give_the_same():
    y, x, ids, bank = drawn(SHAPES[1], torch.float32)
    ids = ids.clamp(min=0)
    agree(ml.gather_bmm(y.clone(), x, ids, bank), expected(y, x, ids, bank))


def test_two_launches_whatever_the_number_of_adapters_and_the_same_requests():
    counted = []
    for adapters in (1, 2, 6):
        y, x, _, bank = drawn((6, 96, ((0, 64),), 8, 64, 6), torch.float32)
        with counting() as counts:
            ml.multi_lora(y, x, torch.arange(6) % adapters, bank)
        counted.append((len(counts), counts.load_bytes, counts.store_bytes))
    assert counted[0] == counted[1] == counted[2]
    assert counted[0][0] == 2


def test_a_row_without_adapter_is_left_to_the_bit_and_no_rows_are_no_launch():
    y, x, _, bank = drawn(SHAPES[0], torch.bfloat16)
    none = torch.full((5,), -1)
    assert torch.equal(ml.multi_lora(y.clone(), x, none, bank, backend="interpret"), y)
    assert torch.equal(seg.multi_lora_segments(y.clone(), x, [5], [-1], bank, backend="interpret"), y)
    assert ml.multi_lora(y[:0], x[:0], none[:0], bank, backend="interpret").shape == (0, 33)


def test_adapters_of_different_ranks_are_filled_with_zeros():
    y, x, _, _ = drawn(SHAPES[0], torch.float32)
    small = (torch.randn(2, 67), torch.randn(33, 2), 2.0)
    large = (torch.randn(5, 67), torch.randn(33, 5), 0.5)
    bank, ids = ml.stack([small, large]), torch.tensor([0, 1, -1, 0, 1])
    got = ml.multi_lora(y.clone(), x, ids, bank, backend="interpret")
    a, b, s = small
    torch.testing.assert_close(got[0], y[0] + s * (b @ (a @ x[0])), atol=1e-4, rtol=1e-4)
    a, b, s = large
    torch.testing.assert_close(got[4], y[4] + s * (b @ (a @ x[4])), atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_is_refused():
    y, x, ids, bank = drawn(SHAPES[0], torch.float32)
    with pytest.raises(ShapeError, match="adapter 4 of a bank of 4"):
        ml.multi_lora(y, x, torch.tensor([0, 1, 2, 3, 4]), bank)
    with pytest.raises(ShapeError, match="ids"):
        ml.multi_lora(y, x, ids[:3], bank)
    with pytest.raises(DtypeError, match="ids"):
        ml.multi_lora(y, x, ids.float(), bank)
    with pytest.raises(ShapeError, match="x has shape"):
        ml.multi_lora(y, x[:, :5], ids, bank)
    with pytest.raises(ShapeError, match="y has shape"):
        ml.multi_lora(y[:, :5], x, ids, bank)
    with pytest.raises(StrideError):
        ml.multi_lora(y.T.contiguous().T, x, ids, bank)
    with pytest.raises(ShapeError, match="lengths"):
        seg.multi_lora_segments(y, x, [2, 2], [0, 1], bank)
    with pytest.raises(ShapeError, match="a has shape"):
        ml.Bank(bank.a, bank.b, bank.scale, ((5, 38), (0, 2)))
    with pytest.raises(DtypeError):
        ml.Bank(bank.a, bank.b.half(), bank.scale, bank.parts)


# machine code

BANKS = {
    "qkv r16": (4096, ((0, 4096), (4096, 5120), (5120, 6144)), 16),
    "down r16": (14336, ((0, 4096),), 16),
    "gate_up r64": (4096, ((0, 14336), (14336, 28672)), 64),
    "small qv r8": (576, ((0, 576), (768, 960)), 8),
}


def launches(name: str, rows: int, dtype: torch.dtype, sizes: seg.Tiles, monkeypatch: Any) -> list[Any]:
    features, parts, rank = BANKS[name]
    columns = parts[-1][1]

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    launched: list[Any] = []

    def record(kernel: Any, programs: Any, *arguments: Any, interpret: bool = False, **options: Any) -> None:
        launched.append((kernel, arguments, options))

    monkeypatch.setattr(ml, "launch", record)
    monkeypatch.setattr(seg, "launch", record)
    held = sum(end - first for first, end in parts)
    scale = meta(64, dtype=torch.float32)
    bank = ml.Bank(meta(64, len(parts), rank, features), meta(64, held, rank), scale, parts)
    y, x, ids = meta(rows, columns), meta(rows, features), meta(rows, dtype=torch.int64)
    ml.run(y, x, ids, bank, ml.plan_for(rows, bank), interpret=False)
    seg.run(y, x, meta(9, 3, dtype=torch.int32), bank, sizes, interpret=False)
    return launched


def cases():
    for i, name in enumerate(BANKS):
        for j, capability in enumerate(CAPABILITIES):
            if os.environ.get("EVERY") or (i + j) % 2 == 0:
                yield name, capability


@pytest.mark.parametrize(("name", "capability"), list(cases()), ids=str)
def test_plans_compile_without_spills_and_load_16_bytes_at_a_time(name, capability, monkeypatch):
    dtype = torch.float16 if capability < 80 else torch.bfloat16
    sizes = seg.SMALL if capability < 80 else seg.Tiles()
    for kernel, arguments, options in launches(name, 64, dtype, sizes, monkeypatch):
        target = compile_report(kernel, *arguments, capabilities=(capability,), **options)[capability]
        assert target.error is None
        assert target.spills == 0, target
        assert target.fits, f"{target.shared_bytes} bytes of shared memory"
        least = 64 if "segment" in kernel.__name__ and capability < 80 else 128  # small tiles on a T4
        wide = max(target.load_widths, default=0) >= least or target.count("LDGSTS", "128")
        assert wide, (kernel.__name__, target.load_widths)
        if "segment" in kernel.__name__:
            assert (target.tensor_cores > 0) == (capability >= 80)
