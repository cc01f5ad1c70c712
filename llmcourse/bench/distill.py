"""Benchmark `distill`: a draft for speculative decoding, distilled from the course's model in one go.

    llmcourse bench distill --device cuda --out FOLDER

On a GPU, within 8 minutes, from nothing but the model and the plays:

1. The model writes conversations with itself (`compress.self_written`), millions of tokens; those in which a
   held-out question occurs are left out. Nine plays in ten are added.
2. It reads both once, and its last features are kept (`compress.draft_training`). 3. Short trainings of the
same student: three learning rates; then labels alone, soft targets, soft targets and later total variation,
and half of the text written by the student. Compared on validation questions. 4. The draft is trained at the
best of these for the time that is left, and written to FOLDER/draft.safetensors, in INT8. What follows is
measured on the model in that file. 5. Acceptance, greedy and at temperature 1, for three sets of prompts
that nothing was chosen by: questions that people wrote, questions that the model wrote, and passages of
plays that were kept apart.

On a CPU a small teacher and its students (`compress.small_pair`), and the same pipeline for a few steps: a
check that it runs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcourse.assets import MODEL, play_paths
from llmcourse.bench.records import versions
from llmcourse.bench.timing import measure as time_of
from llmcourse.compress import acceptance, small_pair
from llmcourse.compress.draft import about_draft, draft_config, initial_draft, load_draft, save_draft
from llmcourse.compress.draft_training import Corpus, DraftLoss, corpus_of, train_draft
from llmcourse.compress.self_written import Turns, Written, conversations, decoder_for, without
from llmcourse.engine import LLM, SamplingParams
from llmcourse.models import KVCache, Transformer, load
from llmcourse.text.tokenizer import Tokenizer
from llmcourse.train.fit import one_thread

Row = dict[str, Any]
Text = tuple[list[int], list[int]]

QUESTIONS = (
    "What is the capital of Portugal?",
    "Explain how a refrigerator keeps food cold.",
    "Write a short poem about the first snow of the year.",
    "Give me three tips for sleeping better.",
    "What is the difference between a virus and a bacterium?",
    "How do I cook rice so that it does not stick?",
    "Tell me a story about a lighthouse keeper and a whale.",
    "Why is the sky blue during the day and red at sunset?",
    "Write an email that asks my landlord to repair the heating.",
    "What does the word 'ephemeral' mean? Use it in a sentence.",
    "List five things to take on a hike in the mountains.",
    "Summarise the plot of Romeo and Juliet in three sentences.",
    "How many sides does a hexagon have?",
    "What should I ask in a job interview?",
    "Explain recursion to a ten-year-old child.",
    "Write a Python function that reverses a string.",
    "Who painted the ceiling of the Sistine Chapel?",
    "What are the advantages of riding a bicycle to work?",
    "Describe the taste of a ripe mango.",
    "How does a vaccine protect against a disease?",
    "Suggest a name for a bakery and explain your choice.",
    "What happens to water when it freezes?",
    "Give me a recipe for a simple vegetable soup.",
    "What is the meaning of a red traffic light?",
)
"""Questions for the test. People wrote them; no training text that repeats one is used."""

PLAYS_HELD_OUT = 4
VARIATION = 0.9
"""Weight of total variation beside KL, in the last four tenths of a training that uses it."""


@dataclass(frozen=True)
class Plan:
    """How much of everything. Seconds where the device decides how much that is.

    rows, length    of a batch of conversations;  write_s: how long the model writes
    play_length     tokens of a stretch of a play;  stretches: how many are read (0: all but those held out)
    prompts, answer held-out prompts a set, and tokens of each answer
    trial_s         of a short training, total_s: of everything until the test begins
    """

    rows: int = 1024
    length: int = 512
    write_s: float = 70.0
    play_length: int = 1024
    stretches: int = 0
    prompts: int = 48
    answer: int = 160
    tokens_per_step: int = 16_384
    trial_s: float = 13.0
    total_s: float = 375.0
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    width: int = 256
    layers: int = 4
    d_ff: int = 704
    kl_rows: int = 4096


FULL = Plan()
TINY = Plan(
    rows=2,
    length=40,
    write_s=0.0,
    play_length=48,
    stretches=2,
    prompts=2,
    answer=4,
    tokens_per_step=48,
    trial_s=0.0,
    total_s=0.0,
    rates=(2e-3,),
    width=64,
    layers=1,
    d_ff=96,
    kl_rows=64,
)
"""A few steps of each part, for a CPU."""


def run(device: str, out: Path | None = None) -> tuple[list[Row], list[str]]:
    """All rows, and what a reader must know to use them. The draft is written to `out`/draft.safetensors."""
    with one_thread() if device == "cpu" else nullcontext():
        rows = pair_rows(steps=120, seeds=3) if device == "cpu" else []
        rows += draft_rows(FULL if device == "cuda" else TINY, device, out)
    notes = [
        "rate: the mean over all places of Σ min(p, q) (greedy: of equal choices) on the target's own text. "
        "played: tokens a pass of the target for draft lengths 1 to 8, from the order in which places "
        "accept; formula: (1 − α^(γ+1)) / (1 − α) with α = rate.",
        "rate and method rows: the same student, first weights, texts and seconds, on validation questions, "
        "which are not the test's.",
        "cost: a step of the draft over a step of the target, batch 1, about 128 tokens in the cache.",
    ]
    if device == "cpu":
        notes.append("The draft of a CPU run saw a few steps of a few sentences: a check that it runs.")
    return rows, notes


# ----------------------------------------------------------------------------------- a small pair


def pair_rows(*, steps: int, seeds: int, methods: Sequence[str] = small_pair.METHODS) -> list[Row]:
    """The small pair: each method, on the same batches."""
    pair = small_pair.small_teacher()
    rows = []
    for seed in range(seeds):
        for method in methods:
            student = small_pair.train_student(pair, method, seed=seed, steps=steps)
            found = {"held_out": student.loss, "rate": student.overlap, "greedy": student.greedy}
            rows.append({"kind": "pair", "name": method, "seed": seed, **found})
    return rows


# ----------------------------------------------------------------------------------- the real draft


def draft_rows(plan: Plan, device: str, out: Path | None) -> list[Row]:
    """From the model to the draft and its test."""
    began = time.perf_counter()
    model, tokenizer = load(None, device=device, dtype="bfloat16" if device == "cuda" else "float32")
    llm = LLM((model, tokenizer))
    turns = Turns.of(tokenizer)
    sets = {
        "questions": [tokenizer.encode(tokenizer.chat(q)) for q in QUESTIONS[: plan.prompts]],
        "self-written questions": own_questions(model, tokenizer, plan, seed=10**6),
        "plays": play_prompts(tokenizer, plan),
    }
    validation = own_questions(model, tokenizer, plan, seed=10**6 + 1)
    asked = [p[len(turns.opening) : -len(turns.answer)] for name in list(sets)[:2] for p in sets[name]]
    asked += [p[len(turns.opening) : -len(turns.answer)] for p in validation]

    corpora, rows = texts(model, tokenizer, plan, [ids for ids in asked if len(ids) >= 5])
    check = answers(llm, validation, plan, sampled=True), answers(llm, validation, plan, sampled=False)
    bench = _Bench(plan, model, corpora, check)
    best, method_rows = bench.methods(tokenizer)
    rows += method_rows

    left = plan.total_s - (time.perf_counter() - began)
    draft, row = bench.train(seconds=left, lr=best["lr"], variation=best["variation"])
    with tempfile.TemporaryDirectory() as scratch:
        path = (Path(scratch) if out is None else out) / "draft.safetensors"
        about = description(plan, best, row, rows, device)
        save_draft(draft, path, about=about)
        draft = load_draft(path, device=device, dtype=model.dtype)
        tests = []
        for name, prompts in sets.items():
            for sampled in (False, True):
                tests.append(
                    test_row(model, draft, answers(llm, prompts, plan, sampled=sampled), name, sampled)
                )
        speed = cost_row(model, draft)
        about["acceptance"] = [{k: t[k] for k in ("name", "temperature", "rate", "played")} for t in tests]
        about["seconds"] = round(time.perf_counter() - began, 1)
        size = save_draft(bench.last, path, about=about)
        assert about_draft(path)["bytes"] == size
    row |= {
        "kind": "draft",
        "name": draft.config.name,
        "params": draft.config.n_params,
        "bytes": size,
        **speed,
    }
    row |= {"target_params": model.config.n_params, **best, "total_s": time.perf_counter() - began}
    row["sample"] = sample(draft, tokenizer, plan)
    return [*rows, row, *tests]


def texts(
    model: Transformer, tokenizer: Tokenizer, plan: Plan, asked: list[list[int]]
) -> tuple[list[Corpus], list[Row]]:
    """What the draft learns from, with the target's features; and how fast that was made."""
    written: list[Written] = []
    seconds = 0.0
    decoder = decoder_for(model, plan.rows, plan.length)
    began = time.perf_counter()
    while not written or seconds < plan.write_s:
        batch = conversations(
            model, tokenizer, rows=plan.rows, length=plan.length, seed=len(written), decoder=decoder
        )
        written.append(batch)
        _wait(model)
        seconds = time.perf_counter() - began
    del decoder  # its cache is larger than the model
    kept = [without(batch, asked) for batch in written]
    talk = torch.cat([batch.tokens for batch, _ in kept])
    dropped = sum(count for _, count in kept)
    total = len(written) * plan.rows * plan.length
    rows: list[Row] = [
        {"kind": "writing", "name": "conversations", "tokens": total, "seconds": seconds, "dropped": dropped}
    ]
    plays = play_tokens(tokenizer, plan)
    began = time.perf_counter()
    corpora = [corpus_of(model, part.clone()) for part in (talk, plays)]
    _wait(model)
    read = sum(c.size for c in corpora)
    rows.append(
        {"kind": "reading", "name": "features", "tokens": read, "seconds": time.perf_counter() - began}
    )
    rows[-1]["bytes"] = sum(c.features.nbytes for c in corpora)
    rows[-1]["play_tokens"] = plays.numel()
    for row in rows:
        row["tokens_per_s"] = row["tokens"] / row["seconds"]
    return corpora, rows


