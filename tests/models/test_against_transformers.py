"""The course's model computes what transformers computes, on the same weights."""

from __future__ import annotations

import pytest
import torch

from llmcourse import models
from llmcourse.engine import LLM, SamplingParams

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "Water boils at 100 degrees because",
    "Explain in one sentence what a GPU is.",
]


def test_real_logits_equal_transformers_within_1e_3(smol, hf_smol):
    model, tokenizer = smol
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        with torch.inference_mode():
            ours, theirs = model(ids), hf_smol[0](ids).logits
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 1e-3
        assert ours.std() > 0.5  # logits of a trained model, not of zeros


def test_greedy_tokens_equal_transformers_for_64_tokens_on_5_prompts(smol, hf_smol):
    model, tokenizer = smol
    llm = LLM((model, tokenizer))
    # The last prompt in the chat format, as a chat model is used.
    prompts = [*PROMPTS[:-1], tokenizer.chat(PROMPTS[-1])]
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        ours = llm.generate([ids], SamplingParams(max_tokens=64, ignore_eos=True))[0].tokens
        with torch.inference_mode():
            theirs = (
                hf_smol[0]
                .generate(
                    torch.tensor([ids]),
                    attention_mask=torch.ones(1, len(ids)),
                    max_new_tokens=64,
                    min_new_tokens=64,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )[0, len(ids) :]
                .tolist()
            )
        assert ours == theirs


def hf_checkpoint(kind: str, folder, **extra):
    """Save a small random checkpoint with transformers and return its own model."""
    import transformers

    sizes = {
        "vocab_size": 131,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
    }
    torch.manual_seed(11)
    config = getattr(transformers, f"{kind}Config")(**sizes | extra)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():  # norms and biases start at one and zero, which would hide a mix-up
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model.save_pretrained(folder)
    return model


def save_tokenizer(folder):
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as m

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:131]
    backend = Tokenizer(m.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.save(str(folder / "tokenizer.json"))


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 16.0,
}
LATENT = {
    "q_lora_rank": 20,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 10,
    "head_dim": 10,  # what transformers turns by position
    "v_head_dim": 9,
    "num_key_value_heads": 6,
    "first_k_dense_replace": 3,
}
CHECKPOINTS = {
    "Llama": ("Llama", {}),
    "Llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "Llama 3 RoPE": ("Llama", {"rope_parameters": LLAMA3}),
    "Llama, linear RoPE": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "Llama, YaRN": ("Llama", {"rope_parameters": YARN}),
    "Llama, YaRN, factor given": ("Llama", {"rope_parameters": YARN | {"attention_factor": 1.3}}),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Mistral, window of 11": ("Mistral", {"sliding_window": 11}),
    "Qwen2, windows in the last layers": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "DeepSeek-V3": ("DeepseekV3", LATENT),
    "DeepSeek-V3, full-rank queries": ("DeepseekV3", LATENT | {"q_lora_rank": None}),
    "DeepSeek-V3, YaRN": ("DeepseekV3", LATENT | {"rope_parameters": YARN | {"mscale_all_dim": 0.8}}),
    "DeepSeek-V3, YaRN in two parts": (
        "DeepseekV3",
        LATENT | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}},
    ),
    "Qwen2 (bias)": ("Qwen2", {}),
    "Qwen3 (q/k norm)": ("Qwen3", {}),
    "Qwen3, odd head": ("Qwen3", {"head_dim": 14}),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_random_checkpoints_saved_by_transformers_give_its_logits(name, tmp_path):
    kind, extra = CHECKPOINTS[name]
    theirs = hf_checkpoint(kind, tmp_path, **extra)
    save_tokenizer(tmp_path)
    model, _ = models.load(tmp_path, device="cpu", dtype="float32")
    ids = torch.randint(0, 131, (2, 97))
    with torch.inference_mode():
        expected = theirs(ids).logits
        assert (model(ids) - expected).abs().max() <= 1e-4
        # Incrementally, through the cache, in uneven pieces: the same.
        cache = models.KVCache(model.config, 2, 97)
        pieces = [model(part, cache) for part in ids.split([40, 1, 7, 1, 48], dim=1)]
        assert (torch.cat(pieces, dim=1) - expected).abs().max() <= 1e-4
    assert model.config.n_params == sum(p.numel() for p in model.parameters())
    assert model.config.n_params == theirs.num_parameters()


def test_a_checkpoint_with_the_wrong_rope_theta_is_told_apart(tmp_path):
    """The comparison above can fail: a wrong rotary base moves the logits far beyond its tolerance."""
    import json

    theirs = hf_checkpoint("Llama", tmp_path)
    save_tokenizer(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 500.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _ = models.load(tmp_path, device="cpu")
    ids = torch.randint(0, 131, (1, 64))
    with torch.inference_mode():
        assert (model(ids) - theirs(ids).logits).abs().max() > 1e-2
