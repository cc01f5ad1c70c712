"""Exercise `linear_kl_gradients`: a distillation step without the logits of all tokens in memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

linear_kl_gradients = Exercise(
    "linear_kl_gradients",
    title="A training step in small pieces",
    arguments=("x", "weight", "teacher_x", "teacher_weight", "rows"),
    shapes=(
        "x               float32 tensor [N, E]: the student's last features; its logits are x @ weight.T",
        "weight          float32 tensor [V, E]: the student's head",
        "teacher_x       float32 tensor [N, D] and teacher_weight [V, D]: the same of the teacher",
        "rows            int ≥ 1: tokens whose logits may be in memory at once; it need not divide N",
        "returns         (loss, grad_x, grad_weight): the mean over N tokens of KL(teacher ‖ student), a",
        "                tensor of no dimension, and its gradients [N, E] and [V, E]",
        "cost            no intermediate has more than rows·V numbers (or those of an argument), and nothing",
        "                is kept for backward: the gradients are made on the way",
    ),
    formula="∂loss/∂logits = (q − p) / N;   grad_x = (q − p) @ weight / N,   grad_weight = (q − p)ᵀ @ x / N",
    difficulty=3,
    importance=4,
    minutes=35,
    points=6,
    hints=(
        "A token's KL and the gradient in its logits need that token's row of logits alone. What of a piece "
        "of rows has to survive when the next piece begins?",
        "Loop over slices of `rows` tokens. In each: two products for the logits, two log_softmax; add the "
        "sum of p·(log p − log q) to the loss; g = (q − p) / N; write g @ weight into the slice of grad_x, "
        "and add g.T @ x[slice] to grad_weight. N is the number of all tokens, not of the slice's.",
        "grad_x, grad_weight, loss = torch.empty_like(x), torch.zeros_like(weight), x.new_zeros(()); for i "
        "in range(0, len(x), rows): part = slice(i, i + rows); log_q = (x[part] @ "
        "weight.T).log_softmax(-1); log_p = (teacher_x[part] @ teacher_weight.T).log_softmax(-1); …; return "
        "loss / len(x), grad_x, grad_weight.",
    ),
)


def expected(x: Any, weight: Any, teacher_x: Any, teacher_weight: Any) -> tuple[np.ndarray, ...]:
    """All tokens at once, in float64, by q − p."""
    a, w, b, u = (t.double().numpy() for t in (x, weight, teacher_x, teacher_weight))

    def log_softmax(z: np.ndarray) -> np.ndarray:
        z = z - z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    log_q, log_p = log_softmax(a @ w.T), log_softmax(b @ u.T)
    p, q = np.exp(log_p), np.exp(log_q)
    g = (q - p) / len(a)
    return (p * (log_p - log_q)).sum() / len(a), g @ w, g.T @ a


def _draw(t: Trial, tokens: int, classes: int, scale: float = 1.0) -> Any:
    width, teachers = t.odd(3, 7), t.size(8, 12)
    return [
        tensor(t, tokens, width, scale=scale),
        tensor(t, classes, width),
        tensor(t, tokens, teachers, scale=scale),
        tensor(t, classes, teachers, scale=0.6),
    ]


def _judge(t: Trial, given: Any, value: Any) -> None:
    loss, grad_x, grad_weight = t.pair(value, 3, "(loss, grad_x, grad_weight)")
    want = expected(*given)
    t.close(loss, want[0], "the loss", rtol=2e-5, atol=1e-6)
    t.close(grad_x, want[1], "grad_x", rtol=1e-4, atol=1e-6)
    t.close(grad_weight, want[2], "grad_weight", rtol=1e-4, atol=1e-6)


@linear_kl_gradients.check("one piece holds all tokens: the loss and both gradients")
def one_piece(t: Trial) -> None:
    given = _draw(t, t.odd(5, 9), t.odd(7, 13))
    _judge(t, given, t.call(*given, 16))
    t.unchanged()


@linear_kl_gradients.check("pieces of one token")
def single(t: Trial) -> None:
    given = _draw(t, t.odd(5, 9), t.odd(7, 13))
    _judge(t, given, t.call(*given, 1))


@linear_kl_gradients.check("the last piece is smaller: every token weighs the same")
def ragged(t: Trial) -> None:
    given = _draw(t, 11, t.odd(7, 13))
    for rows in (4, 3, 10):
        _judge(t, given, t.call(*given, rows))
    t.unchanged()


@linear_kl_gradients.check("a student that says what the teacher says has nothing to learn")
def agreed(t: Trial) -> None:
    x, weight, _, _ = _draw(t, 7, 9)
    loss, grad_x, grad_weight = t.pair(
        t.call(x, weight, x.clone(), weight.clone(), 3), 3, "(loss, grad_x, grad_weight)"
    )
    for got, want, what in (
        (loss, np.zeros(()), "the loss"),
        (grad_x, np.zeros(x.shape), "grad_x"),
        (grad_weight, np.zeros(weight.shape), "grad_weight"),
    ):
        t.close(got, want, what, rtol=1e-5, atol=1e-5)


@linear_kl_gradients.check("logits of some hundred give finite numbers")
def extreme(t: Trial) -> None:
    given = _draw(t, 6, 9, scale=60.0)
    _judge(t, given, t.call(*given, 4))


@linear_kl_gradients.check("the logits of no more than `rows` tokens are in memory")
def cost(t: Trial) -> None:
    tokens, classes, rows = 96, 257, 8
    given = _draw(t, tokens, classes)
    call = t.perform(*given, rows, watch=("largest_intermediate", "saved_bytes"))
    _judge(t, given, call.value)
    piece = 4 * rows * classes
    t.at_most(
        call.costs["largest_intermediate"],
        max(piece, 4 * classes * max(w.shape[1] for w in given)),
        f"bytes of the largest intermediate (logits of {rows} tokens: {piece:,}; of all {tokens}: "
        f"{4 * tokens * classes:,})",
        "products of slices of x and teacher_x, one piece after the other.",
    )
    t.at_most(
        call.costs["peak_bytes"],
        10 * piece + 3 * sum(w.nbytes for w in given),
        f"bytes alive at one time (logits of {rows} tokens: {piece:,})",
        "nothing of a piece in a list: add it to the gradients and let it go.",
    )


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def _step(
    x: Any,
    weight: Any,
    teacher_x: Any,
    teacher_weight: Any,
    rows: int,
    *,
    by: Any = None,
    of: Any = None,
    add: bool = True,
    count: Any = None,
) -> Any:
    """The right loop, with places to go wrong: `by(p, q)` the gradient in logits, `of(log_p, log_q)` the "
    "loss."""
    n = len(x) if count is None else count
    grad_x, grad_weight, loss = torch.zeros_like(x), torch.zeros_like(weight), x.new_zeros(())
    for i in range(0, len(x), rows):
        part = slice(i, i + rows)
        log_q = (x[part] @ weight.T).log_softmax(-1)
        log_p = (teacher_x[part] @ teacher_weight.T).log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        loss = loss + (of(log_p, log_q) if of else (p * (log_p - log_q)).sum()) / n
        g = (by(p, q) if by else q - p) / n
        grad_x[part] = g @ weight
        grad_weight = grad_weight + g.T @ x[part] if add else g.T @ x[part]
    return loss, grad_x, grad_weight


