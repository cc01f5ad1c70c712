"""Exercise `straight_through`: a layer that computes with rounded weights and trains the ones behind them."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

LOW, HIGH = -8, 7

straight_through = Exercise(
    "straight_through",
    title="A gradient through a staircase",
    arguments=("x", "weight", "scale"),
    shapes=(
        "x        float32 tensor [B, K]",
        "weight   float32 tensor [N, K]: what is trained",
        "scale    float32 tensor [N, 1], positive: a row's step; a constant, no gradient is asked",
        "returns  y [B, N] = x @ w.T, where w are the weights as INT4 stores them: codes −8 … 7 times scale",
        "backward with G [B, N], the gradient of y: x gets G @ w (the rounded weights); weight gets G.T @ x,",
        "         as if nothing had been rounded, and 0 where weight / scale lies below −8 or above 7",
    ),
    formula="w = clamp(round(weight / scale), −8, 7) · scale;   ∂y/∂weight is taken as 1 inside the grid, "
    "0 outside",
    difficulty=2,
    importance=4,
    minutes=20,
    points=4,
    hints=(
        "What is the derivative of round() almost everywhere, and what does an optimizer do with that? "
        "Which function with another derivative has nearly the same values?",
        "Forward and backward may disagree on purpose. Either a torch.autograd.Function for the rounding, "
        "or the sum of a part with a gradient and a part without: soft + (hard − soft).detach() has the "
        "value of hard and the gradient of soft. Outside of the grid the clamped weight does not depend "
        "on the weight, and clamp's own gradient says so.",
        "soft = weight.clamp(-8 * scale, 7 * scale); hard = torch.round(weight / scale).clamp(-8, 7) * "
        "scale; w = soft + (hard - soft).detach(); return x @ w.T.",
    ),
)


def expected(x: Any, weight: Any, scale: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, and the gradients of its sum with respect to x and weight, in float64 by the formulas."""
    x, w, s = (np.asarray(p.detach().double()) for p in (x, weight, scale))
    rounded = np.clip(np.rint(w / s), LOW, HIGH) * s
    ones = np.ones((x.shape[0], w.shape[0]))
    return x @ rounded.T, ones @ rounded, (ones.T @ x) * ((w / s >= LOW) & (w / s <= HIGH))


def _draw(t: Trial, batch: int, rows: int, columns: int, *, beyond: bool = False) -> tuple[Any, Any, Any]:
    """Weights well inside the grid or well beyond it, and never near the middle between two codes."""
    codes = t.integers(-6, 6, rows, columns) + t.rng.uniform(-0.4, 0.4, (rows, columns))
    if beyond:
        far = t.rng.random((rows, columns))
        codes = np.where(far < 0.2, t.rng.uniform(9, 14, codes.shape), codes)
        codes = np.where(far > 0.8, t.rng.uniform(-14, -9, codes.shape), codes)
    scale = torch.from_numpy(t.rng.uniform(0.02, 0.3, (rows, 1))).float()
    return tensor(t, batch, columns), torch.from_numpy(codes).float() * scale, scale


def _agree(t: Trial, *sizes: int, beyond: bool = False, only: str = "") -> None:
    args = _draw(t, *sizes, beyond=beyond)
    call = t.perform(*args, grads=True)
    y, *gradients = expected(*args)
    t.close(call.value, y, "y", rtol=1e-4)
    if only == "y":
        return
    for name, got, want in zip(("x", "weight"), call.grads or (None, None), gradients, strict=False):
        t.holds(got is not None, f"no gradient reached {name}")
        t.close(got, want, f"the gradient of {name}", rtol=1e-4)
    t.unchanged()


@straight_through.check("forward: x times the weights as INT4 stores them")
def forward(t: Trial) -> None:
    _agree(t, t.odd(3, 7), t.odd(3, 9), t.size(4, 9), only="y")
    _agree(t, 1, 1, 1, only="y")


@straight_through.check("forward: a weight beyond the grid gets the grid's end")
def clipped(t: Trial) -> None:
    _agree(t, t.odd(3, 7), t.odd(5, 9), t.size(8, 12), beyond=True, only="y")


@straight_through.check("backward: inside the grid the rounding is not there")
def inside(t: Trial) -> None:
    _agree(t, t.odd(3, 7), t.odd(3, 9), t.size(4, 9))
    _agree(t, 1, 1, 3)


@straight_through.check("backward: a weight beyond the grid gets no gradient")
def outside(t: Trial) -> None:
    _agree(t, t.odd(3, 7), t.odd(5, 9), t.size(8, 12), beyond=True)


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────


def _hard(weight: Any, scale: Any) -> Any:
    return torch.round(weight / scale).clamp(LOW, HIGH) * scale


def _soft(weight: Any, scale: Any) -> Any:
    return torch.minimum(torch.maximum(weight, LOW * scale), HIGH * scale)


def _through(soft: Any, hard: Any) -> Any:
    return soft + (hard - soft).detach()


@straight_through.mistake(
    says="the weights are not rounded: nothing is trained for INT4",
    tries="torch.round(weight / scale).clamp(-8, 7) * scale in the forward pass.",
    caught_by="forward",
)
def not_rounded(x: Any, weight: Any, scale: Any) -> Any:
    return x @ _soft(weight, scale).T


@straight_through.mistake(
    says="the codes are multiplied with x, and the scale is missing",
    tries="… * scale behind the clamp.",
    caught_by="forward",
)
def codes_only(x: Any, weight: Any, scale: Any) -> Any:
    soft = _soft(weight, scale) / scale
    return x @ _through(soft, _hard(weight, scale) / scale).T


