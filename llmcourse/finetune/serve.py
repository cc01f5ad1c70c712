"""Many adapters on one model: every row of a batch answers as the model that it asks for.

    served = serve(model, [poet, lawyer])          # adapters as they were saved or attached
    with served.rows([0, 1, 1, -1]):               # one for each sequence of the batch, −1: the model itself
        logits = model(tokens)

Merged, an adapter costs nothing and makes the model its own: a thousand fine-tuned models would be a thousand
copies of the weights. Unmerged, they are one copy and a thousand small files, and requests for different
ones share a batch: the frozen product is computed for all rows together, and `kernels.multi_lora` adds to
each row its own correction. Adapters of different ranks and projections go together: what one of them lacks
is zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn

from llmcourse.errors import ShapeError
from llmcourse.finetune.lora import Adapter, LoRAError, LoRALinear
from llmcourse.kernels.multi_lora import Bank, multi_lora, stack
from llmcourse.kernels.multi_lora_segments import multi_lora_segments
from llmcourse.models import KVCache, Transformer


def grouped(ids: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """(order, lengths, adapters): the requests with those of one adapter side by side, adapters ascending.

    order      the requests, 0 … N−1; those of one adapter as they came
    lengths, adapters   how many requests each adapter has
    """
    order = sorted(range(len(ids)), key=lambda i: ids[i])
    adapters = sorted(set(ids))
    return order, [list(ids).count(g) for g in adapters], adapters


class Rows:
    """Which adapter each sequence of the batch has, shared by all layers: on the device, and as a list.

    ids   int32 [B]; None: no sequence has one. For each B one tensor, written anew, so that a CUDA graph
          that was captured with it follows
    """

    def __init__(self) -> None:
        self.ids: Tensor | None = None
        self.known: list[int] = []
        self._kept: dict[int, Tensor] = {}

    def set(self, ids: Sequence[int], device: torch.device | str) -> None:
        """From here on, sequence i has adapter ids[i]; with no ids, none has one."""
        self.known, self.ids = list(ids), None
        if self.known:
            new = torch.tensor(self.known, dtype=torch.int32)
            self.ids = self._kept.setdefault(len(new), new.to(device))
            self.ids.copy_(new)

    def add(self, y: Tensor, x: Tensor, bank: Bank) -> Tensor:
        """y [B·S, M] with each row's correction: rows of their own in decode, stretches in prefill."""
        ids = cast(Tensor, self.ids)
        if len(x) % len(ids):
            raise ShapeError(
                f"{len(x)} rows came for {len(ids)} sequences.",
                "Each sequence of the batch names its adapter, for all of its tokens.",
                "served.rows([...]) with one number for each sequence.",
            )
        if len(x) == len(ids):
            return multi_lora(y, x, ids, bank)
        runs = [(g, len(list(run))) for g, run in groupby(self.known)]
        each = len(x) // len(ids)
        return multi_lora_segments(y, x, [n * each for _, n in runs], [g for g, _ in runs], bank)


class MultiLoRALinear(nn.Module):
    """A frozen layer with a bank of corrections, one chosen by each row. For serving: no gradient."""

    def __init__(self, base: nn.Module, bank: Bank, rows: Rows) -> None:
        super().__init__()
        self.base, self.bank, self.on_rows = base, bank, rows

    def forward(self, x: Tensor) -> Tensor:
        y = cast(Tensor, self.base(x))
        if self.on_rows.ids is None:
            return y
        flat = x.reshape(-1, x.shape[-1])
        return self.on_rows.add(y.view(len(flat), -1), flat, self.bank).view(y.shape)

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias"):
            raise LoRAError(
                "a layer with many adapters has no weight of its own.",
                "Each row is multiplied by another one.",
                "model.fuse(), which runs stacked projections as one product.",
            )
        return super().__getattr__(name)


