"""MLA's arithmetic, counted by PyTorch on the module, equals the formulas."""

from __future__ import annotations

import pytest

from llmcourse.bench.mla_cost import mla_cost
from llmcourse.models import ModelConfig
from llmcourse.models.published import published
from llmcourse.models.sizes import LatentSizes


@pytest.mark.parametrize(("queries", "tokens"), [(1, 1), (1, 77), (5, 5), (3, 40)])
def test_flops_and_bytes_are_those_of_the_formulas(queries: int, tokens: int) -> None:
    sizes = LatentSizes(0, kv_rank=24, nope_dim=10, rope_dim=6, v_dim=14)
    config = ModelConfig(5, 32, 1, 3, 3, 6, 8, layers=("latent",), latent=sizes)
    expanded, absorbed = (
        mla_cost(config, form, queries=queries, tokens=tokens) for form in ("expanded", "absorbed")
    )
    pairs = 3 * queries * tokens
    assert expanded.flops == 2 * tokens * 24 * 3 * (10 + 14) + 2 * pairs * (16 + 14)
    assert absorbed.flops == 2 * 3 * queries * 24 * (10 + 14) + 2 * pairs * (30 + 24)
    assert absorbed.nbytes == 2 * tokens * 30
    assert expanded.nbytes - absorbed.nbytes == 2 * 2 * tokens * 3 * (16 + 14)


def test_deepseek_v3_absorbs_at_decode_and_expands_at_prefill() -> None:
    config = published("DeepSeek-V3").config
    cost = {
        (form, queries): mla_cost(config, form, queries=queries, tokens=4096)
        for form in ("expanded", "absorbed")
        for queries in (1, 4096)
    }
    assert cost["expanded", 1].flops > 100 * cost["absorbed", 1].flops
    assert cost["absorbed", 4096].flops > 3 * cost["expanded", 4096].flops
