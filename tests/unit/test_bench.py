"""Records hold what was run, and the timing protocol refuses what would mislead."""

from __future__ import annotations

import json
import time

import pytest

from llmcourse.bench import command, new_record, recorded, save
from llmcourse.bench.ceilings import copy_bandwidth, matmul_rate
from llmcourse.bench.ladder import RUNGS, Rung, climb, ladder
from llmcourse.bench.records import FOLDER, Record, all_records
from llmcourse.bench.timing import Sample, measure
from llmcourse.errors import CourseError, UnknownNameError


def test_measure_reports_the_time_that_passes():
    samples = measure({"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.006)})
    assert 0.002 <= samples["short"].median < 0.005
    assert 0.006 <= samples["long"].median < 0.012
    assert samples["short"].count == 20


def test_peers_take_turns():
    calls: list[str] = []
    measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, warmup=1)
    assert calls == ["a", "b"] + ["a", "b"] * 20


def test_fewer_than_20_repeats_are_refused():
    with pytest.raises(CourseError, match="19 repeats"):
        measure({"a": lambda: None}, repeats=19)


def test_a_sample_prints_its_median_and_spread_in_a_fitting_unit():
    assert str(Sample(0.0123, 0.012, 0.02, 20)) == "12.3 ms (12–20, n=20)"
    assert str(Sample(4.2e-6, 4e-6, 5e-6, 20)) == "4.2 µs (4–5, n=20)"
    assert str(Sample(2.0, 1.5, 3.0, 21)) == "2 s (1.5–3, n=21)"


def test_ceilings_lie_between_what_is_absurdly_slow_and_absurdly_fast():
    import torch

    assert 1e8 < copy_bandwidth("cpu", megabytes=8) < 1e13
    assert 1e8 < matmul_rate("cpu", torch.float32, size=128) < 1e15


def test_a_record_is_found_again_with_its_device_and_day(tmp_path):
    record = new_record("ceilings", "cpu", [{"name": "copy", "value": 1.5}], ["a note"])
    path = save(record, tmp_path)
    again = recorded("ceilings", folder=tmp_path)
    assert again == record
    assert again.row(name="copy")["value"] == 1.5
    assert record.device["name"] in again.caption
    assert record.date in again.caption
    assert record.versions["torch"].split("+")[0] in again.caption
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_newest_record_is_taken(tmp_path):
    for day, device in (("2026-01-02", "A"), ("2026-02-01", "B"), ("2025-12-31", "C")):
        save(Record("x", {"name": device, "kind": "cpu"}, {}, day, "", [{"name": day}]), tmp_path)
    assert recorded("x", folder=tmp_path).date == "2026-02-01"
    assert recorded("x", device="c", folder=tmp_path).date == "2025-12-31"


def test_a_missing_record_or_row_names_those_there_are(tmp_path):
    with pytest.raises(UnknownNameError, match="engine_start") as error:
        recorded("no_such_benchmark")
    assert "llmcourse bench" in str(error.value)
    with pytest.raises(UnknownNameError, match="copy"):
        recorded("ceilings").row(name="nothing")


def test_an_unknown_benchmark_is_refused_by_name():
    with pytest.raises(UnknownNameError, match="engine_start"):
        command(["engine_stat"], device="cpu", out=None, list_only=False)


def test_committed_records_are_whole():
    records = all_records()
    assert {r.name for r in records} >= {"ceilings", "engine_start"}
    for record in records:
        assert (FOLDER / record.filename).is_file()
        assert record.date >= "2026-01-01"
        assert record.versions["torch"]
        assert record.device["name"]
        json.dumps(record.results)


def test_the_h100_record_has_every_rung_its_peers_and_its_ceiling():
    record = recorded("engine_start", device="H100")
    names = [r["name"] for r in record.results]
    rungs = [rung.name for rung, _ in ladder("cuda")]
    assert names[: len(rungs)] == rungs
    assert sum(n.startswith("peer: transformers") for n in names) == 2
    assert record.row(name="ceiling: copy")["bytes_per_s"] > 1e12
    for row in record.results[: len(rungs)]:
        # No rung reads its bytes faster than the device copies them.
        assert row["bytes_per_s"] < record.row(name="ceiling: copy")["bytes_per_s"]


def test_rungs_keep_the_switches_below_them_and_leave_out_what_the_device_lacks():
    steps = {rung.name: switches for rung, switches in ladder("cpu")}
    assert "+ CUDA graphs" not in steps
    assert steps["+ fused projections"]["kv_cache"] is True
    assert steps["+ fused projections"]["dtype"] == "bfloat16"
    on_gpu = {rung.name for rung, _ in ladder("cuda")}
    assert "+ CUDA graphs" in on_gpu
    assert "+ packed weights" not in on_gpu


def test_a_later_chapter_adds_a_rung_by_adding_it_to_the_list(tiny):
    rungs = (*RUNGS, Rung("+ batch of 3", "20", {}, batch=3))
    rows = climb("cpu", model=tiny, new_tokens=4, rounds=2, rungs=rungs)
    assert [r.name for r in rows] == [r.name for r in rungs if r.needs in ("", "cpu")]
    assert rows[-1].batch == 3
    assert rows[1].same_tokens == 4  # the KV cache keeps every token
    assert rows[0].bytes < rows[1].bytes  # and takes memory
    assert all(r.rounds == 2 and r.tpot_ms > 0 and r.new_tokens == 4 for r in rows)


def test_a_run_of_all_benchmarks_leaves_out_those_that_need_a_gpu(monkeypatch, capsys):
    import llmcourse.bench as bench

    monkeypatch.setattr(bench, "BENCHMARKS", {"streams": "needs one"})
    assert command([], device="cpu", out=None, list_only=False) == 0
    assert "streams: left out, it needs a GPU" in capsys.readouterr().out
    with pytest.raises(CourseError, match="NVIDIA GPU"):
        command(["streams"], device="cpu", out=None, list_only=False)


def test_a_table_of_rows_leaves_lists_and_whole_programs_to_the_record():
    from llmcourse.bench import text_of

    text = text_of([{"name": "a", "us": 1.5, "spans": [1, 2]}, {"name": "b", "program": "copy\nkernel"}])
    assert "name" in text
    assert "1.5" in text
    assert "spans" not in text
    assert "copy" not in text
