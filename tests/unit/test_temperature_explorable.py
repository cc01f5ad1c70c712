"""The temperature explorer: its pull is the gradient of the loss, and its picture follows the controls."""

from __future__ import annotations

import pytest
import torch

from llmcourse.compress.distill import soft_loss
from llmcourse.widgets.temperature import EXAMPLE, pull, temperature_explorer


@pytest.mark.parametrize("temperature", [0.5, 1.0, 6.0])
def test_the_pull_is_the_negative_gradient_of_the_distillation_loss(temperature):
    draw = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(9, generator=draw, dtype=torch.float64) for _ in range(2))
    z = student.clone().requires_grad_()
    soft_loss(z[None], teacher[None], torch.zeros(1, dtype=torch.long), temperature=temperature).backward()
    assert torch.allclose(pull(teacher, student, temperature, squared=True), -z.grad, atol=1e-6)
    plain = pull(teacher, student, temperature, squared=False)
    assert torch.allclose(plain * temperature**2, -z.grad, atol=1e-6)


def test_the_picture_follows_temperature_and_factor():
    explorer = temperature_explorer()
    first = explorer.image.value
    explorer.controls["temperature"].value = 4.0
    second = explorer.image.value
    explorer.controls["factor"].value = "no factor"
    assert len({first, second, explorer.image.value}) == 3
    left, _ = explorer.draw(4.0, "T²").axes
    assert [label.get_text() for label in left.get_yticklabels()] == [repr(n) for n in EXAMPLE]
    widths = [bar.get_width() for bar in left.patches]
    want = (torch.tensor(list(EXAMPLE.values())).double() / 4).softmax(-1)
    assert widths == pytest.approx(want.tolist())
