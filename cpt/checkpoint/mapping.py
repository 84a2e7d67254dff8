"""Hugging Face tensors ↔ Megatron tensors, as data that reads the same in both directions.

A family is one table of rules. Each names a Megatron tensor, the logical tensors (Hugging Face names, [out, in]) whose
rows it is made of, its shape, and how tensor ranks share it:

    copy       the tensor itself
    gate_up    all gate rows, then all up rows
    qkv        for each query group: the rows of its query heads, of its key head, of its value head
    qkv_rows   the same out of one tensor that holds all queries, then all keys, then all values (GPT-2)

The rules hold for optimizer moments just as for weights. No torch.

Megatron names are those of `torch_dist` checkpoints with one key a layer and one an expert (see `layouts` for the
spellings of files), norms under `layer_norm_weight` of the layer they feed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cpt.base.errors import UsageError
from cpt.base.registry import nearest, unknown
from cpt.checkpoint.arrays import Fill, Tensor, as_matrix
from cpt.plan.model import ModelConfig


@dataclass(frozen=True)
class Rule:
    """One kind of tensor.

    Args:
        key: Megatron's name; `{i}` is the layer, `{e}` the expert.
        atoms: names of the logical tensors.
        shape: of Megatron's tensor, as names of sizes (see `sizes`).
        how: see above.
        tp: how tensor ranks share it: `rows`, `columns`, `halves` (rows, gate and up apart) or nothing (all have all).
        needs: a field of the model that must be set (`!`: must not); `moe`: of layers with experts only.
        transposed: the Hugging Face file holds [in, out].
    """

    key: str
    atoms: tuple[str, ...]
    shape: tuple[str, ...]
    how: str = "copy"
    tp: str = ""
    needs: tuple[str, ...] = ()
    transposed: bool = False


EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
VOCABULARY = (EMBEDDING, OUTPUT)
_LAYER, _HF = "decoder.layers.{i}.", "model.layers.{i}."
_ATTENTION, _MLP = _LAYER + "self_attention.", _LAYER + "mlp."


def _three(prefix: str, kind: str) -> tuple[str, str, str]:
    return (f"{prefix}q_proj.{kind}", f"{prefix}k_proj.{kind}", f"{prefix}v_proj.{kind}")


_LLAMA = (
    Rule(EMBEDDING, ("model.embed_tokens.weight",), ("V", "H"), tp="rows"),
    Rule(_ATTENTION + "linear_qkv.layer_norm_weight", (_HF + "input_layernorm.weight",), ("H",)),
    Rule(_ATTENTION + "linear_qkv.weight", _three(_HF + "self_attn.", "weight"), ("QKV", "H"), "qkv", "rows"),
    Rule(_ATTENTION + "linear_qkv.bias", _three(_HF + "self_attn.", "bias"), ("QKV",), "qkv", "rows", ("qkv_bias",)),
    Rule(_ATTENTION + "q_layernorm.weight", (_HF + "self_attn.q_norm.weight",), ("D",), needs=("qk_norm",)),
    Rule(_ATTENTION + "k_layernorm.weight", (_HF + "self_attn.k_norm.weight",), ("D",), needs=("qk_norm",)),
    Rule(_ATTENTION + "linear_proj.weight", (_HF + "self_attn.o_proj.weight",), ("H", "Q"), tp="columns"),
    Rule(_MLP + "linear_fc1.layer_norm_weight", (_HF + "post_attention_layernorm.weight",), ("H",)),
    Rule(
        _MLP + "linear_fc1.weight",
        (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
        ("2F", "H"),
        "gate_up",
        "halves",
        ("!moe",),
    ),
    Rule(_MLP + "linear_fc2.weight", (_HF + "mlp.down_proj.weight",), ("H", "F"), tp="columns", needs=("!moe",)),
)
_LLAMA_END = (
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), ("H",)),
    Rule(OUTPUT, ("lm_head.weight",), ("V", "H"), tp="rows", needs=("!tie_embeddings",)),
)


def _experts(router: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Rules of a layer's experts by the Hugging Face names of its parts."""
    expert = _MLP + "experts.experts.{e}."
    return (
        Rule(_MLP + "router.weight", (_HF + router,), ("E", "H"), needs=("moe",)),
        Rule(expert + "linear_fc1.weight", (_HF + gate, _HF + up), ("2M", "H"), "gate_up", "halves", ("moe",)),
        Rule(expert + "linear_fc2.weight", (_HF + down,), ("H", "M"), tp="columns", needs=("moe",)),
    )


