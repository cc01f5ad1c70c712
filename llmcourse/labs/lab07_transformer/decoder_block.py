"""Exercise `decoder_block`: norm, attention, norm, feed-forward; a residual stream and a growing cache."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch
from llmcourse.labs.lab07_transformer.apply_rope import angles_of, turned
from llmcourse.labs.lab07_transformer.attention import mixed, scores_of, weights_of
from llmcourse.labs.lab07_transformer.causal_mask import mask as visible

decoder_block = Exercise(
    "decoder_block",
    title="The decoder block",
    arguments=("x", "weights", "config", "keys", "values"),
    shapes=(
        "x        tensor [B, S, E]: the residual stream of S new tokens of each sequence",
        "weights  a dict of tensors of x's format, matrices as [outputs, inputs]:",
        '         "attention_norm" [E], "q" [Hq·D, E], "k", "v" [Hkv·D, E], "out" [E, Hq·D],',
        '         "mlp_norm" [E], "gate", "up" [F, E], "down" [E, F]',
        'config   a dict: "n_heads" Hq, "n_kv_heads" Hkv, "head_dim" D, "theta", "eps"',
        "keys     tensor [B, Hkv, P, D]: the turned keys of the P tokens before x; P may be 0",
        "values   tensor [B, Hkv, P, D]: their values",
        "returns  (y, keys, values): y [B, S, E], and keys and values with the new tokens behind the",
        "         others, [B, Hkv, P + S, D]; the arguments stay as they are",
        "",
        "norm(x, w) is F.rms_norm(x, (E,), w, eps). The new tokens stand at positions P … P + S − 1.",
    ),
    formula="h = x + out·attention(norm₁(x));  y = h + down·(silu(gate·norm₂(h)) ⊙ up·norm₂(h))",
    difficulty=4,
    importance=5,
    minutes=45,
    points=8,
    hints=(
        "Follow one token: what is added to its stream, and what is each addition computed from? Which of "
        "q, k, v must know positions? And when P tokens came before, which of their numbers do you already "
        "have?",
        "Norm, project_heads; turn q and k at positions P + 0 … P + S − 1; put the new keys and values "
        "behind the old ones, torch.cat along the token axis; causal_mask for P + S slots; attention; heads "
        "back side by side (transpose before reshape); `out`; add to x. Then the feed-forward part in the "
        "same way, from the new stream. The keys that you return are turned already, the next call does not "
        "turn them again.",
        "positions = (past + torch.arange(S)).expand(B, -1); k = torch.cat((keys, apply_rope(k, positions, "
        "theta)), dim=2); mask = causal_mask(positions, past + S, positions[:, 0] * 0); "
        "a, _ = attention(q, k, v, mask); x = x + a.transpose(1, 2).reshape(B, S, -1) @ weights['out'].T; "
        "n = F.rms_norm(x, …); "
        "return x + (F.silu(n @ weights['gate'].T) * (n @ weights['up'].T)) @ weights['down'].T, k, v.",
    ),
)

Arrays = dict[str, Any]


# ── inputs and reference ─────────────────────────────────────────────────────────────────────────


def sizes(heads: tuple[int, int] = (4, 2), dim: int = 6, theta: float = 10_000.0) -> dict[str, Any]:
    return {"n_heads": heads[0], "n_kv_heads": heads[1], "head_dim": dim, "theta": theta, "eps": 1e-5}


def make_weights(t: Trial, config: dict[str, Any], width: int, hidden: int, dtype: str = "float32") -> Arrays:
    """Random weights under which neither part of the block drowns the other."""
    q, kv = (config[name] * config["head_dim"] for name in ("n_heads", "n_kv_heads"))
    shapes = {"q": (q, width), "k": (kv, width), "v": (kv, width), "out": (width, q)}
    shapes |= {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}
    made = {name: tensor(t, *s, dtype=dtype, scale=1.5 * s[1] ** -0.5) for name, s in shapes.items()}
    norms = ("attention_norm", "mlp_norm")
    return {name: 1 + tensor(t, width, dtype=dtype, scale=0.3) for name in norms} | made


def expected(x: Any, weights: Arrays, config: dict[str, Any], keys: Any, values: Any) -> tuple[Any, ...]:
    """In float64, one token after the other: (y, keys, values)."""
    w = {name: value.double().numpy() for name, value in weights.items()}
    stream, k_all, v_all = (a.double().numpy() for a in (x, keys, values))
    batch, length, _ = stream.shape
    shared, dim = config["n_heads"] // config["n_kv_heads"], config["head_dim"]

    def norm(row: np.ndarray, name: str) -> np.ndarray:
        return row / np.sqrt((row**2).mean(-1, keepdims=True) + config["eps"]) * w[name]

    def at(heads: np.ndarray, position: int) -> np.ndarray:
        pairs = heads[..., : dim // 2] + 1j * heads[..., dim // 2 :]
        pairs = pairs * np.exp(1j * position * config["theta"] ** (-2 * np.arange(dim // 2) / dim))
        return np.concatenate((pairs.real, pairs.imag), -1)

    made = []
    for s in range(length):
        row, position = stream[:, s], k_all.shape[2]
        n = norm(row, "attention_norm")
        q, k, v = ((n @ w[name].T).reshape(batch, -1, dim) for name in "qkv")
        k_all = np.concatenate((k_all, at(k, position)[:, :, None]), axis=2)
        v_all = np.concatenate((v_all, v[:, :, None]), axis=2)
        scores = np.einsum("bhd,bhtd->bht", at(q, position), k_all.repeat(shared, axis=1)) / dim**0.5
        e = np.exp(scores - scores.max(-1, keepdims=True))
        heads = np.einsum("bht,bhtd->bhd", e / e.sum(-1, keepdims=True), v_all.repeat(shared, axis=1))
        row = row + heads.reshape(batch, -1) @ w["out"].T
        n = norm(row, "mlp_norm")
        gate = n @ w["gate"].T
        made.append(row + (gate / (1 + np.exp(-gate)) * (n @ w["up"].T)) @ w["down"].T)
    return np.stack(made, axis=1), k_all, v_all


def nothing(config: dict[str, Any], batch: int, dtype: str = "float32") -> tuple[Any, Any]:
    """Keys and values of no tokens."""
    empty = torch.empty(batch, config["n_kv_heads"], 0, config["head_dim"], dtype=getattr(torch, dtype))
    return empty, empty


def _close(t: Trial, got: Any, want: Any, what: str = "", rtol: float | None = 1e-4) -> Any:
    parts = t.pair(got, 3, "(y, keys, values)")
    for name, value, right in zip(("y", "keys", "values"), parts, want, strict=True):
        t.close(value, right, f"{name}{what}", rtol=rtol)
    return parts


def fresh(
    t: Trial, config: dict[str, Any], zero: str = "", *, batch: int = 2, length: int = 5, width: int = 16
) -> None:
    """A whole sequence from position 0, y alone compared; `zero` names a weight that is 0."""
    weights = make_weights(t, config, width, t.odd(9, 15))
    if zero:
        weights[zero] = weights[zero] * 0
    x, past = tensor(t, batch, length, width), nothing(config, batch)
    y, *_ = t.pair(t.call(x, weights, config, *past), 3, "(y, keys, values)")
    what = f"y, where `{zero}` is all zeros" if zero else "y"
    t.close(y, expected(x, weights, config, *past)[0], what, rtol=1e-4)


# ── checks ───────────────────────────────────────────────────────────────────────────────────────


@decoder_block.check("where both parts add nothing, the stream comes through as it is")
def stream(t: Trial) -> None:
    config = sizes()
    weights = make_weights(t, config, 16, 12)
    weights |= {name: weights[name] * 0 for name in ("out", "down")}
    x = tensor(t, 1, 3, 16, scale=3.0)
    y, *_ = t.pair(t.call(x, weights, config, *nothing(config, 1)), 3, "(y, keys, values)")
    t.close(y, x.numpy(), "y, where `out` and `down` are all zeros")


@decoder_block.check("the attention part alone")
def attention_part(t: Trial) -> None:
    fresh(t, sizes((2, 2)), "down")
    fresh(t, sizes((6, 2), theta=100.0), "down", length=t.size(6, 9))


@decoder_block.check("the feed-forward part alone")
def feed_forward(t: Trial) -> None:
    fresh(t, sizes(), "out")


@decoder_block.check("both parts, the second on the stream that the first one left")
def whole(t: Trial) -> None:
    fresh(t, sizes())
    fresh(t, sizes((3, 1), dim=10, theta=100_000.0), batch=1, length=t.size(6, 9), width=20)


@decoder_block.check("keys (turned) and values come back, the new ones behind the old ones")
def kept_for_later(t: Trial) -> None:
    config = sizes()
    weights, past = make_weights(t, config, 16, 12), nothing(config, 2)
    x = tensor(t, 2, 4, 16)
    want = expected(x, weights, config, *past)
    got = _close(t, t.call(x, weights, config, *past), want, " of the first 4 tokens")
    more = tensor(t, 2, 1, 16)
    want = expected(more, weights, config, *got[1:])
    _close(t, t.call(more, weights, config, *got[1:]), want, " of one more token")


@decoder_block.check("any split of a sequence gives the same stream as the whole")
def split(t: Trial) -> None:
    config, width, length = sizes(theta=100.0), 16, 7
    weights = make_weights(t, config, width, 12)
    x = tensor(t, 2, length, width)
    want = expected(x, weights, config, *nothing(config, 2))
    for pieces in ([1] * length, [t.size(2, 4), 1, length]):
        past: Any = nothing(config, 2)
        at = 0
        for piece in pieces:
            part = x[:, at : at + piece].contiguous()
            y, *past = t.pair(t.call(part, weights, config, *past), 3, "(y, keys, values)")
            end = at + part.shape[1]
            what = f", tokens {at} to {end - 1} behind a cache of {at}"
            right = (want[0][:, at:end], want[1][:, :, :end], want[2][:, :, :end])
            _close(t, (y, *past), right, what)
            at = end


@decoder_block.check("bfloat16 comes and goes")
def formats(t: Trial) -> None:
    config = sizes()
    weights = make_weights(t, config, 16, 12, "bfloat16")
    x, past = tensor(t, 2, 4, 16, dtype="bfloat16"), nothing(config, 2, "bfloat16")
    got = _close(t, t.call(x, weights, config, *past), expected(x, weights, config, *past), rtol=5e-2)
    for name, value in zip(("y", "keys", "values"), got, strict=True):
        told = str(getattr(value, "dtype", "none")).removeprefix("torch.")
        t.equal(told, "bfloat16", f"number format of {name}")


@decoder_block.check("stream, weights and cache are left as they were")
def untouched(t: Trial) -> None:
    config = sizes()
    weights = make_weights(t, config, 16, 12)
    past = tuple(tensor(t, 2, 2, 3, 6) for _ in range(2))
    x = tensor(t, 2, 2, 16)
    t.call(x, weights, config, *past)
    t.unchanged()


# ── mistakes: each is the right block with one part exchanged ────────────────────────────────────


class Block:
    """The right block. What a mistake gets wrong, its subclass overrides."""

    def __init__(self, weights: Arrays, config: dict[str, Any]) -> None:
        self.w, self.config = weights, config

    def norm(self, x: Any, name: str) -> Any:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.w[name], self.config["eps"])

    def project(self, x: Any, name: str) -> Any:
        y = x @ self.w[name].T
        return y.view(*x.shape[:2], -1, self.config["head_dim"]).transpose(1, 2)

    def positions(self, batch: int, past: int, length: int) -> Any:
        return (past + torch.arange(length)).expand(batch, -1)

    def turn(self, x: Any, positions: Any) -> Any:
        return turned(x, angles_of(positions, self.config["theta"], x.shape[-1]))

    def mask(self, positions: Any, n_keys: int) -> Any:
        return visible(positions, n_keys, positions[:, 0] * 0)

    def scores(self, q: Any, k: Any) -> Any:
        return scores_of(q, k)

    def merge(self, heads: Any) -> Any:
        return heads.transpose(1, 2).flatten(2)

    def heads(self, x: Any, past: int) -> tuple[Any, Any, Any]:
        positions = self.positions(len(x), past, x.shape[1])
        q, k, v = (self.project(x, name) for name in "qkv")
        return self.turn(q, positions), self.turn(k, positions), v

    def join(self, past: Any, new: Any) -> Any:
        return torch.cat((past, new), dim=2)

    def attention(self, x: Any, keys: Any, values: Any) -> tuple[Any, Any, Any]:
        past = keys.shape[2]
        q, k, v = self.heads(x, past)
        keys, values = self.join(keys, k), self.join(values, v)
        mask = self.mask(self.positions(len(x), past, x.shape[1]), keys.shape[2])
        y, _ = mixed(weights_of(self.scores(q, keys), mask), values)
        return self.merge(y) @ self.w["out"].T, keys, values

    def gated(self, gate: Any, up: Any) -> Any:
        return torch.nn.functional.silu(gate) * up

    def mlp(self, x: Any) -> Any:
        return self.gated(x @ self.w["gate"].T, x @ self.w["up"].T) @ self.w["down"].T

    def __call__(self, x: Any, keys: Any, values: Any) -> tuple[Any, Any, Any]:
        a, keys, values = self.attention(self.norm(x, "attention_norm"), keys, values)
        x = x + a
        return x + self.mlp(self.norm(x, "mlp_norm")), keys, values


def wrong(*, says: str, tries: str, caught_by: str) -> Callable[[type[Block]], type[Block]]:
    """Register a class of blocks as a mistake."""

    def add(made: type[Block]) -> type[Block]:
        def fn(x: Any, weights: Arrays, config: dict[str, Any], keys: Any, values: Any) -> Any:
            return made(weights, config)(x, keys, values)

        fn.__name__ = re.sub(r"(?<!^)([A-Z])", r"_\1", made.__name__).lower()
        decoder_block.mistake(says=says, tries=tries, caught_by=caught_by)(fn)
        return made

    return add


@wrong(
    says="the norm stands behind the sum: nothing passes a block without being normalised",
    tries="x + part(norm(x)), not norm(x + part(x)).",
    caught_by="stream",
)
class PostNorm(Block):
    def __call__(self, x: Any, keys: Any, values: Any) -> tuple[Any, Any, Any]:
        a, keys, values = self.attention(x, keys, values)
        x = self.norm(x + a, "attention_norm")
        return self.norm(x + self.mlp(x), "mlp_norm"), keys, values


@wrong(
    says="the parts are added to the normalised stream, not to the stream",
    tries="x = x + attention(norm(x)): keep x under its own name.",
    caught_by="stream",
)
class AddedToTheNorm(Block):
    def __call__(self, x: Any, keys: Any, values: Any) -> tuple[Any, Any, Any]:
        n = self.norm(x, "attention_norm")
        a, keys, values = self.attention(n, keys, values)
        m = self.norm(n + a, "mlp_norm")
        return m + self.mlp(m), keys, values


@wrong(
    says="the second addition starts from the block's input, and what attention added is lost",
    tries="h = x + attention(…); y = h + feed-forward(norm(h)).",
    caught_by="attention_part",
)
class AttentionLost(Block):
    def __call__(self, x: Any, keys: Any, values: Any) -> tuple[Any, Any, Any]:
        a, keys, values = self.attention(self.norm(x, "attention_norm"), keys, values)
        return x + self.mlp(self.norm(x + a, "mlp_norm")), keys, values


@wrong(
    says="the feed-forward part replaces the stream: nothing is added to",
    tries="x + feed-forward(norm(x)).",
    caught_by="stream",
)
class NotAdded(Block):
    def __call__(self, x: Any, keys: Any, values: Any) -> tuple[Any, Any, Any]:
        a, keys, values = self.attention(self.norm(x, "attention_norm"), keys, values)
        return self.mlp(self.norm(x + a, "mlp_norm")), keys, values


@wrong(
    says="both parts work on the block's input, side by side: the second misses what the first one added",
    tries="the second norm of x + attention(norm(x)).",
    caught_by="whole",
)
class SideBySide(Block):
    def __call__(self, x: Any, keys: Any, values: Any) -> tuple[Any, Any, Any]:
        a, keys, values = self.attention(self.norm(x, "attention_norm"), keys, values)
        return x + a + self.mlp(self.norm(x, "mlp_norm")), keys, values


@wrong(
    says="the feed-forward part gets the stream itself, without its norm",
    tries='F.rms_norm(x, (E,), weights["mlp_norm"], eps) in front of gate and up.',
    caught_by="feed_forward",
)
class NoSecondNorm(Block):
    def __call__(self, x: Any, keys: Any, values: Any) -> tuple[Any, Any, Any]:
        a, keys, values = self.attention(self.norm(x, "attention_norm"), keys, values)
        return x + a + self.mlp(x + a), keys, values


@wrong(
    says="attention gets the stream itself, without its norm",
    tries='F.rms_norm(x, (E,), weights["attention_norm"], eps) in front of q, k and v.',
    caught_by="attention_part",
)
class NoFirstNorm(Block):
    def __call__(self, x: Any, keys: Any, values: Any) -> tuple[Any, Any, Any]:
        a, keys, values = self.attention(x, keys, values)
        return x + a + self.mlp(self.norm(x + a, "mlp_norm")), keys, values


@wrong(
    says="both norms have the weight of the first",
    tries='weights["mlp_norm"] for the second.',
    caught_by="feed_forward",
)
class OneNorm(Block):
    def norm(self, x: Any, name: str) -> Any:
        return super().norm(x, "attention_norm")


@wrong(
    says="gate and up are exchanged: SiLU is taken of the wrong product",
    tries='F.silu of the product with weights["gate"].',
    caught_by="feed_forward",
)
class GateAndUpExchanged(Block):
    def gated(self, gate: Any, up: Any) -> Any:
        return super().gated(up, gate)


@wrong(
    says="SiLU is taken of gate · up, not of the gate alone",
    tries="F.silu(gate) * up.",
    caught_by="feed_forward",
)
class SiluOfTheProduct(Block):
    def gated(self, gate: Any, up: Any) -> Any:
        return super().gated(gate * up, 1.0)


@wrong(
    says="the gate is a sigmoid: the factor of SiLU is missing",
    tries="F.silu(gate) = gate · sigmoid(gate).",
    caught_by="feed_forward",
)
class SigmoidGate(Block):
    def gated(self, gate: Any, up: Any) -> Any:
        return gate.sigmoid() * up


@wrong(
    says="the values are turned like queries and keys",
    tries="apply_rope for q and k alone: what is mixed needs no position.",
    caught_by="attention_part",
)
class ValuesTurned(Block):
    def heads(self, x: Any, past: int) -> tuple[Any, Any, Any]:
        q, k, v = super().heads(x, past)
        return q, k, self.turn(v, self.positions(len(x), past, x.shape[1]))


@wrong(
    says="the queries are turned and the keys are not",
    tries="apply_rope for k with the same positions.",
    caught_by="attention_part",
)
class KeysNotTurned(Block):
    def heads(self, x: Any, past: int) -> tuple[Any, Any, Any]:
        q, _, v = super().heads(x, past)
        return q, self.project(x, "k"), v


@wrong(
    says="nothing is turned: the block does not know in which order the tokens stand",
    tries="apply_rope for q and k.",
    caught_by="attention_part",
)
class NoPositions(Block):
    def turn(self, x: Any, positions: Any) -> Any:
        return x


@wrong(
    says="the new tokens see each other's future: there is no mask",
    tries="causal_mask(positions, P + S, …).",
    caught_by="attention_part",
)
class NoMask(Block):
    def mask(self, positions: Any, n_keys: int) -> Any:
        return torch.ones(*positions.shape, n_keys, dtype=torch.bool)[:, None]


@wrong(
    says="the heads are put together without exchanging the axes of head and token",
    tries="y.transpose(1, 2).reshape(B, S, Hq·D).",
    caught_by="attention_part",
)
class MergedAcross(Block):
    def merge(self, heads: Any) -> Any:
        batch, _, length, _ = heads.shape
        return heads.reshape(batch, length, -1)


@wrong(
    says="the heads are put together feature by feature, and `out` finds them in another order",
    tries="y.transpose(1, 2).reshape(B, S, Hq·D): a head's features side by side.",
    caught_by="attention_part",
)
class MergedByFeature(Block):
    def merge(self, heads: Any) -> Any:
        return heads.permute(0, 2, 3, 1).flatten(2)


@wrong(
    says="the new keys are cached before they are turned",
    tries="apply_rope first, then torch.cat: what is returned is turned already.",
    caught_by="kept_for_later",
)
class CachedBeforeTurning(Block):
    def attention(self, x: Any, keys: Any, values: Any) -> tuple[Any, Any, Any]:
        a, new, values = super().attention(x, keys, values)
        return a, self.join(new[:, :, : keys.shape[2]], self.project(x, "k")), values


@wrong(
    says="the old keys are turned once more in every call",
    tries="apply_rope on the new keys alone, before torch.cat.",
    caught_by="kept_for_later",
)
class TurnedAgain(Block):
    def attention(self, x: Any, keys: Any, values: Any) -> tuple[Any, Any, Any]:
        positions = self.positions(len(x), 0, keys.shape[2])
        return super().attention(x, self.turn(keys, positions), values)


@wrong(
    says="the new tokens' positions begin at 0, though others came before",
    tries="P + torch.arange(S), with P = keys.shape[2].",
    caught_by="kept_for_later",
)
class FromZero(Block):
    def heads(self, x: Any, past: int) -> tuple[Any, Any, Any]:
        return super().heads(x, 0)


@wrong(
    says="the mask is the triangle of a sequence that begins with these tokens: behind a cache they see its "
    "first slots only",
    tries="causal_mask with the positions P … P + S − 1.",
    caught_by="kept_for_later",
)
class MaskFromZero(Block):
    def mask(self, positions: Any, n_keys: int) -> Any:
        return super().mask(positions - positions[:, :1], n_keys)


@wrong(
    says="several new tokens behind a cache see each other's future: only a first call gets a mask",
    tries="causal_mask(positions, P + S, …) in every call.",
    caught_by="split",
)
class MaskedAtFirstOnly(Block):
    def mask(self, positions: Any, n_keys: int) -> Any:
        last = positions if n_keys == positions.shape[1] else positions[:, -1:].expand_as(positions)
        return super().mask(last, n_keys)


@wrong(
    says="the cache is not used: the new tokens see themselves only",
    tries="torch.cat((keys, k), dim=2), and the values alike.",
    caught_by="kept_for_later",
)
class CacheForgotten(Block):
    def join(self, past: Any, new: Any) -> Any:
        return new


@wrong(
    says="only the new keys and values are returned, and the next call cannot see the old ones",
    tries="what torch.cat gave, for both.",
    caught_by="kept_for_later",
)
class NewAlone(Block):
    def attention(self, x: Any, keys: Any, values: Any) -> tuple[Any, Any, Any]:
        past = keys.shape[2]
        a, keys, values = super().attention(x, keys, values)
        return a, keys[:, :, past:], values[:, :, past:]


@wrong(
    says="the keys and values that came are returned, without the new ones",
    tries="what torch.cat gave, for both.",
    caught_by="kept_for_later",
)
class NothingAdded(Block):
    def attention(self, x: Any, keys: Any, values: Any) -> tuple[Any, Any, Any]:
        return super().attention(x, keys, values)[0], keys, values


@wrong(
    says="the new keys and values stand before the old ones",
    tries="torch.cat((keys, k), dim=2).",
    caught_by="kept_for_later",
)
class NewInFront(Block):
    def join(self, past: Any, new: Any) -> Any:
        return super().join(new, past)


@wrong(
    says="the stream is changed in place (x += …): whoever gave it away finds it changed",
    tries="x = x + ….",
    caught_by="untouched",
)
class InPlace(Block):
    def __call__(self, x: Any, keys: Any, values: Any) -> tuple[Any, Any, Any]:
        a, keys, values = self.attention(self.norm(x, "attention_norm"), keys, values)
        x += a
        x += self.mlp(self.norm(x, "mlp_norm"))
        return x, keys, values


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@decoder_block.alternative("part by part, in a class")
def part_by_part(x: Any, weights: Arrays, config: dict[str, Any], keys: Any, values: Any) -> Any:
    return Block(weights, config)(x, keys, values)


@decoder_block.alternative("PyTorch's fused attention and stacked projections")
def fused(x: Any, weights: Arrays, config: dict[str, Any], keys: Any, values: Any) -> Any:
    F = torch.nn.functional
    past, length, dim = keys.shape[2], x.shape[1], config["head_dim"]
    block = Block(weights, config)
    stacked = torch.cat([weights[name] for name in "qkv"])
    heads = (block.norm(x, "attention_norm") @ stacked.T).unflatten(-1, (-1, dim)).transpose(1, 2)
    counts = [config["n_heads"], config["n_kv_heads"], config["n_kv_heads"]]
    q, k, v = heads.split(counts, dim=1)
    positions = torch.arange(past, past + length)[None]
    q, k = (turned(part, angles_of(positions, config["theta"], dim)) for part in (q, k))
    keys, values = torch.cat((keys, k), 2), torch.cat((values, v), 2)
    seen = torch.ones(length, past + length, dtype=torch.bool).tril(past)
    y = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=True)
    x = x + F.linear(y.transpose(1, 2).flatten(2), weights["out"])
    gate, up = F.linear(block.norm(x, "mlp_norm"), torch.cat((weights["gate"], weights["up"]))).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, weights["down"]), keys, values


@decoder_block.alternative("one new token after the other, each through the whole block")
def token_by_token(x: Any, weights: Arrays, config: dict[str, Any], keys: Any, values: Any) -> Any:
    block, rows = Block(weights, config), []
    for s in range(x.shape[1]):
        y, keys, values = block(x[:, s : s + 1], keys, values)
        rows.append(y)
    return torch.cat(rows, dim=1), keys, values
