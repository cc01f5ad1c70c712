"""Checkpoints that are whole or not there, and hold all that a training run depends on.

A run is a function of its state: weights, the optimizer's moments, the place in the data, the step, and
every random generator. Bring all of it back, and the run goes on *bit for bit* as if nothing had happened;
leave one out (Adam's moments are the popular choice) and the curve shows a bump that looks like a bug in the
model.

A process can be killed at any instruction. A checkpoint is therefore written beside its place under another
name, forced to the disk, and only then renamed: the rename happens entirely or not at all, so every file
with a checkpoint's name is complete. What a killed writer leaves behind is swept away by the next one.

One file holds everything: tensors as safetensors, and the rest (numbers, names, nesting) as JSON in its
header. Nothing in it can run, unlike a pickle.

    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save(trainer.state_dict(), trainer.step)
    trainer.load_state_dict(checkpoints.load())
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmcourse.errors import CourseError, DiskError

NAME = re.compile(r"step-(\d{8})\.safetensors")
PART = re.compile(r"\.step-\d{8}\.(\d+)\.part")


class CheckpointError(CourseError, ValueError):
    """A checkpoint that is not there, is damaged, or belongs to something else."""


class Checkpoints:
    """The checkpoints of one run in one folder: `step-00000300.safetensors` and so on.

    keep   how many of the newest stay; older ones go once a newer one is whole
    """

    def __init__(self, folder: Path | str, *, keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), max(1, keep)

    def all(self) -> list[Path]:
        """Every whole checkpoint, oldest first."""
        return sorted(p for p in self.folder.glob("step-*.safetensors") if NAME.fullmatch(p.name))

    def newest(self) -> Path | None:
        return self.all()[-1] if self.all() else None

    def save(self, state: Mapping[str, Any], step: int) -> Path:
        """Write `state` as the checkpoint of `step`, whole or not at all. Raises DiskError when it cannot."""
        from safetensors import SafetensorError

        path = self.folder / f"step-{step:08}.safetensors"
        part = self.folder / f".step-{step:08}.{os.getpid()}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(part, state)
            os.replace(part, path)
            _sync(self.folder)
        except (OSError, SafetensorError) as error:
            raise DiskError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {error}.",
                f"The run is unharmed, and its {len(self.all())} earlier checkpoints are whole.",
                "another folder, or room on this one's disk.",
            ) from error
        finally:
            with suppress(OSError):
                part.unlink()
        for old in self.all()[: -self.keep]:
            old.unlink(missing_ok=True)
        self._sweep()
        return path

    def load(self, path: Path | None = None) -> dict[str, Any]:
        """The state in `path`, or in the newest checkpoint. Raises CheckpointError."""
        path = path or self.newest()
        if path is None:
            raise CheckpointError(
                f"there is no checkpoint in {self.folder}.",
                "One is there once the run has saved for the first time.",
                "the folder of the run, or a start from the beginning.",
            )
        try:
            return read(path)
        except CheckpointError as error:
            others = [p.name for p in self.all() if p != path]
            raise CheckpointError(
                error.what, error.why, f"load(folder / {others[-1]!r})." if others else error.fix
            ) from error

    def _sweep(self) -> None:
        """Remove what writers left that were killed while they wrote."""
        for path in self.folder.glob(".step-*.part"):
            if (found := PART.fullmatch(path.name)) and not _alive(int(found.group(1))):
                path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ one file


def write(path: Path, state: Mapping[str, Any]) -> None:
    """A nested state (dicts, lists, tuples, tensors, numbers, text) as one file, safely on the disk."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    shape = _pack(state, "", tensors, {})
    if not tensors:
        tensors["empty"] = torch.zeros(0)  # safetensors keeps its header only with something to describe
    save_file(tensors, path, metadata={"state": json.dumps(shape)})
    _sync(path)


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote, tensors on the CPU. Raises CheckpointError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            shape = json.loads((file.metadata() or {})["state"])
            return _unpack(shape, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(
            f"there is no checkpoint {path}.", "Nothing has that name.", "Checkpoints(folder).all()."
        ) from error
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: {error}.",
            "It was cut short or altered after it was written, or is another program's.",
            "an earlier one of Checkpoints(folder).all().",
        ) from error


