"""The points of `llmcourse.models`: a decoder block computed by a learner's kernels.

A point hands over two-dimensional tensors, as kernels like them, and looks at what comes back: shape, number
format, device. It says nothing about where the kernel runs. On a GPU that is the GPU; on a CPU the launches
need `llmcourse.kernels.counters.interpreting` around them, or `device.gpu_or_interpreter` before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from llmcourse.plug.point import LearnersCode, Point, kind, register

if TYPE_CHECKING:
    from torch import Tensor

    from llmcourse.models.block import Block
    from llmcourse.models.linear import Linear
    from llmcourse.models.mlp import MLP
    from llmcourse.models.norm import RMSNorm
    from llmcourse.models.state import State
    from llmcourse.models.step import Step

MODELS = "llmcourse.models"
ATTEND = tuple(f"{MODELS}.{module}:attend" for module in ("attention", "mla", "encoder_decoder"))
"""Every module that attends."""


def tensor(code: LearnersCode, value: Any, like: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
    """`value`, a tensor of that shape and of `like`'s format and device; PlugError for anything else."""
    import torch

    why = f"The model goes on with it as if it were its own. {code.point.says}"
    if not isinstance(value, torch.Tensor):
        fix = "a `return` at its end." if value is None else "a torch tensor."
        code.refuse(f"{what} is {kind(value)}, and should be a tensor of shape {list(shape)}", why, fix)
    if tuple(value.shape) != tuple(shape):
        code.refuse(
            f"{what} has shape {list(value.shape)}, and should have {list(shape)}", why, "the input's shape."
        )
    if value.dtype != like.dtype or value.device != like.device:
        code.refuse(
            f"{what} is {value.dtype} on {value.device}, and should be {like.dtype} on {like.device}",
            why,
            "torch.empty(…, dtype=x.dtype, device=x.device).",
        )
    return value


def rows(x: Tensor) -> Tensor:
    """x [..., N] as [M, N]."""
    return x.reshape(-1, x.shape[-1])


def swiglu(code: LearnersCode) -> Callable[[MLP, Tensor], Tensor]:
    def forward(self: MLP, x: Tensor) -> Tensor:
        gate, up = (rows(half).contiguous() for half in self.gate_up(x).chunk(2, dim=-1))
        y = tensor(code, code(gate, up), gate, gate.shape, "the result")
        return self.down(y.view(*x.shape[:-1], -1))

    return forward


def softmax(code: LearnersCode) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, step: Step, scale: float | None = None) -> Tensor:
        """Attention in three steps: scores [B, Hq, S, T], their softmax, and the weighted sum of values."""
        shared = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores.masked_fill(~mask_of(step, q, k), float("-inf"))
        flat = rows(scores)
        return tensor(code, code(flat), flat, flat.shape, "the result").view(scores.shape) @ v

    return attend


def mask_of(step: Step, q: Tensor, k: Tensor) -> Tensor:
    """Where each query may look, bool [B, 1, S, T], also where the package leaves it to its kernels."""
    import torch

    new, keys = q.shape[2], k.shape[2]
    seen = step.mask
    if seen is None:
        seen = torch.ones(new, keys, dtype=torch.bool, device=q.device)
        seen = seen.tril(keys - new) if step.causal else seen
    return seen.expand(len(q), 1, new, keys)


def rms_norm(code: LearnersCode) -> Callable[[RMSNorm, Tensor], Tensor]:
    def forward(self: RMSNorm, x: Tensor) -> Tensor:
        flat = rows(x)
        y = code(flat, self.weight.detach(), self.eps)
        return tensor(code, y, flat, flat.shape, "the result").view(x.shape)

    return forward


def add_rms_norm(code: LearnersCode) -> Callable[..., Tensor]:
    from llmcourse.models.block import Block
    from llmcourse.models.norm import RMSNorm

    own = Block.forward

    def forward(self: Block, x: Tensor, step: Step, state: State | None) -> Tensor:
        if self.post_norm or not isinstance(self.mlp_norm, RMSNorm):
            return own(self, x, step, state)  # no sum in this block is followed by an RMSNorm
        attended = rows(self.mixer(self.mixer_norm(x), step, state))
        norm, mlp = self.mlp_norm, cast("MLP", self.mlp)
        results = code(attended, rows(x), norm.weight.detach(), norm.eps)
        h, y = (
            tensor(code, part, attended, attended.shape, name)
            for name, part in zip(("h", "y"), code.parts(results, ("h", "y")), strict=True)
        )
        return h.view(x.shape) + mlp(y.view(x.shape))

    return forward


def matmul(code: LearnersCode) -> Callable[[Linear, Tensor], Tensor]:
    def forward(self: Linear, x: Tensor) -> Tensor:
        flat, weight = rows(x), self.weight.detach().T
        shape = flat.shape[0], weight.shape[1]
        y = tensor(code, code(flat, weight), flat, shape, "the result").view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    return forward


for _point in (
    Point(
        "swiglu",
        ("gate", "up"),
        "tensor",
        "gate / (1 + exp(−gate)) · up, of two contiguous tensors [M, N].",
        (f"{MODELS}.mlp:MLP.forward",),
        swiglu,
    ),
    Point(
        "softmax",
        ("x",),
        "tensor",
        "Softmax of the rows of x [M, N]: of attention's scores, −inf where a query may not look.",
        ATTEND,
        softmax,
    ),
    Point(
        "rms_norm",
        ("x", "weight", "eps"),
        "tensor",
        "RMSNorm of the rows of x [M, N], scaled by weight [N].",
        (f"{MODELS}.norm:RMSNorm.forward",),
        rms_norm,
    ),
    Point(
        "add_rms_norm",
        ("x", "residual", "weight", "eps"),
        "(h, y)",
        "h = x + residual and y = rms_norm(h), of rows [M, N].",
        (f"{MODELS}.block:Block.forward",),
        add_rms_norm,
    ),
    Point(
        "matmul",
        ("a", "b"),
        "tensor",
        "The product of a [M, K] and b [K, N], the transposed view of a weight.",
        ("llmcourse.models.linear:Linear.forward",),
        matmul,
    ),
):
    register(_point)
