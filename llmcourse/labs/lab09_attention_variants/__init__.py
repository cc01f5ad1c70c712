"""Lab 09: fewer keys and values: grouped, pooled, windowed, rolled, compressed."""

from llmcourse.labs.lab09_attention_variants.absorbed_attention import absorbed_attention
from llmcourse.labs.lab09_attention_variants.grouped_query_attention import grouped_query_attention
from llmcourse.labs.lab09_attention_variants.largest_batch import largest_batch
from llmcourse.labs.lab09_attention_variants.mean_pool_heads import mean_pool_heads
from llmcourse.labs.lab09_attention_variants.rolling_update import rolling_update
from llmcourse.labs.lab09_attention_variants.window_mask import window_mask

EXERCISES = (
    largest_batch,
    mean_pool_heads,
    grouped_query_attention,
    window_mask,
    rolling_update,
    absorbed_attention,
)
