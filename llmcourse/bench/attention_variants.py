"""Benchmark `attention_variants`: what each variant of attention learns, and what its decode step costs.

    llmcourse bench attention_variants --device cuda --out llmcourse/bench/records

text        characters of Shakespeare, every variant with the same parameters, on three seeds: nats a
            character on a held-out tenth, the same stretches for all
uptraining  the multi-head model of that, its heads joined in groups by mean, first head or at random,
            before and after a twentieth of its training
decode      one attention layer of Llama's width, one new token for each sequence: time against batch and
            context

On a CPU everything is small, so that the benchmark ends within a minute: its numbers then mean little.
"""

from __future__ import annotations

import math
import multiprocessing
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from llmcourse.bench.timing import measure
from llmcourse.models import ModelConfig, Transformer
from llmcourse.models.convert_gqa import to_gqa
from llmcourse.models.mixers import MIXERS
from llmcourse.models.mla import LatentAttention, LatentState
from llmcourse.models.sizes import LatentSizes
from llmcourse.models.step import Step
from llmcourse.train.fit import build, cross_entropy, fit
from llmcourse.train.precision import tf32
from llmcourse.train.tasks import Batch, Text
from llmcourse.train.variants import Change, equal_parameters, grouped, latent, windowed

Row = dict[str, Any]
SEEDS = (0, 1, 2)
WORKERS = 8
"""Trainings at a time on a GPU."""
POOLINGS = ("mean", "first", "random")


