"""The kinds of layers by name: the module that mixes tokens, and through it what it keeps of them."""

from __future__ import annotations

from typing import Any

from llmcourse.models.attention import Attention, WindowAttention
from llmcourse.models.hyena import Hyena
from llmcourse.models.linear_attention import LinearAttention
from llmcourse.models.mla import LatentAttention
from llmcourse.models.ssm import SSM

# Each has `state` (what it keeps), `n_params(config)` and `cache_bytes(config, tokens, itemsize)`.
MIXERS: dict[str, Any] = {
    "attention": Attention,
    "window": WindowAttention,
    "latent": LatentAttention,
    "linear": LinearAttention,
    "ssm": SSM,
    "hyena": Hyena,
}
