"""Learning-rate schedules: functions of the step that give a share of the highest learning rate.

Every schedule climbs first. At step 0 an adaptive optimizer has seen one gradient; its estimate of the
gradient's size is that one gradient's, and each parameter moves by a whole learning rate on it. `warmup`
steps of small rates let the estimates settle. After that a schedule falls, because the noise of the batches
keeps the weights as far from the minimum as the rate is large.

    group["lr"] = peak * cosine(step, steps, warmup=100)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps, warmup=100))

Steps count from 0. The first of `warmup` steps has a share of 1/warmup and not of 0, which would be a step
for nothing; the last of them has the full rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer

from llmcourse.errors import CourseError

Schedule = Callable[[int], float]


class ScheduleRangeError(CourseError, ValueError):
    """Numbers of steps that do not make a schedule."""


def linear(step: int, steps: int, *, warmup: int = 0, floor: float = 0.0) -> float:
    """Up a ramp, then down a straight line to `floor`, which is reached after the last step, at `steps`."""
    rise = _rise(step, steps, warmup, floor)
    return 1 - (1 - floor) * fallen(step, steps, warmup) if rise is None else rise


def cosine(step: int, steps: int, *, warmup: int = 0, floor: float = 0.0) -> float:
    """Up a ramp, then down half a cosine to `floor` (Loshchilov & Hutter 2017, arXiv:1608.03983)."""
    rise = _rise(step, steps, warmup, floor)
    if rise is not None:
        return rise
    middle, swing = (1 + floor) / 2, (1 - floor) / 2
    return middle + swing * math.cos(math.pi * fallen(step, steps, warmup))


def constant(step: int, *, warmup: int = 0) -> float:
    """Up a ramp, and level from there."""
    return 1.0 if step >= warmup else (step + 1) / warmup


def inverse_root(step: int, *, warmup: int) -> float:
    """Up a ramp, then down as 1/√step (Vaswani et al. 2017, arXiv:1706.03762): needs no last step."""
    if warmup < 1:
        raise ScheduleRangeError(
            f"a warm-up of {warmup} steps.",
            "This schedule falls from where its ramp ends.",
            "warmup = 1 or more.",
        )
    return (step + 1) / warmup if step < warmup else math.sqrt(warmup / (step + 1))


def trapezoid(step: int, steps: int, *, warmup: int = 0, cooldown: int = 0, floor: float = 0.0) -> float:
    """Up, level, and down a straight line in the last `cooldown` steps (Hu et al. 2024, arXiv:2404.06395).

    Until the cool-down begins nothing depends on `steps`, so that a run can be made longer on the way.
    """
    if warmup + cooldown > steps:
        raise ScheduleRangeError(
            f"{warmup} steps up and {cooldown} steps down, of {steps}.",
            "The two do not overlap.",
            f"warmup + cooldown of {steps} or less.",
        )
    rise = _rise(step, steps, warmup, floor)
    down = steps - cooldown
    if rise is not None:
        return rise
    return 1.0 if step < down else 1 - (1 - floor) * fallen(step, steps, down)


def fallen(step: int, steps: int, start: int) -> float:
    """How much of the way from `start` to `steps` is behind: 0 to 1, and 1 beyond."""
    return min(1.0, (step - start) / max(1, steps - start))


def set_rate(optimizer: Optimizer, scale: float) -> None:
    """Give every group `scale` times the rate that it had when this was first called."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * scale


def _rise(step: int, steps: int, warmup: int, floor: float) -> float | None:
    """The share while the rate climbs, None after that. Raises ScheduleRangeError for what cannot be."""
    if step < 0 or steps < 1 or warmup < 0 or not 0 <= floor <= 1:
        raise ScheduleRangeError(
            f"step {step} of {steps}, with a warm-up of {warmup} and a floor of {floor}.",
            "Steps count from 0, there is at least one, and the floor is a share of the highest rate.",
            "step in range(steps), warmup of 0 or more, floor from 0 to 1.",
        )
    return (step + 1) / warmup if step < warmup else None
