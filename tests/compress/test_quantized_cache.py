"""A KV cache in 8 bits: half the bytes, the same reading in any pieces, errors of the format's size."""

from __future__ import annotations

import pytest
import torch

from llmcourse.engine import LLM, SamplingParams
from llmcourse.errors import ShapeError, UnknownNameError
from llmcourse.models import KVCache, ModelConfig, random_model
from llmcourse.models.perplexity import perplexity
from llmcourse.models.quantized_cache import STORED, from_int8, to_fp8, to_int8

CONFIG = ModelConfig(
    vocab_size=61, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, max_len=96
)
KINDS = list(STORED)


def made(dtype="float32"):
    torch.manual_seed(2)
    model = random_model(CONFIG, dtype="float32")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return model.to(getattr(torch, dtype))


def read(model, tokens, cuts, stored):
    cache = KVCache(CONFIG, tokens.shape[0], 32, dtype=model.dtype, stored=stored)
    with torch.inference_mode():
        return torch.cat([model(part, cache) for part in tokens.split(cuts, dim=1)], dim=1)


@pytest.mark.parametrize("stored", KINDS)
@pytest.mark.parametrize("cuts", [[13], [1] * 13, [5, 1, 1, 6]], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reading_through_the_cache_differs_from_no_cache_by_the_formats_error(stored, cuts, dtype):
    model = made(dtype)
    tokens = torch.randint(0, 61, (2, 13), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact = model(tokens).float()
    error = (read(model, tokens, cuts, stored).float() - exact).square().mean().sqrt() / exact.std()
    assert error < {"int8": 0.01, "fp8": 0.06}[stored] + (0.02 if dtype == "bfloat16" else 0)
    assert error > 1e-4  # it is rounded at all


@pytest.mark.parametrize("stored", KINDS)
def test_the_pieces_of_a_prompt_do_not_matter(stored):
    model = made()
    tokens = torch.randint(0, 61, (2, 13))
    whole = read(model, tokens, [13], stored)
    torch.testing.assert_close(read(model, tokens, [4, 1, 8], stored), whole, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("stored", KINDS)
def test_sequences_of_unequal_length_decode_as_if_alone(stored):
    model = made()
    a, b = torch.randint(0, 61, (1, 9)), torch.randint(0, 61, (1, 4))
    both = KVCache(CONFIG, 2, 32, stored=stored)
    alone = [KVCache(CONFIG, 1, 32, stored=stored) for _ in range(2)]
    with torch.inference_mode():
        for i, prompt in enumerate((a, b)):
            row = both.row(i)
            model(prompt, row)
            both.lengths[i] = row.lengths[0]
            model(prompt, alone[i])
        for _ in range(3):
            new = torch.randint(0, 61, (2, 1))
            together = model(new, both)
            apart = torch.cat([model(new[i : i + 1], alone[i]) for i in range(2)])
            torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-3)


def test_the_cache_takes_the_bytes_it_promises():
    sizes = {
        stored: KVCache(CONFIG, 3, 40, dtype=torch.bfloat16, stored=stored).nbytes
        for stored in (None, *KINDS)
    }
    numbers = 3 * 40 * 2 * CONFIG.n_layers * CONFIG.n_kv_heads
    assert sizes == {None: numbers * 8 * 2, "int8": numbers * (8 + 2), "fp8": numbers * 8}


def test_int8_errs_by_half_a_step_of_the_largest_number():
    x = torch.randn(3, 5, 64) * torch.logspace(-3, 3, 5)[:, None]
    codes, scale = to_int8(x)
    assert ((from_int8(codes, scale, torch.float32) - x).abs() <= 0.501 * scale.float()).all()
    zeros = to_int8(torch.zeros(2, 4))
    assert torch.equal(from_int8(*zeros, torch.float32), torch.zeros(2, 4))


def test_fp8_saturates_instead_of_losing_a_number():
    assert to_fp8(torch.tensor([1e4, -1e4, 448.0, 0.0])).float().tolist() == [448, -448, 448, 0]


@pytest.mark.parametrize("stored", KINDS)
def test_the_engine_answers_with_it_with_a_batch_as_alone(stored, smol):
    model = made()
    prompts = [[5], [7, 60, 3, 41, 9, 9], [1, 2, 3]]
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    llm = LLM((model, smol[1]), kv_stored=stored)
    batch = [a.tokens for a in llm.generate(prompts, params)]
    assert batch == [llm.generate([p], params)[0].tokens for p in prompts]


def test_the_real_model_says_nearly_the_same_with_it(smol):
    model, tokenizer = smol
    text = "The capital of France is Paris. It lies on the Seine, a river in the north of the country."
    tokens = torch.tensor([tokenizer.encode(text)])
    error = {}
    with torch.inference_mode():
        exact = model(tokens)
        for stored in KINDS:
            cache = KVCache(model.config, 1, 64, stored=stored)
            said = torch.cat([model(part, cache) for part in tokens.split(8, dim=1)], dim=1)
            error[stored] = ((said - exact).std() / exact.std()).item()
    assert error["int8"] < 0.05
    assert error["int8"] < error["fp8"] < 0.15
    assert perplexity(model, tokens, piece=8, stored="int8") != perplexity(model, tokens, piece=8)


def test_what_cannot_be_stored_so_is_refused():
    with pytest.raises(UnknownNameError, match="int4"):
        KVCache(CONFIG, 1, 8, stored="int4")
    linear = ModelConfig(
        vocab_size=61, d_model=32, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=0, layers=("linear",)
    )
    with pytest.raises(ShapeError, match="linear"):
        KVCache(linear, 1, 8, stored="int8")