class Served:
    """A model with a bank of adapters. `remove()` puts its plain layers back."""

    def __init__(
        self, model: Transformer, layers: dict[str, MultiLoRALinear], rows: Rows, count: int
    ) -> None:
        self.model, self.layers, self.count, self._rows = model, layers, count, rows

    @property
    def nbytes(self) -> int:
        """Bytes of all banks."""
        return sum(self.count * layer.bank.row_bytes for layer in self.layers.values())

    @contextmanager
    def rows(self, ids: Sequence[int]) -> Iterator[None]:
        """Inside the `with`, sequence i of a batch has adapter ids[i], or none where it is −1."""
        if bad := [i for i in ids if not -1 <= i < self.count]:
            raise ShapeError(
                f"there is no adapter {bad[0]}.", f"{self.count} are served, from 0.", "one of them, or −1."
            )
        before = self._rows.known
        self._rows.set(ids, self.model.device)
        try:
            yield
        finally:
            self._rows.set(before, self.model.device)

    def remove(self) -> None:
        for name, layer in self.layers.items():
            self.model.set_submodule(name, layer.base)

    @torch.inference_mode()
    def answers(
        self, prompts: Sequence[Sequence[int]], ids: Sequence[int], *, tokens: int, stop: int = -1
    ) -> list[list[int]]:
        """Greedy answers of up to `tokens` tokens to prompts (ids), each by its own adapter, in one batch.

        Prompts are read one after the other, since their lengths differ; then all advance together.
        `stop` ends an answer, and is not part of it.
        """
        if len(prompts) != len(ids):
            raise ShapeError(
                f"{len(ids)} adapters came for {len(prompts)} prompts.",
                "Each prompt is answered by one.",
                "one number for each, −1 for the model itself.",
            )
        order, _, _ = grouped(ids)  # rows that share an adapter are neighbours, and share its bytes
        prompts, ids = [prompts[i] for i in order], [ids[i] for i in order]
        model = self.model
        longest = max(map(len, prompts)) + tokens
        cache = KVCache(model.config, len(prompts), longest, dtype=model.dtype, device=model.device)
        first = []
        for i, prompt in enumerate(prompts):
            row = cache.row(i)
            with self.rows([ids[i]]):
                logits = model(torch.tensor([list(prompt)], device=model.device), row, last_only=True)
            first.append(logits[:, -1].argmax(-1))
            cache.lengths[i] = row.lengths[0]
        steps = [torch.cat(first)]
        with self.rows(ids):
            for _ in range(tokens - 1):
                steps.append(model(steps[-1][:, None], cache)[:, -1].argmax(-1))
        found = [a[: a.index(stop)] if stop in a else a for a in torch.stack(steps, 1).tolist()]
        return [found[order.index(i)] for i in range(len(found))]


def serve(model: Transformer, adapters: Sequence[Adapter], *, dtype: torch.dtype | None = None) -> Served:
    """Put the corrections of several adapters beside a model's layers, in `dtype` (None: the model's).

    The adapters were trained on this model or on others of its sizes; they are copied, and their own
    models are left as they are. The model must have its plain layers: `adapter.remove()` first.

    Raises LoRAError for a model that carries an adapter, ShapeError for none to serve.
    """
    if not adapters:
        raise ShapeError("no adapter came.", "A bank holds one or more.", "serve(model, [adapter]).")
    rows, layers = Rows(), {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.layers):
        base = model.get_submodule(name)
        if isinstance(base, LoRALinear | MultiLoRALinear):
            raise LoRAError(
                f"{name} carries an adapter.",
                "The bank stands beside plain layers.",
                "adapter.remove() first.",
            )
        bank = bank_of([adapter.layers.get(name) for adapter in adapters], dtype or model.dtype, model.device)
        layers[name] = MultiLoRALinear(base, bank, rows)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return Served(model, layers, rows, len(adapters))


def bank_of(
    layers: Sequence[LoRALinear | None], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Bank:
    """One layer's bank: every projection that any of the adapters has, zeros where one has it not."""
    held = [layer for layer in layers if layer is not None]
    parts = {name: rows for layer in held for name, rows in layer.rows.items()}
    parts = dict(sorted(parts.items(), key=lambda item: item[1].start))
    wide, rank = held[0].A.shape[2], max(layer.r for layer in held)
    pairs = []
    for layer in layers:
        a = torch.zeros(len(parts), rank, wide)
        b = [torch.zeros(rows.stop - rows.start, rank) for rows in parts.values()]
        for part, name in enumerate(layer.rows if layer is not None else ()):
            at = list(parts).index(name)
            assert layer is not None
            a[at, : layer.r] = layer.A[part].detach()
            b[at][:, : layer.r] = layer.B[name].detach()
        pairs.append((a, torch.cat(b), 1.0 if layer is None else layer.scale))
    bank = stack(pairs, [(rows.start, rows.stop) for rows in parts.values()])
    return Bank(bank.a.to(device, dtype), bank.b.to(device, dtype), bank.scale.to(device), bank.parts)
