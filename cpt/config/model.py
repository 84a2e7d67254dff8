"""The shape of the model: from `model:` for a run from scratch, else from the base checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from cpt.base.errors import CptError, PlanError, UsageError
from cpt.config.schema import MODEL, REQUIRED, Key
from cpt.plan.model import ModelConfig

# What a family means where `model:` does not say otherwise.
_RMS: dict[str, Any] = {"normalization": "rmsnorm", "activation": "swiglu", "rotary_percent": 1.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _RMS,
    "mistral": _RMS,
    "qwen2": {**_RMS, "qkv_bias": True},
    "qwen3": {**_RMS, "qk_norm": True},
    "gpt_neox": {
        "normalization": "layernorm",
        "activation": "gelu",
        "rotary_percent": 0.25,
        "qkv_bias": True,
        "linear_bias": True,
        "parallel_residual": True,
    },
}


def from_values(values: Mapping[str, Any], vocab_size: int | None, longest: int) -> ModelConfig:
    """The model of a run from scratch.

    Args:
        values: typed `model:`.
        vocab_size: of the tokenizer.
        longest: longest training sequence [tokens].

    Raises:
        CptError: keys that are missing or contradict each other, together.
    """
    errors: list[CptError] = []
    for name, node in MODEL.keys.items():
        if isinstance(node, Key) and node.default is REQUIRED and name not in values:
            errors.append(UsageError(f"`model.{name}` is missing; a run from scratch needs it: {node.help}"))
    if errors:
        hint = "`model=llama-1m` picks a small shape that is known to work"
        raise UsageError(errors[0].message, hint, more=tuple(errors[1:]))
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    if values.get("head_dim") is None and hidden % heads:
        raise PlanError(f"`model.hidden_size` {hidden} is not a multiple of `model.num_attention_heads` {heads}")
    size = values.get("vocab_size") or vocab_size
    if size is None:
        raise UsageError("`model.vocab_size` is not known: the run has no tokenizer")
    if vocab_size is not None and size < vocab_size:
        raise PlanError(f"`model.vocab_size` is {size:,}, but the tokenizer has {vocab_size:,} tokens")
    full: dict[str, Any] = {
        "num_query_groups": heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": longest,
        "norm_eps": 1e-5,
        **FAMILIES[values["family"]],
        **{k: v for k, v in values.items() if v is not None},
        "vocab_size": size,
    }
    return ModelConfig(**full)


def compare(values: Mapping[str, Any], model: ModelConfig) -> list[CptError]:
    """Where `model:` says something else than the base checkpoint."""
    found: list[CptError] = []
    for field in dataclasses.fields(ModelConfig):
        wanted, has = values.get(field.name), getattr(model, field.name)
        if wanted is not None and wanted != has:
            found.append(
                PlanError(
                    f"`model.{field.name}` is `{wanted}`, but the base checkpoint has `{has}`",
                    "with a base checkpoint `model` is only compared; `~model` leaves it out",
                )
            )
    return found
