"""An encoder: the decoder's own stack, in which every token sees every other.

What makes a decoder a decoder is one mask. Without it nothing can be generated, because each position has
seen the token it would have to predict; but a label for a token, or for a whole text, may then depend on what
stands to its right (Devlin et al. 2019, arXiv:1810.04805).

    tokens [B, S] → stack without the causal mask → features [B, S, E], or a class for each token [B, S, C]
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from llmcourse.errors import ShapeError
from llmcourse.models.config import ModelConfig
from llmcourse.models.linear import Linear
from llmcourse.models.step import Step
from llmcourse.models.transformer import Transformer


class Encoder(nn.Module):
    """`encoder(tokens)` reads [B, S]; `encoder(tokens, lengths)` reads sequences that are padded behind.

    classes   what comes out for each token: logits over the vocabulary (None: for filling in masked tokens),
              over so many classes, or, with 0, the features [B, S, E] as they leave the last norm

    Raises ShapeError for layers that work in one direction only (`config.layers` other than attention).
    """

    def __init__(self, config: ModelConfig, *, classes: int | None = None) -> None:
        super().__init__()
        if others := sorted(set(config.kinds) - {"attention"}):
            raise ShapeError(
                f"an encoder cannot have {others[0]!r} layers.",
                "They are causal: a token gets nothing from what stands to its right.",
                'layers = (), which is "attention" everywhere.',
            )
        self.config = config
        self.stack = Transformer(config)
        if classes is not None:
            head = Linear(config.d_model, classes, bias=False) if classes else nn.Identity()
            self.stack.head = head  # type: ignore[assignment]

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits or features for tokens [B, S], of which the first `lengths` [B] of each row are real.

        What comes out at padded positions means nothing.
        """
        return self.stack.run(tokens, self.plan(tokens, lengths), None)

    def plan(self, tokens: Tensor, lengths: Tensor | None = None) -> Step:
        """The decoder's plan of a pass, with the mask that makes the difference."""
        step = self.stack.plan(tokens, None)
        mask = None if lengths is None else padding_mask(tokens, lengths)
        return replace(step, causal=False, mask=mask)


def padding_mask(tokens: Tensor, lengths: Tensor) -> Tensor:
    """True at the real tokens of [B, S], as a mask over keys [B, 1, 1, S].

    Raises ShapeError unless each row has a length from 1 to S: a row that sees nothing has no softmax.
    """
    batch, width = tokens.shape
    lengths = torch.as_tensor(lengths)  # a list of numbers will do
    if lengths.shape != (batch,) or not bool(((lengths >= 1) & (lengths <= width)).all()):
        raise ShapeError(
            f"lengths {lengths.tolist()} came for {batch} rows of {width} tokens.",
            "Each row has a length of its own, from one token to all of them.",
            "torch.tensor([len(row) for row in rows]), before padding.",
        )
    return (torch.arange(width, device=tokens.device) < lengths.to(tokens.device)[:, None])[:, None, None]
