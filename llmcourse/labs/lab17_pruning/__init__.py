"""Lab 17: half of the weights gone: which ones, what the others do about it, and half of the bytes read."""

from llmcourse.labs.lab17_pruning.mask_24 import mask_24
from llmcourse.labs.lab17_pruning.pack_24 import pack_24
from llmcourse.labs.lab17_pruning.sparse_gemv import sparse_gemv
from llmcourse.labs.lab17_pruning.sparsegpt_update import sparsegpt_update

EXERCISES = (mask_24, sparsegpt_update, pack_24, sparse_gemv)
