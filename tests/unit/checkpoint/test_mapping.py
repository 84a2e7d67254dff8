"""Tensor mapping as data: forward and back is the identity, for any shape of model."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.base.errors import UsageError
from cpt.checkpoint import mapping
from cpt.plan.model import ModelConfig


@st.composite
def models(draw: Any) -> ModelConfig:
    family = draw(st.sampled_from(("llama", "mistral", "qwen2", "qwen3", "gpt_neox")))
    neox = family == "gpt_neox"
    groups = draw(st.integers(1, 4))
    heads = groups if neox else groups * draw(st.integers(1, 3))
    return ModelConfig(
        family=family,
        num_layers=draw(st.integers(1, 3)),
        hidden_size=draw(st.integers(1, 9)),
        ffn_hidden_size=draw(st.integers(1, 9)),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=draw(st.integers(1, 5)),
        vocab_size=draw(st.integers(1, 11)),
        max_position_embeddings=8,
        norm_eps=1e-5,
        tie_embeddings=draw(st.booleans()),
        qkv_bias=neox or draw(st.booleans()),
        linear_bias=neox,
        qk_norm=draw(st.booleans()) and not neox,
        normalization="layernorm" if neox else "rmsnorm",
        activation="gelu" if neox else "swiglu",
    )


def numbered(model: ModelConfig) -> dict[str, np.ndarray]:
    """Hugging Face tensors in which every number occurs once."""
    at, made = 0, {}
    for name, shape in mapping.atom_shapes(model).items():
        size = int(np.prod(shape))
        made[name] = np.arange(at, at + size, dtype=np.float32).reshape(shape)
        at += size
    return made


def fuse(model: ModelConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        key: np.concatenate([tensors[str(f.atom)][f.at_row : f.at_row + f.rows] for f in fused.tensor.fills])
        for key, fused in mapping.megatron_tensors(model).items()
    }


@given(models())
@settings(max_examples=60)
def test_every_number_is_once_in_what_was_fused_and_is_found_again(model: ModelConfig) -> None:
    before = numbered(model)
    fused = fuse(model, before)
    there = np.sort(np.concatenate([value.ravel() for value in fused.values()]))
    assert np.array_equal(there, np.sort(np.concatenate([value.ravel() for value in before.values()])))
    back = {name: np.full_like(value, -1) for name, value in before.items()}
    for key, tensor in mapping.megatron_tensors(model).items():
        assert fused[key].shape == tensor.tensor.shape
        for f in tensor.tensor.fills:
            back[str(f.atom)][f.at_row : f.at_row + f.rows] = fused[key][f.row : f.row + f.rows]
    assert all(np.array_equal(back[name], before[name]) for name in before)


@given(models(), st.integers(0, 5), st.integers(0, 5))
@settings(max_examples=30)
def test_padding_rows_come_last_and_those_that_no_source_has_are_zeros(
    model: ModelConfig, pad_rows: int, more: int
) -> None:
    padded = model.vocab_size + pad_rows + more
    tensors = mapping.megatron_tensors(model, padded, pad_rows=pad_rows)
    for key in {mapping.EMBEDDING, mapping.OUTPUT} & set(tensors):
        tensor = tensors[key].tensor
        assert tensor.shape == (padded, model.hidden_size)
        kinds = [(f.rows, f.pad, f.atom is None) for f in tensor.fills]
        wanted = [(model.vocab_size, False, False), (pad_rows, True, False), (more, False, True)]
        assert kinds == [w for w in wanted if w[0]]


@given(models())
@settings(max_examples=60)
def test_the_parameters_counted_are_the_parameters_named(model: ModelConfig) -> None:
    count = sum(int(np.prod(shape)) for shape in mapping.atom_shapes(model).values())
    assert count == model.num_parameters


def test_query_groups_lie_one_after_another() -> None:
    model = ModelConfig(
        family="llama",
        num_layers=1,
        hidden_size=3,
        ffn_hidden_size=5,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=2,
        vocab_size=7,
        max_position_embeddings=8,
        norm_eps=1e-5,
    )
    fills = mapping.megatron_tensors(model)["decoder.layers.0.self_attention.linear_qkv.weight"].tensor.fills
    names = [str(f.atom).split(".")[4][0] for f in fills]
    assert names == ["q", "k", "v", "q", "k", "v"]
    assert [(f.at_row, f.rows) for f in fills] == [(0, 4), (0, 2), (0, 2), (4, 4), (2, 2), (2, 2)]
    with pytest.raises(UsageError, match="unknown model family `lama`"):
        mapping.megatron_tensors(dataclasses.replace(model, family="lama"))
