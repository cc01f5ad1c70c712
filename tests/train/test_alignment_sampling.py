"""Rollouts, tasks and preference pairs."""

import random
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare

from llmcourse.errors import ShapeError
from llmcourse.models import Transformer
from llmcourse.train.alignment import (
    RewardModel,
    Sentences,
    Sorting,
    checked,
    draw_pairs,
    held_out_reward,
    kl_from,
    rollout,
    token_logprobs,
)
from llmcourse.train.alignment.reward_model import NO_OPINION, train_reward_model
from llmcourse.train.alignment.rewards import WORDS, is_held_out
from llmcourse.train.fit import build
from llmcourse.train.small import small

TASK = Sorting(3)


@pytest.fixture(scope="module")
def model():
    config = small(12, d_model=32, head_dim=8, d_ff=32, max_len=32)
    return build(Transformer, config, seed=3).eval().requires_grad_(False)


PROMPTS = [[1, 2, 3, 10], [4, 10], [5, 6, 10], [7, 10]]


# ── sampling ─────────────────────────────────────────────────────────────────────────────────────────


def test_what_was_recorded_while_sampling_is_what_the_model_says_of_the_whole_text(model):
    drawn = rollout(model, PROMPTS, TASK, samples=3, seed=1)
    again = token_logprobs(model, drawn.tokens, drawn.mask)
    assert torch.allclose(drawn.logp, again, atol=1e-5)
    for row, (prompt, answer) in enumerate(zip(drawn.prompts, drawn.answers, strict=True)):
        ids = prompt + answer
        log_p = model(torch.tensor([ids]))[0].double().log_softmax(-1)
        want = [float(log_p[t - 1, ids[t]]) for t in range(len(prompt), len(ids))]
        assert drawn.logp[row][drawn.mask[row]].tolist() == pytest.approx(want, abs=1e-5)


def test_the_mask_marks_the_answer_s_tokens_and_an_answer_ends_at_its_end_token(model):
    drawn = rollout(model, PROMPTS, TASK, samples=20, seed=2)
    assert drawn.prompts == [p for p in PROMPTS for _ in range(20)]
    lengths = {len(a) for a in drawn.answers}
    assert len(lengths) > 1
    assert max(lengths) == TASK.max_new
    for row, (prompt, answer) in enumerate(zip(drawn.prompts, drawn.answers, strict=True)):
        assert drawn.tokens[row, : len(prompt)].tolist() == prompt
        assert drawn.tokens[row, 1:][drawn.mask[row]].tolist() == answer
        assert TASK.END not in answer[:-1]
        assert answer[-1] == TASK.END or len(answer) == TASK.max_new


def test_tokens_are_drawn_with_the_model_s_own_probabilities(model):
    drawn = rollout(model, [[1, 2, 10]], TASK, samples=4000, seed=5)
    counts = torch.bincount(torch.tensor([a[0] for a in drawn.answers]), minlength=12)
    p = model(torch.tensor([[1, 2, 10]]))[0, -1].double().softmax(-1)
    assert chisquare(counts.numpy(), (p / p.sum() * 4000).numpy()).pvalue > 1e-3


def test_the_same_seed_draws_the_same_answers_and_greedy_takes_the_likeliest(model):
    first, same, other = (rollout(model, PROMPTS, TASK, samples=4, seed=s).answers for s in (1, 1, 2))
    assert first == same != other
    drawn = rollout(model, PROMPTS, TASK, samples=2, greedy=True)
    for prompt, answer in zip(drawn.prompts, drawn.answers, strict=True):
        ids = list(prompt)
        for token in answer:
            assert token == int(model(torch.tensor([ids]))[0, -1].argmax())
            ids.append(token)


def test_nothing_to_answer_is_an_error(model):
    with pytest.raises(ShapeError, match="0 samples"):
        rollout(model, PROMPTS, TASK, samples=0)


def test_the_divergence_of_a_model_from_itself_is_0_and_from_another_is_not(model):
    config = small(12, d_model=32, head_dim=8, d_ff=32, max_len=32)
    assert kl_from(model, model, TASK) == pytest.approx(0, abs=1e-5)
    other = build(Transformer, config, seed=4)
    with torch.no_grad():
        other.head.weight *= 3
    assert kl_from(model, other, TASK) > 0.05


# ── tasks ────────────────────────────────────────────────────────────────────────────────────────────


def test_prompts_of_training_and_held_out_ones_never_meet():
    rng = random.Random(0)
    training = {tuple(p) for p in TASK.prompts(3000, rng)}
    kept = {tuple(p) for p in TASK.prompts(1000, rng, held_out=True)}
    assert not training & kept
    assert 0.05 < len(kept) / len(training | kept) < 0.2


def test_sorting_rewards_the_sorted_digits_with_their_end_and_nothing_else():
    prompt = [3, 1, 1, 10]
    assert TASK.reward(prompt, [1, 1, 3, 11]) == 1.0
    for wrong in ([1, 1, 3], [3, 1, 1, 11], [1, 3, 11], [1, 1, 3, 3, 11], []):
        assert TASK.reward(prompt, wrong) == 0.0
    assert TASK.show([*prompt, 1, 1, 3, 11]) == "311=113."
    with pytest.raises(ShapeError, match="digits"):
        Sorting(1)


