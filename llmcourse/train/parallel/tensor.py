"""Tensor parallelism: each rank holds a part of every weight matrix, and all work on the same tokens.

A product x·Wᵀ can be cut in two ways (Shoeybi et al. 2019, Megatron-LM, arXiv:1909.08053):

    column-parallel   W [N, K] cut along N: each rank computes other output features, from the whole x
    row-parallel      W [N, K] cut along K: each rank computes a part of every output's sum, from its features

One after the other they need a single sum: what the first gives is what the second wants. So a feed-forward
part is cut along F, attention along its heads (queries with the key/value heads that they share), and a block
costs two all-reduces forward and two backward, each of B·S·E numbers:

               forward                          backward
    column     nothing: x is on all ranks       all-reduce of x's gradient: each rank knows a part of it
    row        all-reduce of the partial sums   nothing: the output's gradient is on all ranks

Everything else (embedding, norms, head) is whole on every rank, sees the same numbers there, and so keeps
the same weights without being told. The exception is a norm *inside* a head (`qk_norm`): each rank's heads
give it another gradient, which is summed.

`parallelize(model, wire)` turns a `Transformer` of this course into its share. The sums need all ranks twice
in each block, so this pays inside one machine, on its fast links.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmcourse.errors import ShapeError
from llmcourse.models.attention import Attention, WindowAttention
from llmcourse.models.config import ModelConfig
from llmcourse.models.linear import linear
from llmcourse.models.mlp import MLP, PlainMLP
from llmcourse.models.norm import RMSNorm
from llmcourse.models.transformer import Transformer
from llmcourse.train.parallel.collectives import Wire

# ── the four hand-overs: what is one thing forward is another backward ──────────────────────────────


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire) -> Tensor:
        ctx.wire = wire
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        ctx.wire.all_reduce(grad)
        return grad, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        wire.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire) -> Tensor:
        ctx.wire = wire
        return torch.cat(_all(x, wire), dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.wire.size, dim=-1)[ctx.wire.rank], None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire) -> Tensor:
        ctx.wire = wire
        return x.chunk(wire.size, dim=-1)[wire.rank].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.cat(_all(grad, ctx.wire), dim=-1), None


def copy_to_ranks(x: Tensor, wire: Wire) -> Tensor:
    """x itself; backward sums its gradient over the ranks, each of which used x for something else."""
    return _Copy.apply(x, wire)


def sum_over_ranks(x: Tensor, wire: Wire) -> Tensor:
    """The sum of the ranks' x, on all; backward hands the gradient of the sum to each term."""
    return _Reduce.apply(x, wire)


def gather_features(x: Tensor, wire: Wire) -> Tensor:
    """The ranks' x [..., N/p] side by side, [..., N]; backward gives each rank its own part."""
    return _Gather.apply(x, wire)


def own_features(x: Tensor, wire: Wire) -> Tensor:
    """This rank's part [..., N/p] of x [..., N]; backward gathers the parts' gradients."""
    return _Scatter.apply(x, wire)


