"""Checkpoints: a run that is killed with SIGKILL ends with the bits of one that is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from llmcourse.errors import DiskError
from llmcourse.train.loop import Trainer
from llmcourse.train.optim import LAMB
from llmcourse.train.resume import CheckpointError, Checkpoints, read, write

sys.path.insert(0, str(Path(__file__).parent))
from killed_run import make

SCRIPT = Path(__file__).with_name("killed_run.py")
STEPS = 20


def start(folder: Path, steps: int, *more: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), str(folder), str(steps), *map(str, more)]
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root}
    )


def kill_at(folder: Path, step: int) -> None:
    """Start the run and kill its process as soon as it has said that this step is done."""
    process = start(folder, STEPS)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= step:
                break
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(folder, STEPS)
    process.communicate(timeout=120)
    assert process.returncode == 0
    return Checkpoints(folder).load()


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def differences(a, b, where=""):
    """The places at which two states differ, bit for bit; times are no part of a state."""
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
        return [] if same else [where]
    if isinstance(a, dict):
        keys = (a.keys() | b.keys()) - {"seconds"}
        return [d for k in sorted(keys, key=str) for d in differences(a.get(k), b.get(k), f"{where}.{k}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [where]
        return [
            d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{where}.{i}")
        ]
    return [] if a == b else [where]


def test_a_run_killed_between_checkpoints_ends_with_the_same_bits(tmp_path, undisturbed):
    kill_at(tmp_path, 8)
    kept = Checkpoints(tmp_path).newest()
    assert kept is not None
    assert read(kept)["step"] in range(6, STEPS)
    kill_at(tmp_path, 14)
    process = start(tmp_path, STEPS)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert int(out.split()[0]) > 12, "it went on, and did not begin anew"
    assert differences(undisturbed, Checkpoints(tmp_path).load()) == []


def test_a_run_killed_while_it_writes_leaves_no_half_checkpoint(tmp_path, undisturbed):
    process = start(tmp_path, STEPS, 9)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert [p.name for p in Checkpoints(tmp_path).all()] == [
        "step-00000003.safetensors",
        "step-00000006.safetensors",
    ]
    assert len(list(tmp_path.glob(".step-00000009.*.part"))) == 1
    process = start(tmp_path, STEPS)
    process.communicate(timeout=120)
    assert differences(undisturbed, Checkpoints(tmp_path).load()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-00000018.safetensors",
        "step-00000020.safetensors",
    ]


@pytest.mark.parametrize("forgotten", ["optimizer", "data", "random", "also"])
def test_what_a_checkpoint_holds_is_all_needed(forgotten, tmp_path, undisturbed):
    half = make()
    half.run(12, progress=False, on_step=lambda t: t.also["average"].take())
    state = half.state_dict()
    fresh = make(seed=4).state_dict()
    write(tmp_path / "x", {**state, forgotten: fresh[forgotten]})
    rest = make()
    rest.load_state_dict(read(tmp_path / "x"))
    rest.run(STEPS, progress=False, on_step=lambda t: t.also["average"].take())
    assert differences(
        undisturbed["model"] | undisturbed["also"], rest.state_dict()["model"] | rest.state_dict()["also"]
    )


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, LAMB])
def test_every_optimizer_goes_on_bit_for_bit(optimizer, tmp_path):
    whole = make(optimizer=optimizer, rows=3)
    whole.run(9, progress=False)
    first = make(optimizer=optimizer, rows=3)
    first.run(4, folder=tmp_path, progress=False)
    second = make(seed=8, optimizer=optimizer, rows=3)
    second.run(9, folder=tmp_path, progress=False)
    mine, other = whole.state_dict(), second.state_dict()
    for state in (mine, other):
        state["curve"].pop("held_out")  # a test at the end of the first part
    assert differences(mine, other) == []


def test_float32_moments_of_bfloat16_weights_are_not_rounded(tmp_path):
    w = torch.nn.Parameter(torch.randn(7, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    optimizer.state[w]["momentum_buffer"] = torch.full((7,), 1 / 3)
    write(tmp_path / "x", optimizer.state_dict())
    from llmcourse.train.resume import set_optimizer_state

    again = torch.optim.SGD([w], lr=0.2, momentum=0.9)
    set_optimizer_state(again, read(tmp_path / "x"))
    assert again.param_groups[0]["lr"] == 0.1
    assert torch.equal(again.state[w]["momentum_buffer"], torch.full((7,), 1 / 3))


def test_a_nested_state_comes_back_as_it_was(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    state = {
        "numbers": [1, 2.5, float("inf"), -0.0, 1e-310, True, None, 10**30],
        "pair": (1, ("a", [])),
        "by number": {3: {"x": torch.tensor([1 + 2j])}, (1, 2)[0]: "y"},
        "tensor": {"tensor": "a key that looks like ours"},
        "views": [shared, shared, shared.T, shared[1], torch.tensor(7), torch.zeros(0, 3)],
        "formats": [torch.ones(3, dtype=d) for d in (torch.bfloat16, torch.float16, torch.bool, torch.uint8)],
    }
    write(tmp_path / "x", state)
    back = read(tmp_path / "x")
    assert differences(state, back) == []
    assert isinstance(back["pair"], tuple)
    assert isinstance(back["pair"][1][1], list)
    assert np.signbit(back["numbers"][3])


def test_only_the_newest_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 5, 30, 100):
        checkpoints.save({"step": step}, step)
    assert [read(p)["step"] for p in checkpoints.all()] == [30, 100]


def test_a_damaged_checkpoint_is_named_with_the_one_before_it(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"x": torch.ones(100)}, 1)
    newest = checkpoints.save({"x": torch.ones(100)}, 2)
    newest.write_bytes(newest.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="cut short") as error:
        checkpoints.load()
    assert "step-00000001" in error.value.fix
    newest.write_bytes(b"")
    with pytest.raises(CheckpointError):
        checkpoints.load()


def test_a_folder_without_checkpoints_and_a_foreign_one_are_told(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        Checkpoints(tmp_path / "nowhere").load()
    with pytest.raises(CheckpointError, match="no checkpoint"):
        read(tmp_path / "nothing")
    trainer = make()
    state = trainer.state_dict()
    state["model"] = {**state["model"], "mixed.weight": torch.zeros(3, 3)}
    with pytest.raises(CheckpointError, match=r"mixed.weight is float32\[3, 3\]"):
        make().load_state_dict(state)


def test_objects_that_could_run_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"also\.thing is function"):
        write(tmp_path / "x", {"also": {"thing": lambda: 1}})


def test_a_disk_that_cannot_be_written_leaves_the_run_and_its_checkpoints(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    with pytest.raises(DiskError, match="could not be written"):
        Checkpoints(blocked / "run").save({}, 1)


def test_a_failing_write_leaves_nothing_behind(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"step": 1}, 1)
    monkeypatch.setattr(
        "os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(DiskError, match="No space left"):
        checkpoints.save({"step": 2}, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.safetensors"]


def test_the_loop_goes_on_to_more_steps_and_stops_when_it_is_there(tmp_path):
    first: Trainer = make()
    first.run(5, folder=tmp_path, progress=False)
    again = make()
    curve = again.run(5, folder=tmp_path, progress=False)
    assert (again.step, len(curve.loss)) == (5, 5)
    assert len(again.run(8, folder=tmp_path, progress=False).loss) == 8
