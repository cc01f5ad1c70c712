"""Exercise `learning_rate`: up a ramp, and down half a cosine."""

from __future__ import annotations

import math
from typing import Any

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial

learning_rate = Exercise(
    "learning_rate",
    title="Warm-up and cosine",
    arguments=("step", "steps", "warmup", "peak", "floor"),
    shapes=(
        "step     integer from 0: the step that is about to be made; steps: how many there are in all",
        "warmup   integer, 0 ≤ warmup < steps: so many steps of climbing rate",
        "peak     float: the highest rate;  floor  float, 0 ≤ floor ≤ peak: the rate at the end",
        "returns  float: the rate of this step. The ramp rises by peak / warmup a step: its first step has",
        "         that rate, not 0, and its last has peak. At step = warmup the cosine begins, at peak; at",
        "         step = steps it has reached floor, and stays there.",
    ),
    formula="(step + 1) / warmup · peak;  then floor + (peak − floor) · (1 + cos(π · x)) / 2, x from 0 to 1",
    difficulty=1,
    importance=4,
    minutes=10,
    points=2,
    hints=(
        "Two cases. In the second, how far has the run come on its way from the end of the ramp to the last "
        "step? That share is 0 at step = warmup and 1 at step = steps.",
        "x = (step − warmup) / (steps − warmup), and not above 1. (1 + cos(πx)) / 2 goes from 1 to 0; it "
        "scales what lies between floor and peak.",
        "if step < warmup: return peak * (step + 1) / warmup; x = min(1.0, (step - warmup) / (steps - "
        "warmup)); return floor + (peak - floor) * (1 + math.cos(math.pi * x)) / 2.",
    ),
)


def expected(step: int, steps: int, warmup: int, peak: float, floor: float) -> float:
    """The cosine through its half-angle: (1 + cos 2a) / 2 = cos² a."""
    if step < warmup:
        return peak * (step + 1) / warmup
    way = min(step, steps) - warmup
    return floor + (peak - floor) * math.cos(math.pi / 2 * way / (steps - warmup)) ** 2


def _agree(t: Trial, steps: int, warmup: int, peak: float, floor: float, at: range | list[int]) -> None:
    for step in at:
        got = t.call(step, steps, warmup, peak, floor)
        t.close(got, expected(step, steps, warmup, peak, floor), f"rate of step {step}", rtol=1e-9)


@learning_rate.check("the ramp: a share of the peak from the first step, the whole of it at the last")
def ramp(t: Trial) -> None:
    warmup = t.size(4, 9)
    _agree(t, 10 * warmup, warmup, float(t.rng.uniform(0.1, 1)), 0.0, range(warmup))


@learning_rate.check("the cosine, from the peak to zero")
def falling(t: Trial) -> None:
    steps, warmup = t.size(40, 60), t.size(4, 9)
    _agree(t, steps, warmup, float(t.rng.uniform(0.1, 1)), 0.0, [warmup, warmup + 1, warmup + 9, steps - 1])


@learning_rate.check("the floor is where it ends")
def floored(t: Trial) -> None:
    steps, warmup, peak = t.size(20, 30), t.size(3, 5), float(t.rng.uniform(0.5, 1))
    _agree(t, steps, warmup, peak, peak * 0.3, [0, warmup - 1, warmup, warmup + 5, steps - 1, steps])


@learning_rate.check("beyond the last step the rate stays at the floor")
def beyond(t: Trial) -> None:
    steps = t.size(20, 30)
    _agree(t, steps, 3, 0.5, 0.1, [steps, steps + 1, 2 * steps])


@learning_rate.check("a run without a ramp")
def no_ramp(t: Trial) -> None:
    steps = t.size(5, 9)
    _agree(t, steps, 0, 0.5, 0.05, range(steps))
    _agree(t, 1, 0, 0.5, 0.05, [0])


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────


def _half_cosine(x: float) -> float:
    return (1 + math.cos(math.pi * x)) / 2


def _way(step: int, steps: int, warmup: int) -> float:
    return min(1.0, (step - warmup) / (steps - warmup))


@learning_rate.mistake(
    says="the ramp begins at 0, a step for nothing, and never has the whole rate",
    tries="(step + 1) / warmup: steps count from 0.",
    caught_by="ramp",
)
def from_zero(step: int, steps: int, warmup: int, peak: float, floor: float) -> Any:
    if step < warmup:
        return peak * step / warmup
    return floor + (peak - floor) * _half_cosine(_way(step, steps, warmup))


@learning_rate.mistake(
    says="the cosine is at work during the ramp too: the product of both",
    tries="two cases: step < warmup, and the rest.",
    caught_by="ramp",
)
def both(step: int, steps: int, warmup: int, peak: float, floor: float) -> Any:
    ramp = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return floor + (ramp * peak - floor) * _half_cosine(min(1.0, step / steps))


