"""Benchmark `subquadratic`: one layer of each kind against length, decoding against context, and recall.

    llmcourse bench subquadratic --device cuda --out llmcourse/bench/records

Each layer is timed whole, projections included, as a model runs it: forward, one sequence, no gradient. Its
rows say also what it had to compute, by the formulas of the layers. A crossover is where a layer becomes
faster than attention and stays so, interpolated between the lengths that were timed.

On a GPU recall is trained at full size on three seeds. On a CPU the layers are narrow, the lengths short and
recall small, so that the benchmark ends in a minute or two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcourse.bench.timing import measure
from llmcourse.engine.cuda_graph import GraphDecoder
from llmcourse.models import HyenaSizes, KVCache, ModelConfig, Transformer
from llmcourse.models.mixers import MIXERS
from llmcourse.models.step import Step
from llmcourse.train.recall import Recall, train_recall

if TYPE_CHECKING:
    from llmcourse.bench.records import Record
    from llmcourse.notebook import Table

KINDS = ("attention", "linear", "ssm", "hyena", "modal")
"""Layers that are compared; "modal" is a Hyena layer with a modal filter."""
FUSED = "ssm fused"
"""The SSM layer on the kernel of `llmcourse.kernels.selective_scan`; compared on a GPU."""
STRIPES = {
    "convolution": ("hyena", "hyena"),
    "hybrid": ("hyena", "attention"),
    "linear": ("hyena", "linear"),
    "ssm": ("ssm", "ssm"),
    "attention": ("attention", "attention"),
}
"""Stacks that learn recall."""
FULL_TASK, FULL = Recall(32, 64, 64), {"width": 64, "steps": 600, "batch": 64, "lr": 5e-3}
"""Recall at full size, and how it is trained."""


def layer_config(kind: str, *, width: int, max_len: int, layers: int = 1) -> ModelConfig:
    """Layers of one kind, E = width, heads of 64 features, no positions and no feed-forward part."""
    heads = max(1, width // 64)
    return ModelConfig(
        vocab_size=2,
        d_model=width,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=width // heads,
        d_ff=0,
        max_len=max_len,
        position="none",
        layers=({"modal": "hyena", FUSED: "ssm"}.get(kind, kind),) * layers,
        hyena=HyenaSizes("modal" if kind == "modal" else "implicit"),
    )


def layer_flops(kind: str, config: ModelConfig, tokens: int) -> int:
    """Multiplications and additions of one layer over `tokens` tokens, projections included."""
    if kind != "attention":
        return MIXERS[config.kinds[0]].flops(config, tokens)
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    projections = 2 * tokens * config.d_model * (2 * q + 2 * kv)
    pairs = tokens * (tokens + 1) // 2
    return projections + 2 * 2 * pairs * q  # scores, and the weighted sum of values


def whole(tokens: int, device: torch.device | str) -> Step:
    """The step of one sequence read from its start."""
    positions = torch.arange(tokens, device=device).expand(1, -1)
    return Step(positions, start=0, span=tokens, causal=tokens > 1)


def reader(kind: str, tokens: int, *, width: int, dtype: torch.dtype, device: str) -> Callable[[], Tensor]:
    """A call that runs one layer over one sequence."""
    config = layer_config(kind, width=width, max_len=tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer: Any = MIXERS[config.kinds[0]](config).to(device, dtype).requires_grad_(False)
        x = torch.randn(1, tokens, width).to(device, dtype)
    if kind in ("ssm", FUSED) and device == "cuda":
        layer.scan = "fused" if kind == FUSED else "parallel"
    step = whole(tokens, device)
    return lambda: layer(x, step, None)


def time_layers(
    lengths: Sequence[int],
    *,
    width: int,
    kinds: Sequence[str] = KINDS,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """A row for each layer and length: milliseconds (median, 10th and 90th percentile) and FLOPs."""
    rows = []
    for tokens in lengths:
        calls = {kind: reader(kind, tokens, width=width, dtype=dtype, device=device) for kind in kinds}
        samples = measure(calls, device=device, warmup=1, graph=False)
        for kind, sample in samples.items():
            config = layer_config(kind, width=width, max_len=tokens)
            rows.append(
                {
                    "name": kind,
                    "kind": "layer",
                    "dtype": str(dtype).removeprefix("torch."),
                    "width": width,
                    "tokens": tokens,
                    "ms": sample.median * 1e3,
                    "low_ms": sample.low * 1e3,
                    "high_ms": sample.high * 1e3,
                    "flops": layer_flops(kind, config, tokens),
                }
            )
    return rows


def crossover(lengths: Sequence[int], slow: Sequence[float], fast: Sequence[float]) -> float | None:
    """The length from which on `fast` costs less than `slow`, or None if it does not at the last length.

    Between two lengths both costs are taken as powers of the length: straight lines on logarithmic axes.
    Equals the first length when `fast` is ahead from there.
    """
    gaps = [math.log(s / f) for s, f in zip(slow, fast, strict=True)]
    if gaps[-1] <= 0:
        return None
    at = next((i for i in range(len(gaps) - 1, -1, -1) if gaps[i] <= 0), None)
    if at is None:
        return float(lengths[0])
    share = -gaps[at] / (gaps[at + 1] - gaps[at])
    return math.exp((1 - share) * math.log(lengths[at]) + share * math.log(lengths[at + 1]))


def crossovers(rows: Sequence[dict[str, Any]], column: str = "ms") -> dict[str, float | None]:
    """For each layer in `time_layers`' rows (of one dtype) the length from which on it beats attention."""
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        series.setdefault(row["name"], []).append((row["tokens"], row[column]))
    lengths = [tokens for tokens, _ in series["attention"]]
    costs = {name: [cost for _, cost in points] for name, points in series.items()}
    return {
        name: crossover(lengths, costs["attention"], cost)
        for name, cost in costs.items()
        if name != "attention"
    }


