"""The inference engine: prompts in, tokens out, with every optimisation a switch.

llm = LLM()
for piece in llm.stream("What is a GPU?"):
    print(piece.text, end="")
"""

from llmcourse.engine.llm import LLM, Completion, Piece
from llmcourse.engine.sampler import SamplingParams
from llmcourse.engine.timing import Timing

__all__ = ["LLM", "Completion", "Piece", "SamplingParams", "Timing"]
