"""Lab 14: weights in four bits: packed, rounded with regard to the inputs, read by a kernel, trained."""

from llmcourse.labs.lab14_quantization.dequant_gemv import dequant_gemv
from llmcourse.labs.lab14_quantization.gptq_update import gptq_update
from llmcourse.labs.lab14_quantization.pack_int4 import pack_int4
from llmcourse.labs.lab14_quantization.straight_through import straight_through

EXERCISES = (pack_int4, gptq_update, dequant_gemv, straight_through)
