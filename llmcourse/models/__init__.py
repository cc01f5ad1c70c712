"""Models: one set of blocks, read from real checkpoints.

model, tokenizer = models.load()              # SmolLM2-135M-Instruct
logits = model(torch.tensor([tokenizer.encode("The capital of France is")]))
"""

from llmcourse.models.cache import KVCache
from llmcourse.models.config import ModelConfig
from llmcourse.models.loading import load, load_tokenizer, random_model
from llmcourse.models.sizes import HyenaSizes, LatentSizes, RopeScaling, SSMSizes
from llmcourse.models.transformer import Transformer

__all__ = [
    "HyenaSizes",
    "KVCache",
    "LatentSizes",
    "ModelConfig",
    "RopeScaling",
    "SSMSizes",
    "Transformer",
    "load",
    "load_tokenizer",
    "random_model",
]
