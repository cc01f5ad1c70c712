"""Random outputs, judged as distributions, with a stated false-alarm rate.

A sampler cannot be held against one right answer. It can be held against the distribution that its draws
should have; and since chance can make right draws look wrong, the test must say how often it will reject
a right sampler. Here that rate is an argument, 1e-6 unless told, and it is kept: with a class of 400, ten
such tests each and a new seed every time, one right answer in 250 classes is rejected.

    counts = np.bincount(draws, minlength=len(p))
    evidence = chi_square(counts, p)
    evidence.ok, str(evidence)     # 20,000 draws do not have the distribution: value 3: 812, expected 401.2 …
    samples_needed(p, wrong)       # draws with which `wrong` is rejected all but once in a million times

The rates are kept: `likelihood_ratio` says how, and why Pearson's familiar statistic would not do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from llmcourse.errors import ShapeError
from llmcourse.grading.evidence import Budget, Deviation, DistributionError, Evidence, rate
from llmcourse.grading.likelihood_ratio import (
    LEAST,
    one_sample,
    pooled,
    pools,
    surely_found,
    terms,
    two_samples,
)

__all__ = [
    "Budget",
    "Deviation",
    "DistributionError",
    "Evidence",
    "chi_square",
    "kolmogorov_smirnov",
    "mean_within",
    "same_distribution",
    "samples_needed",
]

FALSE_ALARM = 1e-6


def chi_square(counts: Any, probabilities: Any, false_alarm: float = FALSE_ALARM) -> Evidence:
    """Whether values came as often as their probabilities say.

    Shapes   counts [V], how often each value was drawn; probabilities [V], which sum to 1
    Returns  Evidence whose statistic is G. Values expected less than 20 times are pooled with others as
             rare, chosen by their probabilities alone. A rest of values that are rare even together is
             tested by its binomial distribution; then each of both tests has half of the rate. A draw of a
             value of probability 0 is a rejection by itself.
    Raises   ShapeError, DistributionError
    """
    observed, p = _counts(counts, "counts"), _probabilities(probabilities)
    rate(false_alarm)
    _same_length(observed, p, "counts", "probabilities")
    n = int(observed.sum())
    if n == 0:
        raise _no_draws()
    impossible = (p == 0) & (observed > 0)
    if impossible.any():
        value = int(np.argmax(np.where(impossible, observed, 0)))
        worst = Deviation(f"value {value}, which cannot come", 0.0, float(observed[value]))
        return Evidence(0.0, false_alarm, math.inf, n, worst)
    if np.count_nonzero(p) == 1:
        value = int(np.argmax(p))
        return Evidence(1.0, false_alarm, 0.0, n, Deviation(f"value {value}", float(n), float(n)))
    numbers = pools(n * p)
    found, expected = pooled(observed, numbers), n * pooled(p, numbers)
    if len(found) == 1:
        raise DistributionError(
            f"{n} draws cannot show how {np.count_nonzero(p)} values are distributed.",
            f"A value, or several pooled, must be expected {LEAST:.0f} times, and others beside it.",
            f"{2 * LEAST:.0f} draws at least; samples_needed(p, wrong) says how many are enough.",
        )
    g = terms(found, expected)
    worst = _deviation(int((g / 2 - found + expected).argmax()), found, expected, numbers, np.arange(len(p)))
    return Evidence(one_sample(found, expected), false_alarm, float(g.sum()), n, worst)


def same_distribution(a: Any, b: Any, false_alarm: float = FALSE_ALARM, *, counts: bool = False) -> Evidence:
    """Whether two sets of draws come from one distribution, whichever it is.

    a, b      draws. Integers (or text) are values, compared by how often each came: the two-sample form
              of `chi_square`. Floats are compared by their cumulative distributions (Smirnov's largest
              gap, which is the statistic; ties make it less sensitive, never more).
    counts    a and b [V] are not draws but how often each of V values came

    Returns  Evidence; `worst` compares b with what a leads one to expect.
    Raises   ShapeError, DistributionError
    """
    rate(false_alarm)
    if counts:
        first, second = _counts(a, "a"), _counts(b, "b")
        _same_length(first, second, "a", "b")
        return _two_counts(first, second, np.arange(len(first)), false_alarm)
    x, y = np.asarray(a).ravel(), np.asarray(b).ravel()
    if not len(x) or not len(y):
        raise _no_draws()
    if x.dtype.kind != "f" and y.dtype.kind != "f":
        values, which = np.unique(np.concatenate([x, y]), return_inverse=True)
        first = np.bincount(which[: len(x)], minlength=len(values)).astype(float)
        second = np.bincount(which[len(x) :], minlength=len(values)).astype(float)
        return _two_counts(first, second, values, false_alarm)
    return _two_reals(np.asarray(x, np.float64), np.asarray(y, np.float64), false_alarm)


def kolmogorov_smirnov(
    samples: Any, cdf: Callable[[np.ndarray], Any], false_alarm: float = FALSE_ALARM
) -> Evidence:
    """Whether real draws follow a continuous distribution.

    samples   draws, of any shape
    cdf       F(x) = P(draw ≤ x) of a sorted array; for instance `scipy.stats.norm.cdf`

    Returns  Evidence whose statistic is the largest gap between F and the draws' own cumulative
             distribution; exact for every number of draws. A draw that is not finite is a rejection.
    Raises   DistributionError
    """
    from scipy.stats import kstwo

    rate(false_alarm)
    x = np.sort(np.asarray(samples, np.float64).ravel())
    n = len(x)
    if n == 0:
        raise _no_draws()
    if (broken := _not_finite(x, false_alarm)) is not None:
        return broken
    f = np.asarray(cdf(x), np.float64)
    if f.shape != x.shape or not ((f >= 0) & (f <= 1)).all() or (np.diff(f) < -1e-12).any():
        raise DistributionError(
            "cdf(x) is no cumulative distribution on these draws.",
            "For a sorted x it gives one number each, from 0 to 1, never falling.",
            "scipy.stats.norm(mean, std).cdf.",
        )
    above, below = np.arange(1, n + 1) / n - f, f - np.arange(n) / n
    i, j = int(above.argmax()), int(below.argmax())
    if above[i] >= below[j]:
        gap, worst = above[i], Deviation(f"draws up to {x[i]:.4g}", f[i], (i + 1) / n)
    else:
        gap, worst = below[j], Deviation(f"draws below {x[j]:.4g}", f[j], j / n)
    return Evidence(float(kstwo.sf(gap, n)), false_alarm, float(gap), n, worst)


def mean_within(samples: Any, mean: float, std: float, false_alarm: float = FALSE_ALARM) -> Evidence:
    """Whether the mean of draws is the one it should be, given the standard deviation of one draw.

    samples      draws, of any shape
    mean, std    of the right distribution: known, not estimated from the draws

    Returns  Evidence whose statistic is |z|, the distance in standard errors std/√n. The rate is exact for
             normal draws. For others it is as stated once n is well above (skewness · z³ / 6)²: 1,500 for
             exponential draws at 1e-6. With std = 0 every draw must be the mean.
    Raises   DistributionError
    """
    rate(false_alarm)
    x = np.asarray(samples, np.float64).ravel()
    n = len(x)
    if n == 0:
        raise _no_draws()
    if not (math.isfinite(mean) and math.isfinite(std) and std >= 0):
        raise DistributionError(
            f"a mean of {mean} with a standard deviation of {std}.",
            "Both are finite, and a standard deviation is 0 or more.",
            "the moments of the right distribution.",
        )
    if (broken := _not_finite(x, false_alarm)) is not None:
        return broken
    found = float(x.mean())
    worst = Deviation("the mean", float(mean), found)
    if std == 0:
        right = bool((x == mean).all())
        return Evidence(float(right), false_alarm, 0.0 if right else math.inf, n, worst)
    z = abs(found - mean) / (std / math.sqrt(n))
    return Evidence(math.erfc(z / math.sqrt(2)), false_alarm, z, n, worst)


def samples_needed(p: Any, q: Any, false_alarm: float = FALSE_ALARM, miss: float = FALSE_ALARM) -> int:
    """How many draws let `chi_square(counts, p, false_alarm)` reject a sampler of `q` all but `miss` often.

    Shapes   p, q [V] probabilities: the right ones, and those of the wrong sampler
    Returns  a number that is enough, whatever the counts: it comes from a bound, not an estimate. With
             many values the test often needs a fraction of it.
    Raises   ShapeError, DistributionError (also if p and q are too alike to be told apart)
    """
    right, wrong = _probabilities(p), _probabilities(q)
    _same_length(right, wrong, "p", "q")
    rate(false_alarm), rate(miss, "a rate of misses")
    if np.count_nonzero(right) == 1:  # any other value is a rejection by itself
        other = 1 - float(wrong[right > 0].sum())
        if other <= 1e-12:
            raise _alike()
        return max(1, math.ceil(math.log(miss) / math.log1p(-other))) if other < 1 else 1
    n = int(2 * LEAST)
    while not surely_found(n, right, wrong, false_alarm, miss):
        n *= 2
        if n > 10**12:
            raise _alike()
    low = n // 2
    while n - low > max(1, n // 1000):
        middle = (low + n) // 2
        low, n = (low, middle) if surely_found(middle, right, wrong, false_alarm, miss) else (middle, n)
    return n


def _two_counts(a: np.ndarray, b: np.ndarray, names: np.ndarray, false_alarm: float) -> Evidence:
    n, m = a.sum(), b.sum()
    if not n or not m:
        raise _no_draws()
    draws, columns = int(n + m), a + b
    if np.count_nonzero(columns) == 1:
        value = names[int(np.argmax(columns))]
        return Evidence(1.0, false_alarm, 0.0, draws, Deviation(f"value {value}", float(m), float(m)))
    numbers = pools(columns * min(n, m) / draws)
    first, second = pooled(a, numbers), pooled(b, numbers)
    if len(first) == 1:
        raise DistributionError(
            f"{int(n)} and {int(m)} draws cannot show whether two samplers agree.",
            f"Both must be expected to give a value, or several pooled, {LEAST:.0f} times, and others too.",
            "many more draws of both.",
        )
    columns = first + second
    g = terms(first, columns * n / draws) + terms(second, columns * m / draws)
    worst = _deviation(int(g.argmax()), second, columns * m / draws, numbers, names)
    return Evidence(two_samples(first, second), false_alarm, float(g.sum()), draws, worst)


def _deviation(
    pool: int, found: np.ndarray, expected: np.ndarray, numbers: np.ndarray, names: np.ndarray
) -> Deviation:
    called = [str(name) for name in names[numbers == pool]]
    if len(called) > 4:
        called = [*called[:3], f"{len(called) - 3} more"]
    where = f"value {called[0]}" if len(called) == 1 else f"values {', '.join(called)} together"
    return Deviation(where, float(expected[pool]), float(found[pool]))


def _two_reals(x: np.ndarray, y: np.ndarray, false_alarm: float) -> Evidence:
    from scipy.stats import ks_2samp

    for sample in (x, y):
        if (broken := _not_finite(sample, false_alarm)) is not None:
            return broken
    found = ks_2samp(x, y)  # exact up to 10,000 draws
    where = float(found.statistic_location)
    worst = Deviation(f"draws up to {where:.4g}", float((x <= where).mean()), float((y <= where).mean()))
    return Evidence(float(found.pvalue), false_alarm, float(found.statistic), len(x) + len(y), worst)


# ── what can be given ────────────────────────────────────────────────────────────────────────────


def _not_finite(samples: np.ndarray, false_alarm: float) -> Evidence | None:
    broken = ~np.isfinite(samples)
    if not broken.any():
        return None
    worst = Deviation("draws that are not finite", 0.0, float(broken.sum()))
    return Evidence(0.0, false_alarm, math.inf, len(samples), worst)


def _counts(values: Any, name: str) -> np.ndarray:
    counts = np.asarray(values, np.float64)
    if counts.ndim != 1:
        raise ShapeError(
            f"{name} has shape {list(counts.shape)}.",
            "Counts are one number for each value.",
            "np.bincount(draws.ravel(), minlength=V).",
        )
    if not ((counts >= 0) & (counts == np.floor(counts)) & np.isfinite(counts)).all():
        raise DistributionError(
            f"{name} holds numbers that are no counts.",
            "How often a value came is a whole number, 0 or more.",
            "np.bincount(draws, minlength=V), not frequencies.",
        )
    return counts


def _probabilities(values: Any) -> np.ndarray:
    p = np.asarray(values, np.float64)
    if p.ndim != 1 or not p.size:
        raise ShapeError(
            f"probabilities of shape {list(p.shape)}.",
            "There is one for each value.",
            "the distribution of one draw, [V].",
        )
    if not (np.isfinite(p) & (p >= 0)).all() or abs(p.sum() - 1) > 1e-5:
        raise DistributionError(
            f"probabilities from {p.min():.4g} to {p.max():.4g} that sum to {p.sum():.8g}.",
            "None may be negative, and together they are 1.",
            "p / p.sum(), computed in float64.",
        )
    return p / p.sum()


def _same_length(a: np.ndarray, b: np.ndarray, first: str, second: str) -> None:
    if len(a) != len(b):
        raise ShapeError(
            f"{first} has {len(a)} values and {second} has {len(b)}.",
            "Both are about the same values, in the same order.",
            "np.bincount(draws, minlength=V).",
        )


def _no_draws() -> DistributionError:
    return DistributionError("no draws.", "Nothing can be judged.", "samples_needed(p, wrong) draws.")


def _alike() -> DistributionError:
    return DistributionError(
        "p and q are too alike to be told apart.",
        "More than a million million draws would be needed.",
        "a wrong distribution that differs more, or one that is not equal to p.",
    )
