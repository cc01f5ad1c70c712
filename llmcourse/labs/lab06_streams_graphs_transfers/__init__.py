"""Lab 06: schedules on paper, a prefetching loop, and a decode step that a graph can hold."""

from llmcourse.labs.lab06_streams_graphs_transfers.best_chunks import best_chunks
from llmcourse.labs.lab06_streams_graphs_transfers.decode_step import decode_step
from llmcourse.labs.lab06_streams_graphs_transfers.launch_order import launch_order
from llmcourse.labs.lab06_streams_graphs_transfers.pipeline_us import pipeline_us
from llmcourse.labs.lab06_streams_graphs_transfers.prefetch import prefetch

EXERCISES = (pipeline_us, best_chunks, prefetch, launch_order, decode_step)
