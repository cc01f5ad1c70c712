"""The points of `llmcourse.compress`'s distillation: the loss, a step in small pieces, the acceptance report.

with plug(distillation_loss=my_loss, linear_kl_gradients=my_step) as used:
    student = train_student(pair, "soft targets")       # my_loss, once a step
        train_draft(draft, corpora, DraftLoss(head), …)     # my_step, once a step
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llmcourse.plug.kernels import tensor
from llmcourse.plug.point import Array, LearnersCode, Point, register

if TYPE_CHECKING:
    from torch import Tensor

COMPRESS = "llmcourse.compress"


def distillation_loss(code: LearnersCode) -> Callable[..., Tensor]:
    def loss(
        student: Tensor, teacher: Tensor, targets: Tensor, temperature: float = 1.0, weight: float = 1.0
    ) -> Tensor:
        value = tensor(code, code(student, teacher, targets, temperature, weight), student, (), "the loss")
        if student.requires_grad and not value.requires_grad:
            code.refuse(
                "the loss has lost the student's graph",
                "Training sends a gradient from the loss back to the student's weights.",
                "tensors all the way: no .item(), no detach() of the student.",
            )
        return value

    return loss


def linear_kl_gradients(code: LearnersCode) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def gradients(
        x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor, rows: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        import torch

        given = tuple(t.detach().float() for t in (x, weight, teacher_x, teacher_weight))
        with torch.enable_grad():  # a learner's way may be autograd's, and here nothing is recorded
            results = code(*given, rows)
        parts = code.parts(results, ("loss", "grad_x", "grad_weight"))
        loss = tensor(code, parts[0], given[0], (), "loss").detach()
        grad_x = tensor(code, parts[1], given[0], tuple(x.shape), "grad_x")
        grad_weight = tensor(code, parts[2], given[1], tuple(weight.shape), "grad_weight")
        return loss, grad_x.detach().to(x.dtype), grad_weight.detach().to(weight.dtype)

    return gradients


def acceptance_report(code: LearnersCode) -> Callable[..., tuple[float, Array, float]]:
    def report(p: Array, q: Array, tokens: Array, length: int) -> tuple[float, Array, float]:
        parts = code.parts(code(p, q, tokens, length), ("rate", "accepted", "tokens_per_pass"))
        rate, per_pass = (
            float(code.number(part, what, float))
            for part, what in ((parts[0], "rate"), (parts[2], "tokens_per_pass"))
        )
        if not per_pass > 0:
            code.refuse(
                f"tokens_per_pass is {per_pass}",
                "Passes are counted as tokens over tokens a pass.",
                "a number above 0.",
            )
        return rate, code.array(parts[1], "accepted", tokens.shape, p.dtype), per_pass

    return report


for _point in (
    Point(
        "distillation_loss",
        ("student", "teacher", "targets", "temperature", "weight"),
        "tensor",
        "w·T²·KL(teacher ‖ student) at temperature T and (1 − w)·cross-entropy, logits [N, V]: one number.",
        (f"{COMPRESS}.distill:distillation_loss",),
        distillation_loss,
    ),
    Point(
        "linear_kl_gradients",
        ("x", "weight", "teacher_x", "teacher_weight", "rows"),
        "(loss, grad_x, grad_weight)",
        "Mean KL between two heads' distributions, and its gradients, for `rows` tokens at a time.",
        (f"{COMPRESS}.linear_kl:linear_kl_gradients",),
        linear_kl_gradients,
    ),
    Point(
        "acceptance_report",
        ("p", "q", "tokens", "length"),
        "(rate, accepted, tokens_per_pass)",
        "How many guesses of a draft pass on a text that the target wrote, and tokens a pass that follow.",
        (f"{COMPRESS}.draft_report:acceptance_report",),
        acceptance_report,
    ),
):
    register(_point)
