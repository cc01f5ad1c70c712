"""Exercise `largest_batch`: how many sequences fit, from nothing but a model's published configuration."""

from __future__ import annotations

from typing import Any

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial

largest_batch = Exercise(
    "largest_batch",
    title="The KV cache bounds the batch",
    arguments=("config", "context", "memory", "itemsize"),
    shapes=(
        "config    a dict, names and values as in a model's published config.json:",
        "          num_hidden_layers, hidden_size, num_attention_heads   always there",
        "          num_key_value_heads    absent: as many as query heads",
        "          head_dim               absent: hidden_size // num_attention_heads",
        "          sliding_window         absent or None: the whole context is kept",
        "          kv_lora_rank, qk_rope_head_dim   only with multi-head latent attention (MLA), which",
        "                                 caches these two vectors a token, one of each for all heads",
        "context   tokens of each sequence;  itemsize  bytes of a cached number",
        "memory    bytes that weights and activations leave for the cache",
        "returns   (bytes of one sequence's cache, sequences that fit), two integers",
    ),
    formula="bytes = layers · tokens kept · numbers a token and layer · itemsize;  batch = ⌊memory / bytes⌋",
    difficulty=2,
    importance=5,
    minutes=20,
    points=4,
    hints=(
        "What does one layer keep of one token, and for which heads: those that ask, or those that are "
        "asked? Which of the sizes in the config say nothing about the cache?",
        "Two vectors of head_dim (a key and a value) for each key/value head; with MLA kv_lora_rank + "
        "qk_rope_head_dim numbers, once, whatever the heads. Times the layers, times the itemsize, times "
        "the tokens kept: never more than a window holds.",
        "heads = config.get('num_key_value_heads', config['num_attention_heads']); numbers = 2 * heads * "
        "head_dim, or config['kv_lora_rank'] + config['qk_rope_head_dim'] if there is a kv_lora_rank; kept "
        "= min(context, config.get('sliding_window') or context); then memory // bytes.",
    ),
)

Config = dict[str, Any]


