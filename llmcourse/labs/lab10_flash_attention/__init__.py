"""Lab 10: attention in blocks, graded on values, on bytes moved, and on the largest tensor made."""

from llmcourse.labs.lab10_flash_attention.flash_backward import flash_backward
from llmcourse.labs.lab10_flash_attention.flash_bytes import flash_bytes
from llmcourse.labs.lab10_flash_attention.flash_forward import flash_forward
from llmcourse.labs.lab10_flash_attention.merge_partials import merge_partials
from llmcourse.labs.lab10_flash_attention.online_attention import online_attention

EXERCISES = (online_attention, merge_partials, flash_bytes, flash_forward, flash_backward)
