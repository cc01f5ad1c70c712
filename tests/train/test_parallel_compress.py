"""CocktailSGD: packets that hold what they should, workers that lose nothing, a training that converges."""

from __future__ import annotations

import copy
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmcourse.errors import ShapeError
from llmcourse.train.fit import one_thread
from llmcourse.train.parallel.cocktail import CompressedDataParallel, Worker, flatten, simulate, views
from llmcourse.train.parallel.collectives import Wire
from llmcourse.train.parallel.compress import (
    DENSE,
    PAPER,
    Cocktail,
    Sampler,
    compress,
    decompress,
    dequantise,
    pack,
    quantise,
    unpack,
)
from llmcourse.train.parallel.fine_tune import Task, fine_tune, pretrain
from llmcourse.train.parallel.launch import run_workers
from llmcourse.train.parallel.link import Link, StepTime, sent

HOWS = [
    PAPER,
    DENSE,
    Cocktail(random=1.0, top=0.02),
    Cocktail(random=0.1, top=1.0, bits=8),
    Cocktail(random=0.3, top=0.5, bits=2, bucket=7),
    Cocktail(random=0.5, top=0.1, bits=32),
]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ── packets ──────────────────────────────────────────────────────────────────────────────────────────


@given(bits=st.integers(1, 8), n=st.integers(0, 70), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_numbers_come_back_from_their_bits_and_take_no_byte_more(bits: int, n: int, seed: int) -> None:
    numbers = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, n))
    packed = pack(numbers, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-n * bits // 8)
    assert torch.equal(unpack(packed, bits, n).long(), numbers)


def test_bits_lie_as_numpy_packs_them() -> None:
    mask = torch.arange(37) % 3 == 0
    assert pack(mask, 1).tolist() == np.packbits(mask.numpy(), bitorder="little").tolist()


@given(bits=st.integers(2, 8), n=st.integers(1, 300), seed=st.integers(0, 99), size=st.floats(-30, 30))
@settings(max_examples=60, deadline=None)
def test_quantised_values_are_at_most_half_a_step_away(bits: int, n: int, seed: int, size: float) -> None:
    values = normal(n, seed=seed) * 10.0**size
    numbers, scales = quantise(values, bits, 32)
    back = dequantise(numbers, scales, bits, 32)
    step = scales.float().repeat_interleave(32)[:n]
    top = 2 ** (bits - 1) - 1
    assert int(numbers.max()) <= 2 * top
    # The largest value of a bucket may lie beyond the grid by the rounding of the scale, 2⁻⁸ of it.
    assert bool(((back - values).abs() <= step * (0.5 + top * 2.0**-8) * 1.001).all())
    assert torch.equal(dequantise(*quantise(-values, bits, 32), bits, 32), -back)


@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("n", [1, 7, 129, 1000])
def test_a_packet_has_the_size_that_is_announced_and_holds_the_largest_moves(how: Cocktail, n: int) -> None:
    moves = normal(n, seed=n) * 1e-3
    packet = compress(moves, how)
    back = decompress(packet, n, how)
    assert packet.nbytes == how.nbytes(n)
    kept = moves.abs() >= moves.abs().topk(how.kept(n)).values[-1]
    assert not back[~kept].any()
    if how.bits == 32:
        assert torch.equal(back[kept], moves[kept])
    else:
        largest = moves.abs().max()
        assert float((back - moves)[kept].abs().max()) <= float(largest) * 0.51 / (2 ** (how.bits - 1) - 1)


def test_nothing_is_lost_in_a_dense_packet_and_zeros_stay_zeros() -> None:
    moves = normal(101)
    assert torch.equal(decompress(compress(moves, DENSE), 101, DENSE), moves)
    assert not decompress(compress(torch.zeros(300), PAPER), 300, PAPER).any()


def test_the_paper_s_setting_sends_less_than_a_fifth_of_a_bit_for_a_weight() -> None:
    bits = PAPER.bits_per_weight(10_000_000)
    assert bits == pytest.approx(0.1 * (1 + 0.2 * (4 + 16 / 128)), rel=1e-3)
    assert 170 < 32 / bits < 180


@pytest.mark.parametrize("weights", [10, 57, 1000])
@pytest.mark.parametrize("share", [0.1, 0.3, 1.0])
def test_every_weight_is_looked_at_once_a_round_and_every_worker_knows_which(
    weights: int, share: float
) -> None:
    rounds = Cocktail(random=share).rounds
    here, there = Sampler(weights, rounds, 3), Sampler(weights, rounds, 3)
    for first in (0, rounds):
        seen = Counter[int]()
        for step in range(first, first + rounds):
            assert torch.equal(here.at(step), there.at(step))
            seen.update(here.at(step).tolist())
        assert seen == Counter(range(weights))
    assert share == 1.0 or not torch.equal(here.at(0), Sampler(weights, rounds, 4).at(0))


# ── workers ──────────────────────────────────────────────────────────────────────────────────────────


def meet(workers: list[Worker], step: int) -> None:
    """One step's packets, all ways."""
    out = torch.stack([w.outgoing(step) for w in workers])
    answers = torch.stack([w.serve(step, out[:, w.rank]) for w in workers])
    for worker in workers:
        worker.incoming(step, answers)


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_what_is_not_sent_is_still_owed_by_somebody(how: Cocktail) -> None:
    size, n = 3, 60
    workers = [Worker(torch.zeros(n), rank, size, how) for rank in range(size)]
    moved = torch.zeros(n)
    for step in range(23):
        for worker in workers:
            move = normal(n, seed=100 * step + worker.rank)
            worker.local += move
            moved += move / size
        meet(workers, step)
        assert all(torch.equal(w.shared, workers[0].shared) for w in workers)
        unsent = torch.stack([w.local - w.shared for w in workers]).mean(0)
        owed = torch.cat([w.owed for w in workers])
        assert torch.allclose(workers[0].shared + unsent + owed, moved, atol=1e-4)


def test_without_feedback_most_of_the_moves_are_lost() -> None:
    workers = [Worker(torch.zeros(60), rank, 2, replace(PAPER, feedback=False)) for rank in range(2)]
    for step in range(10):
        for worker in workers:
            worker.local += 1.0
        meet(workers, step)
    assert float(workers[0].shared.mean()) < 3  # of 10


def test_a_constant_drift_arrives_everywhere_some_steps_late() -> None:
    drift, how = torch.linspace(0.1, 1.0, 40), Cocktail(random=0.5, top=0.25, bits=8)
    workers = [Worker(torch.zeros(40), rank, 2, how) for rank in range(2)]
    for step in range(200):
        for worker in workers:
            worker.local += drift
        meet(workers, step)
    late = (200 * drift - workers[0].shared) / drift  # in steps
    assert float(late.min()) > -1  # a quantised move may be a little too long
    assert float(late.max()) < 30


# ── training ─────────────────────────────────────────────────────────────────────────────────────────


def regression(seed: int) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, 3))
    x = normal(48, 6, seed=seed + 1)
    return model, x, torch.stack((x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3:].sum(1)), 1)