def plan(
    config: Config,
    context: int,
    memory: int,
    itemsize: int,
    *,
    heads: int | None = None,
    head_dim: int | None = None,
    latent: int | None = None,
    kept: int | None = None,
    both: int = 2,
) -> tuple[int, int]:
    """Bytes of one sequence and the batch; what a keyword gives stands in place of the right value."""
    queries = config["num_attention_heads"]
    derived = {"num_key_value_heads": queries, "head_dim": config["hidden_size"] // queries}
    sizes = derived | config
    heads = sizes["num_key_value_heads"] if heads is None else heads
    head_dim = sizes["head_dim"] if head_dim is None else head_dim
    numbers = both * heads * head_dim
    if "kv_lora_rank" in config:
        numbers = config["kv_lora_rank"] + config["qk_rope_head_dim"] if latent is None else latent
    tokens = min(context, config.get("sliding_window") or context) if kept is None else kept
    size = config["num_hidden_layers"] * tokens * numbers * itemsize
    return size, memory // size


def draw(t: Trial, **more: Any) -> Config:
    """Sizes of a model that nobody has built; its heads are 2, 3 or 4 times as many as those cached."""
    heads, shared, dim = t.size(2, 9), t.size(2, 4), 16 * t.size(2, 8)
    config = {
        "num_hidden_layers": t.size(12, 90),
        "hidden_size": heads * shared * dim,
        "num_attention_heads": heads * shared,
        "num_key_value_heads": heads,
    }
    return config | more


def _agree(t: Trial, config: Config, context: int, itemsize: int = 2, memory: int | None = None) -> None:
    one, _ = plan(config, context, 0, itemsize)
    memory = one * t.size(3, 40) + t.size(1, one - 1) if memory is None else memory
    got = t.pair(t.call(config, context, memory, itemsize), 2, "a pair (bytes, batch)")
    for name, have, want in zip(
        ("bytes", "batch"), got, plan(config, context, memory, itemsize), strict=True
    ):
        t.equal(have, want, name)


@largest_batch.check("keys and values of every key/value head and layer, for each token")
def grouped(t: Trial) -> None:
    for _ in range(3):
        _agree(t, draw(t), t.size(500, 9000))
    _agree(t, {k: v for k, v in draw(t).items() if k != "num_key_value_heads"}, t.size(500, 9000))


@largest_batch.check("the head dimension is the config's own, where it gives one")
def own_head_dim(t: Trial) -> None:
    for _ in range(2):
        config = draw(t)
        _agree(
            t, config | {"head_dim": config["hidden_size"] // config["num_attention_heads"] * 2 - 16}, 3000
        )


@largest_batch.check("any number format: one byte a number, two or four")
def formats(t: Trial) -> None:
    for itemsize in (1, 2, 4):
        _agree(t, draw(t), t.size(500, 5000), itemsize)


@largest_batch.check("MLA keeps one latent vector and one rotary key, whatever the heads")
def latent(t: Trial) -> None:
    for _ in range(3):
        rank = 64 * t.size(2, 10)
        sizes = {"kv_lora_rank": rank, "qk_rope_head_dim": 16 * t.size(1, 6), "qk_nope_head_dim": 128}
        _agree(t, draw(t, **sizes, v_head_dim=128), t.size(500, 9000))


@largest_batch.check("a window keeps no more tokens than it is wide, nor than there are")
def window(t: Trial) -> None:
    for context in (1000, t.size(1001, 9000), t.size(20, 999)):
        _agree(t, draw(t, sliding_window=1000), context)
    _agree(t, draw(t, sliding_window=None), t.size(500, 5000))


@largest_batch.check("the batch is a whole number of sequences that fit")
def whole(t: Trial) -> None:
    config, context = draw(t), t.size(500, 5000)
    one, _ = plan(config, context, 0, 2)
    for memory in (one * 7, one * 7 - 1, one * 7 + 1, one - 1, 0):
        _agree(t, config, context, memory=memory)


@largest_batch.check("models as published: Llama-3-8B, Qwen3-0.6B, Mistral-7B, DeepSeek-V3")
def published(t: Trial) -> None:
    for config in PUBLISHED.values():
        _agree(t, config, t.size(10_000, 30_000), memory=40 * 10**9)


def _sizes(layers: int, width: int, heads: int, kv_heads: int, **more: int) -> Config:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    } | more


PUBLISHED = {
    "Llama-3-8B": _sizes(32, 4096, 32, 8),
    "Qwen3-0.6B": _sizes(28, 1024, 16, 8, head_dim=128),
    "Mistral-7B-v0.1": _sizes(32, 4096, 32, 8, sliding_window=4096),
    "DeepSeek-V3": _sizes(61, 7168, 128, 128, kv_lora_rank=512, qk_rope_head_dim=64),
}
"""Sizes from each model's config.json, as its makers published it."""


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


@largest_batch.mistake(
    says="all query heads are counted; grouped-query attention caches the key/value heads only",
    tries="config.get('num_key_value_heads', config['num_attention_heads']).",
    caught_by="grouped",
)
def query_heads(config: Any, context: Any, memory: Any, itemsize: Any) -> Any:
    return plan(config, context, memory, itemsize, heads=config["num_attention_heads"])


@largest_batch.mistake(
    says="keys are counted and values are not",
    tries="2 · heads · head_dim: each head keeps a key and a value.",
    caught_by="grouped",
)
def keys_only(config: Any, context: Any, memory: Any, itemsize: Any) -> Any:
    return plan(config, context, memory, itemsize, both=1)


@largest_batch.mistake(
    says="one layer is counted; every layer keeps keys and values of its own",
    tries="a factor num_hidden_layers.",
    caught_by="grouped",
)
def one_layer(config: Any, context: Any, memory: Any, itemsize: Any) -> Any:
    return plan(config | {"num_hidden_layers": 1}, context, memory, itemsize)


@largest_batch.mistake(
    says="the bytes of one token are returned, not of a sequence",
    tries="a factor for the tokens that are kept.",
    caught_by="grouped",
)
def one_token(config: Any, context: Any, memory: Any, itemsize: Any) -> Any:
    return plan(config, context, memory, itemsize, kept=1)


@largest_batch.mistake(
    says="a config without num_key_value_heads is taken for one key/value head; it means plain multi-head",
    tries="the number of query heads as the default.",
    caught_by="grouped",
)
def one_by_default(config: Any, context: Any, memory: Any, itemsize: Any) -> Any:
    return plan(config, context, memory, itemsize, heads=config.get("num_key_value_heads", 1))


@largest_batch.mistake(
    says="head_dim is always taken as hidden_size / num_attention_heads; some models have wider heads",
    tries="config.get('head_dim', config['hidden_size'] // config['num_attention_heads']).",
    caught_by="own_head_dim",
)
def derived_head_dim(config: Any, context: Any, memory: Any, itemsize: Any) -> Any:
    dim = config["hidden_size"] // config["num_attention_heads"]
    return plan(config, context, memory, itemsize, head_dim=dim)


@largest_batch.mistake(
    says="every number is taken to have two bytes",
    tries="the argument itemsize.",
    caught_by="formats",
)
def two_bytes(config: Any, context: Any, memory: Any, itemsize: Any) -> Any:
    return plan(config, context, memory, 2)


@largest_batch.mistake(
    says="MLA is counted like multi-head attention, with keys and values of every head",
    tries="kv_lora_rank + qk_rope_head_dim numbers a token and layer: keys and values are made from them.",
    caught_by="latent",
)
def latent_ignored(config: Any, context: Any, memory: Any, itemsize: Any) -> Any:
    plain = {k: v for k, v in config.items() if k != "kv_lora_rank"}
    return plan(plain, context, memory, itemsize)


@largest_batch.mistake(
    says="the latent vector is counted twice, as key and as value; both are made from the same one",
    tries="no factor 2 for MLA.",
    caught_by="latent",
)
def latent_twice(config: Any, context: Any, memory: Any, itemsize: Any) -> Any:
    numbers = 2 * (config.get("kv_lora_rank", 0) + config.get("qk_rope_head_dim", 0))
    return plan(config, context, memory, itemsize, latent=numbers)


@largest_batch.mistake(
    says="the rotary key is left out; it does not go through the latent vector and is cached beside it",
    tries="kv_lora_rank + qk_rope_head_dim.",
    caught_by="latent",
)
def no_rotary_key(config: Any, context: Any, memory: Any, itemsize: Any) -> Any:
    return plan(config, context, memory, itemsize, latent=config.get("kv_lora_rank"))


@largest_batch.mistake(
    says="the rotary key is counted once a head; all heads share one",
    tries="kv_lora_rank + qk_rope_head_dim, without the heads.",
    caught_by="latent",
)
def rotary_key_a_head(config: Any, context: Any, memory: Any, itemsize: Any) -> Any:
    rotary = config["num_attention_heads"] * config.get("qk_rope_head_dim", 0)
    return plan(config, context, memory, itemsize, latent=config.get("kv_lora_rank", 0) + rotary)


@largest_batch.mistake(
    says="the sliding window is ignored: tokens that nothing looks at any more are counted",
    tries="min(context, window).",
    caught_by="window",
)
def no_window(config: Any, context: Any, memory: Any, itemsize: Any) -> Any:
    return plan(config, context, memory, itemsize, kept=context)


@largest_batch.mistake(
    says="a whole window is counted even where the context is shorter",
    tries="min(context, window).",
    caught_by="window",
)
def whole_window(config: Any, context: Any, memory: Any, itemsize: Any) -> Any:
    return plan(config, context, memory, itemsize, kept=config.get("sliding_window") or context)


@largest_batch.mistake(
    says="the quotient is rounded up: a part of a sequence does not fit",
    tries="memory // bytes.",
    caught_by="grouped",
)
def rounded_up(config: Any, context: Any, memory: Any, itemsize: Any) -> Any:
    one, _ = plan(config, context, memory, itemsize)
    return one, -(-memory // one)


@largest_batch.mistake(
    says="a fraction of a sequence is counted",
    tries="memory // bytes, a whole number.",
    caught_by="grouped",
)
def fraction(config: Any, context: Any, memory: Any, itemsize: Any) -> Any:
    one, _ = plan(config, context, memory, itemsize)
    return one, memory / one


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@largest_batch.alternative("token by token, layer by layer")
def added_up(config: Any, context: Any, memory: Any, itemsize: Any) -> Any:
    queries = config["num_attention_heads"]
    if config.get("kv_lora_rank"):
        vectors = [config["kv_lora_rank"], config["qk_rope_head_dim"]]
    else:
        dim = config.get("head_dim") or config["hidden_size"] // queries
        vectors = [dim, dim] * config.get("num_key_value_heads", queries)
    layer = sum(n * itemsize for n in vectors)
    tokens = context
    if config.get("sliding_window") is not None and config["sliding_window"] < context:
        tokens = config["sliding_window"]
    one = sum(layer for _ in range(config["num_hidden_layers"])) * tokens
    return one, divmod(memory, one)[0]


@largest_batch.alternative("as a list, bits for bytes on the way")
def in_bits(config: Any, context: Any, memory: Any, itemsize: Any) -> Any:
    one, _ = plan(config, context, memory, itemsize)
    return [(one * 8) >> 3, (memory * 8) // (one * 8)]
