"""The path of an optimizer down a valley, step by step: choose the optimizer, its rate and its momentum."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import ipywidgets as W
import numpy as np

from llmcourse.errors import UnknownNameError
from llmcourse.widgets.explorable import Explorable, choice

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#888888"
STEPS = 60
START = (-4.0, 1.5)
CAPTION = (
    "Raise the rate until the path no longer settles, then turn the valley by 45°: SGD takes the same path, "
    "turned, and Adam, which scales each coordinate by its own gradients, does not."
)
OPTIMIZERS = ("SGD", "momentum", "Adam")
RATES = [round(10 ** (k / 6), 4) for k in range(-18, 2)]


def valley(w: Any, steepness: float, turned: float = 0.0) -> Any:
    """½·(a² + steepness·b²) for w [..., 2]; a and b are coordinates in axes turned by `turned` radians."""
    cos, sin = math.cos(turned), math.sin(turned)
    x, y = w[..., 0], w[..., 1]
    a, b = cos * x + sin * y, cos * y - sin * x
    return 0.5 * (a * a + steepness * b * b)


def start(turned: float) -> tuple[float, float]:
    """Where every path begins: the same place of the valley, however it is turned."""
    cos, sin = math.cos(turned), math.sin(turned)
    return cos * START[0] - sin * START[1], sin * START[0] + cos * START[1]


def descend(
    loss: Callable[[Tensor], Tensor],
    begin: tuple[float, float],
    optimizer: Callable[..., Any],
    steps: int = STEPS,
) -> np.ndarray:
    """The points that `optimizer([w])` visits, [steps + 1, 2], in float64; it ends early beyond 10⁶."""
    import torch

    w = torch.nn.Parameter(torch.tensor(begin, dtype=torch.float64))
    stepper, path = optimizer([w]), [begin]
    for _ in range(steps):
        stepper.zero_grad()
        loss(w).backward()
        stepper.step()
        path.append(tuple(w.detach().tolist()))
        if max(map(abs, path[-1])) > 1e6:
            break
    return np.array(path)


def maker(name: str, lr: float, momentum: float) -> Callable[..., Any]:
    """The package's optimizer of that name, with its rate and its momentum (Adam's first β)."""
    from llmcourse.train.optim import SGD, Adam

    if name not in OPTIMIZERS:
        raise UnknownNameError(
            f"there is no optimizer called {name!r} here.",
            "A path is drawn for one of three.",
            f"one of {', '.join(OPTIMIZERS)}.",
        )
    if name == "Adam":
        return partial(Adam, lr=lr, betas=(momentum, 0.99))
    return partial(SGD, lr=lr, momentum=momentum if name == "momentum" else 0.0)


def optimizer_path(
    *,
    optimizer: str = "SGD",
    rate: float = RATES[10],
    momentum: float = 0.9,
    steepness: int = 25,
    turned: int = 0,
) -> Explorable:
    """An explorable of one path: left the valley seen from above, right the loss at every step.

    steepness   how much more curved the valley is across than along
    turned      by how many degrees the valley is turned against the axes
    """

    def picture(optimizer: str, rate: float, momentum: float, steepness: int, turned: int) -> Figure:
        from matplotlib.figure import Figure

        angle = math.radians(turned)
        loss = partial(valley, steepness=steepness, turned=angle)
        path = descend(loss, start(angle), maker(optimizer, rate, momentum))
        losses = loss(path)
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        above, fall = figure.subplots(1, 2, width_ratios=[1.5, 1])
        side = np.linspace(-5, 5, 121)
        grid = np.stack(np.meshgrid(side, side), axis=-1)
        above.contour(side, side, np.sqrt(loss(grid)), levels=12, colors=GREY, linewidths=0.6)
        above.plot(*path.T, "o-", color=BLUE, markersize=3, linewidth=1)
        above.plot(*path[0], "o", color=ORANGE, label="start")
        above.plot(0, 0, "+", color=GREEN, markersize=12, markeredgewidth=2, label="minimum")
        above.set(xlim=(-5, 5), ylim=(-5, 5), xlabel="w₁", ylabel="w₂", aspect="equal")
        above.legend(fontsize=8, frameon=False, loc="upper right")
        fall.semilogy(np.maximum(losses, 1e-12), color=BLUE)
        fall.axhline(losses[0], color=GREY, linestyle=":", linewidth=1)
        fall.set(xlabel="step", ylabel="loss", xlim=(0, STEPS), ylim=(1e-8, 1e6))
        fall.spines[["top", "right"]].set_visible(False)
        fall.set_title(ending(losses), fontsize=10)
        return figure

    wide = {"layout": W.Layout(width="460px"), "style": {"description_width": "110px"}}
    return Explorable(
        picture,
        CAPTION,
        optimizer=choice(OPTIMIZERS, optimizer, "optimizer", **wide),
        rate=choice(RATES, rate, "learning rate", **wide),
        momentum=W.FloatSlider(momentum, min=0, max=0.99, step=0.01, description="momentum, β₁", **wide),
        steepness=choice((1, 5, 25, 100), steepness, "steepness", **wide),
        turned=W.IntSlider(turned, min=0, max=90, step=15, description="turned, °", **wide),
    )


def ending(losses: np.ndarray) -> str:
    """What a curve of losses came to, in a few words."""
    if losses[-1] > losses[0]:
        return f"diverges: {losses[-1]:.1e} after {len(losses) - 1} steps"
    below = np.flatnonzero(losses < 1e-3 * losses[0])
    settled = [i for i in below if (losses[i:] < 1e-3 * losses[0]).all()]
    return f"a thousandth after {settled[0]} steps" if settled else f"{losses[-1]:.1e} after {STEPS} steps"
