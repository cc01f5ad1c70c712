"""llmcourse: from backprop to an LLM serving engine, in notebooks that run.

The package is imported in well under half a second: PyTorch, Triton and Jupyter are loaded by
the modules that need them, when they need them.
"""

__version__ = "0.1.0"
