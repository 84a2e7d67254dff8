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


def make(folder: Path, name: str, seed: int = 0, **changes: Any) -> Path:
    """Save a random model of a family of `FAMILIES`. Norms and biases are random too, so that none can be mixed up."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {k: v for k, v in (SIZES | FAMILIES[name] | changes).items() if v is not None}
    config = AutoConfig.for_model(name.split("-")[0], **options)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
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
