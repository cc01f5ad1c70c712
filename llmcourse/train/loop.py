"""The training loop of a run that takes a while: it tells how it goes, and goes on after a kill.

    data, optimizer = TokenStream(ids, batch=16, length=64, seed=0), AdamW(decay_groups(model, 0.1), lr=1e-3)
    trainer = Trainer(model, data, optimizer,
                      schedule=lambda step: cosine(step, 600, warmup=60, floor=0.1))
    trainer.run(600, folder="runs/first", save_every=50)

One step: a batch, its loss and gradients (in pieces where it is too large for memory), a limit on their
norm, the schedule's rate, the optimizer. `fit` is the same in a few lines, for runs of seconds.

Nothing here waits for a GPU to finish a step: losses stay on the device until somebody looks, every
`look_every` steps. A CPU that asked for each loss would leave the GPU idle while it prepares the next step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO, cast

import torch
from torch import Tensor, nn

from llmcourse.errors import CourseError, GraphError, ShapeError
from llmcourse.train.accumulate import accumulate, micro_batches, summed_cross_entropy
from llmcourse.train.fit import cross_entropy
from llmcourse.train.precision import Precision
from llmcourse.train.resume import (
    Checkpoints,
    random_state,
    set_optimizer_state,
    set_random_state,
    set_weights,
)
from llmcourse.train.schedules import Schedule, set_rate
from llmcourse.train.tasks import Batch

Loss = Callable[[nn.Module, Batch], Tensor]
FLOAT32 = Precision("float32")


class DivergedError(CourseError, ArithmeticError):
    """A loss that is no longer a number."""


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Data(Iterator[Batch], Stateful, Protocol):
    """Batches from a place that can be written down, such as `TokenStream`."""


@dataclass
class Curve:
    """What a run did. loss at every step in nats; held_out (step, loss) where it was asked.

    seconds, tokens   of training: held-out tests and checkpoints do not count, earlier processes do
    """

    loss: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def smooth(self, span: int = 20) -> list[float]:
        """The mean of each step's loss with the up to `span` − 1 before it."""
        return [
            math.fsum(w) / len(w)
            for w in (self.loss[max(0, i + 1 - span) : i + 1] for i in range(len(self.loss)))
        ]


