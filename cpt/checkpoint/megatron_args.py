"""Megatron's arguments (the Namespace `args` of its checkpoints) ↔ `ModelConfig`. Plain values only; no torch.

Arguments do not name a family. Where they leave one choice it is taken (`llama` stands for plain decoders, which
Mistral's are as well); else a `config.json` has to say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from cpt.base.errors import UsageError
from cpt.checkpoint import hf_config, pipeline_layout
from cpt.checkpoint.content import Layout
from cpt.checkpoint.layouts import pad_vocabulary
from cpt.checkpoint.unpickle import Dtype
from cpt.plan.model import ModelConfig

Args = Mapping[str, Any]

# What Megatron assumes for an argument that is not there.
_DEFAULTS: dict[str, Any] = {
    "normalization": "LayerNorm",
    "norm_epsilon": 1e-5,
    "position_embedding_type": "learned_absolute",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "add_bias_linear": True,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "untie_embeddings_and_output_weights": False,
    "swiglu": False,
    "bias_gelu_fusion": True,
    "init_method_std": 0.02,
}
# Arguments that change what the model computes and have no counterpart here, with the values that change nothing.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    name: (None, False, 0)
    for name in (
        "rotary_interleaved",
        "window_size",
        "window_attn_skip_freq",
        "multi_latent_attention",
        "fp8",
        "fp8_param",
        "fp8_param_gather",
        "fp4",
        "fp4_param",
        "apply_layernorm_1p",
        "layernorm_zero_centered_gamma",
        "apply_residual_connection_post_layernorm",
        "mtp_num_layers",
        "heterogeneous_layers_config_path",
        "heterogeneous_layers_config_encoded_json",
        "hybrid_override_pattern",
        "hybrid_attention_ratio",
        "hybrid_mlp_ratio",
        "is_hybrid_model",
        "experimental_attention_variant",
        "linear_attention_type",
        "attention_output_gate",
        "quick_geglu",
        "squared_relu",
        "glu_linear_offset",
        "activation_func_clamp_value",
        "softmax_scale",
        "no_rope_freq",
        "qk_l2_norm",
        "moe_latent_size",
        "moe_router_group_topk",
        "moe_router_enable_expert_bias",
        "moe_apply_probs_on_input",
        "moe_router_topk_limited_devices",
    )
}
_HARMLESS |= {
    "softmax_type": (None, "vanilla"),
    "moe_router_score_function": (None, "softmax"),
    "moe_router_topk_scaling_factor": (None, 1, 1.0),
}
# What tells the families apart; the first that fits is taken.
_PLAIN = {
    "position_embedding": "rope",
    "normalization": "rmsnorm",
    "linear_bias": False,
    "activation": "swiglu",
    "rotary_percent": 1.0,
    "parallel_residual": False,
}
_BIASED = {"normalization": "layernorm", "linear_bias": True, "qk_norm": False, "experts": False}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _PLAIN | {"qkv_bias": False, "qk_norm": False, "experts": False},
    "mistral": _PLAIN | {"qkv_bias": False, "qk_norm": False, "experts": False},
    "qwen2": _PLAIN | {"qkv_bias": True, "qk_norm": False, "experts": False},
    "qwen3": _PLAIN | {"qkv_bias": False, "qk_norm": True, "experts": False},
    "mixtral": _PLAIN
    | {"qkv_bias": False, "qk_norm": False, "experts": True, "shared": False}
    | {"dense": False, "moe_norm_topk": True},
    "qwen2_moe": _PLAIN | {"qk_norm": False, "experts": True, "shared": True},
    "qwen3_moe": _PLAIN | {"qkv_bias": False, "qk_norm": True, "experts": True, "shared": False},
    "gpt2": _BIASED | {"position_embedding": "learned", "gelu": True, "parallel_residual": False},
    "gpt_neox": _BIASED | {"position_embedding": "rope", "gelu": True},
}
_ALIKE = {"llama", "mistral"}  # the same tensors and settings under two names
# What Megatron's rotary scaling has built in.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Fields that change no tensor and no value that the model computes.
_FREE = ("init_std", "hf_config", "family")


@dataclass(frozen=True)
class _Said:
    """A field of the model as the arguments give it, and which argument that was."""

    value: Any
    by: str


def to_model(args: Args, where: str, config: Path | None = None, *, vocab_size: int | None = None) -> ModelConfig:
    """The model that Megatron's arguments describe.

    Without any word about the vocabulary's size, `vocab_size` is `padded_vocab_size` (see `knows_vocab_size`).

    Args:
        args: may lack fields: Megatron's defaults hold.
        where: file they come from, for messages.
        config: Hugging Face folder or `config.json`: the model is that one, and the arguments must agree with it.
        vocab_size: `--vocab-size`, where the arguments do not say.

    Raises:
        UsageError: what they describe cannot be expressed, contradicts `config` or `vocab_size`, or is of no known
            family; all problems together.
    """
    if config is not None:
        model = hf_config.read_config(config)
        own = args.get("hf_model_type")
        if own not in (None, model.family) and not {own, model.family} <= _ALIKE:
            raise UsageError(f"`{config}` is of a `{model.family}` model, and `{where}` of a `{own}` model")
        _compare(model, _said(args, where, vocab_size), where, config)
        return model
    stated = {k: v for k, v in args.items() if v is not None}
    model = _model(args, _said(_DEFAULTS | stated, where, vocab_size), where)
    return _with_config(model, args.get("hf_config"))


def knows_vocab_size(args: Args, model: ModelConfig) -> bool:
    """Whether somebody said how many rows of the vocabulary are not padding."""
    return bool(args.get("vocab_size")) or model.hf_config is not None or model.vocab_size != _padded(args)


def to_args(
    model: ModelConfig,
    *,
    layout: Layout,
    padded_vocab_size: int,
    dtype: str,
    iteration: int | None = None,
    spec: str = "local",
    vocabulary_multiple: int = 128,
) -> dict[str, Any]:
    """Megatron's arguments of a model, plain values.

    Args:
        dtype: of the model's weights, as torch spells it.
        spec: whose layers are to load it, one of `layouts.SPECS`.
        vocabulary_multiple: `make_vocab_size_divisible_by`, where it leads to `padded_vocab_size`.

    Raises:
        UsageError: Megatron cannot compute this model; names every field.
    """
    problems = _inexpressible(model, spec)
    if problems:
        raise UsageError(problems[0], more=tuple(UsageError(p) for p in problems[1:]))
    scaling = model.rope_scaling or {}
    kind = scaling.get("rope_type")
    is_even = pad_vocabulary(model.vocab_size, vocabulary_multiple, layout.tp) == padded_vocab_size
    made: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "group_query_attention": model.num_query_groups != model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.head_dim,
        "vocab_size": model.vocab_size,
        "padded_vocab_size": padded_vocab_size,
        "make_vocab_size_divisible_by": vocabulary_multiple if is_even else padded_vocab_size // layout.tp,
        "max_position_embeddings": model.max_position_embeddings,
        "seq_length": model.max_position_embeddings,
        "position_embedding_type": "learned_absolute" if model.position_embedding == "learned" else "rope",
        "rotary_base": int(model.rope_theta) if model.rope_theta == int(model.rope_theta) else model.rope_theta,
        "rotary_percent": model.rotary_percent,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": scaling["factor"] if kind == "linear" else None,
        "use_rope_scaling": kind == "llama3",
        "rope_scaling_factor": scaling["factor"] if kind == "llama3" else 8.0,
        "normalization": "RMSNorm" if model.normalization == "rmsnorm" else "LayerNorm",
        "norm_epsilon": model.norm_eps,
        "swiglu": model.activation == "swiglu",
        "openai_gelu": model.activation == "gelu_tanh",
        # Megatron's fused GELU with bias is the approximation by tanh, whatever the activation.
        "bias_gelu_fusion": False,
        "add_bias_linear": model.linear_bias,
        "add_qkv_bias": model.qkv_bias and not model.linear_bias,
        "qk_layernorm": model.qk_norm,
        "untie_embeddings_and_output_weights": not model.tie_embeddings,
        "init_method_std": model.init_std,
        "num_experts": model.num_experts or None,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vp if layout.vp > 1 else None,
        "pipeline_model_parallel_layout": _pipeline(layout),
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp or layout.tp,
        "data_parallel_size": layout.dp,
        "context_parallel_size": 1,
        "transformer_impl": "transformer_engine" if spec == "te" else "local",
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "params_dtype": Dtype(dtype),
        "iteration": iteration or 0,
        # Ours: what the arguments above cannot say.
        "hf_model_type": model.family,
        "hf_config": _config_text(model),
    }
    if model.num_experts:
        dense = set(model.moe_dense_layers)
        made |= {
            "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
            "moe_shared_expert_intermediate_size": model.moe_shared_ffn_hidden_size or None,
            "moe_shared_expert_gate": bool(model.moe_shared_ffn_hidden_size),
            "moe_router_topk": model.moe_topk,
            "moe_router_pre_softmax": not model.moe_norm_topk,
            "moe_router_score_function": "softmax",
            "moe_layer_freq": [int(i not in dense) for i in range(model.num_layers)] if dense else 1,
            "moe_grouped_gemm": spec == "te",
        }
    if kind == "llama3" and any(scaling[name] != fixed for name, fixed in _LLAMA3.items()):
        made["hf_rope_scaling"] = dict(scaling)
    if model.family == "gpt_neox":
        made["use_parallel_residual"] = model.parallel_residual
    return made


def to_layout(args: Args, model: ModelConfig, where: str) -> Layout:
    """The layout that Megatron's arguments name; what is not there is 1.

    Raises:
        UsageError: a notation of the pipeline that is not known.
    """

    def number(name: str) -> int:
        value = args.get(name)
        return value if isinstance(value, int) and value > 0 else 1

    tp, pp, ep = (number(f"{name}_model_parallel_size") for name in ("tensor", "pipeline", "expert"))
    vp, etp = number("virtual_pipeline_model_parallel_size"), args.get("expert_tensor_parallel_size")
    layers: tuple[int, ...] | None = None
    notation = args.get("pipeline_model_parallel_layout")
    first, last = args.get("decoder_first_pipeline_num_layers"), args.get("decoder_last_pipeline_num_layers")
    try:
        if isinstance(notation, str):
            layers = pipeline_layout.parse(notation, pp=pp, vp=vp, num_layers=model.num_layers)
        elif pp > 1 and (first or last):
            ends = [f"{name}={count}" for name, count in (("first", first), ("last", last)) if count]
            layers = pipeline_layout.parse(",".join(ends), pp=pp, vp=vp, num_layers=model.num_layers)
    except UsageError as error:
        raise UsageError(f"the arguments of `{where}`: {error.message}", *error.hints) from None
    if layers is None and (
        args.get("account_for_embedding_in_pipeline_split") or args.get("account_for_loss_in_pipeline_split")
    ):
        # The embedding and the loss count as a layer each when layers are divided, and take the first and last place.
        lead = bool(args.get("account_for_embedding_in_pipeline_split"))
        tail = bool(args.get("account_for_loss_in_pipeline_split"))
        each = (model.num_layers + lead + tail) // (pp * vp)
        counts = [each] * (pp * vp)
        counts[0] -= lead
        counts[-1] -= tail
        layers = tuple(counts)
    dp = number("data_parallel_size")
    return Layout(
        tp=tp, pp=pp, ep=ep, etp=etp if isinstance(etp, int) and etp != tp else None, vp=vp, dp=dp, layers=layers
    )


def _pipeline(layout: Layout) -> str | None:
    """Megatron's notation of an uneven pipeline: E embedding, t layer, L loss, parts divided by `|`."""
    if layout.layers is None or len(set(layout.layers)) == 1:
        return None
    parts = ["t" * count for count in layout.layers]
    parts[0], parts[-1] = "E" + parts[0], parts[-1] + "L"
    return "|".join(parts)


