"""Lab 01's array exercises: the references against PyTorch, and solutions that the banks do not hold."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
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

# By import_module, since the package calls each exercise by the name of its file.
MATMUL = import_module("llmcourse.labs.lab01_backprop.matmul_backward")
ENTROPY = import_module("llmcourse.labs.lab01_backprop.cross_entropy")
matmul_backward: Exercise = MATMUL.matmul_backward
cross_entropy: Exercise = ENTROPY.cross_entropy

SIZES = st.integers(0, 4)
SEEDS = st.integers(0, 2**32 - 1)


def check(exercise: Exercise, fn: Callable[..., Any], seed: int = 0) -> Verdict:
    return judge(exercise, LocalSubject(fn, exercise.name), seed)


def first_failing(verdict: Verdict) -> str:
    assert verdict.first_failure is not None
    return verdict.first_failure.check.name


@st.composite
def batch_axes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The front axes of two operands that broadcast: each shared, stretched in one, or missing in one."""
    full = draw(st.lists(st.integers(0, 3), max_size=3))
    a, b = ([n if draw(st.booleans()) else 1 for n in full] for _ in range(2))
    missing = draw(st.integers(0, len(full)))
    cut = [draw(st.sampled_from([0, missing])), 0]
    if draw(st.booleans()):
        cut.reverse()
    return tuple(a[cut[0] :]), tuple(b[cut[1] :])


# ── references ───────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=150, deadline=None)
@given(batch_axes(), SIZES, SIZES, SIZES, SEEDS)
def test_the_reference_gradients_of_a_product_are_torchs(fronts, n, k, m, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(*fronts[0], n, k)), rng.normal(size=(*fronts[1], k, m))
    grad = rng.normal(size=(a @ b).shape)
    ta, tb = torch.tensor(a, requires_grad=True), torch.tensor(b, requires_grad=True)
    (ta @ tb).backward(torch.tensor(grad))
    for ours, theirs in zip(MATMUL.expected(grad, a, b), (ta.grad, tb.grad), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-12, atol=1e-12)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.sampled_from([0.1, 1.5, 30.0, 1e4]), SEEDS)
def test_the_reference_loss_and_its_gradient_are_torchs(rows, classes, scale, seed):
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(0, scale, (rows, classes)), rng.integers(0, classes, rows)
    z = torch.tensor(logits, requires_grad=True)
    theirs = torch.nn.functional.cross_entropy(z, torch.tensor(labels))
    theirs.backward()
    loss, grad = ENTROPY.expected(logits, labels)
    np.testing.assert_allclose(loss, theirs.item(), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(grad, z.grad.numpy(), rtol=1e-11, atol=1e-13)


def test_the_references_compute_in_float64_whatever_comes():
    rng = np.random.default_rng(3)
    a, b, grad = (rng.normal(size=s).astype(np.float32) for s in [(3, 2), (2, 5), (3, 5)])
    wide = MATMUL.expected(*(x.astype(np.float64) for x in (grad, a, b)))
    for x, y in zip(MATMUL.expected(grad, a, b), wide, strict=True):
        assert x.dtype == np.float64
        np.testing.assert_array_equal(x, y)
    loss, gradient = ENTROPY.expected(a, np.array([0, 1, 1], np.uint8))
    np.testing.assert_array_equal(gradient, ENTROPY.expected(a.astype(np.float64), np.array([0, 1, 1]))[1])
    assert type(loss) is float


# ── right solutions that share no code with the bank ─────────────────────────────────────────────


def by_torch_product(grad, a, b):
    ta, tb = (torch.tensor(x, requires_grad=True) for x in (a, b))
    return torch.autograd.grad(ta @ tb, (ta, tb), torch.tensor(grad))


def by_engine_product(grad, a, b):
    ta, tb = engine.Tensor(a, requires_grad=True), engine.Tensor(b, requires_grad=True)
    (ta @ tb).backward(grad)
    return ta.grad, tb.grad


def by_torch_loss(logits, labels):
    z = torch.tensor(logits, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(z, torch.tensor(labels.astype(np.int64)))
    loss.backward()
    return loss.item(), z.grad


def by_engine_loss(logits, labels):
    z = engine.Tensor(logits, requires_grad=True)
    loss = engine.cross_entropy(z, labels)
    loss.backward()
    return loss.data, z.grad


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("exercise", "fn"),
    [
        (matmul_backward, by_torch_product),
        (matmul_backward, by_engine_product),
        (cross_entropy, by_torch_loss),
        (cross_entropy, by_engine_loss),
    ],
)
def test_torchs_gradients_and_the_courses_engine_pass(exercise, fn, seed):
    verdict = check(exercise, fn, seed)
    assert verdict.ok, str(verdict)


# ── wrong solutions beyond the banks ─────────────────────────────────────────────────────────────


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([matmul_backward, cross_entropy]), st.integers(0, 1), st.data())
def test_one_number_that_is_off_by_a_thousandth_is_found(exercise, part, data):
    right = exercise.alternatives[0].fn
    place = data.draw(st.sampled_from([0, -1]))

    def nearly(*args):
        results = [np.array(r) for r in right(*args)]
        if results[part].size:
            results[part].reshape(-1)[place] *= 1.001
        return tuple(results)

    assert not check(exercise, nearly, data.draw(st.integers(0, 10**6))).ok


