"""Sizes that only some layers have: how positions are stretched, and what MLA, SSM and Hyena layers hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