def part_of(x: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    return x[rank * len(x) // size : (rank + 1) * len(x) // size]


@one_thread()
def test_dense_moves_of_sgd_are_data_parallel_training() -> None:
    model, x, y = regression(0)
    alone = copy.deepcopy(model)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    losses = []
    for _ in range(12):
        loss = nn.functional.mse_loss(alone(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    def backward(rank: int, step: int) -> float:
        loss = nn.functional.mse_loss(model(part_of(x, rank, 3)), part_of(y, rank, 3))
        loss.backward()
        return loss.item()

    found = simulate(model, backward, lambda p: torch.optim.SGD(p, lr=0.1), world_size=3, steps=12, how=DENSE)
    assert np.allclose(found.losses, losses, atol=1e-6)
    for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


def in_processes(context, how: Cocktail, steps: int, link: Link | None, compute: float) -> tuple:
    model, x, y = regression(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    wire = Wire(dist.new_group())
    parallel = CompressedDataParallel(model, wire, how, link=link)
    dist.barrier()
    began = time.perf_counter()
    for _ in range(steps):
        mine = (part_of(t, context.rank, context.world_size) for t in (x, y))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(next(mine)), next(mine)).backward()
        time.sleep(compute)
        optimizer.step()
        parallel.synchronise()
    parallel.finish()
    seconds = time.perf_counter() - began
    return flatten(list(model.parameters())), wire.total_bytes, seconds, dict(wire.calls)


@pytest.mark.parametrize("how", [PAPER, replace(PAPER, delay=0), DENSE], ids=["late", "in time", "dense"])
@one_thread()
def test_processes_get_the_simulation_s_weights_to_the_bit_and_its_bytes(how: Cocktail) -> None:
    size, steps = 2, 25
    model, x, y = regression(0)

    def backward(rank: int, step: int) -> float:
        loss = nn.functional.mse_loss(model(part_of(x, rank, size)), part_of(y, rank, size))
        loss.backward()
        return loss.item()

    found = simulate(
        model, backward, lambda p: torch.optim.AdamW(p, lr=0.01), world_size=size, steps=steps, how=how
    )
    results = run_workers(in_processes, size, how, steps, None, 0.0, echo=False)
    for weights, nbytes, _, calls in results:
        assert torch.equal(weights, flatten(list(model.parameters())))
        assert calls == {"all_to_all": steps, "all_gather": steps}
        assert nbytes <= found.bytes_per_step * steps
        assert nbytes > 0.9 * found.bytes_per_step * steps  # the last slice of a round may be shorter


def test_what_travels_during_the_next_step_costs_no_time() -> None:
    link = Link(0.05)  # two messages a step, of some tens of bytes: about 2 · 25 ms
    waits, hides = (
        max(r[2] for r in run_workers(in_processes, 2, replace(PAPER, delay=d), 8, link, 0.05, echo=False))
        for d in (0, 1)
    )
    per_step = run_workers(in_processes, 2, PAPER, 8, None, 0.0, echo=False)[0][1] / 8
    sending = link.seconds(per_step)
    assert waits > 8 * (0.05 + sending)
    assert hides > 8 * max(0.05, sending)
    assert hides < waits - 4 * min(0.05, sending)


def test_a_char_gpt_at_the_paper_s_setting_ends_within_a_hundredth_of_dense() -> None:
    task = Task()
    start = pretrain(task, 200)
    ends = {}
    for name, how in {"dense": None, "paper": PAPER, "forgets": replace(PAPER, feedback=False)}.items():
        runs = run_workers(fine_tune, 2, start, task, how, echo=False, timeout=120)
        ends[name] = runs[0].held_out
        assert name == "dense" or runs[1].held_out == runs[0].held_out  # the shared weights, to the bit
        assert (name == "dense") == (runs[0].sent > 170 * PAPER.nbytes(86_592 // 20))
    assert ends["dense"] < ends["paper"] < 1.01 * ends["dense"]
    assert ends["paper"] < ends["forgets"]


@pytest.mark.parametrize("how", [None, PAPER], ids=["dense", "paper"])
def test_a_slow_link_is_waited_for_only_as_long_as_computing_does_not_hide_it(how) -> None:
    task, link = Task(steps=6), Link(20)
    start = pretrain(task, 0)
    runs = run_workers(fine_tune, 2, start, task, how, link, echo=False)
    assert runs[0].seconds > 0.8 * link.seconds(runs[0].sent)  # the last packets leave when training is over


# ── the link ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_link_s_time_is_its_bytes_and_its_latency() -> None:
    link = Link(500, latency_ms=2)
    assert link.seconds(62_500_000) == pytest.approx(1.002)
    assert link.seconds(0, messages=3) == pytest.approx(0.006)
    assert str(link) == "emulated link of 500 Mbit/s, 2 ms"
    assert str(Link(10_000)) == "emulated link of 10 Gbit/s"
    assert StepTime(2.0, 3.0, overlapped=True).step == 3.0
    assert StepTime(2.0, 3.0, overlapped=False).step == 5.0


def test_what_a_wire_sends_on_a_link_takes_its_time_and_what_took_longer_is_not_held_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wire, link = SimpleNamespace(bytes_sent={"send": 0}), Link(8)  # a byte a µs
    began = time.perf_counter()
    with link.carrying(wire):
        wire.bytes_sent["send"] += 60_000
    assert time.perf_counter() - began >= 0.06
    assert sent(wire) == 60_000
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with link.carrying(wire):
        busy = time.perf_counter() + 0.001
        while time.perf_counter() < busy:
            wire.bytes_sent["send"] = 60_010
    assert slept == []


# ── faults ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Cocktail(random=0.0),
        lambda: Cocktail(top=1.5),
        lambda: Cocktail(bits=1),
        lambda: Cocktail(bits=16),
        lambda: Cocktail(delay=2),
        lambda: Link(0),
        lambda: Link(10, latency_ms=-1),
        lambda: Worker(torch.zeros(10), 0, 3, PAPER),
        lambda: Worker(torch.zeros(9), 3, 3, PAPER),
        lambda: decompress(torch.zeros(9, dtype=torch.uint8), 100, PAPER),
    ],
)
def test_what_cannot_be_is_refused_in_three_parts(wrong) -> None:
    with pytest.raises(ShapeError) as error:
        wrong()
    assert all((error.value.what, error.value.why, error.value.fix))


def test_flat_weights_are_padded_with_zeros_and_seen_through_views() -> None:
    tensors = [normal(3, 5), normal(4)]
    flat = flatten(tensors, multiple=6)
    assert len(flat) == 24
    assert not flat[19:].any()
    seen = list(views(flat, tensors))
    assert all(torch.equal(a, b) for a, b in zip(seen, tensors, strict=True))
    seen[1][:] = 7.0
    assert flat[15:19].tolist() == [7.0] * 4