class Trainer:
    """A run: a model, its data, its optimizer, and how far it has come.

    schedule    share of the optimizer's learning rate at a step; None: all of it
    rows        sequences that go through the model at once; 0: the whole batch
    precision   what the forward pass computes in
    clip        the largest norm that the gradient of all parameters may have
    held_out    batches to test on;  forward: what the loss is taken of, if not `model` (a compiled one)
    also        other things with a state that the run depends on, by name (an average of weights, say)
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        optimizer: torch.optim.Optimizer,
        *,
        schedule: Schedule | None = None,
        rows: int = 0,
        precision: Precision = FLOAT32,
        clip: float = 1.0,
        held_out: tuple[Batch, ...] = (),
        forward: nn.Module | None = None,
        also: dict[str, Stateful] | None = None,
    ) -> None:
        self.model, self.data, self.optimizer = model, data, optimizer
        self.schedule, self.rows, self.precision, self.clip = schedule, rows, precision, clip
        self.held_out, self.also = held_out, also or {}
        self.forward = model if forward is None else forward  # a compiled module has no truth value
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise GraphError(
                f"no weight of this {type(model).__name__} wants a gradient.",
                "A model that was loaded to be run is frozen, so that no graph is recorded.",
                "model.requires_grad_(True).",
            )
        self.device = self.parameters[0].device
        self.step, self.curve = 0, Curve()
        self._pending: list[Tensor] = []

    # ── one step ─────────────────────────────────────────────────────────────────────────────────

    def advance(self) -> Tensor:
        """One step; its loss, still on the device."""
        if self.schedule is not None:
            set_rate(self.optimizer, self.schedule(self.step))
        batch = next(self.data)
        self.optimizer.zero_grad()
        if self.rows and self.rows < len(batch.targets):
            pieces = list(micro_batches(batch, self.rows))
            loss = torch.tensor(accumulate(self.forward, pieces, loss=self._summed))
        else:
            with self.precision.context(self.device):
                value = cross_entropy(self.forward, batch)
            value.backward()
            loss = value.detach()
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self._pending.append(loss)
        self.curve.tokens += batch.targets.numel()
        self.step += 1
        return loss

    def _summed(self, model: nn.Module, batch: Batch) -> Tensor:
        with self.precision.context(self.device):
            return summed_cross_entropy(model, batch)

    @torch.no_grad()
    def test(self) -> float:
        """Mean loss on the held-out batches, in nats."""
        if not self.held_out:
            raise ShapeError(
                "there are no held-out batches.", "A test needs some.", "Trainer(…, held_out=batches)."
            )
        with self.precision.context(self.device):
            return math.fsum(cross_entropy(self.model, b).item() for b in self.held_out) / len(self.held_out)

    # ── many steps ───────────────────────────────────────────────────────────────────────────────

    def run(
        self,
        steps: int,
        *,
        folder: Path | str | None = None,
        save_every: int = 0,
        test_every: int = 0,
        look_every: int = 10,
        progress: bool | TextIO = True,
        on_step: Callable[[Trainer], object] | None = None,
    ) -> Curve:
        """Go on until step `steps` (counted from the beginning of the run), and give the curve.

        folder       checkpoints go there every `save_every` steps and at the end; a run that is found there
                     is taken up again, whatever killed it
        test_every   steps between tests on the held-out batches; 0: at the end only
        progress     a bar on stderr, or in a stream (in a notebook: sys.stdout); False: none
        on_step      called after each step and before it is saved, with what it changes in `also`

        Raises DivergedError at a loss that is not finite, CheckpointError for another run's folder,
        DiskError.
        """
        checkpoints = None if folder is None else Checkpoints(folder)
        if checkpoints and self.step == 0 and checkpoints.newest():
            self.load_state_dict(checkpoints.load())
        was_training = self.model.training
        self.model.train()
        bar = _bar(steps, self.step, progress)
        started = time.perf_counter()
        try:
            while self.step < steps:
                self.advance()
                bar.update()
                if on_step is not None:
                    on_step(self)
                last = self.step == steps
                testing = bool(self.held_out) and (last or bool(test_every and self.step % test_every == 0))
                saving = checkpoints is not None and (
                    last or bool(save_every and self.step % save_every == 0)
                )
                if testing or saving or last or self.step % look_every == 0:
                    self._look()  # waits for the device, so that the clock tells the truth
                    self.curve.seconds += time.perf_counter() - started
                    bar.set_postfix_str(
                        f"loss {self.curve.loss[-1]:.3f}, {self.curve.tokens_per_s:,.0f} tokens/s"
                    )
                    if testing:
                        self.model.eval()
                        self.curve.held_out.append((self.step, self.test()))
                        self.model.train()
                    if saving:
                        cast(Checkpoints, checkpoints).save(self.state_dict(), self.step)
                    started = time.perf_counter()
        finally:  # also when a reader interrupts
            bar.close()
            self.model.train(was_training)
        return self.curve

    def _look(self) -> None:
        """Bring pending losses to the host. Raises DivergedError."""
        if self._pending:
            losses = torch.stack([x.float().to(self.device) for x in self._pending]).tolist()
            self._pending.clear()
            first = self.step - len(losses)
            self.curve.loss += losses
            bad = next((i for i, x in enumerate(losses) if not math.isfinite(x)), None)
            if bad is not None:
                raise DivergedError(
                    f"the loss of step {first + bad} is {losses[bad]}.",
                    "Weights changed by such a gradient do not come back; earlier checkpoints are good.",
                    "a lower learning rate, a longer warm-up, or bfloat16 in place of float16.",
                )

    # ── the run as numbers ───────────────────────────────────────────────────────────────────────

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, and the curve so far."""
        self._look()
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "data": self.data.state_dict(),
            "random": random_state(),
            "also": {name: thing.state_dict() for name, thing in self.also.items()},
            "step": self.step,
            "curve": asdict(self.curve),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state` was taken. Raises CheckpointError when it is another model's."""
        set_weights(self.model, state["model"])
        set_optimizer_state(self.optimizer, state["optimizer"])
        self.data.load_state_dict(state["data"])
        for name, thing in self.also.items():
            thing.load_state_dict(state["also"][name])
        self.step, self.curve = state["step"], Curve(**state["curve"])
        self._pending.clear()
        set_random_state(state["random"])


def _bar(steps: int, done: int, shown: bool | TextIO) -> Any:
    """A progress bar; one that shows nothing where it is not wanted, or tqdm is missing."""
    try:
        from tqdm import tqdm
    except ImportError:
        return _NoBar()
    file = None if isinstance(shown, bool) else shown
    hidden = shown is False
    return tqdm(total=steps, initial=done, disable=hidden, file=file, unit="step", ncols=100, mininterval=0.5)


class _NoBar(nullcontext[None]):
    def update(self, n: int = 1) -> None: ...
    def set_postfix_str(self, text: str) -> None: ...
    def close(self) -> None: ...
