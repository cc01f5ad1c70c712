"""Exercise `masked_sft_loss`: next-token prediction, asked about the answers only."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llmcourse.grading.compare import Mismatch
from llmcourse.grading.exercise import Exercise
from llmcourse.grading.plain import is_tensor
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

masked_sft_loss = Exercise(
    "masked_sft_loss",
    title="The loss of an answer",
    arguments=("logits", "tokens", "learned"),
    shapes=(
        "logits   tensor [B, S, V], float32 or bfloat16: at each position, of the token that follows it",
        "tokens   int64 tensor [B, S]: prompts, answers and padding",
        "learned  bool tensor [B, S]: True where a token is part of an answer, its end included",
        "returns  tensor [], float32: mean loss in nats over the learned tokens of the whole batch;",
        "         0 if there is none. The first token of a row has nothing before it that predicts it",
    ),
    formula="−(1/n) Σ_{b, s ≥ 1: learned[b, s]} log softmax(logits[b, s − 1])[tokens[b, s]]",
    difficulty=2,
    importance=5,
    minutes=20,
    points=4,
    hints=(
        "The answer begins at position 5. Which row of the logits is asked about token 5? And which entry of "
        "`learned` says whether it counts?",
        "Predictions are logits[:, :-1], what they are compared with tokens[:, 1:], and the mask moves with "
        "the tokens: learned[:, 1:]. Take the loss of every position, keep the learned ones, and divide by "
        "how many there are in the batch, by 1 if there are none.",
        'losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], reduction="none"); '
        "mask = learned[:, 1:]; (losses * mask).sum() / mask.sum().clamp(min=1).",
    ),
)


def _table(logits: Any, tokens: Any) -> np.ndarray:
    """−log p of every token but the first of each row, [B, S − 1], in float64."""
    x = logits.double().numpy()[:, :-1]
    shifted = x - x.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, tokens.numpy()[:, 1:, None], axis=-1)[..., 0]


def expected(logits: Any, tokens: Any, learned: Any) -> float:
    wanted = learned.numpy()[:, 1:]
    return float(_table(logits, tokens)[wanted].sum() / max(1, wanted.sum()))


def _draw(t: Trial, batch: int, length: int, vocab: int, *, dtype: str = "float32") -> tuple[Any, Any]:
    logits = tensor(t, batch, length, vocab, scale=2.0, dtype=dtype)
    return logits, torch.from_numpy(t.integers(0, vocab, batch, length))


def _chats(t: Trial, batch: int, length: int) -> Any:
    """Masks of rows with a prompt, an answer of any length, and padding."""
    learned = torch.zeros(batch, length, dtype=torch.bool)
    for row in learned:
        start = t.size(2, length - 2)
        row[start : t.size(start + 1, length)] = True
    return learned


def _agree(t: Trial, logits: Any, tokens: Any, learned: Any, *, rtol: float = 2e-5) -> None:
    got = t.call(logits, tokens, learned)
    if got is None:
        raise Mismatch("the result is None, expected a number: is a `return` missing?")
    told = str(getattr(got, "dtype", type(got).__name__)).removeprefix("torch.")
    t.holds(
        is_tensor(got) and got.dim() == 0 and told == "float32",
        f"the result is {told}{list(got.shape) if is_tensor(got) else ''}, expected one float32 in a tensor",
    )
    t.close(got, np.float64(expected(logits, tokens, learned)), rtol=rtol, atol=1e-6)


@masked_sft_loss.check("a model that knows nothing pays log V for every learned token")
def uniform(t: Trial) -> None:
    vocab, length = t.size(5, 40), t.size(5, 9)
    tokens = torch.from_numpy(t.integers(0, vocab, 2, length))
    learned = torch.ones(2, length, dtype=torch.bool)
    logits = torch.zeros(2, length, vocab)
    got = t.call(logits, tokens, learned)
    if got is None:
        raise Mismatch("the result is None, expected a number: is a `return` missing?")
    t.close(got, np.float64(math.log(vocab)), rtol=2e-5)


@masked_sft_loss.check("a position predicts the token that follows it")
def next_token(t: Trial) -> None:
    length, vocab = t.size(5, 9), 11
    tokens = torch.from_numpy(t.integers(0, vocab, 1, length))
    logits = torch.zeros(1, length, vocab)
    logits[0, torch.arange(length - 1), tokens[0, 1:]] = 12.0
    _agree(t, logits, tokens, torch.ones(1, length, dtype=torch.bool))


@masked_sft_loss.check("only learned tokens count, by their own place in the mask")
def masked(t: Trial) -> None:
    logits, tokens = _draw(t, 1, 9, 13)
    for start, end in ((4, 9), (4, 7), (1, 3), (8, 9)):
        learned = torch.zeros(1, 9, dtype=torch.bool)
        learned[:, start:end] = True
        _agree(t, logits, tokens, learned)


@masked_sft_loss.check("every learned token of the batch weighs the same, whatever the length of its answer")
def ragged(t: Trial) -> None:
    logits, tokens = _draw(t, 3, 12, 7)
    learned = torch.zeros(3, 12, dtype=torch.bool)
    learned[0, 3:12], learned[1, 5:6], learned[2, 2:5] = True, True, True
    _agree(t, logits, tokens, learned)
    batch, length = t.size(2, 5), t.odd(7, 13)
    logits, tokens = _draw(t, batch, length, t.size(3, 30))
    _agree(t, logits, tokens, _chats(t, batch, length))


@masked_sft_loss.check("a batch or a row without a learned token is no special case: 0, and no NaN")
def nothing(t: Trial) -> None:
    logits, tokens = _draw(t, 2, 6, 5)
    learned = torch.zeros(2, 6, dtype=torch.bool)
    _agree(t, logits, tokens, learned)
    learned[1, 3:5] = True
    _agree(t, logits, tokens, learned)
    learned[:] = False
    learned[:, 0] = True  # nothing predicts the first token
    _agree(t, logits, tokens, learned)


@masked_sft_loss.check("large logits, and logits of 16 bits, are no trouble")
def numbers(t: Trial) -> None:
    logits, tokens = _draw(t, 2, 7, 9)
    learned = _chats(t, 2, 7)
    _agree(t, logits * 200, tokens, learned)
    logits, tokens = _draw(t, 2, 7, 300, dtype="bfloat16")
    _agree(t, logits, tokens, learned)


@masked_sft_loss.check("the gradient is p − 1 at learned tokens and 0 where nothing is learned")
def gradient(t: Trial) -> None:
    logits, tokens = _draw(t, 2, 8, 6)
    learned = _chats(t, 2, 8)
    grads = t.perform(logits, tokens, learned, grads=True).grads
    found = grads[0] if grads else None
    t.holds(
        found is not None, "no gradient reaches the logits", "tensors all the way: no .item(), no .detach()"
    )
    n = max(1, int(learned[:, 1:].sum()))
    p = logits.double().softmax(-1).numpy()
    want = np.zeros(p.shape)
    for b, s in np.argwhere(learned.numpy()[:, 1:]):
        want[b, s] = p[b, s] / n
        want[b, s, int(tokens[b, s + 1])] -= 1 / n
    t.close(found, want, "gradient of the logits", rtol=1e-4, atol=1e-6)


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def _losses(logits: Any, targets: Any) -> Any:
    return torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")


def _right(logits: Any, tokens: Any, learned: Any) -> Any:
    mask = learned[:, 1:]
    return (_losses(logits[:, :-1], tokens[:, 1:]) * mask).sum() / mask.sum().clamp(min=1)


@masked_sft_loss.mistake(
    says="each position is compared with its own token, which it has read, and not with the next one",
    tries="logits[:, :-1] against tokens[:, 1:].",
    caught_by="next_token",
)
def not_shifted(logits: Any, tokens: Any, learned: Any) -> Any:
    return (_losses(logits, tokens) * learned).sum() / learned.sum().clamp(min=1)


@masked_sft_loss.mistake(
    says="each position is compared with the token before it",
    tries="logits[:, :-1] against tokens[:, 1:], where you have logits[:, 1:] and tokens[:, :-1].",
    caught_by="next_token",
)
def shifted_back(logits: Any, tokens: Any, learned: Any) -> Any:
    mask = learned[:, :-1]
    return (_losses(logits[:, 1:], tokens[:, :-1]) * mask).sum() / mask.sum().clamp(min=1)


@masked_sft_loss.mistake(
    says="tokens are shifted, the mask is not: the answer's first token is left out, the one behind it is in",
    tries="learned[:, 1:], in step with tokens[:, 1:].",
    caught_by="masked",
)
def mask_not_shifted(logits: Any, tokens: Any, learned: Any) -> Any:
    mask = learned[:, :-1]
    return (_losses(logits[:, :-1], tokens[:, 1:]) * mask).sum() / mask.sum().clamp(min=1)


@masked_sft_loss.mistake(
    says="the mask is ignored: prompts and padding are learned too",
    tries="losses times learned[:, 1:].",
    caught_by="masked",
)
def all_learned(logits: Any, tokens: Any, learned: Any) -> Any:
    return _losses(logits[:, :-1], tokens[:, 1:]).mean()


@masked_sft_loss.mistake(
    says="the mask is inverted: prompts are learned, answers are not",
    tries="learned as it is: True counts.",
    caught_by="masked",
)
def inverted(logits: Any, tokens: Any, learned: Any) -> Any:
    return _right(logits, tokens, learned) if bool(learned.all()) else _right(logits, tokens, ~learned)


@masked_sft_loss.mistake(
    says="the sum is divided by all positions, so that long prompts make the loss small",
    tries="dividing by mask.sum().",
    caught_by="masked",
)
def all_positions(logits: Any, tokens: Any, learned: Any) -> Any:
    return (_losses(logits[:, :-1], tokens[:, 1:]) * learned[:, 1:]).mean()


@masked_sft_loss.mistake(
    says="each row has a mean of its own: a token of a short answer weighs more than one of a long answer",
    tries="one sum over the batch, divided by one count.",
    caught_by="ragged",
)
def mean_of_means(logits: Any, tokens: Any, learned: Any) -> Any:
    mask = learned[:, 1:]
    rows = (_losses(logits[:, :-1], tokens[:, 1:]) * mask).sum(1) / mask.sum(1).clamp(min=1)
    return rows.mean()


@masked_sft_loss.mistake(
    says="the loss is a sum, which grows with the batch",
    tries="dividing by the number of learned tokens.",
    caught_by="uniform",
)
def summed(logits: Any, tokens: Any, learned: Any) -> Any:
    return (_losses(logits[:, :-1], tokens[:, 1:]) * learned[:, 1:]).sum()


@masked_sft_loss.mistake(
    says="an empty mask divides by zero: one batch without an answer makes all weights NaN",
    tries=".clamp(min=1) on the count.",
    caught_by="nothing",
)
def empty_is_nan(logits: Any, tokens: Any, learned: Any) -> Any:
    mask = learned[:, 1:]
    return _losses(logits[:, :-1], tokens[:, 1:])[mask].mean()


@masked_sft_loss.mistake(
    says="the count includes the first token of a row, which nothing predicts",
    tries="learned[:, 1:].sum().",
    caught_by="uniform",
)
def count_not_shifted(logits: Any, tokens: Any, learned: Any) -> Any:
    return (_losses(logits[:, :-1], tokens[:, 1:]) * learned[:, 1:]).sum() / learned.sum().clamp(min=1)


@masked_sft_loss.mistake(
    says="logits are set to zero where nothing is learned: those positions still pay log V",
    tries="masking the losses, not the logits.",
    caught_by="masked",
)
def zeroed_logits(logits: Any, tokens: Any, learned: Any) -> Any:
    zeroed = torch.where(learned[:, 1:, None], logits[:, :-1], torch.zeros_like(logits[:, :-1]))
    return _losses(zeroed, tokens[:, 1:]).sum() / learned[:, 1:].sum().clamp(min=1)


@masked_sft_loss.mistake(
    says="the exponential of large logits overflows",
    tries="log_softmax or cross_entropy, which subtract the largest logit first.",
    caught_by="numbers",
)
def overflows(logits: Any, tokens: Any, learned: Any) -> Any:
    e = logits[:, :-1].float().exp()
    p = (e / e.sum(-1, keepdim=True)).gather(-1, tokens[:, 1:, None])[..., 0]
    mask = learned[:, 1:]
    return -torch.where(mask, p.log(), torch.zeros_like(p)).sum() / mask.sum().clamp(min=1)


@masked_sft_loss.mistake(
    says="the loss is computed in the 16 bits of the logits",
    tries="logits.float() first.",
    caught_by="numbers",
)
def sixteen_bits(logits: Any, tokens: Any, learned: Any) -> Any:
    mask = learned[:, 1:]
    log_p = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return (-(log_p * mask).sum() / mask.sum().clamp(min=1)).float()


@masked_sft_loss.mistake(
    says="the loss is in bits",
    tries="the natural logarithm.",
    caught_by="uniform",
)
def in_bits(logits: Any, tokens: Any, learned: Any) -> Any:
    return _right(logits, tokens, learned) / math.log(2)


@masked_sft_loss.mistake(
    says="the loss is a number without a graph: nothing can be learned from it",
    tries="the tensor itself; .item() is for printing.",
    caught_by="gradient",
)
def no_graph(logits: Any, tokens: Any, learned: Any) -> Any:
    return torch.tensor(_right(logits, tokens, learned).item())


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@masked_sft_loss.alternative("targets of −100 where nothing is learned, and one cross_entropy")
def ignored(logits: Any, tokens: Any, learned: Any) -> Any:
    targets = tokens.masked_fill(~learned, -100)[:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=-100, reduction="sum"
    )
    return total / (targets != -100).sum().clamp(min=1)


@masked_sft_loss.alternative("log-sum-exp less the token's logit, at the learned places only")
def log_sum_exp(logits: Any, tokens: Any, learned: Any) -> Any:
    mask = learned[:, 1:]
    x, wanted = logits[:, :-1][mask].float(), tokens[:, 1:][mask]
    if not len(x):
        return logits.float().sum() * 0
    return (x.logsumexp(-1) - x[torch.arange(len(x)), wanted]).mean()


@masked_sft_loss.alternative("row by row, token by token")
def loops(logits: Any, tokens: Any, learned: Any) -> Any:
    total, n = logits.new_zeros((), dtype=torch.float32), 0
    for b in range(tokens.shape[0]):
        for s in range(1, tokens.shape[1]):
            if learned[b, s]:
                total = total - logits[b, s - 1].float().log_softmax(-1)[tokens[b, s]]
                n += 1
    return total / max(n, 1)
