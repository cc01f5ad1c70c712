"""Benchmark `quantize`: the real model's perplexity against its size, method by method.

    llmcourse bench quantize --device cuda --out llmcourse/bench/records

weights       only weights are quantized, products run in bfloat16: round to nearest (RTN), GPTQ, AWQ, QAT at
              8, 4 and 3 bits; perplexity, bits a weight (scales included), bytes of the whole model
activations   inputs of the products in INT8 as well: one scale fixed for a tensor, one a token, SmoothQuant,
              LLM.int8
blocks        whether GPTQ block by block, behind blocks already quantized, is better than all at once

Perplexity is of fixed pieces of four plays; calibration and training read others (`compress.text`). The model
comes from a file whose own weights have 4 bits, in groups of 32 whose offset is no point of the grid: what is
lost here is lost on top of that. Of a row of 576 weights the last group of 128 is half full.

QAT trains towards the predictions of the model as it is, never towards the text: its perplexity cannot profit
from having read more of the same kind of text. How much of what RTN lost it recovers is in `recovered`,
(RTN − QAT) / (RTN − bf16).
"""

from __future__ import annotations

import copy
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from llmcourse.compress.awq import awq
from llmcourse.compress.calibrate import Inputs, block_by_block, calibrate, layers_of
from llmcourse.compress.gptq import gptq
from llmcourse.compress.llm_int8 import llm_int8, outliers
from llmcourse.compress.qat import pieces, qat
from llmcourse.compress.quantize import Quantized, Scheme, quantize
from llmcourse.compress.quantized_linear import How, quantize_model
from llmcourse.compress.smoothquant import Int8Linear, int8_linear, smoothquant
from llmcourse.compress.text import calibration_pieces, measuring_pieces, training_text
from llmcourse.models import Transformer, load
from llmcourse.models.perplexity import perplexity

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Pieces of 512 tokens to measure and calibrate on; steps, batch, length and learning rate of QAT."""

    measured: int
    calibrated: int
    plays: int
    steps: int
    batch: int
    length: int
    lr: float
    alphas: int = 20


SIZES = {
    "cuda": Sizes(measured=64, calibrated=64, plays=34, steps=300, batch=16, length=256, lr=1e-4),
    "cpu": Sizes(measured=8, calibrated=8, plays=4, steps=24, batch=4, length=128, lr=1e-4, alphas=6),
}
INT8, INT4, INT4_LARGE, INT3 = Scheme(8), Scheme(4, 64, False), Scheme(4, 128, False), Scheme(3, 64, False)
METHODS = ("RTN", "GPTQ", "AWQ", "AWQ + GPTQ")
WEIGHTS: tuple[tuple[str, Scheme], ...] = (
    ("RTN", INT8),
    ("RTN", Scheme(8, 64)),
    ("RTN", Scheme(4, 64)),
    ("RTN", Scheme(4, 64, codes="nf4")),
    *((method, scheme) for scheme in (INT4, INT4_LARGE, INT3) for method in METHODS),
    ("QAT", INT4),
    ("QAT", INT3),
)
SHARES = (("RTN", "QAT"), ("GPTQ",), ("AWQ",), ("AWQ + GPTQ",), ("activations",), ("blocks",))
"""What each of several processes does where there is a GPU, which mostly waits for a host that launches."""


def run(device: str) -> tuple[list[Row], list[str]]:
    """All rows, and what a reader must know to use them."""
    return table(device, SIZES[device])


def table(device: str, sizes: Sizes) -> tuple[list[Row], list[str]]:
    """The rows for these sizes."""
    if device == "cuda":
        with multiprocessing.get_context("spawn").Pool(len(SHARES)) as pool:
            made = pool.starmap(share_of, [(device, sizes, share) for share in SHARES], chunksize=1)
    else:
        made = [share_of(device, sizes, tuple(name for share in SHARES for name in share))]
    found = {(row["kind"], row["name"]): row for rows, _ in made for row in rows}
    order = [("weights", row_name(method, str(scheme))) for method, scheme in WEIGHTS]
    rows = [found[key] for key in (("weights", "bf16"), *order)]
    rows += [row for key, row in found.items() if key[0] != "weights"]
    base, rtn = rows[0]["perplexity"], {r["scheme"]: r["perplexity"] for r in rows if r["method"] == "RTN"}
    for row in rows:
        if row["kind"] == "weights" and row["method"] not in ("bf16", "RTN"):
            lost = rtn[row["scheme"]]
            row["recovered"] = (lost - row["perplexity"]) / (lost - base)
    measured, read = made[0][1]
    notes = [
        f"perplexity of {measured} tokens of 4 plays in pieces of 512; calibration: "
        f"{read} tokens of 4 others; products in bfloat16.",
        "nbytes: the whole model; embedding (also the head) and norms in bfloat16. bits: of a quantized "
        "weight, with its scales (bfloat16) and zeros (8 bits).",
        f"QAT: {sizes.steps} steps of {sizes.batch} × {sizes.length} tokens towards the predictions of the "
        "model as it is. recovered: the share of RTN's loss of perplexity, in the same scheme, undone.",
        "The model's file holds 4 bits a weight in groups of 32; what is lost here is lost on top of that.",
    ]
    if device == "cuda":
        notes.append(f"seconds: of {len(SHARES)} processes that share the GPU.")
    return rows, notes


def share_of(device: str, sizes: Sizes, share: tuple[str, ...]) -> tuple[list[Row], tuple[int, int]]:
    """The rows of the methods in `share`, and tokens measured and read."""
    bench = Bench(device, sizes)
    rows = list(bench.weight_rows([(m, s) for m, s in WEIGHTS if m in share], base="RTN" in share))
    if "activations" in share:
        rows += bench.activation_rows()
    if "blocks" in share:
        rows.append(bench.block_row(INT4))
    return rows, (bench.text.numel(), bench.read.numel())


def row_name(method: str, scheme: str) -> str:
    return f"{method} {scheme}" if scheme != method else method


class Bench:
    """The model, its texts and its calibration, held once for all rows."""

    def __init__(self, device: str, sizes: Sizes) -> None:
        self.device, self.sizes = device, sizes
        self.model, tokenizer = load(device=device, dtype="float32")
        self.text = measuring_pieces(tokenizer, sizes.measured).to(device)
        self.read = calibration_pieces(tokenizer, sizes.calibrated).to(device)
        self.training = training_text(tokenizer, sizes.plays)
        self.inputs: Mapping[str, Inputs] = calibrate(self.model, self.read, rows=4)
        self.base = self.perplexity(self.model)

    def perplexity(self, model: Transformer) -> float:
        """In bfloat16, four pieces at a time."""
        served = copy.deepcopy(model).to(torch.bfloat16)
        logs = [
            torch.tensor(perplexity(served, part), dtype=torch.float64).log() for part in self.text.split(4)
        ]
        return float(torch.stack(logs).mean().exp())  # every part has as many tokens

    def weight_rows(self, wanted: Sequence[tuple[str, Scheme]], *, base: bool) -> Iterator[Row]:
        nbytes = 2 * _parameters(self.model)
        if base:
            yield self.row("bf16", "bf16", self.base, bits=16.0, nbytes=nbytes, seconds=0.0)
        for method, scheme in wanted:
            began = time.perf_counter()
            made, codes, more = self.quantized(method, scheme)
            seconds = time.perf_counter() - began
            found = self.perplexity(baked(made, codes))
            weights = sum(q.shape[0] * q.shape[1] for q in codes.values())
            stored = sum(q.nbytes for q in codes.values())
            nbytes = 2 * (_parameters(self.model) - weights) + stored
            more |= {"bits": 8 * stored / weights, "nbytes": nbytes, "seconds": seconds}
            yield self.row(method, str(scheme), found, width=scheme.bits, group=scheme.group, **more)

    def quantized(self, method: str, scheme: Scheme) -> tuple[Transformer, dict[str, Quantized], Row]:
        """The model with what the method changed besides, its codes, and what else is worth a note."""
        if method == "RTN":
            return self.model, _each(self.model, lambda name, w: quantize(w, scheme)), {}
        if method == "GPTQ":
            grams = {name: found.gram for name, found in self.inputs.items()}
            return self.model, _each(self.model, lambda name, w: gptq(w, grams[name], scheme)), {}
        if method.startswith("AWQ"):
            both = method == "AWQ + GPTQ"
            return *awq(self.model, self.inputs, scheme, steps=self.sizes.alphas, then_gptq=both), {}
        s = self.sizes
        batches = pieces(self.training, batch=s.batch, length=s.length, seed=0)
        trained, curve = qat(
            self.model, (b.to(self.device) for b in batches), scheme, steps=s.steps, lr=s.lr, autocast=True
        )
        return trained, _each(trained, lambda name, w: quantize(w, scheme)), {"curve": curve}

    def activation_rows(self) -> list[Row]:
        smooth = smoothquant(self.model, self.inputs)
        after = calibrate(smooth, self.read, rows=4)
        fixed, fixed_after = (partial(_int8, inputs=found) for found in (self.inputs, after))
        ways: tuple[tuple[str, Transformer, How], ...] = (
            ("W8A8, fixed scale", self.model, fixed),
            ("W8A8, scale a token", self.model, _int8),
            ("SmoothQuant, fixed scale", smooth, fixed_after),
            ("SmoothQuant, scale a token", smooth, _int8),
            ("LLM.int8", self.model, lambda name, layer: llm_int8(layer, self.inputs[name])),
        )
        rows = []
        for name, model, how in ways:
            found = self.perplexity(cast(Transformer, quantize_model(model, how)))
            rows.append(self.row(name, "INT8 row", found, kind="activations"))
        kept = sum(len(outliers(found)) for found in self.inputs.values())
        rows[-1]["outlier_share"] = kept / sum(len(found.absmax) for found in self.inputs.values())
        return rows

    def block_row(self, scheme: Scheme) -> Row:
        began = time.perf_counter()
        fitted = copy.deepcopy(self.model)
        block_by_block(
            fitted, self.read, lambda name, layer, x: gptq(layer.weight, x.gram, scheme).dequantize(), rows=4
        )
        seconds = time.perf_counter() - began
        return self.row(
            "GPTQ block by block", str(scheme), self.perplexity(fitted), kind="blocks", seconds=seconds
        )

    def row(self, method: str, scheme: str, found: float, *, kind: str = "weights", **more: Any) -> Row:
        return {
            "kind": kind,
            "name": row_name(method, scheme),
            "method": method,
            "scheme": scheme,
            "perplexity": found,
            "more_than_bf16": found / self.base - 1,
            **more,
        }


def baked(model: Transformer, codes: Mapping[str, Quantized]) -> Transformer:
    """A copy of the model with the weights that the codes stand for: the same values, at full speed."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, layer in layers_of(copied).items():
            layer.weight.copy_(codes[name].dequantize(layer.weight.dtype))
    return copied


def _each(model: Transformer, how: Callable[[str, Tensor], Quantized]) -> dict[str, Quantized]:
    return {name: how(name, layer.weight) for name, layer in layers_of(model).items()}


def _int8(name: str, layer: nn.Linear, inputs: Mapping[str, Inputs] | None = None) -> Int8Linear:
    """Activations in one scale a token; with calibrated inputs, in one scale for all tokens."""
    return int8_linear(layer, None if inputs is None else inputs[name])


def _parameters(model: Transformer) -> int:
    return sum(p.numel() for p in model.parameters())
