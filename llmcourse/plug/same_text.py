"""Whether a model with a learner's code in it still says the same, token for token.

Greedy decoding takes the largest logit. Two right programs add up in different orders and differ in the last
digits, so a token may differ where the two largest logits are closer than that: a tie, after which the texts
go apart though neither is wrong. So each token comes with its lead: how far its logit is above the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmcourse.notebook import Table

if TYPE_CHECKING:
    from llmcourse.engine.llm import LLM

TIE = 1e-3
"""A lead, in logits, that the order of additions can turn round in float32."""


@dataclass(frozen=True)
class SameText:
    """Two greedy continuations of one prompt.

    own, mine   their tokens, as text
    leads       of each own token: its logit less the second largest
    """

    own: list[str]
    mine: list[str]
    leads: list[float]

    @property
    def differs_at(self) -> int | None:
        """The first token that differs, counted from 0; None if none does."""
        if self.own == self.mine:
            return None
        pairs = enumerate(zip(self.own, self.mine, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(self.own), len(self.mine)))

    @property
    def tie(self) -> bool:
        """Whether the texts part where the model's two best tokens were equally good."""
        at = self.differs_at
        return at is not None and at < len(self.leads) and self.leads[at] < TIE

    @property
    def verdict(self) -> str:
        at, count = self.differs_at, len(self.own)
        if at is None:
            closest = min(range(count), key=self.leads.__getitem__)
            return (
                f"✓ {count} of {count} tokens are the model's own (the closest decision: "
                f"{self.own[closest]!r}, {self.leads[closest]:.2g} logits ahead of the second)"
            )
        if self.tie:
            return (
                f"≈ the first {at} of {count} tokens are the model's own; the next is a tie "
                f"({self.leads[at]:.1g} logits between the two best), and the texts part there"
            )
        lead = f", which led by {self.leads[at]:.2g} logits" if at < count else ""
        a, b = (repr(t[at]) if at < len(t) else "the end" for t in (self.own, self.mine))
        return f"✗ after {at} equal tokens comes {b}, and should be {a}{lead}"

    def table(self) -> Table:
        """Token by token."""
        pairs = zip(self.own, self.mine, self.leads, strict=False)
        rows = [(repr(a), repr(b), f"{lead:.2f}") for a, b, lead in pairs]
        return Table(["the model's own", "with your code", "ahead of the second, logits"], rows)

    def __repr__(self) -> str:
        return self.verdict


def same_text(llm: LLM, prompt: str, own: Sequence[int], mine: Sequence[int]) -> SameText:
    """Compare two greedy continuations of `prompt`, `own` of `llm` itself (called outside of the plug)."""
    import torch

    ids = llm.encode(prompt)
    with torch.inference_mode():
        read = torch.tensor([[*ids, *own]], device=llm.model.device)
        best = llm.model(read)[0, len(ids) - 1 : -1].float().topk(2).values
    leads = (best[:, 0] - best[:, 1]).tolist()
    words = [[llm.tokenizer.token(t) for t in tokens] for tokens in (own, mine)]
    return SameText(words[0], words[1], leads)
