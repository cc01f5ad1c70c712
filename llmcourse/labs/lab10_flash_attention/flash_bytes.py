"""Exercise `flash_bytes`: what one pass of FlashAttention asks of memory, to the byte."""

from __future__ import annotations

from typing import Any

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.labs.lab10_flash_attention.reference import visible

flash_bytes = Exercise(
    "flash_bytes",
    title="What a tiled attention moves",
    arguments=("S", "T", "D", "block_m", "block_n", "causal", "itemsize"),
    shapes=(
        "S, T       numbers of queries and keys of one head, 1 ≤ S ≤ T;  D  head dim",
        "block_m    queries of a tile: a program loads them once and walks along the keys",
        "block_n    keys of a block: K and V of a block are loaded together; the last one may be partial",
        "causal     query i sees keys 0 … i + T − S; blocks of which no query of the tile sees a key are",
        "           skipped, all others are loaded whole (up to key T − 1)",
        "itemsize   bytes of an element of q, k, v and out; lse has 4 bytes a query",
        "returns    int: bytes loaded (q, k, v) and stored (out, lse) for this head",
    ),
    formula="(2·S·D + 2·D·Σ_tiles keys loaded)·itemsize + 4·S",
    difficulty=2,
    importance=4,
    minutes=20,
    points=3,
    hints=(
        "Write the answer without causal first: how often is q read, how often K and V? Then look at one "
        "tile: which of its queries sees the most keys, and in which block does the last of them lie?",
        "Not causal: ⌈S / block_m⌉ tiles, each of which loads all T rows of K and of V. Causal: the tile of "
        "queries a … b − 1 needs keys up to that of its last query, b − 1 + T − S, and loads whole blocks: "
        "round b + T − S up to a multiple of block_n, but not past T.",
        "keys = 0; for a in range(0, S, block_m): b = min(a + block_m, S); need = b + T - S if causal else "
        "T; keys += min(T, -(-need // block_n) * block_n). Then 2·S·D·itemsize for q and out, "
        "2·D·keys·itemsize for k and v, 4·S for lse.",
    ),
)


def expected(S: int, T: int, D: int, block_m: int, block_n: int, causal: bool, itemsize: int) -> int:
    """Counted from the mask itself: a block is loaded if any of its pairs is visible."""
    seen = visible(S, T, causal)
    keys = 0
    for a in range(0, S, block_m):
        for c in range(0, T, block_n):
            block = seen[a : a + block_m, c : c + block_n]
            keys += block.shape[1] * bool(block.any())
    return (2 * S * D + 2 * D * keys) * itemsize + 4 * S


def _agree(t: Trial, *args: Any) -> None:
    got = t.call(*args)
    t.holds(
        isinstance(got, int) and not isinstance(got, bool),
        f"the result is a {type(got).__name__}, expected an int",
        "// in the place of /, and -(-a // b) to round up.",
    )
    t.equal(got, expected(*args))


@flash_bytes.check("not causal: q, out and lse once, K and V once for each tile of queries")
def whole(t: Trial) -> None:
    _agree(t, 64, 64, 16, 16, 16, False, 2)
    _agree(t, 128, 512, 64, 32, 64, False, 4)


@flash_bytes.check("sizes that are no multiples of the blocks")
def odd(t: Trial) -> None:
    for _ in range(4):
        S = t.odd(33, 99)
        _agree(t, S, S + t.size(0, 70), 8 * t.size(2, 9), 16, 32, False, 2)
    _agree(t, 1, 1, 16, 64, 64, False, 2)


@flash_bytes.check("causal: blocks that no query of the tile sees are skipped, and only those")
def causal(t: Trial) -> None:
    for m, n in ((16, 16), (64, 16), (16, 64)):
        _agree(t, 256, 256, 64, m, n, True, 2)
        S = t.odd(65, 129)
        _agree(t, S, S, 32, m, n, True, 4)


@flash_bytes.check("causal behind a cache: T > S, down to a single query")
def cached(t: Trial) -> None:
    for S, T in ((1, t.odd(65, 129)), (t.odd(17, 31), t.odd(101, 191)), (16, 64)):
        _agree(t, S, T, 64, 16, 32, True, 2)