def _backward(x: Any, weight: Any, teacher_x: Any, teacher_weight: Any) -> Any:
    a, w = (t.detach().clone().requires_grad_() for t in (x, weight))
    log_q = (a @ w.T).log_softmax(-1)
    log_p = (teacher_x @ teacher_weight.T).log_softmax(-1)
    loss = (log_p.exp() * (log_p - log_q)).sum() / len(x)
    loss.backward()
    return loss.detach(), a.grad, w.grad


@linear_kl_gradients.mistake(
    says="the gradient has the wrong sign: p − q goes uphill",
    tries="q − p, the student's less the teacher's.",
    caught_by="one_piece",
)
def uphill(x: Any, weight: Any, teacher_x: Any, teacher_weight: Any, rows: int) -> Any:
    return _step(x, weight, teacher_x, teacher_weight, rows, by=lambda p, q: p - q)


@linear_kl_gradients.mistake(
    says="loss and gradients are summed over the tokens and never divided by N",
    tries="/ len(x), the number of all tokens.",
    caught_by="one_piece",
)
def not_divided(x: Any, weight: Any, teacher_x: Any, teacher_weight: Any, rows: int) -> Any:
    return _step(x, weight, teacher_x, teacher_weight, rows, count=1)


@linear_kl_gradients.mistake(
    says="each piece is divided by its own tokens: the last, smaller one weighs too much, and k pieces give "
    "k times the loss",
    tries="/ len(x), the number of all tokens.",
    caught_by="single",
)
def by_piece(x: Any, weight: Any, teacher_x: Any, teacher_weight: Any, rows: int) -> Any:
    parts = [
        _step(a, weight, b, teacher_weight, rows)
        for a, b in zip(x.split(rows), teacher_x.split(rows), strict=True)
    ]
    return sum(p[0] for p in parts), torch.cat([p[1] for p in parts]), sum(p[2] for p in parts)


@linear_kl_gradients.mistake(
    says="tokens that do not fill a last piece are left out",
    tries="range(0, len(x), rows): a slice may end early.",
    caught_by="ragged",
)
def left_out(x: Any, weight: Any, teacher_x: Any, teacher_weight: Any, rows: int) -> Any:
    whole = len(x) // rows * rows if rows <= len(x) else len(x)
    loss, part, grad_weight = _step(
        x[:whole], weight, teacher_x[:whole], teacher_weight, min(rows, whole), count=len(x)
    )
    grad_x = torch.zeros_like(x)
    grad_x[:whole] = part
    return loss, grad_x, grad_weight


