"""Hugging Face tensors ↔ Megatron tensors, as data that reads the same in both directions.

Every Megatron tensor is blocks of rows of Hugging Face tensors, one after another:

    copy      the tensor itself
    gate_up   all gate rows, then all up rows
    qkv       for each query group: the rows of its query heads, of its key head, of its value head

so one list of `Piece`s fuses (read pieces, join) and splits (cut, give back), for a whole tensor or any interval of its
rows, and for optimizer moments just as for weights. Nothing here is transposed. No torch.

Megatron names are those of `torch_dist` checkpoints with one key a layer (see `engine.weights`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from cpt.base.registry import nearest, unknown
from cpt.plan.types import ModelConfig


@dataclass(frozen=True)
class Rule:
    """One kind of tensor; `{i}` is the layer. A rule with `needs` holds where that field is set (`!`: not set)."""

    key: str
    hf: tuple[str, ...]
    how: str = "copy"
    needs: str = ""


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of a Hugging Face tensor."""

    hf: str
    start: int
    stop: int


@dataclass(frozen=True)
class Recipe:
    """How one Megatron tensor is made: its pieces in order of its rows, and the rest of its shape (no padding rows)."""

    key: str
    pieces: tuple[Piece, ...]
    rest: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows of the whole Megatron tensor, without padding rows of the vocabulary."""
        return sum(p.stop - p.start for p in self.pieces)


_LAYER, _HF = "decoder.layers.{i}.", "model.layers.{i}."
_LLAMA = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
    Rule(_LAYER + "self_attention.linear_qkv.layer_norm_weight", (_HF + "input_layernorm.weight",)),
    Rule(
        _LAYER + "self_attention.linear_qkv.weight",
        (_HF + "self_attn.q_proj.weight", _HF + "self_attn.k_proj.weight", _HF + "self_attn.v_proj.weight"),
        "qkv",
    ),
    Rule(
        _LAYER + "self_attention.linear_qkv.bias",
        (_HF + "self_attn.q_proj.bias", _HF + "self_attn.k_proj.bias", _HF + "self_attn.v_proj.bias"),
        "qkv",
        needs="qkv_bias",
    ),
    Rule(_LAYER + "self_attention.q_layernorm.weight", (_HF + "self_attn.q_norm.weight",), needs="qk_norm"),
    Rule(_LAYER + "self_attention.k_layernorm.weight", (_HF + "self_attn.k_norm.weight",), needs="qk_norm"),
    Rule(_LAYER + "self_attention.linear_proj.weight", (_HF + "self_attn.o_proj.weight",)),
    Rule(_LAYER + "mlp.linear_fc1.layer_norm_weight", (_HF + "post_attention_layernorm.weight",)),
    Rule(_LAYER + "mlp.linear_fc1.weight", (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"), "gate_up"),
    Rule(_LAYER + "mlp.linear_fc2.weight", (_HF + "mlp.down_proj.weight",)),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Rule("output_layer.weight", ("lm_head.weight",), needs="!tie_embeddings"),
)
_NEOX_HF = "gpt_neox.layers.{i}."


def _both(key: str, hf: str, separator: str = ".") -> tuple[Rule, Rule]:
    return Rule(f"{key}{separator}weight", (f"{hf}.weight",)), Rule(f"{key}{separator}bias", (f"{hf}.bias",))


_NEOX = (
    Rule("embedding.word_embeddings.weight", ("gpt_neox.embed_in.weight",)),
    *_both(_LAYER + "self_attention.linear_qkv.layer_norm", _NEOX_HF + "input_layernorm", "_"),
    # Head by head (query, key, value), which is Megatron's order when every head has its own key and value.
    *_both(_LAYER + "self_attention.linear_qkv", _NEOX_HF + "attention.query_key_value"),
    *_both(_LAYER + "self_attention.linear_proj", _NEOX_HF + "attention.dense"),
    *_both(_LAYER + "mlp.linear_fc1.layer_norm", _NEOX_HF + "post_attention_layernorm", "_"),
    *_both(_LAYER + "mlp.linear_fc1", _NEOX_HF + "mlp.dense_h_to_4h"),
    *_both(_LAYER + "mlp.linear_fc2", _NEOX_HF + "mlp.dense_4h_to_h"),
    *_both("decoder.final_layernorm", "gpt_neox.final_layer_norm"),
    Rule("output_layer.weight", ("embed_out.weight",), needs="!tie_embeddings"),
)

RULES: dict[str, tuple[Rule, ...]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt_neox": _NEOX,
}

# Buffers that some files hold beside the weights; they are computed, never read.
IGNORED = re.compile(r".*\.(rotary_emb\.inv_freq|attention\.bias|attention\.masked_bias)$")
# What a tied model's file may hold as well: the embedding once more.
TIED_COPY = {"output_layer.weight": "embedding.word_embeddings.weight"}


def recipes(model: ModelConfig) -> dict[str, Recipe]:
    """Every tensor of the model by its Megatron name.

    Raises:
        UsageError: there are no rules for the family.
    """
    if model.family not in RULES:
        raise unknown("model family", model.family, RULES)
    made: dict[str, Recipe] = {}
    for rule in RULES[model.family]:
        if rule.needs and bool(getattr(model, rule.needs.lstrip("!"))) == rule.needs.startswith("!"):
            continue
        for i in range(model.num_layers) if "{i}" in rule.key else (0,):
            key = rule.key.replace("{i}", str(i))
            names = tuple(name.replace("{i}", str(i)) for name in rule.hf)
            made[key] = Recipe(key, tuple(_pieces(model, rule, key, names)), _rest(model, key))
    return made


def hf_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of the model with its shape, in the order of the model."""
    rows: dict[str, int] = {}
    rest: dict[str, tuple[int, ...]] = {}
    for recipe in recipes(model).values():
        for piece in recipe.pieces:
            rows[piece.hf] = max(rows.get(piece.hf, 0), piece.stop)
            rest[piece.hf] = recipe.rest
    return {name: (rows[name], *rest[name]) for name in rows}


