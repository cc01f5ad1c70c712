"""The points of a language model's making: the merges of its tokenizer, and the loss of fine-tuning.

The package's trainer gives two merges that spell the same bytes one token (ab·c and a·bc); a learner's
function knows ids and no bytes, and makes a new token each time. The adapter looks at the pairs one by one
and puts the package's ids in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from llmcourse.plug.kernels import tensor
from llmcourse.plug.point import LearnersCode, Point, kind, register

if TYPE_CHECKING:
    from torch import Tensor


def bpe_merges(code: LearnersCode) -> Callable[..., list[tuple[int, int]]]:
    why = "The tokenizer is built from these pairs. Each joins two tokens that exist by then."

    def learn_merges(
        words: Mapping[tuple[int, ...], int], count: int, tokens: Sequence[bytes]
    ) -> list[tuple[int, int]]:
        found = code(dict(words), len(tokens), count)
        if not isinstance(found, list | tuple):
            code.refuse(f"the result is {kind(found)}, and should be a list of pairs", why, "return merges.")
        if len(found) > count:
            code.refuse(f"{len(found)} merges came where {count} were wanted", why, "a stop at `count`.")
        spelled, ids = list(tokens), {token: i for i, token in enumerate(tokens)}
        own = list(range(len(tokens)))  # the package's id of each of the learner's
        merges = []
        for i, pair in enumerate(found):
            if not (isinstance(pair, list | tuple) and len(pair) == 2):
                code.refuse(f"merge {i} is {kind(pair)}, and should be a pair of ids", why, "(a, b).")
            if not all(isinstance(n, int) and 0 <= n < len(own) for n in pair):
                code.refuse(f"merge {i} joins {pair}, of {len(own)} tokens", why, "ids that exist by then.")
            a, b = own[pair[0]], own[pair[1]]
            joined = spelled[a] + spelled[b]
            if joined not in ids:
                ids[joined] = len(spelled)
                spelled.append(joined)
            own.append(ids[joined])
            merges.append((a, b))
        return merges

    return learn_merges


def masked_sft_loss(code: LearnersCode) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def loss(logits: Tensor, tokens: Tensor, learned: Tensor) -> Tensor:
        import torch

        like = logits.new_zeros((), dtype=torch.float32)
        return tensor(code, code(logits, tokens, learned), like, (), "the loss")

    return loss


for _point in (
    Point(
        "bpe_merges",
        ("words", "first", "count"),
        "list of pairs",
        "At most `count` merges of words {ids: times}, most frequent pair first; new ids begin at `first`.",
        ("llmcourse.text.bpe:learn_merges",),
        bpe_merges,
    ),
    Point(
        "masked_sft_loss",
        ("logits", "tokens", "learned"),
        "tensor",
        "Mean loss of the next token over those that are learned, of logits [B, S, V] and tokens [B, S].",
        ("llmcourse.train.sft:masked_sft_loss",),
        masked_sft_loss,
    ),
):
    register(_point)
