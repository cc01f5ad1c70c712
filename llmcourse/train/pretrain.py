"""Pre-training from raw text to a model that writes: tokenizer, stream of tokens, transformer, run.

    python -m llmcourse.train.pretrain --folder runs/first

Kill it whenever you like: the same line goes on from the last checkpoint, and ends with the weights, bit for
bit, that a run nobody disturbed would have ended with (on the same machine with as many threads).

Losses of models with different tokenizers do not compare: a token that stands for more text is harder to
guess. What compares is nats per *byte* of text, the loss a token divided by the bytes a token (on the
held-out text).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from llmcourse.bench.records import Record, recorded
from llmcourse.errors import UnknownNameError
from llmcourse.models import ModelConfig, Transformer
from llmcourse.text.bpe import BPE
from llmcourse.train import schedules
from llmcourse.train.fit import build
from llmcourse.train.loop import Trainer
from llmcourse.train.optim import decay_groups
from llmcourse.train.precision import PRECISIONS
from llmcourse.train.sft import CHATML
from llmcourse.train.stream import TokenStream


@dataclass(frozen=True)
class Plan:
    """All that a pre-training run is made of.

    plays         of Shakespeare's 38;  vocab_size: of the tokenizer trained on nine tenths of them
    width … length  of the model: features, layers, heads, features of an MLP, tokens of context
    batch, steps, lr, warmup, weight_decay, seed   of the training
    precision     one of `precision.PRECISIONS` whose weights stay in float32
    """

    plays: int = 4
    vocab_size: int = 512
    width: int = 64
    layers: int = 2
    heads: int = 4
    d_ff: int = 160
    length: int = 32
    batch: int = 32
    steps: int = 200
    lr: float = 1e-2
    warmup: int = 20
    weight_decay: float = 0.1
    precision: str = "float32"
    seed: int = 0

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=self.vocab_size,
            d_model=self.width,
            n_layers=self.layers,
            n_heads=self.heads,
            n_kv_heads=self.heads,
            head_dim=self.width // self.heads,
            d_ff=self.d_ff,
            max_len=self.length,
            name=f"GPT of {self.layers} × {self.width}",
        )

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.length


PLANS = {
    "ci": Plan(),
    "full": Plan(
        plays=38,
        vocab_size=4096,
        width=512,
        layers=8,
        heads=8,
        d_ff=1376,
        length=512,
        batch=64,
        steps=600,
        lr=1e-3,
        warmup=60,
        precision="bfloat16 autocast",
    ),
}
"""ci: seconds on two cores. full: 17 s of training on an H100, and 1.5 minutes more where it is compiled."""


def gpu_plan(steps: int | None = None) -> Plan:
    """The plan `full` as the GPU at hand can run it, of that many steps.

    Before Ampere (compute capability 8) there is no bfloat16 arithmetic, and such a GPU has less memory too:
    float32, and a quarter of the batch.
    """
    plan = PLANS["full"] if steps is None else replace(PLANS["full"], steps=steps)
    if torch.cuda.get_device_capability() >= (8, 0):
        return plan
    return replace(plan, precision="float32", batch=plan.batch // 4)


@dataclass(frozen=True)
class Corpus:
    """A text in tokens. The last tenth is held out: neither the tokenizer nor the model learns from it."""

    tokenizer: BPE
    train: Tensor
    held_out: Tensor
    bytes_per_token: float


def read_plays(count: int) -> str:
    """The first `count` plays by name, without the blanks with which Markdown ends a line of verse."""
    from llmcourse.assets import play_paths

    lines = "\n".join(path.read_text() for path in play_paths()[:count]).splitlines()
    return "\n".join(line.rstrip() for line in lines)


def corpus(text: str, vocab_size: int, *, special: Sequence[str] = CHATML.special) -> Corpus:
    """A tokenizer trained on nine tenths of `text`, and both parts in its tokens.

    special   control tokens to keep room for: the text has none, fine-tuning will
    """
    cut = len(text) * 9 // 10
    tokenizer = BPE.train(text[:cut], vocab_size, special=special)
    train, held_out = (torch.tensor(tokenizer.encode(part)) for part in (text[:cut], text[cut:]))
    return Corpus(tokenizer, train, held_out, len(text[cut:].encode()) / len(held_out))


def trainer_of(
    plan: Plan, data: Corpus, *, device: str = "cpu", forward: Any = None, tests: int = 8
) -> Trainer:
    """A run at its beginning.

    forward   what to do to the model that the loss is taken of (torch.compile), the weights being shared
    tests     held-out batches
    """
    config = replace(plan.config, vocab_size=data.tokenizer.vocab_size)
    model = build(Transformer, config, seed=plan.seed).to(device)
    stream = partial(TokenStream, batch=plan.batch, length=plan.length, device=device)
    optimizer = torch.optim.AdamW(
        decay_groups(model, plan.weight_decay), lr=plan.lr, betas=(0.9, 0.95), fused=device == "cuda"
    )
    return Trainer(
        model,
        stream(data.train, seed=plan.seed),
        optimizer,
        schedule=lambda step: schedules.cosine(step, plan.steps, warmup=plan.warmup, floor=0.1),
        precision=PRECISIONS[plan.precision],
        held_out=tuple(islice(stream(data.held_out, seed=10**6), tests)),
        forward=forward(model) if forward else None,
    )


def on_gpu(name: str) -> Record | None:
    """The record of benchmark `name` on a GPU; None, said in a line, where none has been taken."""
    try:
        return recorded(name, device="nvidia")
    except UnknownNameError as error:
        print(f"Not recorded: {error.what} Take it with {error.fix}")
        return None


@torch.no_grad()
def write(
    model: nn.Module,
    tokenizer: BPE,
    prompt: str,
    *,
    tokens: int,
    seed: int = 0,
    temperature: float = 0.8,
    context: int = 64,
) -> str:
    """`prompt` and that many tokens more, drawn from what the model says; it sees the last `context`."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([tokenizer.encode(prompt)], device=device)
    for _ in range(tokens):
        p = (model(ids[:, -context:])[0, -1].float().cpu() / temperature).softmax(-1)
        ids = torch.cat((ids, torch.multinomial(p, 1, generator=generator)[None].to(device)), dim=1)
    return tokenizer.decode(ids[0].tolist())


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llmcourse.train.pretrain", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--folder", required=True, help="where checkpoints go, and are looked for")
    parser.add_argument("--scale", choices=sorted(PLANS), default="ci")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, help="go on until this step (the schedule stays)")
    parser.add_argument("--save-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--threads", type=int, help="PyTorch's CPU threads")
    parser.add_argument("--plain", action="store_true", help="print a line a step in place of the bar")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    plan = gpu_plan() if (args.scale, args.device) == ("full", "cuda") else PLANS[args.scale]
    run = trainer_of(plan, corpus(read_plays(plan.plays), plan.vocab_size), device=args.device)
    run.run(
        args.steps or plan.steps,
        folder=args.folder,
        save_every=args.save_every,
        progress=not args.plain,
        on_step=(lambda t: print("step", t.step, flush=True)) if args.plain else None,
    )
    held_out = run.curve.held_out[-1][1]
    print(f"step {run.step}: loss {run.curve.loss[-1]:.4f}, held out {held_out:.4f} nats a token")


if __name__ == "__main__":
    main()
