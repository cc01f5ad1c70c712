"""Exercise `scaler_step`: what a dynamic loss scaler does between backward and the optimizer."""

from __future__ import annotations

from typing import Any

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

scaler_step = Exercise(
    "scaler_step",
    title="A dynamic loss scaler",
    arguments=("grads", "scale", "good", "interval"),
    shapes=(
        "grads     list of tensors, float16 or float32: gradients of the loss times scale",
        "scale     float, a power of two: what the loss was multiplied by",
        "good      int: steps in a row before this one whose gradients were all finite",
        "interval  int: so many good steps in a row double the scale",
        "returns   (grads, scale, good): the true gradients, a list of new float32 tensors, or None where",
        "          this step must be skipped; and scale and good for the next step",
    ),
    formula="finite: g / scale, and scale · 2 after `interval` good steps; not finite: None, scale / 2, "
    "good = 0",
    difficulty=2,
    importance=5,
    minutes=20,
    points=4,
    hints=(
        "Three things are decided here: is this step usable, what are its true gradients, what scale is "
        "tried "
        "next? Which scale do this step's gradients hold, and in which format can the quotient be written?",
        "float16 has no room below 6e-8: make the gradients float32 first and divide then, by the scale that "
        "they were made with. torch.isfinite is False for NaN and for both infinities. When the scale "
        "changes, in either direction, the count of good steps begins at 0 again.",
        "grads = [g.float() / scale for g in grads]; if not all(torch.isfinite(g).all() for g in grads): "
        "return "
        "None, scale / 2, 0; good += 1; return (grads, scale * 2, 0) if good == interval else (grads, scale, "
        "good).",
    ),
)


def _grads(t: Trial, scale: float, dtype: str = "float32") -> list[Any]:
    """True gradients around 0.01 in three shapes, times the scale."""
    shapes = ((t.odd(3, 7), t.size(2, 5)), (t.size(1, 6),), (2, 1, t.size(2, 4)))
    return [tensor(t, *shape, dtype=dtype, scale=0.01 * scale) for shape in shapes]


def _judge(
    t: Trial, grads: list[Any], scale: float, good: int, interval: int, want: tuple[float, int] | None
) -> None:
    """`want` is (scale, good) after a usable step, None for a step to be skipped."""
    got, after, count = t.pair(t.call(grads, scale, good, interval), 3, "(grads, scale, good)")
    if want is None:
        t.holds(got is None, "gradients came back from a step whose gradients are not all finite, not None")
        t.equal(after, scale / 2, "the next scale")
        t.equal(count, 0, "good steps in a row")
    else:
        t.holds(isinstance(got, list | tuple), "the gradients of a usable step did not come back as a list")
        t.equal(len(got), len(grads), "how many gradients")
        for i, (g, given) in enumerate(zip(got, grads, strict=True)):
            t.close(g, given.double() / scale, f"gradient {i}", rtol=1e-6)
            dtype = str(getattr(g, "dtype", "none")).removeprefix("torch.")
            t.equal(dtype, "float32", f"number format of gradient {i}")
        t.equal(after, want[0], "the next scale")
        t.equal(count, want[1], "good steps in a row")
    t.unchanged()


@scaler_step.check("finite gradients come back divided by the scale, as new float32 tensors")
def unscaled(t: Trial) -> None:
    scale = 2.0 ** t.size(3, 12)
    _judge(t, _grads(t, scale), scale, 3, 2000, (scale, 4))
    _judge(t, _grads(t, 1.0), 1.0, 0, 2000, (1.0, 1))


@scaler_step.check("a gradient that is tiny, but not zero, survives")
def tiny(t: Trial) -> None:
    scale = 2.0**16
    grads = [g.half() for g in _grads(t, 1e-3)]
    _judge(t, grads, scale, 0, 2000, (scale, 1))


