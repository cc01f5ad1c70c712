"""Tests that need an NVIDIA GPU: `make test-gpu`. Elsewhere they are not collected."""

import importlib.util

collect_ignore_glob: list[str] = []
if importlib.util.find_spec("torch"):
    import torch

    if not torch.cuda.is_available():
        collect_ignore_glob = ["test_*.py"]
