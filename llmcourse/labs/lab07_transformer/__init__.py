"""Lab 07: the pieces of a decoder block, and the block itself, in which the real model speaks."""

from llmcourse.labs.lab07_transformer.apply_rope import apply_rope
from llmcourse.labs.lab07_transformer.attention import attention
from llmcourse.labs.lab07_transformer.causal_mask import causal_mask
from llmcourse.labs.lab07_transformer.decoder_block import decoder_block
from llmcourse.labs.lab07_transformer.project_heads import project_heads

EXERCISES = (project_heads, apply_rope, causal_mask, attention, decoder_block)
