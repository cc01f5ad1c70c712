"""The perplexity table, on a small model: every row is there and counts what it says."""

from __future__ import annotations

import pytest
import torch
from compress_cases import small_model, some_tokens

from llmcourse.bench import quantize as bench
from llmcourse.compress.quantize import Scheme
from llmcourse.compress.quantized_linear import QuantizedLinear, quantize_model
from llmcourse.compress.text import TEST, calibration_pieces, measuring_pieces, training_text
from llmcourse.errors import ShapeError
from llmcourse.models.perplexity import perplexity
from llmcourse.train.fit import one_thread

SMALL = bench.Sizes(measured=4, calibrated=4, plays=1, steps=3, batch=2, length=16, lr=1e-3, alphas=4)


@pytest.fixture(scope="module")
def rows():
    with one_thread(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "load", lambda **options: (small_model(), None))
        patch.setattr(bench, "measuring_pieces", lambda tokenizer, count: some_tokens(count, 40, seed=1))
        patch.setattr(bench, "calibration_pieces", lambda tokenizer, count: some_tokens(count, 40, seed=2))
        patch.setattr(bench, "training_text", lambda tokenizer, plays: some_tokens(1, 500, seed=3)[0])
        yield bench.table("cpu", SMALL)[0]


def test_every_method_and_scheme_has_a_row(rows):
    names = [row["name"] for row in rows if row["kind"] == "weights"]
    assert names[0] == "bf16"
    assert len(names) == len(set(names)) == 1 + len(bench.WEIGHTS)
    assert {row["method"] for row in rows} >= {"RTN", "GPTQ", "AWQ", "QAT", "LLM.int8", "W8A8, fixed scale"}


def test_bytes_are_those_of_the_model_made_of_quantized_layers(rows):
    model = small_model()
    for scheme in (Scheme(8), Scheme(4, 64, False), Scheme(3, 64, False)):
        row = next(r for r in rows if r["method"] == "RTN" and r["scheme"] == str(scheme))
        smaller = quantize_model(model, scheme)
        codes = sum(
            b.nbytes for m in smaller.modules() if isinstance(m, QuantizedLinear) for b in m.buffers()
        )
        rest = sum(p.numel() for p in smaller.parameters())
        assert row["nbytes"] == codes + 2 * rest


def test_recovered_is_the_share_of_what_rounding_to_nearest_lost(rows):
    base = rows[0]["perplexity"]
    for row in rows:
        if "recovered" in row:
            rtn = next(r for r in rows if r["method"] == "RTN" and r["scheme"] == row["scheme"])["perplexity"]
            want = (rtn - row["perplexity"]) / (rtn - base)
            assert row["recovered"] == pytest.approx(want)


def test_perplexity_is_that_of_the_package_over_all_pieces(rows):
    model, text = small_model().to(torch.bfloat16), some_tokens(4, 40, seed=1)
    assert rows[0]["perplexity"] == pytest.approx(perplexity(model, text), rel=1e-6)


class Letters:
    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


def test_what_is_measured_is_read_by_nothing_else(monkeypatch):
    from llmcourse.assets import play_paths

    assert {p.stem for p in play_paths()} >= set(TEST)
    texts = [measuring_pieces(Letters(), 8), calibration_pieces(Letters(), 8)]
    assert [t.shape for t in texts] == [(8, 512)] * 2
    seen = ["".join(map(chr, row)) for row in texts[0].tolist()]
    trained = "".join(map(chr, training_text(Letters()).tolist()))
    calibrated = "".join(map(chr, texts[1].flatten().tolist()))
    assert not any(piece in trained or piece in calibrated for piece in seen)
    with pytest.raises(ShapeError, match="6 pieces of 4 plays"):
        measuring_pieces(Letters(), 6)
    with pytest.raises(ShapeError, match="or fewer"):
        measuring_pieces(Letters(), 40_000)
