"""Training: a small loop, and small tasks that show what an architecture can and cannot do."""

from llmcourse.train.fit import accuracy, build, cross_entropy, fit
from llmcourse.train.tasks import IGNORE, Batch

__all__ = ["IGNORE", "Batch", "accuracy", "build", "cross_entropy", "fit"]