def text_variants(head_dim: int) -> dict[str, Change]:
    """Of a base with 8 heads. A window of one token sees nobody else: the loss without attention."""
    return {
        "MHA": lambda base: base,
        "GQA, 2 heads": grouped(2),
        "MQA": grouped(1),
        f"MLA, rank {2 * head_dim}": latent(2 * head_dim, head_dim // 2),
        "window of 32": windowed(32),
        "window of 1": windowed(1),
    }


def run(device: str) -> tuple[list[Row], list[str]]:
    """All rows, and what a reader must know to use them."""
    rows = text_rows(device) + decode_rows(device)
    notes = [
        "text: held-out characters of the first four plays; variants have equal parameters, what the "
        "projections save is given to the feed-forward part; bytes are of a bf16 cache.",
        "uptraining: from the multi-head model of the same seed; steps are a twentieth of its training.",
        "decode: one attention layer, projections included, bf16 weights and cache on a GPU; bytes are what "
        "the layer must read: its weights, and the cache once.",
        "PyTorch's fused attention ends at heads of 256; MLA absorbed, with heads as wide as the latent, "
        "falls back to a composed path. 'three launches' is the same arithmetic as two bf16 products "
        "and a softmax.",
    ]
    if device == "cpu":
        notes.append("Small sizes and few steps: a check that it runs.")
    return rows, notes


# ----------------------------------------------------------------------------------------------- training


def text_rows(device: str) -> list[Row]:
    """Every variant on every seed, and the conversions of the multi-head models.

    On a GPU in processes side by side: launching the kernels of one training takes longer than running them.
    """
    small = device == "cpu"
    names = text_variants(text_config(65, small=small).head_dim)
    # Those that are converted afterwards take longest, and come first.
    tasks = [(name, seed, device) for name in names for seed in (SEEDS[:1] if small else SEEDS)]
    if small:
        return [row for task in tasks for row in trained(*task)]
    with multiprocessing.get_context("spawn").Pool(min(WORKERS, len(tasks))) as pool:
        return [row for rows in pool.starmap(trained, tasks, chunksize=1) for row in rows]


def trained(name: str, seed: int, device: str) -> list[Row]:
    """The row of a variant of `text_variants` trained on one seed; for MHA also those of its conversions."""
    small = device == "cpu"
    text = Text.shakespeare()
    base = text_config(text.vocab_size, small=small)
    config = equal_parameters(base, text_variants(base.head_dim))[name]
    steps, batch, length = (6, 4, 32) if small else (400, 64, 256)
    held = text.batches(batch=batch, length=length, seed=10**6, held_out=True, device=device)
    test = list(islice(held, 2 if small else 16))
    with tf32():
        model = build(Transformer, config, seed=seed).to(device)
        train = text.batches(batch=batch, length=length, seed=seed, device=device)
        fit(model, train, steps=steps, lr=2e-3)
        row = {
            "kind": "text",
            "name": name,
            "seed": seed,
            "loss": held_out_loss(model, test),
            "steps": steps,
            "params": config.n_params,
            "bytes_per_token": config.kv_bytes_per_token(),
            "cache_bytes": config.cache_bytes(length),
        }
        if name != "MHA":
            return [row]
        again = max(1, steps // 20)
        return [row, *_uptrained(model, text, test, seed=seed, steps=again, small=small)]


def _uptrained(
    model: Transformer, text: Text, test: list[Batch], *, seed: int, steps: int, small: bool
) -> list[Row]:
    """Conversions of a trained multi-head model: its loss at once, and after `steps` more steps."""
    batch, length = test[0].targets.shape
    rows = []
    for heads in (2,) if small else (4, 2, 1):
        for how in POOLINGS:
            joined = to_gqa(model, heads, how=how, seed=seed)  # type: ignore[arg-type]
            before = held_out_loss(joined, test)
            train = text.batches(batch=batch, length=length, seed=500 + seed, device=model.device)
            fit(joined, train, steps=steps, lr=5e-4)
            rows.append(
                {
                    "kind": "uptraining",
                    "name": f"{heads} heads, {how}",
                    "kv_heads": heads,
                    "how": how,
                    "seed": seed,
                    "loss": held_out_loss(joined, test),
                    "loss_before": before,
                    "loss_mha": held_out_loss(model, test),
                    "steps": steps,
                }
            )
    return rows


def text_config(vocab_size: int, *, small: bool = False) -> ModelConfig:
    """The multi-head base: 4 layers of 256 features, 8 heads of 32; small: 2 layers of 32, 8 heads of 4."""
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=32 if small else 256,
        n_layers=2 if small else 4,
        n_heads=8,
        n_kv_heads=8,
        head_dim=4 if small else 32,
        d_ff=64 if small else 704,
        max_len=256,
        name="MHA",
    )


@torch.no_grad()
def held_out_loss(model: Transformer, test: list[Batch]) -> float:
    """Mean nats a character."""
    return math.fsum(cross_entropy(model, batch).item() for batch in test) / len(test)


# ------------------------------------------------------------------------------------------------- decode

DECODE_VARIANTS: dict[str, Change] = {
    "MHA": lambda base: base,
    "GQA, 8 heads": grouped(8),
    "MQA": grouped(1),
    "MLA": lambda base: replace(
        base, layers=("latent",) * base.n_layers, latent=LatentSizes(1536, 512, 128, 64, 128)
    ),
}
"""Of a base with 32 heads of 128; MLA with DeepSeek's widths."""


def decode_config(*, small: bool) -> ModelConfig:
    """One layer as wide as Llama 3 8B's."""
    return ModelConfig(
        vocab_size=2,
        d_model=256 if small else 4096,
        n_layers=1,
        n_heads=32,
        n_kv_heads=32,
        head_dim=8 if small else 128,
        d_ff=0,
        max_len=1 << 17,
    )


@torch.inference_mode()
def decode_rows(device: str) -> list[Row]:
    """Seconds of one layer's decode step for batches and contexts that fit the cache of all variants."""
    small = device == "cpu"
    points = [(1, 64), (4, 256)] if small else [(b, n) for b in (1, 16, 64) for n in (1024, 4096, 16_384)]
    dtype = torch.float32 if small else torch.bfloat16
    base, rows = decode_config(small=small), []
    layers = {}
    for name, change in DECODE_VARIANTS.items():
        config = change(base)
        if small and config.latent:
            config = replace(config, latent=LatentSizes(0, 32, 8, 4, 8))
        layer = MIXERS[config.kinds[0]](config).to(device, dtype).eval()
        for p in layer.parameters():
            if p.dim() > 1:
                p.normal_(std=p.shape[1] ** -0.5)
        layers[name] = (config, layer)
    for batch, context in points:
        calls, reads = {}, {}
        for name, (config, layer) in layers.items():
            call, nbytes = _decode_step(config, layer, batch, context, dtype, device)
            calls[name], reads[name] = call, nbytes
            if isinstance(layer, LatentAttention):
                other = f"{name}, three launches"
                calls[other] = _three_launches(config, layer, batch, context, dtype, device)
                reads[other] = nbytes
        samples = measure(calls, device=device)
        for name, sample in samples.items():
            rows.append(
                {
                    "kind": "decode",
                    "name": name,
                    "batch": batch,
                    "context": context,
                    "us": sample.median * 1e6,
                    "low_us": sample.low * 1e6,
                    "high_us": sample.high * 1e6,
                    "graph": sample.graph,
                    "cache_bytes": layers[name.split(", three")[0]][0].cache_bytes(context) * batch,
                    "bytes": reads[name],
                    "bytes_per_s": sample.rate(reads[name]),
                }
            )
        del calls
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def _decode_step(
    config: ModelConfig, layer: Any, batch: int, context: int, dtype: torch.dtype, device: str
) -> tuple[Any, int]:
    """A call of the layer on the last token of `context`, and the bytes that it must read."""
    state = layer.state(config, batch, context, dtype=dtype, device=device)
    for tensor in state.tensors.values():
        tensor.normal_()
    x = torch.randn(batch, 1, config.d_model, dtype=dtype, device=device)
    step = _last(config, batch, context, dtype, device)
    nbytes = sum(p.nbytes for p in layer.parameters()) + state.nbytes
    return lambda: layer(x, step, state), nbytes


def _last(config: ModelConfig, batch: int, context: int, dtype: torch.dtype, device: str) -> Step:
    positions = torch.full((batch, 1), context - 1, device=device)
    angles = torch.rand(batch, 1, 1, config.rope_dim, device=device).to(dtype)
    return Step(positions, context - 1, context, cos=angles.cos(), sin=angles.sin())


def _three_launches(
    config: ModelConfig, layer: LatentAttention, batch: int, context: int, dtype: torch.dtype, device: str
) -> Any:
    """The absorbed form with attention written out: scores, softmax, sum, each over the latent itself."""
    state = LatentState(config, batch, context, dtype=dtype, device=device)
    state.latent.normal_()
    x = torch.randn(batch, 1, config.d_model, dtype=dtype, device=device)
    step = _last(config, batch, context, dtype, device)
    sizes, heads = layer.sizes, layer.n_heads
    weight = layer.kv_up.weight.view(heads, -1, sizes.kv_rank)
    up_k, up_v = weight.split([sizes.nope_dim, sizes.v_dim], dim=1)

    def call() -> Tensor:
        nope, rope = layer.queries(x, step)
        held = state.extend(layer.compress(x, step), step)
        q = torch.cat((torch.einsum("bhsn,hnr->bhsr", nope, up_k), rope), dim=-1)[:, :, 0]
        scores = torch.softmax(q @ held.transpose(1, 2) * layer.scale, dim=-1, dtype=torch.float32)
        mixed = scores.to(q.dtype) @ held[..., : sizes.kv_rank]
        return layer.out(torch.einsum("bhr,hvr->bhv", mixed, up_v).flatten(1)[:, None])

    return call
