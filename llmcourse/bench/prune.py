"""Benchmark `prune`: perplexity of the real model against the share of weights that are gone.

    llmcourse bench prune --device cuda --out llmcourse/bench/records

unstructured   magnitude, Wanda and SparseGPT from 10 % to 80 %
2:4, 4:8       the same methods in patterns that hardware could use
structured     fewer neurons and heads, with and without a fit of what is left: smaller dense models, with the
               seconds that they read a text in
Perplexity is of plays that calibration did not read. On a CPU: half of the first blocks, and short texts.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import Tensor

from llmcourse.compress.masks import Pattern
from llmcourse.compress.prune import METHODS, prune
from llmcourse.compress.structured import linear_parameters, shrink
from llmcourse.models import load
from llmcourse.models.perplexity import perplexity
from llmcourse.models.transformer import Transformer
from llmcourse.text.tokenizer import Tokenizer

Row = dict[str, Any]
CALIBRATION, TEST = (0, 10, 20, 35), (5, 15, 30)  # plays, by their place in the alphabet of paths


def pieces(tokenizer: Tokenizer, plays: tuple[int, ...], *, count: int, length: int) -> Tensor:
    """Stretches of the plays in turn, past their cast lists: token ids [count, length]."""
    from llmcourse.assets import play_paths

    paths = play_paths()
    each = -(-count // len(plays))
    found: list[Tensor] = []
    for play in plays:
        lines = (line.rstrip() for line in paths[play].read_text().splitlines())
        ids = tokenizer.encode("\n".join(lines)[: 16 * (each * length + 600)])[600 : 600 + each * length]
        found.append(torch.tensor(ids).view(each, length))
    return torch.stack(found, 1).flatten(0, 1)[:count]


def unstructured_rows(
    model: Transformer,
    calibration: Tensor,
    test: Tensor,
    sparsities: tuple[float, ...],
    *,
    first: int | None = None,
    rows_at_once: int = 1,
) -> list[Row]:
    """Each method at each share, and in the patterns of groups; "wanda+move" at one half only."""
    patterns = [Pattern(s) for s in sparsities] + [Pattern(n=2, m=4), Pattern(n=4, m=8)]
    rows = []
    for pattern in patterns[:-1] if first else patterns:
        for method in METHODS:
            if method == "wanda+move" and (first or pattern.sparsity != 0.5):
                continue
            pruned = copy.deepcopy(model)
            text = None if method == "magnitude" else calibration
            done = prune(pruned, method, pattern, text, first=first, rows=rows_at_once)
            row = {
                "kind": "pattern" if pattern.m else "unstructured",
                "method": method,
                "pattern": str(pattern),
                "sparsity": done.sparsity,
                "perplexity": perplexity(pruned, test),
                "seconds": done.seconds,
            }
            print(f"{method} {pattern}: {row['perplexity']:.1f}, {done.seconds:.0f} s", flush=True)
            rows.append(row)
            del pruned
    return rows


def structured_rows(
    model: Transformer, calibration: Tensor, test: Tensor, shares: tuple[float, ...]
) -> list[Row]:
    """Models with fewer neurons, or one key/value head (and its queries) less."""
    config, full = model.config, linear_parameters(model)
    cuts: list[tuple[str, dict[str, int]]] = [
        (f"{share:.0%} of the neurons", {"d_ff": 32 * round(config.d_ff * share / 32)}) for share in shares
    ]
    cuts.append(
        (f"{config.n_kv_heads - 1} of {config.n_kv_heads} heads", {"n_kv_heads": config.n_kv_heads - 1})
    )
    rows: list[Row] = []
    for name, sizes in cuts:
        for fit in (False, True):
            smaller = shrink(model, calibration, fit=fit, **sizes)
            rows.append(
                {
                    "kind": "structured",
                    "name": name,
                    "fit": fit,
                    "sparsity": 1 - linear_parameters(smaller) / full,
                    "perplexity": perplexity(smaller, test),
                    "read_seconds": read_seconds(smaller, test),
                }
            )
            print(f"{name}, {'fitted' if fit else 'as they are'}: {rows[-1]['perplexity']:.1f}", flush=True)
    return rows


@torch.inference_mode()
def read_seconds(model: Transformer, tokens: Tensor) -> float:
    """Seconds in which the model reads tokens, the better of two."""
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        model(tokens, last_only=True)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def run(device: str) -> tuple[list[Row], list[str]]:
    """All of it on a GPU (about five minutes); on a CPU one half of the first blocks, and short texts."""
    small = device == "cpu"
    model, tokenizer = load(device=device, dtype="float32")
    length, read, held = (256, 4, 3) if small else (1024, 64, 24)
    calibration = pieces(tokenizer, CALIBRATION, count=read, length=length).to(model.device)
    test = pieces(tokenizer, TEST, count=held, length=length).to(model.device)
    shares = (0.5,) if small else (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    first, at_once = (4, 1) if small else (None, 8)
    rows: list[Row] = [
        {"kind": "dense", "perplexity": perplexity(model, test), "read_seconds": read_seconds(model, test)}
    ]
    rows += unstructured_rows(model, calibration, test, shares, first=first, rows_at_once=at_once)
    rows += structured_rows(model, calibration, test, (0.75,) if small else (0.875, 0.75, 0.5))
    return rows, [
        f"SmolLM2-135M-Instruct in float32; calibrated on {calibration.numel():,} tokens of four plays",
        f"perplexity of {test.numel():,} tokens of three other plays, in stretches of {length}",
        "embedding and head, which are one table, are not pruned; nothing is trained",
        f"blocks pruned without structure: {first or 'all'}",
    ]
