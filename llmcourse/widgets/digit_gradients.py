"""Step through the held-out digits: the picture, what the network reads, and which pixels its loss hangs on.

The third panel is the gradient of the loss with respect to the pixels, from the same backward pass that
trains the weights: the input is a tensor like any other. More ink on an orange pixel would raise the
loss of the right class, more ink on a purple one would lower it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import ipywidgets as W
import numpy as np

from llmcourse.autograd import Tensor, cross_entropy
from llmcourse.autograd.digits import Digits
from llmcourse.autograd.nn import MLP
from llmcourse.widgets.explorable import Explorable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIDE = 8
RIGHT, WRONG, OTHER = "#0072B2", "#D55E00", "#BBBBBB"  # Okabe & Ito's blue and vermilion, and grey
CAPTION = (
    "Move the slider (arrow keys once it has the focus): a held-out digit, the class probabilities, "
    "and the gradient of the loss for each pixel."
)


def read_digit(model: MLP, pixels: np.ndarray, label: int) -> tuple[np.ndarray, np.ndarray]:
    """What the model makes of one image, pixels [64]: class probabilities [C] and d loss / d pixels [64].

    The loss is the cross-entropy of `label`, in nats. The parameters' gradients stay as they are.
    """
    before = [p.grad for p in model.parameters()]
    x = Tensor(pixels[None, :].copy(), requires_grad=True, name="pixels")
    logits = model(x)
    cross_entropy(logits, np.array([label])).backward()
    for p, grad in zip(model.parameters(), before, strict=True):
        p.grad = grad
    assert x.grad is not None
    return logits.detach().softmax().data[0], x.grad[0]


def digit_gradients(model: MLP, digits: Digits, image: int = 0) -> Explorable:
    """An explorable of `model` on the held-out images of `digits`, opened at number `image`."""

    def draw(image: int) -> Figure:
        from matplotlib.figure import Figure

        pixels, label = digits.x_test[image], int(digits.y_test[image])
        probabilities, gradient = read_digit(model, pixels, label)
        figure = Figure(figsize=(8.6, 2.9), layout="constrained")
        ink, bars, influence = figure.subplots(1, 3, width_ratios=[1, 1.35, 1.2])
        _ink(ink, pixels, label)
        _bars(bars, probabilities, label)
        _influence(influence, gradient)
        return figure

    slider = W.IntSlider(value=image, min=0, max=len(digits.x_test) - 1, description="test image")
    return Explorable(draw, CAPTION, image=slider)


def _ink(ax: Axes, pixels: np.ndarray, label: int) -> None:
    ax.imshow(pixels.reshape(SIDE, SIDE), cmap="Greys", vmin=0, vmax=1)
    ax.set_title(f"a {label}, as written", fontsize=10)
    _frame(ax)


def _bars(ax: Axes, probabilities: np.ndarray, label: int) -> None:
    classes = np.arange(len(probabilities))
    read = int(probabilities.argmax())
    colors = [RIGHT if c == label else WRONG if c == read else OTHER for c in classes]
    bars = ax.bar(classes, probabilities, color=colors)
    ax.bar_label(bars, [f"{p:.0%}" if p >= 0.005 else "" for p in probabilities], fontsize=8)
    ax.set_title(f"read as {read}: {'right' if read == label else 'wrong'}", fontsize=10)
    ax.set(xticks=classes, ylim=(0, 1.12), ylabel="probability", xlabel="class (the right one is bold)")
    ax.get_xticklabels()[label].set_fontweight("bold")
    ax.spines[["top", "right"]].set_visible(False)


def _influence(ax: Axes, gradient: np.ndarray) -> None:
    reach = max(float(np.abs(gradient).max()), 1e-12)
    picture = ax.imshow(gradient.reshape(SIDE, SIDE), cmap="PuOr_r", vmin=-reach, vmax=reach)
    bar = ax.figure.colorbar(picture, ax=ax, shrink=0.9, ticks=[-reach, 0, reach], format="%+.2g")
    bar.set_label("nats for full ink", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    ax.set_title("d loss / d pixel", fontsize=10)
    _frame(ax)


def _frame(ax: Axes) -> None:
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(True)
