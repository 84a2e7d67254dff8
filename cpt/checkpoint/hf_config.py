"""`config.json` ↔ `ModelConfig`. Reads the spellings of transformers 4 and 5; refuses by name what it cannot express.

JSON only: no torch, no transformers.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cpt.base.errors import UsageError
from cpt.base.files import read_json, why_unreadable
from cpt.base.registry import nearest, unknown
from cpt.checkpoint import mapping
from cpt.plan.model import ModelConfig

Json = Mapping[str, Any]

# Names of `ModelConfig`'s fields in config.json; the first is written where none is there, all are read.
_NAMES: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "n_layer"),
    "hidden_size": ("hidden_size", "n_embd"),
    "ffn_hidden_size": ("intermediate_size", "n_inner"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "num_query_groups": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
    "norm_eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    "tie_embeddings": ("tie_word_embeddings",),
    "init_std": ("initializer_range",),
    "num_experts": ("num_experts", "num_local_experts"),
    "moe_ffn_hidden_size": ("moe_intermediate_size",),
    "moe_shared_ffn_hidden_size": ("shared_expert_intermediate_size",),
    "moe_topk": ("num_experts_per_tok",),
    "moe_norm_topk": ("norm_topk_prob",),
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
# What each family's implementation assumes for a key that its config.json leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "vocab_size": 32000},
    "mistral": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "vocab_size": 32000,
        "num_key_value_heads": 8,
    },
    "qwen2": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "vocab_size": 151936},
    "qwen3": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "vocab_size": 151936, "head_dim": 128},
    "gpt_neox": {"layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "vocab_size": 50432, "hidden_act": "gelu"},
    "gpt2": {
        "layer_norm_epsilon": 1e-5,
        "n_positions": 1024,
        "n_layer": 12,
        "n_embd": 768,
        "n_head": 12,
        "vocab_size": 50257,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
    },
    "mixtral": {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "vocab_size": 32000,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rope_theta": 1e6,
    },
    "qwen2_moe": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "vocab_size": 151936,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "qkv_bias": True,
    },
    "qwen3_moe": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "vocab_size": 151936,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
}
_GELU = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_SCALING_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# Families with biases everywhere and LayerNorm; and those with experts.
_BIASED, _EXPERTS = ("gpt_neox", "gpt2"), ("mixtral", "qwen2_moe", "qwen3_moe")


def name_of(field: str) -> str:
    """A field of `ModelConfig` as `config.json` calls it."""
    return _NAMES.get(field, (field,))[0]


def read_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The model of a Hugging Face folder (or of a `config.json`), from its configuration alone.

    Raises:
        UsageError: unreadable, of an unknown family, or with a setting that cannot be expressed.
    """
    path = Path(folder) if Path(folder).is_file() else Path(folder) / "config.json"
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise UsageError(f"`{folder}` has no `config.json`") from None
    except ValueError as error:
        if "BOM" in str(error):
            raise UsageError(
                f"`{path}` begins with a byte order mark, which JSON has not", "save it as UTF-8 without BOM"
            ) from None
        raise UsageError(f"`{path}` {why_unreadable(error)}") from None
    if not isinstance(config, dict):
        raise UsageError(f"`{path}` holds no mapping")
    return parse(config, str(path))


def parse(config: Json, where: str = "config.json") -> ModelConfig:
    """A `config.json`'s content as a `ModelConfig`.

    Raises:
        UsageError: as `read_config`; all problems together.
    """
    family = config.get("model_type")
    if family is None:
        raise UsageError(f"`{where}` names no `model_type`", f"known: {', '.join(f'`{f}`' for f in _ARCHITECTURES)}")
    if family not in _ARCHITECTURES:
        error = unknown("`model_type`", family, _ARCHITECTURES)
        is_typo = nearest(str(family), _ARCHITECTURES) is not None
        raise UsageError(
            f"{error.message} in `{where}`",
            *error.hints,
            *([] if is_typo else ["`docs/checkpoints.md` says how a new family is added"]),
        )
    read = _Reader(config, family, where)
    problems = [*_refusals(read), *read.problems]
    if problems:
        raise UsageError(problems[0], more=tuple(UsageError(p) for p in problems[1:]))
    fields = _fields(read)
    if read.problems:
        raise UsageError(read.problems[0], more=tuple(UsageError(p) for p in read.problems[1:]))
    model = ModelConfig(**fields, hf_config=dict(config))
    try:
        mapping.check_sizes(model)
    except UsageError as error:
        raise UsageError(f"`{where}`: {error.message}") from None
    return model


