"""The KV-cache planner: figures worked out by hand, consistent plans, errors that help, and its picture."""

from __future__ import annotations

import re

import pytest
from matplotlib.text import Text

from llmcourse.errors import ShapeError, UnknownNameError
from llmcourse.hardware import gpu
from llmcourse.models.published import MODELS, published
from llmcourse.widgets.kv_cache import (
    FORMATS,
    MemoryPlanError,
    copies,
    kv_cache_explorer,
    plan,
    size_of,
)

LLAMA, H100 = "Llama-3-8B", "H100 SXM"


def test_llama_3_8b_on_an_h100_by_hand() -> None:
    found = plan(LLAMA, H100, context=8192)
    assert found.weights == 8_030_261_248 * 2
    assert found.a_token == 131_072
    assert found.a_sequence == 1 << 30
    assert found.batch == 52  # (0.9 × 80 GB − 16.06 GB) / 2³⁰
    read = (8_030_261_248 - 128_256 * 4096) * 2 + 52 * (1 << 30)
    assert found.step_bytes == read
    assert found.tokens_per_s == pytest.approx(52 / (read / 3350e9))


def test_a_fourth_of_the_kv_heads_gives_four_times_the_room() -> None:
    """Llama 2's and 3's cache a token differ by just that; their weights hardly."""
    mha, gqa = (plan(m, H100, context=4096) for m in ("Llama-2-7B", LLAMA))
    assert mha.a_token == 4 * gqa.a_token
    assert 3.5 < gqa.batch / mha.batch < 4.1


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cache", FORMATS)
def test_what_a_plan_allows_fits_and_one_sequence_more_does_not(name: str, cache: str) -> None:
    found = plan(name, "B200", context=3000, cache=cache, weights="int4", gpus=8)
    assert found.weights + found.cache <= found.memory < 8 * gpu("B200").memory
    assert found.weights + found.cache + found.a_sequence > found.memory
    with pytest.raises(MemoryPlanError, match=f"batch = {found.batch:,} or less"):
        plan(name, "B200", context=3000, cache=cache, weights="int4", gpus=8, batch=found.batch + 1)


def test_a_smaller_format_and_a_shorter_context_never_hold_fewer_sequences() -> None:
    batches = [plan(LLAMA, H100, context=8192, cache=f).batch for f in ("bf16", "fp8", "int4")]
    assert batches == sorted(batches)
    assert batches[1] in (104, 105)
    shorter = [plan(LLAMA, H100, context=n).batch for n in (32_768, 16_384, 8192, 4096)]
    assert shorter == sorted(shorter)


def test_a_window_stops_the_fall() -> None:
    assert (
        plan("Mistral-7B-v0.1", H100, context=4096).batch
        == plan("Mistral-7B-v0.1", H100, context=10**6).batch
    )


def test_more_gpus_than_key_value_heads_hold_copies() -> None:
    qwen = published("Qwen2.5-7B")  # 4 key/value heads
    assert [copies(qwen, n)[0] for n in (1, 2, 4, 8)] == [1, 1, 1, 2]
    assert copies(published("SmolLM2-135M"), 2)[0] == pytest.approx(4 / 3)  # 3 heads: 2 and 2 places


def test_a_latent_is_never_copied_but_its_attention_weights_are() -> None:
    v3 = published("DeepSeek-V3")
    attention = (  # a layer's, by the shapes of DeepSeek-V3's config
        7168 * 1536 + 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 + 512 * 128 * 256 + 128 * 128 * 7168
    )
    assert copies(v3, 8) == (1.0, 7 * 61 * attention)


def test_weights_that_do_not_fit_say_so_and_what_would() -> None:
    with pytest.raises(MemoryPlanError) as caught:
        plan("Llama-3-70B", H100, context=4096)
    error = caught.value
    assert "141 GB" in error.what
    assert "80 GB" in error.what
    assert "Llama-3-70B" in error.what
    assert error.why.endswith(".")
    # What it proposes works.
    gpus, form = re.findall(r"(\d+) GPUs or weights in (\w+)", error.fix)[0]
    plan("Llama-3-70B", H100, context=4096, gpus=int(gpus))
    plan("Llama-3-70B", H100, context=4096, weights=form)


