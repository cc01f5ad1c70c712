"""Tests of tests of randomness: their false alarms are as stated, and named wrong samplers are found."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from llmcourse.errors import ShapeError
from llmcourse.grading.distribution import (
    Budget,
    DistributionError,
    Evidence,
    chi_square,
    kolmogorov_smirnov,
    mean_within,
    same_distribution,
    samples_needed,
)


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max())
    return p / p.sum()


# ── false alarms ─────────────────────────────────────────────────────────────────────────────────


def outcomes_of(n: int, p: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """All counts that n draws can give, and the probability of each."""
    axes = np.meshgrid(*[np.arange(n + 1)] * (len(p) - 1), indexing="ij")
    free = np.stack([a.ravel() for a in axes], axis=1)
    free = free[free.sum(axis=1) <= n]
    counts = np.concatenate([free, n - free.sum(axis=1, keepdims=True)], axis=1)
    return counts, stats.multinomial.pmf(counts, n, p)


def worst_excess(p_values: np.ndarray, probability: np.ndarray, least: float) -> float:
    """The largest ratio, over all rates above `least`, of how often p is at most that rate to the rate."""
    order = np.argsort(p_values)
    p_values, reached = p_values[order], np.cumsum(probability[order])
    last = np.append(np.diff(p_values) > 1e-9 * p_values[1:], True) & (p_values > least)
    return float((reached[last] / p_values[last]).max())


@pytest.mark.parametrize(
    ("n", "p"),
    [
        (30, [0.99, 0.01]),
        (40, [0.5, 0.5]),
        (100, [0.2, 0.8]),
        (1000, [0.0226, 0.9774]),
        (1000, [0.017, 0.983]),
        (1000, [0.001, 0.999]),
        (1000, [1e-5, 1 - 1e-5]),
        (60, [1 / 3, 1 / 3, 1 / 3]),
        (60, [0.35, 0.55, 0.1]),
        (100, [0.2, 0.2, 0.6]),
        (80, [0.45, 0.549, 0.001]),
    ],
)
def test_no_rate_is_exceeded_over_all_outcomes_that_there_are(n: int, p: list[float]) -> None:
    counts, probability = outcomes_of(n, p)
    p_values = np.array([chi_square(c, p).p_value for c in counts])
    assert worst_excess(p_values, probability, 1e-8) <= 1 + 1e-9


@pytest.mark.parametrize(("n", "m", "p"), [(40, 40, 0.5), (90, 50, 0.5), (60, 60, 0.1), (60, 60, 0.01)])
def test_no_rate_is_exceeded_over_all_outcomes_of_two_samplers(n: int, m: int, p: float) -> None:
    a, b = (grid.ravel() for grid in np.meshgrid(np.arange(n + 1), np.arange(m + 1)))
    probability = stats.binom.pmf(a, n, p) * stats.binom.pmf(b, m, p)
    likely = probability > 1e-12
    a, b, probability = a[likely], b[likely], probability[likely]
    tests = [same_distribution([x, n - x], [y, m - y], counts=True) for x, y in zip(a, b, strict=True)]
    assert worst_excess(np.array([t.p_value for t in tests]), probability, 1e-8) <= 1 + 1e-9


@pytest.mark.parametrize(("p", "times"), [(0.01, 15), (0.001, 500)])
def test_pearsons_statistic_would_exceed_the_rate_many_times(p: float, times: int) -> None:
    """Why chi_square uses the likelihood ratio: the claim of its module."""
    counts, probability = outcomes_of(1000, [p, 1 - p])
    pearson = stats.chisquare(counts, 1000 * np.array([p, 1 - p]), axis=1).pvalue
    assert probability[pearson <= 1e-6].sum() > times * 1e-6


def false_alarms(test: Callable[[np.random.Generator], Evidence], runs: int) -> int:
    return sum(not test(np.random.default_rng([7, seed])) for seed in range(runs))


SKEWED = softmax(np.random.default_rng(1).normal(0, 2.0, 300))
RIGHT_DRAWS = {
    "30 values alike": lambda r, f: chi_square(
        r.multinomial(600, np.full(30, 1 / 30)), np.full(30, 1 / 30), f
    ),
    "300 values, most of them rare": lambda r, f: chi_square(r.multinomial(2000, SKEWED), SKEWED, f),
    "1000 values in pools": lambda r, f: chi_square(
        r.multinomial(4000, np.full(1000, 1 / 1000)), np.full(1000, 1 / 1000), f
    ),
    "two sets of counts": lambda r, f: same_distribution(
        r.multinomial(3000, SKEWED), r.multinomial(1000, SKEWED), f, counts=True
    ),
    "two sets of integers": lambda r, f: same_distribution(r.poisson(4, 500), r.poisson(4, 300), f),
    "two sets of reals": lambda r, f: same_distribution(r.normal(size=200), r.normal(size=300), f),
    "reals with ties": lambda r, f: same_distribution(
        r.poisson(3, 200).astype(float), r.poisson(3, 200).astype(float), f
    ),
    "reals and their cdf": lambda r, f: kolmogorov_smirnov(r.exponential(size=100), stats.expon.cdf, f),
    "a few reals and their cdf": lambda r, f: kolmogorov_smirnov(r.uniform(size=3), stats.uniform.cdf, f),
    "a mean": lambda r, f: mean_within(r.exponential(size=400), 1.0, 1.0, f),
}


@pytest.mark.parametrize("case", RIGHT_DRAWS)
def test_right_draws_are_rejected_at_most_as_often_as_stated_and_not_much_less(case: str) -> None:
    runs, rate = 600, 0.1
    alarms = false_alarms(lambda rng: RIGHT_DRAWS[case](rng, rate), runs)
    assert alarms <= stats.binom.isf(1e-4, runs, rate)
    if case != "reals with ties":
        assert alarms >= runs * rate * 0.2


def test_a_budget_holds_for_tests_that_depend_on_each_other() -> None:
    runs, budget = 600, Budget(0.1)
    p = np.full(8, 1 / 8)

    def three(rng: np.random.Generator) -> Evidence:
        x = rng.multinomial(400, p)
        tests = [chi_square(x, p, budget.share(3)), chi_square(x[::-1], p, budget.share(3))]
        tests.append(mean_within(np.repeat(np.arange(8), x), 3.5, math.sqrt(63 / 12), budget.share(3)))
        return min(tests, key=lambda t: t.ok)

    assert 1 <= false_alarms(three, runs) <= stats.binom.isf(1e-4, runs, 0.1)


def test_the_default_rate_lets_thousands_of_right_answers_pass() -> None:
    p = softmax(np.array([2.0, 1.0, 0.5, 0.0, -1.0, -3.0, 1.9]))
    rng = np.random.default_rng(3)
    assert all(chi_square(x, p) for x in rng.multinomial(5000, p, size=3000))


# ── against scipy ────────────────────────────────────────────────────────────────────────────────


def test_the_statistic_is_scipys_likelihood_ratio_and_p_is_chi_squares_after_williams() -> None:
    k, n = 12, 600
    x = np.random.default_rng(0).multinomial(n, np.full(k, 1 / k))
    x[0], x[1] = x[0] + 30, x[1] - 30
    g = stats.power_divergence(x, lambda_="log-likelihood").statistic
    evidence = chi_square(x, np.full(k, 1 / k))
    assert evidence.statistic == pytest.approx(g, rel=1e-12)
    correction = 1 + (k + 1) / (6 * n) + (k * k + k + 1) / (6 * n * n)  # of k values alike
    assert evidence.p_value == pytest.approx(3.2 * stats.chi2.sf(g / correction, k - 1), rel=1e-9)


def test_with_many_draws_both_chi_squares_are_scipys_and_pearsons() -> None:
    p, off = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.402, 0.298, 0.2, 0.1])
    rng = np.random.default_rng(2)
    a, b = rng.multinomial(4_000_000, off), rng.multinomial(2_000_000, p)
    assert chi_square(a, p).statistic == pytest.approx(stats.chisquare(a, 4e6 * p).statistic, rel=1e-2)
    table = stats.chi2_contingency([a, b], lambda_="log-likelihood")
    evidence = same_distribution(a, b, counts=True)
    assert evidence.statistic == pytest.approx(table.statistic, rel=1e-9)
    assert evidence.p_value == pytest.approx(3.2 * table.pvalue, rel=1e-2)
    assert evidence.p_value < 1e-4
    assert evidence.draws == 6_000_000


def test_a_rare_value_is_tested_by_scipys_exact_binomial_and_hypergeometric() -> None:
    evidence = chi_square([995, 5], [0.999, 0.001])
    assert evidence.p_value == pytest.approx(2 * stats.binomtest(5, 1000, 0.001, "greater").pvalue, rel=1e-9)
    evidence = same_distribution([990, 10], [1000, 0], counts=True)
    fisher = stats.fisher_exact([[10, 990], [0, 1000]], alternative="greater").pvalue
    assert evidence.p_value == pytest.approx(2 * fisher, rel=1e-9)


def test_the_kolmogorov_and_smirnov_tests_and_the_mean_are_scipys() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.normal(0.1, 1, 157), rng.normal(0, 1.2, 90)
    one, two = kolmogorov_smirnov(x, stats.norm.cdf), same_distribution(x, y)
    ours, theirs = (one.statistic, one.p_value), stats.kstest(x, stats.norm.cdf, method="exact")
    assert ours == pytest.approx((theirs.statistic, theirs.pvalue), rel=1e-9)
    ours, theirs = (two.statistic, two.p_value), stats.ks_2samp(x, y, method="exact")
    assert ours == pytest.approx((theirs.statistic, theirs.pvalue), rel=1e-9)
    z = abs(x.mean()) * math.sqrt(157)
    assert mean_within(x, 0, 1).p_value == pytest.approx(2 * stats.norm.sf(z), rel=1e-9)


# ── wrong samplers ───────────────────────────────────────────────────────────────────────────────

LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -3.0, 1.9, 0.7])
DRAFT = softmax(LOGITS[::-1] * 0.6)
TOP_P = 0.8


def top_p(p: np.ndarray, extra: int = 0) -> np.ndarray:
    """The smallest set of values that reaches TOP_P, give or take `extra` values."""
    order = np.argsort(-p)
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), TOP_P)) + 1 + extra]
    out = np.zeros_like(p)
    out[kept] = p[kept]
    return out / out.sum()


def draw(p: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    return rng.choice(len(p), size=n, p=p)


def speculate(residual: Callable[[np.ndarray, np.random.Generator], int]):
    """Speculative sampling: a draft's value is kept with probability min(1, p/q), else replaced."""

    def sampler(n: int, rng: np.random.Generator) -> np.ndarray:
        p = softmax(LOGITS)
        drafted = draw(DRAFT, n, rng)
        keep = rng.uniform(size=n) < p[drafted] / DRAFT[drafted]
        replaced = [residual(p, rng) for _ in range(int((~keep).sum()))]
        drafted[~keep] = replaced
        return drafted

    return sampler


