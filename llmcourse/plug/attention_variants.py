"""The points of attention's variants: shared and pooled heads, a window, its rolling cache, latent attention.

A learner's functions know one mask: the S queries are the last S of the T tokens, and each sees what came up
to it. Sequences of unequal length are handed over one after the other. What no such mask can say (a window,
an encoder) stays with the package's own attention. `rolling_update` is found by caches that are made while it
is plugged in. As in `transformer`, positions are asked of the host: `LLM(cuda_graphs=False)` on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from llmcourse.plug.kernels import ATTEND, MODELS, mask_of, tensor
from llmcourse.plug.point import LearnersCode, Point, register

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llmcourse.models.config import ModelConfig
    from llmcourse.models.mla import LatentAttention
    from llmcourse.models.step import Step


def prefixes(mask: Tensor) -> list[tuple[slice, int]] | None:
    """Rows of a batch and the T tokens that they are at the end of, if mask [B, 1, S, T'] says no more.

    All rows at once where they are equally long. None: the mask hides something that lies before a query.
    """
    import torch

    new, held = mask.shape[2:]
    lengths = mask[:, 0, -1].sum(-1)
    last = lengths[:, None] - new + torch.arange(new, device=mask.device)
    if not torch.equal(mask[:, 0], torch.arange(held, device=mask.device) <= last[..., None]):
        return None
    if (lengths == lengths[0]).all():
        return [(slice(None), int(lengths[0]))]
    return [(slice(b, b + 1), n) for b, n in enumerate(lengths.tolist())]


def grouped_query_attention(code: LearnersCode) -> Callable[..., Tensor]:
    from llmcourse.models import attention

    own = attention.attend

    def attend(q: Tensor, k: Tensor, v: Tensor, step: Step, scale: float | None = None) -> Tensor:
        import torch

        rows = prefixes(mask_of(step, q, k)) if k.shape[-1] == v.shape[-1] else None
        if rows is None:
            return own(q, k, v, step, scale)
        if scale is not None:  # the function divides by √D
            q = q * (scale * q.shape[-1] ** 0.5)
        return torch.cat([_checked(code, q[r], k[r, :, :n], v[r, :, :n]) for r, n in rows])

    return attend


def _checked(code: LearnersCode, q: Tensor, *rest: Tensor) -> Tensor:
    return tensor(code, code(q, *rest), q, tuple(q.shape), "the result")


def absorbed_attention(code: LearnersCode) -> Callable[..., Tensor]:
    from llmcourse.models.mla import LatentAttention

    own = LatentAttention.absorbed

    def absorbed(self: LatentAttention, nope: Tensor, rope: Tensor, latent: Tensor, step: Step) -> Tensor:
        import torch

        rows = prefixes(mask_of(step, nope, latent[:, None]))
        if rows is None:
            return own(self, nope, rope, latent, step)
        sizes = self.sizes
        up = self.kv_up.weight.detach().view(self.n_heads, -1, sizes.kv_rank)
        weights = up.split([sizes.nope_dim, sizes.v_dim], dim=1)
        sharper = self.scale * sizes.qk_dim**0.5  # the function divides by √(Dn + Dr)
        nope, rope = nope * sharper, rope * sharper
        shape = (self.n_heads, nope.shape[2], sizes.v_dim)
        results = []
        for r, n in rows:
            kept = latent[r, :n].split([sizes.kv_rank, sizes.rope_dim], dim=-1)
            y = code(nope[r], rope[r], *kept, *weights)
            results.append(tensor(code, y, nope, (len(nope[r]), *shape), "the result"))
        return torch.cat(results)

    return absorbed


def window_mask(code: LearnersCode) -> Callable[..., Tensor]:
    def window_mask(queries: Tensor, keys: Tensor, window: int, sinks: int) -> Tensor:
        import torch

        keys = keys.expand(len(queries), -1)
        like = torch.empty(0, dtype=torch.bool, device=queries.device)
        masks = [
            tensor(code, code(q, k, window, sinks), like, (len(q), len(k)), "the mask")
            for q, k in zip(queries, keys, strict=True)
        ]
        return torch.stack(masks)[:, None]

    return window_mask


def rolling_update(code: LearnersCode) -> type:
    import torch

    from llmcourse.models.cache import RollingState

    class LearnersState(RollingState):
        """Keys and values side by side in slots [B, Hkv, C, 2·D], and the position in each, held [B, C]."""

        def __init__(
            self,
            config: ModelConfig,
            batch: int,
            max_len: int,
            *,
            dtype: torch.dtype = torch.float32,
            device: torch.device | str = "cpu",
        ) -> None:
            self.window, self.sinks = config.window, config.sinks
            size = self.window + self.sinks
            shape = (batch, config.n_kv_heads, size, 2 * config.head_dim)
            self.slots = torch.zeros(shape, dtype=dtype, device=device)
            self.held = torch.full((batch, size), -1, device=device)

        def extend(self, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor, Step]:
            if step.start == 0:
                self.held.fill_(-1)
            new = torch.cat((k, v), dim=-1)
            found = [self._update(new[row], row, start) for row, start in self._rows(step)]
            seen, held = _one_length(found)
            keys, values = seen.split(k.shape[-1], dim=-1)
            return keys, values, step.windowed(self.window, self.sinks, held)

        def _rows(self, step: Step) -> Iterator[tuple[slice, int]]:
            """All rows at once where they are at one position and hold theirs in the same slots."""
            if step.start is not None and bool((self.held == self.held[:1]).all()):
                yield slice(None), step.start
                return
            for b, start in enumerate(step.positions.tolist()):
                yield slice(b, b + 1), start

        def _update(self, new: Tensor, row: slice, start: int) -> tuple[Tensor, Tensor]:
            slots, held = self.slots[row], self.held[row]
            args = (slots, held[0].clone(), new, start, self.window, self.sinks)
            names = ("seen", "seen_positions", "slots", "positions")
            seen, at, slots_after, held_after = code.parts(code(*args), names)
            length = at.shape[0] if isinstance(at, torch.Tensor) and at.dim() == 1 else 0
            tensor(code, at, held, (length,), "seen_positions")
            tensor(code, seen, new, (*slots.shape[:2], length, slots.shape[3]), "seen")
            slots.copy_(tensor(code, slots_after, slots, tuple(slots.shape), "slots"))
            held.copy_(tensor(code, held_after, held, tuple(held.shape[1:]), "positions"))
            return seen, at.expand(len(new), -1)

    return LearnersState


def _one_length(found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """What the rows see, in one tensor: shorter ones end with empty slots."""
    import torch
    import torch.nn.functional as F

    longest = max(seen.shape[2] for seen, _ in found)
    keys = [F.pad(seen, (0, 0, 0, longest - seen.shape[2])) for seen, _ in found]
    held = [F.pad(at, (0, longest - at.shape[1]), value=-1) for _, at in found]
    return torch.cat(keys), torch.cat(held)


def mean_pool_heads(code: LearnersCode) -> Callable[..., Tensor]:
    from llmcourse.models import convert_gqa

    own = convert_gqa._pool

    def pool(stacked: Tensor, config: ModelConfig, n_kv_heads: int, how: str, *rest: Any) -> Tensor:
        import torch

        if how != "mean":
            return own(stacked, config, n_kv_heads, how, *rest)  # type: ignore[arg-type]
        old, dim = config.n_kv_heads, config.head_dim
        queries, *others = stacked.split([config.n_heads * dim, old * dim, old * dim])
        shape = (n_kv_heads * dim, *stacked.shape[1:])
        pooled = [tensor(code, code(x, old, n_kv_heads), x, shape, "the result") for x in others]
        return torch.cat((queries, *pooled))

    return pool


_POINTS: tuple[tuple[str, tuple[str, ...], str, str, tuple[str, ...], Any], ...] = (
    (
        "mean_pool_heads",
        ("weight", "n_heads", "n_kv_heads"),
        "tensor",
        "A key or value projection [H·D, E] of n_heads, each group's heads replaced by their mean.",
        (f"{MODELS}.convert_gqa:_pool",),
        mean_pool_heads,
    ),
    (
        "grouped_query_attention",
        ("q", "k", "v"),
        "tensor",
        "Causal attention of the last S of T tokens: q [B, Hq, S, D] over k, v [B, Hkv, T, D].",
        ATTEND,
        grouped_query_attention,
    ),
    (
        "absorbed_attention",
        ("q_nope", "q_rope", "latent", "k_rope", "w_uk", "w_uv"),
        "tensor",
        "MLA of q_nope [B, H, S, Dn] and q_rope [B, H, S, Dr] over latent [B, T, R], k_rope [B, T, Dr].",
        (f"{MODELS}.mla:LatentAttention.absorbed",),
        absorbed_attention,
    ),
    (
        "window_mask",
        ("queries", "keys", "window", "sinks"),
        "tensor",
        "True where a query [S] may look at a slot [C], both given by position (−1: empty): bool [S, C].",
        (f"{MODELS}.step:window_mask",),
        window_mask,
    ),
    (
        "rolling_update",
        ("slots", "positions", "new", "start", "window", "sinks"),
        "(seen, seen_positions, slots, positions)",
        "new [B, H, S, D] written to a ring of slots [B, H, C, D], and what the S tokens see.",
        (f"{MODELS}.attention:WindowAttention.state",),
        rolling_update,
    ),
)

for _point in _POINTS:
    register(Point(*_point))
