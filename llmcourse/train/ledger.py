"""Where the memory of a training step goes, predicted to the byte before anything is allocated.

    P parameters   N = B·S tokens   E width   q = Hq·D and kv = Hkv·D   F of the MLP   V vocabulary
    L blocks       c bytes a number of weights and activations

**Static**, there all the time: weights c·P; AdamW's two moments 8·P; float32 masters 4·P if c is 2.
**Gradients** c·P appear during the backward pass, from the last layer to the first (in accumulation they
stay). **Activations** appear during the forward pass and go during the backward pass. A block keeps, in
numbers a token,

    2·E   the stream at both norms          q + 2·kv   queries, keys, values before rotation: the values are a
    2·E   what the two norms give                      view of this storage, so that all of it stays
    q     what attention gives              q + kv     queries and keys after rotation
    2·F   gate and up                       2·F        silu(gate), and its product with up

and 4 bytes for each norm and query head (reciprocal root, log-sum-exp). The head keeps 2·E and, through the
cross-entropy, V log-probabilities.

The **peak** is the largest of three moments, not the sum of all: the loss (three tensors of N·V beside all
activations), the backward pass of a block (gradients so far, activations still there, and what the
block's MLP needs in passing, about 2·N·F), and the optimizer's step (all gradients, no activations). Which of
them it is decides which remedy helps.

For blocks of Llama's form: RMSNorm in one kernel, fused attention, SwiGLU, no biases. `device="cpu"` counts
what PyTorch's CPU kernels keep in float32, where a norm is made of several operations and keeps its quotient
as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmcourse.errors import ModelError, ShapeError
from llmcourse.models import ModelConfig
from llmcourse.notebook import Table
from llmcourse.train.checkpoint import segments


@dataclass(frozen=True)
class Setup:
    """A training step.

    itemsize     bytes of a weight, gradient and activation: 4, or 2 for bfloat16
    masters      float32 copies of the weights, which the optimizer steps
    every        blocks in a checkpointed piece; 0: all activations are kept
    fused_loss   the output head and the cross-entropy in chunks of rows, no logits for all tokens at once
    chunk_bytes  bytes of one chunk of logits
    accumulates  gradients of earlier micro-batches are there already
    """

    config: ModelConfig
    batch: int
    length: int
    itemsize: int = 4
    masters: bool = False
    every: int = 0
    fused_loss: bool = False
    chunk_bytes: int = 1 << 30
    accumulates: bool = False
    device: Literal["cuda", "cpu"] = "cuda"

    def __post_init__(self) -> None:
        c = self.config
        if set(c.kinds) != {"attention"} or c.mlp != "swiglu" or c.norm != "rms" or c.post_norm or c.qk_norm:
            raise ModelError(
                f"the ledger has no entries for the blocks of {c.name}.",
                "It lists what blocks of Llama's form keep: attention, SwiGLU, RMSNorm before each.",
                "saved_tensors, which counts what any model keeps.",
            )
        if self.itemsize not in (2, 4) or min(self.batch, self.length) < 1 or self.every < 0:
            raise ShapeError(
                f"batch {self.batch}, length {self.length}, {self.itemsize} bytes a number, "
                f"pieces of {self.every}.",
                "Sizes are positive, and numbers have 2 or 4 bytes.",
                "batch=8, length=1024, itemsize=2, every=0 or 1.",
            )
        if self.device == "cpu" and (self.itemsize != 4 or self.fused_loss):
            raise ModelError(
                "the CPU's entries are for float32 and the plain loss.",
                "Other formats take other paths through PyTorch's CPU kernels, and keep other copies.",
                'itemsize=4 and fused_loss=False, or device="cuda".',
            )

    @property
    def tokens(self) -> int:
        return self.batch * self.length


@dataclass(frozen=True)
class Ledger:
    """Predicted bytes: for each of three moments what is there, by name. The largest moment is the peak."""

    setup: Setup
    moments: dict[str, dict[str, int]]

    @property
    def totals(self) -> dict[str, int]:
        return {name: sum(parts.values()) for name, parts in self.moments.items()}

    @property
    def peak(self) -> int:
        return max(self.totals.values())

    @property
    def at(self) -> str:
        """The moment of the peak."""
        return max(self.totals, key=lambda name: self.totals[name])

    def table(self) -> Table:
        """Megabytes by name, a column for each moment."""
        names = dict.fromkeys(name for parts in self.moments.values() for name in parts)
        rows = [[n, *(f"{p.get(n, 0) / 1e6:,.1f}" for p in self.moments.values())] for n in names]
        rows.append(["together", *(f"{total / 1e6:,.1f}" for total in self.totals.values())])
        return Table(["MB at", *self.moments], rows)


def block_numbers(config: ModelConfig, *, device: str = "cuda") -> int:
    """Numbers that one block keeps of a token, without the 4-byte odds and ends."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    norms = 2 * config.d_model * (device == "cpu")  # the quotient x / rms, which a fused kernel recomputes
    return 4 * config.d_model + norms + (q + 2 * kv) + (q + kv) + q + 4 * config.d_ff


