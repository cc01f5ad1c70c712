"""A model cut over ranks computes what the whole does, and what DTensor's cut of the same layers does."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse.errors import ShapeError
from llmcourse.models import KVCache, ModelConfig, Transformer
from llmcourse.models.mlp import MLP
from llmcourse.train.fit import build, cross_entropy, one_thread
from llmcourse.train.parallel.collectives import Wire
from llmcourse.train.parallel.launch import WorkerContext, run_workers
from llmcourse.train.parallel.tensor import (
    ColumnParallelLinear,
    ParallelAttention,
    ParallelMLP,
    RowParallelLinear,
    clip_grad_norm,
    parallelize,
    whole_state,
)
from llmcourse.train.tasks import Batch

CONFIG = ModelConfig(
    vocab_size=31, d_model=24, n_layers=2, n_heads=12, n_kv_heads=6, head_dim=4, d_ff=36, max_len=32
)
VARIANTS = {
    "GQA, SwiGLU": CONFIG,
    "biases, query and key norms": replace(CONFIG, bias=True, qk_norm=True),
    "a window, GELU, LayerNorm, its own head": replace(
        CONFIG, layers=("window", "attention"), window=5, mlp="gelu", norm="layer", tie_embeddings=False
    ),
}
CLIP = 0.7


def batches(steps: int = 10) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randint(0, 31, (3, 14), generator=generator) for _ in range(steps)]
    return [Batch((t[:, :-1],), t[:, :-1] // 4) for t in drawn]


def losses_of(model: Transformer, clip: Any) -> list[float]:
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for batch in batches():
        loss = cross_entropy(model, batch)
        optimizer.zero_grad()
        loss.backward()
        clip(model)
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_cut(context: WorkerContext, config: ModelConfig) -> dict[str, Any]:
    model, wire = parallelize(build(Transformer, config, seed=3), Wire()), Wire()
    losses = losses_of(model, lambda m: clip_grad_norm(m, wire, CLIP))
    common = {n: p.detach() for n, p in model.named_parameters() if "norm" in n or "embedding" in n}
    return {"losses": losses, "state": whole_state(model), "common": common}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_ten_steps_have_the_losses_and_weights_of_one_process(variant: str, ranks: int) -> None:
    config = VARIANTS[variant]
    alone = build(Transformer, config, seed=3)
    with one_thread():
        expected = losses_of(alone, lambda m: nn.utils.clip_grad_norm_(m.parameters(), CLIP))
    assert expected[-1] < expected[0] - 0.05
    results = run_workers(train_cut, ranks, config, echo=False)
    for result in results:
        assert result["losses"] == pytest.approx(expected, abs=1e-5)
        assert result["state"].keys() == alone.state_dict().keys()
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(result["state"][name], value, rtol=0, atol=2e-4, msg=name)
        for name, value in result["common"].items():  # nobody tells the ranks, and yet they agree
            assert torch.equal(value, results[0]["common"][name]), name


def counted(context: WorkerContext) -> tuple[str, str, int]:
    wire = Wire()
    model = parallelize(build(Transformer, CONFIG, seed=3), wire)
    loss = cross_entropy(model, batches(1)[0])
    forward = wire.summary()
    wire.reset()
    loss.backward()
    return forward, wire.summary(), wire.total_bytes


def test_a_block_costs_two_all_reduces_forward_and_two_backward() -> None:
    each = 2 * (3 - 1) * (3 * 13 * 24) * 4 // 3
    for result in run_workers(counted, 3, echo=False):
        assert result == ("all_reduce ×4", "all_reduce ×4", 4 * each)


# ── linear layers ───────────────────────────────────────────────────────────────────────────────────


def linear_gradients(context: WorkerContext, overlap: bool) -> float:
    """The largest difference from one whole layer: column with its outputs gathered, row with x cut."""
    wire, worst = Wire(), 0.0
    for bias in (True, False):
        torch.manual_seed(1)
        whole = nn.Linear(12, 18, bias=bias, dtype=torch.float64)
        x = torch.randn(2, 5, 12, dtype=torch.float64)
        cut: list[Any] = [
            ColumnParallelLinear(whole, wire, sections=(6, 12), gather_output=True, overlap=overlap),
            RowParallelLinear(whole, wire, cut_input=True),
        ]
        for layer in cut:
            mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
            y, expected = layer(mine), whole(theirs)
            if isinstance(layer, ColumnParallelLinear):  # the gathered sections lie rank by rank
                own = [p.chunk(wire.size) for p in torch.arange(18).split((6, 12))]
                order = torch.cat([part[r] for r in range(wire.size) for part in own])
                expected = expected[..., order]
            worst = max(worst, float((y - expected).abs().max()))
            (y.sin().sum()).backward()
            (expected.sin().sum()).backward()
            worst = max(worst, float((mine.grad - theirs.grad).abs().max()))  # type: ignore[operator]
            worst = max(worst, float((gathered_grad(layer) - whole.weight.grad).abs().max()))  # type: ignore[operator]
            whole.zero_grad()
    return worst


def gathered_grad(layer: Any) -> Tensor:
    other = copy.copy(layer)
    other._parameters = dict(layer._parameters) | {"weight": nn.Parameter(layer.weight.grad)}
    return other.whole("weight")


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_linear_layers_equal_the_whole_in_float64(ranks: int, overlap: bool) -> None:
    assert max(run_workers(linear_gradients, ranks, overlap, echo=False)) < 1e-12


# ── DTensor ─────────────────────────────────────────────────────────────────────────────────────────


class Apart(nn.Module):
    """Attention and SwiGLU with one matrix for each of their seven weights, as DTensor's plans want them."""

    def __init__(self, e: int, q: int, kv: int, hidden: int) -> None:
        super().__init__()
        for name, n, k in (
            *(("q", q, e), ("k", kv, e), ("v", kv, e), ("o", e, q)),
            *(("gate", hidden, e), ("up", hidden, e), ("down", e, hidden)),
        ):
            setattr(self, name, nn.Linear(k, n, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.view(*x.shape[:2], -1, CONFIG.head_dim).transpose(1, 2)

        y = F.scaled_dot_product_attention(
            heads(self.q(x)), heads(self.k(x)), heads(self.v(x)), is_causal=True, enable_gqa=True
        )
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def beside_dtensor(context: WorkerContext) -> dict[str, float]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    config = replace(CONFIG, position="none")
    whole, wire = build(Transformer, config, seed=3), Wire()
    block, step = whole.blocks[0], whole.plan(torch.zeros(2, 9, dtype=torch.long), None)
    theirs = Apart(24, 48, 24, 36)
    parts = dict(zip("qkv", block.mixer.qkv.weight.split(block.mixer.sizes), strict=True))
    parts |= dict(zip(("gate", "up"), block.mlp.gate_up.weight.chunk(2), strict=True))
    parts |= {"o": block.mixer.out.weight, "down": block.mlp.down.weight}
    theirs.load_state_dict({f"{name}.weight": value.detach() for name, value in parts.items()})
    mesh = init_device_mesh("cpu", (context.world_size,))
    plan = {n: ColwiseParallel() for n in ("q", "k", "v", "gate", "up")}
    peer = parallelize_module(theirs, mesh, plan | {"o": RowwiseParallel(), "down": RowwiseParallel()})
    attention, mlp = ParallelAttention(block.mixer, config, wire), ParallelMLP(block.mlp, wire)
    torch.manual_seed(2)
    x, weight = torch.randn(2, 9, 24), torch.randn(2, 9, 24)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    between = mine + attention(mine, step, None)
    y, expected = between + mlp(between), peer(other)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    stacked = [getattr(peer, n).weight.grad.to_local() for n in "qkv"]
    pairs = {
        "output": (y, expected),
        "x": (mine.grad, other.grad),
        "qkv": (attention.qkv.weight.grad, torch.cat(stacked)),
        "out": (attention.out.weight.grad, peer.o.weight.grad.to_local()),
        "down": (mlp.down.weight.grad, peer.down.weight.grad.to_local()),
    }
    return {name: float((a - b).abs().max()) for name, (a, b) in pairs.items()}


@pytest.mark.parametrize("ranks", [2, 3])
def test_outputs_and_gradients_are_those_of_dtensor(ranks: int) -> None:
    for result in run_workers(beside_dtensor, ranks, echo=False):
        assert result == pytest.approx(dict.fromkeys(result, 0.0), abs=1e-5)


# ── and further ─────────────────────────────────────────────────────────────────────────────────────


def decode_cut(context: WorkerContext) -> tuple[Tensor, bool]:
    model = parallelize(build(Transformer, CONFIG, seed=3), Wire()).fuse(False)
    tokens = batches(1)[0].inputs[0]
    with torch.no_grad():
        cache = KVCache(model.config, batch=3, max_len=13, dtype=torch.float32)
        steps = [model(tokens[:, i : i + 1], cache) for i in range(13)]
        return torch.cat(steps, dim=1), bool(torch.isfinite(model(tokens)).all())


def test_a_cut_model_decodes_with_a_cache_of_its_own_heads() -> None:
    with torch.no_grad():
        expected = build(Transformer, CONFIG, seed=3)(batches(1)[0].inputs[0])
    for logits, finite in run_workers(decode_cut, 2, echo=False):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        assert finite


def autocast_gradients(context: WorkerContext) -> float:
    torch.manual_seed(1)
    whole, x = MLP(CONFIG), torch.randn(2, 3, 24)
    cut = ParallelMLP(whole, Wire())
    with torch.autocast("cpu", torch.bfloat16):
        cut(x).float().sum().backward()
    whole(x).sum().backward()
    assert cut.down.weight.grad is not None
    assert whole.down.weight.grad is not None
    own = whole.down.weight.grad.chunk(context.world_size, dim=1)[context.rank]
    return float((cut.down.weight.grad - own).norm() / own.norm())


def test_it_trains_under_autocast() -> None:
    assert max(run_workers(autocast_gradients, 2, echo=False)) < 0.02


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (replace(CONFIG, n_kv_heads=3), "3 key/value heads cannot be dealt to 2 ranks"),
        (replace(CONFIG, d_ff=35), "35 hidden features cannot be dealt to 2 ranks"),
        (replace(CONFIG, layers=("attention", "linear")), "a layer of kind 'linear' cannot be cut here"),
    ],
)
def test_what_cannot_be_cut_is_said_and_left_whole(config: ModelConfig, says: str) -> None:
    model = build(Transformer, config, seed=3)
    names = list(model.state_dict())
    with pytest.raises(ShapeError, match=says):
        parallelize(model, SimpleNamespace(rank=0, size=2))  # type: ignore[arg-type]
    assert list(model.state_dict()) == names
    assert model.config == config
