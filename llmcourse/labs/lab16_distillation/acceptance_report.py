"""Exercise `acceptance_report`: what a draft's guesses are worth, from the target's own text."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial

acceptance_report = Exercise(
    "acceptance_report",
    title="The acceptance-rate report",
    arguments=("p", "q", "tokens", "length"),
    shapes=(
        "p        float64 array [S, V]: the target's probabilities at S places of a text that it wrote",
        "q        float64 array [S, V]: the draft's, at the same places",
        "tokens   int64 array [S]: the token that the target wrote at each place",
        "length   γ ≥ 1, int: tokens that the draft guesses before each check",
        "returns  (rate, accepted, tokens_per_pass): the mean chance that a guess is accepted, a float; the",
        "chance [S] that the written token would have been accepted as a guess; and S divided by the",
        "         expected number of passes of the target in which the text is written, a float",
    ),
    formula="rate = mean over places of Σ_v min(p_v, q_v);   accepted_i = min(1, q_i[x_i] / p_i[x_i]);   "
    "passes = Σ_i P(a pass begins at place i)",
    difficulty=4,
    importance=4,
    minutes=40,
    points=6,
    hints=(
        "A guess x, drawn from q, is accepted with probability min(1, p/q). How likely is it, over all "
        "guesses, that one is accepted? And given that the target wrote x, how likely is it that x was an "
        "accepted guess rather than the correction of a rejected one?",
        "Σ q·min(1, p/q) = Σ min(p, q). Of the probability p(x) that x is written, min(p(x), q(x)) comes "
        "from accepted guesses. For the passes: the first begins at place 0. From a pass that begins at i, "
        "the next begins at j + 1 if guesses i … j − 1 pass and j fails (j's token is the correction), and "
        "at i + γ + 1 if all γ pass (one token is written without a guess). So the chance that a pass "
        "begins at a place follows from the places before it. Guesses and passes beyond the end of the text "
        "do not count.",
        "begins = [1, 0, 0, …]; for i in range(S): reach = begins[i]; for j in range(i, min(i + length, "
        "S)): if j + 1 < S: begins[j + 1] += reach * (1 - accepted[j]); reach *= accepted[j]; and after the "
        "inner loop, if i + length + 1 < S: begins[i + length + 1] += reach. tokens_per_pass = S / "
        "sum(begins).",
    ),
)


def passes(accepted: np.ndarray, length: int) -> float:
    """Expected passes from place i to the end, backward: another way than the forward one of the hints."""
    count = len(accepted)
    left = np.zeros(count + length + 2)
    for i in range(count - 1, -1, -1):
        total, reach = 1.0, 1.0
        for j in range(i, min(i + length, count)):
            total += reach * (1 - accepted[j]) * left[j + 1]
            reach *= accepted[j]
        left[i] = total + (reach * left[i + length + 1] if i + length <= count else 0.0)
    return float(left[0])


def expected(*given: Any) -> tuple[float, np.ndarray, float]:
    p, q, tokens, length = given
    rows = np.arange(len(tokens))
    accepted = np.minimum(1, q[rows, tokens] / p[rows, tokens])
    return float(np.minimum(p, q).sum(1).mean()), accepted, len(tokens) / passes(accepted, length)


def _softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _draw(t: Trial, places: int, classes: int, apart: float = 1.0) -> list[np.ndarray]:
    """A target, a draft at some distance, and what the target wrote."""
    base = t.normal(places, classes, scale=1.2)
    p, q = _softmax(base), _softmax(base + t.normal(places, classes, scale=apart))
    tokens = np.array([t.rng.choice(classes, p=row) for row in p], dtype=np.int64)
    return [p, q, tokens]


def _judge(t: Trial, given: Any, length: int) -> None:
    found = t.pair(t.call(*given, length), 3, "(rate, accepted, tokens_per_pass)")
    want = expected(*given, length)
    for got, right, what in zip(found, want, ("rate", "accepted", "tokens_per_pass"), strict=True):
        t.close(got, np.asarray(right), what, rtol=1e-9)
    t.unchanged()


def _greedy(t: Trial, right: list[int]) -> list[np.ndarray]:
    """Both models certain; `right[i]` says whether they agree at place i."""
    tokens = t.integers(0, 5, len(right)).astype(np.int64)
    p = np.eye(5)[tokens]
    q = np.eye(5)[(tokens + 1 - np.array(right)) % 5]
    return [p, q, tokens]


@acceptance_report.check("one place: the overlap of the two distributions, and one pass")
def one(t: Trial) -> None:
    order = t.rng.permutation(3)
    p, q = (np.array([row])[:, order] for row in ([0.5, 0.3, 0.2], [0.25, 0.6, 0.15]))
    written = np.flatnonzero(order == 1).astype(
        np.int64
    )  # a token of which the draft is surer than the target
    _judge(t, [p, q, written], t.size(1, 3))


@acceptance_report.check("the rate is the mean overlap over places; each written token has its own chance")
def rate(t: Trial) -> None:
    _judge(t, _draw(t, t.odd(9, 15), t.odd(5, 9)), 1)


@acceptance_report.check("a draft that is the target writes γ + 1 tokens a pass")
def perfect(t: Trial) -> None:
    for length in (1, 3, 4):
        _judge(t, _greedy(t, [1] * (length + 1) * 3), length)
        p, _, tokens = _draw(t, 4 * (length + 1), 5)
        _judge(t, [p, p.copy(), tokens], length)


@acceptance_report.check("a draft that is never right costs one pass a token")
def useless(t: Trial) -> None:
    _judge(t, _greedy(t, [0] * t.odd(5, 9)), t.size(1, 4))


@acceptance_report.check("greedy models: guesses pass in runs, and a run longer than γ is cut")
def runs(t: Trial) -> None:
    for length in (1, 2, 3, 5):
        _judge(t, _greedy(t, [int(x) for x in t.rng.random(17) < 0.7]), length)
    _judge(t, _greedy(t, [1, 1, 1, 0, 1, 0, 0, 1, 1, 1, 1, 1]), 2)


@acceptance_report.check("drafts of several tokens: passes begin where the chances say")
def drafts(t: Trial) -> None:
    for length in (2, 3, 5):
        _judge(t, _draw(t, t.odd(11, 19), t.odd(5, 9)), length)


@acceptance_report.check("a draft longer than the text")
def long_draft(t: Trial) -> None:
    _judge(t, _draw(t, t.odd(3, 5), 5, apart=0.3), 8)


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def _rate(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.minimum(p, q).sum(1).mean())


def _accepted(p: np.ndarray, q: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    rows = np.arange(len(tokens))
    return np.minimum(1, q[rows, tokens] / p[rows, tokens])


def _forward(accepted: np.ndarray, length: int, bonus: int = 1, corrected: int = 1) -> float:
    count = len(accepted)
    begins = np.zeros(count + length + 2)
    begins[0] = 1
    for i in range(count):
        reach = begins[i]
        for j in range(i, min(i + length, count)):
            if j + corrected > i:
                begins[j + corrected] += reach * (1 - accepted[j])
            else:
                begins[i + 1] += reach * (1 - accepted[j])
            reach *= accepted[j]
        if i + length + bonus <= count:
            begins[i + length + bonus] += reach
    return float(begins[:count].sum())


def _report(p: Any, q: Any, tokens: Any, length: int, count: Any = None) -> Any:
    accepted = _accepted(p, q, tokens)
    return _rate(p, q), accepted, len(tokens) / (count or _forward)(accepted, length)


@acceptance_report.mistake(
    says="the chance of a written token is min(1, p/q), which is the draft's side: that of a *guessed* token",
    tries="q over p: the share of p(x) that came from accepted guesses.",
    caught_by="one",
)
def other_side(p: Any, q: Any, tokens: Any, length: int) -> Any:
    rows = np.arange(len(tokens))
    accepted = np.minimum(1, p[rows, tokens] / np.maximum(q[rows, tokens], 1e-300))
    return _rate(p, q), accepted, len(tokens) / _forward(accepted, length)


@acceptance_report.mistake(
    says="the rate is how often both models like the same token best, which is greedy decoding's",
    tries="Σ min(p, q) over the vocabulary, averaged over places.",
    caught_by="one",
)
def same_best(p: Any, q: Any, tokens: Any, length: int) -> Any:
    return float((p.argmax(1) == q.argmax(1)).mean()), *_report(p, q, tokens, length)[1:]


@acceptance_report.mistake(
    says="the rate is the draft's probability of the written token",
    tries="Σ min(p, q) over the vocabulary, averaged over places.",
    caught_by="one",
)
def likelihood(p: Any, q: Any, tokens: Any, length: int) -> Any:
    return float(q[np.arange(len(tokens)), tokens].mean()), *_report(p, q, tokens, length)[1:]


@acceptance_report.mistake(
    says="the rate is the mean chance of the written tokens: right on average over texts, and noisier than "
    "the overlap, which is asked for",
    tries="Σ min(p, q) over the vocabulary, averaged over places.",
    caught_by="one",
)
def sampled_rate(p: Any, q: Any, tokens: Any, length: int) -> Any:
    _, accepted, per_pass = _report(p, q, tokens, length)
    return float(accepted.mean()), accepted, per_pass


@acceptance_report.mistake(
    says="chances above 1: q/p is not cut off where the draft is surer than the target",
    tries="np.minimum(1, q / p).",
    caught_by="one",
)
def not_cut(p: Any, q: Any, tokens: Any, length: int) -> Any:
    rows = np.arange(len(tokens))
    return _rate(p, q), q[rows, tokens] / p[rows, tokens], _report(p, q, tokens, length)[2]


@acceptance_report.mistake(
    says="the formula for places that accept independently is used; here it is known how each one does",
    tries="the chance that a pass begins at each place, from those of the places before it.",
    caught_by="one",
)
def formula(p: Any, q: Any, tokens: Any, length: int) -> Any:
    rate, accepted, _ = _report(p, q, tokens, length)
    return rate, accepted, float(sum(rate**k for k in range(length + 1)))


@acceptance_report.mistake(
    says="a pass in which all guesses pass writes one token more, and it is forgotten",
    tries="the next pass begins at i + length + 1: the target's own token comes for nothing.",
    caught_by="rate",
)
def no_bonus(p: Any, q: Any, tokens: Any, length: int) -> Any:
    return _report(p, q, tokens, length, lambda a, n: _forward(a, n, bonus=0))


@acceptance_report.mistake(
    says="the draft's length is not looked at: a pass goes on until a guess fails",
    tries="at most `length` guesses a pass.",
    caught_by="rate",
)
def endless(p: Any, q: Any, tokens: Any, length: int) -> Any:
    return _report(p, q, tokens, length, lambda a, n: _forward(a, len(a)))


@acceptance_report.mistake(
    says="after a failed guess the next pass begins at that place again: the correction is written, so it "
    "begins behind it",
    tries="place j + 1 after a failure at j.",
    caught_by="runs",
)
def again(p: Any, q: Any, tokens: Any, length: int) -> Any:
    return _report(p, q, tokens, length, lambda a, n: _forward(a, n, corrected=0))


@acceptance_report.mistake(
    says="passes that would begin behind the end of the text are counted",
    tries="places below S only.",
    caught_by="one",
)
def beyond(p: Any, q: Any, tokens: Any, length: int) -> Any:
    return _report(p, q, tokens, length, lambda a, n: _forward(a, n) + 1)


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@acceptance_report.alternative("forward: the chance that a pass begins at each place")
def forward(p: Any, q: Any, tokens: Any, length: int) -> Any:
    return _report(p, q, tokens, length)


@acceptance_report.alternative("backward: expected passes from each place to the end")
def backward(p: Any, q: Any, tokens: Any, length: int) -> Any:
    return expected(p, q, tokens, length)


@acceptance_report.alternative("the recursion itself, remembered")
def recursive(p: Any, q: Any, tokens: Any, length: int) -> Any:
    from functools import cache

    accepted = _accepted(p, q, tokens)
    count = len(accepted)

    @cache
    def left(i: int) -> float:
        if i >= count:
            return 0.0
        total, reach = 1.0, 1.0
        for j in range(i, min(i + length, count)):
            total += reach * (1 - accepted[j]) * left(j + 1)
            reach *= accepted[j]
        return float(total + reach * left(i + length + 1))

    return _rate(p, q), accepted, count / left(0)