@straight_through.mistake(
    says="the weights are cut off, not rounded",
    tries="torch.round.",
    caught_by="forward",
)
def floored(x: Any, weight: Any, scale: Any) -> Any:
    return x @ _through(_soft(weight, scale), torch.floor(weight / scale).clamp(LOW, HIGH) * scale).T


@straight_through.mistake(
    says="the grid ends at −7: a code of four bits reaches to −8",
    tries=".clamp(-8, 7).",
    caught_by="clipped",
)
def without_eight(x: Any, weight: Any, scale: Any) -> Any:
    hard = torch.round(weight / scale).clamp(-7, HIGH) * scale
    return x @ _through(_soft(weight, scale), hard).T


@straight_through.mistake(
    says="the codes are not clamped: weights beyond the grid keep codes that four bits cannot hold",
    tries=".clamp(-8, 7) behind torch.round.",
    caught_by="clipped",
)
def not_clamped(x: Any, weight: Any, scale: Any) -> Any:
    return x @ _through(weight, torch.round(weight / scale) * scale).T


@straight_through.mistake(
    says="autograd goes through round(), whose derivative is 0: the weights never move",
    tries="soft + (hard − soft).detach(), or an autograd.Function whose backward returns the gradient.",
    caught_by="inside",
)
def staircase(x: Any, weight: Any, scale: Any) -> Any:
    return x @ _hard(weight, scale).T


@straight_through.mistake(
    says="the rounded weights are detached altogether: no gradient reaches weight",
    tries="detaching the difference hard − soft alone.",
    caught_by="inside",
)
def detached(x: Any, weight: Any, scale: Any) -> Any:
    return x @ _hard(weight, scale).detach().T


@straight_through.mistake(
    says="the gradient is multiplied by the scale: it was let through at the codes, not at the weights",
    tries="the straight-through step around clamp(round(weight / scale)) · scale as a whole, or weight / "
    "scale recorded before it.",
    caught_by="inside",
)
def at_the_codes(x: Any, weight: Any, scale: Any) -> Any:
    soft = _soft(weight, scale)
    return x @ ((soft - soft.detach()) * scale + _hard(weight, scale).detach()).T


@straight_through.mistake(
    says="weight gets ones in place of G.T @ x: what came in from behind is thrown away",
    tries="the incoming gradient, passed on unchanged.",
    caught_by="inside",
)
def ones(x: Any, weight: Any, scale: Any) -> Any:
    class Ones(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, weight: Any) -> Any:
            return _hard(weight, scale)

        @staticmethod
        def backward(ctx: Any, g: Any) -> Any:
            return torch.ones_like(g)

    return x @ Ones.apply(weight).T


@straight_through.mistake(
    says="x gets the gradient of the unrounded weights: what is below learns for a layer that is not there",
    tries="one product with the rounded weights, x @ w.T; the straight-through step belongs to w alone.",
    caught_by="inside",
)
def x_of_the_unrounded(x: Any, weight: Any, scale: Any) -> Any:
    soft = x @ _soft(weight, scale).T
    return soft + (x @ _hard(weight, scale).T - soft).detach()


@straight_through.mistake(
    says="weights beyond the grid get a gradient as well, and wander off",
    tries="weight.clamp(-8 · scale, 7 · scale) as the part with the gradient, or a mask.",
    caught_by="outside",
)
def through_everywhere(x: Any, weight: Any, scale: Any) -> Any:
    return x @ _through(weight, _hard(weight, scale)).T


@straight_through.mistake(
    says="the mask is the wrong way round: only weights beyond the grid are trained",
    tries="the gradient where −8 ≤ weight / scale ≤ 7.",
    caught_by="inside",
)
def mask_inverted(x: Any, weight: Any, scale: Any) -> Any:
    beyond = weight - _soft(weight, scale)
    return x @ _through(beyond, _hard(weight, scale)).T


@straight_through.mistake(
    says="the weights are rounded in place: the small updates of the optimizer are lost at the next step",
    tries="a new tensor for the rounded weights; those that are trained stay as they are.",
    caught_by="inside",
)
def in_place(x: Any, weight: Any, scale: Any) -> Any:
    w = _through(_soft(weight, scale), _hard(weight, scale))
    y = x @ w.T
    weight.data.copy_(_hard(weight, scale))
    return y


# ── other right solutions ────────────────────────────────────────────────────────────────────────────


@straight_through.alternative("the value of one, the gradient of the other")
def detached_difference(x: Any, weight: Any, scale: Any) -> Any:
    return x @ _through(_soft(weight, scale), _hard(weight, scale)).T


@straight_through.alternative("an autograd.Function with a mask")
def masked(x: Any, weight: Any, scale: Any) -> Any:
    class Rounded(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, weight: Any, scale: Any) -> Any:
            codes = weight / scale
            ctx.save_for_backward((codes >= LOW) & (codes <= HIGH))
            return codes.round().clamp(LOW, HIGH) * scale

        @staticmethod
        def backward(ctx: Any, g: Any) -> Any:
            return g * ctx.saved_tensors[0], None

    return torch.nn.functional.linear(x, Rounded.apply(weight, scale))


@straight_through.alternative("torch's own fake quantization, where a code that is clamped has no gradient")
def by_torch(x: Any, weight: Any, scale: Any) -> Any:
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    return x @ torch.fake_quantize_per_channel_affine(weight, scale[:, 0].detach(), zeros, 0, LOW, HIGH).T


@straight_through.alternative("the rounding alone goes straight through; clamp and scale are recorded")
def rounding_alone(x: Any, weight: Any, scale: Any) -> Any:
    codes = (weight / scale).clamp(LOW, HIGH)
    codes = codes + (codes.round() - codes).detach()
    return torch.einsum("bk,nk->bn", x, codes * scale)
