"""Exercise `bpe_merges`: which pairs a byte-pair encoding merges, in order."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from typing import Any

from llmcourse.grading.compare import Mismatch
from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial

Words = dict[tuple[int, ...], int]

bpe_merges = Exercise(
    "bpe_merges",
    title="Learn the merges",
    arguments=("words", "first", "count"),
    shapes=(
        "words    dict: a word as a tuple of token ids → how often it stands in the text",
        "first    the id of the first new token; the next one is first + 1, …",
        "count    new tokens wanted; fewer are made where no two tokens stand beside each other any more",
        "returns  list of pairs (a, b) of ids, in the order in which they were merged",
        "         the pair that stands most often is merged, of equally frequent ones the smallest (a, b);",
        "         (5, 5, 5) holds (5, 5) twice, and becomes (new, 5): from left to right",
        "         words are never joined, and the caller's dict stays as it is",
    ),
    formula="(a, b) = argmax over pairs of Σ_words count(word) · times the pair stands in the word",
    difficulty=3,
    importance=4,
    minutes=30,
    points=5,
    hints=(
        "Do it by hand for {(1, 2, 1, 2): 3, (1, 2): 1} with first = 9. Which pair leads, and by how much? "
        "What do the words look like after it?",
        "A loop that makes one merge a turn: count all pairs, every word as often as it stands; take the "
        "best; write every word anew with the pair replaced, left to right. The next turn counts the new "
        "words. For ties, min over (−count, pair) is one comparison.",
        "a, b = min(pairs, key=lambda p: (-pairs[p], p)); then rewrite each word with an index i that moves "
        "by 2 where (word[i], word[i + 1]) == (a, b), and by 1 elsewhere.",
    ),
)


def merged(word: tuple[int, ...], pair: tuple[int, int], new: int) -> tuple[int, ...]:
    out, i = [], 0
    while i < len(word):
        if word[i : i + 2] == pair:
            out.append(new)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return tuple(out)


def pairs_of(words: Words) -> Counter[tuple[int, int]]:
    pairs: Counter[tuple[int, int]] = Counter()
    for word, n in words.items():
        for pair in pairwise(word):
            pairs[pair] += n
    return pairs


def expected(words: Words, first: int, count: int) -> list[tuple[int, int]]:
    """By the definition: everything counted afresh for each merge."""
    merges: list[tuple[int, int]] = []
    while len(merges) < count and (pairs := pairs_of(words)):
        best = min(pairs, key=lambda p: (-pairs[p], p))
        again: Counter[tuple[int, ...]] = Counter()
        for word, n in words.items():
            again[merged(word, best, first + len(merges))] += n
        words = dict(again)
        merges.append(best)
    return merges


def _agree(t: Trial, words: Words, first: int, count: int) -> None:
    want = expected(words, first, count)
    got = t.call(dict(words), first, count)
    if got is None:
        raise Mismatch("the result is None, expected a list of pairs: is a `return` missing?")
    pairs = isinstance(got, list | tuple) and all(
        isinstance(p, list | tuple) and len(p) == 2 and all(isinstance(i, int) for i in p) for p in got
    )
    t.holds(pairs, "the result is no list of pairs of ids, such as [(1, 2), (9, 3)]")
    have = [tuple(p) for p in got]
    for i, (mine, right) in enumerate(zip(have, want, strict=False)):
        if mine != right:
            before = f" after {want[:i]}" if i else ""
            raise Mismatch(
                f"merge {i} is {mine}, expected {right}{before}; words {_shown(words)}, first {first}"
            )
    t.holds(
        len(have) == len(want),
        f"{len(have)} merges, expected {len(want)}; words {_shown(words)}, first {first}, count {count}",
    )


def _shown(words: Words) -> str:
    text = str(words)
    return text if len(text) < 160 else f"{text[:150]}… ({len(words)} in all)"


def _draw(t: Trial, words: int, letters: int, longest: int = 7) -> Words:
    found: Words = {}
    for _ in range(words):
        length = t.size(1, longest)
        found[tuple(int(i) for i in t.integers(0, letters, length))] = t.size(1, 20)
    return found


@bpe_merges.check("the first merge is the pair that stands most often in the text")
def most_frequent(t: Trial) -> None:
    n = t.size(3, 8)
    _agree(t, {(7, 4): 2 * n, (4, 7): n, (2, 3, 1): n - 1}, 9, 1)
    # (3, 1) stands in more words, (1, 2) more often.
    _agree(t, {(0, 3, 1): 1, (2, 3, 1): 1, (3, 1): 1, (1, 2): 3 + n}, 9, 1)


@bpe_merges.check("a pair counts as often as it stands, also within one word")
def within_a_word(t: Trial) -> None:
    _agree(t, {(1, 2, 1, 2, 1, 2): 2, (3, 4): 5}, 9, 1)
    _agree(t, {(5, 5, 5): 4, (6, 7): 7}, 9, 1)


@bpe_merges.check("of equally frequent pairs the smallest is merged")
def ties(t: Trial) -> None:
    n = t.size(2, 9)
    _agree(t, {(8, 3): n, (3, 9): n, (3, 8): n}, 12, 3)
    _agree(t, {(5, 1): n, (1, 5): n}, 12, 2)


@bpe_merges.check("a new token takes part in the merges after it")
def grows(t: Trial) -> None:
    n = t.size(4, 9)
    _agree(t, {(1, 2, 3, 4): n, (3, 1): 2}, 30, 3)
    _agree(t, {(1, 2, 3): n, (3, 1, 2): 3, (7, 8): n}, 30, 4)


@bpe_merges.check("a pair is replaced everywhere, from left to right")
def left_to_right(t: Trial) -> None:
    _agree(t, {(5, 5, 5): 9, (5, 6): 4, (6, 5): 1}, 20, 3)
    _agree(t, {(1, 2, 3, 1, 2): 6, (2, 3): 3, (3, 1): 1}, 20, 4)


@bpe_merges.check("words stay apart, and nothing is merged once each is one token")
def ends(t: Trial) -> None:
    _agree(t, {(1,): 50, (2,): 40, (1, 2): 1}, 5, 10)
    _agree(t, {(3,): 7}, 5, 4)
    _agree(t, {}, 5, 4)
    _agree(t, {(1, 2): 3}, 5, 0)


@bpe_merges.check("any text: as many merges as asked for, in the right order")
def any_text(t: Trial) -> None:
    _agree(t, _draw(t, 40, 6), 6, 25)
    _agree(t, _draw(t, 25, 3, 12), 100, 30)
    _agree(t, _draw(t, 12, 20), 50, 200)


@bpe_merges.check("the caller's words stay as they were")
def untouched(t: Trial) -> None:
    _agree(t, _draw(t, 10, 4), 4, 5)
    t.unchanged()


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def _learn(
    words: Words,
    first: int,
    count: int,
    *,
    pairs: Any = pairs_of,
    best: Any = lambda p, n: (-n, p),
    rewrite: Any = merged,
    new: Any = lambda first, done: first + done,
    least: int = 1,
) -> list[tuple[int, int]]:
    """The right loop with one part of it replaced."""
    merges: list[tuple[int, int]] = []
    while len(merges) < count:
        found = pairs(words)
        if not found:
            break
        pair = min(found, key=lambda p: best(p, found[p]))
        if found[pair] < least:
            break
        again: Counter[tuple[int, ...]] = Counter()
        for word, n in words.items():
            again[tuple(rewrite(word, pair, new(first, len(merges))))] += n
        words = dict(again)
        merges.append(pair)
    return merges


@bpe_merges.mistake(
    says="every word counts once, however often it stands in the text",
    tries="pairs[pair] += n, n being the word's count.",
    caught_by="most_frequent",
)
def words_once(words: Any, first: Any, count: Any) -> Any:
    return _learn(words, first, count, pairs=lambda ws: pairs_of(dict.fromkeys(ws, 1)))


@bpe_merges.mistake(
    says="a pair counts once in a word, also where it stands there several times",
    tries="a loop over all neighbours of the word, not over a set of them.",
    caught_by="within_a_word",
)
def pairs_once(words: Any, first: Any, count: Any) -> Any:
    def pairs(ws: Words) -> Counter[tuple[int, int]]:
        found: Counter[tuple[int, int]] = Counter()
        for word, n in ws.items():
            for pair in set(pairwise(word)):
                found[pair] += n
        return found

    return _learn(words, first, count, pairs=pairs)


@bpe_merges.mistake(
    says="pairs that overlap are counted once: (5, 5, 5) as one (5, 5)",
    tries="zip(word, word[1:]): all neighbours.",
    caught_by="within_a_word",
)
def no_overlap(words: Any, first: Any, count: Any) -> Any:
    def pairs(ws: Words) -> Counter[tuple[int, int]]:
        found: Counter[tuple[int, int]] = Counter()
        for word, n in ws.items():
            i = 0
            while i + 1 < len(word):
                found[word[i], word[i + 1]] += n
                i += 2 if word[i : i + 3] == (word[i],) * 3 else 1
        return found

    return _learn(words, first, count, pairs=pairs)


@bpe_merges.mistake(
    says="of equally frequent pairs the one that was seen first is merged",
    tries="min(pairs, key=lambda p: (-pairs[p], p)), or max with the pair's negative ids.",
    caught_by="ties",
)
def first_seen(words: Any, first: Any, count: Any) -> Any:
    return _learn(words, first, count, best=lambda p, n: -n)


@bpe_merges.mistake(
    says="of equally frequent pairs the largest is merged",
    tries="(-count, pair) under min; max over (count, pair) takes the largest pair.",
    caught_by="ties",
)
def largest(words: Any, first: Any, count: Any) -> Any:
    return _learn(words, first, count, best=lambda p, n: (-n, -p[0], -p[1]))


@bpe_merges.mistake(
    says="the words are never rewritten: these are the most frequent pairs of the text as it was",
    tries="replacing the pair in every word before the next count.",
    caught_by="grows",
)
def never_rewritten(words: Any, first: Any, count: Any) -> Any:
    found = pairs_of(words)
    return sorted(found, key=lambda p: (-found[p], p))[:count]


@bpe_merges.mistake(
    says="every merge makes the token `first`: the new tokens are one and the same",
    tries="first + len(merges) for the new token's id.",
    caught_by="grows",
)
def one_token(words: Any, first: Any, count: Any) -> Any:
    return _learn(words, first, min(count, 50), new=lambda first, done: first)


@bpe_merges.mistake(
    says="the ids of new tokens begin at first + 1",
    tries="first + len(merges) before the merge is appended.",
    caught_by="grows",
)
def ids_late(words: Any, first: Any, count: Any) -> Any:
    return _learn(words, first, count, new=lambda first, done: first + done + 1)


@bpe_merges.mistake(
    says="a pair is replaced at its first place in a word only",
    tries="going on behind the replaced pair to the word's end.",
    caught_by="left_to_right",
)
def first_place(words: Any, first: Any, count: Any) -> Any:
    def rewrite(word: tuple[int, ...], pair: tuple[int, int], new: int) -> tuple[int, ...]:
        for i in range(len(word) - 1):
            if word[i : i + 2] == pair:
                return (*word[:i], new, *word[i + 2 :])
        return word

    return _learn(words, first, count, rewrite=rewrite)


@bpe_merges.mistake(
    says="pairs are replaced from right to left: (5, 5, 5) becomes (5, new)",
    tries="an index that starts at 0.",
    caught_by="left_to_right",
)
def right_to_left(words: Any, first: Any, count: Any) -> Any:
    def rewrite(word: tuple[int, ...], pair: tuple[int, int], new: int) -> tuple[int, ...]:
        return merged(word[::-1], pair[::-1], new)[::-1]

    return _learn(words, first, count, rewrite=rewrite)


@bpe_merges.mistake(
    says="(a, b) and (b, a) are counted as one pair",
    tries="the pair as it stands, in its order.",
    caught_by="most_frequent",
)
def unordered(words: Any, first: Any, count: Any) -> Any:
    def pairs(ws: Words) -> Counter[tuple[int, int]]:
        found: Counter[tuple[int, int]] = Counter()
        for (a, b), n in pairs_of(ws).items():
            found[min(a, b), max(a, b)] += n
        return found

    return _learn(words, first, min(count, 60), pairs=pairs)


@bpe_merges.mistake(
    says="the last token of a word and the first of the next are taken for a pair",
    tries="pairs within each word; words never grow together.",
    caught_by="most_frequent",
)
def across_words(words: Any, first: Any, count: Any) -> Any:
    if not words:
        return []
    text = [i for word in words for i in word]
    return _learn({tuple(text): max(words.values())}, first, count)


@bpe_merges.mistake(
    says="pairs that stand only once are not merged any more",
    tries="merging as long as there is any pair, and fewer than `count` are made.",
    caught_by="ends",
)
def at_least_twice(words: Any, first: Any, count: Any) -> Any:
    return _learn(words, first, count, least=2)


@bpe_merges.mistake(
    says="nothing stops the loop when no pair is left",
    tries="breaking off where there are no pairs.",
    caught_by="ends",
)
def no_end(words: Any, first: Any, count: Any) -> Any:
    def pairs(ws: Words) -> Counter[tuple[int, int]]:
        if found := pairs_of(ws):
            return found
        raise ValueError("min() iterable argument is empty")

    return _learn(words, first, count, pairs=pairs)


@bpe_merges.mistake(
    says="the caller's dict is rewritten in place",
    tries="words = dict(words) before anything is changed.",
    caught_by="untouched",
)
def in_place(words: Any, first: Any, count: Any) -> Any:
    found = _learn(words, first, count)
    for i, pair in enumerate(found):
        for word in list(words):
            n = words.pop(word)
            words[merged(word, pair, first + i)] = n
    return found


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@bpe_merges.alternative("lists of ids, rewritten in place, in copies")
def lists(words: Any, first: Any, count: Any) -> Any:
    texts = [(list(word), n) for word, n in words.items()]
    merges: list[tuple[int, int]] = []
    for new in range(first, first + count):
        totals: dict[tuple[int, int], int] = {}
        for word, n in texts:
            for i in range(len(word) - 1):
                key = (word[i], word[i + 1])
                totals[key] = totals.get(key, 0) + n
        if not totals:
            break
        most = max(totals.values())
        a, b = sorted(key for key, n in totals.items() if n == most)[0]
        for word, _ in texts:
            i = 0
            while i < len(word) - 1:
                if word[i] == a and word[i + 1] == b:
                    word[i : i + 2] = [new]
                i += 1
        merges.append((a, b))
    return merges


@bpe_merges.alternative(
    "words as text, pairs replaced by a regular expression, as in Sennrich et al.'s listing"
)
def by_regex(words: Any, first: Any, count: Any) -> Any:
    texts = {" " + " ".join(f"<{i}>" for i in word) + " ": n for word, n in words.items()}
    merges: list[list[int]] = []
    while len(merges) < count:
        totals: Counter[tuple[int, int]] = Counter()
        for text, n in texts.items():
            ids = [int(i) for i in re.findall(r"\d+", text)]
            for pair in pairwise(ids):
                totals[pair] += n
        if not totals:
            break
        a, b = min(totals, key=lambda p: (-totals[p], p))
        new = f" <{first + len(merges)}>"
        texts = {re.sub(f" <{a}> <{b}>(?= )", new, text): n for text, n in texts.items()}
        merges.append([a, b])
    return merges


@bpe_merges.alternative("counts kept from merge to merge; only words that have the pair are looked at")
def incremental(words: Any, first: Any, count: Any) -> Any:
    spelled, weights = [tuple(w) for w in words], list(words.values())
    totals = pairs_of(words)
    where: dict[tuple[int, int], set[int]] = {}
    for k, word in enumerate(spelled):
        for pair in pairwise(word):
            where.setdefault(pair, set()).add(k)
    merges: list[tuple[int, int]] = []
    while len(merges) < count:
        alive = [(-n, pair) for pair, n in totals.items() if n > 0]
        if not alive:
            break
        pair = min(alive)[1]
        for k in where.pop(pair):
            for old in pairwise(spelled[k]):
                totals[old] -= weights[k]
            spelled[k] = merged(spelled[k], pair, first + len(merges))
            for now in pairwise(spelled[k]):
                totals[now] += weights[k]
                where.setdefault(now, set()).add(k)
        merges.append(pair)
    return merges