def time_decode(
    contexts: Sequence[int],
    *,
    width: int,
    layers: int,
    kinds: Sequence[str] = KINDS,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """A row for each kind and context: milliseconds for one sequence's next token, and bytes of state.

    The state is left empty but for its length: what it holds does not change the time. On a GPU the step is a
    CUDA graph: launched one by one, its kernels would take as long to launch at any context.
    """
    graph = device == "cuda"
    rows = []
    for context in contexts:
        calls: dict[str, Callable[[], object]] = {}
        sizes = {}
        for kind in kinds:
            config = layer_config(kind, width=width, max_len=context + 1, layers=layers)
            model = Transformer(config).to(device, dtype).requires_grad_(False)
            cache = KVCache(config, 1, context + 1, dtype=dtype, device=device)
            calls[kind] = (_captured_token if graph else _next_token)(model, cache, context)
            sizes[kind] = cache.nbytes
        for kind, sample in measure(calls, device=device, warmup=2, graph=graph).items():
            rows.append(
                {
                    "name": kind,
                    "kind": "decode",
                    "dtype": str(dtype).removeprefix("torch."),
                    "width": width,
                    "layers": layers,
                    "context": context,
                    "ms": sample.median * 1e3,
                    "graph": sample.graph,
                    "state_bytes": sizes[kind],
                }
            )
    return rows


def _next_token(model: Transformer, cache: KVCache, context: int) -> Callable[[], object]:
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)

    def call() -> Tensor:
        cache.lengths = [context]
        return model(token, cache)

    return call


def _captured_token(model: Transformer, cache: KVCache, context: int) -> Callable[[], object]:
    """The same by a step that `measure` can capture: its position is read from the GPU."""
    decoder = GraphDecoder(model, cache)
    decoder.positions.fill_(context)
    return lambda: decoder.step(context + 1)


