"""Lab 12: training in little memory: loss scaling, accumulation, recomputation, and where to cut."""

from llmcourse.labs.lab12_training_memory.accumulated_gradient import accumulated_gradient
from llmcourse.labs.lab12_training_memory.best_pieces import best_pieces
from llmcourse.labs.lab12_training_memory.checkpointed_mlp import checkpointed_mlp
from llmcourse.labs.lab12_training_memory.scaler_step import scaler_step

EXERCISES = (scaler_step, accumulated_gradient, checkpointed_mlp, best_pieces)
