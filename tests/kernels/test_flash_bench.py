"""The benchmark of FlashAttention and its sweep, without a GPU: every path at small sizes."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from llmcourse.bench import BENCHMARKS, flash, flash_cases, flash_sweep
from llmcourse.bench.flash_cases import Case, Inputs, call, cases, error_of, exact, ours
from llmcourse.bench.flash_sweep import Bench, Group
from llmcourse.errors import DeviceError
from llmcourse.kernels.attention_ceiling import rates
from llmcourse.kernels.attention_reference import reference
from llmcourse.kernels.flash_hopper import Schedule
from llmcourse.kernels.flash_plan import Plan, Tiles


@pytest.fixture(autouse=True)
def one_thread_of_torch():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_it_is_a_benchmark_of_the_command_line():
    assert "flash" in BENCHMARKS


def test_the_cases_are_those_of_the_targets():
    found = list(cases())
    names = [case.name for case in found]
    assert len(set(names)) == len(names)
    for case in found:
        if case.group in ("forward", "backward"):
            assert case.batch * case.length == 16_384
            assert case.heads * case.head_dim == 2048
    for group in ("forward", "backward"):
        shapes = {(c.length, c.head_dim, c.causal) for c in found if c.group == group}
        assert len(shapes) == 5 * 2 * 2
    assert {(c.heads, c.kv_heads) for c in found if c.group == "gqa"} == {(32, 8)}
    assert {c.window for c in found if c.group == "window"} == {1024, 4096}
    assert len({c.lengths for c in found if c.group == "varlen"}) == 1


def test_flops_are_those_of_visible_pairs():
    case = Case("forward", 2, 4, 4, 100, 64, causal=True)
    assert case.flops == 4 * 64 * 2 * 4 * (100 * 101 // 2)
    packed = Case("varlen", 2, 1, 1, 7, 64, lengths=(7, 3))
    assert packed.flops == 4 * 64 * (7 * 8 // 2 + 3 * 4 // 2)


def test_on_a_cpu_every_path_runs_and_every_result_is_right():
    rows, notes = flash.run("cpu")
    assert "no times" in notes[0]
    ours_ = [row for row in rows if row["who"].startswith("ours")]
    assert {row["group"] for row in ours_} == {"forward", "backward", "small", "window", "varlen"}
    assert {row["who"] for row in ours_} == {"ours: pointer", "ours: hopper"}
    assert all(row["error"] < flash.GOOD_ENOUGH for row in ours_)
    assert not [row for row in rows if "wrong" in row.get("unavailable", "")]


def test_grouped_heads_are_judged_by_their_group():
    case = Case("gqa", 1, 4, 2, 40, 64, backward=True)
    x = Inputs.of(case, "cpu")
    right = exact(case, x)
    assert [tuple(r.shape[:2]) for r in right] == [(1, 2), (1, 1), (1, 1)]
    found = call(case, x, ours(case, x, interpret=True)["ours: pointer"][0])()
    assert error_of(case, x, found, right) < flash.GOOD_ENOUGH
    wrong = tuple(y * 1.1 for y in found)
    assert error_of(case, x, wrong, right) > flash.GOOD_ENOUGH


def test_one_wrong_query_at_the_end_is_seen():
    case = Case("forward", 1, 1, 1, 200, 64)
    x = Inputs.of(case, "cpu")
    o = reference(x.q, x.k, x.v, causal=True)[0]
    assert error_of(case, x, o, exact(case, x)) < 0.01
    o[:, :, -1] *= 1.2
    assert error_of(case, x, o, exact(case, x)) > 0.1


def test_a_peer_that_fails_or_errs_becomes_a_reason(monkeypatch):
    def missing(q, k, v):
        raise RuntimeError("no kernel\nfor these sizes")

    monkeypatch.setattr(
        flash,
        "peers",
        lambda case, x, flex: {"missing": missing, "wrong": lambda q, k, v: torch.zeros_like(q)},
    )
    rows = flash.measure_case(Case("forward", 1, 1, 1, 32, 64), "cpu", timed=False)
    reasons = {row["who"]: row.get("unavailable", "") for row in rows}
    assert "no kernel for these sizes" in reasons["missing"]
    assert reasons["wrong"].startswith("wrong: off by 1")
    assert reasons["ours: pointer"] == ""


def test_without_a_right_rung_of_ours_there_is_no_figure(monkeypatch):
    monkeypatch.setattr(flash, "ours", lambda case, x, **_: {"ours: pointer": (lambda q, k, v: q, "")})
    with pytest.raises(DeviceError, match="no rung of ours is right"):
        flash.measure_case(Case("forward", 1, 1, 1, 32, 64), "cpu", timed=False)


def test_timed_rows_have_rates_and_shares_of_both_ceilings(monkeypatch):
    monkeypatch.setattr(flash_cases, "BACK_ENDS", {"FlashAttention-2": "FLASH_ATTENTION"})
    r = rates("H100 SXM")
    rows = flash.measure_case(Case("forward", 1, 1, 1, 16, 64), "cpu", r)
    for row in rows:
        assert row["tflops"] == pytest.approx(4 * 64 * (16 * 17 // 2) / row["us"] / 1e6)
        assert row["of_ceiling"] == pytest.approx(row["tflops"] / row["ceiling_tflops"])
        assert row["no_overlap_tflops"] < row["ceiling_tflops"]
    assert min(row["times_ours"] for row in rows if row["who"].startswith("ours")) == 1


def test_the_memory_group_runs():
    rows = flash.memory_rows("cpu", (32,))
    assert {row["who"] for row in rows} >= {"naive", "ours: pointer"}
    assert not [row for row in rows if "unavailable" in row]


def test_groups_that_a_run_had_not_are_kept(tmp_path, monkeypatch):
    gpu = {"name": "a GPU", "kind": "cuda"}
    monkeypatch.setattr(flash, "describe_device", lambda device: gpu)
    old = [{"group": "forward", "tflops": 1}, {"group": "window", "tflops": 2}, {"group": "ceiling"}]
    record = {"name": "flash", "device": gpu, "versions": {}, "date": "2026-01-01", "command": ""}
    (tmp_path / "flash.json").write_text(json.dumps({**record, "results": old, "notes": []}))
    new = [{"group": "forward", "tflops": 3}]
    assert flash.merged(new, ("forward",), tmp_path) == [*new, old[1]]


# the sweep


@pytest.mark.parametrize("kernel", flash_sweep.KERNELS)
def test_a_sweep_takes_right_candidates_and_times_them(kernel, monkeypatch):
    monkeypatch.setattr(flash_sweep, "COLUMNS", 64)
    group = Group(kernel, 64, True)
    monkeypatch.setattr(flash_sweep, "TOKENS", 64)
    bench = Bench.of(group, 64, "cpu", tokens=64)
    some = (
        [Schedule(2, 64, 2, 1), Schedule(3, 64, 2, 1)]
        if kernel == "hopper"
        else [Tiles("pointer", 16, 32, 4, 1), Tiles("pointer", 32, 16, 4, 1)]
    )
    assert [bench.fault(choice) for choice in some] == ["", ""]
    rows = flash_sweep.time_all(bench, some, "tiles")
    assert rows[0]["us"] <= rows[1]["us"]
    kind = Schedule if kernel == "hopper" else Tiles
    assert {kind(**row["choice"]) for row in rows} == set(some)
    json.dumps(rows)


def test_the_best_of_a_sweep_replaces_shipped_plans(tmp_path):
    tiles, schedule = Tiles("descriptor", 64, 64, 4, 2, 3), Schedule(3, 64, 2, 5, persistent=True)
    rows = [
        {
            "group": "forward D64 causal",
            "length": 8192,
            "us": 9.0,
            "choice": tiles._replace(heads=1)._asdict(),
        },
        {"group": "forward D64 causal", "length": 8192, "us": 5.0, "choice": tiles._asdict()},
        {
            "group": "forward D64 causal",
            "length": 2048,
            "us": 1.0,
            "choice": tiles._replace(heads=2)._asdict(),
        },
        {"group": "hopper D64 causal", "length": 8192, "us": 4.0, "choice": schedule._asdict()},
    ]
    file = tmp_path / "flash_sweep.json"
    file.write_text(json.dumps({"results": rows}))
    chosen = flash_sweep.best_of(file)
    assert chosen == {"forward D64 causal descriptor": tiles, "hopper D64 causal hopper": schedule}
    case = Case("forward", 2, 32, 32, 8192, 64)
    shipped = flash_cases.plans(case, torch.bfloat16, 90, {})
    tuned = flash_cases.plans(case, torch.bfloat16, 90, chosen)
    assert set(shipped) == set(tuned) == {"ours: pointer", "ours: descriptor", "ours: hopper"}
    assert tuned["ours: hopper"] == schedule
    assert tuned["ours: descriptor"] == shipped["ours: descriptor"]._replace(forward=tiles)
    assert tuned["ours: pointer"] == shipped["ours: pointer"]
    assert set(flash_cases.plans(case, torch.bfloat16, 80, {})) == {"ours: pointer"}
    for rung, plan in tuned.items():
        if rung != "ours: hopper":
            assert Plan.parse(str(plan)) == plan


def test_a_wrong_candidate_is_found():
    bench = Bench.of(Group("forward", 64, True), 64, "cpu", tokens=64)
    bench.run = lambda choice: bench.v  # type: ignore[method-assign]
    assert bench.fault(None).startswith("wrong")


def test_candidates_are_many_and_different_and_wider_ones_differ_in_heads_only():
    for kernel in flash_sweep.KERNELS:
        for causal in (False, True):
            group = Group(kernel, 128, causal)
            found = flash_sweep.choices(group)
            assert 8 <= len(found) == len(set(found)) <= 30
            more = flash_sweep.wider(found[:1])
            strip = {"band": 0} if kernel == "hopper" else {"heads": 0}
            assert {c._replace(**strip) for c in more} == {found[0]._replace(**strip)}
