"""Lab 08: from text to a model that does as it is told: merges, a masked loss, and two ways to align."""

from llmcourse.labs.lab08_pretraining_to_rlhf.bpe_merges import bpe_merges
from llmcourse.labs.lab08_pretraining_to_rlhf.dpo_loss import dpo_loss
from llmcourse.labs.lab08_pretraining_to_rlhf.masked_sft_loss import masked_sft_loss
from llmcourse.labs.lab08_pretraining_to_rlhf.ppo_objective import ppo_objective

EXERCISES = (bpe_merges, masked_sft_loss, dpo_loss, ppo_objective)