def _config_text(model: ModelConfig) -> str | None:
    """The model's `config.json`, which says more than arguments can (a sliding window, ids of special tokens)."""
    if model.hf_config is None:
        return None
    try:
        config = hf_config.write_config(model, hf_config.source_dtype(model))
    except UsageError:  # a change that its family's configuration has no word for
        return None
    # What it said about the dtype stays unsaid where it said nothing.
    return json.dumps({k: v for k, v in config.items() if k in model.hf_config or k not in ("dtype", "torch_dtype")})


def _with_config(model: ModelConfig, text: Any) -> ModelConfig:
    """The model with the `config.json` that lies among its arguments, if both still say the same."""
    if not isinstance(text, str):
        return model
    try:
        config = json.loads(text)
        found = hf_config.parse(config) if isinstance(config, dict) else None
    except (ValueError, TypeError, UsageError):
        return model
    if found is None or found.family != model.family:
        return model
    names = [f.name for f in fields(ModelConfig) if f.name not in ("hf_config", "init_std")]
    same = all(_same(getattr(found, name), getattr(model, name)) for name in names if not _is_idle(model, name))
    return replace(model, hf_config=config) if same else model


def _is_idle(model: ModelConfig, field: str) -> bool:
    """Whether a field means nothing for such a model."""
    if model.position_embedding == "learned":
        return field in ("rope_theta", "rotary_percent", "rope_scaling")
    return field.startswith("moe_") and not model.num_experts


