"""The training loop, its MFU, and the pre-training program."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llmcourse.errors import GraphError, ShapeError
from llmcourse.models import ModelConfig, Transformer
from llmcourse.train.fit import build, fit
from llmcourse.train.loop import DivergedError, Trainer
from llmcourse.train.mfu import UncountedLayerError, flops_per_token, matmul_params, mfu, peak_flops
from llmcourse.train.optim import decay_groups
from llmcourse.train.precision import PRECISIONS
from llmcourse.train.pretrain import Plan, corpus, read_plays, trainer_of, write
from llmcourse.train.schedules import cosine
from llmcourse.train.stream import TokenStream

SIZES = dict(d_model=24, n_layers=2, n_heads=3, n_kv_heads=3, head_dim=8, d_ff=40, max_len=32)


def config(**changes):
    return ModelConfig(vocab_size=37, **(SIZES | changes))


def stream(seed=0, batch=6, length=11):
    ids = torch.randint(0, 37, (400,), generator=torch.Generator().manual_seed(9))
    return TokenStream(ids, batch=batch, length=length, seed=seed)


def trainer(rows=0, double=False, **options):
    model = build(Transformer, config(), seed=0)
    if double:
        model = model.double()
    return Trainer(
        model, stream(), torch.optim.AdamW(decay_groups(model, 0.1), lr=3e-3), rows=rows, **options
    )


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ── the loop ─────────────────────────────────────────────────────────────────────────────────────


def test_the_loop_takes_the_steps_that_fit_takes():
    long = trainer(schedule=lambda step: cosine(step, 12, warmup=3, floor=0.1))
    long.run(12, progress=False)
    short = build(Transformer, config(), seed=0)
    curve = fit(short, stream(), steps=12, warmup=3, weight_decay=0.1, optimizer=torch.optim.AdamW)
    assert long.curve.loss == pytest.approx(curve, rel=1e-5)
    for a, b in zip(long.model.parameters(), short.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 4, 5])
def test_pieces_of_any_size_give_the_steps_of_the_whole_batch(rows):
    whole, parts = trainer(double=True), trainer(rows=rows, double=True)
    whole.run(6, progress=False)
    parts.run(6, progress=False)
    assert parts.curve.loss == pytest.approx(whole.curve.loss, rel=1e-6)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-7)  # Adam divides small gradients by their own size


def test_the_curve_counts_tokens_seconds_and_tests():
    run = trainer(held_out=(next(stream(seed=5)), next(stream(seed=6))))
    curve = run.run(7, test_every=3, look_every=2, progress=False)
    assert (len(curve.loss), curve.tokens) == (7, 7 * 66)
    assert [step for step, _ in curve.held_out] == [3, 6, 7]
    assert curve.tokens_per_s == pytest.approx(curve.tokens / curve.seconds)
    assert curve.smooth(3)[-1] == pytest.approx(sum(curve.loss[-3:]) / 3)
    logits = run.model(run.held_out[0].inputs[0])
    first = torch.nn.functional.cross_entropy(logits.flatten(0, 1), run.held_out[0].targets.flatten())
    logits = run.model(run.held_out[1].inputs[0])
    second = torch.nn.functional.cross_entropy(logits.flatten(0, 1), run.held_out[1].targets.flatten())
    assert curve.held_out[-1][1] == pytest.approx((first + second).item() / 2, rel=1e-6)


def test_autocast_computes_in_bfloat16_and_keeps_float32_weights():
    run = trainer(precision=PRECISIONS["bfloat16 autocast"])
    seen = []
    run.model.head.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    run.run(3, progress=False)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    exact = trainer()
    exact.run(3, progress=False)
    assert run.curve.loss == pytest.approx(exact.curve.loss, rel=0.02)


def test_a_loss_that_is_no_number_is_named_with_its_step():
    run = trainer()

    def spoil(t):
        if t.step == 4:
            with torch.no_grad():
                next(t.model.parameters())[:] = math.nan

    with pytest.raises(DivergedError, match="the loss of step 4 is nan"):
        run.run(20, look_every=3, progress=False, on_step=spoil)


def test_a_frozen_model_and_a_test_without_batches_are_told():
    frozen = build(Transformer, config(), seed=0).requires_grad_(False)
    with pytest.raises(GraphError, match="no weight"):
        Trainer(frozen, stream(), torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]))
    with pytest.raises(ShapeError, match="no held-out"):
        trainer().test()
    with pytest.raises(ShapeError, match="length = 399"):
        stream(length=400)


def test_the_bar_shows_the_steps(capsys):
    trainer().run(4, look_every=1, progress=True)
    said = capsys.readouterr().err
    assert "4/4" in said
    assert "tokens/s" in said


def test_a_stream_goes_on_where_its_state_was_taken():
    one, other = stream(), stream(seed=99)
    next(one)
    other.load_state_dict(one.state_dict())
    for a, b in zip((next(one) for _ in range(3)), (next(other) for _ in range(3)), strict=True):
        assert torch.equal(a.inputs[0], b.inputs[0])
        assert torch.equal(a.targets[:, :-1], a.inputs[0][:, 1:])


# ── FLOPs ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"mlp": "gelu"}, {"n_kv_heads": 1}])
def test_the_flops_of_a_token_are_those_that_pytorch_counts(changes):
    sizes = config(**changes)
    model = Transformer(sizes)
    tokens = torch.randint(0, 37, (3, 19))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    counted = counter.get_total_flops() / tokens.numel()
    assert counted == flops_per_token(model, sizes, 19)


def test_norms_and_looked_up_embeddings_multiply_nothing():
    tied, untied = Transformer(config()), Transformer(config(tie_embeddings=False))
    assert matmul_params(tied) == matmul_params(untied)
    assert matmul_params(tied) == tied.config.n_params - 24 * 5


def test_mfu_is_work_over_peak_and_unknown_layers_are_refused():
    assert mfu(1000.0, 6e6, 12e9) == 0.5
    assert peak_flops("cpu") > 1e8
    sizes = config(layers=("linear", "linear"))
    with pytest.raises(UncountedLayerError, match="linear"):
        flops_per_token(Transformer(sizes), sizes, 19)


# ── from text to a model ─────────────────────────────────────────────────────────────────────────

TINY = Plan(
    plays=1, vocab_size=300, width=32, layers=1, heads=2, d_ff=64, length=32, batch=8, steps=80, lr=1e-2
)


@pytest.fixture(scope="module")
def text():
    return corpus(read_plays(1), 300)


def test_pretraining_lowers_the_held_out_loss_below_that_of_single_tokens(text):
    run = trainer_of(TINY, text, tests=3)
    before = run.test()
    run.run(TINY.steps, progress=False)
    after = run.curve.held_out[-1][1]
    counts = torch.bincount(text.train, minlength=300) + 1.0
    single = -(counts / counts.sum()).log()[text.held_out].mean().item()
    assert before == pytest.approx(math.log(300), rel=0.05)
    assert after < single
    assert text.bytes_per_token > 1.2


def test_the_model_writes_from_a_seed(text):
    run = trainer_of(TINY, text)
    a, b, c = (write(run.model, text.tokenizer, "**KING", tokens=12, seed=s) for s in (0, 0, 1))
    assert a == b != c
    assert a.startswith("**KING")


def test_a_compiled_forward_shares_the_weights_that_are_trained(text):
    calls = []

    def wrapped(model):
        def forward(*inputs):
            calls.append(1)
            return model(*inputs)

        return forward

    plain, other = trainer_of(TINY, text, tests=1), trainer_of(TINY, text, tests=1, forward=wrapped)
    plain.run(3, progress=False)
    other.run(3, progress=False)
    assert len(calls) == 3
    assert plain.curve.loss == other.curve.loss


def test_torch_compile_traces_the_whole_model_and_the_loop_takes_its_module(text):
    def traced(model):
        return torch.compile(model, backend="aot_eager", fullgraph=True)

    plain, other = trainer_of(TINY, text, tests=1), trainer_of(TINY, text, tests=1, forward=traced)
    plain.run(2, progress=False)
    other.run(2, progress=False)
    assert other.curve.loss == pytest.approx(plain.curve.loss, rel=1e-5)


def test_the_program_goes_on_where_it_was(tmp_path):
    command = [sys.executable, "-m", "llmcourse.train.pretrain", "--folder", str(tmp_path / "run"), "--plain"]
    root = Path(__file__).parents[2]
    said = []
    for steps in (2, 3):
        done = subprocess.run(
            [*command, "--steps", str(steps), "--threads", "1"], cwd=root, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.split("\n")[:-2])
    assert said == [["step 1", "step 2"], ["step 3"]]


def test_a_plan_describes_its_model():
    plan = replace(TINY, heads=4)
    assert (plan.config.head_dim, plan.tokens_per_step) == (8, 256)