def test_one_demonstrator_in_three_sorts_upwards():
    rng = random.Random(0)
    prompts = Sorting(5).prompts(900, rng)
    right = sum(Sorting(5).reward(p, Sorting(5).demonstration(p, rng)) for p in prompts)
    assert 0.28 < right / 900 < 0.42


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("The river runs below the old bridge.", True),
        ("  Who built the Bridge over this River? ", True),
        ("The river runs below the old bridge", False),  # no full stop
        ("The river runs. It runs below the bridge.", False),  # two sentences
        ("The river runs\nbelow the old bridge.", False),
        ("River bridge, river bridge.", False),  # too short
        ("The rivers run below the old bridge.", False),  # another word
        ("river bridge " * 20 + ".", False),  # too long
        ("", False),
    ],
)
def test_a_sentence_is_checked_for_its_form_and_its_words(text, holds):
    assert Sentences.holds(text, "river", "bridge") is holds


class Characters:
    """Stands for a tokenizer: a character is a token, "~" ends an answer."""

    eos_ids = (ord("~"),)

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids, *, special=True):
        return "".join(chr(i) for i in ids).replace("~", "")

    def chat(self, text):
        return text


def test_sentences_keeps_which_words_were_asked_and_wants_an_end():
    task = Sentences(Characters())
    (prompt,) = task.prompts(1, random.Random(4))
    a, b = [w for w in task.show(prompt).rstrip(".").split() if w in WORDS]
    answer = task.tokenizer.encode(f"Here the {a} meets the {b}.")
    assert task.reward(prompt, [*answer, ord("~")]) == 1.0
    assert task.reward(prompt, answer) == 0.0  # cut off, or would have gone on
    assert not is_held_out(" ".join(sorted((a, b))))
    with pytest.raises(ShapeError, match="did not ask"):
        task.reward([1, 2], answer)


def test_rewards_of_a_rollout_stand_in_its_order():
    drawn = SimpleNamespace(
        prompts=[[2, 1, 3, 10]] * 2, answers=[[1, 2, 3, 11], [3, 11]], tokens=torch.zeros(2, 1)
    )
    assert checked(TASK)(drawn).tolist() == [1.0, 0.0]


def test_held_out_reward_is_the_mean_over_prompts_that_training_never_gets(model):
    seen = []

    class Spied(Sorting):
        def reward(self, prompt, answer):
            seen.append(tuple(prompt))
            return float(answer[0] < 5)

    got = held_out_reward(model, Spied(3), prompts=64)
    assert len(seen) == 64
    assert all(is_held_out(TASK.show(p[:3])) for p in seen)
    assert 0 < got < 1


# ── preferences ──────────────────────────────────────────────────────────────────────────────────────


def low(rollout):
    """A reward that even an untrained model earns: a small first token."""
    return torch.tensor([float(a[0] < 6) for a in rollout.answers])


def test_the_chosen_answer_has_the_higher_reward_and_both_have_one_prompt(model):
    pairs = draw_pairs(model, TASK, prompts=40, samples=3, seed=0, reward=low)
    assert 10 < len(pairs) <= pairs.asked == 40
    for n in range(len(pairs)):
        first = [int(pairs.mask[i, n].nonzero()[0]) + 1 for i in (0, 1)]
        assert first == [4, 4]
        assert torch.equal(pairs.tokens[0, n, :4], pairs.tokens[1, n, :4])
        assert pairs.tokens[0, n, 4] < 6 <= pairs.tokens[1, n, 4]


def test_a_round_of_batches_has_every_pair_once(model):
    pairs = draw_pairs(model, TASK, prompts=40, samples=3, seed=0, reward=low)
    size = len(pairs) // 4
    order = pairs.order(batch=size, seed=0)
    first = torch.cat([next(order) for _ in range(len(pairs) // size)])
    assert len(set(first.tolist())) == len(first)
    with pytest.raises(ShapeError, match="batches of"):
        next(pairs.order(batch=len(pairs) + 1, seed=0))


def test_answers_that_are_all_alike_make_no_pair(model):
    with pytest.raises(ShapeError, match="different reward"):
        draw_pairs(model, TASK, prompts=4, reward=lambda r: torch.zeros(len(r)))


def test_a_reward_model_begins_without_an_opinion_and_reads_the_last_token(model):
    judge = RewardModel(model)
    drawn = rollout(model, PROMPTS, TASK, samples=2, seed=0)
    assert not judge.score(drawn).any()
    torch.nn.init.normal_(judge.body.head.weight)
    with torch.no_grad():
        got = judge(drawn.tokens, drawn.mask)
    for row, (prompt, answer) in enumerate(zip(drawn.prompts, drawn.answers, strict=True)):
        alone = judge.body(torch.tensor([prompt + answer]))[0, -1, 0]
        assert float(got[row]) == pytest.approx(alone.item(), abs=1e-5)


def test_scores_are_in_standard_deviations(model):
    pairs = draw_pairs(model, TASK, prompts=64, samples=3, seed=0, reward=low)
    run = train_reward_model(model, pairs, steps=20, lr=5e-3)
    assert run.loss[0] == pytest.approx(NO_OPINION, abs=1e-5)
    assert run.loss[-1] < 0.5
    with torch.no_grad():
        scores = torch.cat([run.model(pairs.tokens[i], pairs.mask[i]) for i in (0, 1)])
    scores = (scores - run.model.mean) / run.model.std
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scores.std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert run.model.accuracy(pairs) > 0.9