def _inexpressible(model: ModelConfig, spec: str) -> list[str]:
    found = []
    ours = "; `--spec cpt` writes it for the layers of this project"
    scaling = model.rope_scaling or {}
    if spec != "cpt":
        found += [
            f"Megatron's own layers cannot compute `{name}: {scaling[name]}` of the rotary scaling, "
            f"they have {fixed}{ours}"
            for name, fixed in _LLAMA3.items()
            if scaling.get("rope_type") == "llama3" and scaling[name] != fixed
        ]
        if model.parallel_residual:
            found.append(f"Megatron's own layers cannot compute `use_parallel_residual: true`{ours}")
    if model.num_experts and model.moe_topk == 1 and model.moe_norm_topk:
        found.append("Megatron's router cannot make the weight of a single chosen expert 1 (`norm_topk_prob: true`)")
    return found


def _said(args: Args, where: str, vocab_size: int | None) -> dict[str, _Said]:
    """The model's fields that the arguments state.

    Raises:
        UsageError: something in them has no counterpart.
    """
    problems = [
        f"`{name}: {args[name]}` in the arguments of `{where}` cannot be expressed"
        for name, harmless in _HARMLESS.items()
        if name in args and args[name] not in harmless
    ]
    said: dict[str, _Said] = {}

    def say(field: str, by: str, value: Any) -> None:
        said[field] = _Said(value, by)

    def number(field: str, by: str, kind: type = int) -> None:
        value = args.get(by)
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0 or kind(value) != value:
            problems.append(f"`{by}` in the arguments of `{where}` is `{value}`, wanted a number above 0")
            return
        say(field, by, kind(value))

    def flag(field: str, by: str) -> None:
        if args.get(by) is not None:
            say(field, by, bool(args[by]))

    def choice(field: str, by: str, known: Mapping[str, str]) -> None:
        value = args.get(by)
        if value is None:
            return
        if value not in known:
            problems.append(f"`{by}: {value}` in the arguments of `{where}` cannot be expressed")
            return
        say(field, by, known[value])

    for field, by in (
        ("num_layers", "num_layers"),
        ("hidden_size", "hidden_size"),
        ("ffn_hidden_size", "ffn_hidden_size"),
        ("num_attention_heads", "num_attention_heads"),
        ("head_dim", "kv_channels"),
        ("vocab_size", "vocab_size"),
        ("max_position_embeddings", "max_position_embeddings"),
    ):
        number(field, by)
    number("norm_eps", "norm_epsilon", float)
    number("rope_theta", "rotary_base", float)
    number("rotary_percent", "rotary_percent", float)
    number("init_std", "init_method_std", float)
    choice("normalization", "normalization", {"RMSNorm": "rmsnorm", "LayerNorm": "layernorm"})
    choice("position_embedding", "position_embedding_type", {"learned_absolute": "learned", "rope": "rope"})
    if args.get("use_rotary_position_embeddings"):
        say("position_embedding", "use_rotary_position_embeddings", "rope")
    if args.get("group_query_attention"):
        number("num_query_groups", "num_query_groups")
    elif "group_query_attention" in args and "num_attention_heads" in said:
        say("num_query_groups", "group_query_attention", said["num_attention_heads"].value)
    flag("linear_bias", "add_bias_linear")
    flag("qkv_bias", "add_qkv_bias")
    if said.get("linear_bias", _Said(False, "")).value:
        say("qkv_bias", "add_bias_linear", True)
    flag("qk_norm", "qk_layernorm")
    if args.get("untie_embeddings_and_output_weights") is not None:
        by = "untie_embeddings_and_output_weights"
        say("tie_embeddings", by, not args[by])
    # Of a checkpoint that does not say, Megatron's own layers are the only reading.
    say("parallel_residual", "use_parallel_residual", bool(args.get("use_parallel_residual")))
    _say_activation(args, say)
    _say_scaling(args, said, say)
    _say_experts(args, said, say, number)
    if vocab_size is not None:
        known = said.get("vocab_size")
        if known is not None and known.value != vocab_size:
            problems.append(f"`--vocab-size` is {vocab_size}, the arguments of `{where}` say {known.value}")
        say("vocab_size", "--vocab-size", vocab_size)
    padded = _padded(args)
    if padded is not None and "vocab_size" in said and said["vocab_size"].value > padded:
        of = said["vocab_size"]
        problems.append(f"`{of.by}` is {of.value}, but `{where}` has only {padded} rows (`padded_vocab_size`)")
    if problems:
        raise UsageError(problems[0], more=tuple(UsageError(p) for p in problems[1:]))
    return said


