"""Pipeline parallelism: each rank holds some of the layers, and hands activations on to the next.

    stage = cut(model, context.rank, p)
    pipeline = Pipeline(stage, one_f_one_b(p, m))
    loss = pipeline.step(batch)              # forwards and backwards; gradients are in stage.parameters()

A step runs the rank's line of an order (`parallel.schedule`) piece by piece. A forward waits for the previous
stage's activations [b, S, E], a backward for the next one's gradient of what was handed on; both are asked
for before they are needed and sent without waiting, so that a stage computes while bytes travel. Only that
crosses from rank to rank: 2·B·S·E numbers over each border in a step, and once more the gradient of an
embedding that is also the head, for both ends then hold a copy of it.

The loss of a step is that of the whole batch (mean over all positions at which something is asked), although
micro-batches may be of unequal size and ask unequally often: each counts by what it asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse.errors import ShapeError
from llmcourse.models.step import Step
from llmcourse.models.transformer import Transformer
from llmcourse.train.parallel.collectives import Wire
from llmcourse.train.parallel.schedule import ScheduleError, Span, Timeline, check, simulate
from llmcourse.train.tasks import IGNORE, Batch


class Stage(nn.Module):
    """A run of blocks of a decoder: tokens [b, S] or activations [b, S, E] in, activations or logits out.

    The first has the embedding, the last the final norm and the head. The modules are the model's own, under
    their names there, so that the stages' states together are the model's.
    """

    def __init__(self, model: Transformer, blocks: range, *, first: bool, last: bool) -> None:
        super().__init__()
        self.config, self.first, self.last = model.config, first, last
        self.embedding = model.embedding if first else None
        self.positions = model.positions if first else None
        self.rope = model.rope
        self.blocks = nn.ModuleDict({str(i): model.blocks[i] for i in blocks})
        self.norm = model.norm if last else None
        self.head = model.head if last else None

    @property
    def twin(self) -> nn.Parameter | None:
        """The weight of which the other end has a copy: a tied embedding, where there are several stages."""
        if not self.config.tie_embeddings or self.first == self.last:
            return None
        end = self.embedding if self.embedding is not None else self.head
        return None if end is None else cast(nn.Parameter, end.weight)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if self.config.position == "learned" and length > self.config.max_len:
            raise ShapeError(
                f"a sequence of {length} tokens came for {self.config.max_len} learned positions.",
                "A position that was never learned has no embedding.",
                f"at most {self.config.max_len} tokens.",
            )
        positions, cos, sin = torch.arange(length, device=x.device).expand(len(x), -1), None, None
        if self.config.position == "rope":
            self.rope.grow(length)
            cos, sin = self.rope(positions)
        step = Step(positions, 0, length, None, length > 1, cos, sin)
        if self.embedding is not None and self.positions is not None:
            x = self.positions(self.embedding(x), positions)
        for block in self.blocks.values():
            x = block(x, step, None)
        return x if self.head is None or self.norm is None else self.head(self.norm(x))


def cut(model: Transformer, rank: int, stages: int) -> Stage:
    """Stage `rank` of `stages` of a decoder: its share of the L blocks, the first stages one more if need be.

    Raises ShapeError where there are more stages than blocks.
    """
    layers = len(model.blocks)
    if not 1 <= stages <= layers or not 0 <= rank < stages:
        raise ShapeError(
            f"stage {rank} of {stages} was asked of a model of {layers} blocks.",
            "A stage has one block or more; stages count from 0.",
            f"1 to {layers} stages.",
        )
    parts = torch.arange(layers).tensor_split(stages)[rank].tolist()
    blocks = range(parts[0], parts[-1] + 1)
    return Stage(model, blocks, first=rank == 0, last=rank == stages - 1)


class Borders:
    """A rank's connections: to both neighbours one for each direction, and one between the two ends.

    Each carries messages one way, in one order. NCCL works off the messages of a group strictly in turn: with
    activations and gradients in one group, two neighbours that both send first would wait for each other.

    All ranks must build this together. Wires of a rank without that neighbour are None.
    """

    def __init__(self) -> None:
        rank, stages = dist.get_rank(), dist.get_world_size()
        self.from_previous: Wire | None = None
        self.to_previous: Wire | None = None
        self.from_next: Wire | None = None
        self.to_next: Wire | None = None
        for left in range(stages - 1):
            down, up = (dist.new_group([left, left + 1]) for _ in range(2))
            if rank == left:
                self.to_next, self.from_next = Wire(down), Wire(up)
            elif rank == left + 1:
                self.from_previous, self.to_previous = Wire(down), Wire(up)
            if rank in (left, left + 1):
                _connect(down, sends=rank == left)
                _connect(up, sends=rank == left + 1)
        ends = dist.new_group([0, stages - 1]) if stages > 1 else None
        self.ends = Wire(ends) if ends is not None and rank in (0, stages - 1) else None
        self.everyone = Wire()

    @property
    def wires(self) -> dict[str, Wire]:
        """The wires that there are, by name."""
        return {name: wire for name, wire in vars(self).items() if isinstance(wire, Wire)}


def _connect(pair: dist.ProcessGroup, *, sends: bool) -> None:
    """A first message between two ranks, in an order that all agree on.

    NCCL connects at the first message, and then the calls of both ranks wait for each other; were that to
    happen in the midst of a step, a receive that is only asked for ahead would hold up the rank it is from.
    """
    device = torch.cuda.current_device() if dist.get_backend(pair) == "nccl" else "cpu"
    message = torch.zeros(1, device=device)
    if sends:
        dist.send(message, group=pair, group_dst=int(dist.get_rank(pair) == 0))
    else:
        dist.recv(message, group=pair, group_src=int(dist.get_rank(pair) == 0))


def asked_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of the losses in nats of logits [b, S, V] at targets [b, S] that are not IGNORE."""
    return F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )


class Pipeline:
    """Runs one rank's line of an order on its stage.

    stage     see `cut`; on the device where batches are
    order     for all stages, as from `gpipe` or `one_f_one_b`; neighbours must agree on the order of
              micro-batches in each direction, which is that in which they travel
    borders   built here unless given (by all ranks together)
    pace      seconds that a forward and a backward take at least; the rest is slept. For seeing a schedule
              of more stages than there are processors: an emulation of stages of equal speed, no more

    peak      after a step: the most micro-batches whose activations were kept at once
    Raises ScheduleError for an order that cannot be run or is not for this number of ranks.
    """

    def __init__(
        self,
        stage: Stage,
        order: Sequence[Sequence[tuple[str, int]]],
        *,
        borders: Borders | None = None,
        pace: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        simulate(order)
        lines = check(order)
        self.rank, self.stages = dist.get_rank(), dist.get_world_size()
        if len(lines) != self.stages:
            raise ScheduleError(
                f"an order for {len(lines)} stages came to {self.stages} ranks.",
                "Each rank runs one stage.",
                f"the order for {self.stages}.",
            )
        for kind in ("F", "B"):
            if len({tuple(w.micro for w in line if w.kind == kind) for line in lines}) > 1:
                raise ScheduleError(
                    f"the stages do not agree on the order of their {kind}.",
                    "What a stage hands over arrives in the order in which it was sent.",
                    "the same order of micro-batches in all stages, forward and backward.",
                )
        self.stage, self.line, self.micros = stage, lines[self.rank], len(lines[0]) // 2
        self.borders = Borders() if borders is None else borders
        self.pace = {"F": pace[0], "B": pace[1]}
        self.peak, self.spans = 0, list[Span]()

    def step(
        self,
        batch: Batch,
        *,
        loss: Callable[[Tensor, Tensor], Tensor] = asked_loss,
        record: bool = False,
    ) -> Tensor:
        """All micro-batches forward and backward; the mean loss of the batch, on every rank.

        batch    the whole one, on every rank: inputs (tokens [B, S],), targets [B, S]
        loss     of (logits, targets): the sum over the positions that ask something
        record   note when each piece of work began and ended, for `timeline` (a GPU is waited for then)

        Gradients of the stage's parameters are those of the mean loss; what was there before is dropped.
        Raises ShapeError for fewer sequences than micro-batches.
        """
        tokens, targets = (t.tensor_split(self.micros) for t in (batch.inputs[0], batch.targets))
        if len(tokens[-1]) == 0:
            raise ShapeError(
                f"{len(batch.targets)} sequences came for {self.micros} micro-batches.",
                "A micro-batch has one sequence or more.",
                f"an order of {len(batch.targets)} micro-batches or fewer.",
            )
        asked = (batch.targets != IGNORE).sum().clamp(min=1)
        run = _Step(self, tokens, targets, asked, loss)
        self.stage.zero_grad()
        if record:
            self.borders.everyone.barrier()
        self.spans, began = [], time.perf_counter()
        for work in self.line:
            run.ask_ahead()
            run.wait_for(work)
            start = self._now(record)
            run.forward(work.micro) if work.kind == "F" else run.backward(work.micro)
            end = self._now(record)
            if (left := start + self.pace[work.kind] - end) > 0:
                time.sleep(left)
                end = self._now(record)
            run.hand_over(work)
            if record:
                self.spans.append(Span(self.rank, *work, start - began, end - began))
        self.peak = run.peak
        return run.finish()

    def timeline(self) -> Timeline:
        """What all stages did in the last recorded step, in seconds: on each rank. All must call it."""
        spans: list[list[Span]] = [[] for _ in range(self.stages)]
        dist.all_gather_object(spans, self.spans)
        together = sorted((Span(*s) for line in spans for s in line), key=lambda s: (s.start, s.stage))
        return Timeline(self.stages, tuple(together))

    def _now(self, record: bool) -> float:
        if record and torch.cuda.is_available() and next(self.stage.parameters()).is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


class _Step:
    """What a stage holds during one step: inputs and outputs of micro-batches under way, and messages."""

    def __init__(
        self,
        pipeline: Pipeline,
        tokens: Sequence[Tensor],
        targets: Sequence[Tensor],
        asked: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self.stage, self.borders, self.rank = pipeline.stage, pipeline.borders, pipeline.rank
        self.tokens, self.targets, self.asked, self.loss = tokens, targets, asked, loss
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.gradients: dict[int, Tensor] = {}
        self.to_ask = [w for w in pipeline.line if self._source(w) is not None]
        self.asked_for: dict[tuple[str, int], tuple[Tensor, Any]] = {}
        self.sent: list[tuple[Tensor, Any]] = []
        self.total = torch.zeros((), device=asked.device)
        self.peak = 0

    def _source(self, work: tuple[str, int]) -> Wire | None:
        return self.borders.from_previous if work[0] == "F" else self.borders.from_next

    def ask_ahead(self) -> None:
        """Have receives open for what this piece of work needs and for what the next does."""
        while self.to_ask and len(self.asked_for) < 2:
            work = self.to_ask.pop(0)
            wire = self._source(work)
            assert wire is not None
            weight = next(self.stage.parameters())
            buffer = weight.new_empty((*self.tokens[work.micro].shape, self.stage.config.d_model))
            under_way = wire.irecv(buffer, 0 if work.kind == "F" else 1, tag=work.micro)
            self.asked_for[work] = buffer, under_way

    def wait_for(self, work: tuple[str, int]) -> None:
        kind, micro = work
        if kind == "F" and self.borders.from_previous is None:
            self.inputs[micro] = self.tokens[micro]
        elif self._source(work) is not None:
            buffer, under_way = self.asked_for.pop(work)
            under_way.wait()
            (self.inputs if kind == "F" else self.gradients)[micro] = buffer

    def forward(self, micro: int) -> None:
        x = self.inputs[micro]
        if x.is_floating_point():
            x.requires_grad_()
        y = self.stage(x)
        if self.stage.last:
            y = self.loss(y, self.targets[micro]) / self.asked
            self.total += y.detach()
        self.outputs[micro] = y
        self.peak = max(self.peak, len(self.outputs))

    def backward(self, micro: int) -> None:
        torch.autograd.backward(self.outputs.pop(micro), self.gradients.pop(micro, None))

    def hand_over(self, work: tuple[str, int]) -> None:
        """Send on what a piece of work made. Neither rank waits; a sent tensor is kept until it is gone."""
        kind, micro = work
        self.sent = [(tensor, message) for tensor, message in self.sent if not message.is_completed()]
        if kind == "F" and self.borders.to_next is not None:
            self._send(self.borders.to_next, self.outputs[micro].detach(), 1, micro)
        if kind == "B":
            x = self.inputs.pop(micro)
            if self.borders.to_previous is not None:
                assert x.grad is not None
                self._send(self.borders.to_previous, x.grad, 0, micro)

    def _send(self, wire: Wire, tensor: Tensor, dst: int, micro: int) -> None:
        tensor = tensor.contiguous()
        self.sent.append((tensor, wire.isend(tensor, dst, tag=micro)))

    def finish(self) -> Tensor:
        """Wait until everything is delivered, sum the twins' gradients, and tell all the loss."""
        for _, message in self.sent:
            message.wait()
        if self.stage.twin is not None and self.borders.ends is not None:
            assert self.stage.twin.grad is not None
            self.borders.ends.all_reduce(self.stage.twin.grad)
        self.borders.everyone.broadcast(self.total, src=self.borders.everyone.size - 1)
        return self.total
