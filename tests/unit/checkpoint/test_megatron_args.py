"""Megatron's arguments: read as a model where they tell one, compared with a `config.json`, refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.base.errors import UsageError
from cpt.checkpoint.content import Layout
from cpt.checkpoint.hf_config import config_for, parse
from cpt.checkpoint.megatron_args import knows_vocab_size, to_args, to_model
from cpt.plan.model import ModelConfig

PLAIN = ModelConfig(
    family="llama",
    num_layers=5,
    hidden_size=64,
    ffn_hidden_size=172,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=12,
    vocab_size=301,
    max_position_embeddings=512,
    norm_eps=1e-6,
    rope_theta=500000.0,
)
EXPERTS = {"num_experts": 6, "moe_ffn_hidden_size": 40, "moe_topk": 2, "moe_norm_topk": True}
BIASED = {
    "num_query_groups": 8,
    "head_dim": 8,
    "normalization": "layernorm",
    "qkv_bias": True,
    "linear_bias": True,
}
MODELS: dict[str, ModelConfig] = {
    "llama": PLAIN,
    "mistral": dataclasses.replace(PLAIN, family="mistral"),
    "qwen2": dataclasses.replace(PLAIN, family="qwen2", qkv_bias=True, tie_embeddings=True),
    "qwen3": dataclasses.replace(PLAIN, family="qwen3", qk_norm=True),
    "mixtral": dataclasses.replace(PLAIN, family="mixtral", ffn_hidden_size=40, **EXPERTS),
    "qwen2_moe": dataclasses.replace(
        PLAIN, family="qwen2_moe", qkv_bias=True, **EXPERTS, moe_shared_ffn_hidden_size=56, moe_dense_layers=(0, 3)
    ),
    "qwen3_moe": dataclasses.replace(
        PLAIN, family="qwen3_moe", qk_norm=True, **EXPERTS | {"moe_norm_topk": False}, moe_dense_layers=(4,)
    ),
    "gpt_neox": dataclasses.replace(PLAIN, family="gpt_neox", activation="gelu", rotary_percent=0.25, **BIASED),
    "gpt2": dataclasses.replace(
        PLAIN,
        family="gpt2",
        activation="gelu_tanh",
        position_embedding="learned",
        rope_theta=10000.0,
        tie_embeddings=True,
        **BIASED,
    ),
}


def args_of(model: ModelConfig, **changes: Any) -> dict[str, Any]:
    return to_args(model, layout=Layout(tp=2), padded_vocab_size=512, dtype="bfloat16", spec="cpt") | changes


@pytest.mark.parametrize("family", MODELS)
def test_what_a_models_arguments_say_is_that_model(family: str) -> None:
    assert to_model(args_of(MODELS[family]), "common.pt") == MODELS[family]


@pytest.mark.parametrize("family", MODELS)
def test_arguments_without_our_own_tell_the_family_where_they_can(family: str) -> None:
    args = args_of(MODELS[family])
    del args["hf_model_type"]
    assert to_model(args, "common.pt").family == ("llama" if family == "mistral" else family)


@given(
    st.sampled_from(sorted(MODELS)),
    st.sampled_from((None, "linear", "llama3")),
    st.floats(1, 64),
    st.booleans(),
    st.floats(1e-8, 1e-3),
)
def test_every_setting_of_a_model_survives(
    family: str, kind: str | None, factor: float, tied: bool, eps: float
) -> None:
    scaling: dict[str, Any] | None = None
    if kind:
        scaling = {"rope_type": kind, "factor": 1.5 + factor}
    if scaling and kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if MODELS[family].position_embedding == "learned":
        scaling = None
    model = dataclasses.replace(MODELS[family], rope_scaling=scaling, tie_embeddings=tied, norm_eps=eps)
    assert to_model(args_of(model), "common.pt") == model


def test_megatrons_defaults_hold_for_what_is_not_there() -> None:
    given = {"num_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "seq_length": 64, "padded_vocab_size": 128}
    model = to_model(given, "common.pt")
    assert (model.family, model.ffn_hidden_size, model.vocab_size, model.norm_eps) == ("gpt2", 192, 128, 1e-5)
    assert (model.activation, model.tie_embeddings, model.position_embedding) == ("gelu_tanh", True, "learned")
    assert not knows_vocab_size(given, model)
    assert knows_vocab_size(given, to_model(given, "common.pt", vocab_size=99))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_interleaved": True}, "`rotary_interleaved: True`"),
        ({"window_size": (128, 0)}, "`window_size"),
        ({"fp8": "e4m3"}, "`fp8: e4m3`"),
        ({"position_embedding_type": "yarn"}, "`position_embedding_type: yarn`"),
        ({"normalization": "L2Norm"}, "`normalization: L2Norm`"),
        ({"moe_router_score_function": "sigmoid"}, "sigmoid"),
        ({"hidden_size": 0}, "`hidden_size` .* is `0`"),
        ({"vocab_size": 600}, "has only 512 rows"),
        ({"normalization": "LayerNorm"}, "`llama` is no family with .*layernorm"),
        ({"hidden_size": None}, "do not say `hidden_size`"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        to_model(args_of(PLAIN, **change), "common.pt")


@pytest.mark.parametrize("key", ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"])
def test_a_llama3_scaling_that_megatron_does_not_have_is_for_our_layers_only(key: str) -> None:
    scaling: dict[str, Any] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192} | {key: 3}
    model = dataclasses.replace(PLAIN, rope_scaling=scaling)
    with pytest.raises(UsageError, match=f"`{key}: 3`"):
        to_args(model, layout=Layout(), padded_vocab_size=512, dtype="float32")
    assert to_model(args_of(model), "common.pt") == model


def test_a_parallel_residual_is_refused_for_megatrons_own_layers() -> None:
    model = dataclasses.replace(MODELS["gpt_neox"], parallel_residual=True)
    with pytest.raises(UsageError, match="use_parallel_residual"):
        to_args(model, layout=Layout(), padded_vocab_size=512, dtype="float32")
    assert to_model(args_of(model), "common.pt") == model


def _folder(tmp_path: Path, model: ModelConfig, **changes: Any) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config_for(model) | changes))
    return tmp_path


def test_a_config_decides_and_the_arguments_must_agree(tmp_path: Path) -> None:
    mistral = dataclasses.replace(PLAIN, family="mistral")
    folder = _folder(tmp_path, mistral)
    args = args_of(PLAIN)
    assert to_model(args, "common.pt", folder).family == "mistral"
    assert to_model(args, "common.pt", folder / "config.json").family == "mistral"
    # 1e-6 as fp32 holds it is still 1e-6; the sequence length of training is not the model's.
    assert to_model(args | {"norm_epsilon": 9.999999974752427e-07, "max_position_embeddings": 64}, "c", folder)
    with pytest.raises(UsageError) as error:
        to_model(args | {"hidden_size": 96, "rotary_base": 10000}, "common.pt", folder)
    assert "`hidden_size` is 64 in " in error.value.message and "and 96 by `hidden_size` in" in error.value.message
    assert "500000" in error.value.more[0].message and "10000" in error.value.more[0].message
    with pytest.raises(UsageError, match=r"is of another model than `common\.pt`: 4 settings differ; `") as error:
        changed = {
            "hidden_size": 96,
            "num_layers": 7,
            "ffn_hidden_size": 8,
            "untie_embeddings_and_output_weights": True,
        }
        to_model(args | changed, "common.pt", _folder(tmp_path, dataclasses.replace(PLAIN, tie_embeddings=True)))
    assert not error.value.more
    with pytest.raises(UsageError, match=r"^`tie_word_embeddings` is true in `.*`, and false by `untie_emb.*` in the"):
        tied = dataclasses.replace(PLAIN, tie_embeddings=True)
        to_model(args | {"untie_embeddings_and_output_weights": True}, "common.pt", _folder(tmp_path, tied))


def test_vocabulary_sizes_that_differ_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"`--vocab-size` is 300, the arguments .* say 301"):
        to_model(args_of(PLAIN), "common.pt", vocab_size=300)
    with pytest.raises(UsageError, match=r"`vocab_size` is 301 in .*, and 300 by `--vocab-size`"):
        to_model(args_of(PLAIN, vocab_size=None), "common.pt", _folder(tmp_path, PLAIN), vocab_size=300)


def test_an_uneven_pipeline_is_in_the_arguments() -> None:
    uneven = to_args(PLAIN, layout=Layout(pp=2, layers=(2, 3)), padded_vocab_size=301, dtype="float32")
    assert uneven["pipeline_model_parallel_layout"] == "Ett|tttL"
    assert uneven["make_vocab_size_divisible_by"] == 301


def _parsed(family: str, **said: Any) -> ModelConfig:
    return parse(config_for(MODELS[family], "bfloat16") | {"eos_token_id": 2, "bos_token_id": 1} | said)


@pytest.mark.parametrize("family", MODELS)
def test_all_that_a_config_said_comes_back(family: str) -> None:
    model = _parsed(family)
    assert to_model(args_of(model), "common.pt") == model


def test_a_sliding_window_comes_back() -> None:
    model = _parsed("mistral", sliding_window=16)
    assert model.max_position_embeddings == 16
    found = to_model(args_of(model), "common.pt")
    assert found == model and found.hf_config is not None
    assert (found.hf_config["sliding_window"], found.hf_config["max_position_embeddings"]) == (16, 512)


@pytest.mark.parametrize(
    "change",
    [
        {"max_position_embeddings": 1024},
        {"rotary_base": 7},
        {"vocab_size": 300},
        {"num_query_groups": 2},
        {"hf_config": "{"},
        {"hf_config": "[1]"},
    ],
)
def test_a_config_that_the_arguments_contradict_is_not_taken(change: dict[str, Any]) -> None:
    assert to_model(args_of(_parsed("llama"), **change), "common.pt").hf_config is None


def test_a_changed_models_config_says_the_change() -> None:
    model = dataclasses.replace(_parsed("llama"), max_position_embeddings=2048)
    found = to_model(args_of(model), "common.pt").hf_config
    assert found is not None and (found["max_position_embeddings"], found["eos_token_id"]) == (2048, 2)
