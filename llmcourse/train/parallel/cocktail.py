"""CocktailSGD: data parallelism over a slow network (Wang et al. 2023, PMLR 202:36058).

Dense data parallelism sends every gradient in every step. Here each worker takes an optimizer step of its own
on its own batch, and what travels is a small part of how far its weights have moved (`compress`).

**Nothing is lost, only late** (error feedback). What was not sent stays in the worker's own weights: their
difference from the copy that all workers share is the new move plus all that is still unsent, and it is
compressed again in a later step. The other direction does the same. Each worker is the *server* of one shard
of the weights: it averages the moves that arrive, adds what it still owes of earlier averages, compresses the
sum and sends it to all.

    worker i    move_i = local_i − shared;   local_i −= C(move_i);   C(move_i) goes to the servers
    server      mean = Σ C(move_i) / W + owed;   owed = mean − C(mean);   C(mean) goes to all workers
    all         local_i += C(mean);   shared += C(mean)

**Overlap.** local_i goes on learning while its packets travel: the averages of step t are added after step t
+ 1 (`delay`). The network has as long as a step's computation takes before anybody waits for it.

`Worker` is one worker's part and knows nothing of a network: the same object works W times in one process
(`simulate`) and once in each of W processes (`CompressedDataParallel`), with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from llmcourse.errors import ShapeError
from llmcourse.train.parallel.collectives import Wire
from llmcourse.train.parallel.compress import PAPER, Cocktail, Sampler, compress, decompress
from llmcourse.train.parallel.link import Link


class Worker:
    """One worker's weights in the cocktail, and the shard that it serves. Weights are flat: float32 [n].

    local    this worker's own weights, where its optimizer works; it may be changed between the calls
    shared   the same on every worker, to the bit
    owed     of this worker's shard: averages that were not sent yet
    """

    def __init__(self, local: Tensor, rank: int, world_size: int, how: Cocktail, *, seed: int = 0) -> None:
        if not 0 <= rank < world_size or len(local) % world_size or not len(local):
            raise ShapeError(
                f"rank {rank} of {world_size} workers with {len(local):,} weights.",
                "Ranks count from 0, and each worker serves a shard; shards are equally long.",
                f"flatten(parameters, multiple={max(world_size, 1)}), which appends zeros.",
            )
        self.local, self.shared = local, local.clone()
        self.rank, self.world_size, self.how = rank, world_size, how
        size = len(local) // world_size
        self.shards = [slice(a, b) for a, b in pairwise(range(0, len(local) + 1, size))]
        self.sampler = Sampler(size, how.rounds, seed)
        self.owed = torch.zeros_like(local[:size])

    @torch.no_grad()
    def outgoing(self, step: int) -> Tensor:
        """A packet for each server, uint8 [W, bytes]. What is sent leaves `local`; it comes back averaged."""
        at, packets = self.at(step), []
        for shard in self.shards:
            move = (self.local[shard] - self.shared[shard])[at]
            packet = compress(move, self.how)
            unsent = move - decompress(packet, len(at), self.how) if self.how.feedback else 0.0
            self.local[shard][at] = self.shared[shard][at] + unsent
            packets.append(packet)
        return torch.stack(packets)

    def serve(self, step: int, packets: Tensor) -> Tensor:
        """The packet for all workers: the mean of what they sent, uint8 [W, bytes], and of what is owed."""
        at = self.at(step)
        mean = torch.stack([decompress(p, len(at), self.how) for p in packets]).mean(0) + self.owed[at]
        packet = compress(mean, self.how)
        if self.how.feedback:
            self.owed[at] = mean - decompress(packet, len(at), self.how)
        return packet

    @torch.no_grad()
    def incoming(self, step: int, packets: Tensor) -> None:
        """Add the servers' averages of `step`, uint8 [W, bytes], to the own and to the shared weights."""
        at = self.at(step)
        for shard, packet in zip(self.shards, packets, strict=True):
            mean = decompress(packet, len(at), self.how)
            self.local[shard][at] += mean
            self.shared[shard][at] += mean

    def at(self, step: int) -> Tensor:
        """The positions, in every shard, that this step looks at."""
        return self.sampler.at(step).to(self.local.device)


# ---------------------------------------------------------------- W processes


