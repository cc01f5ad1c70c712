"""Capture and replay on arrays: a replay repeats launches, on what the buffers hold by then."""

from __future__ import annotations

import numpy as np
import pytest

from llmcourse.streams.faults import ProgramError
from llmcourse.streams.loop import Loop
from llmcourse.streams.tape import KERNELS, CaptureError, Tape, TapeError, toy


def test_a_launch_outside_a_capture_runs_at_once_and_inside_it_does_not():
    tape = Tape(x=np.arange(3.0))
    tape.op("y", "add", "x", 1)
    assert tape.read("y") == [1.0, 2.0, 3.0]
    with tape.capture():
        tape.op("y", "add", "y", 1)
    assert tape.read("y") == [1.0, 2.0, 3.0]
    assert tape.lines == [("y", "add", "y", 1)]


def test_a_replay_reads_the_buffers_as_they_are_then_and_numbers_as_they_were():
    tape = Tape(x=np.zeros(2))
    step = 5
    with tape.capture():
        tape.op("x", "add", "x", step)
    step = 7  # too late: the launch was written down
    tape.replay()
    tape.buffers["x"] = np.array([1.0, 2.0])
    tape.replay()
    assert tape.read("x") == [6.0, 7.0]


def test_a_new_capture_replaces_the_old_one():
    tape = Tape(x=np.zeros(2))
    for amount in (1, 2):
        with tape.capture():
            tape.op("x", "add", "x", amount)
    tape.replay()
    assert tape.read("x") == [2.0, 2.0]


def test_reading_is_refused_in_a_capture_and_counted():
    tape = Tape(x=np.zeros(2))
    with pytest.raises(CaptureError, match="Nothing runs during a capture"), tape.capture():
        tape.read("x")
    assert tape.refused == ["x"]
    assert tape.read("x") == [0.0, 0.0]


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (("y", "conv", "x"), "there is no such kernel"),
        (("y", "copy", "z"), "there is no such buffer"),
        (("y", "matmul", "square", "longer"), "cannot run on"),
        (("y", "copy"), "cannot run on nothing"),
        (("x", "copy", "longer"), "makes .3. numbers, and 'x' holds .2. numbers"),
        (("x", "argmax", "square"), "whole numbers"),
    ],
)
def test_launches_that_cannot_be_are_refused_also_while_capturing(launch, message):
    tape = Tape(x=np.zeros(2), longer=np.zeros(3), square=np.zeros((2, 2)))
    with pytest.raises(TapeError, match=message):
        tape.op(*launch)
    with pytest.raises(TapeError, match=message), tape.capture():
        tape.op(*launch)


def test_store_writes_one_slot_of_each_sequence_and_leaves_the_others():
    tape = toy(batch=2, slots=5)
    before = tape.buffers["keys"].copy()
    tape.op("x", "gather", "embedding", "token")
    tape.op("keys", "store", "position", "x")
    after = tape.buffers["keys"]
    assert np.array_equal(after[:, 4], tape.buffers["x"])
    assert np.array_equal(after[:, :4], before[:, :4])


def test_attention_on_a_tape_equals_torchs():
    import torch

    tape = toy(batch=3, slots=6, seed=4)
    tape.op("q", "gather", "embedding", "token")
    for out, kernel, *inputs in (("s", "scores", "q", "keys"), ("s", "mask", "s", "position")):
        tape.op(out, kernel, *inputs)
    tape.op("s", "softmax", "s")
    tape.op("y", "mix", "s", "values")
    q, keys, values = (torch.tensor(tape.buffers[name]) for name in ("q", "keys", "values"))
    mask = torch.arange(6) <= torch.tensor(tape.buffers["position"])[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(q[:, None], keys, values, mask[:, None])
    np.testing.assert_allclose(tape.buffers["y"], expected[:, 0].numpy(), rtol=1e-12)


def test_every_kernel_says_what_it_does():
    assert all(says for _, says in KERNELS.values())


def test_a_loop_notes_its_calls_alike_whatever_its_events_are_called():
    def made(spare: bool) -> Loop:
        loop = Loop(2, 1)
        for i in range(2):
            loop.prepare(i, 0)
            loop.copy(i, 0)
            if spare:
                loop.record("compute")
            loop.wait("compute", loop.record("copies"))
            loop.step(i, 0)
            loop.synchronize(loop.record("compute"))
        return loop

    assert made(True).lines == made(False).lines
    assert ("wait", "compute", ("copies", 2)) in made(False).lines


@pytest.mark.parametrize("call", ["prepare", "copy", "step"])
@pytest.mark.parametrize(("batch", "buffer"), [(2, 0), (-1, 0), (0, 1), (True, 0), ("0", 0)])
def test_a_loop_refuses_batches_and_buffers_that_are_not_there(call, batch, buffer):
    with pytest.raises(ProgramError, match="there is no"):
        getattr(Loop(2, 1), call)(batch, buffer)
