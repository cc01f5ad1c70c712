"""Lab 14: its bank, the judges' own references, and models that run on a learner's functions."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
import torch

from llmcourse.compress import gptq, quantize
from llmcourse.compress.calibrate import calibrate, layers_of
from llmcourse.compress.qat import qat
from llmcourse.compress.quantize import Scheme
from llmcourse.compress.quantized_linear import QuantizedLinear, quantize_model
from llmcourse.grading.trial import LocalSubject, Trial
from llmcourse.grading.verdict import judge
from llmcourse.kernels.counters import interpreting
from llmcourse.labs import find_lab
from llmcourse.models import Transformer
from llmcourse.plug import PlugError, plug
from llmcourse.train.fit import build, one_thread
from llmcourse.train.small import small
from llmcourse.train.tasks import Text

LAB, KERNEL = find_lab("14"), "dequant_gemv"
of_pack, of_gptq, of_gemv, of_step = (import_module(e.checks[0].run.__module__) for e in LAB.exercises)
EXERCISES = {e.name: e for e in LAB.exercises}
TEXT = Text("the quick brown fox jumps over the lazy dog; " * 40)
SHIFTED, COARSE = Scheme(4, 32, symmetric=False), Scheme(4, 32)


def verdict(name, fn, seed=3):
    return judge(EXERCISES[name], LocalSubject(fn, name), seed)


def a_trial(seed=5):
    return Trial(LocalSubject(len), (), seed, "a test")


def a_model():
    return build(Transformer, small(TEXT.vocab_size, 2), seed=0).eval().requires_grad_(False)


def tokens(seed=0):
    return next(TEXT.batches(batch=8, length=32, seed=seed)).inputs[0]


# ── the judges' own references ───────────────────────────────────────────────────────────────────────


def test_what_the_judge_reads_back_is_what_the_package_stored():
    weight = torch.randn(5, 96)
    q = quantize.quantize(weight, SHIFTED)
    back = of_pack.read_back(q.packed(), q.scale.float(), q.zero, 32)
    np.testing.assert_allclose(back, q.dequantize(torch.float64).numpy(), rtol=1e-6)


@pytest.mark.parametrize("order", [True, False])
def test_the_codes_that_judge_gptq_are_the_packages(order):
    weight, gram, _ = of_gptq._draw(a_trial(), 9, 12)
    scheme = Scheme(4)
    if order:  # the package's own order of columns
        first = gram.diagonal().argsort(descending=True)
        weight, gram = weight[:, first], gram[first][:, first]
    own = gptq.gptq(weight, gram, scheme, damping=1e-12, order=order)
    steps = own.scale.double().expand(weight.shape)
    assert np.array_equal(of_gptq.expected(weight, gram, steps), own.codes.numpy())


@pytest.mark.parametrize("scheme", [SHIFTED, COARSE])
def test_the_product_that_judges_is_with_the_weights_that_the_package_reads_back(scheme):
    q, x = quantize.quantize(torch.randn(5, 96), scheme), torch.randn(96)
    zero = torch.full_like(q.scale, 8.0) if q.zero is None else q.zero
    got = of_gemv.expected((x, q.packed(), q.scale.float(), zero.float()), 32)
    np.testing.assert_allclose(got, (q.dequantize(torch.float64) @ x.double()).numpy(), rtol=1e-5, atol=1e-6)


def test_the_output_error_that_judges_is_that_of_the_outputs():
    x, w = torch.randn(7, 40).double(), torch.randn(3, 7).double()
    codes = w.round()
    want = ((w - codes) @ x).square().sum().item()
    assert of_gptq.output_error(w, x @ x.T, torch.ones_like(w), codes) == pytest.approx(want)


def test_the_gradients_that_judge_are_those_of_torchs_fake_quantization():
    x, weight, scale = of_step._draw(a_trial(), 5, 7, 9, beyond=True)
    x.requires_grad_()
    weight.requires_grad_()
    zeros = torch.zeros(7, dtype=torch.int32)
    y = x @ torch.fake_quantize_per_channel_affine(weight, scale[:, 0], zeros, 0, -8, 7).T
    y.sum().backward()
    for want, got in zip(of_step.expected(x, weight, scale), (y, x.grad, weight.grad), strict=True):
        np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-4, atol=1e-5)


# ── verdicts ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", EXERCISES)
def test_right_functions_pass_on_many_seeds(name):
    for alternative in EXERCISES[name].alternatives:
        for seed in range(40, 42 if name == KERNEL else 46):
            found = verdict(name, alternative.fn, seed)
            assert found.ok, (alternative.name, seed, str(found))


@pytest.mark.parametrize("name", EXERCISES)
def test_a_missing_return_and_nonsense_are_told(name):
    assert verdict(name, lambda *args: None).state == "failed"
    for nonsense in (torch.zeros(2), [torch.zeros(1)] * 3, (1, 2, 3), [], "text", float("nan"), [0, "a"]):
        assert verdict(name, lambda *args, value=nonsense: value).state == "failed"


def test_a_code_that_spills_into_its_neighbour_is_said_to():
    fn = next(m.fn for m in EXERCISES["pack_int4"].mistakes if m.name == "not_clamped")
    assert "spills into the neighbour's four bits" in str(verdict("pack_int4", fn))


# ── at work ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("alternative", EXERCISES["pack_int4"].alternatives, ids=lambda a: a.name)
def test_a_model_packed_by_a_learners_function_is_nearly_the_packages(alternative):
    model = a_model()
    with plug(pack_int4=alternative.fn) as used:
        mine = quantize_model(model, SHIFTED)
    assert used.calls["pack_int4"] == len(layers_of(model))
    for name, layer in layers_of(model).items():
        got = mine.get_submodule(name)
        assert isinstance(got, QuantizedLinear)
        own = quantize.quantize(layer.weight, SHIFTED).dequantize()  # its scales are rounded to bfloat16
        error, theirs = (w - layer.weight for w in (got.quantized.dequantize(), own))
        assert error.norm() < 1.05 * theirs.norm()


@pytest.mark.parametrize("alternative", EXERCISES["gptq_update"].alternatives, ids=lambda a: a.name)
def test_gptq_with_a_learners_loop_is_the_packages(alternative):
    model = a_model()
    seen = calibrate(model, tokens())
    for name, layer in layers_of(model).items():
        own = gptq.gptq(layer.weight, seen[name].gram, COARSE)
        with plug(gptq_update=alternative.fn):
            mine = gptq.gptq(layer.weight, seen[name].gram, COARSE)
        assert (
            own.codes != mine.codes
        ).float().mean() < 0.02  # float32 and float64: a tie may fall either way
        errors = [seen[name].error(q.dequantize() - layer.weight) for q in (own, mine)]
        assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.parametrize("alternative", EXERCISES["dequant_gemv"].alternatives, ids=lambda a: a.name)
@pytest.mark.parametrize("scheme", [SHIFTED, COARSE], ids=str)
def test_a_model_says_the_same_through_a_learners_kernel(alternative, scheme):
    model, one = quantize_model(a_model(), scheme), tokens()[:1, :1]
    own = model(one)
    with plug(dequant_gemv=alternative.fn) as used, interpreting():
        mine = model(one)
        many = model(tokens())
    assert used.calls["dequant_gemv"] == 8  # 2 blocks of 4 layers; many rows go another way
    assert torch.allclose(mine, own, atol=1e-4)
    assert torch.allclose(many, model(tokens()), atol=1e-5)


@pytest.mark.parametrize("alternative", EXERCISES["straight_through"].alternatives, ids=lambda a: a.name)
@one_thread()
def test_a_training_through_a_learners_rounding_is_nearly_the_packages(alternative):
    def trained():
        return qat(a_model(), (tokens(i) for i in range(9)), COARSE, steps=8, lr=3e-3)[1]

    own = trained()
    with plug(straight_through=alternative.fn) as used:
        mine = trained()
    assert used.calls["straight_through"] > 0
    assert mine[:3] == pytest.approx(own[:3], rel=0.05)  # weights at the very end of the grid get no gradient
    assert mine[-1] == pytest.approx(own[-1], rel=0.5)


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("pack_int4", lambda weight, group: None, "None"),
        ("pack_int4", lambda weight, group: (weight, weight, weight), "packed is of shape"),
        ("gptq_update", lambda weight, gram, scale: weight[:1], "of shape"),
        ("gptq_update", lambda weight, gram, scale: weight * 0 + 8, "something else than the codes"),
        ("gptq_update", lambda weight, gram, scale: weight, "something else than the codes"),
        ("dequant_gemv", lambda x, packed, scale, zero, group, rows: x[:3], "has shape"),
        ("dequant_gemv", lambda x, packed, scale, zero, group, rows: None, "None"),
        ("straight_through", lambda x, weight, scale: weight, "y is of shape"),
        ("straight_through", lambda x, weight, scale: (x @ weight.T).double(), "float64"),
    ],
)
def test_what_does_not_fit_the_package_is_refused(name, wrong, says):
    model = a_model()

    def run():
        quantize_model(model, SHIFTED if name == "pack_int4" else COARSE)(tokens()[:1, :1])
        layer = model.blocks[0].mlp.down
        gptq.gptq(layer.weight, torch.eye(layer.in_features), COARSE)
        qat(model, iter([tokens()] * 2), COARSE, steps=1)

    with pytest.raises(PlugError, match=says), plug(**{name: wrong}):
        run()


def test_a_scheme_that_a_function_was_not_written_for_is_refused():
    right = EXERCISES["pack_int4"].alternatives[0].fn
    with plug(pack_int4=right) as used:
        quantize.quantize(torch.randn(4, 64), Scheme(8))  # the package's own
        with pytest.raises(PlugError, match="that divides the row"):
            quantize.quantize(torch.randn(4, 60), SHIFTED)
    assert used.calls["pack_int4"] == 0
    right = EXERCISES["gptq_update"].alternatives[0].fn
    with pytest.raises(PlugError, match="codes −8 … 7"), plug(gptq_update=right):
        gptq.gptq(torch.randn(4, 64), torch.eye(64), Scheme(3))
