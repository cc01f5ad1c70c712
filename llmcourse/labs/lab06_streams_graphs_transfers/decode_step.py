"""Exercise `decode_step`: one token for every sequence, in launches that a graph can repeat."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.compare import Mismatch
from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Oracle, RaisedError, Trial
from llmcourse.streams.tape import KERNELS, Tape

decode_step = Exercise(
    "decode_step",
    title="A decode step that can be captured",
    arguments=(),
    shapes=(
        "op       op(out, kernel, *inputs): launch a kernel on buffers (by name) and numbers; its",
        "         result goes to the buffer `out`, which is made if it is not there",
        "read     read(buffer): its numbers, for the host; impossible while the step is captured",
        "returns  nothing. Afterwards the step is replayed, without Python: each replay must put the",
        "         next token of every sequence into `token`, and be ready for the following one.",
        "",
        "Buffers  token [B], position [B]: the newest token of each sequence, and its slot",
        "         embedding [V, D], wq, wk, wv [D, D], wo [D, V]",
        "         keys, values [B, T, D]: slots before position are filled, those after are not",
        "Kernels  " + f"{', '.join(list(KERNELS)[:4])}: see the table above",
        "         " + ", ".join(list(KERNELS)[4:]),
    ),
    formula="x = embedding[token];  token ← argmax(softmax(mask(x·wq · keysᵀ / √D)) · values · wo)",
    difficulty=4,
    importance=5,
    minutes=30,
    points=6,
    hints=(
        "Everything that changes from one step to the next must change in a buffer. Which three things does "
        "a step change, and which launch changes each of them?",
        "Write the new key and value into their slots first, since a token attends to itself: store reads "
        "the slot from the buffer `position`, so that the host needs not know it. All T slots are scored, "
        "and mask takes out those after `position`. At the end argmax writes into `token` itself, where the "
        "next replay's gather looks, and add raises `position` by one.",
        "op('x', 'gather', 'embedding', 'token'); q, k and v by 'matmul' with wq, wk, wv; op('keys', "
        "'store', 'position', 'k') and the values alike; op('s', 'scores', 'q', 'keys'); op('s', 'mask', "
        "'s', 'position'); op('s', 'softmax', 's'); op('y', 'mix', 's', 'values'); op('logits', 'matmul', "
        "'y', 'wo'); op('token', 'argmax', 'logits'); op('position', 'add', 'position', 1).",
    ),
)

Arrays = dict[str, np.ndarray]
MOST = 14  # launches of one step: 13 are needed
RUNAWAY = 200


def model(t: Trial, batch: int, slots: int, vocabulary: int = 97, width: int = 16) -> Arrays:
    """A layer of attention with random weights. Slots that are not filled hold large numbers."""
    square = {name: t.normal(width, width, scale=0.6) for name in ("wq", "wk", "wv")}
    return square | {
        "embedding": t.normal(vocabulary, width),
        "wo": t.normal(width, vocabulary),
        "keys": t.normal(batch, slots, width, scale=30.0),
        "values": t.normal(batch, slots, width, scale=30.0),
    }


def start(t: Trial, arrays: Arrays, positions: list[int]) -> Arrays:
    """A state in the middle of generation: the slots before each position are filled."""
    batch, _, width = arrays["keys"].shape
    state = {name: arrays[name].copy() for name in ("keys", "values")}
    for b, filled in enumerate(positions):
        for name in state:
            state[name][b, :filled] = t.normal(filled, width)
    token = t.integers(0, len(arrays["embedding"]), batch)
    return state | {"token": token, "position": np.array(positions)}


def generate(arrays: Arrays, state: Arrays, count: int) -> list[list[int]]:
    """The tokens that follow, sequence by sequence, by a loop that knows nothing of launches: [count][B]."""
    columns = []
    for b, first in enumerate(state["position"]):
        n, token, column = int(first), int(state["token"][b]), []
        keys, values = list(state["keys"][b, :n]), list(state["values"][b, :n])
        for _ in range(count):
            x = arrays["embedding"][token]
            keys.append(x @ arrays["wk"])
            values.append(x @ arrays["wv"])
            scores = np.array([x @ arrays["wq"] @ k for k in keys]) / np.sqrt(len(x))
            p = np.exp(scores - scores.max())
            y = sum(w * v for w, v in zip(p / p.sum(), values, strict=True))
            token = int((y @ arrays["wo"]).argmax())
            column.append(token)
        columns.append(column)
    return [list(row) for row in zip(*columns, strict=True)]


def captured(t: Trial, arrays: Arrays, state: Arrays) -> Tape:
    """The learner's step, captured; its launches are kept with the trial's call."""
    tape = Tape(**(arrays | state))
    oracles = [Oracle(fn, fn.__name__, RUNAWAY) for fn in (tape.op, tape.read)]
    try:
        with tape.capture():
            t.call(*oracles)
    except RaisedError as error:
        if tape.refused:
            raise Mismatch(error.failure.message) from None
        raise
    finally:
        if t.calls and t.calls[-1].error is None:
            t.calls[-1].value = [list(line) for line in tape.lines]
        elif t.calls:
            asked = [list(tape.buffers).index(name) for name in tape.refused if name in tape.buffers]
            t.counts[-1] = oracles[0].calls + RUNAWAY * sum(asked)  # mistakes differ in what they ask for
    if tape.refused:
        raise Mismatch("a value was read while the step was captured", tries="launches only.")
    t.holds(bool(tape.lines), "nothing was launched, and a replay would do nothing")
    return tape


def _replays(t: Trial, arrays: Arrays, states: list[Arrays], count: int, at: str = "") -> None:
    """The step is captured in the first state, and replayed from each of them."""
    tape = captured(t, arrays, states[0])
    for state in states:
        tape.buffers |= {name: value.copy() for name, value in state.items()}
        for step, expected in enumerate(generate(arrays, state, count), start=1):
            tape.replay()
            got = tape.buffers["token"]
            where = f"{at}replay {step}, tokens of {len(expected)} sequences" + (
                f" at positions {state['position'].tolist()}" if step == 1 else ""
            )
            t.equal(got.tolist(), expected, where)


def _alike(t: Trial, batch: int, slots: int) -> list[int]:
    return [t.size(2, slots - 3)] * batch


@decode_step.check("the step can be captured: no value is read")
def capturable(t: Trial) -> None:
    arrays = model(t, 2, 8)
    captured(t, arrays, start(t, arrays, [3, 3]))


@decode_step.check("a replay puts the next token of every sequence into `token`")
def next_token(t: Trial) -> None:
    for batch, slots in ((1, 6), (4, 9), (6, t.size(7, 12))):
        arrays = model(t, batch, slots)
        _replays(t, arrays, [start(t, arrays, _alike(t, batch, slots))], 1)
    arrays = model(t, 5, 4)
    _replays(t, arrays, [start(t, arrays, [0] * 5)], 1)


@decode_step.check("the second replay goes on where the first one ended, and so does the tenth")
def goes_on(t: Trial) -> None:
    for batch in (1, 4):
        arrays = model(t, batch, 16)
        _replays(t, arrays, [start(t, arrays, [5] * batch)], 10)


@decode_step.check("every sequence has a position of its own")
def own_positions(t: Trial) -> None:
    for _ in range(3):
        arrays = model(t, 5, 12)
        _replays(t, arrays, [start(t, arrays, [int(n) for n in t.rng.permutation(8)[:5]])], 4)


@decode_step.check("a graph that was captured in one state is right in every other")
def elsewhere(t: Trial) -> None:
    arrays = model(t, 3, 12)
    states = [start(t, arrays, positions) for positions in ([2, 2, 2], [6, 6, 6], [0, 7, 4])]
    _replays(t, arrays, states, 3, at="captured in another state, ")


@decode_step.check("a step is at most 14 launches")
def launches(t: Trial) -> None:
    arrays = model(t, 2, 8)
    tape = captured(t, arrays, start(t, arrays, [3, 5]))
    t.at_most(len(tape.lines), MOST, "launches of a step", "using a result again, not computing it again.")


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def _embed(op: Any) -> None:
    op("x", "gather", "embedding", "token")
    for name in "qkv":
        op(name, "matmul", "x", f"w{name}")


def _store(op: Any, position: Any = "position") -> None:
    op("keys", "store", position, "k")
    op("values", "store", position, "v")


def _attend(op: Any, position: Any = "position") -> None:
    op("s", "scores", "q", "keys")
    op("s", "mask", "s", position)
    op("s", "softmax", "s")
    op("y", "mix", "s", "values")
    op("logits", "matmul", "y", "wo")


def _finish(op: Any) -> None:
    op("token", "argmax", "logits")
    op("position", "add", "position", 1)


@decode_step.mistake(
    says="the host asks for the position, to know the slot",
    tries="store and mask, which take the buffer `position` itself.",
    caught_by="capturable",
)
def reads_position(op: Any, read: Any) -> Any:
    slot = read("position")[0]
    _embed(op)
    _store(op, slot)
    _attend(op, slot)
    _finish(op)


@decode_step.mistake(
    says="the host asks for the new token, to return it",
    tries="returning nothing: whoever replays the graph reads `token` afterwards.",
    caught_by="capturable",
)
def reads_token(op: Any, read: Any) -> Any:
    _embed(op)
    _store(op)
    _attend(op)
    _finish(op)
    return read("token")


@decode_step.mistake(
    says="the new token is left in a buffer of its own, where no replay looks for it",
    tries="op('token', 'argmax', 'logits'): the next replay's gather reads `token`.",
    caught_by="next_token",
)
def not_fed_back(op: Any, read: Any) -> Any:
    _embed(op)
    _store(op)
    _attend(op)
    op("next", "argmax", "logits")
    op("position", "add", "position", 1)


@decode_step.mistake(
    says="the position stays where it was, and every replay writes into the same slot",
    tries="op('position', 'add', 'position', 1), as a part of the step.",
    caught_by="goes_on",
)
def not_advanced(op: Any, read: Any) -> Any:
    _embed(op)
    _store(op)
    _attend(op)
    op("token", "argmax", "logits")


@decode_step.mistake(
    says="the position is raised before the step uses it, and a slot stays empty",
    tries="raising it at the end.",
    caught_by="next_token",
)
def advanced_first(op: Any, read: Any) -> Any:
    op("position", "add", "position", 1)
    _embed(op)
    _store(op)
    _attend(op)
    op("token", "argmax", "logits")


@decode_step.mistake(
    says="the position is raised twice in a step",
    tries="one op('position', 'add', 'position', 1) in a step.",
    caught_by="goes_on",
)
def advanced_twice(op: Any, read: Any) -> Any:
    _embed(op)
    _store(op)
    _attend(op)
    _finish(op)
    op("position", "add", "position", 1)


@decode_step.mistake(
    says="nothing is masked: slots that were never filled are attended to",
    tries="mask between scores and softmax.",
    caught_by="next_token",
)
def not_masked(op: Any, read: Any) -> Any:
    _embed(op)
    _store(op)
    op("s", "scores", "q", "keys")
    op("s", "softmax", "s")
    op("y", "mix", "s", "values")
    op("logits", "matmul", "y", "wo")
    _finish(op)


@decode_step.mistake(
    says="the mask comes after the softmax, whose sum then holds the slots that were never filled",
    tries="mask on the scores: exp(−∞) is 0.",
    caught_by="next_token",
)
def masked_late(op: Any, read: Any) -> Any:
    _embed(op)
    _store(op)
    op("s", "scores", "q", "keys")
    op("s", "softmax", "s")
    op("s", "mask", "s", "position")
    op("y", "mix", "s", "values")
    op("logits", "matmul", "y", "wo")
    _finish(op)


@decode_step.mistake(
    says="the new key and value are stored after they were needed: a token attends to itself",
    tries="both stores before scores.",
    caught_by="next_token",
)
def stored_late(op: Any, read: Any) -> Any:
    _embed(op)
    _attend(op)
    _store(op)
    _finish(op)


@decode_step.mistake(
    says="the key is stored and the value is not",
    tries="op('values', 'store', 'position', 'v').",
    caught_by="next_token",
)
def no_value(op: Any, read: Any) -> Any:
    _embed(op)
    op("keys", "store", "position", "k")
    _attend(op)
    _finish(op)


@decode_step.mistake(
    says="one position, that of the longest sequence, is used for all",
    tries="the buffer `position` as it is: one slot for each sequence.",
    caught_by="own_positions",
)
def longest_for_all(op: Any, read: Any) -> Any:
    _embed(op)
    op("longest", "max", "position")
    _store(op, "longest")
    _attend(op, "longest")
    op("token", "argmax", "logits")
    op("position", "add", "position", 1)


@decode_step.mistake(
    says="the token's row is fetched three times, once for each of q, k and v",
    tries="one gather into a buffer that all three products read.",
    caught_by="launches",
)
def gathered_thrice(op: Any, read: Any) -> Any:
    for name in "qkv":
        op(f"x{name}", "gather", "embedding", "token")
        op(name, "matmul", f"x{name}", f"w{name}")
    _store(op)
    _attend(op)
    _finish(op)


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@decode_step.alternative("a buffer for every result, none written twice")
def no_reuse(op: Any, read: Any) -> Any:
    op("row", "gather", "embedding", "token")
    op("new value", "matmul", "row", "wv")
    op("values", "store", "position", "new value")
    op("new key", "matmul", "row", "wk")
    op("keys", "store", "position", "new key")
    op("query", "matmul", "row", "wq")
    op("scores", "scores", "query", "keys")
    op("masked", "mask", "scores", "position")
    op("weights", "softmax", "masked")
    op("read", "mix", "weights", "values")
    op("logits", "matmul", "read", "wo")
    op("position", "add", "position", 1)
    op("token", "argmax", "logits")


@decode_step.alternative("the token is chosen beside, and copied into its place")
def copied_back(op: Any, read: Any) -> Any:
    _embed(op)
    _store(op)
    _attend(op)
    op("chosen", "argmax", "logits")
    op("token", "copy", "chosen")
    op("position", "add", "position", 1)


@decode_step.alternative("the position is kept beside and raised first")
def raised_first(op: Any, read: Any) -> Any:
    op("slot", "copy", "position")
    op("position", "add", 1, "position")
    _embed(op)
    _store(op, "slot")
    _attend(op, "slot")
    op("token", "argmax", "logits")
