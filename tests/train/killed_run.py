"""A small run that depends on everything a checkpoint must hold, for tests to kill.

python killed_run.py FOLDER STEPS [die_in_write_of_step]
"""

from __future__ import annotations

import os
import random
import signal
import sys

import numpy as np
import torch
from torch import Tensor, nn

from llmcourse.train import resume
from llmcourse.train.loop import Trainer
from llmcourse.train.optim import AdamW, decay_groups
from llmcourse.train.schedules import cosine
from llmcourse.train.stream import TokenStream


class Noisy(nn.Module):
    """Draws from PyTorch's, Python's and NumPy's generators in every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.dropout = nn.Dropout(0.3)
        self.mixed = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.dropout(self.embedding(tokens))
        if self.training:
            x = x * (1 + 0.1 * random.random() + 0.1 * np.random.rand())
        return self.head(torch.tanh(self.mixed(x)))


class Average:
    """A running mean of the weights, as a thing with a state of its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.mean = model, {n: p.detach().clone() for n, p in model.named_parameters()}

    def take(self) -> None:
        for name, p in self.model.named_parameters():
            self.mean[name].lerp_(p.detach(), 0.1)

    def state_dict(self) -> dict[str, Tensor]:
        return self.mean

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.mean = {name: value.clone() for name, value in state.items()}


def make(seed: int = 3, optimizer: type = AdamW, rows: int = 0) -> Trainer:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    model = Noisy()
    ids = torch.randint(0, 11, (500,), generator=torch.Generator().manual_seed(1))
    return Trainer(
        model,
        TokenStream(ids, batch=4, length=9, seed=5),
        optimizer(decay_groups(model, 0.1), lr=1e-2),
        schedule=lambda step: cosine(step, 40, warmup=5),
        also={"average": Average(model)},
        rows=rows,
        held_out=(next(TokenStream(ids, batch=4, length=9, seed=6)),),
    )


def main() -> None:
    folder, steps = sys.argv[1], int(sys.argv[2])
    trainer = make()
    if len(sys.argv) > 3:
        fatal, rename = f"step-{int(sys.argv[3]):08}.safetensors", os.replace

        def die(source: object, target: object) -> None:
            if str(target).endswith(fatal):
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)  # type: ignore[arg-type]

        resume.os.replace = die  # type: ignore[attr-defined]

    def after(t: Trainer) -> None:
        t.also["average"].take()  # type: ignore[attr-defined]
        print(t.step, flush=True)

    trainer.run(steps, folder=folder, save_every=3, test_every=7, progress=False, on_step=after)


if __name__ == "__main__":
    main()