_MIXTRAL_EXPERTS = _experts(
    "block_sparse_moe.gate.weight",
    "block_sparse_moe.experts.{e}.w1.weight",
    "block_sparse_moe.experts.{e}.w3.weight",
    "block_sparse_moe.experts.{e}.w2.weight",
)
_QWEN_EXPERTS = _experts(
    "mlp.gate.weight",
    "mlp.experts.{e}.gate_proj.weight",
    "mlp.experts.{e}.up_proj.weight",
    "mlp.experts.{e}.down_proj.weight",
)
_SHARED = "mlp.shared_expert."
_SHARED_EXPERT = (
    Rule(
        _MLP + "shared_experts.linear_fc1.weight",
        (_HF + _SHARED + "gate_proj.weight", _HF + _SHARED + "up_proj.weight"),
        ("2S", "H"),
        "gate_up",
        "halves",
        ("moe",),
    ),
    Rule(
        _MLP + "shared_experts.linear_fc2.weight",
        (_HF + _SHARED + "down_proj.weight",),
        ("H", "S"),
        tp="columns",
        needs=("moe",),
    ),
    Rule(_MLP + "shared_experts.gate_weight", (_HF + "mlp.shared_expert_gate.weight",), ("1", "H"), needs=("moe",)),
)


def _both(
    key: str, atom: str, shape: tuple[str, ...], *, how: str = "copy", tp: str = "", transposed: bool = False
) -> tuple[Rule, Rule]:
    """Weight and bias of a linear layer. Of one whose columns are shared every rank has the whole bias."""
    bias_tp = "" if tp == "columns" else tp
    return (
        Rule(f"{key}.weight", (f"{atom}.weight",), shape, how, tp, transposed=transposed),
        Rule(f"{key}.bias", (f"{atom}.bias",), shape[:1], how, bias_tp),
    )


def _norm(key: str, atom: str, separator: str) -> tuple[Rule, Rule]:
    return tuple(Rule(f"{key}{separator}{kind}", (f"{atom}.{kind}",), ("H",)) for kind in ("weight", "bias"))  # type: ignore[return-value]


_N = "gpt_neox.layers.{i}."
_NEOX = (
    Rule(EMBEDDING, ("gpt_neox.embed_in.weight",), ("V", "H"), tp="rows"),
    *_norm(_ATTENTION + "linear_qkv.layer_norm", _N + "input_layernorm", "_"),
    # Head by head (query, key, value), which is Megatron's order when every head has its own key and value.
    *_both(_ATTENTION + "linear_qkv", _N + "attention.query_key_value", ("QKV", "H"), tp="rows"),
    *_both(_ATTENTION + "linear_proj", _N + "attention.dense", ("H", "Q"), tp="columns"),
    *_norm(_MLP + "linear_fc1.layer_norm", _N + "post_attention_layernorm", "_"),
    *_both(_MLP + "linear_fc1", _N + "mlp.dense_h_to_4h", ("F", "H"), tp="rows"),
    *_both(_MLP + "linear_fc2", _N + "mlp.dense_4h_to_h", ("H", "F"), tp="columns"),
    *_norm("decoder.final_layernorm", "gpt_neox.final_layer_norm", "."),
    Rule(OUTPUT, ("embed_out.weight",), ("V", "H"), tp="rows", needs=("!tie_embeddings",)),
)
_G = "transformer.h.{i}."
_GPT2 = (
    Rule(EMBEDDING, ("transformer.wte.weight",), ("V", "H"), tp="rows"),
    Rule("embedding.position_embeddings.weight", ("transformer.wpe.weight",), ("P", "H")),
    *_norm(_ATTENTION + "linear_qkv.layer_norm", _G + "ln_1", "_"),
    *_both(_ATTENTION + "linear_qkv", _G + "attn.c_attn", ("QKV", "H"), how="qkv_rows", tp="rows", transposed=True),
    *_both(_ATTENTION + "linear_proj", _G + "attn.c_proj", ("H", "Q"), tp="columns", transposed=True),
    *_norm(_MLP + "linear_fc1.layer_norm", _G + "ln_2", "_"),
    *_both(_MLP + "linear_fc1", _G + "mlp.c_fc", ("F", "H"), tp="rows", transposed=True),
    *_both(_MLP + "linear_fc2", _G + "mlp.c_proj", ("H", "F"), tp="columns", transposed=True),
    *_norm("decoder.final_layernorm", "transformer.ln_f", "."),
    Rule(OUTPUT, ("lm_head.weight",), ("V", "H"), tp="rows", needs=("!tie_embeddings",)),
)

