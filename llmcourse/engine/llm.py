"""`LLM`: the engine's front door. Prefill reads the prompts, decode adds a token a step.

The optimisations of the course are switches of the constructor, so that a ladder can turn on one at
a time and measure it. Later chapters add paging, continuous batching and speculation behind the same
methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from llmcourse.engine.cuda_graph import GraphDecoder
from llmcourse.engine.sampler import Sampler, SamplingParams
from llmcourse.engine.timing import Timing
from llmcourse.errors import ShapeError
from llmcourse.models import KVCache, Transformer, load
from llmcourse.text.tokenizer import Message, StreamDecoder, Tokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Piece:
    """One streamed token: its id, the text it completes, and why the answer ended (on the last one)."""

    token: int
    text: str
    finish: str | None
    timing: Timing


@dataclass
class Completion:
    """One answer. `finish` is "stop" (the model ended it, or a stop string), or "length".

    `timing` is shared by the prompts of one `generate` call: they ran as one batch.
    """

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = "length"
    timing: Timing = field(default_factory=lambda: Timing(0))


class LLM:
    """A model that generates.

    model        None (the course's model), a path for `models.load`, or a `(Transformer, Tokenizer)` pair
    device       cpu, cuda or auto;  dtype  float32, bfloat16, float16 or auto
    kv_cache     off: every step runs the whole prefix again (the naive way)
    kv_stored    int8 or fp8: the cache in 8 bits;  None: in the model's format
    fused        off: Q, K, V and gate, up as separate matrix products
    packed       off: on a CPU, bfloat16 weights are rearranged at every use (see `models.linear`)
    cuda_graphs  None: on where there is a GPU
    """

    def __init__(
        self,
        model: str | Path | tuple[Transformer, Tokenizer] | None = None,
        *,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        kv_cache: bool = True,
        kv_stored: str | None = None,
        fused: bool = True,
        packed: bool = True,
        cuda_graphs: bool | None = None,
    ) -> None:
        if isinstance(model, tuple):
            self.model, self.tokenizer = model
        else:
            self.model, self.tokenizer = load(model, device=device, dtype=dtype)
        self.kv_cache, self.kv_stored = kv_cache, kv_stored
        self.fused, self.packed = fused, packed
        on_gpu = self.model.device.type == "cuda"
        self.cuda_graphs = (on_gpu if cuda_graphs is None else cuda_graphs and on_gpu) and kv_cache
        self._decoders: dict[tuple[int, int], GraphDecoder] = {}

    # ---------------------------------------------------------------- text in, text out

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Answer all prompts as one static batch: it ends when its last sequence does."""
        ids = [self.encode(p) for p in prompts]
        settings = self._settings(params, len(ids))
        timing = Timing(sum(map(len, ids)), batch=len(ids))
        done = [Completion(len(i), timing=timing) for i in ids]
        streams = [_Answer(self.tokenizer, s) for s in settings]
        for step in self._steps(ids, settings):
            open_ = [i for i, s in enumerate(streams) if s.finish is None]
            timing.tick(len(open_))
            for i in open_:
                streams[i].push(step[i])
            if all(s.finish for s in streams):
                break
        for completion, stream in zip(done, streams, strict=True):
            completion.tokens, completion.text = stream.tokens, stream.text
            completion.finish = stream.finish or "length"
        return done

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Piece]:
        """Answer one prompt, a token at a time. Closing the iterator ends the work."""
        ids = self.encode(prompt)
        settings = self._settings(params, 1)
        timing = Timing(len(ids))
        answer = _Answer(self.tokenizer, settings[0])
        for (token,) in self._steps([ids], settings):
            timing.tick()
            text = answer.push(token)
            yield Piece(token, text, answer.finish, timing)
            if answer.finish:
                return

    def chat(
        self, messages: Sequence[Message] | str, params: SamplingParams | None = None
    ) -> Iterator[Piece]:
        """Stream the answer to chat messages (or to one user message given as a string)."""
        return self.stream(self.tokenizer.chat(messages), params)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, checked: ids must be in the vocabulary, and there must be one."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        vocab = self.model.config.vocab_size
        if not ids:
            raise ShapeError(
                "the prompt is empty.",
                "The model predicts the next token from at least one before it.",
                "a prompt of one character or more.",
            )
        if bad := [i for i in ids if not 0 <= i < vocab]:
            raise ShapeError(
                f"token id {bad[0]} is outside the vocabulary of {vocab}.",
                "The embedding has one row for each id from 0 to the vocabulary's size.",
                "ids from this model's own tokenizer.",
            )
        return ids

    # ---------------------------------------------------------------- prefill and decode

    @torch.inference_mode()
    def _steps(self, ids: list[list[int]], settings: list[SamplingParams]) -> Iterator[list[int]]:
        """The tokens of each step, for all sequences, until the longest answer is full."""
        self.model.fuse(self.fused).pack(self.packed)
        budget = max(s.max_tokens for s in settings)
        longest = max(map(len, ids)) + budget
        if longest > self.model.config.max_len:
            raise ShapeError(
                f"a prompt of {max(map(len, ids))} tokens and {budget} new ones make {longest}.",
                f"{self.model.config.name} was trained on contexts of {self.model.config.max_len} tokens.",
                f"max_tokens = {max(1, self.model.config.max_len + budget - longest)}, or a shorter prompt.",
            )
        sampler = Sampler(settings)
        advance = self._cached(ids, longest) if self.kv_cache else self._uncached(ids)
        tokens = sampler(advance(None))
        for step in range(budget):
            yield tokens.tolist()
            if step + 1 < budget:
                tokens = sampler(advance(tokens))

    def _cached(self, ids: list[list[int]], longest: int) -> Callable[[Tensor | None], Tensor]:
        decoder, cache = self._cache_for(len(ids), longest)

        def advance(tokens: Tensor | None) -> Tensor:
            if tokens is not None:
                return decoder(tokens[:, None])[:, -1]
            rows = []
            for i, prompt in enumerate(ids):  # prefill, a prompt at a time
                row = cache.row(i)
                rows.append(self.model(self._tensor([prompt]), row, last_only=True)[:, -1])
                cache.lengths[i] = row.lengths[0]
            return torch.cat(rows)

        return advance

    def _cache_for(self, batch: int, longest: int) -> tuple[Callable[[Tensor], Tensor], KVCache]:
        """A cache of the right size and what advances it; graphs and their cache are kept for reuse."""
        model = self.model
        if not self.cuda_graphs:
            cache = self._new_cache(batch, longest)
            return lambda tokens: model(tokens, cache), cache
        size = 1 << (longest - 1).bit_length()
        if (batch, size) not in self._decoders:
            cache = self._new_cache(batch, size)
            self._decoders[batch, size] = GraphDecoder(model, cache)
        decoder = self._decoders[batch, size]
        decoder.cache.lengths = [0] * batch
        return decoder, decoder.cache

    def _new_cache(self, batch: int, max_len: int) -> KVCache:
        model = self.model
        kind = self.kv_stored
        return KVCache(model.config, batch, max_len, dtype=model.dtype, device=model.device, stored=kind)

    def _uncached(self, ids: list[list[int]]) -> Callable[[Tensor | None], Tensor]:
        """The naive way: the whole prefix of each sequence through the model for every token."""
        prefixes = [list(i) for i in ids]

        def advance(tokens: Tensor | None) -> Tensor:
            if tokens is not None:
                for prefix, token in zip(prefixes, tokens.tolist(), strict=True):
                    prefix.append(token)
            return torch.cat([self.model(self._tensor([p]), last_only=True)[:, -1] for p in prefixes])

        return advance

    def _tensor(self, ids: list[list[int]]) -> Tensor:
        return torch.tensor(ids, device=self.model.device)

    def _settings(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or SamplingParams()] * count
        if len(params) != count:
            raise ShapeError(
                f"{len(params)} sampling parameters came for {count} prompts.",
                "Each prompt is sampled by its own parameters.",
                "one SamplingParams for all prompts, or a list with one for each.",
            )
        return list(params)


class _Answer:
    """One sequence's tokens so far: text as far as it is certain, and why it ended."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self.params, self.eos = params, tokenizer.eos_ids
        self.decoder = StreamDecoder(tokenizer)
        self.tokens: list[int] = []
        self.text = ""
        self.held = ""
        self.finish: str | None = None

    def push(self, token: int) -> str:
        """Take one token; return the text that may now be shown."""
        if token in self.eos and not self.params.ignore_eos:
            self.finish = "stop"
            return self._show(self.held + self.decoder.flush())
        self.tokens.append(token)
        text = self.held + self.decoder.push(token)
        for stop in self.params.stop:
            if (at := text.find(stop)) >= 0:
                self.finish = "stop"
                return self._show(text[:at])
        if len(self.tokens) >= self.params.max_tokens:
            self.finish = "length"
            return self._show(text + self.decoder.flush())
        # The end of the text may be the beginning of a stop string: hold it back until it is certain.
        keep = max((n for s in self.params.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        shown = self._show(text[: len(text) - keep])
        self.held = text[len(text) - keep :]
        return shown

    def _show(self, text: str) -> str:
        self.held = ""
        self.text += text
        return text
