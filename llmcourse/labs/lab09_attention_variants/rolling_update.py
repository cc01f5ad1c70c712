"""Exercise `rolling_update`: a cache that does not grow, whatever pieces a sequence arrives in."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.compare import Mismatch, as_array, number
from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

rolling_update = Exercise(
    "rolling_update",
    title="A rolling cache",
    arguments=("slots", "positions", "new", "start", "window", "sinks"),
    shapes=(
        "slots      tensor [B, H, C, D], C = sinks + window: keys (and values beside them) of one layer",
        "positions  integer tensor [C]: the position of the token in each slot, −1 while it is empty",
        "new        tensor [B, H, S, D]: the tokens at positions start … start + S − 1, S ≥ 1",
        "window     tokens that a query sees, its own included;  sinks  the first tokens, kept for ever",
        "returns    (seen, seen_positions, slots, positions)",
        "           seen [B, H, N, D], seen_positions [N]: what the S queries look at (hidden from each",
        "           other by window_mask): all tokens that any of them sees, each once, with its position",
        "           slots, positions: the cache for the next call, of the same size as before",
        "cost       for one new token nothing of the cache is copied: it is written to in place",
    ),
    formula="slot(p) = p  if p < sinks  else  sinks + (p − sinks) mod window",
    difficulty=4,
    importance=4,
    minutes=40,
    points=7,
    hints=(
        "Take window 3, no sinks, and the tokens 0 1 2 3 4 5 in pieces of 2. Where does token 3 go, what "
        "was there, and does any query of its piece still need it? With pieces of 1?",
        "A token overwrites the one `window` before it. Alone, its query no longer sees that one: write, "
        "then look at the slots. In a longer piece the first queries still do: look at the old slots and "
        "the new tokens together, before writing. Only the last `window` tokens of a long piece (and its "
        "sinks) are written at all, for two of them may have one slot.",
        "at = torch.arange(start, start + S); kept = (at < sinks) | (at >= start + S - window); where = "
        "torch.where(at < sinks, at, sinks + (at - sinks) % window)[kept]; slots[:, :, where] = new[:, :, "
        "kept]; positions[where] = at[kept]. Before that, if S > 1: seen = torch.cat((slots, new), dim=2), "
        "seen_positions = torch.cat((positions, at)); if S == 1, after it: the slots and positions.",
    ),
)


class History:
    """A sequence that arrives piece by piece, and the cache that the judged function makes of it."""

    def __init__(
        self, t: Trial, window: int, sinks: int, batch: int = 1, heads: int = 2, dim: int = 3
    ) -> None:
        self.t, self.window, self.sinks = t, window, sinks
        self.shape = batch, heads, dim
        self.past = np.zeros((batch, heads, 0, dim))
        size = sinks + window
        self.slots = torch.full((batch, heads, size, dim), 1e4)  # an empty slot holds anything
        self.positions = torch.full((size,), -1)

    def add(self, count: int, watch: tuple[str, ...] = ()) -> Any:
        """Hand over the next tokens, judge what the queries see, keep the cache for the next call."""
        t, (batch, heads, dim) = self.t, self.shape
        start = self.past.shape[2]
        new = tensor(t, batch, heads, count, dim)
        self.past = np.concatenate([self.past, new.double().numpy()], axis=2)
        call = t.perform(self.slots, self.positions, new, start, self.window, self.sinks, watch=watch)
        names = "(seen, seen_positions, slots, positions)"
        seen, at, slots, positions = (_tensor(x) for x in t.pair(call.value, 4, names))
        self._judge(seen, at, start, count)
        for name, have, like in (("slots", slots, self.slots), ("positions", positions, self.positions)):
            t.equal(list(have.shape), list(like.shape), f"shape of the cache's {name}")
            t.holds(have.dtype == like.dtype, f"{name} have become {have.dtype}, they were {like.dtype}")
        self.slots, self.positions = slots, positions
        return call

    def _judge(self, seen: Any, at: Any, start: int, count: int) -> None:
        end, where = (
            start + count,
            f"after tokens {start} … {start + count - 1}" if count > 1 else f"at token {start}",
        )
        shape = list(seen.shape)
        batch, heads, dim = self.shape
        n = at.numel()
        self.t.equal(shape, [batch, heads, n, dim], "shape of seen")
        held, numbers = as_array(at).reshape(-1).tolist(), as_array(seen)
        for j, p in enumerate(held):
            if p >= end or p != int(p):
                raise Mismatch(f"{where}, seen_positions[{j}] is {number(p)}, and no such token has come")
            if p < 0:
                continue
            if p in held[:j]:
                raise Mismatch(f"{where}, token {p} is seen twice, in {held.index(p)} and in {j} of seen")
            want = self.past[:, :, int(p)]
            if not np.allclose(numbers[:, :, j], want, rtol=1e-6):
                raise Mismatch(f"{where}, seen[:, :, {j}] is said to be token {p}, and holds other numbers")
        first = max(0, start - self.window + 1)
        for p in [*range(min(self.sinks, first)), *range(first, end)]:
            if p not in held:
                query = max(p, start)
                raise Mismatch(f"{where}, the query of token {query} sees token {p}, and it is not in seen")


def _tensor(value: Any) -> Any:
    if not hasattr(value, "numel") or not hasattr(value, "dtype"):
        raise Mismatch(f"a part of the result is a {type(value).__name__}, expected four tensors")
    return value


@rolling_update.check("token by token, before the window is full")
def filling(t: Trial) -> None:
    history = History(t, window=t.size(4, 6), sinks=0, batch=2)
    for _ in range(4):
        history.add(1)


@rolling_update.check("token by token, far beyond the window")
def rolling(t: Trial) -> None:
    for window in (1, t.size(3, 5)):
        history = History(t, window, sinks=0)
        for _ in range(2 * window + 3):
            history.add(1)


@rolling_update.check("the first tokens stay, and are seen once")
def sinks(t: Trial) -> None:
    for window, count in ((3, 1), (2, 3), (4, 2)):
        history = History(t, window, count)
        for _ in range(2 * window + count + 3):
            history.add(1)


@rolling_update.check("a piece of several tokens: its first queries see what its last tokens overwrite")
def pieces(t: Trial) -> None:
    for window, count, cut in ((4, 0, (4, 2, 3)), (4, 2, (4, 3, 2, 4)), (5, 1, (2, 1, 3, 1, 4, 2))):
        history = History(t, window, count)
        for size in cut:
            history.add(size)


@rolling_update.check("a piece that is longer than the window, wherever it begins")
def long_pieces(t: Trial) -> None:
    for window, count, cut in ((3, 0, (7, 1, 1)), (3, 2, (1, 8, 1, 2)), (2, 1, (4, 9, 1)), (3, 0, (2, 5, 2))):
        history = History(t, window, count)
        for size in cut:
            history.add(size)


@rolling_update.check("any cut of the sequence into pieces")
def any_cut(t: Trial) -> None:
    for _ in range(3):
        history = History(t, t.size(2, 6), t.size(0, 3))
        for _ in range(7):
            history.add(t.size(1, 3) if t.size(0, 2) else t.size(4, 11))


@rolling_update.check("for one token nothing of the cache is copied")
def cost(t: Trial) -> None:
    history = History(t, window=60, sinks=4, batch=2, heads=4, dim=16)
    history.add(70)
    for _ in range(2):
        call = history.add(1, watch=("largest_intermediate",))
        t.at_most(
            call.costs["largest_intermediate"],
            4096,
            f"bytes of the largest intermediate, with a cache of {history.slots.nbytes:,} bytes",
            "writing one slot in place, slots[:, :, where] = new, and returning the slots themselves.",
        )


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def _slot(at: Any, window: int, sinks: int) -> Any:
    return torch.where(at < sinks, at, sinks + (at - sinks) % window)


def update(
    slots: Any,
    positions: Any,
    new: Any,
    start: int,
    window: int,
    sinks: int,
    *,
    slot: Any = _slot,
    look: str = "",
    shift: bool = False,
) -> Any:
    """The right solution; `slot` is where tokens go, `look` another way to say what is seen, and `shift`
    puts the end of a long piece where its beginning belongs."""
    count = new.shape[2]
    at = torch.arange(start, start + count)
    both = torch.cat((slots, new), dim=2), torch.cat((positions, at))
    kept = (at < sinks) | (at >= start + count - window)
    where = slot(at[: int(kept.sum())] if shift else at[kept], window, sinks)
    slots[:, :, where] = new[:, :, kept]
    positions[where] = at[kept]
    if look == "new":
        seen = new, at
    elif look == "both" or (count > 1 and look != "slots"):
        seen = both
    else:
        seen = slots, positions
    return *seen, slots, positions


@rolling_update.mistake(
    says="tokens go to slot p, and there are no more slots once the window is full",
    tries="… mod window.",
    caught_by="rolling",
)
def no_modulo(slots: Any, positions: Any, new: Any, start: Any, window: Any, sinks: Any) -> Any:
    return update(slots, positions, new, start, window, sinks, slot=lambda at, w, s: at)


@rolling_update.mistake(
    says="tokens go round all slots, the sinks' too, which are overwritten",
    tries="sinks + (p − sinks) mod window for all but the sinks.",
    caught_by="sinks",
)
def sinks_overwritten(slots: Any, positions: Any, new: Any, start: Any, window: Any, sinks: Any) -> Any:
    return update(slots, positions, new, start, window, sinks, slot=lambda at, w, s: at % (w + s))


@rolling_update.mistake(
    says="the ring begins at slot 0, on top of the sinks",
    tries="sinks + …: the first slots are taken.",
    caught_by="sinks",
)
def ring_on_sinks(slots: Any, positions: Any, new: Any, start: Any, window: Any, sinks: Any) -> Any:
    def slot(at: Any, w: int, s: int) -> Any:
        return torch.where(at < s, at, (at - s) % w)

    return update(slots, positions, new, start, window, sinks, slot=slot)


@rolling_update.mistake(
    says="the sinks are taken out of the window: the ring is `sinks` slots shorter, and keys are lost early",
    tries="a ring of `window` slots behind the sinks.",
    caught_by="sinks",
)
def shorter_ring(slots: Any, positions: Any, new: Any, start: Any, window: Any, sinks: Any) -> Any:
    def slot(at: Any, w: int, s: int) -> Any:
        return torch.where(at < s, at, s + (at - s) % max(1, w - s))

    return update(slots, positions, new, start, window, sinks, slot=slot)


@rolling_update.mistake(
    says="the first tokens are written twice, as sinks and into the ring, and are seen twice",
    tries="one slot for each token: a sink has no place in the ring.",
    caught_by="sinks",
)
def sinks_twice(slots: Any, positions: Any, new: Any, start: Any, window: Any, sinks: Any) -> Any:
    found = update(slots, positions, new, start, window, sinks, slot=lambda at, w, s: s + at % w)
    for p in range(start, min(sinks, start + new.shape[2])):
        slots[:, :, p], positions[p] = new[:, :, p - start], p
    return found


@rolling_update.mistake(
    says="the positions of the new tokens are not entered",
    tries="positions[where] = at, beside the slots.",
    caught_by="filling",
)
def positions_forgotten(slots: Any, positions: Any, new: Any, start: Any, window: Any, sinks: Any) -> Any:
    before = positions.clone()
    seen, _, slots, _ = update(slots, positions, new, start, window, sinks)
    return seen, before, slots, before


@rolling_update.mistake(
    says="the slots are taken to lie in the order of their tokens; once the ring has turned they do not",
    tries="positions, which say what each slot holds.",
    caught_by="rolling",
)
def read_in_order(slots: Any, positions: Any, new: Any, start: Any, window: Any, sinks: Any) -> Any:
    seen, at, slots, positions = update(slots, positions, new, start, window, sinks)
    held = at >= 0
    last = start + new.shape[2]
    ordered = torch.arange(last - int(held.sum()), last)
    return seen[:, :, held], ordered, slots, positions


@rolling_update.mistake(
    says="the queries look at the new tokens alone",
    tries="the slots too: what came before is in them.",
    caught_by="filling",
)
def new_only(slots: Any, positions: Any, new: Any, start: Any, window: Any, sinks: Any) -> Any:
    return update(slots, positions, new, start, window, sinks, look="new")


@rolling_update.mistake(
    says="a new token is seen twice: in its slot, where it was written already, and beside the slots",
    tries="for one token the slots alone; for several the old slots and the new tokens, before writing.",
    caught_by="filling",
)
def newest_twice(slots: Any, positions: Any, new: Any, start: Any, window: Any, sinks: Any) -> Any:
    count = new.shape[2]
    found = update(slots, positions, new, start, window, sinks)
    at = torch.arange(start, start + count)
    return torch.cat((slots, new), dim=2), torch.cat((positions, at)), *found[2:]


@rolling_update.mistake(
    says="a piece is written before its queries look: its last tokens overwrite what its first ones see",
    tries="torch.cat((slots, new), dim=2) before the slots are written, when there are several new tokens.",
    caught_by="pieces",
)
def written_first(slots: Any, positions: Any, new: Any, start: Any, window: Any, sinks: Any) -> Any:
    return update(slots, positions, new, start, window, sinks, look="slots")


@rolling_update.mistake(
    says="a piece is written as one slice, which ends at the last slot: the ring does not close",
    tries="an index for each token, slots[:, :, where], with where taken modulo the window.",
    caught_by="pieces",
)
def one_slice(slots: Any, positions: Any, new: Any, start: Any, window: Any, sinks: Any) -> Any:
    def slot(at: Any, w: int, s: int) -> Any:
        first = int(_slot(at[:1], w, s))
        return torch.arange(first, first + len(at))

    return update(slots, positions, new, start, window, sinks, slot=slot)


@rolling_update.mistake(
    says="of a long piece the end is kept, in the slots that belong to its beginning",
    tries="the slots of the positions that are kept: at[kept], then the modulo.",
    caught_by="long_pieces",
)
def end_at_beginning(slots: Any, positions: Any, new: Any, start: Any, window: Any, sinks: Any) -> Any:
    return update(slots, positions, new, start, window, sinks, shift=True)


@rolling_update.mistake(
    says="of a long piece the beginning is kept and the end is lost",
    tries="the last `window` tokens: at ≥ start + S − window.",
    caught_by="long_pieces",
)
def beginning_kept(slots: Any, positions: Any, new: Any, start: Any, window: Any, sinks: Any) -> Any:
    at = torch.arange(start, start + new.shape[2])
    seen = torch.cat((slots, new), dim=2), torch.cat((positions, at))
    first = at < max(start + window, sinks)
    found = update(slots, positions, new[:, :, first], start, window, sinks)
    return (*seen, *found[2:]) if len(at) > 1 else found


@rolling_update.mistake(
    says="only the end of a long piece is kept, and the sinks in its beginning are dropped",
    tries="(at < sinks) | (at ≥ start + S − window).",
    caught_by="long_pieces",
)
def sinks_dropped(slots: Any, positions: Any, new: Any, start: Any, window: Any, sinks: Any) -> Any:
    at = torch.arange(start, start + new.shape[2])
    seen = torch.cat((slots, new), dim=2), torch.cat((positions, at))
    skip = max(0, len(at) - window)
    found = update(slots, positions, new[:, :, skip:], start + skip, window, sinks)
    return (*seen, *found[2:]) if len(at) > 1 else found


@rolling_update.mistake(
    says="all slots move by one for every token: the whole cache is copied to write one token",
    tries="a write position that moves, (p − sinks) mod window, in place of tokens that move.",
    caught_by="cost",
)
def shifted(slots: Any, positions: Any, new: Any, start: Any, window: Any, sinks: Any) -> Any:
    at = torch.arange(start, start + new.shape[2])
    seen, seen_at = torch.cat((slots, new), dim=2), torch.cat((positions, at))
    kept = ((seen_at >= 0) & ((seen_at < sinks) | (seen_at > at[-1] - window))).nonzero()[:, 0]
    full, full_at = torch.zeros_like(slots), torch.full_like(positions, -1)
    full[:, :, : len(kept)], full_at[: len(kept)] = seen[:, :, kept], seen_at[kept]
    return seen, seen_at, full, full_at


@rolling_update.mistake(
    says="the slots are joined with the new token even when it is alone: the whole cache is copied",
    tries="for one token: write it into its slot, then return the slots themselves.",
    caught_by="cost",
)
def always_joined(slots: Any, positions: Any, new: Any, start: Any, window: Any, sinks: Any) -> Any:
    return update(slots, positions, new, start, window, sinks, look="both")


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@rolling_update.alternative("token by token, with a ring that begins elsewhere")
def token_by_token(slots: Any, positions: Any, new: Any, start: Any, window: Any, sinks: Any) -> Any:
    count = new.shape[2]
    at = torch.arange(start, start + count)
    before = (torch.cat((slots, new), dim=2), torch.cat((positions, at))) if count > 1 else None
    for i in range(count):
        p = start + i
        where = p if p < sinks else sinks + p % window
        slots[:, :, where], positions[where] = new[:, :, i], p
    return *(before or (slots, positions)), slots, positions


@rolling_update.alternative("new slots for a piece, and only what is filled is shown")
def only_filled(slots: Any, positions: Any, new: Any, start: Any, window: Any, sinks: Any) -> Any:
    count = new.shape[2]
    if count == 1:
        where = start if start < sinks else sinks + (start - sinks) % window
        slots.select(2, where).copy_(new.squeeze(2))
        positions[where] = start
        return slots, positions, slots, positions
    held = positions >= 0
    at = torch.cat((positions[held], torch.arange(start, start + count)))
    seen = torch.cat((slots[:, :, held], new), dim=2)
    keep = (at < sinks) | (at >= start + count - window)
    fresh, fresh_at = torch.zeros_like(slots), torch.full_like(positions, -1)
    where = torch.where(at < sinks, at, sinks + (at - sinks) % window)[keep]
    fresh[:, :, where], fresh_at[where] = seen[:, :, keep], at[keep]
    return [seen, at, fresh, fresh_at]