def intersect(pieces: Iterable[Piece], start: int, stop: int) -> Iterator[Piece]:
    """The pieces that make rows `start` to `stop` of the joined tensor."""
    at = 0
    for piece in pieces:
        size = piece.stop - piece.start
        first, last = max(start - at, 0), min(stop - at, size)
        if first < last:
            yield Piece(piece.hf, piece.start + first, piece.start + last)
        at += size


def place(key: str, num_layers: int) -> list[str]:
    """Names with one key a layer that a checkpoint's name stands for: itself, or all layers of a stacked one."""
    if key.startswith("decoder.layers.") and not key.split(".")[2].isdigit():
        rest = key.removeprefix("decoder.layers.")
        return [f"decoder.layers.{i}.{rest}" for i in range(num_layers)]
    return [key]


def suggest(name: str, known: Mapping[str, object]) -> str:
    """` (nearest known: ...)` for messages about a tensor that no rule names."""
    near = nearest(name, known)
    return f" (nearest known: `{near}`)" if near else ""


def _pieces(model: ModelConfig, rule: Rule, key: str, names: tuple[str, ...]) -> Iterator[Piece]:
    if rule.how == "gate_up":
        for name in names:
            yield Piece(name, 0, model.ffn_hidden_size)
    elif rule.how == "qkv":
        query, key_, value = names
        d = model.head_dim
        q = model.num_attention_heads // model.num_query_groups * d
        for group in range(model.num_query_groups):
            yield Piece(query, group * q, (group + 1) * q)
            yield Piece(key_, group * d, (group + 1) * d)
            yield Piece(value, group * d, (group + 1) * d)
    else:
        yield Piece(names[0], 0, _rows(model, key))


def _rows(model: ModelConfig, key: str) -> int:
    """Rows of a Megatron tensor that is one Hugging Face tensor."""
    if key.endswith(("word_embeddings.weight", "output_layer.weight")):
        return model.vocab_size
    if key.endswith(("q_layernorm.weight", "k_layernorm.weight")):
        return model.head_dim
    if key.endswith(("linear_qkv.weight", "linear_qkv.bias")):
        return (model.num_attention_heads + 2 * model.num_query_groups) * model.head_dim
    if key.endswith(("linear_fc1.weight", "linear_fc1.bias")):
        return model.ffn_hidden_size
    return model.hidden_size


def _rest(model: ModelConfig, key: str) -> tuple[int, ...]:
    """Axes after the first."""
    if key.endswith("linear_proj.weight"):
        return (model.num_attention_heads * model.head_dim,)
    if key.endswith("linear_fc2.weight"):
        return (model.ffn_hidden_size,)
    is_matrix = key.endswith(
        ("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_fc1.weight")
    )
    return (model.hidden_size,) if is_matrix else ()
