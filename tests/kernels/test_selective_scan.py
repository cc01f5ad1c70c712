"""The fused selective scan, interpreted: its values, its bytes, and that it compiles for every GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from llmcourse.errors import GraphError, ShapeError
from llmcourse.kernels.compile_report import compile_report
from llmcourse.kernels.counters import counting
from llmcourse.kernels.selective_scan import BLOCK, WARPS, chunk_kernel, moved_bytes, selective_scan
from llmcourse.models import ModelConfig
from llmcourse.models.ssm import SSM
from llmcourse.models.ssm import selective_scan as reference


def inputs(batch: int, tokens: int, channels: int, states: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x, dt = draw(batch, tokens, channels).to(dtype), draw(batch, tokens, channels).exp() / 4
    A = -draw(channels, states).exp()
    return x, dt, A, draw(batch, tokens, states).to(dtype), draw(batch, tokens, states).to(dtype)


@pytest.mark.parametrize(
    ("batch", "tokens", "channels", "states", "chunk"),
    [(1, 1, 1, 1, 16), (2, 37, 33, 5, 16), (1, 32, 64, 16, 16), (1, 20, 7, 3, 64), (3, 17, 32, 4, 1)],
)
def test_the_kernel_equals_the_reference_in_float64(batch, tokens, channels, states, chunk):
    given = inputs(batch, tokens, channels, states)
    h = torch.randn(batch, channels, states)
    for start in (None, h):
        exact = [t.double() for t in given], None if start is None else start.double()
        want_y, want_h = reference(*exact[0], exact[1], scan="sequential")
        y, after = selective_scan(*given, start, chunk=chunk, backend="interpret")
        assert (y.double() - want_y).abs().max() < 2e-6 * max(1, want_y.abs().max())
        assert (after.double() - want_h).abs().max() < 2e-6 * max(1, want_h.abs().max())


def test_low_precision_inputs_are_scanned_in_float32():
    given = inputs(1, 50, 8, 4, torch.bfloat16)
    want, _ = reference(*(t.double() for t in given))
    y, _ = selective_scan(*given, chunk=16, backend="interpret")
    assert y.dtype == torch.bfloat16
    assert (y.double() - want).abs().max() < 2**-7 * want.abs().max()


def test_the_launches_move_the_bytes_that_the_formula_says():
    given = inputs(2, 40, 48, 8)
    with counting() as seen:
        selective_scan(*given, chunk=16)
    assert len(seen) == 2
    assert seen.unique_bytes == moved_bytes(2, 40, 48, 8, 4, chunk=16)


def test_a_layer_on_the_kernel_gives_the_same_numbers():
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=2, d_model=12, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=12, d_ff=0)
    layer, x = SSM(config), torch.randn(2, 20, 12)
    with torch.inference_mode():
        want = layer(x, None, None)
        layer.scan = "fused"
        with counting() as seen:
            torch.testing.assert_close(layer(x, None, None), want, atol=1e-5, rtol=1e-5)
    assert len(seen) == 2


def test_a_step_size_for_another_number_of_tokens_is_refused():
    x, dt, *rest = inputs(1, 8, 4, 2)
    with pytest.raises(ShapeError, match="dt"):
        selective_scan(x, dt[:, :7], *rest)


def test_rates_or_a_start_of_other_sizes_are_refused():
    x, dt, A, B, C = inputs(2, 8, 4, 3)
    for other in (A[:3], A[:, :2], A[0]):  # a kernel would read on into other memory
        with pytest.raises(ShapeError, match="A"):
            selective_scan(x, dt, other, B, C, backend="interpret")
    with pytest.raises(ShapeError, match="h has shape"):
        selective_scan(x, dt, A, B, C, torch.zeros(1, 4, 3), backend="interpret")
    with pytest.raises(ShapeError, match="chunk 0"):
        selective_scan(x, dt, A, B, C, chunk=0, backend="interpret")


def test_a_gradient_that_the_kernel_cannot_give_is_refused():
    x, *rest = inputs(1, 8, 4, 2)
    x.requires_grad_()
    with pytest.raises(GraphError, match="fused scan"):
        selective_scan(x, *rest, backend="interpret")
    with torch.no_grad():
        selective_scan(x, *rest, backend="interpret")
    assert selective_scan(x, *rest, backend="reference")[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_cpu_a_fused_layer_of_low_precision_is_the_other_scans(dtype):
    torch.manual_seed(1)
    config = ModelConfig(vocab_size=2, d_model=12, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=12, d_ff=0)
    layer, x = SSM(config).to(dtype), torch.randn(2, 20, 12).to(dtype)
    with torch.inference_mode():
        want = layer(x, None, None)
        layer.scan = "fused"
        torch.testing.assert_close(layer(x, None, None), want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("write", [False, True])
def test_the_kernel_compiles_for_every_gpu_without_spilling(write):
    x = torch.empty(1, 4096, 2048, dtype=torch.bfloat16, device="meta")
    few = torch.empty(1, 4096, 16, dtype=torch.bfloat16, device="meta")
    wide = torch.empty(1, 16, 2048, 16, device="meta")
    report = compile_report(
        chunk_kernel,
        *(x, x.float(), wide[0, 0], few, few, wide, x, wide, wide[..., 0], 4096, 2048, 256),
        STATES=16, N=16, BLOCK=BLOCK, WRITE=write, num_warps=WARPS,
    )  # fmt: skip
    for target in report.targets:
        assert target.spills == 0, target