def of_residual(p: np.ndarray, rng: np.random.Generator) -> int:
    left = np.maximum(p - DRAFT, 0)
    return int(np.searchsorted(np.cumsum(left) / left.sum(), rng.uniform()))


def of_unnormalised_residual(p: np.ndarray, rng: np.random.Generator) -> int:
    return min(int(np.searchsorted(np.cumsum(np.maximum(p - DRAFT, 0)), rng.uniform())), len(p) - 1)


P, HOT, NUCLEUS = softmax(LOGITS), softmax(LOGITS / 0.7), top_p(softmax(LOGITS))
N = 5000

# name: (the distribution that is asked for, the wrong sampler)
WRONG = {
    "top-p keeps one value too many": (NUCLEUS, lambda n, r: draw(top_p(P, 1), n, r)),
    "top-p keeps one value too few": (NUCLEUS, lambda n, r: draw(top_p(P, -1), n, r)),
    "top-p is not renormalised: the rest goes to the last value": (
        NUCLEUS,
        lambda n, r: np.minimum(
            np.searchsorted(np.cumsum(np.where(NUCLEUS > 0, P, 0)), r.uniform(size=n)), 7
        ),
    ),
    "the temperature is applied twice": (HOT, lambda n, r: draw(softmax(LOGITS / 0.49), n, r)),
    "the temperature is multiplied": (HOT, lambda n, r: draw(softmax(LOGITS * 0.7), n, r)),
    "the likeliest value always": (P, lambda n, r: np.full(n, P.argmax())),
    "every value alike": (P, lambda n, r: r.integers(0, 8, n)),
    "the same seed for every draw": (
        P,
        lambda n, r: np.full(n, draw(P, 1, np.random.default_rng(0))),
    ),
    "the same seed for every 50 draws": (
        P,
        lambda n, r: np.tile(draw(P, 50, np.random.default_rng(0)), n // 50),
    ),
    "the residual is not normalised": (P, speculate(of_unnormalised_residual)),
    "after a rejection, p instead of the residual": (P, speculate(lambda p, r: int(draw(p, 1, r)[0]))),
    "the draft is always accepted": (P, lambda n, r: draw(DRAFT, n, r)),
    "an index off by one": (P, lambda n, r: (draw(P, n, r) + 1) % 8),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_sampler_is_rejected_against_its_distribution_and_against_a_right_one(name: str) -> None:
    p, sampler = WRONG[name]
    rng = np.random.default_rng(11)
    wrong = np.bincount(sampler(N, rng), minlength=8)
    right = np.bincount(draw(p, N, rng), minlength=8)
    assert chi_square(right, p)
    evidence = chi_square(wrong, p)
    assert not evidence.ok
    assert evidence.p_value < 1e-9
    assert not same_distribution(right, wrong, counts=True)


def test_right_speculative_sampling_passes() -> None:
    draws = speculate(of_residual)(N, np.random.default_rng(5))
    assert chi_square(np.bincount(draws, minlength=8), P)
    assert same_distribution(draws, draw(P, N, np.random.default_rng(6)))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("the variance as standard deviation", lambda r: r.normal(0, 0.25, 2000)),
        ("a uniform of the same mean and variance", lambda r: r.uniform(-0.5 * 3**0.5, 0.5 * 3**0.5, 2000)),
        ("always the same seed", lambda r: np.tile(np.random.default_rng(0).normal(0, 0.5, 20), 100)),
        ("the absolute value", lambda r: np.abs(r.normal(0, 0.5, 2000))),
    ],
)
def test_a_wrong_sampler_of_reals_is_rejected(name: str, wrong: Callable) -> None:
    right = stats.norm(0, 0.5)
    x = wrong(np.random.default_rng(1))
    good = right.rvs(2000, random_state=np.random.default_rng(2))
    assert kolmogorov_smirnov(good, right.cdf)
    assert not kolmogorov_smirnov(x, right.cdf), name
    assert same_distribution(good[:1000], good[1000:])
    assert not same_distribution(good, x), name


