"""ZeRO takes the steps of one process, at every stage, with its states, gradients and parameters sharded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmcourse.errors import GraphError, ShapeError
from llmcourse.train.fit import cross_entropy, one_thread
from llmcourse.train.parallel.collectives import Wire
from llmcourse.train.parallel.data_parallel import shard_batch
from llmcourse.train.parallel.demo import Job, train, train_alone
from llmcourse.train.parallel.launch import WorkerContext, WorkerError, run_workers
from llmcourse.train.parallel.zero import Zero

JOB = Job(d_model=32, n_layers=2, length=16, batch=12)
STAGES = [1, 2, 3]


@pytest.fixture(scope="module")
def alone() -> list[float]:
    with one_thread():
        return train_alone(JOB)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_ten_steps_have_the_losses_of_one_process(n: int, stage: int, alone: list[float]) -> None:
    for losses, _ in run_workers(train, n, JOB, f"zero{stage}", echo=False):
        assert losses == pytest.approx(alone, abs=1e-5)


def by_fsdp2(context: WorkerContext) -> tuple[list[float], list[Tensor]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, batches = JOB.start(context.device)
    mesh = init_device_mesh("cpu", (context.world_size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = JOB.optimizer(model.parameters())
    losses = []
    for batch in batches:
        loss = cross_entropy(model, shard_batch(batch, context.rank, context.world_size))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [p.full_tensor().detach() for p in model.parameters()]  # type: ignore[attr-defined]


def by_zero(context: WorkerContext, stage: int, prefetch: bool = True) -> dict[str, Any]:
    model, batches = JOB.start(context.device)
    wire = Wire()
    zero = Zero(model, wire, JOB.optimizer, stage=stage, prefetch=prefetch)
    wire.reset()
    losses, held = [], {}
    for batch in batches:
        loss = cross_entropy(zero, shard_batch(batch, context.rank, context.world_size))  # type: ignore[arg-type]
        loss.backward()
        before = len(wire.sequence)
        held = zero.memory()
        zero.step()
        losses.append(loss.item())
        if len(losses) == 1:
            first, sent, at_step = wire.summary(), wire.total_bytes, len(wire.sequence) - before
    with zero.whole():
        weights = [p.detach().clone() for p in model.parameters()]
    return {
        "losses": losses,
        "weights": weights,
        "between": held,
        "after": zero.memory(),
        "sequence": first,
        "sent": sent,
        "at step": at_step,
        "units": len(zero.units),
    }


def test_losses_and_weights_are_those_of_fsdp2() -> None:
    theirs = run_workers(by_fsdp2, 2, echo=False)
    for stage in STAGES:
        for mine, (losses, weights) in zip(run_workers(by_zero, 2, stage, echo=False), theirs, strict=True):
            assert mine["losses"] == pytest.approx(losses, abs=1e-5)
            for a, b in zip(mine["weights"], weights, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [2, 3])
def test_each_stage_holds_its_share_and_no_more(n: int) -> None:
    size = sum(p.nbytes for p in JOB.start(torch.device("cpu"))[0].parameters())
    share = pytest.approx(size / n, rel=0.01)
    parameters = {1: pytest.approx(size, rel=0.01), 2: pytest.approx(size, rel=0.01), 3: share}
    gradients = {1: size, 2: share, 3: share}
    for stage in STAGES:
        for rank in run_workers(by_zero, n, stage, echo=False):
            assert rank["between"]["parameters"] == parameters[stage]
            assert rank["between"]["gradients"] == gradients[stage]
            assert rank["after"]["gradients"] == 0
            assert rank["after"]["optimizer"] == pytest.approx(2 * size / n, rel=0.03)


@pytest.mark.parametrize("n", [2, 3])
def test_a_step_makes_the_calls_and_sends_the_bytes_that_are_predicted(n: int) -> None:
    size = sum(p.nbytes for p in JOB.start(torch.device("cpu"))[0].parameters())
    runs = {stage: run_workers(by_zero, n, stage, echo=False)[0] for stage in STAGES}
    assert {run["units"] for run in runs.values()} == {3}  # the root and two blocks
    for stage in (1, 2):
        assert runs[stage]["sequence"] == "reduce_scatter ×3, all_gather ×3"
        assert runs[stage]["sent"] == pytest.approx(2 * (n - 1) / n * size, rel=0.01)
    assert runs[1]["at step"] == 6  # all at the end
    assert runs[2]["at step"] == 3  # gradients left during backward
    # The root is gathered once and each block twice; the last block while the root's backward runs.
    assert runs[3]["sequence"].count("all_gather") >= 1
    blocks = size - root_bytes()
    assert runs[3]["sent"] == pytest.approx((n - 1) / n * (2 * size + blocks), rel=0.01)


def root_bytes() -> int:
    model = JOB.start(torch.device("cpu"))[0]
    return sum(p.nbytes for p in model.parameters()) - sum(p.nbytes for p in model.blocks.parameters())


def test_prefetching_changes_the_order_and_neither_losses_nor_bytes() -> None:
    on, off = (run_workers(by_zero, 2, 3, prefetch, echo=False)[0] for prefetch in (True, False))
    assert on["losses"] == off["losses"]
    assert on["sent"] == off["sent"]
    assert on["sequence"] != off["sequence"]


class Odd(nn.Module):
    """Weights tied and shared between blocks, recomputed blocks, one not used, odd sizes, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 5)) for _ in range(3)
        )
        self.unused = nn.ModuleList([nn.Linear(3, 2)])
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.blocks[2][0].weight = self.blocks[0][0].weight  # of two units
        self.recompute = False

    def forward(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.recompute else block(x))
        return self.head(x), {"last": x}


