"""Decode steps as CUDA graphs: hundreds of kernel launches replayed by one call.

At batch 1 a small model's decode step is bound by the host, which launches each kernel from Python.
A captured graph launches them all at once. It replays fixed addresses and shapes, so tokens and
positions are written into the same tensors each time, and the number of keys looked at is rounded up
to a bucket (masked beyond each sequence's end).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmcourse.models import KVCache, Transformer

SMALLEST_BUCKET = 128


def bucket(span: int, limit: int) -> int:
    """The captured number of keys for `span`: the next power of two, at most `limit`."""
    size = SMALLEST_BUCKET
    while size < span:
        size *= 2
    return min(size, limit)


class GraphDecoder:
    """Runs `model` one token at a time for the sequences of `cache`, by graph replay."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self.tokens = torch.zeros(cache.batch, 1, dtype=torch.long, device=model.device)
        self.positions = torch.zeros(cache.batch, dtype=torch.long, device=model.device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._recurrent = [state for state in cache.layers if state.recurrent]
        # A table that grew later would move, and the graphs would read the old one.
        model.rope.grow(cache.max_len)

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [B, 1] → logits [B, 1, V]; the cache grows by one token a sequence."""
        self.cache.require(1)
        span = bucket(max(self.cache.lengths) + 1, self.cache.max_len)
        self.tokens.copy_(tokens)
        self.positions.copy_(torch.tensor(self.cache.lengths))
        if span not in self.graphs:
            self.graphs[span] = self.capture(span)
        graph, logits = self.graphs[span]
        graph.replay()
        self.cache.lengths = [n + 1 for n in self.cache.lengths]
        return logits

    def capture(self, span: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Record one step that looks at `span` keys.

        It writes only where the replay writes again; states that every step changes are set back.
        """
        before = [[t.clone() for t in state.tensors.values()] for state in self._recurrent]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # lazy initialisation must happen before the capture
            for _ in range(2):
                self.step(span)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.step(span)
        for state, saved in zip(self._recurrent, before, strict=True):
            for tensor, kept in zip(state.tensors.values(), saved, strict=True):
                tensor.copy_(kept)
        return graph, logits

    def step(self, span: int) -> Tensor:
        plan = self.model.ragged_step(self.positions, span)
        return self.model.run(self.tokens, plan, self.cache)