def block_bytes(setup: Setup) -> int:
    """Bytes that the backward pass of one block needs, its input included."""
    small = 4 * (2 + setup.config.n_heads)
    return setup.tokens * (setup.itemsize * block_numbers(setup.config, device=setup.device) + small)


def border_bytes(setup: Setup) -> int:
    """Bytes of a block's input."""
    return setup.tokens * setup.config.d_model * setup.itemsize


def ledger(setup: Setup) -> Ledger:
    """The bill of one training step (forward, backward, AdamW) in steady state."""
    config, c, n = setup.config, setup.itemsize, setup.tokens
    block = config.d_model * (2 * config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    block += 3 * config.d_model * config.d_ff + 2 * config.d_model  # parameters of a block
    head = config.vocab_size * config.d_model  # and of the output head
    static = {"weights": c * config.n_params, "AdamW's moments": 8 * config.n_params}
    if setup.masters:
        static["float32 masters"] = 4 * config.n_params
    gradients = c * config.n_params
    there = gradients if setup.accumulates else 0
    shared = 2 * 8 * n + 2 * n * config.head_dim * c  # tokens and targets in int64; rotary tables

    border, inside = border_bytes(setup), block_bytes(setup)
    pieces = segments(config.n_layers, setup.every or max(1, config.n_layers))
    borders = len(pieces) * border if setup.every else 0
    kept = borders if setup.every else config.n_layers * inside
    loss = static | {
        "gradients": there,
        "kept by the blocks": kept + shared,
        "head and loss": _loss(setup, head),
    }

    backward: dict[str, int] = {}
    # A block going backward: its MLP's last product has gone, three gradients of that size are there.
    passing = n * c * 2 * config.d_ff + 2 * border + c * config.d_model * config.d_ff
    for number, piece in enumerate(pieces):
        for i in piece:
            done = config.n_layers - 1 - i  # blocks that have gone backward
            so_far = there or c * (head + done * block)
            alive = (number * border if setup.every else 0) + (i - piece.start + 1) * inside
            found = static | {
                "gradients": so_far,
                "kept by the blocks": alive + shared,
                "in passing": passing,
            }
            backward = max(backward, found, key=lambda parts: sum(parts.values()))
    step = gradients if not setup.masters else max(gradients, 4 * config.n_params)
    moments = {
        "the loss": loss,
        "a block's backward": backward,
        "the optimizer": static | {"gradients": step},
    }
    return Ledger(setup, moments)


def _loss(setup: Setup, head: int) -> int:
    """Bytes of the last norm, the output head and the cross-entropy at their worst."""
    config, c, n = setup.config, setup.itemsize, setup.tokens
    stream = (2 + (setup.device == "cpu")) * border_bytes(setup) + 4 * n
    if not setup.fused_loss:
        # log-probabilities, their gradient, the gradient of the logits
        return stream + 3 * n * config.vocab_size * c
    rows = min(n, max(1, setup.chunk_bytes // (config.vocab_size * c)))
    # dx, and dW summed in float32; a chunk of logits while they are made
    return stream + border_bytes(setup) + 4 * head + rows * config.vocab_size * c
