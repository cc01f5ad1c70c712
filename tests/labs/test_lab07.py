"""Lab 07: its references against PyTorch and transformers, its own solutions, what learners are told."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llmcourse.grading.session import Cell, RemoteSubject, Session
from llmcourse.grading.stage import is_run
from llmcourse.grading.trial import LocalSubject, Trial
from llmcourse.grading.verdict import judge
from llmcourse.labs import find_lab

LAB = find_lab("07")
NAMES = tuple(e.name for e in LAB.exercises)
ROOT = Path(__file__).resolve().parents[2]
rope_file, attention_file, block_file = (
    import_module(f"llmcourse.labs.{LAB.name}.{name}")
    for name in ("apply_rope", "attention", "decoder_block")
)
RIGHT = {e.name: e.alternatives[0].fn for e in LAB.exercises}


def verdict(name, fn, seed=0):
    return judge(LAB.exercise(name), LocalSubject(fn, name), seed)


def a_trial(seed: int = 5) -> Trial:
    return Trial(LocalSubject(len), (), seed, "a test")


# ── the references, beside code that nobody here wrote ───────────────────────────────────────────────


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
def test_the_reference_of_attention_equals_pytorch(heads):
    t, lengths = a_trial(), (3, 7)
    q, k, v = (x.double() for x in attention_file.inputs(t, heads, lengths, batch=2))
    mask = attention_file.visible(lengths, 2)
    y, weights = attention_file.expected(q, k, v, mask)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    np.testing.assert_allclose(y, theirs.numpy(), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(weights.sum(-1), 1.0)


def test_the_reference_of_rope_equals_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    t = a_trial()
    x = torch.from_numpy(t.normal(2, 3, 5, 8))
    positions = rope_file.places(t, [0, 17], 5)
    phi = rope_file.angles_of(positions, 500.0, 8)[:, 0]
    cos, sin = (torch.cat((f(phi), f(phi)), dim=-1).double() for f in (torch.cos, torch.sin))
    theirs, _ = llama.apply_rotary_pos_emb(x, x, cos, sin)
    np.testing.assert_allclose(rope_file.expected(x, positions, 500.0), theirs.numpy(), atol=1e-5)


@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
def test_the_reference_of_the_block_equals_a_layer_of_transformers_llama(heads, past):
    transformers = pytest.importorskip("transformers")
    llama = import_module("transformers.models.llama.modeling_llama")
    t, width, hidden, length = a_trial(), 24, 28, 7
    config = block_file.sizes(heads, dim=6, theta=300.0)
    weights = block_file.make_weights(t, config, width, hidden)
    sizes = {"hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": 1, "head_dim": 6}
    sizes |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "vocab_size": 10}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}, "rope_theta": 300.0}
    told = transformers.LlamaConfig(**sizes, **rope, rms_norm_eps=config["eps"], attn_implementation="eager")
    layer = llama.LlamaDecoderLayer(told, 0).eval()
    names = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
    names |= {
        "out": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
    names |= {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    layer.load_state_dict({f"{theirs}.weight": weights[ours] for ours, theirs in names.items()})
    layer.double()

    x = torch.from_numpy(t.normal(2, length, width))
    ids = torch.arange(length).expand(2, -1)
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(length, length).masked_fill(~seen, float("-inf")).double()[None, None]
    tables = llama.LlamaRotaryEmbedding(told)(x.double(), ids)
    with torch.no_grad():
        theirs = layer(x, attention_mask=mask, position_ids=ids, position_embeddings=tables)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs

    first = (
        block_file.expected(x[:, :past], weights, config, *block_file.nothing(config, 2)) if past else None
    )
    kept = [torch.from_numpy(a) for a in first[1:]] if first else block_file.nothing(config, 2)
    y, keys, _ = block_file.expected(x[:, past:], weights, config, *kept)
    np.testing.assert_allclose(y, theirs[:, past:].numpy(), rtol=1e-5, atol=1e-5)
    assert keys.shape == (2, heads[1], length, 6)


# ── the source's own solutions ───────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def solutions():
    """The functions of the lab's source, each from its cell."""
    page = nbformat.read(ROOT / "solutions" / LAB.name / f"{LAB.name}.ipynb", as_version=4)
    names = {"torch": torch, "F": F}
    for cell in page.cells:
        if cell.metadata.get("nbgrader", {}).get("solution"):
            exec(cell.source, names)
    return SimpleNamespace(cells=page.cells, functions={name: names[name] for name in NAMES})


