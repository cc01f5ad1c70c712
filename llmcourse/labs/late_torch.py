"""torch, imported when a name of it is first used: to list the labs takes no seconds.

from llmcourse.labs import late_torch as torch
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):  # what the import system asks a module for
        raise AttributeError(name)
    import torch

    return getattr(torch, name)
