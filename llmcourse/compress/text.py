"""The texts by which compressed models are made and judged: the same pieces of Shakespeare for all of them.

Four plays, one of each kind, are read only to measure. Calibration and training take from the others. A
piece is 512 tokens, out of the middle of a play; which ones is fixed, so that perplexities of different
methods, and of different days, compare.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from llmcourse.errors import ShapeError

TEST = ("hamlet", "the-tempest", "twelfth-night", "richard-iii")
CALIBRATION = ("king-lear", "cymbeline", "as-you-like-it", "henry-v")
LENGTH = 512
SKIPPED = 2000  # tokens at the head of a play: title, list of persons


class Encoder(Protocol):
    """A tokenizer."""

    def encode(self, text: str) -> list[int]: ...


def measuring_pieces(tokenizer: Encoder, count: int = 16) -> Tensor:
    """Tokens [count, 512] of the plays that nothing else is taken from, as many of each."""
    return _pieces(tokenizer, TEST, count)


def calibration_pieces(tokenizer: Encoder, count: int = 16) -> Tensor:
    """Tokens [count, 512] of four other plays."""
    return _pieces(tokenizer, CALIBRATION, count)


def training_text(tokenizer: Encoder, plays: int = 34) -> Tensor:
    """Tokens [T] of the first `plays` plays by name that are not kept for measuring."""
    from llmcourse.assets import play_paths

    wanted = [path for path in play_paths() if path.stem not in TEST]
    return torch.tensor([token for path in wanted[:plays] for token in tokenizer.encode(path.read_text())])


def _pieces(tokenizer: Encoder, plays: tuple[str, ...], count: int) -> Tensor:
    from llmcourse.assets import play_paths

    if count < len(plays) or count % len(plays):
        raise ShapeError(
            f"{count} pieces of {len(plays)} plays.",
            "Each play gives as many pieces as the others.",
            f"count = {len(plays)}, {2 * len(plays)}, {4 * len(plays)}, …",
        )
    each = count // len(plays) * LENGTH
    paths = {path.stem: path for path in play_paths()}
    rows = []
    for play in plays:
        tokens = tokenizer.encode(paths[play].read_text())[SKIPPED : SKIPPED + each]
        if len(tokens) < each:
            raise ShapeError(
                f"{play} has {len(tokens)} tokens behind its first {SKIPPED}; {each} were asked for.",
                "A play is as long as it is.",
                f"count = {len(tokens) // LENGTH * len(plays)} or fewer.",
            )
        rows.append(torch.tensor(tokens).view(-1, LENGTH))
    return torch.cat(rows)
