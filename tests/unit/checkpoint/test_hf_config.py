"""`config.json` in both spellings, refused by name where it cannot be expressed, written back as it was."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cpt.base.errors import UsageError
from cpt.checkpoint.hf_config import config_for, parse, read_config, write_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "something_new": {"kept": True},
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
NEOX: dict[str, Any] = {
    "model_type": "gpt_neox",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "vocab_size": 50304,
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-05,
    "hidden_act": "gelu",
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "use_parallel_residual": True,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_layer": 3,
    "n_embd": 48,
    "n_head": 4,
    "n_inner": None,
    "n_positions": 96,
    "vocab_size": 301,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-05,
    "torch_dtype": "float32",
    "summary_type": "cls_index",
}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 12}
QWEN_MOE = LLAMA | {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "norm_topk_prob": False,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [3],
}
QWEN2_MOE = QWEN_MOE | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 56}
QWEN3_MOE = QWEN_MOE | {"model_type": "qwen3_moe", "head_dim": 12}


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in keys}


def test_both_spellings_give_the_same_model() -> None:
    new = without(LLAMA, "rope_theta", "torch_dtype") | {
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "dtype": "bfloat16",
    }
    old_scaled = LLAMA | {"rope_scaling": without(LLAMA3, "rope_type") | {"type": "llama3"}}
    new_scaled = new | {"rope_parameters": LLAMA3 | {"rope_theta": 10000.0}}
    new_neox = without(NEOX, "rotary_pct", "rotary_emb_base") | {
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.25}
    }
    for old, spelled_anew in ((LLAMA, new), (old_scaled, new_scaled), (NEOX, new_neox)):
        a, b = parse(old), parse(spelled_anew)
        assert dataclasses.replace(a, hf_config=None) == dataclasses.replace(b, hf_config=None)
    assert parse(old_scaled).rope_scaling == LLAMA3
    assert parse(NEOX).rotary_percent == 0.25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_bias": True}, "`mlp_bias: True`"),
        ({"attention_bias": True}, "`attention_bias: True`"),
        ({"hidden_act": "gelu"}, "`hidden_act: gelu`"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotary scaling `yarn`"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "no number for `low_freq_factor`"),
        ({"quantization_config": {"bits": 4}}, "`quantization_config`"),
        ({"final_logit_softcapping": 30.0}, "`final_logit_softcapping: 30.0`"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "`layer_types` with `linear_attention`"),
        ({"partial_rotary_factor": 0.5}, "`partial_rotary_factor: 0.5`"),
        ({"num_key_value_heads": 3}, "8 heads .* do not divide into 3"),
        ({"hidden_size": "64"}, "`hidden_size` .* is `64`"),
        ({"num_hidden_layers": True}, "`num_hidden_layers` .* is `True`"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(LLAMA | change)


def test_an_unknown_family_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown `model_type` `qwen4` in `config.json`") as error:
        parse(LLAMA | {"model_type": "qwen4"})
    assert "qwen" in error.value.hints[0] and len(error.value.hints) == 1
    with pytest.raises(UsageError, match=r"`config.json` names no `model_type`"):
        parse({k: v for k, v in LLAMA.items() if k != "model_type"})


def test_what_is_missing_or_too_large_is_said_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"`config.json` has no `hidden_size`"):
        parse({k: v for k, v in LLAMA.items() if k != "hidden_size"})
    with pytest.raises(UsageError, match=r"^`config.json`: 1,000,000,000 layers are more than any model has"):
        parse(LLAMA | {"num_hidden_layers": 10**9})
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf{}")
    with pytest.raises(UsageError, match=r"begins with a byte order mark"):
        read_config(tmp_path)


def test_gpt2s_own_names_and_defaults_are_read() -> None:
    model = parse(GPT2)
    assert (model.hidden_size, model.ffn_hidden_size, model.num_attention_heads, model.head_dim) == (48, 192, 4, 12)
    assert (model.max_position_embeddings, model.norm_eps, model.tie_embeddings) == (96, 1e-5, True)
    assert (model.activation, model.position_embedding, model.linear_bias) == ("gelu_tanh", "learned", True)
    assert parse({"model_type": "gpt2"}).num_parameters == 124_439_808
    untied = dataclasses.replace(model, tie_embeddings=False, vocab_size=384)
    assert write_config(untied, "float32") == GPT2 | {"tie_word_embeddings": False, "vocab_size": 384}


def test_experts_are_read_in_every_spelling() -> None:
    mixtral = parse(MIXTRAL)
    assert (mixtral.num_experts, mixtral.moe_topk, mixtral.moe_norm_topk) == (6, 3, True)
    assert mixtral.moe_ffn_hidden_size == mixtral.ffn_hidden_size == 172 and not mixtral.moe_dense_layers
    qwen2, qwen3 = parse(QWEN2_MOE), parse(QWEN3_MOE)
    # Every second layer has experts, of which layer 3 is told not to.
    assert qwen2.moe_dense_layers == qwen3.moe_dense_layers == (0, 2, 3, 4)
    assert (qwen2.moe_shared_ffn_hidden_size, qwen2.qkv_bias, qwen2.moe_norm_topk) == (56, True, False)
    assert (qwen3.moe_shared_ffn_hidden_size, qwen3.qk_norm, qwen3.head_dim) == (0, True, 12)
    renamed = without(QWEN3_MOE, "num_experts") | {"num_local_experts": 6}
    assert dataclasses.replace(parse(renamed), hf_config=None) == dataclasses.replace(qwen3, hf_config=None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "`scale_attn_by_inverse_layer_idx: True`"),
        (GPT2 | {"scale_attn_weights": False}, "`scale_attn_weights: False`"),
        (GPT2 | {"add_cross_attention": True}, "`add_cross_attention: True`"),
        (GPT2 | {"activation_function": "gelu_fast"}, "`activation_function: gelu_fast`"),
        (QWEN3_MOE | {"attention_bias": True}, "`attention_bias: True`"),
        (MIXTRAL | {"num_experts_per_tok": 7}, "7 of 6 experts"),
        (QWEN2_MOE | {"num_experts": 0}, "`num_experts` .* is `0`"),
    ],
)
def test_what_a_family_cannot_do_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(config)


def test_several_problems_are_reported_together() -> None:
    with pytest.raises(UsageError) as error:
        parse(LLAMA | {"mlp_bias": True, "hidden_act": "relu"})
    assert len(error.value.more) == 1


def test_settings_without_effect_are_no_obstacle() -> None:
    stock_qwen = LLAMA | {"model_type": "qwen2", "sliding_window": 131072, "use_sliding_window": False}
    assert parse(stock_qwen | {"layer_types": ["full_attention"] * 5}).max_position_embeddings == 512
    assert parse(stock_qwen).qkv_bias


def test_a_sliding_window_bounds_the_sequence_length() -> None:
    mistral = LLAMA | {"model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": 4096}
    assert parse(mistral).max_position_embeddings == 4096
    assert write_config(parse(mistral), "bfloat16") == mistral


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        NEOX | {"dtype": "float32"},
        LLAMA | {"rope_scaling": LLAMA3},
        GPT2,
        MIXTRAL,
        QWEN2_MOE,
        without(QWEN3_MOE, "num_experts") | {"num_local_experts": 6},
    ],
)
def test_an_unchanged_config_is_written_back_verbatim(config: dict[str, Any]) -> None:
    dtype = config.get("dtype") or config["torch_dtype"]
    written = write_config(parse(config), dtype)
    assert list(written.items()) == list(config.items())


def test_only_what_changed_is_changed() -> None:
    model = dataclasses.replace(parse(LLAMA), vocab_size=600, num_layers=7)
    assert write_config(model, "float32") == LLAMA | {
        "vocab_size": 600,
        "num_hidden_layers": 7,
        "torch_dtype": "float32",
    }
    new = without(LLAMA, "rope_theta") | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    model = dataclasses.replace(parse(new), rope_theta=500000.0)
    assert write_config(model, "bfloat16")["rope_parameters"] == {"rope_theta": 500000.0, "rope_type": "default"}


def test_a_config_of_a_model_from_scratch_reads_as_that_model() -> None:
    others = (GPT2, MIXTRAL, QWEN2_MOE, QWEN3_MOE, GPT2 | {"tie_word_embeddings": False, "activation_function": "gelu"})
    for config in (LLAMA, NEOX, LLAMA | {"model_type": "qwen3"}, LLAMA | {"rope_scaling": LLAMA3}, *others):
        model = dataclasses.replace(parse(config), hf_config=None)
        assert dataclasses.replace(parse(config_for(model)), hf_config=None) == model


def test_reading_a_config_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    code = (
        "import sys; from cpt.checkpoint import hf; hf.read_config(sys.argv[1]); "
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_a_broken_or_missing_config_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no `config.json`"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="is not JSON"):
        read_config(tmp_path)