RULES: dict[str, tuple[Rule, ...]] = {
    "llama": _LLAMA + _LLAMA_END,
    "mistral": _LLAMA + _LLAMA_END,
    "qwen2": _LLAMA + _LLAMA_END,
    "qwen3": _LLAMA + _LLAMA_END,
    "gpt_neox": _NEOX,
    "gpt2": _GPT2,
    "mixtral": _LLAMA + _MIXTRAL_EXPERTS + _LLAMA_END,
    "qwen2_moe": _LLAMA + _QWEN_EXPERTS + _SHARED_EXPERT + _LLAMA_END,
    "qwen3_moe": _LLAMA + _QWEN_EXPERTS + _LLAMA_END,
}

# Buffers that some files hold beside the weights; they are computed, never read.
IGNORED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)")


@dataclass(frozen=True)
class Fused:
    """A Megatron tensor: what it is made of and how tensor ranks share it (`Rule.tp`)."""

    tensor: Tensor
    tp: str

    @property
    def key(self) -> str:
        """Canonical name."""
        return self.tensor.key


def sizes(model: ModelConfig) -> dict[str, int]:
    """The sizes that rules name."""
    query, key = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    return {
        "1": 1,
        "V": model.vocab_size,
        "H": model.hidden_size,
        "F": model.ffn_hidden_size,
        "2F": 2 * model.ffn_hidden_size,
        "Q": query,
        "QKV": query + 2 * key,
        "D": model.head_dim,
        "P": model.max_position_embeddings,
        "E": model.num_experts,
        "M": model.moe_ffn_hidden_size,
        "2M": 2 * model.moe_ffn_hidden_size,
        "S": model.moe_shared_ffn_hidden_size,
        "2S": 2 * model.moe_shared_ffn_hidden_size,
    }


def megatron_tensors(
    model: ModelConfig, padded_vocab_size: int | None = None, *, pad_rows: int | None = None
) -> dict[str, Fused]:
    """Every Megatron tensor of the model, whole, by name, in the order in which Megatron registers them by layer.

    Args:
        padded_vocab_size: rows of the vocabulary matrices; None = no padding rows.
        pad_rows: padding rows that are there to be taken, further ones are zeros; None = all are there.

    Raises:
        UsageError: there are no rules for the family.
    """
    size = sizes(model)
    made: dict[str, Fused] = {}
    for rule, key, names in _instances(model):
        shape = tuple(size[s] for s in rule.shape)
        fills = tuple(_fills(model, rule, names, shape))
        if key in VOCABULARY and padded_vocab_size is not None and padded_vocab_size > shape[0]:
            extra = padded_vocab_size - shape[0]
            kept = extra if pad_rows is None else min(extra, pad_rows)
            if kept:
                fills += (Fill(names[0], shape[0], kept, 0, shape[1], pad=True),)
            if kept < extra:
                fills += (Fill(None, shape[0] + kept, extra - kept, 0, shape[1]),)
            shape = (padded_vocab_size, shape[1])
        made[key] = Fused(Tensor(key, shape, fills), rule.tp)
    return made


def hf_tensors(model: ModelConfig) -> dict[str, Tensor]:
    """Every tensor of a Hugging Face file of the model by name, in the order of the model."""
    transposed = {name for rule, _, names in _instances(model) if rule.transposed for name in names}
    made: dict[str, Tensor] = {}
    for name, shape in atom_shapes(model).items():
        rows, columns = as_matrix(shape)
        if name in transposed:
            made[name] = Tensor(name, (columns, rows), (Fill(name, 0, columns, 0, rows, transposed=True),))
        else:
            made[name] = Tensor(name, shape, (Fill(name, 0, rows, 0, columns),))
    return made


def atom_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every logical tensor of the model with its shape, [out, in], in the order of the model."""
    size = sizes(model)
    shapes: dict[str, tuple[int, ...]] = {}
    for rule, _, names in _instances(model):
        rest = tuple(size[s] for s in rule.shape[1:])
        for name, rows in zip(names, _rows(model, rule, size), strict=True):
            shapes[name] = (rows, *rest)
    return shapes


def tied_copy(model: ModelConfig) -> tuple[str, str] | None:
    """(output layer, embedding) as Hugging Face names when the model ties them: a file may hold both."""
    if not model.tie_embeddings:
        return None
    by_key = {rule.key: rule.atoms[0] for rule in RULES[model.family]}
    return by_key[OUTPUT], by_key[EMBEDDING]


def suggest(name: str, known: Mapping[str, object]) -> str:
    """` (nearest known: ...)` for messages about a tensor that no rule names."""
    near = nearest(name, known)
    return f" (nearest known: `{near}`)" if near else ""


def has_experts(model: ModelConfig, layer: int) -> bool:
    """Whether a layer's MLP is a set of experts."""
    return model.num_experts > 0 and layer not in model.moe_dense_layers