class _Reader:
    """Values of a config.json with the family's defaults; collects what is wrong."""

    def __init__(self, config: Json, family: str, where: str) -> None:
        self.config, self.family, self.where = config, family, where
        self.problems: list[str] = []

    def get(self, key: str, default: Any = None) -> Any:
        value = self.config.get(key)
        return _DEFAULTS[self.family].get(key, default) if value is None else value

    def name(self, field: str) -> str:
        """The key that a field has in this file, or would have in one of this family."""
        names = _NAMES[field]
        wanted = [n for n in names if self.config.get(n) is not None] + [
            n for n in names if n in _DEFAULTS[self.family]
        ]
        return wanted[0] if wanted else names[0]

    def number(self, key: str, kind: Callable[[Any], Any], default: Any = None, above: float = 0) -> Any:
        value = self.get(key, default)
        if value is None:
            self.problems.append(f"`{self.where}` has no `{key}`")
            return kind(1)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= above or kind(value) != value:
            self.problems.append(f"`{key}` in `{self.where}` is `{value}`, wanted a number above {above:g}")
            return kind(1)
        return kind(value)

    @property
    def rope(self) -> dict[str, Any]:
        """Rotary settings in the spelling of transformers 5, whichever the file has."""
        new = self.config.get("rope_parameters")
        if isinstance(new, dict):
            rope = dict(new)
        else:
            old = self.config.get("rope_scaling")
            rope = dict(old) if isinstance(old, dict) else {}
        rope.setdefault("rope_type", rope.pop("type", None) or "default")
        base = self.config.get("rope_theta", self.config.get("rotary_emb_base"))
        rope.setdefault("rope_theta", self.get("rope_theta", 10000.0) if base is None else base)
        share = self.config.get("partial_rotary_factor")
        if share is None:
            share = self.config.get("rotary_pct", 0.25) if self.family == "gpt_neox" else 1.0
        rope.setdefault("partial_rotary_factor", share)
        return rope


def _refusals(read: _Reader) -> list[str]:
    """Settings that change what the model computes and have no counterpart here."""
    config, family, found = read.config, read.family, []

    def refuse(key: str, why: str) -> None:
        found.append(f"`{key}: {config.get(key)}` in `{read.where}` cannot be expressed: {why}")

    if config.get("quantization_config"):
        found.append(f"`quantization_config` in `{read.where}` cannot be expressed: weights must not be quantised")
    rope = read.rope
    kind = rope["rope_type"]
    if kind not in ("default", *_SCALING_KEYS):
        found.append(f"rotary scaling `{kind}` in `{read.where}` cannot be expressed: default, linear and llama3 can")
    for key in _SCALING_KEYS.get(kind, ()):
        if not isinstance(rope.get(key), int | float):
            found.append(f"rotary scaling `{kind}` in `{read.where}` has no number for `{key}`")
    for key in (
        "clip_qkv",
        "logit_scale",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "query_pre_attn_scalar",
    ):
        if config.get(key) is not None:
            refuse(key, "logits or attention are changed")
    for kind in set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention"}:
        found.append(f"`layer_types` with `{kind}` in `{read.where}` cannot be expressed")
    if family in _BIASED:
        act = "hidden_act" if family == "gpt_neox" else "activation_function"
        if read.get(act) not in _GELU:
            refuse(act, f"known are {', '.join(f'`{a}`' for a in _GELU)}")
        if config.get("attention_bias") is False:
            refuse("attention_bias", "biases are on all linear layers or on none")
        if config.get("scale_attn_weights") is False:
            refuse("scale_attn_weights", "attention is always scaled by the root of the head's size")
        for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
            if config.get(key):
                refuse(key, "attention is changed")
        return found
    if read.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", "only `silu` can")
    if config.get("mlp_bias"):
        refuse("mlp_bias", "this family's MLP has no biases here")
    if family not in ("qwen2", "qwen2_moe") and config.get("attention_bias"):
        refuse("attention_bias", "it puts a bias on the output projection too")
    if rope["partial_rotary_factor"] != 1.0:
        refuse("partial_rotary_factor", "this family rotates whole heads")
    return found