@linear_kl_gradients.mistake(
    says="grad_weight is the last piece's alone",
    tries="adding each piece's g.T @ x[part] to it.",
    caught_by="single",
)
def last_piece(x: Any, weight: Any, teacher_x: Any, teacher_weight: Any, rows: int) -> Any:
    return _step(x, weight, teacher_x, teacher_weight, rows, add=False)


@linear_kl_gradients.mistake(
    says="the directions are exchanged: the loss is KL(student ‖ teacher)",
    tries="p·(log p − log q), the teacher's p in front.",
    caught_by="one_piece",
)
def reverse(x: Any, weight: Any, teacher_x: Any, teacher_weight: Any, rows: int) -> Any:
    return _step(x, weight, teacher_x, teacher_weight, rows, of=lambda p, q: (q.exp() * (q - p)).sum())


@linear_kl_gradients.mistake(
    says="the loss is the cross-entropy with the teacher, whose own entropy is still in it",
    tries="p·(log p − log q): it is 0 where both agree.",
    caught_by="one_piece",
)
def with_entropy(x: Any, weight: Any, teacher_x: Any, teacher_weight: Any, rows: int) -> Any:
    return _step(x, weight, teacher_x, teacher_weight, rows, of=lambda p, q: -(p.exp() * q).sum())


@linear_kl_gradients.mistake(
    says="the teacher's likeliest token stands for its distribution: q − one-hot is the gradient of a label",
    tries="q − p with all of the teacher's p.",
    caught_by="one_piece",
)
def hard_target(x: Any, weight: Any, teacher_x: Any, teacher_weight: Any, rows: int) -> Any:
    def by(p: Any, q: Any) -> Any:
        return q - torch.nn.functional.one_hot(p.argmax(-1), p.shape[-1])

    return _step(x, weight, teacher_x, teacher_weight, rows, by=by)


@linear_kl_gradients.mistake(
    says="the numbers are right, but the logits of all tokens are in memory at once",
    tries="a loop over slices of `rows` tokens.",
    caught_by="cost",
)
def all_at_once(x: Any, weight: Any, teacher_x: Any, teacher_weight: Any, rows: int) -> Any:
    return _backward(x, weight, teacher_x, teacher_weight)


@linear_kl_gradients.mistake(
    says="pieces are computed one by one and kept in a list: together they are all logits again",
    tries="turning each piece into its part of the gradients before the next one is made.",
    caught_by="cost",
)
def kept(x: Any, weight: Any, teacher_x: Any, teacher_weight: Any, rows: int) -> Any:
    pieces = []
    for a, b in zip(x.split(rows), teacher_x.split(rows), strict=True):
        pieces.append(((a @ weight.T).log_softmax(-1), (b @ teacher_weight.T).log_softmax(-1), a))
    loss, grad_x, grad_weight = x.new_zeros(()), [], torch.zeros_like(weight)
    for log_q, log_p, a in pieces:
        loss = loss + (log_p.exp() * (log_p - log_q)).sum() / len(x)
        g = (log_q.exp() - log_p.exp()) / len(x)
        grad_x.append(g @ weight)
        grad_weight = grad_weight + g.T @ a
    return loss, torch.cat(grad_x), grad_weight


@linear_kl_gradients.mistake(
    says="the exponentials overflow: softmax without the largest logit taken off",
    tries="log_softmax, or softmax, of the logits.",
    caught_by="extreme",
)
def overflow(x: Any, weight: Any, teacher_x: Any, teacher_weight: Any, rows: int) -> Any:
    grad_x, grad_weight, loss = torch.empty_like(x), torch.zeros_like(weight), x.new_zeros(())
    for i in range(0, len(x), rows):
        part = slice(i, i + rows)
        eq, ep = (x[part] @ weight.T).exp(), (teacher_x[part] @ teacher_weight.T).exp()
        p, q = ep / ep.sum(-1, keepdim=True), eq / eq.sum(-1, keepdim=True)
        loss = loss + (p * (p.log() - q.log())).sum() / len(x)
        g = (q - p) / len(x)
        grad_x[part] = g @ weight
        grad_weight = grad_weight + g.T @ x[part]
    return loss, grad_x, grad_weight


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@linear_kl_gradients.alternative("q − p by hand, piece by piece")
def by_hand(x: Any, weight: Any, teacher_x: Any, teacher_weight: Any, rows: int) -> Any:
    return _step(x, weight, teacher_x, teacher_weight, rows)


@linear_kl_gradients.alternative("autograd, each piece backward before the next")
def autograd(x: Any, weight: Any, teacher_x: Any, teacher_weight: Any, rows: int) -> Any:
    w, loss, grads = weight.detach().clone().requires_grad_(), x.new_zeros(()), []
    for a, b in zip(x.split(rows), teacher_x.split(rows), strict=True):
        a = a.detach().clone().requires_grad_()
        log_p = (b @ teacher_weight.T).log_softmax(-1)
        part = torch.nn.functional.kl_div(
            (a @ w.T).log_softmax(-1), log_p, reduction="sum", log_target=True
        ) / len(x)
        part.backward()
        loss = loss + part.detach()
        grads.append(a.grad)
    return loss, torch.cat(grads), w.grad
