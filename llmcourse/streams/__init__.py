"""Streams, events, graphs and transfers: programs that are simulated, run on a GPU, and compared."""
