"""The benchmark of sequence mixers: crossovers are where the costs meet, FLOPs are what was counted."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmcourse.bench.records import Record
from llmcourse.bench.subquadratic import (
    KINDS,
    crossover,
    crossovers,
    layer_config,
    layer_flops,
    reader,
    recall_rows,
    table_of,
    time_decode,
    time_layers,
    whole,
)
from llmcourse.models.linear_attention import CHUNK
from llmcourse.models.mixers import MIXERS
from llmcourse.train.recall import Recall


def test_a_crossover_of_two_powers_is_found_exactly_between_the_lengths_given():
    lengths = [1 << i for i in range(4, 12)]
    slow, fast = [n**2 / 100 for n in lengths], [3.0 * n for n in lengths]
    assert crossover(lengths, slow, fast) == pytest.approx(300)


def test_a_crossover_is_none_when_the_other_stays_behind_and_the_first_length_when_it_starts_ahead():
    assert crossover([1, 2, 4], [1, 2, 4], [2, 4, 8]) is None
    assert crossover([1, 2, 4], [2, 4, 8], [1, 2, 4]) == 1


def test_only_the_last_change_of_the_lead_counts():
    assert crossover([1, 10, 100, 1000], [2, 1, 1, 100], [1, 2, 2, 10]) > 100


@pytest.mark.parametrize("kind", KINDS)
def test_flops_of_the_formulas_contain_the_matrix_products_that_are_counted(kind):
    """PyTorch counts matrix products, not FFTs, scans or gates; of attention it counts all S² pairs."""
    tokens, width = 4 * CHUNK, 64
    config = layer_config(kind, width=width, max_len=tokens)
    layer = MIXERS[config.kinds[0]](config).to("meta")
    with FlopCounterMode(display=False) as counter:
        layer(torch.empty(1, tokens, width, device="meta"), whole(tokens, "meta"), None)
    counted, formula = counter.get_total_flops(), layer_flops(kind, config, tokens)
    if kind == "attention":
        counted -= 2 * tokens * (tokens - 1) * width  # pairs above the diagonal
        assert counted == formula
    elif kind == "linear":
        assert counted == formula
    else:
        assert 0.5 * formula < counted <= formula


def test_rows_name_each_layer_at_each_length():
    with torch.inference_mode():
        rows = time_layers([16, 32], width=16)
    assert [(r["name"], r["tokens"]) for r in rows] == [(k, n) for n in (16, 32) for k in KINDS]
    assert all(0 < r["low_ms"] <= r["ms"] <= r["high_ms"] for r in rows)
    assert set(crossovers(rows)) == set(KINDS) - {"attention"}


def test_a_layer_reads_the_whole_sequence():
    for kind in KINDS:
        assert reader(kind, 9, width=16, dtype=torch.float32, device="cpu")().shape == (1, 9, 16)


def test_decoding_is_timed_at_each_context_with_the_bytes_that_are_kept():
    with torch.inference_mode():
        rows = time_decode([8, 64], width=16, layers=1)
    kept = {(r["name"], r["context"]): r["state_bytes"] for r in rows}
    assert kept["attention", 64] > 5 * kept["attention", 8]
    assert kept["ssm", 64] == kept["ssm", 8]


def test_recall_rows_say_what_was_trained():
    rows = recall_rows(Recall(2, 4, 4), stacks=["hybrid"], seeds=[0, 1], steps=2, batch=2)
    assert [(r["layers"], r["seed"], r["steps"]) for r in rows] == [
        ("hyena+attention", 0, 2),
        ("hyena+attention", 1, 2),
    ]
    assert all(0 <= r["accuracy"] <= 1 for r in rows)


def test_the_table_of_a_record_takes_the_longest_lengths_of_each_type():
    rows = [
        {"kind": "layer", "name": name, "dtype": dtype, "tokens": tokens, "ms": ms * tokens}
        for name, ms in (("attention", 0.5), ("linear", 0.25))
        for dtype in ("bfloat16", "float32")
        for tokens in (1024, 4096)
    ]
    rows += [{"kind": "crossover", "name": "linear", "dtype": "bfloat16", "tokens": 777}]
    rows += [{"kind": "crossover", "name": "linear", "dtype": "float32", "tokens": None}]
    rows += [{"kind": "decode", "name": "linear", "context": n, "ms": n / 1e4} for n in (1024, 8192)]
    record = Record("subquadratic", {"name": "X"}, {"torch": "2.11.0"}, "2026-11-24", "", rows)
    table = table_of(record)
    assert table.rows == [
        ["attention", "–", "–", "2,048", "2,048", "–"],
        ["linear", "777", "never", "1,024", "1,024", "0.8192"],
    ]
