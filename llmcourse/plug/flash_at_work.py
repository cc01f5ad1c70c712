"""Lab 10's functions at work in a model: its text, a step's bytes, a head's gradients.

    at_work(online_attention, merge_partials, flash_bytes, flash_forward, flash_backward, llm=LLM(…))

The model generates through `flash_forward`, in every layer. A decoding step's cache is cut into two halves,
attended to one after the other and merged by `merge_partials`, as a GPU with room for more programs would do
it side by side. The queries, keys and values of the prompt in the first layer are kept, and the other three
functions are held against what the first says about them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmcourse.notebook import Table

if TYPE_CHECKING:
    from torch import Tensor

    from llmcourse.engine.llm import LLM

Function = Callable[..., Any]
PROMPT, TOKENS, TILE = "The capital of France is", 4, (16, 64)


@dataclass
class Attending:
    """What is plugged in at the point `flash_forward`: counts, and keeps the first call's tensors."""

    flash_forward: Function
    merge_partials: Function
    tile: tuple[int, int] = TILE
    whole: int = 0
    merged: int = 0
    first: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Any:
        if self.first is None:
            self.first = q, k, v
        if q.shape[1] > 1 or k.shape[1] == 1:
            self.whole += 1
            return self.flash_forward(q, k, v, causal, *self.tile)
        self.merged += 1
        cut = k.shape[1] // 2
        parts: list[Any] = []
        for part in (slice(0, cut), slice(cut, None)):
            parts += self.flash_forward(
                q, k[:, part].contiguous(), v[:, part].contiguous(), False, *self.tile
            )
        return self.merge_partials(*parts)


def at_work(
    online_attention: Function,
    merge_partials: Function,
    flash_bytes: Function,
    flash_forward: Function,
    flash_backward: Function,
    *,
    llm: LLM,
) -> Table:
    """A line for each function: where it worked, and what came of it."""
    from llmcourse.engine.sampler import SamplingParams
    from llmcourse.plug.point import plug
    from llmcourse.plug.same_text import same_text

    params = SamplingParams(max_tokens=TOKENS)
    (own,) = llm.generate([PROMPT], params)
    attending = Attending(flash_forward, merge_partials)
    with plug(flash_forward=attending):
        (mine,) = llm.generate([PROMPT], params)
    assert attending.first is not None  # a prompt was read
    q, k, v = (x.detach().float().cpu() for x in attending.first)
    said, counted = bytes_of(flash_bytes, flash_forward, q, k, v)
    off, grads_off = of_one_head(online_attention, flash_backward, q[0], k[0], v[0])
    return Table(
        ["your function", "where", "what came of it"],
        [
            ("flash_forward", f"{attending.whole} layers' prompts", repr(PROMPT + mine.text)),
            (
                "merge_partials",
                f"{attending.merged} decoding steps of a layer, keys in two parts",
                str(same_text(llm, PROMPT, own.tokens, mine.tokens)),
            ),
            (
                "flash_bytes",
                f"the prompt in a layer, {q.shape[1]} queries",
                f"{said:,} B, counted {counted:,} B",
            ),
            ("online_attention", "its first head", f"at most {off:.1g} from torch's"),
            ("flash_backward", "the gradients of that head", f"at most {grads_off:.1g} from autograd's"),
        ],
    )


def bytes_of(
    flash_bytes: Function,
    flash_forward: Function,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile: tuple[int, int] = TILE,
) -> tuple[int, int]:
    """(what flash_bytes says, what the counters count) of a causal prompt, q [Hq, S, D]."""
    from llmcourse.kernels.counters import counting

    with counting() as moved:
        flash_forward(q, k, v, True, *tile)
    heads, S, D = q.shape
    return heads * flash_bytes(S, k.shape[1], D, *tile, True, q.element_size()), moved.bytes


def of_one_head(
    online_attention: Function, flash_backward: Function, q: Tensor, k: Tensor, v: Tensor, block: int = 2
) -> tuple[float, float]:
    """How far out and the gradients are from torch, at most: a causal head q [S, D], k, v [T, D]."""
    import torch
    import torch.nn.functional as F

    mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
    leaves = a, b, c = tuple(x.clone().requires_grad_() for x in (q, k, v))
    exact = F.scaled_dot_product_attention(a, b, c, attn_mask=mask)
    dout = torch.cos(torch.arange(q.numel(), dtype=torch.float32)).view(q.shape)
    exact.backward(dout)
    out, lse = online_attention(q, k, v, mask, block)
    grads = flash_backward(q, k, v, out, lse, dout, True, block)
    far = [float((g - x.grad).abs().max()) for g, x in zip(grads, leaves, strict=True) if x.grad is not None]
    return float((out - exact.detach()).abs().max()), max(far)
