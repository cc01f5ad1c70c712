"""Exercise `ring_all_reduce`: the sum on every worker, with no worker sending more than it must."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.compare import Mismatch, as_array
from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch
from llmcourse.labs.lab13_distributed_training.workers import Workers

ring_all_reduce = Exercise(
    "ring_all_reduce",
    title="All-reduce on a ring",
    arguments=("rank", "world_size", "x", "send", "recv"),
    shapes=(
        "rank        this worker's number, 0 … W − 1;  world_size  W, 2 or more",
        "x           float32 tensor [n], this worker's numbers; n is any length, also below W",
        "send        send(numbers): a tensor goes to worker (rank + 1) % W; returns at once",
        "recv        recv(): the next tensor from worker (rank − 1) % W; waits until it is there",
        "returns     tensor [n]: the sum of all workers' x, the same bits on every worker; x itself is",
        "            left as it was",
        "cost        a worker sends at most 2·(W − 1)·⌈n / W⌉ numbers, in at most 2·(W − 1) messages",
    ),
    formula="y = Σ_r x_r: chunk c is summed on its way round the ring, then goes round once more, finished",
    difficulty=4,
    importance=5,
    minutes=35,
    points=7,
    hints=(
        "Cut x into W chunks. If one chunk travels round the ring and each worker adds its own part, it is "
        "finished after W − 1 steps. What can the other links do meanwhile? And which worker has which "
        "finished chunk then?",
        "Step s of W − 1: worker r sends chunk (r − s) % W and adds what it receives to its chunk "
        "(r − s − 1) % W. Then worker r holds the finished chunk (r + 1) % W. In W − 1 more steps it sends "
        "chunk (r + 1 − s) % W and *replaces* its chunk (r − s) % W by what it receives. tensor_split cuts "
        "lengths that W does not divide.",
        "chunks = [c.clone() for c in x.tensor_split(world_size)]; for s in range(world_size - 1): "
        "send(chunks[(rank - s) % world_size]); chunks[(rank - s - 1) % world_size] += recv(). Then the "
        "same loop with send(chunks[(rank + 1 - s) % world_size]) and chunks[(rank - s) % world_size] = "
        "recv(). Return torch.cat(chunks).",
    ),
)


def _run(t: Trial, world_size: int, n: int) -> tuple[Workers, list[Any], list[Any]]:
    """The workers, what each returned, and what each had."""
    given = [tensor(t, n) for _ in range(world_size)]
    workers = Workers(t, world_size, limit=16 * world_size)
    got = workers.run(lambda rank: (rank, world_size, given[rank]), ring=True)
    return workers, got, given


def _sum(t: Trial, world_size: int, n: int) -> None:
    _, got, given = _run(t, world_size, n)
    want = np.sum([x.double().numpy() for x in given], axis=0)
    for rank, y in enumerate(got):
        t.close(y, want, f"worker {rank} of {world_size}", rtol=1e-5)


@ring_all_reduce.check("every worker gets the sum of all, when W divides the length")
def values(t: Trial) -> None:
    for world_size in (2, 3, 4):
        _sum(t, world_size, world_size * t.size(2, 5))


@ring_all_reduce.check("any length: one that W does not divide, one below W, a single number")
def lengths(t: Trial) -> None:
    _sum(t, 3, 3 * t.size(3, 6) + 1)
    _sum(t, 4, 4 * t.size(2, 5) + 3)
    _sum(t, 3, 2)
    _sum(t, 4, 1)


@ring_all_reduce.check("x is left as it was")
def untouched(t: Trial) -> None:
    _run(t, 3, t.size(7, 12))
    for call in t.calls:
        if 2 in call.changed:
            raise Mismatch(
                "x was written to; the caller still needs it", tries=".clone() of what is added to."
            )


@ring_all_reduce.check("all workers have the same bits")
def same_bits(t: Trial) -> None:
    for world_size, n in ((3, 41), (4, 40)):
        _, got, _ = _run(t, world_size, n)
        first = as_array(got[0])
        for rank, y in enumerate(got):
            other = as_array(y)
            alike = first.shape == other.shape and first.dtype == other.dtype
            if not alike or first.tobytes() != other.tobytes():
                raise Mismatch(
                    f"workers 0 and {rank} of {world_size} return different "
                    f"{'numbers' if alike else 'shapes or number formats'}",
                    tries="each chunk summed once and passed on finished: float32 sums depend on the order.",
                )


@ring_all_reduce.check("no worker sends more than 2·(W − 1)·⌈n / W⌉ numbers")
def bytes_sent(t: Trial) -> None:
    for world_size, n in ((2, t.size(20, 30)), (4, t.size(40, 60)), (5, t.size(30, 50))):
        workers, _, _ = _run(t, world_size, n)
        most = 2 * (world_size - 1) * -(-n // world_size) * 4
        for rank, sent in enumerate(workers.sent):
            t.at_most(
                sent.nbytes,
                most,
                f"bytes sent by worker {rank} of {world_size}, with x of {4 * n} bytes",
                "one chunk a step, W − 1 steps to sum and W − 1 to spread.",
            )


@ring_all_reduce.check("no worker sends more than 2·(W − 1) messages")
def messages(t: Trial) -> None:
    for world_size in (2, 4):
        workers, _, _ = _run(t, world_size, t.size(16, 24))
        t.at_most(
            max(sent.messages for sent in workers.sent),
            2 * (world_size - 1),
            f"messages of a worker, of {world_size} workers",
            "a whole chunk a message: each message costs the link's latency.",
        )


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def ring(
    rank: int,
    world_size: int,
    chunks: list[Any],
    send: Any,
    recv: Any,
    *,
    steps: int | None = None,
    spread: int | None = None,
    into: int = 1,
    owner: int = 1,
    adds: bool = False,
) -> list[Any]:
    """The right ring, and what can be wrong with it."""
    w = world_size
    for s in range(w - 1 if steps is None else steps):
        send(chunks[(rank - s) % w])
        mine = (rank - s - into) % w
        chunks[mine] = chunks[mine] + recv()
    for s in range(w - 1 if spread is None else spread):
        send(chunks[(rank + owner - s) % w])
        mine = (rank + owner - s - 1) % w
        chunks[mine] = chunks[mine] + recv() if adds else recv()
    return chunks


def _cut(x: Any, world_size: int) -> list[Any]:
    return list(x.tensor_split(world_size))


@ring_all_reduce.mistake(
    says="every worker sends its whole x round the ring: W − 1 times n numbers",
    tries="chunks: each link carries a different chunk in each step.",
    caught_by="same_bits",
)
def whole_around(rank: Any, world_size: Any, x: Any, send: Any, recv: Any) -> Any:
    total, passing = x.clone(), x
    for _ in range(world_size - 1):
        send(passing)
        passing = recv()
        total += passing
    return total


@ring_all_reduce.mistake(
    says="all of x is gathered on every worker and summed there: W − 1 times n numbers",
    tries="sums that travel, chunk by chunk, in place of everybody's numbers.",
    caught_by="bytes_sent",
)
def gathered(rank: Any, world_size: Any, x: Any, send: Any, recv: Any) -> Any:
    all_of_them, passing = {rank: x}, x
    for s in range(world_size - 1):
        send(passing)
        passing = recv()
        all_of_them[(rank - s - 1) % world_size] = passing
    return torch.stack([all_of_them[r] for r in range(world_size)]).sum(0)


@ring_all_reduce.mistake(
    says="the sum is divided by W: that is the mean",
    tries="the sum; data parallelism divides afterwards.",
    caught_by="values",
)
def averaged(rank: Any, world_size: Any, x: Any, send: Any, recv: Any) -> Any:
    return torch.cat(ring(rank, world_size, _cut(x, world_size), send, recv)) / world_size


@ring_all_reduce.mistake(
    says="chunks are added on the second way round too, so that finished sums are counted again",
    tries="chunks[…] = recv() in the second loop: what arrives there is finished.",
    caught_by="values",
)
def added_twice(rank: Any, world_size: Any, x: Any, send: Any, recv: Any) -> Any:
    return torch.cat(ring(rank, world_size, _cut(x, world_size), send, recv, adds=True))


@ring_all_reduce.mistake(
    says="the finished chunks are not passed on: each worker has the sum of one chunk only",
    tries="W − 1 more steps in which finished chunks go round.",
    caught_by="values",
)
def reduce_scattered(rank: Any, world_size: Any, x: Any, send: Any, recv: Any) -> Any:
    return torch.cat(ring(rank, world_size, _cut(x, world_size), send, recv, spread=0))


@ring_all_reduce.mistake(
    says="the second way round begins with the worker's own chunk, which is finished elsewhere",
    tries="chunk (rank + 1) % W: the one that this worker added to last.",
    caught_by="values",
)
def own_chunk_first(rank: Any, world_size: Any, x: Any, send: Any, recv: Any) -> Any:
    return torch.cat(ring(rank, world_size, _cut(x, world_size), send, recv, owner=0))


@ring_all_reduce.mistake(
    says="what arrives is added to the chunk that was just sent, not to the one it belongs to",
    tries="worker rank − 1 sent its chunk (rank − 1 − s) % W: add to that one.",
    caught_by="values",
)
def wrong_chunk(rank: Any, world_size: Any, x: Any, send: Any, recv: Any) -> Any:
    return torch.cat(ring(rank, world_size, _cut(x, world_size), send, recv, into=0))


@ring_all_reduce.mistake(
    says="the sums make one step too few, and miss one worker",
    tries="range(world_size - 1): a chunk visits all the others.",
    caught_by="values",
)
def step_short(rank: Any, world_size: Any, x: Any, send: Any, recv: Any) -> Any:
    return torch.cat(ring(rank, world_size, _cut(x, world_size), send, recv, steps=world_size - 2))


@ring_all_reduce.mistake(
    says="chunks are n // W long: the rest is lost, and everything where n is below W",
    tries="x.tensor_split(world_size), whose chunks differ by one number at most.",
    caught_by="lengths",
)
def floored(rank: Any, world_size: Any, x: Any, send: Any, recv: Any) -> Any:
    size = len(x) // world_size
    chunks = [x[i * size : (i + 1) * size] for i in range(world_size)]
    return torch.cat(ring(rank, world_size, chunks, send, recv))


@ring_all_reduce.mistake(
    says="the chunks are views into x, and adding to them writes to x",
    tries="[c.clone() for c in x.tensor_split(world_size)].",
    caught_by="untouched",
)
def in_place(rank: Any, world_size: Any, x: Any, send: Any, recv: Any) -> Any:
    chunks, w = x.tensor_split(world_size), world_size
    for s in range(w - 1):
        send(chunks[(rank - s) % w])
        chunks[(rank - s - 1) % w].add_(recv())
    for s in range(w - 1):
        send(chunks[(rank + 1 - s) % w])
        chunks[(rank - s) % w].copy_(recv())
    return x


@ring_all_reduce.mistake(
    says="sums travel as float64, twice the bytes",
    tries="the number format of x.",
    caught_by="bytes_sent",
)
def doubled(rank: Any, world_size: Any, x: Any, send: Any, recv: Any) -> Any:
    return torch.cat(ring(rank, world_size, _cut(x.double(), world_size), send, recv)).float()


@ring_all_reduce.mistake(
    says="a full round is made each time, W steps: the last one brings what is there already",
    tries="range(world_size - 1), twice.",
    caught_by="bytes_sent",
)
def full_rounds(rank: Any, world_size: Any, x: Any, send: Any, recv: Any) -> Any:
    return torch.cat(ring(rank, world_size, _cut(x, world_size), send, recv, spread=world_size))


@ring_all_reduce.mistake(
    says="numbers are sent one by one: a message, and the link's latency, for each",
    tries="a whole chunk a message.",
    caught_by="messages",
)
def one_by_one(rank: Any, world_size: Any, x: Any, send: Any, recv: Any) -> Any:
    def pieces(numbers: Any) -> None:
        for one in numbers.split(4):
            send(one)

    def joined() -> Any:
        sizes = [len(c) for c in _cut(x, world_size)]
        chunk, first = [], len(asked)
        asked.append(0)
        s = first % (world_size - 1)
        index = (rank - s - 1) % world_size if first < world_size - 1 else (rank - s) % world_size
        for _ in range(max(1, -(-sizes[index] // 4))):
            chunk.append(recv())
        return torch.cat(chunk)

    asked: list[int] = []
    return torch.cat(ring(rank, world_size, _cut(x, world_size), pieces, joined))


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@ring_all_reduce.alternative("one loop of 2·(W − 1) steps: added in the first half, replaced in the second")
def one_loop(rank: Any, world_size: Any, x: Any, send: Any, recv: Any) -> Any:
    chunks = [c.clone() for c in x.tensor_split(world_size)]
    for s in range(2 * (world_size - 1)):
        send(chunks[(rank - s) % world_size])
        into = chunks[(rank - s - 1) % world_size]
        came = recv()
        into.copy_(into + came if s < world_size - 1 else came)
    return torch.cat(chunks)


@ring_all_reduce.alternative("padded to a multiple of W, as the rows of a matrix")
def padded(rank: Any, world_size: Any, x: Any, send: Any, recv: Any) -> Any:
    rows = torch.nn.functional.pad(x, (0, -len(x) % world_size)).view(world_size, -1).clone()
    for s in range(world_size - 1):
        send(rows[(rank - s) % world_size])
        rows[(rank - s - 1) % world_size] += recv()
    for s in range(world_size - 1):
        send(rows[(rank - s + 1) % world_size])
        rows[(rank - s) % world_size] = recv()
    return rows.flatten()[: len(x)]


@ring_all_reduce.alternative("worker r finishes chunk r: it begins with the chunk before its own")
def finishes_own(rank: Any, world_size: Any, x: Any, send: Any, recv: Any) -> Any:
    chunks, w = dict(enumerate(x.tensor_split(world_size))), world_size
    for s in range(1, w):
        send(chunks[(rank - s) % w])
        chunks[(rank - s - 1) % w] = chunks[(rank - s - 1) % w] + recv()
    for s in range(w - 1):
        send(chunks[(rank - s) % w])
        chunks[(rank - s - 1) % w] = recv()
    return torch.cat([chunks[c] for c in range(w)])