@learning_rate.mistake(
    says="there is no ramp",
    tries="peak · (step + 1) / warmup while step < warmup.",
    caught_by="ramp",
)
def no_warmup(step: int, steps: int, warmup: int, peak: float, floor: float) -> Any:
    return floor + (peak - floor) * _half_cosine(max(0.0, _way(step, steps, warmup)))


@learning_rate.mistake(
    says="the cosine is counted from step 0, so the rate jumps down where the ramp ends",
    tries="x = (step − warmup) / (steps − warmup).",
    caught_by="falling",
)
def from_the_start(step: int, steps: int, warmup: int, peak: float, floor: float) -> Any:
    if step < warmup:
        return peak * (step + 1) / warmup
    return floor + (peak - floor) * _half_cosine(min(1.0, step / steps))


@learning_rate.mistake(
    says="the way is divided by all steps, also those of the ramp: at the end the rate has not come down",
    tries="x = (step − warmup) / (steps − warmup).",
    caught_by="falling",
)
def too_slow(step: int, steps: int, warmup: int, peak: float, floor: float) -> Any:
    if step < warmup:
        return peak * (step + 1) / warmup
    return floor + (peak - floor) * _half_cosine(min(1.0, (step - warmup) / steps))


@learning_rate.mistake(
    says="the rate falls along a straight line",
    tries="(1 + cos(πx)) / 2 in place of 1 − x.",
    caught_by="falling",
)
def straight(step: int, steps: int, warmup: int, peak: float, floor: float) -> Any:
    if step < warmup:
        return peak * (step + 1) / warmup
    return floor + (peak - floor) * (1 - _way(step, steps, warmup))


@learning_rate.mistake(
    says="cos(πx) goes down to −1, and the rate with it below zero",
    tries="(1 + cos(πx)) / 2, which goes from 1 to 0.",
    caught_by="falling",
)
def whole_cosine(step: int, steps: int, warmup: int, peak: float, floor: float) -> Any:
    if step < warmup:
        return peak * (step + 1) / warmup
    return floor + (peak - floor) * math.cos(math.pi * _way(step, steps, warmup))


@learning_rate.mistake(
    says="the floor is not used: the rate falls to zero",
    tries="floor + (peak − floor) · (1 + cos(πx)) / 2.",
    caught_by="floored",
)
def to_zero(step: int, steps: int, warmup: int, peak: float, floor: float) -> Any:
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * _half_cosine(_way(step, steps, warmup))


@learning_rate.mistake(
    says="the floor is added on top, and the rate begins above the peak",
    tries="(peak − floor) as the factor of the cosine.",
    caught_by="floored",
)
def on_top(step: int, steps: int, warmup: int, peak: float, floor: float) -> Any:
    if step < warmup:
        return peak * (step + 1) / warmup
    return floor + peak * _half_cosine(_way(step, steps, warmup))


@learning_rate.mistake(
    says="the cosine is cut off at the floor, which is then reached too early",
    tries="scaling the cosine to lie between floor and peak; no max() is needed.",
    caught_by="floored",
)
def cut_off(step: int, steps: int, warmup: int, peak: float, floor: float) -> Any:
    if step < warmup:
        return peak * (step + 1) / warmup
    return max(floor, peak * _half_cosine(_way(step, steps, warmup)))


@learning_rate.mistake(
    says="the cosine goes on behind its end, and the rate climbs again",
    tries="min(1.0, …) around x.",
    caught_by="beyond",
)
def climbs_again(step: int, steps: int, warmup: int, peak: float, floor: float) -> Any:
    if step < warmup:
        return peak * (step + 1) / warmup
    return floor + (peak - floor) * _half_cosine((step - warmup) / (steps - warmup))


@learning_rate.mistake(
    says="it divides by a ramp of no steps",
    tries="the division inside of `if step < warmup`, where warmup is at least 1.",
    caught_by="no_ramp",
)
def divides_by_zero(step: int, steps: int, warmup: int, peak: float, floor: float) -> Any:
    ramp = (step + 1) / warmup
    return min(peak * ramp, floor + (peak - floor) * _half_cosine(max(0.0, _way(step, steps, warmup))))


# ── other right solutions ────────────────────────────────────────────────────────────────────────────


@learning_rate.alternative("two cases")
def cases(step: int, steps: int, warmup: int, peak: float, floor: float) -> Any:
    if step < warmup:
        return peak * (step + 1) / warmup
    x = min(step - warmup, steps - warmup) / (steps - warmup)
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * x))


@learning_rate.alternative("one expression, with clamps")
def clamps(step: int, steps: int, warmup: int, peak: float, floor: float) -> Any:
    x = max(0, min(step, steps) - warmup) / (steps - warmup)
    return min(1, (step + 1) / max(1, warmup)) * (floor + (peak - floor) * math.cos(math.pi * x / 2) ** 2)
