"""The same weights in somebody else's model: transformers' Llama, to hold ours against."""

from __future__ import annotations

from typing import Any

from llmcourse.errors import MissingPackageError
from llmcourse.models.plain import supported
from llmcourse.models.transformer import Transformer


def llama(model: Transformer) -> Any:
    """transformers' LlamaForCausalLM of the sizes and with the weights of `model`, sharing their memory.

    Raises MissingPackageError where transformers is not installed (it is a package for tests only), and
    ModelError for a model that is not a plain Llama.
    """
    c = model.config
    supported(c)
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    except ImportError:
        raise MissingPackageError(
            "transformers is not installed.",
            "It is no part of the course, only a judge of it.",
            "pip install transformers, or the plain forward pass, llmcourse.models.plain.",
        ) from None
    import torch

    sizes = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=c.d_ff,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_len,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie_embeddings,
    )
    weights: dict[str, Any] = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.head.weight,
    }
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    for i, block in enumerate(model.blocks):
        ours = dict(block.named_parameters())
        theirs = dict(
            zip("qkv", ours["mixer.qkv.weight"].split([q, kv, kv]), strict=True),
            o=ours["mixer.out.weight"],
        )
        gate, up = ours["mlp.gate_up.weight"].chunk(2)
        named = {f"self_attn.{name}_proj": weight for name, weight in theirs.items()}
        named |= {"mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": ours["mlp.down.weight"]}
        named |= {
            "input_layernorm": ours["mixer_norm.weight"],
            "post_attention_layernorm": ours["mlp_norm.weight"],
        }
        weights |= {f"model.layers.{i}.{name}.weight": weight for name, weight in named.items()}
    with torch.device("meta"):
        peer: Any = LlamaForCausalLM(sizes)
    peer.load_state_dict({name: w.detach() for name, w in weights.items()}, assign=True)
    if c.tie_embeddings:
        peer.lm_head.weight = peer.model.embed_tokens.weight
    # Rotary frequencies are no part of the weights: they were made on the meta device, without numbers.
    peer.model.rotary_emb = LlamaRotaryEmbedding(config=sizes)
    peer.to(model.device).requires_grad_(False)
    return peer.eval()