def _fields(read: _Reader) -> dict[str, Any]:
    config, family = read.config, read.family
    biased = family in _BIASED

    def number(field: str, default: int | None = None) -> int:
        found: int = read.number(read.name(field), int, default=default)
        return found

    heads, hidden = number("num_attention_heads"), number("hidden_size")
    groups = heads if biased else number("num_query_groups", heads)
    head_dim = hidden // heads if biased else number("head_dim", hidden // heads)
    if (biased or config.get("head_dim") is None) and family != "qwen3" and hidden % heads:
        read.problems.append(f"`hidden_size: {hidden}` in `{read.where}` is no multiple of {heads} heads")
    if heads % groups:
        read.problems.append(f"{heads} heads in `{read.where}` do not divide into {groups} key-value heads")
    rope = read.rope
    scaling = None
    if rope["rope_type"] != "default":
        scaling = {"rope_type": rope["rope_type"], **{k: rope[k] for k in _SCALING_KEYS[rope["rope_type"]]}}
    act = read.get("hidden_act") if family == "gpt_neox" else read.get("activation_function")
    ffn = number("ffn_hidden_size", 4 * hidden if biased else None)
    num_layers = number("num_layers")
    return {
        "family": family,
        "num_layers": num_layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "head_dim": head_dim,
        "vocab_size": number("vocab_size"),
        "max_position_embeddings": _positions(read),
        "norm_eps": read.number(read.name("norm_eps"), float),
        "rope_theta": float(rope["rope_theta"]),
        "rope_scaling": scaling,
        "rotary_percent": float(rope["partial_rotary_factor"]),
        "tie_embeddings": bool(read.get("tie_word_embeddings", False)),
        "qkv_bias": biased or family == "qwen2" or (family == "qwen2_moe" and bool(read.get("qkv_bias"))),
        "linear_bias": biased,
        "qk_norm": family in ("qwen3", "qwen3_moe"),
        "normalization": "layernorm" if biased else "rmsnorm",
        "activation": _GELU[act] if biased else "swiglu",
        "parallel_residual": family == "gpt_neox" and bool(config.get("use_parallel_residual", True)),
        "position_embedding": "learned" if family == "gpt2" else "rope",
        "init_std": read.number("initializer_range", float, default=0.02),
        **(_experts(read, num_layers, ffn) if family in _EXPERTS else {}),
    }


def _experts(read: _Reader, num_layers: int, ffn: int) -> dict[str, Any]:
    """Fields of a family with experts."""
    is_mixtral = read.family == "mixtral"
    found = {
        "num_experts": read.number(read.name("num_experts"), int),
        "moe_ffn_hidden_size": ffn if is_mixtral else read.number("moe_intermediate_size", int),
        "moe_topk": read.number("num_experts_per_tok", int),
        "moe_norm_topk": is_mixtral or bool(read.get("norm_topk_prob", False)),
    }
    if found["moe_topk"] > found["num_experts"]:
        read.problems.append(
            f"`num_experts_per_tok` in `{read.where}` is {found['moe_topk']} of {found['num_experts']} experts"
        )
    if read.family == "qwen2_moe":
        found["moe_shared_ffn_hidden_size"] = read.number("shared_expert_intermediate_size", int)
    if not is_mixtral:
        step = read.number("decoder_sparse_step", int, default=1)
        only = read.get("mlp_only_layers") or ()
        found["moe_dense_layers"] = tuple(i for i in range(num_layers) if i in only or (i + 1) % step)
    return found


def _positions(read: _Reader) -> int:
    """Longest sequence [tokens]: a sliding window bounds it, because up to its length attention is full."""
    positions: int = read.number(read.name("max_position_embeddings"), int)
    return min(positions, window(read.config) or positions)


def window(config: Json) -> int | None:
    """The sliding window that attention of a `config.json`'s model has [tokens]; None = full attention."""
    family, size, types = config.get("model_type"), config.get("sliding_window"), config.get("layer_types")
    used = config.get("use_sliding_window", family in ("mistral", "mixtral"))
    if types is not None:
        used = "sliding_attention" in types
    return int(size) if used and size and family != "gpt2" else None


