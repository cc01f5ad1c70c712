"""Training in 16 bits: what runs in which format, and the two repairs that make it work.

| format | exponent, mantissa bits | smallest number | largest | spacing at 1 |
|---|---|---|---|---|
| float32 | 8, 23 | 1.4e-45 | 3.4e38 | 1.2e-7 |
| bfloat16 | 8, 7 | 9.2e-41 | 3.4e38 | 0.0078 |
| float16 | 5, 10 | 6.0e-8 | 65,504 | 0.00098 |

**float16 has too small a range.** Gradients below 6e-8 become zero. A `LossScaler` multiplies the loss, and
so by the chain rule every gradient, by a large power of two, and divides before the step. The right power is
found by trying: too large gives infinities, that step is skipped, and the scale is halved.

**bfloat16 has too few digits.** w + Δ is w again whenever Δ is below 1/512 of w or so, and most updates of a
training are. `MasterWeights` keeps float32 copies: the optimizer steps those, the model runs on their
rounding.

(Micikevicius et al. 2018, arXiv:1710.03740.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmcourse.errors import DeviceError, ShapeError


@dataclass(frozen=True)
class Precision:
    """A policy: which format weights are stored in, which one products are computed in, and what repairs it.

    stored    format of the weights that the model runs on
    computed  format of matrix products under autocast (None: the stored one)
    masters   float32 copies of the weights are what the optimizer steps
    scaled    the loss is scaled
    """

    name: str
    stored: torch.dtype = torch.float32
    computed: torch.dtype | None = None
    masters: bool = False
    scaled: bool = False

    def context(self, device: str | torch.device = "cpu") -> AbstractContextManager[Any]:
        """What the forward pass (not the backward pass) runs in."""
        if self.computed is None:
            return nullcontext()
        return torch.autocast(torch.device(device).type, dtype=self.computed)

    @property
    def bytes_per_parameter(self) -> int:
        """Bytes of weight, gradient, AdamW's two moments in float32, and float32 copy if there is one."""
        return 2 * self.stored.itemsize + 8 + 4 * self.masters


PRECISIONS = {
    p.name: p
    for p in (
        Precision("float32"),
        Precision("bfloat16 autocast", computed=torch.bfloat16),
        Precision("float16 autocast", computed=torch.float16, scaled=True),
        Precision("bfloat16 with masters", stored=torch.bfloat16, masters=True),
        Precision("bfloat16 alone", stored=torch.bfloat16),
    )
}
"""The usual policies by name."""


def lost(values: Iterable[Tensor], dtype: torch.dtype, scale: float = 1.0) -> float:
    """The share of numbers other than 0 that become 0 when scaled and rounded to `dtype`."""
    there = gone = 0
    for x in values:
        nonzero = x != 0
        there += int(nonzero.sum())
        gone += int((nonzero & ((x * scale).to(dtype) == 0)).sum())
    return gone / max(1, there)


def next_scale(
    scale: float, good: int, finite: bool, *, growth: float = 2.0, backoff: float = 0.5, interval: int = 2000
) -> tuple[float, int]:
    """(scale, good steps in a row) after a step whose gradients were finite, or not.

    An infinity or NaN halves the scale at once; `interval` good steps in a row double it.
    """
    if not finite:
        return scale * backoff, 0
    if good + 1 == interval:
        return scale * growth, 0
    return scale, good + 1


class LossScaler:
    """Dynamic loss scaling.

        scaler.scale_loss(loss).backward()
        if scaler.unscale(parameters):       # gradients as if there were no scale; False: not finite, skip
            optimizer.step()

    The scale is a power of two, so that scaling rounds nothing but what is subnormal.
    """

    def __init__(
        self, scale: float = 2.0**16, *, growth: float = 2.0, backoff: float = 0.5, interval: int = 2000
    ) -> None:
        if not (scale > 0 and growth > 1 and 0 < backoff < 1 and interval >= 1):
            raise ShapeError(
                f"a loss scaler of scale {scale}, growth {growth}, backoff {backoff}, interval {interval}.",
                "The scale is positive, grows after `interval` good steps and shrinks after a bad one.",
                "growth = 2.0, backoff = 0.5, interval = 2000.",
            )
        self.scale, self.good, self.skipped = scale, 0, 0
        self.growth, self.backoff, self.interval = growth, backoff, interval

    def scale_loss(self, loss: Tensor) -> Tensor:
        return loss * self.scale

    @torch.no_grad()
    def unscale(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Divide the gradients by the scale, in place, and choose the next scale. Whether all are finite."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        for g in gradients:
            g.div_(self.scale)
        finite = all_finite(gradients)
        self.skipped += not finite
        self.scale, self.good = next_scale(
            self.scale, self.good, finite, growth=self.growth, backoff=self.backoff, interval=self.interval
        )
        return finite

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale, "good": self.good, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.scale, self.good, self.skipped = state["scale"], int(state["good"]), int(state["skipped"])


def all_finite(gradients: Iterable[Tensor]) -> bool:
    """Whether no gradient holds an infinity or NaN. One answer from the device, however many tensors."""
    flags = [torch.isfinite(g).all() for g in gradients]
    return bool(torch.stack([f.to(flags[0].device) for f in flags]).all()) if flags else True


class MasterWeights:
    """float32 copies of 16-bit weights, for the optimizer.

        masters = MasterWeights(model.parameters())
        optimizer = torch.optim.AdamW(masters.parameters)
        loss.backward()
        masters.take_gradients()       # 16-bit gradients move to the copies, in float32
        optimizer.step()
        masters.write_back()           # the model gets the copies, rounded

    Costs 4 bytes a parameter, and 4 more while the gradients stand in float32.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.models = [p for p in parameters if p.requires_grad]
        if strange := next((p for p in self.models if not p.is_floating_point()), None):
            raise DeviceError(
                f"a parameter of {strange.dtype} has no master copy.",
                "Masters are float32 copies of floating-point weights.",
                "only parameters that are trained.",
            )
        self.parameters = [nn.Parameter(p.detach().float().clone()) for p in self.models]

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.parameters)

    def take_gradients(self) -> None:
        """Move the model's gradients to the masters, one tensor after the other; the model's become None."""
        for model, master in zip(self.models, self.parameters, strict=True):
            master.grad = None if model.grad is None else model.grad.float()
            model.grad = None

    @torch.no_grad()
    def write_back(self, *, free_gradients: bool = True) -> None:
        """Round the masters into the model's weights."""
        for model, master in zip(self.models, self.parameters, strict=True):
            model.copy_(master)
            if free_gradients:
                master.grad = None


@contextmanager
def tf32(on: bool = True) -> Iterator[None]:
    """Float32 products on tensor cores, inputs rounded to 10 bits of mantissa, inside the `with`; or not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
