"""`llmcourse chat`: the model in the terminal, through the course's own engine."""

from __future__ import annotations

import sys
from pathlib import Path


def chat(
    *,
    model: Path | None = None,
    prompt: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
) -> int:
    """Stream answers to `prompt`, or to lines read from the terminal until it closes. Returns 0.

    Each answer is followed by its time to first token, time per token and tokens per second.
    """
    from llmcourse.engine import LLM, SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    llm = LLM(model, device=device, dtype=dtype)
    if prompt is not None:
        answer(llm, [{"role": "user", "content": prompt}], params)
        return 0
    messages: list[dict[str, str]] = []
    interactive = sys.stdin.isatty()
    if interactive:
        print("Write a message. /new forgets the conversation, /quit or Ctrl-D ends it.")
    while (line := read(interactive)) is not None:
        if line == "/quit":
            break
        if line == "/new":
            messages = []
        elif line:
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": answer(llm, messages, params)})
    return 0


def read(interactive: bool) -> str | None:
    """The next line, stripped; None at the end."""
    try:
        return input("\nyou › " if interactive else "").strip()
    except EOFError:
        return None


def answer(llm, messages: list[dict[str, str]], params) -> str:  # type: ignore[no-untyped-def]
    """Stream one answer to the terminal, then its measurements; return its text."""
    text, timing, finish = "", None, None
    for piece in llm.chat(messages, params):
        print(piece.text, end="", flush=True)
        text, timing, finish = text + piece.text, piece.timing, piece.finish
    if finish == "length":
        print(" …", end="")
    print(f"\n\n  {timing}", flush=True)
    return text