def write_config(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of an export: the original verbatim but for what changed, or a new one.

    Args:
        dtype: of the written tensors, as torch spells it (`float32`, `bfloat16`).
    """
    if model.hf_config is None:
        return config_for(model, dtype)
    config = dict(model.hf_config)
    before = parse(config)
    changed = [
        f.name
        for f in dataclasses.fields(ModelConfig)
        if f.name != "hf_config" and getattr(model, f.name) != getattr(before, f.name)
    ]
    for name in changed:
        if name in ("rope_theta", "rope_scaling"):
            config = _changed_rope(config, model)
            continue
        if name not in _NAMES:
            raise UsageError(f"a changed `{name}` cannot be written into the base's `config.json`")
        config[_Reader(config, model.family, "config.json").name(name)] = getattr(model, name)
    return config | _dtype(config, dtype)


def _changed_rope(config: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """The config with other rotary settings, in the spelling it has."""
    scaling = dict(model.rope_scaling or {})
    if isinstance(config.get("rope_parameters"), dict):
        kept = {k: v for k, v in config["rope_parameters"].items() if k == "partial_rotary_factor"}
        return config | {"rope_parameters": {"rope_type": "default", **scaling, "rope_theta": model.rope_theta, **kept}}
    return config | {"rope_theta": model.rope_theta, "rope_scaling": scaling or None}


def _dtype(config: Json, dtype: str) -> dict[str, Any]:
    """The dtype under the name that the config uses; nothing when it says so already."""
    name = "dtype" if "dtype" in config else "torch_dtype"
    return {} if config.get(name) == dtype else {name: dtype}


def source_dtype(model: ModelConfig) -> str:
    """Dtype that the base came in, as torch spells it; float32 when its config does not say."""
    config = model.hf_config or {}
    said = config.get("dtype") or config.get("torch_dtype")
    return said if said in ("float32", "bfloat16", "float16") else "float32"


def config_for(model: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """A `config.json` for a model that came without one, in transformers 4's spelling, which 5 reads as well.

    Raises:
        UsageError: the family has no way to say it.
    """
    config: dict[str, Any] = {"architectures": [_ARCHITECTURES[model.family]], "model_type": model.family}
    if model.family == "gpt2":
        config |= {
            "n_layer": model.num_layers,
            "n_embd": model.hidden_size,
            "n_inner": model.ffn_hidden_size,
            "n_head": model.num_attention_heads,
            "n_positions": model.max_position_embeddings,
            "activation_function": "gelu" if model.activation == "gelu" else "gelu_new",
            "layer_norm_epsilon": model.norm_eps,
        }
    else:
        config |= {
            "num_hidden_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "intermediate_size": model.ffn_hidden_size,
            "num_attention_heads": model.num_attention_heads,
            "max_position_embeddings": model.max_position_embeddings,
        }
    config |= {
        "vocab_size": model.vocab_size,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if model.family == "gpt_neox":
        config |= {
            "layer_norm_eps": model.norm_eps,
            "hidden_act": "gelu" if model.activation == "gelu" else "gelu_new",
            "rotary_pct": model.rotary_percent,
            "rotary_emb_base": model.rope_theta,
            "use_parallel_residual": model.parallel_residual,
        }
        return config | ({"rope_scaling": dict(model.rope_scaling)} if model.rope_scaling else {})
    if model.family == "gpt2":
        return config
    config |= {
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_dim,
        "rms_norm_eps": model.norm_eps,
        "hidden_act": "silu",
        "rope_theta": model.rope_theta,
        "rope_scaling": dict(model.rope_scaling) if model.rope_scaling else None,
    }
    if model.family == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    if model.family in ("mistral", "mixtral"):
        config |= {"sliding_window": None}
    if model.family in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"):
        config |= {"use_sliding_window": False}
    if model.family in ("qwen3", "qwen3_moe"):
        config |= {"attention_bias": False}
    return config | _experts_for(model)


def _experts_for(model: ModelConfig) -> dict[str, Any]:
    """The keys of a family with experts."""
    if model.family == "mixtral":
        return {"num_local_experts": model.num_experts, "num_experts_per_tok": model.moe_topk}
    if model.family not in _EXPERTS:
        return {}
    made = {
        "num_experts": model.num_experts,
        "num_experts_per_tok": model.moe_topk,
        "moe_intermediate_size": model.moe_ffn_hidden_size,
        "norm_topk_prob": model.moe_norm_topk,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(model.moe_dense_layers),
    }
    if model.family == "qwen2_moe":
        made |= {"shared_expert_intermediate_size": model.moe_shared_ffn_hidden_size, "qkv_bias": model.qkv_bias}
    return made