class _Bench:
    """Trainings of one student on the same texts, by seconds."""

    def __init__(
        self, plan: Plan, model: Transformer, corpora: list[Corpus], check: tuple[list[Text], list[Text]]
    ) -> None:
        self.plan, self.model, self.corpora, self.check = plan, model, corpora, check
        self.config = draft_config(model.config, width=plan.width, layers=plan.layers, d_ff=plan.d_ff)
        self.last = initial_draft(model, self.config)
        self._train(self.last, self._loss(), 3, plan.rates[0], self.corpora)  # compiled, allocated, warm
        began = time.perf_counter()
        self._train(self.last, self._loss(), 12 if plan.trial_s else 2, plan.rates[0], self.corpora)
        self.step_s = (time.perf_counter() - began) / (12 if plan.trial_s else 2)

    def _loss(self, **options: Any) -> DraftLoss:
        return DraftLoss(self.model.head.weight.detach(), rows=self.plan.kl_rows, **options)

    def _train(
        self, draft: Transformer, loss: DraftLoss, steps: int, lr: float, corpora: list[Corpus], seed: int = 0
    ) -> list[float]:
        return train_draft(
            draft, corpora, loss, steps=steps, tokens_per_step=self.plan.tokens_per_step, lr=lr, seed=seed
        )

    def train(
        self, *, seconds: float, lr: float, variation: float = 0.0, labels: bool = False
    ) -> tuple[Transformer, Row]:
        """A draft after so many seconds, and what became of it."""
        steps = max(4, int(seconds / self.step_s))
        draft = initial_draft(self.model, self.config)
        loss = self._loss(variation=variation, warm=steps * 6 // 10, labels=labels)
        began = time.perf_counter()
        curve = self._train(draft, loss, steps, lr, self.corpora)
        self.last = draft.eval()
        return draft, self._row(steps, time.perf_counter() - began, curve)

    def on_policy(self, tokenizer: Tokenizer, *, seconds: float, lr: float) -> Row:
        """Half of the seconds on the target's texts, half on these and as much that the student wrote."""
        steps = max(2, int(seconds / self.step_s / 2))
        draft = initial_draft(self.model, self.config)
        began = time.perf_counter()
        curve = self._train(draft, self._loss(), steps, lr, self.corpora)
        draft.eval()
        rows = self.plan.rows if self.plan.trial_s else 1
        own = conversations(draft, tokenizer, rows=rows, length=self.plan.length, seed=77)
        count = min(len(own.tokens), len(self.corpora[0].tokens))
        mixed = [
            Corpus(self.corpora[0].tokens[:count], self.corpora[0].features[:count]),
            corpus_of(self.model, own.tokens[:count].clone()),
        ]
        curve += self._train(draft, self._loss(), steps, lr / 2, mixed, seed=1)
        self.last = draft.eval()
        return self._row(2 * steps, time.perf_counter() - began, curve)

    def _row(self, steps: int, seconds: float, curve: list[float]) -> Row:
        with torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=_gpu(self.model)):
            sampled = acceptance.measure(self.model, self.last, self.check[0], temperature=1.0)
            greedy = acceptance.measure(self.model, self.last, self.check[1], temperature=0.0)
        every = max(1, len(curve) // 200)
        return {
            "steps": steps,
            "tokens": steps * self.plan.tokens_per_step,
            "seconds": seconds,
            "validation_rate": sampled.rate,
            "validation_greedy": greedy.rate,
            "loss": sum(curve[-20:]) / len(curve[-20:]),
            "curve": [round(x, 4) for x in curve[::every]],
        }

    def methods(self, tokenizer: Tokenizer) -> tuple[dict[str, float], list[Row]]:
        """Short trainings, and the settings of the best: its learning rate, its weight of total variation."""

        def good(row: Row) -> float:
            return float(row["validation_rate"] + row["validation_greedy"])

        seconds = self.plan.trial_s
        rows: list[Row] = []
        for lr in self.plan.rates:
            rows.append({"kind": "rate", "name": f"soft targets, lr {lr:g}", "lr": lr})
            rows[-1] |= self.train(seconds=seconds, lr=lr)[1]
        found = max(rows, key=good)
        lr = found["lr"]
        ways: dict[str, Callable[[], Row]] = {
            "labels alone": lambda: self.train(seconds=seconds, lr=lr, labels=True)[1],
            "soft, then total variation": lambda: self.train(seconds=seconds, lr=lr, variation=VARIATION)[1],
            "half on-policy": lambda: self.on_policy(tokenizer, seconds=seconds, lr=lr),
        }
        soft: Row = found | {"kind": "method", "name": "soft targets"}
        methods = [soft, *({"kind": "method", "name": name, "lr": lr} | way() for name, way in ways.items())]
        variation = VARIATION if good(methods[2]) > good(soft) else 0.0
        return {"lr": lr, "variation": variation}, rows + methods


# ----------------------------------------------------------------------------------- prompts and answers


def own_questions(model: Transformer, tokenizer: Tokenizer, plan: Plan, *, seed: int) -> list[list[int]]:
    """Prompts whose question the model wrote: of `plan.prompts` conversations, those that come to one."""
    turns = Turns.of(tokenizer)
    length = min(plan.length, len(turns.opening) + 72)
    written = conversations(model, tokenizer, rows=plan.prompts, length=length, seed=seed)
    prompts = []
    for row in written.tokens.tolist():
        if turns.answer[0] in row[len(turns.opening) :]:
            prompts.append([*row[: row.index(turns.answer[0], len(turns.opening))], *turns.answer])
    return prompts or [tokenizer.encode(tokenizer.chat(QUESTIONS[0]))]


def play_tokens(tokenizer: Tokenizer, plan: Plan) -> Tensor:
    """The plays that are not held out, in stretches [n, play_length]."""
    most = plan.stretches * plan.play_length
    ids: list[int] = []
    for path in play_paths()[:-PLAYS_HELD_OUT]:
        ids += tokenizer.encode(_verse(path))
        if most and len(ids) > most:
            break
    whole = most or len(ids) // plan.play_length * plan.play_length
    return torch.tensor(ids[:whole]).view(-1, plan.play_length)


def play_prompts(tokenizer: Tokenizer, plan: Plan) -> list[list[int]]:
    """Passages of 64 tokens from the held-out plays, spread evenly."""
    ids = [i for path in play_paths()[-PLAYS_HELD_OUT:] for i in tokenizer.encode(_verse(path))]
    apart = len(ids) // (plan.prompts + 1)
    return [ids[(k + 1) * apart :][:64] for k in range(plan.prompts)]


def _verse(path: Path) -> str:
    return "\n".join(line.rstrip() for line in path.read_text().splitlines())


def answers(llm: LLM, prompts: Sequence[list[int]], plan: Plan, *, sampled: bool) -> list[Text]:
    """What the target writes after each prompt: greedy, or at temperature 1 with a seed for each."""
    heat = 1.0 if sampled else 0.0
    params = [SamplingParams(max_tokens=plan.answer, temperature=heat, seed=i) for i in range(len(prompts))]
    done = llm.generate(list(prompts), params)
    return [(list(p), c.tokens) for p, c in zip(prompts, done, strict=True) if c.tokens]


def test_row(model: Transformer, draft: Transformer, texts: list[Text], name: str, sampled: bool) -> Row:
    places = acceptance.measure(model, draft, texts, temperature=1.0 if sampled else 0.0)
    return {
        "kind": "acceptance",
        "name": name,
        "temperature": 1.0 if sampled else 0.0,
        "prompts": len(texts),
        "places": places.count,
        "rate": places.rate,
        "played": [round(places.tokens_per_pass(n), 4) for n in acceptance.LENGTHS],
        "formula": [round(acceptance.expected_tokens(places.rate, n), 4) for n in acceptance.LENGTHS],
    }


def cost_row(model: Transformer, draft: Transformer) -> Row:
    """Seconds of a decode step of each, batch 1, in turns."""
    steps = {name: _stepper(m) for name, m in (("target", model), ("draft", draft))}
    graph = False if _gpu(model) else None  # a step is a graph already
    with torch.inference_mode():
        found = time_of(steps, device=model.device, graph=graph)
    target, mine = found["target"].median, found["draft"].median
    return {"target_step_s": target, "draft_step_s": mine, "cost": mine / target}


def _stepper(model: Transformer, at: int = 128) -> Callable[[], Tensor]:
    cache = KVCache(model.config, 1, 2 * at, dtype=model.dtype, device=model.device)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    step: Callable[[Tensor], Tensor] = lambda tokens: model(tokens, cache)  # noqa: E731
    if _gpu(model):
        from llmcourse.engine.cuda_graph import GraphDecoder

        step = GraphDecoder(model, cache)

    def advance() -> Tensor:
        cache.lengths = [at]
        return step(token)

    return advance


def sample(draft: Transformer, tokenizer: Tokenizer, plan: Plan) -> str:
    """What the draft says by itself, greedily."""
    params = SamplingParams(max_tokens=plan.answer)
    return LLM((draft, tokenizer)).generate([tokenizer.chat(QUESTIONS[1])], params)[0].text


def description(plan: Plan, best: dict[str, float], row: Row, made: list[Row], device: str) -> dict[str, Any]:
    """What the draft's file says of itself."""
    sizes = {r["name"]: r["tokens"] for r in made if r["kind"] in ("writing", "reading")}
    return {
        "command": f"llmcourse bench distill --device {device} --out FOLDER",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "target": f"{MODEL.title}, {MODEL.wheel}, SHA-256 {MODEL.sha256}",
        "licence": "Apache-2.0, as the target's: the embedding is cut from it",
        "data": f"{sizes['conversations']:,} tokens that the target wrote, and Shakespeare's plays but the "
        f"last {PLAYS_HELD_OUT}",
        "training": {
            **best,
            "steps": row["steps"],
            "tokens": row["tokens"],
            "plan": asdict(replace(plan, rates=())),
        },
    }


def _gpu(model: Transformer) -> bool:
    return model.device.type == "cuda"


def _wait(model: Transformer) -> None:
    if _gpu(model):
        torch.cuda.synchronize()
