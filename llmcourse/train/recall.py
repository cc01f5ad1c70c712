"""Associative recall: key–value pairs first, then keys alone; say the value that each came with.

    tokens    k₃ v₈ k₁ v₂ k₇ v₈ │ k₁  k₃  k₇
    targets    –  –  –  –  –  – │ v₂  v₈  v₈

Keys and their values are drawn anew for every sequence, so nothing can be learned by heart: an answer has to
be found in the text, at a place that depends on what is asked. This is the multi-query form (MQAR) of Arora
et al. 2023 (arXiv:2312.04927), who found that most of the gap between convolutional and attention language
models lies in exactly such look-ups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from llmcourse.errors import ShapeError
from llmcourse.models import HyenaSizes, ModelConfig, SSMSizes, Transformer
from llmcourse.train.fit import accuracy, fit, one_thread
from llmcourse.train.tasks import IGNORE, Batch


@dataclass(frozen=True)
class Recall:
    """pairs of distinct keys and any values, then as many queries, every key once, in a random order.

    Tokens 0 … keys−1 are keys, keys … keys+values−1 values.
    """

    pairs: int = 16
    keys: int = 32
    values: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.pairs <= self.keys:
            raise ShapeError(
                f"{self.pairs} pairs of {self.keys} different keys.",
                "A key that came with two values has no right answer.",
                f"keys = {max(self.pairs, 1)} or more, and at least one pair.",
            )

    @property
    def vocab_size(self) -> int:
        return self.keys + self.values

    @property
    def length(self) -> int:
        """Tokens of a sequence: two a pair, one a query."""
        return 3 * self.pairs

    @property
    def chance(self) -> float:
        """The accuracy of a guess among the values that stand in the text is about this."""
        return 1 / self.pairs

    def draw(self, batch: int, generator: torch.Generator) -> Batch:
        """tokens [B, 3·pairs], and targets of that shape: the value at each query, IGNORE elsewhere."""
        keys = torch.rand(batch, self.keys, generator=generator).argsort(1)[:, : self.pairs]
        values = torch.randint(0, self.values, keys.shape, generator=generator) + self.keys
        order = torch.rand(keys.shape, generator=generator).argsort(1)
        text = torch.stack((keys, values), dim=2).flatten(1)
        tokens = torch.cat((text, keys.gather(1, order)), dim=1)
        targets = torch.cat((torch.full_like(text, IGNORE), values.gather(1, order)), dim=1)
        return Batch((tokens,), targets)

    def batches(self, *, batch: int, seed: int, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """An endless supply, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.draw(batch, generator).to(device)


def read_back(pairs: int, dim: int, *, trials: int = 64) -> float:
    """The share of `pairs` random pairs that a state S = Σ k vᵀ of dim × dim numbers gives back; no training.

    Keys are random unit vectors, which overlap by about 1/√dim: reading with k_j gives v_j and as large a
    share of every other value. A pair counts as read when its own value is the nearest of all.
    """
    generator = torch.Generator().manual_seed(dim + pairs)
    k, v = torch.randn(2, trials, pairs, dim, generator=generator, dtype=torch.float64)
    k = k / k.norm(dim=-1, keepdim=True)
    state = k.mT @ v
    nearest = torch.cdist(k @ state, v).argmin(-1)
    return float((nearest == torch.arange(pairs)).double().mean())


@dataclass(frozen=True)
class RecallRun:
    """A trained model, its loss in nats at every step, and its accuracy on sequences it has not seen."""

    model: Transformer
    curve: list[float]
    accuracy: float


def recall_model(
    layers: tuple[str, ...], task: Recall, *, width: int = 32, seed: int = 0, **changes: Any
) -> Transformer:
    """A model of mixers alone (no feed-forward part), so that all of its work is moving information.

    changes   fields of ModelConfig that should differ, e.g. n_heads or hyena
    """
    sizes: dict[str, Any] = {
        "n_heads": 2,
        "head_dim": width // 2,
        "n_kv_heads": 2,
        "hyena": HyenaSizes(d_filter=16),
        "ssm": SSMSizes(expand=1),
    }
    config = ModelConfig(
        vocab_size=task.vocab_size,
        d_model=width,
        n_layers=len(layers),
        d_ff=0,
        max_len=task.length,
        layers=layers,
        **sizes | changes,
    )
    # Not `initialise`: poles, decay rates and step sizes start where their layers put them.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(config)
        # The tied output head would begin with logits of ±√E if the embedding kept its default of 1.
        torch.nn.init.normal_(model.embedding.weight, std=0.1)
    return model


@one_thread()
def train_recall(
    layers: tuple[str, ...],
    task: Recall,
    *,
    seed: int = 0,
    steps: int = 200,
    batch: int = 16,
    lr: float = 1e-2,
    device: torch.device | str = "cpu",
    **sizes: Any,
) -> RecallRun:
    """Train `recall_model(layers, task, seed=seed, **sizes)` on fresh sequences, and ask it 256 others."""
    model = recall_model(layers, task, seed=seed, **sizes).to(device)
    curve = fit(model, task.batches(batch=batch, seed=seed, device=device), steps=steps, lr=lr)
    asked = next(task.batches(batch=256, seed=1_000_000 + seed, device=device))
    return RecallRun(model, curve, accuracy(model, asked))
