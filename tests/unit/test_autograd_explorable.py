"""The digits' explorable: what it draws follows the slider, and its pixel gradients are right."""

from __future__ import annotations

import numpy as np
import pytest

from llmcourse.autograd import Tensor, cross_entropy, numeric_gradient
from llmcourse.autograd.digits import load_digits
from llmcourse.autograd.fit import fit
from llmcourse.autograd.nn import MLP
from llmcourse.widgets.digit_gradients import digit_gradients, read_digit


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def test_the_pixel_gradient_equals_finite_differences(digits) -> None:
    model = MLP((64, 8, 10), seed=3, dtype=np.float64)
    pixels = digits.x_test[4].astype(np.float64)
    label = int(digits.y_test[4])

    def loss() -> float:
        return cross_entropy(model(Tensor(pixels[None])), [label]).item()

    probabilities, gradient = read_digit(model, pixels, label)
    np.testing.assert_allclose(gradient, numeric_gradient(loss, pixels), rtol=1e-6, atol=1e-9)
    assert -np.log(probabilities[label]) == pytest.approx(loss())
    assert probabilities.sum() == pytest.approx(1)


def test_asking_for_pixel_gradients_leaves_the_parameters_gradients_alone(digits) -> None:
    model = MLP((64, 8, 10))
    first = model.parameters()[0]
    first.grad = np.ones(first.shape, np.float32)
    read_digit(model, digits.x_test[0], 0)
    assert (first.grad == 1).all()
    assert model.parameters()[1].grad is None


def test_moving_the_slider_draws_another_digit_and_back_the_same(digits) -> None:
    model = MLP((64, 8, 10))
    fit(model, digits, epochs=1)
    explorable = digit_gradients(model, digits, image=5)
    slider = explorable.controls["image"]
    assert (slider.value, slider.max) == (5, len(digits.x_test) - 1)
    before = bytes(explorable.image.value)
    slider.value = 6
    after = bytes(explorable.image.value)
    slider.value = 5
    assert before.startswith(b"\x89PNG")
    assert before != after
    assert bytes(explorable.image.value) == before