class _ColumnProduct(torch.autograd.Function):
    """x·Wᵀ with a gradient of x that is summed over the ranks while the gradient of W is computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, wire: Wire) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.wire, ctx.has_bias = wire, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad_x = under_way = grad_w = grad_b = None
        rows = grad.flatten(0, -2)
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ weight).view(x.shape)
            under_way = ctx.wire.all_reduce(grad_x, async_op=True)
        if ctx.needs_input_grad[1]:
            grad_w = rows.T @ x.flatten(0, -2)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_b = rows.sum(0)
        if under_way is not None:
            under_way.wait()
        return grad_x, grad_w, grad_b, None


# ── linear layers ───────────────────────────────────────────────────────────────────────────────────


class Sharded(nn.Module):
    """A linear layer of which this rank holds a part.

    own      the names of the parameters that are a part; the others are whole on every rank
    """

    own: tuple[str, ...]
    weight: nn.Parameter
    bias: nn.Parameter | None
    wire: Wire

    def whole(self, name: str) -> Tensor:
        """The whole weight or bias, gathered from all ranks (which must all call this)."""
        raise NotImplementedError


class ColumnParallelLinear(Sharded):
    """Output features r·N/p … (r+1)·N/p of a linear layer, on rank r: x [..., K] → [..., N/p].

    linear         the whole layer, equal on all ranks; its weight [N, K] is cut, its bias too
    sections       where the weight is a stack of several (Q, K and V; gate and up): the rows of each, so
                   that every one of them is cut
    gather_output  put the ranks' outputs together, [..., N]
    overlap        send the gradient of x while that of the weight is computed

    Backward sums the gradient of x over the ranks: one all-reduce. Raises ShapeError where a section does
    not divide by the ranks.
    """

    def __init__(
        self,
        linear: nn.Linear,
        wire: Wire,
        *,
        sections: Sequence[int] = (),
        gather_output: bool = False,
        overlap: bool = True,
    ) -> None:
        super().__init__()
        self.wire, self.gather_output, self.overlap = wire, gather_output, overlap
        self.sections = list(sections) or [linear.out_features]
        for rows in self.sections:
            require_divides(rows, wire.size, "output features")
        self.weight = nn.Parameter(self._own_rows(linear.weight))
        self.bias = nn.Parameter(self._own_rows(linear.bias)) if linear.bias is not None else None
        self.own = ("weight", "bias")

    def forward(self, x: Tensor) -> Tensor:
        if self.overlap and torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type):
            y = _ColumnProduct.apply(x, self.weight, self.bias, self.wire)
        else:
            y = linear(copy_to_ranks(x, self.wire), self.weight, self.bias)
        return gather_features(y, self.wire) if self.gather_output else y

    def whole(self, name: str) -> Tensor:
        shares = _all(getattr(self, name).detach(), self.wire)
        rows = [n // self.wire.size for n in self.sections]
        by_section = zip(*(share.split(rows) for share in shares), strict=True)
        return torch.cat([part for section in by_section for part in section])

    def _own_rows(self, whole: Tensor) -> Tensor:
        n, r = self.wire.size, self.wire.rank
        return torch.cat([part.chunk(n)[r] for part in whole.detach().split(self.sections)])


class RowParallelLinear(Sharded):
    """Input features r·K/p … (r+1)·K/p of a linear layer, on rank r: x [..., K/p] → [..., N], summed.

    linear     the whole layer, equal on all ranks; its weight [N, K] is cut, its bias is whole on each and
               added once, after the sum
    cut_input  x comes whole, [..., K], and each rank takes its own features

    Forward sums over the ranks: one all-reduce. Raises ShapeError where K does not divide by the ranks.
    """

    def __init__(self, linear: nn.Linear, wire: Wire, *, cut_input: bool = False) -> None:
        super().__init__()
        self.wire, self.cut_input, self.own = wire, cut_input, ("weight",)
        require_divides(linear.in_features, wire.size, "input features")
        self.weight = nn.Parameter(linear.weight.detach().chunk(wire.size, dim=1)[wire.rank].contiguous())
        self.bias = nn.Parameter(linear.bias.detach().clone()) if linear.bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        x = own_features(x, self.wire) if self.cut_input else x
        y = sum_over_ranks(linear(x, self.weight), self.wire)
        return y if self.bias is None else y + self.bias

    def whole(self, name: str) -> Tensor:
        value = getattr(self, name).detach()
        return torch.cat(_all(value, self.wire), dim=1) if name in self.own else value


# ── the blocks of a model ───────────────────────────────────────────────────────────────────────────


class _HeadNorm(RMSNorm):
    """An RMSNorm of heads that are on several ranks: its weight is one, its gradient the sum of theirs."""

    def __init__(self, norm: RMSNorm, wire: Wire) -> None:
        super().__init__(len(norm.weight), norm.eps)
        self.wire, self.weight = wire, norm.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], copy_to_ranks(self.weight, self.wire), self.eps)


class ParallelAttention(Attention):
    """Heads r·Hq/p … (r+1)·Hq/p of an attention layer with the key/value heads that they share."""

    def __init__(self, whole: Attention, config: ModelConfig, wire: Wire) -> None:
        super().__init__(share_of(config, wire.size))
        _take_heads(self, whole, wire)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _project(self, x)


class ParallelWindowAttention(WindowAttention):
    """The same of a layer with a sliding window."""

    def __init__(self, whole: WindowAttention, config: ModelConfig, wire: Wire) -> None:
        super().__init__(share_of(config, wire.size))
        _take_heads(self, whole, wire)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _project(self, x)


class ParallelMLP(nn.Module):
    """Hidden features r·F/p … (r+1)·F/p of a SwiGLU feed-forward part: gate and up cut alike."""

    def __init__(self, whole: MLP, wire: Wire) -> None:
        super().__init__()
        hidden = whole.down.in_features
        self.gate_up = ColumnParallelLinear(whole.gate_up, wire, sections=(hidden, hidden))
        self.down = RowParallelLinear(whole.down, wire)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class ParallelPlainMLP(nn.Module):
    """The same of down(f(up(x)))."""

    def __init__(self, whole: PlainMLP, wire: Wire) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(whole.up, wire)
        self.down = RowParallelLinear(whole.down, wire)
        self.activation = whole.activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


def parallelize(model: Transformer, wire: Wire) -> Transformer:
    """Turn `model`, equal on all ranks, into this rank's share of it, in place; and return it.

    It computes the logits, losses and gradients of the whole. `model.config` then has the share's heads and
    F, so that KVCache(model.config, ...) has room for this rank's heads. Build the optimizer afterwards: the
    parameters are new.

    Raises ShapeError when the heads or F do not divide by the ranks, or a layer is not attention; the model
    is then as it was.
    """
    config, size = model.config, wire.size
    require_divides(config.n_heads, size, "query heads")
    require_divides(config.n_kv_heads, size, "key/value heads")
    require_divides(config.d_ff, size, "hidden features")
    for kind in config.kinds:
        if kind not in ("attention", "window"):
            raise ShapeError(
                f"a layer of kind {kind!r} cannot be cut here.",
                "Attention is cut along its heads, which do not see each other.",
                "layers of the kinds attention and window, or data parallelism.",
            )
    for block in model.blocks:
        attention = ParallelWindowAttention if type(block.mixer) is WindowAttention else ParallelAttention
        block.mixer = attention(block.mixer, config, wire)  # type: ignore[arg-type]
        if block.mlp is not None:
            parallel = ParallelMLP if isinstance(block.mlp, MLP) else ParallelPlainMLP
            block.mlp = parallel(block.mlp, wire)  # type: ignore[arg-type]
    model.config = share_of(config, size)
    return model


def share_of(config: ModelConfig, size: int) -> ModelConfig:
    """The configuration of one rank's heads and hidden features."""
    return replace(
        config,
        n_heads=config.n_heads // size,
        n_kv_heads=config.n_kv_heads // size,
        d_ff=config.d_ff // size,
    )


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the whole model, gathered on every rank: it loads into one that was not cut.

    All ranks must call this together.
    """
    state = {name: value.detach() for name, value in model.state_dict().items()}
    for prefix, module in model.named_modules():
        if isinstance(module, Sharded):
            for name in module.own:
                if getattr(module, name) is not None:
                    state[f"{prefix}.{name}".lstrip(".")] = module.whole(name)
    return state


@torch.no_grad()
def clip_grad_norm(model: nn.Module, wire: Wire, most: float) -> float:
    """Scale all gradients so that the norm of the whole model's is at most `most`; the norm before.

    The squares of cut parameters are summed over the ranks; those that every rank has count once.
    """
    own = {
        id(getattr(module, name))
        for module in model.modules()
        if isinstance(module, Sharded)
        for name in module.own
    }
    squares = torch.zeros(2, device=next(model.parameters()).device)  # of own, of common parameters
    gradients = [(id(p) not in own, p.grad) for p in model.parameters() if p.grad is not None]
    for common, grad in gradients:
        squares[int(common)] += grad.float().square().sum()
    own_squares = squares[:1].clone()
    wire.all_reduce(own_squares)
    norm = float((own_squares[0] + squares[1]).sqrt())
    if norm > most:
        for _, grad in gradients:
            grad *= most / norm
    return norm


def require_divides(n: int, size: int, what: str) -> None:
    """Raises ShapeError unless `size` ranks can hold equal parts of `n`."""
    if n % size:
        fits = [k for k in range(1, n + 1) if n % k == 0][:8]
        raise ShapeError(
            f"{n} {what} cannot be dealt to {size} ranks ({n} is not a multiple of {size}).",
            "All ranks do equal work at the same time, on parts of one shape.",
            f"a number of ranks out of {fits}.",
        )


def _take_heads(share: Attention, whole: Attention, wire: Wire) -> None:
    """Give a layer of few heads its part of a whole layer's weights."""
    share.qkv = ColumnParallelLinear(whole.qkv, wire, sections=whole.sizes)  # type: ignore[assignment]
    share.out = RowParallelLinear(whole.out, wire)  # type: ignore[assignment]
    share.q_norm = _HeadNorm(whole.q_norm, wire) if whole.q_norm is not None else None
    share.k_norm = _HeadNorm(whole.k_norm, wire) if whole.k_norm is not None else None


def _project(layer: Attention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Fused or not: slices of a cut weight would go past the sum that its backward owes."""
    heads = layer.split_heads(layer.qkv(x))
    return heads[:, : -layer.n_kv], heads[:, -layer.n_kv :]


def _all(x: Tensor, wire: Wire) -> tuple[Tensor, ...]:
    """Every rank's x, in order of rank."""
    x = x.contiguous()
    out = x.new_empty((wire.size * x.numel(),))
    wire.all_gather(out, x.view(-1))
    return tuple(part.view(x.shape) for part in out.chunk(wire.size))
