"""The numbers that define a transformer, under one set of names for every family.

A configuration names the kind of every layer's *sequence mixer*, the part of a block through which tokens
see each other. Attention, sliding-window and latent attention, linear attention, selective state spaces and
long convolutions are such kinds; everything else of a model is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llmcourse.errors import ShapeError
from llmcourse.models.sizes import HyenaSizes, LatentSizes, RopeScaling, SSMSizes, at_least, one_of

KINDS = ("attention", "window", "latent", "linear", "ssm", "hyena")


@dataclass(frozen=True)
class ModelConfig:
    """A stack of blocks. Lengths in tokens, widths in features.

    vocab_size V, d_model E, n_layers L, n_heads Hq, n_kv_heads Hkv (divides Hq), head_dim D, d_ff F (0: no
    feed-forward part)

    layers       the kind of each layer (see KINDS); empty: "attention" in all of them
    window       tokens that a "window" layer sees, the current one included
    sinks        first tokens of the sequence that a "window" layer sees for ever
    latent, ssm, hyena    sizes of the layers of that kind
    norm         rms (RMSNorm) or layer (LayerNorm);  post_norm: norms after the residual sums, as in 2017
    mlp          swiglu, gelu or relu
    position     rope, learned, sinusoidal or none
    bias         biases on all projections;  qkv_bias: on Q, K and V alone (Qwen2)
    qk_norm      an RMSNorm on each query and key head (Qwen3)
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    max_len: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    eos_ids: tuple[int, ...] = ()
    name: str = "model"
    layers: tuple[str, ...] = ()
    window: int = 0
    sinks: int = 0
    latent: LatentSizes | None = None
    ssm: SSMSizes = field(default_factory=SSMSizes)
    hyena: HyenaSizes = field(default_factory=HyenaSizes)
    norm: Literal["rms", "layer"] = "rms"
    post_norm: bool = False
    mlp: Literal["swiglu", "gelu", "relu"] = "swiglu"
    position: Literal["rope", "learned", "sinusoidal", "none"] = "rope"
    bias: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))  # a list would make the config unhashable
        at_least(1, vocab_size=self.vocab_size, d_model=self.d_model, max_len=self.max_len)
        at_least(1, n_heads=self.n_heads, n_kv_heads=self.n_kv_heads, head_dim=self.head_dim)
        at_least(0, n_layers=self.n_layers, d_ff=self.d_ff, window=self.window, sinks=self.sinks)
        one_of(("rms", "layer"), norm=self.norm)
        one_of(("swiglu", "gelu", "relu"), mlp=self.mlp)
        one_of(("rope", "learned", "sinusoidal", "none"), position=self.position)
        if self.n_heads % self.n_kv_heads:
            fits = [n for n in range(1, self.n_heads + 1) if self.n_heads % n == 0]
            raise ShapeError(
                f"{self.n_heads} query heads cannot share {self.n_kv_heads} key/value heads "
                f"({self.n_heads} is not a multiple of {self.n_kv_heads}).",
                "Grouped-query attention gives each key/value head the same number of query heads.",
                f"n_kv_heads = one of {fits}.",
            )
        if self.position == "rope" and self.rope_dim % 2:
            raise ShapeError(
                f"{'rope_dim' if self.latent else 'head_dim'} = {self.rope_dim} is odd.",
                "Rotary position embedding turns the features of a head in pairs.",
                f"{self.rope_dim + 1}.",
            )
        if self.position == "rope" and self.rope_scaling.kind == "ntk" and self.rope_dim == 2:
            raise ShapeError(
                "NTK scaling came for heads that turn one pair of features.",
                "It stretches the slowest pair and keeps the fastest, and here they are the same one.",
                "another kind of scaling, e.g. linear, or wider heads.",
            )
        self._check_layers()

    def _check_layers(self) -> None:
        if self.layers and len(self.layers) != self.n_layers:
            raise ShapeError(
                f"{len(self.layers)} kinds of layers came for {self.n_layers} layers.",
                "`layers` names the sequence mixer of each layer in order.",
                f"layers = {self.layers[:1]!r} * {self.n_layers}, or none for attention everywhere.",
            )
        if unknown := [kind for kind in self.layers if kind not in KINDS]:
            raise ShapeError(
                f"a layer cannot be {unknown[0]!r}.",
                f"The sequence mixers are {', '.join(KINDS)}.",
                "one of these names.",
            )
        if "window" in self.layers and self.window < 1:
            raise ShapeError(
                f"a sliding window of {self.window} tokens shows a token not even itself.",
                "A window counts the current token.",
                "window = 1 or more.",
            )
        if "latent" in self.layers and self.latent is None:
            raise ShapeError(
                "latent layers came without their sizes.",
                "Their ranks and head widths are not those of the other attention layers.",
                "latent = LatentSizes(q_rank, kv_rank, nope_dim, rope_dim, v_dim).",
            )
        others = {"attention", "window", "linear"} & set(self.kinds)
        if self.latent and others and self.position == "rope" and self.latent.rope_dim != self.head_dim:
            raise ShapeError(
                f"latent layers turn {self.latent.rope_dim} features, {min(others)} layers {self.head_dim}.",
                "All layers of a model share one rotary table.",
                f"head_dim = {self.latent.rope_dim}, or one kind of layer.",
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each of the L layers."""
        return self.layers or ("attention",) * self.n_layers

    @property
    def rope_dim(self) -> int:
        """Features of a head that are turned by their position."""
        return self.latent.rope_dim if self.latent else self.head_dim

    @property
    def n_params(self) -> int:
        """Parameters, counted from the shapes (tests hold it equal to the modules' own count)."""
        from llmcourse.models.mixers import MIXERS

        norm = self.d_model * (2 if self.norm == "layer" else 1)
        up = 2 if self.mlp == "swiglu" else 1
        mlp = (up + 1) * self.d_model * self.d_ff + self.bias * (up * self.d_ff + self.d_model)
        block = norm + (norm + mlp if self.d_ff else 0)
        mixers = sum(MIXERS[kind].n_params(self) for kind in self.kinds)
        embeddings = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        embeddings += self.max_len * self.d_model * (self.position == "learned")
        return embeddings + self.n_layers * block + mixers + norm * (not self.post_norm)

    def cache_bytes(self, tokens: int, itemsize: int = 2) -> int:
        """Bytes that all layers together keep of a sequence of `tokens`, at `itemsize` bytes a number."""
        from llmcourse.models.mixers import MIXERS

        return sum(MIXERS[kind].cache_bytes(self, tokens, itemsize) for kind in self.kinds)

    def kv_bytes_per_token(self, itemsize: int = 2) -> int:
        """Bytes by which the cache grows with a token, no window being full; 2·L·Hkv·D·itemsize for GQA."""
        return self.cache_bytes(1, itemsize) - self.cache_bytes(0, itemsize)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """From the `config.json` of a Llama, Mistral, Qwen2, Qwen3 or (dense) DeepSeek-V3 checkpoint.

        Raises ModelError for another family, or a feature that these blocks would silently compute wrongly.
        """
        from llmcourse.models.hf_config import from_hf

        return from_hf(hf)

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """From GGUF metadata of architecture `llama` (SmolLM2 and Llama are stored under it)."""
        from llmcourse.models.gguf_file import config_from

        return config_from(fields)
