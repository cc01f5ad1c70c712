"""Lab 16: distillation: the loss, a training step in small pieces, and what a draft's guesses are worth."""

from llmcourse.labs.lab16_distillation.acceptance_report import acceptance_report
from llmcourse.labs.lab16_distillation.distillation_loss import distillation_loss
from llmcourse.labs.lab16_distillation.linear_kl_gradients import linear_kl_gradients

EXERCISES = (distillation_loss, linear_kl_gradients, acceptance_report)