@pytest.mark.parametrize("name", NAMES)
def test_the_source_s_solution_passes_on_many_seeds(name, solutions):
    for seed in range(20, 26):
        found = verdict(name, solutions.functions[name], seed)
        assert found.ok, found


def test_every_cell_runs_where_models_cannot_be_imported_and_every_check_passes(solutions):
    cells = [Cell(c.id, c.source) for c in solutions.cells if is_run(c)]
    with Session(cells, sandbox=False, forbidden=LAB.forbidden) as session:
        assert [result.error for result in session.run()] == [None] * len(cells)
        for exercise in LAB.exercises:
            found = judge(exercise, RemoteSubject(session, exercise.name), 3)
            assert found.ok, found


@pytest.mark.parametrize("module", ["llmcourse.models", "llmcourse.engine", "transformers"])
def test_the_package_s_own_answer_cannot_be_imported_by_a_submission(module):
    cell = Cell("a", f"def attention(q, k, v, mask):\n    import {module}\n    return q, q")
    with Session([cell], sandbox=False, forbidden=LAB.forbidden) as session:
        list(session.run())
        found = judge(LAB.exercise("attention"), RemoteSubject(session, "attention"), 0)
    assert "is not available when this lab is graded" in str(found)


def test_pytorch_s_fused_attention_has_no_weights_to_return():
    def attention(q, k, v, mask):
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return y, torch.full((*q.shape[:3], k.shape[2]), 1 / k.shape[2])

    assert not verdict("attention", attention).ok


# ── what learners are told ───────────────────────────────────────────────────────────────────────────


def test_a_mistake_is_named_in_code_of_another_shape():
    def attention(q, k, v, mask):
        """Written with einsum; key heads tiled."""
        k, v = (torch.cat([x] * (q.shape[1] // x.shape[1]), dim=1) for x in (k, v))
        scores = torch.einsum("bhsd,bhtd->bhst", q.float(), k.float()) / q.shape[-1] ** 0.5
        weights = (scores + torch.where(mask, 0.0, -torch.inf)).softmax(-1).nan_to_num()
        return torch.einsum("bhst,bhtd->bhsd", weights.to(v.dtype), v), weights

    found = verdict("attention", attention)
    assert found.mistake is not None
    assert found.mistake.name == "tiled"


def test_two_mistakes_at_once_are_told_by_the_first_of_them():
    def attention(q, k, v, mask):
        scores = (q @ k.mT).masked_fill(~mask, -1e9)
        weights = torch.softmax(scores, dim=-1)
        return weights @ v, weights

    found = verdict("attention", attention)
    assert found.mistake is not None
    assert (found.mistake.name, found.sure) == ("not_scaled", False)


def test_a_wrong_mask_says_who_must_not_look_where():
    text = str(verdict("causal_mask", lambda positions, n, first: torch.ones(len(positions), 1, 4, 4) > 0))
    assert "sequence 0: the token in slot 0 must not look at slot 1 of 4" in text
    text = str(verdict("causal_mask", lambda positions, n, first: [[True]]))
    assert "the result is of list, expected a tensor of bool" in text


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_return_is_named(name):
    assert "is a `return` missing?" in str(verdict(name, lambda *args: None))


def test_rope_without_relative_positions_says_which_products_differ():
    text = str(verdict("apply_rope", lambda x, positions, theta: x + positions[:, None, :, None]))
    assert "nothing turns" not in text.splitlines()[0]
    assert "places behind its key: their product is" in text


@pytest.mark.parametrize("name", NAMES)
def test_right_functions_pass_on_many_seeds(name):
    for alternative in LAB.exercise(name).alternatives:
        for seed in range(40, 46):
            assert verdict(name, alternative.fn, seed).ok, (alternative.name, seed)