def table_of(record: Record) -> Table:
    """Of a GPU's record: where each layer becomes cheaper than attention, and times at the longest length."""
    from llmcourse.notebook import Table

    found = {
        kind: [r for r in record.results if r["kind"] == kind] for kind in ("layer", "crossover", "decode")
    }
    tokens, context = max(r["tokens"] for r in found["layer"]), max(r["context"] for r in found["decode"])
    begins = {(r["name"], r["dtype"]): r["tokens"] or "never" for r in found["crossover"]}
    ms = {(r["name"], r["dtype"]): r["ms"] for r in found["layer"] if r["tokens"] == tokens}
    after = {r["name"]: r["ms"] for r in found["decode"] if r["context"] == context}
    types = tuple(dict.fromkeys(dtype for _, dtype in ms))
    rows = [
        (
            name,
            *(begins.get((name, t), "–") for t in types),
            *(ms[name, t] for t in types),
            after.get(name, "–"),
        )
        for name in dict.fromkeys(name for name, _ in ms)
    ]
    heads = ["layer", *(f"cheaper than attention from, {t}" for t in types)]
    heads += [
        *(f"ms for {tokens:,} tokens, {t}" for t in types),
        f"ms for a token after {context:,}, 8 layers",
    ]
    return Table(heads, rows, record.caption)


def recall_rows(
    task: Recall,
    *,
    stacks: Sequence[str] = tuple(STRIPES),
    seeds: Sequence[int] = (0, 1, 2),
    device: str = "cpu",
    **settings: Any,
) -> list[dict[str, Any]]:
    """A row for each stack and seed: the accuracy on unseen sequences after training."""
    rows = []
    for name in stacks:
        for seed in seeds:
            run = train_recall(STRIPES[name], task, seed=seed, device=device, **settings)
            rows.append(
                {
                    "name": name,
                    "kind": "recall",
                    "layers": "+".join(STRIPES[name]),
                    "pairs": task.pairs,
                    "seed": seed,
                    "accuracy": run.accuracy,
                    "loss": sum(run.curve[-20:]) / 20,
                    "parameters": run.model.config.n_params,
                    **settings,
                }
            )
    return rows


def run(device: str) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows and notes, for `llmcourse bench`."""
    gpu = device == "cuda"
    width, lengths = (1024, [1024 << i for i in range(7)]) if gpu else (128, [256 << i for i in range(4)])
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for dtype in (torch.bfloat16, torch.float32) if gpu else (torch.float32,):
            kinds = (*KINDS, FUSED) if gpu else KINDS
            timed = time_layers(lengths, width=width, kinds=kinds, dtype=dtype, device=device)
            rows += timed
            for name, tokens in crossovers(timed).items():
                kind = {"kind": "crossover", "dtype": timed[0]["dtype"], "width": width}
                rows.append({"name": name, **kind, "tokens": tokens and round(tokens)})
        contexts = [1024, 8192, 65536] if gpu else [256, 2048]
        decode_dtype = torch.bfloat16 if gpu else torch.float32
        rows += time_decode(contexts, width=width, layers=8 if gpu else 2, dtype=decode_dtype, device=device)
    task, settings = (FULL_TASK, FULL) if gpu else (Recall(16, 32, 32), {"steps": 200})
    rows += recall_rows(task, device=device, **settings)
    return rows, [
        f"Layers: one sequence, forward without gradient, E = {width}, heads of 64; whole layers.",
        "Attention is PyTorch's scaled_dot_product_attention; the others are made of PyTorch operations, "
        "the SSM's scan in log-depth rounds over chunks of 256 tokens on a GPU, token by token on a CPU. "
        f"{FUSED!r} scans in this course's Triton kernel, which keeps the states in registers.",
        "Decode: one sequence's next token through the whole stack, on a GPU by a CUDA graph.",
        "A crossover of None: attention was faster at the longest length.",
    ]