def _pack(value: Any, name: str, tensors: dict[str, Tensor], seen: dict[Any, str]) -> Any:
    """`value` as JSON; its tensors go to `tensors`, those that share memory (tied weights) once."""
    if isinstance(value, Tensor):
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if value.numel() == 0 or key not in seen:
            plain = value.detach().to("cpu").contiguous()
            whole = plain.untyped_storage().nbytes() == plain.nbytes
            tensors[name] = plain if whole and not plain.is_conj() else plain.clone()
            seen[key] = name
        return {"tensor": seen[key]}
    if isinstance(value, Mapping):
        if all(isinstance(k, str) for k in value) and not {"tensor", "tuple", "items"} & set(value):
            return {k: _pack(v, f"{name}.{k}".lstrip("."), tensors, seen) for k, v in value.items()}
        return {"items": [[k, _pack(v, f"{name}.{k}", tensors, seen)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        packed = [_pack(v, f"{name}.{i}", tensors, seen) for i, v in enumerate(value)]
        return {"tuple": packed} if isinstance(value, tuple) else packed
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(
        f"{name} is {type(value).__name__}, which a checkpoint cannot hold.",
        "A file that could hold any object could also run code when it is read.",
        "tensors, numbers, text, and lists, tuples and dicts of them in state_dict().",
    )


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(_unpack(v, tensors) for v in value["tuple"])
    if "items" in value:
        return {k: _unpack(v, tensors) for k, v in value["items"]}
    return {k: _unpack(v, tensors) for k, v in value.items()}


def _sync(path: Path) -> None:
    """Wait until the disk has it: a rename that survives a power cut must not point to what did not."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _alive(pid: int) -> bool:
    import psutil

    return pid == os.getpid() or psutil.pid_exists(pid)


# --------------------------------------------------------------------------------- what a run depends on


def random_state() -> dict[str, Any]:
    """Every generator that code may draw from without saying so: PyTorch's, its GPUs', Python's, NumPy's."""
    kind, keys, at, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, following = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
        "python": [version, torch.tensor(words), following],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), at, has_gauss, gauss],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, words, following = state["python"]
    random.setstate((version, tuple(words.tolist()), following))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


def set_weights(model: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy weights into `model`. Raises CheckpointError, naming the first that does not fit."""
    wanted = model.state_dict()
    for name in sorted(wanted.keys() | state.keys()):
        have, need = state.get(name), wanted.get(name)
        if have is None or need is None or have.shape != need.shape or have.dtype != need.dtype:
            raise CheckpointError(
                f"the weight {name} is {_told(have)} in the checkpoint and {_told(need)} in the model.",
                "A run goes on in the model that it began with.",
                "a model of the same sizes and number format.",
            )
    model.load_state_dict(dict(state))


def set_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Put an optimizer's state back as it was, number formats included.

    `Optimizer.load_state_dict` casts every moment to its weight's format: float32 moments of bfloat16 weights
    would be rounded, and the run would go on, but not bit for bit.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    saved = [i for group in state["param_groups"] for i in group["params"]]
    if len(parameters) != len(saved):
        raise CheckpointError(
            f"the optimizer has {len(parameters)} weights, the checkpoint's had {len(saved)}.",
            "Its moments belong to the weights one by one, in order.",
            "an optimizer made in the same way, with the same groups.",
        )
    optimizer.load_state_dict(dict(state))
    for index, p in zip(saved, parameters, strict=True):
        for name, value in state["state"].get(index, {}).items():
            if isinstance(value, Tensor) and name != "step":  # where that one lives is PyTorch's business
                optimizer.state[p][name] = value.to(p.device, copy=True)


def _told(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