def test_dropout_that_does_not_scale_what_is_kept_has_the_wrong_mean() -> None:
    keep = np.random.default_rng(0).uniform(size=10_000) < 0.9
    std = math.sqrt(0.1 / 0.9)  # of keep / 0.9
    assert mean_within(keep / 0.9, 1.0, std)
    assert not mean_within(keep.astype(float), 1.0, std)
    assert mean_within(np.ones(3), 1.0, 0.0)
    assert not mean_within([1.0, 1.0, 1.1], 1.0, 0.0)


# ── how many draws ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("p", "q"),
    [
        ([0.5, 0.5], [0.4, 0.6]),
        (np.full(50, 0.02), np.linspace(0.01, 0.03, 50)),
        ([0.5, 0.3, 0.2, 0.0], [0.5, 0.3, 0.15, 0.05]),
        (P, softmax(LOGITS / 0.8)),
        ([0.999, 0.001], [0.99, 0.01]),
    ],
)
def test_the_wrong_distribution_is_missed_no_more_often_than_was_asked(p, q) -> None:
    n = samples_needed(p, q, false_alarm=1e-4, miss=0.05)
    rng, runs = np.random.default_rng(8), 1000

    def missed(draws: int) -> int:
        return sum(chi_square(x, p, 1e-4).ok for x in rng.multinomial(draws, q, size=runs))

    assert missed(n) <= stats.binom.isf(1e-4, runs, 0.05)
    assert missed(max(40, n // 8)) > 0.05 * runs  # and the number is not a wild one


def test_an_impossible_value_is_missed_only_if_it_never_comes() -> None:
    assert samples_needed([1.0, 0.0], [0.9, 0.1], miss=1e-6) == math.ceil(math.log(1e-6) / math.log(0.9))
    n = samples_needed([0.5, 0.5, 0.0], [0.475, 0.475, 0.05], miss=1e-3)
    assert n == pytest.approx(math.log(1e-3) / math.log(0.95), rel=0.1)
    assert samples_needed([1.0, 0.0], [0.0, 1.0]) == 1


def test_a_smaller_difference_or_fewer_misses_need_more_draws() -> None:
    p = [0.5, 0.5]
    far, near = samples_needed(p, [0.4, 0.6]), samples_needed(p, [0.45, 0.55])
    assert near / far == pytest.approx(4, rel=0.1)  # with the square of the difference
    assert samples_needed(p, [0.4, 0.6], miss=1e-9) > far > samples_needed(p, [0.4, 0.6], miss=0.5)


def test_equal_distributions_are_never_told_apart() -> None:
    for p in ([0.5, 0.5], [1.0, 0.0]):
        with pytest.raises(DistributionError, match="too alike"):
            samples_needed(p, p)


# ── what is said ─────────────────────────────────────────────────────────────────────────────────


def test_the_largest_deviation_is_named() -> None:
    p = np.array([0.25, 0.25, 0.25, 0.25])
    evidence = chi_square([2300, 2350, 2350, 3000], p)
    assert (evidence.worst.expected, evidence.worst.observed) == (2500, 3000)
    assert str(evidence).startswith(
        "10,000 draws do not have the distribution: value 3: 3,000, expected 2,500 (p ="
    )
    assert "\n" not in str(evidence)
    assert str(chi_square([2500, 2510, 2490, 2500], p)) == "10,000 draws agree with the distribution (p = 1)"


def test_one_draw_of_an_impossible_value_is_enough() -> None:
    evidence = chi_square([400, 599, 1], [0.4, 0.6, 0.0])
    assert (evidence.ok, evidence.p_value, evidence.statistic) == (False, 0.0, math.inf)
    assert "value 2, which cannot come: 1, expected 0" in str(evidence)
    assert "a right one cannot do this" in str(evidence)
    assert chi_square([400, 600, 0], [0.4, 0.6, 0.0])


def test_rare_values_are_named_together() -> None:
    p = np.array([0.99, *[0.001] * 10])
    evidence = chi_square([900, *[10] * 10], p)
    assert evidence.worst.where == "values 1, 2, 3, 7 more together"
    assert (evidence.worst.expected, evidence.worst.observed) == pytest.approx((10, 100))


def test_a_rare_value_that_comes_often_is_found_beside_a_sure_one() -> None:
    assert chi_square([1000, 0], [0.9999, 0.0001])
    assert chi_square([999, 1], [0.9999, 0.0001])
    assert not chi_square([980, 20], [0.9999, 0.0001])


def test_where_reals_and_values_of_two_samplers_differ_is_named() -> None:
    evidence = kolmogorov_smirnov(np.linspace(0, 0.5, 1000), stats.uniform.cdf)
    assert evidence.worst.where == "draws up to 0.5"
    assert (evidence.worst.expected, evidence.worst.observed) == (0.5, 1.0)
    evidence = same_distribution(["a"] * 500 + ["b"] * 500, ["a"] * 300 + ["b"] * 500)
    assert evidence.worst.where == "value a"
    evidence = same_distribution(np.linspace(0, 1, 999), np.linspace(0, 0.5, 999))
    assert (evidence.worst.expected, evidence.worst.observed) == pytest.approx((0.5, 1), abs=0.002)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_draw_that_is_not_finite_is_rejected(bad: float) -> None:
    x = np.append(np.random.default_rng(0).normal(size=1000), bad)
    for evidence in (
        kolmogorov_smirnov(x, stats.norm.cdf),
        mean_within(x, 0, 1),
        same_distribution(x[:-1], x),
    ):
        assert not evidence
        assert "not finite: 1, expected 0" in str(evidence)


def test_samplers_that_can_only_give_one_value_agree() -> None:
    assert chi_square([0, 3], [0.0, 1.0])
    assert same_distribution([4] * 3, [4] * 3)
    assert not chi_square([1, 3], [0.0, 1.0])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: chi_square([0, 0], [0.5, 0.5]), "no draws"),
        (lambda: chi_square([3, 4], [0.5, 0.5]), "7 draws cannot show"),
        (lambda: chi_square([30, 40], [0.5, 0.4]), "sum to 0.9"),
        (lambda: chi_square([30, 40], [1.5, -0.5]), "None may be negative"),
        (lambda: chi_square([0.3, 0.7], [0.5, 0.5]), "no counts"),
        (lambda: chi_square([-1, 40], [0.5, 0.5]), "no counts"),
        (lambda: chi_square([30, 40], [0.5, np.nan]), "probabilities from nan"),
        (lambda: chi_square([30, 40], [0.5, 0.5], 0.0), "false-alarm rate of 0"),
        (lambda: same_distribution([], [1]), "no draws"),
        (lambda: same_distribution([1, 2], [2, 3]), "2 and 2 draws cannot show"),
        (lambda: kolmogorov_smirnov([], stats.norm.cdf), "no draws"),
        (lambda: kolmogorov_smirnov([1.0, 2.0], lambda x: -x), "no cumulative"),
        (lambda: mean_within([1.0], 0.0, -1.0), "standard deviation of -1"),
        (lambda: Budget(1.0), "a budget of 1.0"),
        (lambda: Budget(0.1).share(0), "0 tests"),
    ],
)
def test_what_cannot_be_tested_is_refused_with_a_way_out(call: Callable, says: str) -> None:
    with pytest.raises(DistributionError) as caught:
        call()
    assert says in str(caught.value)
    assert "\n  Try " in str(caught.value)


def test_shapes_that_do_not_fit_are_refused() -> None:
    for call in (
        lambda: chi_square([1, 2, 3], [0.5, 0.5]),
        lambda: chi_square([[1, 2]], [0.5, 0.5]),
        lambda: chi_square([1], 1.0),
        lambda: same_distribution([1, 2], [1], counts=True),
        lambda: samples_needed([1.0], [0.5, 0.5]),
    ):
        with pytest.raises(ShapeError):
            call()


def test_importing_it_loads_neither_scipy_nor_torch() -> None:
    code = "import sys, llmcourse.grading.distribution; print({'scipy', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
