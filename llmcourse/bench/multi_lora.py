"""Benchmark `multi_lora`: 1 to 64 adapters in one decode batch, grouped, in a loop, gathered, and by peft.

    llmcourse bench multi_lora --device cuda --out llmcourse/bench/records

The layers of an 8B Llama (width 4096, 8 key/value heads, inner width 14336), 64 rows, rank 16, bfloat16.
Row i has adapter i modulo G.

layer    microseconds of each way to add the corrections, and of the frozen product, for G = 1 … 64; cold L2,
         CUDA graphs for all. bytes: what has to move at least (each adapter once)
eager    the same without graphs, which peft's layer cannot be captured in: launches and host included
step     a decode step of the whole model (32 layers, 64 sequences, 1024 tokens of cache) in a CUDA graph,
         without adapters and with them on q, v (peft's default for Llama), on attention, and everywhere
prefill  8 prompts of 256 tokens, each with its own adapter: stretches on tensor cores, against a loop
sweep    plans of the two kernels, the best first

On a CPU small sizes, through the torch reference: a check that it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from llmcourse.bench.records import recorded
from llmcourse.bench.timing import Sample, measure
from llmcourse.errors import UnknownNameError
from llmcourse.finetune.lora import PLACES, LoRA, attach
from llmcourse.finetune.serve import MultiLoRALinear, Rows
from llmcourse.kernels import multi_lora as ml
from llmcourse.kernels.multi_lora_segments import multi_lora_segments
from llmcourse.models import KVCache, ModelConfig, Transformer, random_model
from llmcourse.notebook import Table

Row = dict[str, Any]
LLAMA_8B = ModelConfig(
    128256,
    4096,
    32,
    32,
    8,
    128,
    14336,
    max_len=8192,
    rope_theta=5e5,
    tie_embeddings=False,
    name="Llama-3.1-8B",
)
TINY = ModelConfig(256, 64, 2, 4, 2, 16, 96, max_len=128, name="tiny")
Parts = tuple[tuple[int, int], ...]


def layers_of(c: ModelConfig) -> dict[str, tuple[int, Parts]]:
    """Features in, and the columns of each projection stacked in the layer."""
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    return {
        "qkv": (c.d_model, ((0, q), (q, q + kv), (q + kv, q + 2 * kv))),
        "q and v": (c.d_model, ((0, q), (q + kv, q + 2 * kv))),
        "out": (q, ((0, c.d_model),)),
        "gate_up": (c.d_model, ((0, c.d_ff), (c.d_ff, 2 * c.d_ff))),
        "down": (c.d_ff, ((0, c.d_model),)),
    }


def run(device: str) -> tuple[list[Row], list[str]]:
    """All rows, and what a reader must know to use them."""
    gpu = device == "cuda"
    config, n, rank = (LLAMA_8B, 64, 16) if gpu else (TINY, 8, 4)
    counts = (1, 2, 4, 8, 16, 32, 64) if gpu else (1, 8)
    torch.manual_seed(0)
    copy = copy_rate(device)
    rows = []
    for name, (features, parts) in layers_of(config).items():
        bank = random_bank(n, features, parts, rank, device)
        rows.append(error_row(name, bank, n, device))
        for count in counts:
            rows.append(layer_row(name, bank, n, count, device, copy))
        if gpu and name in ("qkv", "down"):
            rows += sweep_rows(name, bank, n, device)
        if gpu and name == "q and v":
            rows += [eager_row(name, bank, n, count, device) for count in (1, 8, 64)]
        if name == "qkv":
            rows.append(prefill_row(name, bank, (8, 256) if gpu else (2, 8), device))
        del bank
    rows += step_rows(config, n, rank, counts, device)
    notes = [
        f"{n} rows, rank {rank}, {'bfloat16' if gpu else 'float32'}; the shapes of {config.name}; "
        f"copy rate of this run: {copy:.3e} bytes/s.",
        "loop: rows sorted by adapter beforehand, slices and products of each. gather + bmm: `gather_bmm`.",
    ]
    if not gpu:
        notes.append("On a CPU, by the torch reference: a check that it runs.")
    return rows, notes


def random_bank(adapters: int, features: int, parts: Parts, rank: int, device: str) -> ml.Bank:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    held = sum(end - first for first, end in parts)
    a = torch.randn(adapters, len(parts), rank, features, device=device, dtype=dtype) * features**-0.5
    b = torch.randn(adapters, held, rank, device=device, dtype=dtype) * rank**-0.5
    return ml.Bank(a, b, torch.ones(adapters, device=device), parts)


def _inputs(bank: ml.Bank, n: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, bank.a.shape[3], device=bank.a.device, dtype=bank.a.dtype)
    return torch.zeros(n, bank.parts[-1][1], device=x.device, dtype=x.dtype), x


def error_row(name: str, bank: ml.Bank, n: int, device: str) -> Row:
    """The largest error of one batch against float64, in units of the largest result."""
    y, x = _inputs(bank, n)
    ids = torch.randint(-1, len(bank.scale), (n,), device=device)
    got = ml.multi_lora(y.clone(), x, ids, bank).double()
    want = torch.zeros_like(got)
    for i, g in enumerate(ids.tolist()):
        offset = 0
        for p, (first, end) in enumerate(bank.parts):
            if g >= 0:
                down = bank.a[g, p].double() @ x[i].double()
                want[i, first:end] = bank.b[g, offset : offset + end - first].double() @ down
            offset += end - first
    return {"kind": "error", "name": name, "error": float((got - want).abs().max() / want.abs().max())}


def layer_row(name: str, bank: ml.Bank, n: int, count: int, device: str, copy: float) -> Row:
    y, x = _inputs(bank, n)
    ids = torch.arange(n, device=device) % count
    weight = torch.randn(y.shape[1], x.shape[1], device=device, dtype=x.dtype)
    ways: dict[str, Callable[[], object]] = {
        "grouped": lambda: ml.multi_lora(y, x, ids, bank),
        "gather + bmm": lambda: ml.gather_bmm(y, x, ids, bank),
        "loop": loop(y, x, n, count, bank),
        "frozen product": lambda: x @ weight.T,
    }
    found = measure(ways, device=device, graph=device == "cuda")
    least = ml.minimum_bytes(n, count, bank)
    row: Row = {"kind": "layer", "name": name, "adapters": count, "rows": n, "bytes": least}
    row |= {f"{way}_us": s.median * 1e6 for way, s in found.items()}
    return (
        row
        | {"low_us": found["grouped"].low * 1e6, "high_us": found["grouped"].high * 1e6}
        | {"share_of_copy": found["grouped"].rate(least) / copy}
    )


def loop(y: Tensor, x: Tensor, n: int, count: int, bank: ml.Bank) -> Callable[[], object]:
    """Adapter after adapter, its rows a slice: the rows were sorted when the batch was made."""
    bounds = [i * n // count for i in range(count + 1)]

    def go() -> None:
        for g in range(count):
            rows, offset = slice(bounds[g], bounds[g + 1]), 0
            for p, (first, end) in enumerate(bank.parts):
                b = bank.b[g, offset : offset + end - first]
                y[rows, first:end] += (x[rows] @ bank.a[g, p].T) @ b.T
                offset += end - first

    return go


def eager_row(name: str, bank: ml.Bank, n: int, count: int, device: str) -> Row:
    """Without graphs, frozen product included: our layer, and peft's with `adapter_names`."""
    y, x = _inputs(bank, n)
    ids = torch.arange(n, device=device) % count
    weight = torch.randn(y.shape[1], x.shape[1], device=device, dtype=x.dtype)
    ways: dict[str, Callable[[], object]] = {"ours": lambda: ml.multi_lora(x @ weight.T, x, ids, bank)}
    with suppress(ImportError):  # a peer of tests and benchmarks, no part of the course
        ways["peft"] = peft_layer(x, weight, [str(i % count) for i in range(n)], bank.rank, count)
    found = measure(ways, device=device, graph=False)
    return {"kind": "eager", "name": name, "adapters": count, "rows": n} | {
        f"{way}_us": s.median * 1e6 for way, s in found.items()
    }


