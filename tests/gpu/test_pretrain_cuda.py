"""Pre-training on a GPU: resumed bit for bit, compiled with the same weights, loss as on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmcourse.train.pretrain import PLANS, corpus, read_plays, trainer_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

PLAN = replace(PLANS["ci"], plays=1, steps=20, heads=1, lr=4e-3)


@pytest.fixture(scope="module")
def data():
    return corpus(read_plays(1), PLAN.vocab_size)


def test_a_run_taken_up_again_ends_with_the_same_bits(data, tmp_path):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        whole, first, second = (trainer_of(PLAN, data, device="cuda", tests=1) for _ in range(3))
        whole.run(20, progress=False)
        first.run(9, folder=tmp_path, progress=False)
        second.run(20, folder=tmp_path, progress=False)
    finally:
        torch.use_deterministic_algorithms(before)
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert whole.curve.loss == second.curve.loss


def test_the_curve_is_the_cpu_s_also_compiled_and_in_bfloat16(data):
    on_cpu = trainer_of(PLAN, data)
    on_cpu.run(12, progress=False)
    for precision, forward, rel in (
        ("float32", None, 2e-3),
        ("float32", torch.compile, 2e-3),
        ("bfloat16 autocast", torch.compile, 2e-2),
    ):
        run = trainer_of(replace(PLAN, precision=precision), data, device="cuda", forward=forward)
        run.run(12, progress=False)
        assert run.curve.loss == pytest.approx(on_cpu.curve.loss, rel=rel), (precision, forward)