def _say_activation(args: Args, say: Any) -> None:
    if args.get("swiglu"):
        say("activation", "swiglu", "swiglu")
    elif args.get("openai_gelu"):
        say("activation", "openai_gelu", "gelu_tanh")
    elif args.get("bias_gelu_fusion") is not None:
        # The fused kernel computes the approximation by tanh.
        say("activation", "bias_gelu_fusion", "gelu_tanh" if args["bias_gelu_fusion"] else "gelu")


def _say_scaling(args: Args, said: Mapping[str, _Said], say: Any) -> None:
    factor = args.get("rotary_seq_len_interpolation_factor")
    if isinstance(args.get("hf_rope_scaling"), Mapping):
        say("rope_scaling", "hf_rope_scaling", dict(args["hf_rope_scaling"]))
    elif args.get("use_rope_scaling"):
        found = {"rope_type": "llama3", "factor": float(args.get("rope_scaling_factor") or 8.0), **_LLAMA3}
        say("rope_scaling", "use_rope_scaling", found)
    elif factor is not None and factor != 1:
        say("rope_scaling", "rotary_seq_len_interpolation_factor", {"rope_type": "linear", "factor": float(factor)})
    elif "use_rope_scaling" in args:
        say("rope_scaling", "use_rope_scaling", None)


