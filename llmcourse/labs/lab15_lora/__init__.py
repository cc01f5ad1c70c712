"""Lab 15: corrections of low rank: beside a weight, inside it, and many of them in one batch."""

from llmcourse.labs.lab15_lora.grouped import grouped
from llmcourse.labs.lab15_lora.lora_linear import lora_linear
from llmcourse.labs.lab15_lora.merged import merged
from llmcourse.labs.lab15_lora.multi_lora import multi_lora

EXERCISES = (lora_linear, merged, grouped, multi_lora)
