"""Alignment: from a model that imitates to one that is rewarded. Every method, on tasks that can be checked.

A model after supervised fine-tuning imitates its demonstrations, the bad ones too. What people (or a program)
can do without writing a single demonstration is to *judge* answers. Four ways to learn from judgements:

    reward model   pairs of answers → a number for any answer           reward_model.py  (Bradley–Terry)
    PPO            sample, judge, step, with a critic and a clip        ppo.py
    GRPO           the same without a critic: a group is its own        grpo.py
    DPO            straight from the pairs, nothing is sampled          dpo.py

All of them pull on a leash: the KL divergence from the model they began with (kl.py). hacking.py lets it go.

How it is used (a few seconds a line on a CPU; every result is the same for the same seeds):

    from llmcourse.train import alignment as al

    task = al.Sorting(digits=4)                   # "3141=" → "1134."; reward 1 if right, else 0
    base = al.imitate(task, seed=0)               # SFT: demonstrators disagree, so the model does too
    al.held_out_reward(base, task)                # mean reward of samples for prompts kept from training

    pairs = al.draw_pairs(base, task, seed=1)                     # two answers each, one better
    al.train_dpo(base, pairs).model                               # Rafailov et al. 2023
    judge = al.train_reward_model(base, pairs).model              # .accuracy(pairs), .score(rollout)
    al.train_ppo(base, task, reward=judge).model                  # RLHF; without `reward` the check
    al.train_grpo(base, task).model                               # Shao et al. 2024

Each `train_*` leaves `base` as it is and gives a `Run`: `.model`, `.loss` (each step), `.reward` (mean of
each batch of samples; the margin for DPO), `.kl` (nats a sequence from `base`, where it was measured).

    answers = al.rollout(base, task.prompts(3, random.Random(0)), task, samples=2, seed=0)
    for prompt, answer in zip(answers.prompts, answers.answers): print(task.show(prompt + answer))

    al.train_ppo(base, task, reward=judge, beta=0.0).model        # no leash: pleases the judge alone
    table = al.hack(base, task)                   # GRPO on a reward that can be gamed; a leash or none
    [(row.kl_weight, row.proxy, row.true, row.kl, row.sample) for row in table]      # row.course: as it went

A learner's losses train in place of these: `plug(dpo_loss=…)` and `plug(ppo_objective=…)` around a `train_*`.
The real model is taught to do as it is told by the same functions, `al.Sentences(tokenizer)` for a task:
`llmcourse bench alignment --device cuda`.
"""

from llmcourse.train.alignment.dpo import dpo_loss, train_dpo
from llmcourse.train.alignment.grpo import group_advantages, grpo_loss, train_grpo
from llmcourse.train.alignment.hacking import climb, hack
from llmcourse.train.alignment.imitation import imitate
from llmcourse.train.alignment.kl import k1, k3
from llmcourse.train.alignment.ppo import gae, ppo_objective, train_ppo
from llmcourse.train.alignment.preferences import Preferences, draw_pairs
from llmcourse.train.alignment.reward_model import RewardModel, bradley_terry, train_reward_model
from llmcourse.train.alignment.rewards import Sentences, Sorting, Task, checked
from llmcourse.train.alignment.run import Run
from llmcourse.train.alignment.sampling import Rollout, held_out_reward, kl_from, rollout, token_logprobs

__all__ = [
    "Preferences",
    "RewardModel",
    "Rollout",
    "Run",
    "Sentences",
    "Sorting",
    "Task",
    "bradley_terry",
    "checked",
    "climb",
    "dpo_loss",
    "draw_pairs",
    "gae",
    "group_advantages",
    "grpo_loss",
    "hack",
    "held_out_reward",
    "imitate",
    "k1",
    "k3",
    "kl_from",
    "ppo_objective",
    "rollout",
    "token_logprobs",
    "train_dpo",
    "train_grpo",
    "train_ppo",
    "train_reward_model",
]
