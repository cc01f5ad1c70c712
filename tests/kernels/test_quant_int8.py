"""Products of int8 with int8: exact sums, rows quantized as the reference does it, integer tensor cores."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from against_float64 import refused
from quant_compiled import run

from llmcourse.errors import ShapeError
from llmcourse.kernels.checks import DtypeError
from llmcourse.kernels.compile_report import compile_report
from llmcourse.kernels.quant_int8 import (
    LONGEST,
    TILES,
    Int8Plan,
    int8_kernel,
    int8_matmul,
    launch_of,
    pick,
    quantize_rows,
    quantize_rows_kernel,
)

ODD = [(1, 1, 1), (5, 33, 70), (40, 17, 100), (33, 65, 32)]
ONE = torch.ones(1, 1)


def codes(rows, columns, seed=0):
    return torch.randint(-127, 128, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(
        torch.int8
    )


@pytest.fixture
def interpreter():
    return pytest.importorskip("llmcourse.kernels.counters")


@pytest.mark.parametrize(
    "plan", [None, Int8Plan(16, 16, 32, 4, 2, splits=3), Int8Plan(32, 32, 64, 4, 2)], ids=str
)
def test_sums_are_the_exact_integers(interpreter, plan):
    for m, n, k in ODD:
        x, w = codes(m, k), codes(n, k, 1)
        out = int8_matmul(x, w, ONE, ONE, out_dtype=torch.float32, plan=plan, backend="interpret")
        assert out.equal((x.int() @ w.int().T).float())


def test_scales_of_rows_and_columns_come_last(interpreter):
    x, w, sx, sw = (
        codes(5, 70),
        codes(9, 70, 1),
        torch.rand(5, 1),
        torch.rand(9, 1, dtype=torch.float64).bfloat16(),
    )
    exact = (x.double() @ w.double().T) * sx.double() * sw.double().T
    for backend in ("reference", "interpret"):
        for dtype, rtol in ((torch.float32, 1e-6), (torch.bfloat16, 5e-3)):
            out = int8_matmul(x, w, sx, sw, out_dtype=dtype, backend=backend)
            torch.testing.assert_close(out.double(), exact, rtol=rtol, atol=0)


def test_the_longest_sum_of_the_largest_codes_still_fits():
    x = torch.full((1, LONGEST), -127, dtype=torch.int8)
    assert int8_matmul(x, x, ONE, ONE, out_dtype=torch.float32) == 127**2 * LONGEST < 2**31


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rows_are_quantized_as_the_reference_does_it(interpreter, dtype):
    x = torch.randn(5, 5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[2], x[3, 7] = 0, 100
    for rows in (x, x[:, :77], x[:, :1]):
        for got, expected in zip(
            quantize_rows(rows, backend="interpret"), quantize_rows(rows, backend="reference"), strict=True
        ):
            assert got.equal(expected)
    q, scale = quantize_rows(x)
    assert (q.int().abs().amax(1) == torch.tensor([127, 127, 0, 127, 127])).all()
    assert ((q * scale - x.float()).abs() <= scale / 2 * 1.001).all()


def test_rows_are_read_twice_at_most_and_their_codes_written_once(interpreter):
    x = torch.randn(3, 100)
    with interpreter.counting() as counts:
        quantize_rows(x, backend="interpret")
    assert (counts.load_bytes, counts.load_unique_bytes) == (2 * x.nbytes, x.nbytes)
    assert counts.store_bytes == 3 * 100 + 3 * 4


def test_what_cannot_be_multiplied_is_refused_in_three_parts():
    x, w = codes(3, 40), codes(8, 40)
    refused(lambda: int8_matmul(x.float(), w, ONE, ONE), DtypeError, "quantize_rows")
    refused(lambda: int8_matmul(x, w[:, :39], ONE, ONE), ShapeError, "(8, 39)")
    refused(lambda: int8_matmul(x, w, ONE, torch.ones(8, 4)), ShapeError, "w_scale")
    refused(lambda: quantize_rows(torch.ones(2, 3, 4)), ShapeError, "flatten")


def test_few_rows_cut_k_and_many_do_not():
    assert pick(8, 4096, 14336).splits > 1
    assert pick(4096, 4096, 4096).splits == 1


def meta_launch(m, n, k, plan):
    x, w = (torch.empty(s, k, dtype=torch.int8, device="meta") for s in (m, n))
    scales = [torch.empty(s, 1, dtype=torch.float32, device="meta") for s in (m, n)]
    out = torch.empty(m, n, dtype=torch.bfloat16, device="meta")
    return launch_of(x, w, *scales, out, plan)


@pytest.mark.parametrize(("m", "capability"), [(1, 90), (64, 80), (512, 90), (4096, 80)])
def test_shipped_tiles_compile_without_spills_for_integer_tensor_cores(m, capability):
    _, arguments, constants = meta_launch(m, 14336, 4096, pick(m, 14336, 4096))
    made = compile_report(int8_kernel, *arguments, capabilities=(capability,), **constants)[capability]
    assert made.error is None
    assert made.spills == 0
    assert made.fits
    assert made.tensor_core_opcodes
    assert set(made.tensor_core_opcodes) <= {"IMMA", "IGMMA"}
    assert made.count("LDGSTS", "128")


def test_rows_are_quantized_without_spills():
    x, q = (torch.empty(8, 14336, dtype=d, device="meta") for d in (torch.bfloat16, torch.int8))
    scale = torch.empty(8, 1, device="meta")
    report = compile_report(
        quantize_rows_kernel, x, q, scale, 14336, 14336, BLOCK=4096, num_warps=8, capabilities=(80, 90)
    )
    assert report.spills == 0
    assert all(t.load_widths.get(128) for t in report)


def test_the_compiled_kernel_sums_exactly():
    plan = replace(TILES[16], stages=3, splits=2)
    x, w = codes(16, 512), codes(70, 512, 1)
    out = torch.full((16, 70), float("nan"))
    grid, arguments, constants = launch_of(x, w, ONE, ONE, out, plan)
    run(int8_kernel, grid, arguments, constants)
    assert out.equal((x.int() @ w.int().T).float())