@scaler_step.check(
    "an infinity or a NaN, in any place of any gradient: the step is skipped, the scale halved"
)
def overflow(t: Trial) -> None:
    for bad in (float("inf"), float("-inf"), float("nan")):
        for place in (0, 1, 2):
            scale, grads = 2.0 ** t.size(3, 12), []
            grads = _grads(t, scale)
            grads[place].view(-1)[-1] = bad
            _judge(t, grads, scale, t.size(1, 9), 2000, None)
    grads = _grads(t, 1.0)
    grads[0].view(-1)[:2] = torch.tensor([float("inf"), float("-inf")])
    _judge(t, grads, 1.0, 5, 2000, None)


@scaler_step.check("after `interval` good steps in a row the scale doubles, and the count begins again")
def growth(t: Trial) -> None:
    _judge(t, _grads(t, 4.0), 4.0, 0, 1, (8.0, 0))
    interval = t.size(2, 6)
    scale, good = 8.0, 0
    for _ in range(2 * interval):
        want = (scale * 2, 0) if good + 1 == interval else (scale, good + 1)
        _judge(t, _grads(t, scale), scale, good, interval, want)
        scale, good = want


@scaler_step.check("the gradients of the step that doubles the scale are divided by the old one")
def old_scale(t: Trial) -> None:
    interval = t.size(2, 6)
    _judge(t, _grads(t, 64.0), 64.0, interval - 1, interval, (128.0, 0))


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def _finite(grads: list[Any]) -> bool:
    return all(bool(torch.isfinite(g).all()) for g in grads)


def _next(scale: float, good: int, interval: int) -> tuple[float, int]:
    return (scale * 2, 0) if good + 1 == interval else (scale, good + 1)


def _wide(grads: list[Any], scale: float) -> list[Any]:
    return [g.float() / scale for g in grads]


@scaler_step.mistake(
    says="the gradients come back as they were, still multiplied by the scale",
    tries="g.float() / scale for each of them.",
    caught_by="unscaled",
)
def not_divided(grads: Any, scale: float, good: int, interval: int) -> Any:
    if not _finite(grads):
        return None, scale / 2, 0
    return [g.float().clone() for g in grads], *_next(scale, good, interval)


@scaler_step.mistake(
    says="the gradients are multiplied by the scale once more",
    tries="a division: the loss was multiplied before backward, and the gradients with it.",
    caught_by="unscaled",
)
def multiplied(grads: Any, scale: float, good: int, interval: int) -> Any:
    if not _finite(grads):
        return None, scale / 2, 0
    return [g.float() * scale for g in grads], *_next(scale, good, interval)


@scaler_step.mistake(
    says="the gradients are divided in place: the caller's own tensors are changed",
    tries="g / scale, which makes a new tensor, in place of g.div_(scale).",
    caught_by="unscaled",
)
def in_place(grads: Any, scale: float, good: int, interval: int) -> Any:
    for g in grads:
        g.div_(scale)
    if not _finite(grads):
        return None, scale / 2, 0
    return [g.float() for g in grads], *_next(scale, good, interval)


@scaler_step.mistake(
    says="the division happens in float16, where the true gradients are too small to exist",
    tries="g.float() first, then / scale.",
    caught_by="tiny",
)
def divided_in_half(grads: Any, scale: float, good: int, interval: int) -> Any:
    if not _finite(grads):
        return None, scale / 2, 0
    return [(g / scale).float() for g in grads], *_next(scale, good, interval)


@scaler_step.mistake(
    says="NaN is looked for, and an infinity passes",
    tries="torch.isfinite, which is False for NaN and for both infinities.",
    caught_by="overflow",
)
def only_nan(grads: Any, scale: float, good: int, interval: int) -> Any:
    if any(bool(torch.isnan(g).any()) for g in grads):
        return None, scale / 2, 0
    return _wide(grads, scale), *_next(scale, good, interval)


@scaler_step.mistake(
    says="infinities are looked for, and a NaN passes",
    tries="torch.isfinite, which is False for NaN and for both infinities.",
    caught_by="overflow",
)
def only_inf(grads: Any, scale: float, good: int, interval: int) -> Any:
    if any(bool(torch.isinf(g).any()) for g in grads):
        return None, scale / 2, 0
    return _wide(grads, scale), *_next(scale, good, interval)


