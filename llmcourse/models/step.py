"""What all layers of one forward pass share: where its tokens stand, and what each may look at."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One pass over tokens [B, S], worked out once for all layers.

    position_ids    position of each token in its sequence, [B, S]
    start           position of the first token when all sequences are equally long, else None (then S is 1)
    span            keys that the pass looks at, T
    mask            True where a query may look, broadcastable to [B, Hq, S, T]; None: see `causal`
    causal          without a mask: each query sees the keys up to its own, query S−1 being at key T−1
    cos, sin        rotary tables for the tokens of this pass, [B, 1, S, D]; None where nothing is turned
    """

    position_ids: Tensor
    start: int | None
    span: int
    mask: Tensor | None = None
    causal: bool = False
    cos: Tensor | None = None
    sin: Tensor | None = None
    memo: dict[Hashable, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def positions(self) -> Tensor:
        """The position of each sequence's first token, [B]."""
        return self.position_ids[:, 0]

    def windowed(self, window: int, sinks: int, keys: Tensor | None = None) -> Step:
        """The same pass through a sliding window, over keys at positions `keys` [B or 1, T] (None: its own).

        The mask is worked out once for all layers of a pass: they hold the same positions.
        """
        key = (window, sinks, keys is None)
        if key not in self.memo:
            own = self.position_ids if keys is None else keys
            self.memo[key] = window_mask(self.position_ids, own, window, sinks)
        return replace(self, mask=self.memo[key], causal=False)


def window_mask(queries: Tensor, keys: Tensor, window: int, sinks: int) -> Tensor:
    """True where a query [B, S] may look at a key [B, T], both given by position: [B, 1, S, T].

    A query sees the `window` newest tokens up to itself, and the first `sinks` tokens of the sequence
    (Xiao et al. 2023, arXiv:2309.17453). A key at a negative position is an empty slot.
    """
    q, k = queries[:, None, :, None], keys[:, None, None, :]
    return (k >= 0) & (k <= q) & ((q - k < window) | (k < sinks))