def _say_experts(args: Args, said: Mapping[str, _Said], say: Any, number: Any) -> None:
    if not args.get("num_experts"):
        if "num_experts" in args:
            say("num_experts", "num_experts", 0)
        return
    number("num_experts", "num_experts")
    number("moe_ffn_hidden_size", "moe_ffn_hidden_size")
    if "moe_ffn_hidden_size" not in said and "ffn_hidden_size" in said:
        say("moe_ffn_hidden_size", "ffn_hidden_size", said["ffn_hidden_size"].value)
    if "moe_shared_expert_intermediate_size" in args:
        by = "moe_shared_expert_intermediate_size"
        say("moe_shared_ffn_hidden_size", by, int(args[by] or 0))
    number("moe_topk", "moe_router_topk")
    if args.get("moe_router_pre_softmax") is not None:
        say("moe_norm_topk", "moe_router_pre_softmax", not args["moe_router_pre_softmax"])
    frequency = args.get("moe_layer_freq")
    if frequency is not None and "num_layers" in said:
        layers = range(said["num_layers"].value)
        if isinstance(frequency, list | tuple):
            dense = tuple(i for i in layers if i >= len(frequency) or not frequency[i])
        else:
            dense = tuple(i for i in layers if i % int(frequency))
        say("moe_dense_layers", "moe_layer_freq", dense)


def _padded(args: Args) -> int | None:
    value = args.get("padded_vocab_size")
    return int(value) if value else None


