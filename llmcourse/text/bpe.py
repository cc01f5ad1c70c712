"""Byte-pair encoding, trained from scratch: merge the most frequent pair, again and again.

    l o w   l o w e r   n e w        the text in bytes, words apart, with their counts
    lo w    lo w e r    n e w        (l, o) stands twice: merged, it is a token of its own
    low     low e r     n e w        (lo, w) stands twice …

Compression (Gage 1994) became a tokenizer when Sennrich et al. 2016 (arXiv:1508.07909) stopped it at a
vocabulary size; GPT-2 (Radford et al. 2019) began with the 256 bytes, so that no text is ever unknown. What
is learned is an ordered list of *merges*. Encoding replays it: in each word the pair that was merged first
in training is merged first.

Training holds the words with their counts, not the text: a word that stands a thousand times is worked on
once. A merge changes only the words that have the pair, found through an index; the best pair comes from a
heap whose entries may be out of date, and are looked up before they are believed. Ties go to the pair with
the smaller ids. These are the rules of Hugging Face's `tokenizers`, whose merges a test finds equal, one by
one, and whose `tokenizer.json` this one can be written as.
"""

from __future__ import annotations

import heapq
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

from llmcourse.errors import ShapeError

if TYPE_CHECKING:
    from llmcourse.text.tokenizer import Tokenizer

Pair = tuple[int, int]
SPACES = r"\t-\r \u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


class BPE:
    """A byte-level tokenizer: special tokens first, then the 256 bytes, then one token for each merge.

    merges     pairs of ids in the order in which they were learned
    tokens     the bytes of each id;  special: text of the control tokens, ids 0, 1, …
    """

    def __init__(self, merges: Iterable[Pair], *, special: Sequence[str] = ()) -> None:
        self.special = tuple(special)
        self.merges: tuple[Pair, ...] = tuple((int(a), int(b)) for a, b in merges)
        self.tokens = [text.encode() for text in self.special] + [bytes([b]) for b in alphabet()]
        ids = {token: i for i, token in enumerate(self.tokens) if i >= len(self.special)}
        self._byte = {token[0]: i for token, i in ids.items()}
        self.ranks: dict[Pair, tuple[int, int]] = {}  # pair → when it was learned, what it becomes
        for rank, (a, b) in enumerate(self.merges):
            if max(a, b) >= len(self.tokens) or min(a, b) < len(self.special):
                raise ShapeError(
                    f"merge {rank} joins the ids {a} and {b}, and there are {len(self.tokens)} tokens then.",
                    "A merge makes a token of two that exist; control tokens are never part of one.",
                    f"ids from {len(self.special)} to {len(self.tokens) - 1}.",
                )
            joined = self.tokens[a] + self.tokens[b]
            if joined not in ids:  # two merges can spell the same token: ab·c and a·bc
                ids[joined] = len(self.tokens)
                self.tokens.append(joined)
            self.ranks.setdefault((a, b), (rank, ids[joined]))
        self._special_id = {text: i for i, text in enumerate(self.special)}
        self._marks = re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))))
        self._known: dict[str, list[int]] = {}

    @classmethod
    def train(cls, text: str, vocab_size: int, *, special: Sequence[str] = ()) -> BPE:
        """Learn merges from `text` until there are `vocab_size` tokens, or no two tokens are left together.

        Raises ShapeError when the vocabulary cannot even hold the bytes.
        """
        least = 256 + len(special)
        if vocab_size < least:
            raise ShapeError(
                f"a vocabulary of {vocab_size} tokens.",
                f"256 bytes and {len(special)} control tokens are in it before the first merge.",
                f"vocab_size = {least} or more.",
            )
        empty = cls((), special=special)
        words = {tuple(empty.spell(word)): count for word, count in Counter(split(text)).items()}
        return cls(learn_merges(words, vocab_size - least, empty.tokens), special=special)

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def spell(self, word: str) -> list[int]:
        """The ids of a word's bytes, nothing merged."""
        return [self._byte[b] for b in word.encode()]

    def encode(self, text: str) -> list[int]:
        """Ids of any text. Control tokens written out in it become their ids."""
        if not self.special:
            return [i for word in split(text) for i in self._word(word)]
        ids, at = [], 0
        for mark in self._marks.finditer(text):
            ids += [i for word in split(text[at : mark.start()]) for i in self._word(word)]
            ids.append(self._special_id[mark.group()])
            at = mark.end()
        return ids + [i for word in split(text[at:]) for i in self._word(word)]

    def _word(self, word: str) -> list[int]:
        known = self._known.get(word)
        if known is None:
            known = self._known[word] = merged(self.spell(word), self.ranks)
        return known

    def decode(self, ids: Iterable[int], *, special: bool = True) -> str:
        """The text of `ids`; `special=False` drops control tokens. Half a character shows as �."""
        first = 0 if special else len(self.special)
        return b"".join(self.tokens[i] for i in ids if i >= first).decode(errors="replace")

    def token(self, token_id: int) -> str:
        """How one token prints, its leading space included."""
        return self.decode([token_id])

    def written(self, token_id: int) -> str:
        """A token as tokenizer files write it: one printable character a byte, `Ġ` for a space."""
        letters = byte_letters()
        if token_id < len(self.special):
            return self.special[token_id]
        return "".join(letters[b] for b in self.tokens[token_id])

    def to_tokenizer(self, chat_template: str | None = None) -> Tokenizer:
        """The same, run by Hugging Face's `tokenizers` (in Rust). The last control token ends an answer."""
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Backend

        from llmcourse.text.tokenizer import Tokenizer

        merges = [(self.written(a), self.written(b)) for a, b in self.merges]
        vocab = {self.written(i): i for i in range(self.vocab_size)}
        backend = Backend(models.BPE(vocab=vocab, merges=merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in self.special])
        eos = [len(self.special) - 1] if self.special else []
        return Tokenizer(backend, chat_template=chat_template, eos_ids=eos)


