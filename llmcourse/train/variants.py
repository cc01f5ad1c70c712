"""The attention variants against each other: the same parameters, the same batches, different memories.

A variant that keeps less of each token also has fewer weights. Compared as they stand, a loss of quality
could come from either; so what the projections save is given to the feed-forward part, and all variants have
the same number of parameters (to within a row of it).

The task is a telephone book. A sequence lists N records, each one token that stands for a name *and* a
number, then asks for names; the answer is the number. Nothing is asked that a model could know by heart:
every sequence has a new book, so all that it can answer comes through what attention keeps of the records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmcourse.errors import ShapeError
from llmcourse.models import ModelConfig, Transformer
from llmcourse.models.convert_gqa import Pooling, to_gqa
from llmcourse.models.sizes import LatentSizes
from llmcourse.train.fit import accuracy, cross_entropy, fit, one_thread
from llmcourse.train.tasks import IGNORE, Batch

RECORDS = 8


def phone_book(
    *, batch: int, seed: int, records: int = RECORDS, device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    """N records and N questions: tokens [B, 2·N] below `book_vocab(N)`, answers below N.

    Record (name a, number b) is token a·N + b, the question for name a is token N² + a. In one sequence every
    name and every number stands once; a name may be asked for twice.
    """
    generator = torch.Generator().manual_seed(seed)

    def shuffled() -> Tensor:
        return torch.rand(batch, records, generator=generator).argsort(dim=1)

    while True:
        names, numbers = shuffled(), shuffled()
        asked = torch.randint(records, (batch, records), generator=generator)
        tokens = torch.cat((names * records + numbers, records**2 + names.gather(1, asked)), dim=1)
        targets = torch.full_like(tokens, IGNORE)
        targets[:, records:] = numbers.gather(1, asked)
        yield Batch((tokens,), targets).to(device)


def book_vocab(records: int) -> int:
    """Tokens of a telephone book of `records` names and numbers."""
    return records**2 + records


# ------------------------------------------------------------------------------------------- the variants

Change = Callable[[ModelConfig], ModelConfig]


def grouped(n_kv_heads: int) -> Change:
    return lambda base: replace(base, n_kv_heads=n_kv_heads)


def latent(kv_rank: int, rope_dim: int) -> Change:
    """MLA with heads as wide as the base's, and queries that are not compressed."""

    def change(base: ModelConfig) -> ModelConfig:
        sizes = LatentSizes(0, kv_rank, base.head_dim, rope_dim, base.head_dim)
        return replace(base, layers=("latent",) * base.n_layers, latent=sizes)

    return change


def windowed(window: int, sinks: int = 0) -> Change:
    return lambda base: replace(base, layers=("window",) * base.n_layers, window=window, sinks=sinks)


def equal_parameters(base: ModelConfig, changes: Mapping[str, Change]) -> dict[str, ModelConfig]:
    """Each variant of `base`, its feed-forward part widened or narrowed until it has the base's parameters.

    What remains is less than one hidden feature in every layer: 3·E·L parameters for SwiGLU.

    Raises ShapeError when a variant is so much larger that nothing would be left of its feed-forward part.
    """
    configs = {}
    for name, change in changes.items():
        config = change(base)
        feature = replace(config, d_ff=2).n_params - replace(config, d_ff=1).n_params
        d_ff = config.d_ff + round((base.n_params - config.n_params) / feature)
        if d_ff < 1:
            raise ShapeError(
                f"{name} has {config.n_params - base.n_params:,} parameters more than {base.name}, and its "
                f"feed-forward part has only {feature * config.d_ff:,} to give.",
                "Variants are compared at equal parameters, which the feed-forward part balances.",
                "a smaller rank or fewer heads, or a base with a larger d_ff.",
            )
        configs[name] = replace(config, d_ff=d_ff, name=name)
    return configs


BASE = ModelConfig(
    vocab_size=book_vocab(RECORDS),
    d_model=32,
    n_layers=1,
    n_heads=8,
    n_kv_heads=8,
    head_dim=4,
    d_ff=64,
    max_len=2 * RECORDS,
    name="MHA",
)
"""Small enough to train in a second: one layer of eight heads of four features, 12,640 parameters."""

SMALL = equal_parameters(
    BASE,
    {
        "MHA": lambda base: base,
        "GQA, 2 heads": grouped(2),
        "MQA": grouped(1),
        "MQA, heads of 6": lambda base: replace(base, n_kv_heads=1, head_dim=6),
        "MLA, rank 8": latent(8, 4),
        "window of 4": windowed(4),
    },
)
"""The variants of BASE. MQA with wider heads keeps as many bytes of a token as MLA: a fair comparison."""


@dataclass(frozen=True)
class Trained:
    """A variant after training. loss in nats and accuracy on books that it has not seen."""

    model: Transformer
    seed: int
    loss: float
    accuracy: float


def draw(model: Transformer, *, seed: int) -> Transformer:
    """Weights from N(0, 1/inputs), so that projections keep the size of what they read; embeddings of 0.3.

    Drawn in the order of the weights' names: variants that share a weight do not share its numbers, but the
    same variant gets the same weights for the same seed on every machine.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if p.dim() > 1:
                std = 0.3 if name.startswith("embedding") else p.shape[1] ** -0.5
                p.copy_(torch.randn(p.shape, generator=generator) * std)
    return model


@one_thread()
def train(config: ModelConfig, *, seed: int, steps: int = 100, device: str = "cpu") -> Trained:
    """Train a variant on telephone books: weights and batches by `seed`, the test always the same."""
    model = draw(Transformer(config), seed=seed).to(device)
    books = phone_book(batch=64, seed=seed, device=device)
    fit(model, books, steps=steps, lr=0.02)
    test = next(phone_book(batch=256, seed=10**6, device=device))
    with torch.no_grad():
        loss = cross_entropy(model, test).item()
    return Trained(model, seed, loss, accuracy(model, test))


@dataclass(frozen=True)
class Converted:
    """A model whose heads were joined: its loss before (`whole`), directly after, and after uptraining."""

    whole: float
    at_once: float
    uptrained: float


@one_thread()
def convert(trained: Trained, n_kv_heads: int, how: Pooling, *, steps: int = 20) -> Converted:
    """Join the heads of a trained multi-head variant and train the result `steps` more, more gently."""
    device = trained.model.device
    joined = to_gqa(trained.model, n_kv_heads, how=how, seed=trained.seed)
    test = next(phone_book(batch=256, seed=10**6, device=device))
    with torch.no_grad():
        at_once = cross_entropy(joined, test).item()
    fit(joined, phone_book(batch=64, seed=500 + trained.seed, device=device), steps=steps, lr=0.005)
    with torch.no_grad():
        return Converted(trained.loss, at_once, cross_entropy(joined, test).item())