@pytest.mark.parametrize("exercise", [matmul_backward, cross_entropy])
def test_float64_inputs_must_be_computed_in_float64(exercise):
    right = exercise.alternatives[0].fn

    def in_single_precision(*args):
        narrow = [x.astype(np.float32) if x.dtype.kind == "f" else x for x in args]
        return right(*narrow)

    def and_back(*args):
        return tuple(np.asarray(r, args[0].dtype) for r in in_single_precision(*args))

    assert not check(exercise, in_single_precision).ok
    assert not check(exercise, and_back).ok


@pytest.mark.parametrize("exercise", [matmul_backward, cross_entropy])
def test_float32_inputs_must_not_be_computed_in_float16(exercise):
    right = exercise.alternatives[0].fn

    def in_half_precision(*args):
        if args[0].dtype != np.float32:
            return right(*args)
        results = right(*(x.astype(np.float16) if x.dtype.kind == "f" else x for x in args))
        return tuple(np.asarray(r, np.float32) for r in results)

    assert not check(exercise, in_half_precision).ok


def test_a_capped_loss_is_found_whatever_the_cap():
    for cap in (1e-8, 1e-15, 1e-300):

        def capped(logits, labels, cap=cap):
            e = np.exp(logits - logits.max(axis=1, keepdims=True))
            p = e / e.sum(axis=1, keepdims=True)
            rows = np.arange(len(p))
            loss = -np.log(np.maximum(p[rows, labels], cap)).mean()
            p[rows, labels] -= 1
            return loss, p / len(p)

        assert first_failing(check(cross_entropy, capped)) == "extreme"


def test_results_that_remember_the_last_call_are_found():
    kept: list[Any] = []

    def stale(*args):
        kept.append(matmul_backward.alternatives[0].fn(*args))
        return kept[0]

    assert not check(matmul_backward, stale).ok


def test_a_function_that_looks_past_its_arrays_is_found():
    def wider(logits, labels):
        z = np.lib.stride_tricks.as_strided(logits, (logits.shape[0], logits.shape[1] + 1), logits.strides)
        loss, grad = cross_entropy.alternatives[0].fn(z, labels)
        return loss, grad[:, :-1]

    assert "nan" in str(check(cross_entropy, wider))


# ── what a learner reads ─────────────────────────────────────────────────────────────────────────


def test_a_swapped_pair_is_told_by_shape_and_by_name():
    text = str(check(matmul_backward, lambda grad, a, b: (a.T @ grad, grad @ b.T), seed=7))
    assert "grad_a: the result has shape (3, 6), expected (4, 3)" in text
    assert "It looks as if the two gradients are returned in the other order." in text, "and .T is wrong too"


@pytest.mark.parametrize(
    ("exercise", "expected"), [(matmul_backward, "(grad_a, grad_b)"), (cross_entropy, "(loss, grad)")]
)
@pytest.mark.parametrize("result", [None, 1.0, [1, 2, 3], np.zeros(5), "both"])
def test_what_is_no_pair_is_said_to_be_none(exercise, expected, result):
    verdict = check(exercise, lambda *args: result)
    assert f"expected a pair {expected}" in verdict.first_failure.text


def test_an_infinite_loss_is_told_with_the_inputs_that_made_it():
    def overflowing(logits, labels):
        e = np.exp(logits)
        p = e / e.sum(axis=1, keepdims=True)
        rows = np.arange(len(p))
        loss = -np.log(p[rows, labels]).mean()
        p[rows, labels] -= 1
        return loss, p / len(p)

    text = str(check(cross_entropy, overflowing, seed=7))
    assert "✗ cross_entropy · logits of any size work" in text
    assert "loss: nan, expected 7534.36" in text
    assert "∞ / ∞" in text
