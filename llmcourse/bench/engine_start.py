"""Benchmark `engine_start`: notebook 00's ladder, with transformers on the same weights as the peer."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

import torch

from llmcourse.bench.ceilings import copy_bandwidth
from llmcourse.bench.ladder import QUESTION, climb
from llmcourse.engine import Timing
from llmcourse.models import load
from llmcourse.models.peer import llama


def run(device: str, *, new_tokens: int = 128, rounds: int = 5) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the ladder, of the peers, and the copy ceiling they stand beside."""
    rows = [asdict(r) for r in climb(device, new_tokens=new_tokens, rounds=rounds)]
    notes = [
        "one prompt in the chat format, greedy, end-of-text ignored; times are medians over the rounds",
        "bytes_per_s = (weights + KV cache at the end) / tpot; compare with the copy row",
    ]
    try:
        rows += peers(device, new_tokens=new_tokens, rounds=rounds)
    except ImportError as missing:
        notes.append(f"no peer row: {missing}")
    copied = copy_bandwidth(device)
    return [*rows, {"name": "ceiling: copy", "bytes_per_s": copied}], notes


def peers(device: str, *, new_tokens: int, rounds: int) -> list[dict[str, Any]]:
    """transformers' `generate` in bfloat16 on the same weights: eager, at batch 1 and 8."""
    import transformers

    model, tokenizer = load(device=device, dtype="bfloat16")
    peer = llama(model)
    ids = torch.tensor([tokenizer.encode(tokenizer.chat(QUESTION))], device=device)
    rows = []
    for batch in (1, 8):
        timings = [_generate(peer, ids.expand(batch, -1), new_tokens) for _ in range(rounds + 1)][1:]
        rows.append(
            {
                "name": f"peer: transformers generate, batch {batch}",
                "version": transformers.__version__,
                "batch": batch,
                "ttft_ms": statistics.median(t.ttft for t in timings) * 1e3,
                "tpot_ms": statistics.median(t.tpot for t in timings) * 1e3,
                "tokens_per_s": statistics.median(t.throughput for t in timings),
                "new_tokens": new_tokens,
                "rounds": rounds,
            }
        )
    return rows


def _generate(peer: Any, ids: torch.Tensor, new_tokens: int) -> Timing:
    """One greedy generate call of transformers, a stamp for each step."""
    timing = Timing(ids.numel(), batch=len(ids))

    def tick(tokens: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        tokens[0, -1].item()  # waits for the device, as showing the token would
        timing.tick(len(tokens))
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    with torch.inference_mode():
        peer.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[tick],
        )
    return timing
