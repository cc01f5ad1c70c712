"""Exercise `accumulated_gradient`: the big batch's gradient from ragged pieces, one in memory at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

IGNORE = -100

accumulated_gradient = Exercise(
    "accumulated_gradient",
    title="A large batch in small pieces",
    arguments=("weight", "xs", "targets"),
    shapes=(
        "weight   float32 tensor [V, E]: logits of a row x are x @ weight.T",
        "xs       list of float32 tensors [n_i, E]: the rows of each micro-batch; n_i differ",
        "targets  list of int64 tensors [n_i]: the class of each row, −100 where nothing is asked",
        "returns  (loss, gradient): the mean cross-entropy over all asked rows of all pieces together, a",
        "         number, and its gradient with respect to weight [V, E]",
        "cost     kept for backward: no more than the largest piece needs alone (2·n·V numbers); no",
        "         intermediate of all rows together",
    ),
    formula="gradient = Σ_pieces ∇ Σ_asked CE / n,   n = asked rows of the whole batch",
    difficulty=2,
    importance=5,
    minutes=20,
    points=5,
    hints=(
        "A piece of 3 asked rows and a piece of 300: how much should each row of either weigh in the "
        "mean? What "
        "number do you have to know before the first piece goes backward?",
        "n = asked rows over all pieces, counted first. Each piece gives the *sum* of its losses (reduction="
        '"sum", ignore_index=-100) over n, goes backward at once, and its graph is gone before the next one '
        "is built. Gradients of several backward passes add up in .grad by themselves.",
        "w = weight.detach().clone().requires_grad_(); n = sum((t != -100).sum() for t in targets); loss "
        "= 0; "
        'for x, t in zip(xs, targets): piece = F.cross_entropy(x @ w.T, t, reduction="sum") / n; '
        "piece.backward(); loss += piece.item(); return loss, w.grad.",
    ),
)


def _draw(t: Trial, sizes: list[int], masked: float = 0.3, width: int = 5, classes: int = 7) -> Any:
    weight = tensor(t, classes, width)
    xs = [tensor(t, n, width) for n in sizes]
    targets = []
    for n in sizes:
        classes_of = t.integers(0, classes, n)
        hidden = t.rng.random(n) < masked
        hidden[:1] = False
        targets.append(torch.from_numpy(np.where(hidden, IGNORE, classes_of).astype(np.int64)))
    return weight, xs, targets


def expected(weight: Any, xs: Any, targets: Any) -> tuple[float, np.ndarray]:
    """The whole batch at once, in float64 and by the formula softmax − one-hot."""
    w = weight.double().numpy()
    x = np.concatenate([x.double().numpy() for x in xs])
    y = np.concatenate([y.numpy() for y in targets])
    x, y = x[y != IGNORE], y[y != IGNORE]
    z = x @ w.T
    z = z - z.max(1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    g = np.exp(log_p)
    g[np.arange(len(y)), y] -= 1
    return float(-log_p[np.arange(len(y)), y].mean()), g.T @ x / len(y)


def _agree(t: Trial, weight: Any, xs: Any, targets: Any) -> None:
    loss, gradient = t.pair(t.call(weight, xs, targets), 2, "(loss, gradient)")
    want = expected(weight, xs, targets)
    t.close(gradient, want[1], "the gradient", rtol=2e-5)
    t.close(loss, want[0], "the loss", rtol=2e-5)
    t.unchanged()


@accumulated_gradient.check("one piece alone: the gradient of its mean loss")
def alone(t: Trial) -> None:
    _agree(t, *_draw(t, [t.odd(5, 9)], masked=0.0))


@accumulated_gradient.check("pieces of one size: the gradient of all rows together")
def equal_pieces(t: Trial) -> None:
    n = t.odd(3, 7)
    _agree(t, *_draw(t, [n] * t.size(2, 4), masked=0.0))


@accumulated_gradient.check("pieces of unequal size: each row weighs the same")
def ragged(t: Trial) -> None:
    _agree(t, *_draw(t, [t.odd(9, 13), 1, t.size(3, 6)], masked=0.0))


@accumulated_gradient.check("rows at which nothing is asked do not count")
def masked(t: Trial) -> None:
    weight, xs, targets = _draw(t, [6, 6, 9], masked=0.3)
    targets[1][1:] = IGNORE
    _agree(t, weight, xs, targets)


@accumulated_gradient.check("a piece in which nothing is asked changes nothing")
def empty(t: Trial) -> None:
    weight, xs, targets = _draw(t, [5, 4, 7])
    targets[1][:] = IGNORE
    _agree(t, weight, xs, targets)
    targets[0][:] = IGNORE
    _agree(t, weight, xs, targets)


@accumulated_gradient.check("only one piece is in memory at a time")
def cost(t: Trial) -> None:
    weight, xs, targets = _draw(t, [32] * 6, width=8, classes=96)
    call = t.perform(weight, xs, targets, watch=("saved_bytes", "largest_intermediate"))
    piece = 4 * 32 * 96
    t.at_most(
        call.costs["saved_bytes"],
        2.5 * piece,
        f"bytes kept for backward at one time, with logits of {piece:,} bytes a piece",
        "backward() for each piece before the next one is computed: its graph goes with it.",
    )
    t.at_most(
        call.costs["largest_intermediate"],
        2 * piece,
        f"bytes of the largest intermediate, with logits of {piece:,} bytes a piece",
        "the pieces one after the other.",
    )
    _, gradient = t.pair(call.value, 2, "(loss, gradient)")
    t.close(gradient, expected(weight, xs, targets)[1], "the gradient", rtol=2e-5)


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def _leaf(weight: Any) -> Any:
    return weight.detach().clone().requires_grad_()


def _summed(x: Any, w: Any, y: Any) -> Any:
    return torch.nn.functional.cross_entropy(x @ w.T, y, reduction="sum")


def _asked(targets: Any) -> int:
    return int(sum((y != IGNORE).sum() for y in targets))


def _by(weight: Any, xs: Any, targets: Any, factor: Any) -> Any:
    """Pieces one after the other; `factor(i)` is what the sum of the losses of piece i is multiplied by."""
    w, loss = _leaf(weight), 0.0
    for i, (x, y) in enumerate(zip(xs, targets, strict=True)):
        piece = _summed(x, w, y) * factor(i)
        piece.backward()
        loss += piece.item()
    return loss, w.grad


@accumulated_gradient.mistake(
    says="each piece's mean is added: with k pieces the gradient is k times too large",
    tries='reduction="sum", divided by the asked rows of the whole batch.',
    caught_by="equal_pieces",
)
def sum_of_means(weight: Any, xs: Any, targets: Any) -> Any:
    return _by(weight, xs, targets, lambda i: 1 / max(1, _asked(targets[i : i + 1])))


@accumulated_gradient.mistake(
    says="it is the mean of the pieces' means: a row of a small piece weighs more",
    tries='reduction="sum", divided by the asked rows of the whole batch.',
    caught_by="ragged",
)
def mean_of_means(weight: Any, xs: Any, targets: Any) -> Any:
    return _by(weight, xs, targets, lambda i: 1 / max(1, _asked(targets[i : i + 1])) / len(xs))


@accumulated_gradient.mistake(
    says="all rows are counted, those at which nothing is asked too",
    tries="(targets != -100).sum() over all pieces.",
    caught_by="masked",
)
def counts_all(weight: Any, xs: Any, targets: Any) -> Any:
    n = sum(len(y) for y in targets)
    return _by(weight, xs, targets, lambda i: 1 / n)


@accumulated_gradient.mistake(
    says="each piece's mean over its asked rows is weighted by its share of all rows",
    tries="its share of the asked rows; or sums, and one division.",
    caught_by="masked",
)
def weighted_by_rows(weight: Any, xs: Any, targets: Any) -> Any:
    n = sum(len(y) for y in targets)
    return _by(weight, xs, targets, lambda i: len(targets[i]) / n / max(1, _asked(targets[i : i + 1])))


@accumulated_gradient.mistake(
    says="a piece in which nothing is asked gives 0 / 0, and its NaN spreads",
    tries="the sum of its losses, which is 0; or skipping it.",
    caught_by="empty",
)
def nan_piece(weight: Any, xs: Any, targets: Any) -> Any:
    w, loss, n = _leaf(weight), 0.0, _asked(targets)
    for x, y in zip(xs, targets, strict=True):
        piece = torch.nn.functional.cross_entropy(x @ w.T, y) * (_asked([y]) / n)
        piece.backward()
        loss += piece.item()
    return loss, w.grad


@accumulated_gradient.mistake(
    says="the gradient is cleared for each piece: only the last one's is left",
    tries="clearing once, before the first piece.",
    caught_by="equal_pieces",
)
def cleared(weight: Any, xs: Any, targets: Any) -> Any:
    w, loss, n = _leaf(weight), 0.0, _asked(targets)
    for x, y in zip(xs, targets, strict=True):
        w.grad = None
        piece = _summed(x, w, y) / n
        piece.backward()
        loss += piece.item()
    return loss, w.grad


@accumulated_gradient.mistake(
    says="the losses are summed and sent backward once: the graphs of all pieces are in memory together",
    tries="backward() for each piece, inside the loop.",
    caught_by="cost",
)
def backward_once(weight: Any, xs: Any, targets: Any) -> Any:
    w, n = _leaf(weight), _asked(targets)
    loss = sum(_summed(x, w, y) for x, y in zip(xs, targets, strict=True)) / n
    loss.backward()
    return loss.item(), w.grad


@accumulated_gradient.mistake(
    says="the pieces are joined, and the large batch is computed that was to be avoided",
    tries="one piece after the other.",
    caught_by="cost",
)
def joined(weight: Any, xs: Any, targets: Any) -> Any:
    w = _leaf(weight)
    loss = torch.nn.functional.cross_entropy(torch.cat(list(xs)) @ w.T, torch.cat(list(targets)))
    loss.backward()
    return loss.item(), w.grad


@accumulated_gradient.mistake(
    says="the gradient is right, but the loss is the last piece's part alone",
    tries="adding up piece.item().",
    caught_by="equal_pieces",
)
def last_loss(weight: Any, xs: Any, targets: Any) -> Any:
    w, n = _leaf(weight), _asked(targets)
    for x, y in zip(xs, targets, strict=True):
        piece = _summed(x, w, y) / n
        piece.backward()
    return piece.item(), w.grad


@accumulated_gradient.mistake(
    says="sums are never divided: loss and gradient grow with the batch",
    tries="/ n, the asked rows of the whole batch.",
    caught_by="alone",
)
def not_divided(weight: Any, xs: Any, targets: Any) -> Any:
    return _by(weight, xs, targets, lambda i: 1.0)


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@accumulated_gradient.alternative("sums everywhere, one division at the end")
def divided_last(weight: Any, xs: Any, targets: Any) -> Any:
    loss, gradient = _by(weight, xs, targets, lambda i: 1.0)
    n = _asked(targets)
    return loss / n, gradient / n


@accumulated_gradient.alternative(
    "means weighted by each piece's share of the asked rows, empty pieces skipped"
)
def weighted_means(weight: Any, xs: Any, targets: Any) -> Any:
    w, n = _leaf(weight), _asked(targets)
    loss = torch.zeros(())
    for x, y in zip(xs, targets, strict=True):
        if _asked([y]):
            piece = torch.nn.functional.cross_entropy(x @ w.T, y) * _asked([y]) / n
            (g,) = torch.autograd.grad(piece, w)
            w.grad = g if w.grad is None else w.grad + g
            loss = loss + piece.detach()
    return loss, w.grad


@accumulated_gradient.alternative("no autograd: softmax − one-hot, by hand")
def by_hand(weight: Any, xs: Any, targets: Any) -> Any:
    gradient, loss, n = torch.zeros_like(weight), 0.0, _asked(targets)
    for x, y in zip(xs, targets, strict=True):
        x, y = x[y != IGNORE], y[y != IGNORE]
        log_p = (x @ weight.T).log_softmax(-1)
        rows = torch.arange(len(y))
        loss -= log_p[rows, y].sum().item()
        p = log_p.exp()
        p[rows, y] -= 1
        gradient += p.T @ x
    return loss / n, gradient / n
