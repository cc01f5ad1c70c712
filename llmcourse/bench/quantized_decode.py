"""The real model's decode step with weights of 16, 8 and 4 bits, through the engine, one prompt.

A step reads every weight once, so it should take as long as the weights' bytes do. The rungs take turns in
rounds on the same prompt; of each the median and the best round are kept. The best round is what the
processor can do: on a machine that others use as well, everything else is what they did to it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from llmcourse.compress.quantize import Scheme, quantize
from llmcourse.compress.quantized_linear import How, QuantizedLinear, quantize_model
from llmcourse.engine import LLM, SamplingParams
from llmcourse.models import Transformer, load
from llmcourse.text.tokenizer import Tokenizer

QUESTION = "Explain in two sentences why reading a book is slower than remembering it."
SCHEMES: dict[str, Scheme | None] = {"bf16": None, "INT8": Scheme(8), "INT4 g64": Scheme(4, 64)}
HEAD = Scheme(8)  # 4 bits cost the head more than they gain: it is a fifth of what a step reads


def smaller(model: Transformer, scheme: Scheme | None) -> Transformer:
    """The model with its layers in a scheme and its head in 8 bits."""
    if scheme is None:
        return model
    how: How = lambda name, layer: quantize(layer.weight, HEAD if name == "head" else scheme)  # noqa: E731
    changed = quantize_model(model, how, skip=())
    assert isinstance(changed, Transformer)
    return changed


def step_bytes(model: Transformer) -> int:
    """Bytes of weights that a decode step reads; of an embedding that is not the head too, one row."""
    alone = isinstance(model.head, QuantizedLinear) or model.head.weight is not model.embedding.weight
    return model.weight_bytes - alone * model.embedding.weight.nbytes


def measure(
    models: Mapping[str, Transformer],
    tokenizer: Tokenizer,
    *,
    new_tokens: int = 32,
    rounds: int = 5,
    clock: Callable[[LLM, SamplingParams], float] | None = None,
) -> list[dict[str, Any]]:
    """A row for each model: bytes a step, milliseconds a step, and how it compares with the first.

    clock   seconds a step of an engine takes (for tests); None: measured
    """
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    engines = {name: LLM((model, tokenizer)) for name, model in models.items()}
    prompt = tokenizer.chat(QUESTION)

    def timed(llm: LLM, params: SamplingParams) -> float:
        return float(llm.generate([prompt], params)[0].timing.tpot)

    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, llm in engines.items():
            seconds = (clock or timed)(llm, params)
            if turn:  # the first warms up: weights are rearranged, graphs captured
                times[name].append(seconds)
    first = next(iter(models))
    rows = []
    for name, model in models.items():
        best, median = min(times[name]), statistics.median(times[name])
        rows.append(
            {
                "name": name,
                "step_bytes": step_bytes(model),
                "tpot_ms": median * 1e3,
                "best_tpot_ms": best * 1e3,
                "tokens_per_s": 1 / median,
                "bytes_per_s": step_bytes(model) / median,
                "speedup": statistics.median(times[first]) / median,
                "best_speedup": min(times[first]) / best,
                "bytes_saved": step_bytes(models[first]) / step_bytes(model),
            }
        )
    return rows


def run(device: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows and notes for `llmcourse bench quantized_decode`. About a minute."""
    model, tokenizer = load(device=device, dtype="bfloat16")
    models = {name: smaller(model, scheme) for name, scheme in SCHEMES.items()}
    rows = measure(models, tokenizer, new_tokens=64 if device == "cuda" else 32)
    notes = [
        "speedup is against bf16; bytes_saved is the most it could be if a step only read weights",
        "quantized rungs have their head in INT8 with a scale a row; the embedding stays bfloat16",
    ]
    return rows, notes
