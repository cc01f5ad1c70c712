"""What a draft's guesses are worth, text by text, from probabilities: the report of one draft length.

`acceptance.measure` keeps the chances of every place and plays any length on them. This is the same from the
distributions themselves, in NumPy, so that it can be read in one look, and done by somebody else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from llmcourse.compress.acceptance import expected_passes
from llmcourse.notebook import Table

Array = np.ndarray


def acceptance_report(p: Array, q: Array, tokens: Array, length: int) -> tuple[float, Array, float]:
    """(rate, accepted [S], tokens a pass) of drafts of `length` for a text of S tokens that the target wrote.

    p, q     [S, V] probabilities of target and draft at each place;  tokens [S] what the target wrote
    rate     mean over places of Σ min(p, q);  accepted: min(1, q/p) of each written token
    """
    rows = np.arange(len(tokens))
    accepted = np.minimum(1.0, q[rows, tokens] / p[rows, tokens])
    passes = expected_passes(torch.from_numpy(accepted), length)
    return float(np.minimum(p, q).sum(1).mean()), accepted, len(tokens) / passes


@torch.inference_mode()
def draft_report(
    target: nn.Module, draft: nn.Module, texts: Sequence[tuple[Sequence[int], Sequence[int]]], *, length: int
) -> Table:
    """The report of each text, a prompt and what the target drew after it at temperature 1, and of all."""
    rows, places, rate_sum, passes = [], 0, 0.0, 0.0
    for i, (prompt, written) in enumerate(texts):
        ids = torch.tensor([[*prompt, *written]])
        p, q = (_probabilities(model(ids)[0, len(prompt) - 1 : -1]) for model in (target, draft))
        rate, accepted, per_pass = acceptance_report(p, q, np.asarray(written), length)
        rows.append(
            (f"text {i + 1}", len(written), f"{rate:.3f}", f"{accepted.min():.3f}", f"{per_pass:.2f}")
        )
        places, rate_sum, passes = (
            places + len(written),
            rate_sum + rate * len(written),
            passes + len(written) / per_pass,
        )
    rows.append(("all", places, f"{rate_sum / places:.3f}", "", f"{places / passes:.2f}"))
    return Table(["text", "tokens", "acceptance rate", "least likely", f"tokens a pass, γ = {length}"], rows)


def _probabilities(logits: Tensor) -> Array:
    return logits.double().softmax(-1).numpy()