def odd_loss(model: Any, tokens: Tensor) -> Tensor:
    logits, extra = model(tokens)
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()) + extra["last"].square().mean()


def odd_tokens() -> Tensor:
    return torch.randint(0, 11, (8, 12, 3), generator=torch.Generator().manual_seed(3))


def no_decay(name: str, p: nn.Parameter) -> dict[str, Any]:
    return {"weight_decay": 0.0 if p.dim() < 2 else 0.3}


MAKERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.02),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
}


def odd_alone(maker: str, clip: float) -> list[Tensor]:
    torch.manual_seed(0)
    model = Odd().double()
    used = [(name, p) for name, p in model.named_parameters() if not name.startswith("unused")]
    optimizer = MAKERS[maker]([{"params": [p], **no_decay(name, p)} for name, p in used])
    for tokens in odd_tokens():
        odd_loss(model, tokens).backward()
        nn.utils.clip_grad_norm_([p for _, p in used], clip)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for name, p in model.named_parameters() if not name.startswith("unused")]


def odd(context: WorkerContext, stage: int, maker: str, micro: int, clip: float) -> list[Tensor]:
    torch.manual_seed(context.rank)  # rank 0's weights must win
    model = Odd().double()
    zero = Zero(model, Wire(), MAKERS[maker], stage=stage, group_of=no_decay)
    model.recompute = micro == 1
    for tokens in odd_tokens():
        mine = tokens.chunk(context.world_size)[context.rank]
        for part in mine.chunk(micro):
            (odd_loss(zero, part) / micro).backward()
        with torch.no_grad():
            odd_loss(zero, mine)  # looking at the loss in between changes nothing
        zero.step(clip=clip)
        if stage == 3:
            assert not any(unit.present or unit.gathering is not None for unit in zero.units)
    with zero.whole():
        named = [(name, p.detach().clone()) for name, p in model.named_parameters()]
    return [p for name, p in named if not name.startswith("unused")]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("maker", "micro", "clip"), [("adamw", 1, 0.5), ("momentum", 2, 1e9)])
def test_odd_models_end_with_the_weights_of_one_process_to_double_precision(
    stage: int, maker: str, micro: int, clip: float
) -> None:
    """Tied, padded, recomputed, unused; groups of weight decay; clipped; accumulated over micro-batches."""
    expected = odd_alone(maker, clip)
    for n in (2, 3):
        for weights in run_workers(odd, n, stage, maker, micro, clip, echo=False):
            for mine, reference in zip(weights, expected, strict=True):
                torch.testing.assert_close(mine, reference, rtol=0, atol=1e-10)


def test_a_model_smaller_than_the_group_leaves_ranks_with_nothing_but_padding() -> None:
    def tiny(context: WorkerContext, stage: int) -> float:
        model = nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            model.weight.fill_(3.0)
        zero = Zero(model, Wire(), lambda groups: torch.optim.SGD(groups, lr=1.0), stage=stage)
        zero(torch.full((1, 1), float(context.rank))).sum().backward()
        zero.step()
        with zero.whole():
            return model.weight.item()

    for stage in STAGES:
        assert run_workers(tiny, 3, stage, echo=False) == [2.0] * 3  # 3 − the mean of 0, 1 and 2


def test_stage_3_has_no_whole_parameters_between_steps() -> None:
    def look(context: WorkerContext) -> tuple[int, int, int]:
        model, batches = JOB.start(context.device)
        zero = Zero(model, Wire(), JOB.optimizer, stage=3)
        most = 0

        def note(*_: object) -> None:
            nonlocal most
            most = max(most, sum(unit.present for unit in zero.units[1:]))

        for block in model.blocks:
            block.register_forward_hook(note)
        loss = cross_entropy(zero, shard_batch(next(batches), context.rank, context.world_size))  # type: ignore[arg-type]
        between = sum(unit.present for unit in zero.units)
        loss.backward()
        return most, between, sum(unit.flat.untyped_storage().nbytes() for unit in zero.units)

    for most, between, left in run_workers(look, 2, echo=False):
        assert most <= 2  # the block that computes and the one that is prefetched
        assert between == 1  # the root, with which backward begins
        assert left == 0


def test_a_stage_that_does_not_exist_and_a_frozen_model_are_refused() -> None:
    def wrong(context: WorkerContext, stage: int, trains: bool) -> None:
        Zero(nn.Linear(2, 2).requires_grad_(trains), Wire(), torch.optim.AdamW, stage=stage)

    for stage, trains, kind in ((4, True, ShapeError), (1, False, GraphError)):
        with pytest.raises(WorkerError) as caught:
            run_workers(wrong, 1, stage, trains, echo=False)
        assert isinstance(caught.value.original, kind)
