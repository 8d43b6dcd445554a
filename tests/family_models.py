"""Tiny models of every family, built from a config of transformers, with every parameter at random."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
GEMMA3 = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
}
WINDOW = 5
"""Far less than the segments that the tests compare."""

# name -> (model_type, keys of the config, key-value heads, tied)
FAMILIES: dict[str, tuple[str, dict[str, Any], int, bool]] = {
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}, 2, False),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3}, 1, True),
    "llama, dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}, 4, False),
    "llama, yarn": ("llama", {"rope_parameters": YARN | {"beta_fast": 16, "beta_slow": 2}, "head_dim": 32}, 2, True),
    "mistral": ("mistral", {"sliding_window": WINDOW, "head_dim": 16}, 2, False),
    "mistral, all seen": ("mistral", {"sliding_window": None}, 1, False),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}, 1, True),
    "smollm3, sliding": (
        "smollm3",
        {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": WINDOW},
        2,
        False,
    ),
    "qwen2": ("qwen2", {}, 2, True),
    "qwen2, sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}, 4, False),
    "qwen2.5, yarn": ("qwen2", {"rope_parameters": YARN | {"attention_factor": 1.3, "truncate": False}}, 2, False),
    "qwen3": ("qwen3", {"head_dim": 32}, 2, True),
    "qwen3, biases": ("qwen3", {"head_dim": 16, "attention_bias": True}, 4, False),
    "gemma2": (
        "gemma2",
        {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 7},
        2,
        True,
    ),
    "gemma2, untied": ("gemma2", {"sliding_window": WINDOW, "head_dim": 12, "layer_types": ["full_attention"] * 3}, 4, False),
    "gemma3": (
        "gemma3_text",
        {"sliding_window": WINDOW, "layer_types": ["sliding_attention"] * 2 + ["full_attention"], "rope_parameters": GEMMA3},
        1,
        True,
    ),
    "gemma3, wide window": (
        "gemma3_text",
        {"sliding_window": 512, "rope_parameters": GEMMA3, "query_pre_attn_scalar": 16},
        2,
        False,
    ),
}


def family_model(name: str, vocab: int = 97, context: int = 64) -> PreTrainedModel:
    """Three layers in float32, in evaluation."""
    kind, keys, kv_heads, tied = FAMILIES[name]
    torch.manual_seed(len(name))
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 24}
    if kind in ("smollm3", "qwen2") or (kind == "llama" and "head_dim" not in keys):
        del sizes["head_dim"]
    config = AutoConfig.for_model(
        kind,
        **sizes | keys,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        vocab_size=vocab,
        max_position_embeddings=context,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.ndim > 1 else 0.3))
    return model


def save_family(
    name: str, folder: Path, vocab: int = 97, dtype: torch.dtype = torch.float32, shard: str = "5GB"
) -> PreTrainedModel:
    """Saves it and returns what was saved, in float32."""
    model = family_model(name, vocab).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return model.float()
