"""The ablation ladder: the engine with one optimisation more on each rung, all measured alike.

Notebook 00 climbs it on the reader's machine; `llmcourse bench engine_start` records it. A chapter
that brings a new optimisation adds its rung to `RUNGS` and nothing else.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch

from llmcourse.engine import LLM, SamplingParams
from llmcourse.engine.timing import dollars_per_million_tokens
from llmcourse.models import Transformer, load
from llmcourse.notebook import Table
from llmcourse.text.tokenizer import Tokenizer

QUESTION = "Explain in two sentences why reading a book is slower than remembering it."


@dataclass(frozen=True)
class Rung:
    """One more optimisation. `switches` are `LLM`'s constructor arguments, `batch` the prompts at once,
    `needs` the only device that has it (cpu or cuda; empty: both).

    The switches of a rung include those of the rungs below it (see `ladder`).
    """

    name: str
    chapter: str
    switches: dict[str, Any] = field(default_factory=dict)
    batch: int = 1
    needs: str = ""


RUNGS: tuple[Rung, ...] = (
    Rung("naive: whole prefix every token", "07", {
        "dtype": "float32", "kv_cache": False, "fused": False, "packed": False, "cuda_graphs": False,
    }),
    Rung("+ KV cache", "18", {"kv_cache": True}),
    Rung("+ bfloat16 weights", "12", {"dtype": "bfloat16"}),
    Rung("+ fused projections", "05", {"fused": True}),
    Rung("+ packed weights", "04", {"packed": True}, needs="cpu"),
    Rung("+ CUDA graphs", "06", {"cuda_graphs": True}, needs="cuda"),
    Rung("+ batch of 8", "20", {}, batch=8),
)  # fmt: skip


@dataclass
class Row:
    """What one rung did. Times are medians over the rounds.

    ttft_ms      time to first token           tpot_ms   time per step after it
    tokens_per_s throughput of the whole batch, prefill included
    bytes        weights plus KV cache at the end of the answer
    same_tokens  leading tokens equal to the naive rung's, of `new_tokens`
    bytes_per_s  memory traffic of decode: weights and cache are read once a step
    """

    name: str
    chapter: str
    batch: int
    ttft_ms: float
    tpot_ms: float
    tokens_per_s: float
    bytes: int
    bytes_per_s: float
    new_tokens: int
    same_tokens: int
    rounds: int


def ladder(device: str, rungs: Sequence[Rung] = RUNGS) -> list[tuple[Rung, dict[str, Any]]]:
    """Each rung that this device can run, with its own and all lower rungs' switches."""
    switches: dict[str, Any] = {}
    steps = []
    for rung in rungs:
        switches = switches | rung.switches
        if rung.needs in ("", device):
            steps.append((rung, dict(switches)))
    return steps


def climb(
    device: str,
    *,
    model: tuple[Transformer, Tokenizer] | None = None,
    new_tokens: int = 16,
    rounds: int = 3,
    rungs: Sequence[Rung] = RUNGS,
    progress: Callable[[str], object] = lambda text: None,
) -> list[Row]:
    """Measure every rung on the same prompt: one warm-up, then `rounds` rounds in which rungs take turns.

    model   a float32 model and its tokenizer on `device`; None loads the course's own
    """
    loaded = {"float32": model or load(device=device, dtype="float32")}
    engines = []
    for rung, switches in ladder(device, rungs):
        kind = switches.pop("dtype")
        if kind not in loaded:
            original, tokenizer = loaded["float32"]
            loaded[kind] = (deepcopy(original).to(getattr(torch, kind)), tokenizer)
        engines.append((rung, LLM(loaded[kind], **switches)))
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    tokens: dict[str, list[int]] = {}
    timings: dict[str, list[Any]] = {rung.name: [] for rung, _ in engines}
    for turn in range(rounds + 1):
        for rung, llm in engines:
            progress(f"round {turn} of {rounds}: {rung.name}")
            prompts = [llm.tokenizer.chat(QUESTION)] * rung.batch
            done = llm.generate(prompts, params)
            tokens[rung.name] = done[0].tokens
            if turn:
                timings[rung.name].append(done[0].timing)
    naive = tokens[engines[0][0].name]
    return [_row(rung, llm, timings[rung.name], tokens[rung.name], naive) for rung, llm in engines]


def _row(rung: Rung, llm: LLM, timings: list[Any], tokens: list[int], naive: list[int]) -> Row:
    prompt = timings[0].prompt_tokens // rung.batch
    itemsize = llm.model.dtype.itemsize
    kv = (prompt + len(tokens)) * rung.batch * llm.model.config.kv_bytes_per_token(itemsize)
    tpot = statistics.median(t.tpot for t in timings)
    total = llm.model.weight_bytes + kv * llm.kv_cache
    same = next((i for i, (a, b) in enumerate(zip(tokens, naive, strict=True)) if a != b), len(tokens))
    return Row(
        name=rung.name,
        chapter=rung.chapter,
        batch=rung.batch,
        ttft_ms=statistics.median(t.ttft for t in timings) * 1e3,
        tpot_ms=tpot * 1e3,
        tokens_per_s=statistics.median(t.throughput for t in timings),
        bytes=total,
        bytes_per_s=total / tpot,
        new_tokens=len(tokens),
        same_tokens=same,
        rounds=len(timings),
    )


def table(rows: Sequence[Mapping[str, Any]], dollars_per_hour: float, *, note: str = "") -> Table:
    """The rows of a ladder, live (`asdict(row)`) or recorded, for a reader."""
    heads = ["optimisation", "chapter", "TTFT ms", "TPOT ms", "tokens/s", "MB", "GB/s", "$/M", "same tokens"]
    lines = [
        [
            row["name"],
            row["chapter"],
            f"{row['ttft_ms']:.0f}",
            f"{row['tpot_ms']:.1f}",
            f"{row['tokens_per_s']:.1f}",
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['bytes_per_s'] / 1e9:.0f}",
            f"{dollars_per_million_tokens(row['tokens_per_s'], dollars_per_hour):.2f}",
            f"{row['same_tokens']} of {row['new_tokens']}",
        ]
        for row in rows
    ]
    return Table(heads, lines, note=note)
