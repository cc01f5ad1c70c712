"""Bytes that attention asks for, against the length of the sequence: formulas as lines, counts as dots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llmcourse.kernels.attention_naive import naive_bytes
from llmcourse.kernels.flash_attention import Plan, Sizes, bytes_moved, minimum_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTHS = tuple(2**n for n in range(6, 15))
COLOURS = ("#999999", "#8EC6EA", "#0072B2", "#E69F00", "#000000")


def tiles(block_m: int, block_n: int = 64) -> Plan:
    """A plan with these tiles in all three kernels."""
    return Plan.parse(" | ".join([f"pointer {block_m}x{block_n} w4 s1 h1"] * 3))


def sizes(length: int, head_dim: int, *, causal: bool = False) -> Sizes:
    """One head of `length` queries and keys in 16 bits."""
    return Sizes(1, 1, 1, length, length, head_dim, 2, causal)


def in_three_kernels(length: int, head_dim: int) -> int:
    """Bytes loaded and stored with the matrix of scores in memory."""
    return sum(naive_bytes(1, 1, length, length, head_dim, 2))


def in_one(length: int, head_dim: int, block_m: int, *, causal: bool = False) -> int:
    """Bytes loaded and stored in tiles of `block_m` queries."""
    return sum(bytes_moved(sizes(length, head_dim, causal=causal), tiles(block_m)))


def curves(head_dim: int, lengths: Sequence[int] = LENGTHS) -> dict[str, list[int]]:
    """Bytes of one head at each length, by what computes it."""
    return {
        "three kernels": [in_three_kernels(n, head_dim) for n in lengths],
        "one kernel, tiles of 64": [in_one(n, head_dim, 64) for n in lengths],
        "tiles of 128": [in_one(n, head_dim, 128) for n in lengths],
        "tiles of 128, causal": [in_one(n, head_dim, 128, causal=True) for n in lengths],
        "every tensor once": [minimum_bytes(sizes(n, head_dim)) for n in lengths],
    }


def draw(figure: Figure, head_dim: int, counted: Mapping[tuple[int, int], int]) -> None:
    """Draw the curves, and `counted` bytes by (length, anything) as dots."""
    ax = figure.subplots()
    for (name, values), colour in zip(curves(head_dim).items(), COLOURS, strict=True):
        style = "--" if name == "every tensor once" else "-"
        ax.loglog(LENGTHS, [n / 2**20 for n in values], style, color=colour, label=name)
    lengths = [length for length, _ in counted]
    ax.plot(lengths, [n / 2**20 for n in counted.values()], "o", color="black", markersize=4, label="counted")
    ax.set(xlabel="S, tokens", ylabel="MiB asked for by one head")
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.spines[["top", "right"]].set_visible(False)
