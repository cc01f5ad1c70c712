"""Lab 11: attention's work without its square: convolutions by FFT, and states that do not grow."""

from llmcourse.labs.lab11_subquadratic.causal_fft_conv import causal_fft_conv
from llmcourse.labs.lab11_subquadratic.linear_attention_chunked import linear_attention_chunked
from llmcourse.labs.lab11_subquadratic.linear_attention_parallel import linear_attention_parallel
from llmcourse.labs.lab11_subquadratic.linear_attention_step import linear_attention_step
from llmcourse.labs.lab11_subquadratic.modal_step import modal_step
from llmcourse.labs.lab11_subquadratic.selective_scan import selective_scan

EXERCISES = (
    causal_fft_conv,
    modal_step,
    linear_attention_parallel,
    linear_attention_step,
    linear_attention_chunked,
    selective_scan,
)