def test_a_context_that_does_not_fit_names_the_longest_that_does() -> None:
    with pytest.raises(MemoryPlanError, match=r"131,072 tokens does not fit") as caught:
        plan("Llama-2-7B", H100, context=131_072)
    longest = int(re.findall(r"context = ([\d,]+) or less", caught.value.fix)[0].replace(",", ""))
    assert plan("Llama-2-7B", H100, context=longest).batch == 1
    with pytest.raises(MemoryPlanError):
        plan("Llama-2-7B", H100, context=longest + 1)


@pytest.mark.parametrize("wrong", [{"context": 0}, {"gpus": 0}, {"batch": 0}])
def test_sizes_below_one_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ShapeError, match=f"{next(iter(wrong))} = 0"):
        plan(LLAMA, H100, **({"context": 10} | wrong))


@pytest.mark.parametrize(
    "wrong", [{"cache": "fp4"}, {"weights": "fp32"}, {"model": "Llama-9"}, {"on": "H900"}]
)
def test_unknown_names_list_the_known_ones(wrong: dict[str, str]) -> None:
    with pytest.raises(UnknownNameError, match="Try one of"):
        plan(**({"model": LLAMA, "on": H100, "context": 10} | wrong))


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (23_040, "23 kB"), (1.61e10, "16.1 GB"), (1.34e12, "1.34 TB")],
)
def test_sizes_are_printed_in_decimal_units(nbytes: float, text: str) -> None:
    assert size_of(nbytes) == text


# ------------------------------------------------------------------------------------------- the picture


def drawn_text(explorable) -> str:
    values = {name: control.value for name, control in explorable.controls.items()}
    return " ".join("\n".join(t.get_text() for t in explorable.draw(**values).findobj(Text)).split())


def test_the_picture_says_what_the_plan_says() -> None:
    text = drawn_text(kv_cache_explorer(LLAMA, H100, context=8192))
    found = plan(LLAMA, H100, context=8192)
    assert f"{found.batch} sequences of 8,192 tokens" in text
    assert f"at best {found.tokens_per_s:,.0f} tokens/s" in text
    assert f"weights {size_of(found.weights)}" in text
    assert f"{size_of(found.cache)} of cache" in text


def test_the_picture_of_a_model_that_does_not_fit_is_the_error() -> None:
    text = drawn_text(kv_cache_explorer("DeepSeek-V3", "T4"))
    with pytest.raises(MemoryPlanError) as caught:
        plan("DeepSeek-V3", "T4", context=8192)
    assert all(part in text for part in (caught.value.what, caught.value.why, f"Try {caught.value.fix}"))


def test_a_context_beyond_the_models_own_is_marked() -> None:
    assert "made for 8,192 tokens" in drawn_text(kv_cache_explorer(LLAMA, H100, context=16_384))
    assert "made for" not in drawn_text(kv_cache_explorer(LLAMA, H100, context=8192))


def test_one_sequence_is_not_many_and_has_a_readable_axis() -> None:
    explorable = kv_cache_explorer(LLAMA, H100, context=262_144)
    assert "1 sequence of 262,144 tokens" in drawn_text(explorable)
    figure = explorable.draw(**{name: control.value for name, control in explorable.controls.items()})
    figure.draw_without_rendering()
    assert [tick.get_text() for tick in figure.axes[2].get_xticklabels()] == ["1"]


def test_each_control_changes_the_picture() -> None:
    explorable = kv_cache_explorer()
    first = bytes(explorable.image.value)
    assert first.startswith(b"\x89PNG")
    other = {
        "model": "Qwen3-8B",
        "on": "H200",
        "gpus": 2,
        "context": 1024,
        "cache": "fp8",
        "weights": "int4",
    }
    assert set(other) == set(explorable.controls)
    for control, value in other.items():
        before = explorable.controls[control].value
        explorable.controls[control].value = value
        assert bytes(explorable.image.value) != first, control
        explorable.controls[control].value = before
    assert bytes(explorable.image.value) == first


def test_the_ends_of_all_controls_can_be_drawn() -> None:
    explorable = kv_cache_explorer()
    for end in (0, -1):
        values = {
            name: option[1] if isinstance(option := control.options[end], tuple) else option
            for name, control in explorable.controls.items()
        }
        explorable.draw(**values).draw_without_rendering()
