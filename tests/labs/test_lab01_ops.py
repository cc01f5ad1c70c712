"""Lab 01's array exercises: the references against PyTorch, and what the banks do not hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import llmcourse.autograd as engine
from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import LocalSubject
from llmcourse.grading.verdict import Verdict, judge
from llmcourse.labs.lab01_backprop import cross_entropy as cross_entropy_file
from llmcourse.labs.lab01_backprop import matmul_backward as matmul_backward_file

# Where the lab lists its exercises, its names are the exercises and not the files.
if isinstance(matmul_backward_file, Exercise):
    from sys import modules

    cross_entropy_file = modules["llmcourse.labs.lab01_backprop.cross_entropy"]
    matmul_backward_file = modules["llmcourse.labs.lab01_backprop.matmul_backward"]

matmul_backward: Exercise = matmul_backward_file.matmul_backward
cross_entropy: Exercise = cross_entropy_file.cross_entropy