def right(
    S: int, T: int, D: int, block_m: int, block_n: int, causal: bool, itemsize: int, fault: str = ""
) -> int:
    """The loop that most solutions have, with one fault."""
    keys = 0
    for a in range(0, S // block_m * block_m if fault == "tiles" else S, block_m):
        b = min(a + block_m, S)
        need = T
        if causal and fault != "all":
            need = {"first": a + 1, "top_left": b - (T - S)}.get(fault, b) + T - S
        if fault == "exact":
            keys += need
        elif fault == "padded":
            keys += -(-need // block_n) * block_n
        elif fault == "down":
            keys += need // block_n * block_n
        else:
            keys += min(T, -(-need // block_n) * block_n)
    lse = {"no_lse": 0, "narrow": itemsize * S}.get(fault, 4 * S)
    passes = {"k_only": 1}.get(fault, 2)
    own = {"no_out": 1}.get(fault, 2)
    return (own * S * D + passes * D * keys) * itemsize + lse


@flash_bytes.mistake(
    says="K is counted and V is not",
    tries="twice the keys: a block of K and a block of V.",
    caught_by="whole",
)
def keys_only(S: Any, T: Any, D: Any, block_m: Any, block_n: Any, causal: Any, itemsize: Any) -> Any:
    return right(S, T, D, block_m, block_n, causal, itemsize, "k_only")


@flash_bytes.mistake(
    says="the output is not counted", tries="S·D·itemsize stored for out.", caught_by="whole"
)
def no_output(S: Any, T: Any, D: Any, block_m: Any, block_n: Any, causal: Any, itemsize: Any) -> Any:
    return right(S, T, D, block_m, block_n, causal, itemsize, "no_out")


@flash_bytes.mistake(says="lse is not counted", tries="4 bytes stored for each query.", caught_by="whole")
def no_lse(S: Any, T: Any, D: Any, block_m: Any, block_n: Any, causal: Any, itemsize: Any) -> Any:
    return right(S, T, D, block_m, block_n, causal, itemsize, "no_lse")


@flash_bytes.mistake(
    says="lse is counted in the format of the inputs, and it is float32",
    tries="4·S whatever itemsize is.",
    caught_by="whole",
)
def narrow_lse(S: Any, T: Any, D: Any, block_m: Any, block_n: Any, causal: Any, itemsize: Any) -> Any:
    return right(S, T, D, block_m, block_n, causal, itemsize, "narrow")


@flash_bytes.mistake(
    says="the S × T scores are counted too, which never leave the program",
    tries="what is loaded and stored: q, k, v, out, lse.",
    caught_by="whole",
)
def scores_too(S: Any, T: Any, D: Any, block_m: Any, block_n: Any, causal: Any, itemsize: Any) -> Any:
    return right(S, T, D, block_m, block_n, causal, itemsize) + S * T * itemsize


@flash_bytes.mistake(
    says="K and V are read once, as if all tiles of queries shared what one has loaded",
    tries="K and V for each tile: a program keeps nothing for the next.",
    caught_by="whole",
)
def read_once(S: Any, T: Any, D: Any, block_m: Any, block_n: Any, causal: Any, itemsize: Any) -> Any:
    return (2 * S * D + 2 * T * D) * itemsize + 4 * S


@flash_bytes.mistake(
    says="the number of tiles is rounded down",
    tries="-(-S // block_m): the last, partial tile reads keys as well.",
    caught_by="odd",
)
def tiles_rounded_down(S: Any, T: Any, D: Any, block_m: Any, block_n: Any, causal: Any, itemsize: Any) -> Any:
    return right(S, T, D, block_m, block_n, causal, itemsize, "tiles")


@flash_bytes.mistake(
    says="the last block is counted whole, though its lanes past T are masked and cost nothing",
    tries="min(T, …) for the keys that a tile loads.",
    caught_by="odd",
)
def padded(S: Any, T: Any, D: Any, block_m: Any, block_n: Any, causal: Any, itemsize: Any) -> Any:
    return right(S, T, D, block_m, block_n, causal, itemsize, "padded")


@flash_bytes.mistake(
    says="no block is skipped",
    tries="only the blocks up to the last key that the tile's last query sees.",
    caught_by="causal",
)
def nothing_skipped(S: Any, T: Any, D: Any, block_m: Any, block_n: Any, causal: Any, itemsize: Any) -> Any:
    return right(S, T, D, block_m, block_n, causal, itemsize, "all")


@flash_bytes.mistake(
    says="the tile's first query decides which blocks are loaded, and its last one sees more",
    tries="the last query of the tile, min(a + block_m, S) − 1.",
    caught_by="causal",
)
def first_query(S: Any, T: Any, D: Any, block_m: Any, block_n: Any, causal: Any, itemsize: Any) -> Any:
    return right(S, T, D, block_m, block_n, causal, itemsize, "first")


@flash_bytes.mistake(
    says="keys are counted one by one, and blocks are loaded whole",
    tries="rounding up to a multiple of block_n.",
    caught_by="causal",
)
def no_blocks(S: Any, T: Any, D: Any, block_m: Any, block_n: Any, causal: Any, itemsize: Any) -> Any:
    return right(S, T, D, block_m, block_n, causal, itemsize, "exact")


@flash_bytes.mistake(
    says="query i is taken to see keys 0 … i, though T − S keys lie in front of the first query's own",
    tries="i + T − S.",
    caught_by="cached",
)
def top_left(S: Any, T: Any, D: Any, block_m: Any, block_n: Any, causal: Any, itemsize: Any) -> Any:
    return right(S, T, D, block_m, block_n, causal, itemsize, "top_left")


@flash_bytes.alternative("a sum over the tiles")
def by_tiles(S: Any, T: Any, D: Any, block_m: Any, block_n: Any, causal: Any, itemsize: Any) -> Any:
    return right(S, T, D, block_m, block_n, causal, itemsize)


@flash_bytes.alternative("each block asked whether it is seen")
def by_blocks(S: Any, T: Any, D: Any, block_m: Any, block_n: Any, causal: Any, itemsize: Any) -> Any:
    total = S * (2 * D * itemsize + 4)
    for a in range(0, S, block_m):
        last = min(a + block_m, S) - 1 + T - S
        for c in range(0, T, block_n):
            if not causal or c <= last:
                total += 2 * D * itemsize * (min(c + block_n, T) - c)
    return total
