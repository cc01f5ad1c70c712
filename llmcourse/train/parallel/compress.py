"""What CocktailSGD sends: a few of the moves, in a few bits each (Wang et al. 2023, PMLR 202:36058).

Three savings are stacked, each on what the one before has left:

    random sparsification   only a tenth of the weights is looked at in a step; which tenth follows from a
                            seed that all workers share, so no index is sent, and every weight has its turn
    top-k                   of these, the fifth that moved most; one bit for each says which they are
    quantisation            their moves in 4 bits each, with a 16-bit scale for every bucket of 128

    0.1 · (0.2 · (4 + 16/128) + 1) = 0.18 bits a weight, where float32 has 32

Sizes follow from the settings alone, so that sender and receiver know them and collectives can carry packets.
What is left out is not lost: `parallel.cocktail` says who keeps it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcourse.errors import ShapeError

SCALE = torch.bfloat16  # a bucket's scale on the wire; it has the range of float32, so nothing overflows


@dataclass(frozen=True)
class Cocktail:
    """How much of a move is sent: random share of the weights, top share of those, bits a value.

    bits     2 to 8, or 32 for values as they are
    bucket   values that share a scale
    delay    steps that an average may be late: 1 overlaps sending with the next step, 0 waits for it
    feedback False forgets what was not sent, for comparison
    """

    random: float = 0.1
    top: float = 0.2
    bits: int = 4
    bucket: int = 128
    delay: int = 1
    feedback: bool = True

    def __post_init__(self) -> None:
        if not (0 < self.random <= 1 and 0 < self.top <= 1):
            raise ShapeError(
                f"a random share of {self.random} and a top share of {self.top}.",
                "Each is the part that is kept, above 0 and at most 1 (everything).",
                "random = 0.1 and top = 0.2, as in the paper.",
            )
        if self.bits not in (*range(2, 9), 32) or self.bucket < 1 or self.delay not in (0, 1):
            raise ShapeError(
                f"bits = {self.bits}, bucket = {self.bucket}, delay = {self.delay}.",
                "Values have 2 to 8 bits (or 32, unquantised), buckets hold at least one, and an average is "
                "in time (0) or one step late (1).",
                "bits = 4, bucket = 128, delay = 1.",
            )

    @property
    def rounds(self) -> int:
        """Steps after which every weight has been looked at once."""
        return math.ceil(1 / self.random - 1e-9)

    def kept(self, sampled: int) -> int:
        """Of that many sampled moves, how many are sent: at least one."""
        return max(1, round(self.top * sampled)) if sampled else 0

    def nbytes(self, sampled: int) -> int:
        """Bytes of a packet about that many sampled moves, header-free: sizes follow from the settings."""
        kept = self.kept(sampled)
        mask = 0 if kept == sampled else math.ceil(sampled / 8)
        scales = 0 if self.bits == 32 else 2 * math.ceil(kept / self.bucket)
        return mask + scales + math.ceil(kept * self.bits / 8)

    def bits_per_weight(self, weights: int) -> float:
        """Bits that one worker sends, one way, for each weight in a step."""
        sampled = -(-weights // self.rounds)
        return 8 * self.nbytes(sampled) / weights


DENSE = Cocktail(random=1.0, top=1.0, bits=32, delay=0)
"""Nothing left out: the moves themselves, in float32."""


PAPER = Cocktail()
"""A tenth at random, the fifth of it that moved most, 4 bits: the setting that Wang et al. train with."""


class Sampler:
    """Which weights a step looks at. Every weight once in `rounds` steps, in an order drawn from the seed."""

    def __init__(self, weights: int, rounds: int, seed: int) -> None:
        self.weights, self.rounds, self.seed = weights, rounds, seed
        self._round: tuple[int, Tensor] = (-1, torch.empty(0))  # replaced whole: two threads may ask

    def at(self, step: int) -> Tensor:
        """Sorted positions: those of slice step % rounds of the permutation that this round has drawn."""
        if self.rounds == 1:
            return torch.arange(self.weights)
        number, part = divmod(step, self.rounds)
        drawn, order = self._round
        if drawn != number:
            generator = torch.Generator().manual_seed((self.seed << 24) + number)
            order = torch.randperm(self.weights, generator=generator)
            self._round = (number, order)
        size = -(-self.weights // self.rounds)
        return order[part * size : (part + 1) * size].sort().values


# ---------------------------------------------------------------- one packet


def compress(moves: Tensor, how: Cocktail) -> Tensor:
    """The moves that matter most, as bytes: uint8 [how.nbytes(len(moves))].

    mask of the kept positions, a bit each │ scales, bfloat16 │ values, `bits` each

    moves   float32 [n]
    """
    n = len(moves)
    k = how.kept(n)
    if k == n:
        values, parts = moves, []
    else:
        mask = torch.zeros(n, dtype=torch.bool, device=moves.device)
        mask[moves.abs().topk(k).indices] = True
        values, parts = moves[mask], [pack(mask, 1)]
    if how.bits == 32:
        parts.append(values.contiguous().view(torch.uint8))
    else:
        numbers, scales = quantise(values, how.bits, how.bucket)
        parts += [scales.view(torch.uint8), pack(numbers, how.bits)]
    return torch.cat(parts)


def decompress(packet: Tensor, n: int, how: Cocktail) -> Tensor:
    """float32 [n]: the moves that were sent, 0 for the others."""
    if len(packet) != how.nbytes(n):
        raise ShapeError(
            f"a packet of {len(packet):,} bytes for {n:,} moves.",
            f"With these settings it has {how.nbytes(n):,} bytes: sender and receiver disagree.",
            "the same Cocktail settings and the same number of weights on every worker.",
        )
    k, moves = how.kept(n), torch.zeros(n, device=packet.device)
    mask = torch.ones(n, dtype=torch.bool, device=packet.device)
    if k < n:
        bits, packet = packet[: math.ceil(n / 8)], packet[math.ceil(n / 8) :]
        mask = unpack(bits, 1, n).bool()
    if how.bits == 32:
        moves[mask] = packet.clone().view(torch.float32)
    else:
        cut = 2 * math.ceil(k / how.bucket)
        scales = packet[:cut].clone().view(SCALE)
        moves[mask] = dequantise(unpack(packet[cut:], how.bits, k), scales, how.bits, how.bucket)
    return moves


def quantise(values: Tensor, bits: int, bucket: int) -> tuple[Tensor, Tensor]:
    """Each bucket's values as whole numbers 0 … 2^bits − 2 of a grid that reaches from −max to +max.

    The grid has a point at 0 and is symmetric, so that rounding has no bias towards a sign.

    Returns   (numbers, uint8 [n]; scales, bfloat16 [⌈n / bucket⌉]: the step of each bucket's grid)
    """
    top = 2 ** (bits - 1) - 1
    padded = F.pad(values, (0, -len(values) % bucket)).view(-1, bucket)
    scales = (padded.abs().amax(1) / top).to(SCALE)
    # The step is the rounded scale, which the receiver will multiply by.
    step = scales.float().clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    numbers = ((padded / step).round().clamp(-top, top) + top).to(torch.uint8)
    return numbers.view(-1)[: len(values)], scales


def dequantise(numbers: Tensor, scales: Tensor, bits: int, bucket: int) -> Tensor:
    """The values on the grid that `quantise` chose, float32 [n]."""
    top = 2 ** (bits - 1) - 1
    return (numbers.float() - top) * scales.float().repeat_interleave(bucket)[: len(numbers)]


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Whole numbers below 2^bits, 8 bits at most, bit after bit: uint8 [⌈n · bits / 8⌉]."""
    places = torch.arange(8, dtype=torch.uint8, device=numbers.device)
    one_by_one = ((numbers.to(torch.uint8)[:, None] >> places[:bits]) & 1).flatten()
    padded = F.pad(one_by_one, (0, -len(one_by_one) % 8)).view(-1, 8)
    return (padded << places[:8]).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The n numbers of `pack`, uint8 [n]."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    one_by_one = ((packed[:, None] >> places) & 1).flatten()[: n * bits]
    return (one_by_one.view(n, bits) << places[:bits]).sum(1, dtype=torch.uint8)