class CompressedDataParallel:
    """Trains a model on the ranks of a wire: `synchronise()` after `optimizer.step()`, no all-reduce before
    it.

        parallel = CompressedDataParallel(model, Wire(dist.new_group()))
        for batch in my_batches:
            loss(model, batch).backward()
            optimizer.step()
            parallel.synchronise()
        parallel.finish()                 # the model has the shared weights now, equal on all ranks

    wire    of a group of its own: its collectives run beside whatever else the ranks send
    link    an emulated slow link that packets take; None for the real one alone

    The model's weights must be equal on all ranks at the start. Its parameters become views into one flat
    tensor: make the optimizer from them as usual, before or after. On a GPU packets are exchanged on a stream
    of their own: on the model's, its next step would stand in line behind them.
    """

    def __init__(
        self,
        model: nn.Module,
        wire: Wire,
        how: Cocktail = PAPER,
        *,
        link: Link | None = None,
        seed: int = 0,
    ) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        flat = flatten(self.parameters, multiple=wire.size)
        for p, view in zip(self.parameters, views(flat, self.parameters), strict=True):
            p.data = view
        self.worker = Worker(flat, wire.rank, wire.size, how, seed=seed)
        self.wire, self.link, self.step = wire, link, 0
        self._stream = torch.cuda.Stream(flat.device) if flat.is_cuda else None
        self._thread = ThreadPoolExecutor(1, "packets")
        self._under_way: tuple[int, Future[Tensor]] | None = None

    def synchronise(self) -> None:
        """Send a part of this step's move, and add the averages of the step before (or of this)."""
        packets = self.worker.outgoing(self.step)
        made = torch.cuda.current_stream(packets.device).record_event() if self._stream is not None else None
        self._arrive()
        self._under_way = self.step, self._thread.submit(self._exchange, self.step, packets, made)
        if not self.worker.how.delay:
            self._arrive()
        self.step += 1

    def finish(self) -> None:
        """Wait for what is under way and leave the shared weights in the model."""
        self._arrive()
        self._thread.shutdown()
        with torch.no_grad():
            self.worker.local.copy_(self.worker.shared)

    def _arrive(self) -> None:
        if self._under_way is not None:
            step, packets = self._under_way
            self._under_way = None
            self.worker.incoming(step, packets.result())

    def _exchange(self, step: int, packets: Tensor, made: torch.cuda.Event | None) -> Tensor:
        """In the thread: packets to the servers, and the servers' answers to all, uint8 [W, bytes]."""
        if self._stream is None or made is None:
            return self._by_way_of_the_servers(step, packets)
        with torch.cuda.device(packets.device), torch.cuda.stream(self._stream):  # both are a thread's own
            self._stream.wait_event(made)
            answers = self._by_way_of_the_servers(step, packets)
        self._stream.synchronize()  # so that whoever gets the answers may use and free them on any stream
        return answers

    def _by_way_of_the_servers(self, step: int, packets: Tensor) -> Tensor:
        mine = torch.empty_like(packets)
        with _on(self.link, self.wire):
            self.wire.all_to_all(mine, packets)
        answer = self.worker.serve(step, mine)
        answers = torch.empty_like(packets)
        with _on(self.link, self.wire):
            self.wire.all_gather(answers.view(-1), answer)
        return answers


# ---------------------------------------------------------------- W workers in one process


@dataclass(frozen=True)
class Simulated:
    """A simulated run: the workers' mean loss at every step, and the bytes that each sends in a step."""

    losses: list[float]
    bytes_per_step: int


def simulate(
    model: nn.Module,
    backward: Callable[[int, int], float],
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    *,
    world_size: int,
    steps: int,
    how: Cocktail = PAPER,
    schedule: Callable[[int], float] = lambda step: 1.0,
    seed: int = 0,
) -> Simulated:
    """Train `model` as W workers would, one after the other in this process; it ends with the shared weights.

    backward    of (rank, step): leaves the gradient of that worker's batch in the model, returns its loss
    optimizer   makes a worker's optimizer, whose state stays with that worker
    schedule    a step's learning rate as a share of the optimizer's own
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    start = flatten(parameters, multiple=world_size)
    workers = [Worker(start.clone(), rank, world_size, how, seed=seed) for rank in range(world_size)]
    replicas = [[nn.Parameter(view) for view in views(w.local, parameters)] for w in workers]
    optimizers = [optimizer(replica) for replica in replicas]
    rates = [group["lr"] for group in optimizers[0].param_groups]
    losses: list[float] = []
    late: list[tuple[int, Tensor]] = []
    size = 0

    for step in range(steps):
        found = []
        for rank, (replica, own) in enumerate(zip(replicas, optimizers, strict=True)):
            copy_to(replica, parameters)
            model.zero_grad()
            found.append(backward(rank, step))
            for mine, p in zip(replica, parameters, strict=True):
                mine.grad = p.grad
            for group, rate in zip(own.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(step)
            own.step()
        losses.append(sum(found) / world_size)
        packets = torch.stack([worker.outgoing(step) for worker in workers])  # [from, to, bytes]
        late.append((step, torch.stack([w.serve(step, packets[:, w.rank]) for w in workers])))
        size = max(size, packets.shape[-1])
        if len(late) > how.delay:
            _deliver(workers, late.pop(0))
    for arrived in late:
        _deliver(workers, arrived)
    copy_to(views(workers[0].shared, parameters), parameters)
    return Simulated(losses, 2 * (world_size - 1) * size)


def _deliver(workers: Iterable[Worker], arrived: tuple[int, Tensor]) -> None:
    for worker in workers:
        worker.incoming(*arrived)


# ---------------------------------------------------------------- flat weights


def flatten(tensors: Sequence[Tensor], multiple: int = 1) -> Tensor:
    """All numbers in a row, float32 [n], a copy; zeros follow until n is a multiple."""
    flat = torch.cat([t.detach().float().flatten() for t in tensors])
    return torch.nn.functional.pad(flat, (0, -len(flat) % multiple))


def views(flat: Tensor, like: Iterable[Tensor]) -> Iterator[Tensor]:
    """Views into `flat` with the shapes of `like`: what changes in one changes in the other."""
    at = 0
    for t in like:
        yield flat[at : at + t.numel()].view(t.shape)
        at += t.numel()


@torch.no_grad()
def copy_to(source: Iterable[Tensor], target: Iterable[Tensor]) -> None:
    for a, b in zip(source, target, strict=True):
        b.copy_(a)


def _on(link: Link | None, wire: Wire) -> AbstractContextManager[None]:
    return link.carrying(wire) if link else nullcontext()
