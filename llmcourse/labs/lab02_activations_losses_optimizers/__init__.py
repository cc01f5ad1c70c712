"""Lab 02: what a training step is made of: a gate's backward, the loss, the schedule, AdamW and LAMB."""

from llmcourse.labs.lab02_activations_losses_optimizers.adamw_step import adamw_step
from llmcourse.labs.lab02_activations_losses_optimizers.lamb_step import lamb_step
from llmcourse.labs.lab02_activations_losses_optimizers.learning_rate import learning_rate
from llmcourse.labs.lab02_activations_losses_optimizers.swiglu_backward import swiglu_backward
from llmcourse.labs.lab02_activations_losses_optimizers.token_loss import token_loss

EXERCISES = (swiglu_backward, token_loss, learning_rate, adamw_step, lamb_step)