def peft_layer(x: Tensor, weight: Tensor, names: list[str], rank: int, count: int) -> Callable[[], object]:
    """peft's own layer over a frozen `weight`, with as many adapters, each row naming its own.

    Its adapter covers the whole layer: one A and one B as wide as y, where `q and v` has two parts.
    """
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=x.device, dtype=x.dtype)
    base.weight.data = weight
    config = LoraConfig(r=rank, lora_alpha=rank)
    layer = Linear(base, "0", config=config, r=rank, lora_alpha=rank)
    for i in range(1, count):
        layer.update_layer(str(i), rank, lora_alpha=rank, config=config)
    layer.to(device=x.device, dtype=x.dtype).eval().requires_grad_(False)
    return lambda: layer(x, adapter_names=names)


def prefill_row(name: str, bank: ml.Bank, prompts: tuple[int, int], device: str) -> Row:
    count, length = prompts
    y, x = _inputs(bank, count * length)
    lengths, adapters = [length] * count, list(range(count))
    weight = torch.randn(y.shape[1], x.shape[1], device=device, dtype=x.dtype)
    ways: dict[str, Callable[[], object]] = {
        "segments": lambda: multi_lora_segments(y, x, lengths, adapters, bank),
        "loop": loop(y, x, count * length, count, bank),
        "frozen product": lambda: x @ weight.T,
    }
    found = measure(ways, device=device, graph=False)
    return {"kind": "prefill", "name": name, "adapters": count, "rows": count * length} | {
        f"{way}_us": s.median * 1e6 for way, s in found.items()
    }