def check_sizes(model: ModelConfig) -> None:
    """Whether a model can be at all: sizes from a damaged file may be anything.

    Raises:
        UsageError: a size is no whole number, too small, or beyond every model.
    """
    least = {
        **dict.fromkeys(("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "head_dim"), 1),
        **dict.fromkeys(("vocab_size", "ffn_hidden_size", "max_position_embeddings"), 0),
        **dict.fromkeys(("num_experts", "moe_ffn_hidden_size", "moe_shared_ffn_hidden_size"), 0),
    }
    for name, smallest in least.items():
        value = getattr(model, name)
        if not isinstance(value, int) or isinstance(value, bool) or not smallest <= value <= _MOST_SIZE:
            raise UsageError(f"`{name}` is {str(value)[:40]}, wanted a whole number from {smallest} to {_MOST_SIZE:,}")
    if model.num_layers * max(1, model.num_experts) > _MOST_PARTS:
        raise UsageError(
            f"{model.num_layers:,} layers{f' of {model.num_experts:,} experts' if model.num_experts else ''} are more "
            f"than any model has ({_MOST_PARTS:,})"
        )
    if model.num_attention_heads % model.num_query_groups:
        raise UsageError(
            f"{model.num_attention_heads} attention heads do not divide into {model.num_query_groups} key-value heads"
        )


_MOST_SIZE, _MOST_PARTS = 1 << 40, 1 << 18


def _instances(model: ModelConfig) -> Iterator[tuple[Rule, str, tuple[str, ...]]]:
    """(rule, Megatron name, names of logical tensors) of every tensor, layer by layer."""
    if model.family not in RULES:
        raise unknown("model family", model.family, RULES)
    check_sizes(model)
    rules = RULES[model.family]
    in_layers = [r for r in rules if "{i}" in r.key]
    first = rules.index(in_layers[0])
    last = rules.index(in_layers[-1])
    for rule in rules[:first]:
        yield from _named(model, rule, 0)
    for i in range(model.num_layers):
        for rule in in_layers:
            yield from _named(model, rule, i)
    for rule in rules[last + 1 :]:
        yield from _named(model, rule, 0)


def _named(model: ModelConfig, rule: Rule, i: int) -> Iterator[tuple[Rule, str, tuple[str, ...]]]:
    for need in rule.needs:
        name = need.lstrip("!")
        holds = has_experts(model, i) if name == "moe" else bool(getattr(model, name))
        if holds == need.startswith("!"):
            return
    for e in range(model.num_experts) if "{e}" in rule.key else (0,):
        texts = [text.replace("{i}", str(i)).replace("{e}", str(e)) for text in (rule.key, *rule.atoms)]
        yield rule, texts[0], tuple(texts[1:])


def _rows(model: ModelConfig, rule: Rule, size: Mapping[str, int]) -> tuple[int, ...]:
    """Rows of each logical tensor of a rule."""
    if rule.how == "gate_up":
        return (size[rule.shape[0]] // 2,) * 2
    if rule.how == "qkv":
        key = model.num_query_groups * model.head_dim
        return (size["Q"], key, key)
    return (size[rule.shape[0]],)


def _fills(model: ModelConfig, rule: Rule, names: tuple[str, ...], shape: tuple[int, ...]) -> Iterator[Fill]:
    """The rectangles of a Megatron tensor, in order of its rows."""
    rows, columns = as_matrix(shape)
    if rule.how == "gate_up":
        for i, name in enumerate(names):
            yield Fill(name, i * rows // 2, rows // 2, 0, columns)
    elif rule.how in ("qkv", "qkv_rows"):
        d, groups = model.head_dim, model.num_query_groups
        q = model.num_attention_heads // groups * d
        if rule.how == "qkv":
            starts = list(zip(names, (0, 0, 0), strict=True))
        else:
            starts = [(names[0], 0), (names[0], groups * q), (names[0], groups * (q + d))]
        at = 0
        for group in range(groups):
            for (name, start), length in zip(starts, (q, d, d), strict=True):
                yield Fill(name, at, length, 0, columns, at_row=start + group * length)
                at += length
    else:
        yield Fill(names[0], 0, rows, 0, columns)