def _model(args: Args, said: Mapping[str, _Said], where: str) -> ModelConfig:
    """The model out of the arguments alone."""
    values = {name: s.value for name, s in said.items()}
    if args.get("seq_length"):
        values.setdefault("max_position_embeddings", int(args["seq_length"]))
    if _padded(args):
        values.setdefault("vocab_size", _padded(args))
    needed = {"num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "vocab_size"}
    missing = [f"`{name}`" for name in sorted(needed - set(values))]
    if missing:
        raise UsageError(
            f"the arguments of `{where}` do not say {', '.join(missing)}",
            "give the model's Hugging Face folder with `--config`",
        )
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    values.setdefault("num_query_groups", heads)
    values.setdefault("head_dim", hidden // heads)
    ffn = int(4 * hidden * 2 / 3 / 64) * 64 if values["activation"] == "swiglu" else 4 * hidden
    values.setdefault("ffn_hidden_size", ffn)
    if values.get("num_experts"):
        values.setdefault("moe_ffn_hidden_size", values["ffn_hidden_size"])
        values.setdefault("moe_topk", 2)
        values.setdefault("moe_norm_topk", True)
    if heads % values["num_query_groups"]:
        raise UsageError(
            f"the arguments of `{where}` have {heads} heads, which do not divide into "
            f"`num_query_groups: {values['num_query_groups']}`"
        )
    family = _family(args, values, where)
    if family == "mixtral":  # no layer of it has another MLP
        values["ffn_hidden_size"] = values["moe_ffn_hidden_size"]
    return ModelConfig(family=family, **values)


def _family(args: Args, values: Mapping[str, Any], where: str) -> str:
    """The family that the arguments leave."""
    shared = values.get("moe_shared_ffn_hidden_size", 0) > 0
    has_gate = args.get("moe_shared_expert_gate")
    traits = {
        **values,
        "experts": bool(values.get("num_experts")),
        "shared": shared and has_gate in (None, True),
        "dense": bool(values.get("moe_dense_layers")),
        "gelu": values["activation"] in ("gelu", "gelu_tanh"),
    }
    if shared and has_gate is False:
        traits["shared"] = None  # a shared expert without a gate: of no family here
    plain = values["num_query_groups"] == values["num_attention_heads"]
    plain = plain and values["head_dim"] * values["num_attention_heads"] == values["hidden_size"]
    fitting = [
        name
        for name, wanted in _FAMILIES.items()
        if all(traits.get(k, False) == v for k, v in wanted.items()) and (plain or name not in ("gpt2", "gpt_neox"))
    ]
    named = args.get("hf_model_type")
    if named in fitting:
        return str(named)
    if named is not None or not fitting:
        what = ", ".join(
            f"{name} {traits.get(name, False)}"
            for name in ("position_embedding", "normalization", "activation", "linear_bias", "qkv_bias", "qk_norm")
        )
        what += ", experts" * traits["experts"] + (", a shared expert" if shared else "")
        kind = f"`{named}` is no family" if named is not None else "no known family is a model"
        raise UsageError(
            f"the arguments of `{where}`: {kind} with {what}", "give the model's Hugging Face folder with `--config`"
        )
    return fitting[0]


def _compare(model: ModelConfig, said: Mapping[str, _Said], where: str, config: Path) -> None:
    """Refuse arguments that contradict the configuration."""
    problems = []
    skip = set(_FREE)
    if model.position_embedding == "rope":
        skip.add("max_position_embeddings")  # no tensor has that size, and training on shorter ones is usual
    if model.position_embedding == "learned":
        skip |= {"rope_theta", "rotary_percent"}
    if model.num_experts and len(model.moe_dense_layers) < model.num_layers and not model.moe_dense_layers:
        skip.add("ffn_hidden_size")
    for field in fields(ModelConfig):
        if field.name in skip or field.name not in said:
            continue
        mine, theirs = getattr(model, field.name), said[field.name]
        if not _same(mine, theirs.value):
            problems.append(
                f"`{hf_config.name_of(field.name)}` is {json.dumps(mine)} in `{config}`, and "
                f"{json.dumps(theirs.value)} by `{theirs.by}` in the arguments of `{where}`"
            )
    if len(problems) > 3:
        raise UsageError(
            f"`{config}` is of another model than `{where}`: {len(problems)} settings differ; {problems[0]}",
            "`--config` wants the Hugging Face folder of this very model",
        )
    if problems:
        raise UsageError(problems[0], more=tuple(UsageError(p) for p in problems[1:]))


def _same(a: Any, b: Any) -> bool:
    """Equality of settings: decimal numbers by six digits, since files hold them in fp32 and fp64."""
    if isinstance(a, float) and isinstance(b, int | float):
        return f"{a:.6g}" == f"{b:.6g}"
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return set(a) == set(b) and all(_same(a[k], b[k]) for k in a)
    return bool(a == b)
