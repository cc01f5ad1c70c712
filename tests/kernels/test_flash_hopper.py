"""The Hopper rung of FlashAttention: its values by threads on a CPU, and what it compiles to for sm_90."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

import test_triton_versions as versions

from llmcourse.kernels import flash_hopper, flash_hopper_kernel, gluon_threads
from llmcourse.kernels.attention_reference import reference
from llmcourse.kernels.compile_report import Target, compile_report
from llmcourse.kernels.flash_hopper import SCHEDULES, Schedule, UnsupportedError, forward, unsupported
from llmcourse.kernels.flash_plan import Tiles
from llmcourse.kernels.gluon_language import gluon

if not gluon.found:
    pytest.skip("this Triton has no Gluon", allow_module_level=True)

SHARED_LIMIT = 232_448 - 2048  # of a program on sm_90, less what barriers and the compiler take
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def one_thread_of_torch():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def inputs(batch, heads, kv_heads, queries, keys, head_dim, dtype=torch.bfloat16, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, queries, head_dim, generator=g).to(dtype)
    k, v = (torch.randn(batch, kv_heads, keys, head_dim, generator=g).to(dtype) for _ in range(2))
    return q, k, v


def assert_right(q, k, v, o, lse, **options):
    exact_o, exact_lse = reference(q.double(), k.double(), v.double(), **options)
    assert (o.double() - exact_o).abs().max() < TOLERANCE[q.dtype]
    unseen = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, unseen)
    assert (lse.double() - exact_lse)[~unseen].abs().max() < 1e-4 if (~unseen).any() else True
    assert not o[unseen].any()


# values


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1, 1), (1, 2, 1, 1, 300), (2, 2, 2, 129, 129), (1, 4, 2, 200, 333), (1, 2, 1, 300, 40)],
    ids=str,
)
def test_any_lengths_and_groups_give_what_float64_gives(sizes, causal):
    for seed, schedule in enumerate([Schedule(2, 64, 2, 3), Schedule(3, 128, 3, 2, persistent=True)]):
        q, k, v = inputs(*sizes, 64, seed=seed)
        assert_right(q, k, v, *forward(q, k, v, causal=causal, plan=schedule, interpret=True), causal=causal)


def test_no_choice_of_schedule_changes_a_bit():
    q, k, v = inputs(1, 2, 1, 260, 390, 64)
    found = set()
    for groups, ordered, overlap, persistent in itertools.product((2, 3), *[(False, True)] * 3):
        schedule = Schedule(groups, 64, 2, 2, ordered, overlap, persistent)
        o, lse = forward(q, k, v, causal=True, plan=schedule, interpret=True)
        found.add((tuple(o.view(torch.int16).flatten().tolist()), tuple(lse.flatten().tolist())))
    assert len(found) == 1


def test_head_dim_128_fp16_and_any_scale():
    q, k, v = inputs(1, 1, 1, 100, 150, 128, torch.float16)
    for scale in (0.05, 1.0, -0.2, 0.0):
        assert_right(q, k, v, *forward(q, k, v, scale=scale, interpret=True), scale=scale)


def test_heads_may_lie_between_tokens():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(2, 2, 1, 70, 70, 64))
    o, lse = forward(q, k, v, causal=True, interpret=True)
    assert o.stride() == q.stride()
    assert_right(q, k, v, o, lse, causal=True)


def test_without_keys_or_queries_there_is_nothing_to_sum():
    q, k, v = inputs(1, 2, 1, 5, 0, 64)
    o, lse = forward(q, k, v, interpret=True)
    assert not o.any()
    assert (lse == -torch.inf).all()
    q, k, v = inputs(1, 2, 1, 0, 5, 64)
    assert forward(q, k, v, interpret=True)[0].shape == (1, 2, 0, 64)


def test_what_it_cannot_take_is_named():
    q, k, v = inputs(1, 1, 1, 8, 8, 64)
    assert "CPU" in unsupported(q, k, v)
    assert "float32" in unsupported(q.float(), k.float(), v.float(), interpret=True)
    assert "32" in unsupported(q[..., :32], k[..., :32], v[..., :32], interpret=True)
    shifted = torch.zeros(8 * 64 + 1, dtype=q.dtype)[1:].view(1, 1, 8, 64)
    assert "16 bytes" in unsupported(q, shifted, v, interpret=True)
    assert "16 bytes" in unsupported(q.expand(2, 1, 8, 64), k, v, interpret=True)
    with pytest.raises(UnsupportedError, match="CPU"):
        forward(q, k, v)
    with pytest.raises(UnsupportedError, match="window"):
        flash_hopper.flash_forward(q, k, v, True, 1.0, window=4)
    with pytest.raises(UnsupportedError, match="CPU"):
        flash_hopper.flash_forward(q, k, v, True, 1.0, 0, Tiles("hopper", 128, 64, 8, 2, 4))


# what threads find


MISTAKES = {
    "keys are read before they have come": (
        "hopper.mbarrier.wait(k_ready.index(stage), phase)\n    k =",
        "hopper.mbarrier.wait(k_ready.index(stage), phase ^ 1)\n    k =",
    ),
    "values are given back while they are multiplied": (
        "        o = hopper.warpgroup_mma_wait(0, [o])\n        release(v_free, i - 1)\n",
        "        release(v_free, i - 1)\n        o = hopper.warpgroup_mma_wait(0, [o])\n",
    ),
    "scores are read while they are computed": (
        "s = hopper.warpgroup_mma_wait(1, [s])",
        "s = hopper.warpgroup_mma_wait(2, [s])",
    ),
    "the turn is not passed on": (
        "        hopper.mbarrier.arrive(turn.index((W + 1) % turn.shape[0]), count=1)",
        "        pass",
    ),
    "a block that a group does not see is kept": (
        "            release(k_free, count)\n            hopper",
        "            hopper",
    ),
    "a released block counts one group only": (
        "hopper.mbarrier.init(free.index(i), count=GROUPS)",
        "hopper.mbarrier.init(free.index(i), count=1)",
    ),
}


def changed(tmp_path: Path, old: str, new: str) -> Any:
    """The kernel with a piece of its source replaced."""
    source = Path(flash_hopper_kernel.__file__).read_text()
    assert source.count(old) == 1, f"{source.count(old)} times in the source: {old}"
    file = tmp_path / "changed_kernel.py"
    file.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("changed_kernel", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["changed_kernel"] = module  # Triton looks a kernel's module up by name
    spec.loader.exec_module(module)
    return module.hopper_kernel


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_barriers_shows(mistake, tmp_path, monkeypatch):
    monkeypatch.setattr(gluon_threads, "PATIENCE", 0.5)
    monkeypatch.setattr(flash_hopper, "hopper_kernel", changed(tmp_path, *MISTAKES[mistake]))
    q, k, v = inputs(1, 2, 1, 384, 700, 64)
    exact, _ = reference(q.double(), k.double(), v.double(), causal=True)
    plan = Schedule(3, 64, 2, 2)
    try:
        o, _ = forward(q, k, v, causal=True, plan=plan, interpret=True)
    except (gluon_threads.RaceError, gluon_threads.DeadlockError):
        return
    assert not (o.double() - exact).abs().max() < TOLERANCE[q.dtype], mistake


# what it compiles to


def compiled(head_dim: int, causal: bool, schedule: Schedule, dtype: torch.dtype = torch.bfloat16) -> Target:
    q, lse = (
        torch.empty(2, 4, 300, head_dim, dtype=dtype, device="meta"),
        torch.empty(2, 4, 300, device="meta"),
    )
    arguments, constants, _ = flash_hopper.arguments_of(q, q, q, q, lse, 0.1, causal, schedule, False)
    return compile_report(flash_hopper_kernel.hopper_kernel, *arguments, capabilities=(90,), **constants)[90]


@pytest.mark.parametrize("key", SCHEDULES, ids=lambda key: f"D{key[0]}{' causal' if key[1] else ''}")
def test_shipped_schedules_multiply_asynchronously_and_spill_nothing(key):
    head_dim, causal = key
    schedule = SCHEDULES[key]
    target = compiled(head_dim, causal, schedule, torch.float16 if causal else torch.bfloat16)
    assert target.error is None
    assert target.spills == target.stack_bytes == 0
    assert target.fits
    assert target.shared_bytes <= schedule.shared_bytes(head_dim) + 2048
    assert target.warps == 4 * schedule.groups + 4
    assert target.registers == flash_hopper.REGISTERS[schedule.groups][0]
    assert target.tensor_core_opcodes.keys() == {"HGMMA"}
    halves = head_dim // 64  # the copy engine moves 128 bytes of a row at a time
    assert target.count("UTMALDG") == halves * (schedule.groups + 2)
    assert target.count("UTMASTG") == schedule.groups * -(-halves // 2)
    # A wait for each wait of the source: were the products serialised, there would be one behind each.
    bodies = 2 if causal else 1
    waits = schedule.groups * (2 + bodies * (1 + schedule.overlap))
    assert target.count("WARPGROUP", "DEPBAR") == waits
    assert target.count("USETMAXREG") > 0


def test_every_schedule_of_the_sweep_fits():
    from llmcourse.bench.flash_sweep import hopper_schedules

    for head_dim in (64, 128):
        schedules = hopper_schedules(head_dim)
        assert SCHEDULES[head_dim, True] in schedules
        assert SCHEDULES[head_dim, False] in schedules
        assert all(s.shared_bytes(head_dim) <= SHARED_LIMIT for s in schedules)


VERSION = """
import json, torch, triton
import test_flash_hopper as here
target = here.compiled(64, False, here.Schedule(2, 64, 2, ordered=False))
print(json.dumps([triton.__version__, target.error, target.spills, target.tma, target.tensor_cores]))
"""


@pytest.mark.parametrize("version", versions.VERSIONS)
def test_it_compiles_under_the_oldest_and_the_newest_triton(version, tmp_path):
    name, error, spills, copies, products = json.loads(versions.run(version, ["-c", VERSION], tmp_path))
    assert name == version
    assert error is None
    assert spills == 0
    assert copies >= 6
    assert products > 0
