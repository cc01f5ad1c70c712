"""Many adapters on one model: every row as its own adapter's model, in prefill, decode and whole answers."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from llmcourse.errors import ShapeError
from llmcourse.finetune.lora import PLACES, LoRA, LoRAError, attach
from llmcourse.finetune.serve import grouped, serve
from llmcourse.kernels.counters import interpreting
from llmcourse.models import ModelConfig, random_model

CONFIG = ModelConfig(99, 48, 3, 6, 2, 8, 80, max_len=64)
LORAS = (
    LoRA(4, 8, ("q", "v")),
    LoRA(3, 1, ("k", "o", "gate", "up", "down"), layers=(1,)),
    LoRA(8, 16, tuple(PLACES)),
)
TOKENS = torch.randint(0, 99, (4, 9), generator=torch.Generator().manual_seed(0))
IDS = [2, -1, 0, 1]


def base():
    torch.manual_seed(3)
    return random_model(CONFIG, dtype="float32")


@pytest.fixture(scope="module")
def adapters():
    found = []
    for i, lora in enumerate(LORAS):
        adapter = attach(base(), lora, seed=i)
        g = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(0.5 * torch.randn(p.shape, generator=g))
        found.append(adapter)
    return found


def models(adapters):
    """The model of each row of IDS."""
    return [adapters[i].model if i >= 0 else base() for i in IDS]


@torch.no_grad()
@pytest.mark.parametrize("interpret", [False, True])
def test_each_row_of_a_batch_is_as_its_own_model(adapters, interpret):
    served = serve(base(), adapters)
    want = torch.cat([m(row[None]) for m, row in zip(models(adapters), TOKENS, strict=True)])
    with served.rows(IDS):
        if interpret:
            with interpreting():
                got = served.model(TOKENS[:, :3])
            want = want[:, :3]
        else:
            got = served.model(TOKENS)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_greedy_answers_are_those_of_each_model_alone_in_the_order_of_the_requests(adapters):
    served = serve(base(), adapters)
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [1]]
    want = []
    for prompt, model in zip(prompts, models(adapters), strict=True):
        tokens = list(prompt)
        for _ in range(5):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        want.append(tokens[len(prompt) :])
    assert served.answers(prompts, IDS, tokens=5) == want
    stop = want[0][2]
    stopped = [a[: a.index(stop)] if stop in a else a for a in want]
    assert served.answers(prompts, IDS, tokens=5, stop=stop) == stopped


@torch.no_grad()
def test_outside_the_with_and_after_removal_the_model_is_the_plain_one(adapters):
    plain = base()(TOKENS)
    served = serve(base(), adapters)
    assert torch.equal(served.model(TOKENS), plain)
    with served.rows(IDS):
        assert not torch.equal(served.model(TOKENS), plain)
    assert torch.equal(served.model(TOKENS), plain)
    served.remove()
    assert served.model.state_dict().keys() == base().state_dict().keys()


def test_ids_of_a_batch_size_stay_in_one_tensor_and_blocks_may_be_nested(adapters):
    served = serve(base(), adapters)
    rows = served._rows
    with served.rows(IDS):
        first = rows.ids
        with served.rows([0, 0, 1, 1]):
            assert rows.ids is first
            assert rows.ids.tolist() == [0, 0, 1, 1]
        with served.rows([1]):
            assert rows.ids.tolist() == [1]
        assert rows.ids is first
        assert rows.ids.tolist() == IDS
    assert rows.ids is None


def test_requests_of_one_adapter_are_side_by_side():
    assert grouped([5, -1, 5, 0]) == ([1, 3, 0, 2], [1, 1, 2], [-1, 0, 5])
    assert grouped([]) == ([], [], [])


def test_what_cannot_be_served_is_refused(adapters):
    model = base()
    attach(model, LoRA())
    with pytest.raises(LoRAError, match="carries an adapter"):
        serve(model, adapters)
    with pytest.raises(ShapeError, match="no adapter"):
        serve(base(), [])
    served = serve(base(), adapters)
    with pytest.raises(ShapeError, match="no adapter 3"), served.rows([0, 3]):
        pass
    with pytest.raises(ShapeError, match="sequences"), served.rows([0, 1, 2, 0, 1]):
        served.model(TOKENS)
    with pytest.raises(ShapeError, match="adapters came"):
        served.answers([[1]], [0, 1], tokens=1)
    with pytest.raises(LoRAError, match="no weight"):
        served.model.fuse(False)(TOKENS)