@scaler_step.mistake(
    says="only the first gradient is looked at",
    tries="all(… for g in grads).",
    caught_by="overflow",
)
def first_only(grads: Any, scale: float, good: int, interval: int) -> Any:
    if not _finite(grads[:1]):
        return None, scale / 2, 0
    return _wide(grads, scale), *_next(scale, good, interval)


@scaler_step.mistake(
    says="a step with an infinity is not skipped: its gradients come back",
    tries="None in their place: one infinity in a weight is there for ever.",
    caught_by="overflow",
)
def never_skips(grads: Any, scale: float, good: int, interval: int) -> Any:
    if not _finite(grads):
        return _wide(grads, scale), scale / 2, 0
    return _wide(grads, scale), *_next(scale, good, interval)


@scaler_step.mistake(
    says="the scale stays after an overflow, and the next step overflows again",
    tries="scale / 2 with None.",
    caught_by="overflow",
)
def stays_high(grads: Any, scale: float, good: int, interval: int) -> Any:
    if not _finite(grads):
        return None, scale, 0
    return _wide(grads, scale), *_next(scale, good, interval)


@scaler_step.mistake(
    says="good steps from before an overflow still count",
    tries="0 good steps after it: they must be in a row.",
    caught_by="overflow",
)
def count_kept(grads: Any, scale: float, good: int, interval: int) -> Any:
    if not _finite(grads):
        return None, scale / 2, good
    return _wide(grads, scale), *_next(scale, good, interval)


@scaler_step.mistake(
    says="the count goes on after the scale has doubled, and it doubles at the next step again, or never",
    tries="good = 0 when the scale doubles.",
    caught_by="growth",
)
def not_reset(grads: Any, scale: float, good: int, interval: int) -> Any:
    if not _finite(grads):
        return None, scale / 2, 0
    good += 1
    return _wide(grads, scale), scale * 2 if good >= interval else scale, good


@scaler_step.mistake(
    says="the scale has not doubled after `interval` good steps: this one is not counted before the "
    "comparison",
    tries="good + 1 == interval: this step is a good one too.",
    caught_by="growth",
)
def one_late(grads: Any, scale: float, good: int, interval: int) -> Any:
    if not _finite(grads):
        return None, scale / 2, 0
    after = (scale * 2, 0) if good == interval else (scale, good + 1)
    return _wide(grads, scale), *after


@scaler_step.mistake(
    says="the gradients are divided by the scale of the next step",
    tries="dividing before the scale is changed.",
    caught_by="growth",
)
def new_scale(grads: Any, scale: float, good: int, interval: int) -> Any:
    if not _finite(grads):
        return None, scale / 2, 0
    scale, good = _next(scale, good, interval)
    return _wide(grads, scale), scale, good


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@scaler_step.alternative("multiplied by the reciprocal, which is exact for a power of two; checked after")
def reciprocal(grads: Any, scale: float, good: int, interval: int) -> Any:
    out = [g.float() * (1 / scale) for g in grads]
    total = sum(float(g.abs().sum()) for g in out)
    if total != total or total == float("inf"):
        return None, scale * 0.5, 0
    grow = good == interval - 1
    return out, scale * (2.0 if grow else 1.0), 0 if grow else good + 1


@scaler_step.alternative("a flag tensor, as on a GPU: one answer for all gradients")
def one_flag(grads: Any, scale: float, good: int, interval: int) -> Any:
    finite = torch.stack([torch.isfinite(g).all() for g in grads]).all()
    if not finite:
        return None, scale / 2, 0
    good = good + 1
    if good % interval == 0:
        return tuple(torch.div(g.to(torch.float32), scale) for g in grads), 2 * scale, 0
    return [torch.div(g.to(torch.float32), scale) for g in grads], scale, good