def sweep_rows(name: str, bank: ml.Bank, n: int, device: str) -> list[Row]:
    """Every plan of a small grid at n rows and at 1, timed together; the three best of each."""
    out = []
    for rows in (1, n):
        y, x = _inputs(bank, rows)
        ids, base = torch.arange(rows, device=device), ml.plan_for(rows, bank)
        plans = {base}
        for splits in (1, 2, 4, 8, 16):
            for block_k in (256, 512, 1024):
                if splits * block_k <= ml.power_of_two(x.shape[1]):
                    plans.add(base._replace(splits=splits, block_k=block_k))
        for block_m in (64, 128, 256, 512):
            for warps in (2, 4, 8):
                plans.add(base._replace(block_m=block_m, expand_warps=warps))
        ways = {p: _with_plan(y, x, ids, bank, p) for p in plans}
        names = {str(tuple(p)): p for p in plans}
        found = measure({k: ways[p] for k, p in names.items()}, device=device, graph=True)
        best = sorted(found, key=lambda k: found[k].median)
        for place in dict.fromkeys((*best[:3], str(tuple(base)))):
            plan = names[place]
            out.append(
                {
                    "kind": "sweep",
                    "name": name,
                    "rows": rows,
                    "us": found[place].median * 1e6,
                    "shipped": plan == base,
                }
                | plan._asdict()
            )
    return out


def _with_plan(y: Tensor, x: Tensor, ids: Tensor, bank: ml.Bank, plan: ml.Plan) -> Callable[[], object]:
    return lambda: ml.multi_lora(y, x, ids, bank, plan=plan)


TARGETS = {"q, v": ("q", "v"), "attention": ("q", "k", "v", "o"), "everywhere": tuple(PLACES)}


@torch.inference_mode()
def step_rows(config: ModelConfig, n: int, rank: int, counts: tuple[int, ...], device: str) -> list[Row]:
    """A decode step of the whole model, plain and with adapters."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    model = random_model(config, device=device, dtype=dtype)
    held = 1024 if device == "cuda" else 16
    cache = KVCache(config, n, held + 1, dtype=model.dtype, device=model.device)
    cache.lengths = [held] * n
    tokens = torch.zeros(n, 1, dtype=torch.long, device=device)
    step, out = model.plan(tokens, cache), []

    def once() -> Tensor:
        return model.run(tokens, step, cache)

    plain = _one(once, device)
    for name, targets in TARGETS.items():
        rows, layers, total = Rows(), {}, 0
        adapter = attach(model, LoRA(rank, rank, targets))
        adapter.remove()
        for path, layer in adapter.layers.items():
            parts = tuple((s.start, s.stop) for s in layer.rows.values())
            bank = random_bank(n, layer.A.shape[2], parts, rank, device)
            layers[path] = MultiLoRALinear(layer.base, bank, rows)
            total += bank.row_bytes
        for path, served in layers.items():
            model.set_submodule(path, served)
        for count in counts:
            rows.set([i % count for i in range(n)], device)
            found = _one(once, device)
            out.append(
                {
                    "kind": "step",
                    "name": name,
                    "adapters": count,
                    "rows": n,
                    "plain_us": plain.median * 1e6,
                    "us": found.median * 1e6,
                    "share": 1 - plain.median / found.median,
                    "adapter_bytes": total * count,
                    "weight_bytes": model_bytes(model),
                }
            )
        for path, served in layers.items():
            model.set_submodule(path, served.base)
        del layers, adapter
    return out


def model_bytes(model: Transformer) -> int:
    """Bytes of weights that a decode step reads: all but the embedding's table."""
    return model.weight_bytes - model.embedding.weight.nbytes


def _one(f: Callable[[], object], device: str) -> Sample:
    return measure({"step": f}, device=device, graph=device == "cuda")["step"]


def copy_rate(device: str) -> float:
    """Bytes read and written a second by a copy of 1 GB (16 MB on a CPU)."""
    source = torch.empty((1 << 29) if device == "cuda" else (1 << 23), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return measure({"copy": lambda: target.copy_(source)}, device=device, graph=False)["copy"].rate(
        2 * source.nbytes
    )


COLUMNS = {
    "layer": ("name", "adapters", "grouped_us", "gather + bmm_us", "loop_us", "frozen product_us"),
    "eager": ("name", "adapters", "ours_us", "peft_us"),
    "step": ("name", "adapters", "plain_us", "us", "share"),
    "prefill": ("name", "adapters", "segments_us", "loop_us", "frozen product_us"),
}


def recorded_table(kind: str, *, device: str = "H100", **match: Any) -> Table:
    """The record's rows of a kind, with the caption; where there is no record yet, a table that says so."""
    columns = COLUMNS[kind]
    try:
        record = recorded("multi_lora", device=device)
    except UnknownNameError as missing:
        return Table(columns, [], f"not recorded yet: {missing.what}")
    rows = [r for r in record.results if r["kind"] == kind and all(r[k] == v for k, v in match.items())]
    return Table(columns, [[row.get(c) for c in columns] for row in rows], record.caption)
