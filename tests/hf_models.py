"""Small Hugging Face models of every family with awkward sizes, made by transformers from a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# H ≠ F, head_dim ≠ H / heads where the family allows it, groups ≠ heads, odd vocabulary, odd number of layers.
SIZES: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 301,
    "max_position_embeddings": 1100,
    "initializer_range": 0.1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16},
    "llama-tied-scaled": {
        "head_dim": 16,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 3.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"head_dim": 20, "sliding_window": None},
    "qwen2": {"hidden_size": 56, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 20},
    "gpt_neox": {"num_key_value_heads": None, "hidden_size": 64},
    "gpt_neox-sequential": {"num_key_value_heads": None, "hidden_size": 64, "use_parallel_residual": False},
}
# Families that can be converted, trained here or not.
_NO_LLAMA_KEYS = dict.fromkeys(SIZES.keys() - {"vocab_size", "initializer_range"})
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 28, "num_experts": 4}
_LLAMA3 = FAMILIES["llama-tied-scaled"]["rope_parameters"]
CONVERTED: dict[str, dict[str, Any]] = {
    "llama": FAMILIES["llama"],
    "llama-tied-llama3": FAMILIES["llama-tied-scaled"]
    | {"rope_parameters": _LLAMA3 | {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}},
    "mistral": FAMILIES["mistral"],
    "qwen2": FAMILIES["qwen2"],
    "qwen3": FAMILIES["qwen3"],
    "gpt_neox": FAMILIES["gpt_neox"],
    "gpt_neox-sequential": FAMILIES["gpt_neox-sequential"],
    "gpt2": {**_NO_LLAMA_KEYS, "n_layer": 3, "n_embd": 48, "n_head": 4, "n_inner": 88, "n_positions": 96},
    "mixtral": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **_EXPERTS,
        "shared_expert_intermediate_size": 36,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
    "qwen3_moe": {"head_dim": 20, **_EXPERTS, "decoder_sparse_step": 1, "norm_topk_prob": False},
}


def make(folder: Path, name: str, seed: int = 0, **changes: Any) -> Path:
    """Save a random model of a family of `FAMILIES` or `CONVERTED`.

    Norms and biases are random too, so that none can be mixed up.
    """
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {k: v for k, v in (SIZES | (FAMILIES | CONVERTED)[name] | changes).items() if v is not None}
    if "rope_parameters" in options and transformers.__version__.startswith("4."):
        scaling = dict(options.pop("rope_parameters"))
        options |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    config = AutoConfig.for_model(name.split("-")[0], **options)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or not parameter.any():  # routers start as zeros
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


def reference_logits(folder: Path, tokens: Any, attention: str = "eager") -> Any:
    """Logits [B, S, V] of transformers in fp32 on one thread."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    with torch.no_grad():
        return model(torch.as_tensor(tokens)).logits
