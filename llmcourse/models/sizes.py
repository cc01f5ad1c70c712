"""Sizes that only some layers have: how positions are stretched, and what MLA, SSM and Hyena layers hold."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from llmcourse.errors import ShapeError


def at_least(least: int, **sizes: int) -> None:
    """Raise ShapeError for the first of these sizes that is smaller."""
    for name, size in sizes.items():
        if size < least:
            raise ShapeError(
                f"{name} = {size}.",
                "Layers are built from these sizes, and a size counts something.",
                f"{name} = {least} or more.",
            )


def one_of(choices: Collection[str], **names: str) -> None:
    """Raise ShapeError for the first of these names that is no choice: silently it would be another model."""
    for field, name in names.items():
        if name not in choices:
            raise ShapeError(
                f"{field} = {name!r} is not known.",
                "A model built all the same would be another one than was meant.",
                f"{field} = one of {', '.join(choices)}.",
            )


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those of training.

    linear    every frequency divided by `factor` (position interpolation, Chen et al. 2023, arXiv:2306.15595)
    ntk       the base raised, so that the slowest pair is stretched by `factor` and the fastest hardly at all
    llama3    slow pairs stretched, fast ones kept, a smooth band between (Llama 3.1)
    yarn      likewise, with whole pairs as edges and attention sharpened (Peng et al. 2023, arXiv:2309.00071)

    low_freq_factor, high_freq_factor    the band of llama3, in turns within the original context
    beta_slow, beta_fast                 the band of yarn, likewise
    attention_factor                     yarn: both tables are multiplied by it; None: 0.1·ln(factor) + 1
    mscale, mscale_all_dim               yarn in DeepSeek's checkpoints: the two parts of that factor
    """

    kind: Literal["default", "linear", "ntk", "llama3", "yarn"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192
    beta_slow: float = 1.0
    beta_fast: float = 32.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        one_of(("default", "linear", "ntk", "llama3", "yarn"), kind=self.kind)
        if not self.factor > 0:
            raise ShapeError(
                f"positions stretched by a factor of {self.factor}.",
                "Frequencies are divided by it.",
                "factor = 1.0 for no change, 4.0 for a context four times as long.",
            )


@dataclass(frozen=True)
class LatentSizes:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1). Widths in features.

    q_rank     rank of the query's compression (0: queries are projected directly)
    kv_rank    width of the latent from which all heads' keys and values are made
    nope_dim   features of a head's query and key that carry no position
    rope_dim   features that carry it; the key's are shared by all heads
    v_dim      features of a head's value
    """

    q_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int

    def __post_init__(self) -> None:
        at_least(0, q_rank=self.q_rank, nope_dim=self.nope_dim, rope_dim=self.rope_dim)
        at_least(1, kv_rank=self.kv_rank, v_dim=self.v_dim, qk_dim=self.qk_dim)

    @property
    def qk_dim(self) -> int:
        """Features of a head's query and key."""
        return self.nope_dim + self.rope_dim


@dataclass(frozen=True)
class SSMSizes:
    """Selective state-space layer (Gu & Dao 2023, arXiv:2312.00752).

    d_state   numbers of state for each channel
    d_conv    width of the short causal convolution before the scan
    expand    channels, in multiples of d_model
    dt_rank   rank of the projection that gives the step sizes (0: ceil(d_model / 16))
    """

    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int = 0

    def __post_init__(self) -> None:
        at_least(1, d_state=self.d_state, d_conv=self.d_conv, expand=self.expand)
        at_least(0, dt_rank=self.dt_rank)


@dataclass(frozen=True)
class HyenaSizes:
    """Hyena layer (Poli et al. 2023, arXiv:2302.10866) or its modal form (StripedHyena).

    kind       implicit: a small network gives the long filter; modal: it is a sum of `d_state` decaying modes
    d_conv     width of the short causal convolutions
    d_filter   width of the implicit filter's network
    d_state    modes of a modal filter
    """

    kind: Literal["implicit", "modal"] = "implicit"
    d_conv: int = 3
    d_filter: int = 32
    d_state: int = 8

    def __post_init__(self) -> None:
        one_of(("implicit", "modal"), kind=self.kind)
        at_least(1, d_conv=self.d_conv, d_filter=self.d_filter, d_state=self.d_state)