# ------------------------------------------------------------------------------------------------ training


def learn_merges(words: Mapping[tuple[int, ...], int], count: int, tokens: Sequence[bytes]) -> list[Pair]:
    """At most `count` new tokens' merges, most frequent pair first, ties to the smaller ids.

    words    each word's ids, and how often it stands in the text
    tokens   the bytes of the ids that exist; new ones follow behind them
    """
    spelled = [list(word) for word in words]
    counts = list(words.values())
    ids = {token: i for i, token in enumerate(tokens)}
    spelling = list(tokens)
    pairs: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)
    for w, word in enumerate(spelled):
        for pair in pairwise(word):
            pairs[pair] += counts[w]
            where[pair].add(w)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    while len(spelling) < len(tokens) + count and heap:
        said, pair = heapq.heappop(heap)
        now = pairs[pair]
        if now <= 0:
            continue
        if now != -said:  # it has changed since: back into the heap under what it is worth now
            heapq.heappush(heap, (-now, pair))
            continue
        joined = spelling[pair[0]] + spelling[pair[1]]
        if joined not in ids:
            ids[joined] = len(spelling)
            spelling.append(joined)
        merges.append(pair)
        grown = set()
        for w in where.pop(pair):
            for old in pairwise(spelled[w]):
                pairs[old] -= counts[w]
            spelled[w] = join(spelled[w], pair, ids[joined])
            for new in pairwise(spelled[w]):
                pairs[new] += counts[w]
                where[new].add(w)
                if ids[joined] in new:
                    grown.add(new)
        for new in grown:
            heapq.heappush(heap, (-pairs[new], new))
    return merges


def join(word: Sequence[int], pair: Pair, joined: int) -> list[int]:
    """`word` with each (a, b) replaced by `joined`, from left to right."""
    out: list[int] = []
    i = 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            out.append(joined)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out


def merged(word: list[int], ranks: Mapping[Pair, tuple[int, int]]) -> list[int]:
    """Replay the merges on one word: of the pairs in it, always the one that was learned first."""
    never = (len(ranks), -1)
    while len(word) > 1:
        pair = min(pairwise(word), key=lambda p: ranks.get(p, never))
        if pair not in ranks:
            break
        word = join(word, pair, ranks[pair][1])
    return word


# -------------------------------------------------------------------------------------------- words, bytes


def split(text: str) -> list[str]:
    """Cut text into the pieces that no merge crosses, by GPT-2's rule; joined, they are the text.

    A word with the space before it, digits together, other signs together, English contractions apart.
    """
    return _words().findall(text)


@lru_cache(1)
def _words() -> re.Pattern[str]:
    # `re` has no classes for Unicode's letters (L) and numbers (N): letters are \w less numbers and _.
    numbers = _ranges([c for c in range(0x110000) if unicodedata.category(chr(c))[0] == "N"])
    letter, other = rf"[^\W_{numbers}]", rf"(?:_|[^\w{SPACES}{numbers}])"
    blanks = rf"[{SPACES}]+(?![^{SPACES}])|[{SPACES}]+"  # all but the last belong to no word
    return re.compile(rf"'s|'t|'re|'ve|'m|'ll|'d| ?{letter}+| ?[{numbers}]+| ?{other}+|{blanks}")


def _ranges(points: Sequence[int]) -> str:
    """Sorted code points as the inside of a character class."""
    out, start = [], points[0]
    for point, following in zip(points, [*points[1:], 0], strict=True):
        if following != point + 1:
            out.append(f"{chr(start)}-{chr(point)}")
            start = following
    return "".join(out)


@lru_cache(1)
def byte_letters() -> dict[int, str]:
    """The character that stands for a byte in tokenizer files: itself if it can be seen, else from 256 up."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in seen]
    return {b: chr(b) for b in seen} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def alphabet() -> list[int]:
    """The 256 bytes in the order of their ids, which is that of their characters in tokenizer files."""
    letters = byte_letters()
    return sorted(letters, key=letters.__getitem__)
