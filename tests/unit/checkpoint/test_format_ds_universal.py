"""DeepSpeed universal folders, written by torch.save, are read bit by bit; what is wrong in one is named."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cpt.base.errors import UsageError
from cpt.checkpoint import hf_config, layouts, mapping, master
from cpt.checkpoint.arrays import CARRIERS, Files, as_matrix
from cpt.checkpoint.content import MODEL, OPTIMIZER, Content
from cpt.checkpoint.formats import Reading
from cpt.checkpoint.formats.ds_universal import DeepSpeedUniversal
from cpt.plan.model import ModelConfig

LLAMA = ModelConfig(
    family="llama",
    num_layers=3,
    hidden_size=12,
    ffn_hidden_size=22,
    num_attention_heads=6,
    num_query_groups=2,
    head_dim=4,
    vocab_size=37,
    max_position_embeddings=64,
    norm_eps=1e-5,
)
TIED = dataclasses.replace(LLAMA, tie_embeddings=True)
GPT2 = dataclasses.replace(
    LLAMA,
    family="gpt2",
    num_query_groups=6,
    head_dim=2,
    tie_embeddings=True,
    qkv_bias=True,
    linear_bias=True,
    normalization="layernorm",
    activation="gelu_tanh",
    position_embedding="learned",
)
Values = dict[tuple[str, str], torch.Tensor]  # (atom, state) → [out, in]


def values_of(model: ModelConfig, seed: int = 0) -> Values:
    generator = torch.Generator().manual_seed(seed)
    return {
        (name, state): torch.randn(shape, generator=generator)
        for name, shape in mapping.atom_shapes(model).items()
        for state in OPTIMIZER
    }


def config_folder(model: ModelConfig, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config.config_for(model, "bfloat16")))
    return folder


def by_hf_names(model: ModelConfig, values: Values) -> dict[str, dict[str, torch.Tensor]]:
    """Parameters as a Hugging Face model has them."""
    transposed = {n for n, t in mapping.hf_tensors(model).items() if t.fills[0].transposed}
    return {
        name: {s: values[name, s].T.contiguous() if name in transposed else values[name, s] for s in OPTIMIZER}
        for name in mapping.atom_shapes(model)
    }


def by_megatron_names(model: ModelConfig, values: Values) -> dict[str, dict[str, torch.Tensor]]:
    """Parameters as a megatron-core model has them."""
    made: dict[str, dict[str, torch.Tensor]] = {}
    for key, fused in mapping.megatron_tensors(model).items():
        name = layouts.local_name(model, key, "local")
        made[name] = {
            s: torch.cat([values[str(f.atom), s][f.at_row : f.at_row + f.rows] for f in fused.tensor.fills])
            for s in OPTIMIZER
        }
    return made


def save(folder: Path, parameters: dict[str, dict[str, torch.Tensor]], *, step: Any = 7, **state: Any) -> Path:
    """A universal folder. Without `step` in the parameters' folders when it is None."""
    for name, states in parameters.items():
        path = folder / "zero" / name
        path.mkdir(parents=True)
        for key, tensor in states.items():
            torch.save({"param": tensor, "cat_dim": 0}, path / f"{key}.pt")
        if step is not None:
            torch.save(step, path / "step.pt")
    groups = [{"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1, "params": [0, 1]}]
    torch.save({"param_groups": groups, "zero_stage": 1}, folder / "zero" / "optimizer_state.pt")
    if state:
        torch.save(state, folder / "mp_rank_00_model_states.pt")
    return folder


def same(content: Content, values: Values, model: ModelConfig) -> None:
    """Every state of every atom, bit for bit."""
    assert list(content.atoms) == list(mapping.atom_shapes(model))
    with Files() as files:
        for (name, state), wanted in values.items():
            array = content.atoms[name].states[state]
            assert array.shape == tuple(wanted.shape)
            out = np.empty(as_matrix(array.shape), CARRIERS[array.dtype])
            files.read(array, 0, 0, out, array.dtype)
            assert np.array_equal(out.reshape(-1).view(np.uint32), wanted.numpy().reshape(-1).view(np.uint32)), name


@pytest.mark.parametrize("model", [LLAMA, TIED, GPT2], ids=["llama", "tied", "gpt2"])
@pytest.mark.parametrize("names", ["hf", "megatron"])
def test_every_state_is_read_bit_by_bit(model: ModelConfig, names: str, tmp_path: Path) -> None:
    values = values_of(model)
    parameters = by_hf_names(model, values)
    if names == "megatron":
        parameters = by_megatron_names(model, values)
    config = config_folder(model, tmp_path / "config")
    folder = save(tmp_path / "global_step9_universal", parameters)
    content = DeepSpeedUniversal.open(folder, Reading(config=config))
    same(content, values, model)
    assert content.optimizer is not None and content.optimizer.step == 7
    assert content.optimizer.groups == ({"lr": 1e-4, "betas": [0.9, 0.95], "weight_decay": 0.1},)
    assert content.iteration == 9 and content.padded_vocab_size is None
    assert {a.dtype for a in content.atoms.values()} == {"bfloat16"}  # the configuration's: no module is there


def test_wrapped_names_flat_tensors_and_step_tensors_are_read(tmp_path: Path) -> None:
    values = values_of(LLAMA)
    parameters = {
        f"module.{name}": {s: t.reshape(-1) for s, t in states.items()}
        for name, states in by_hf_names(LLAMA, values).items()
    }
    folder = save(tmp_path / "u", parameters, step=torch.tensor(5.0), iteration=11)
    for path in (folder / "zero").rglob("exp_avg.pt"):  # a bare tensor
        torch.save(torch.load(path)["param"], path)
    content = DeepSpeedUniversal.open(folder, Reading(config=config_folder(LLAMA, tmp_path / "config")))
    same(content, values, LLAMA)
    assert content.optimizer is not None and content.optimizer.step == 5 and content.iteration == 11


def test_rows_of_a_longer_storage_are_read(tmp_path: Path) -> None:
    """DeepSpeed saves a vocabulary as a view of the padded tensor."""
    values = values_of(LLAMA)
    parameters = by_hf_names(LLAMA, values)
    name = "model.embed_tokens.weight"
    for s in OPTIMIZER:
        longer = torch.cat([torch.full((4, 12), -1.0), values[name, s], torch.full((3, 12), -1.0)])
        parameters[name][s] = longer[4:41]
    folder = save(tmp_path / "u", parameters)
    same(DeepSpeedUniversal.open(folder, Reading(config=config_folder(LLAMA, tmp_path / "c"))), values, LLAMA)


def test_padding_rows_of_the_vocabulary_are_kept_apart(tmp_path: Path) -> None:
    values, rest = values_of(LLAMA), torch.randn(3, 12)
    parameters = by_hf_names(LLAMA, values)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        for s in OPTIMIZER:
            parameters[name][s] = torch.cat([values[name, s], rest])
    folder = save(tmp_path / "u", parameters)
    content = DeepSpeedUniversal.open(folder, Reading(config=config_folder(LLAMA, tmp_path / "c")))
    same(content, values, LLAMA)
    assert content.padded_vocab_size == 40
    with Files() as files:
        for s in OPTIMIZER:
            out = np.empty((3, 12), np.float32)
            files.read(content.atoms["lm_head.weight"].pad[s], 0, 0, out, "float32")
            assert np.array_equal(out, rest.numpy())


def test_the_module_s_weights_are_the_model_s_and_are_compared_with_the_main_ones(tmp_path: Path) -> None:
    values = values_of(LLAMA)
    parameters = by_hf_names(LLAMA, values)
    module = {f"module.{n}": states["fp32"].to(torch.float16) for n, states in parameters.items()}
    module["module.model.norm.weight"][2] += 1
    folder = save(tmp_path / "u", parameters, module=module, global_steps=4, lr_scheduler={"last": 3})
    content = DeepSpeedUniversal.open(folder, Reading(config=config_folder(LLAMA, tmp_path / "c")))
    assert {a.dtype for a in content.atoms.values()} == {"float16"} and content.common == {"lr_scheduler": {"last": 3}}
    assert all(MODEL in a.states for a in content.atoms.values())
    with Files() as files:
        assert [w.atom for w in master.check(content, files)] == ["model.norm.weight"]
    weights = DeepSpeedUniversal.open(folder, Reading(config=tmp_path / "c", optimizer=False))
    assert weights.optimizer is None and {tuple(a.states) for a in weights.atoms.values()} == {(MODEL,)}


def test_a_tied_output_layer_is_left_out_if_it_is_the_embedding(tmp_path: Path) -> None:
    values = values_of(TIED)
    parameters = by_hf_names(TIED, values)
    parameters["lm_head.weight"] = {s: values["model.embed_tokens.weight", s].clone() for s in OPTIMIZER}
    config = config_folder(TIED, tmp_path / "c")
    content = DeepSpeedUniversal.open(save(tmp_path / "u", parameters), Reading(config=config))
    same(content, values, TIED)
    assert any("lm_head.weight" in line for line in content.left_out)
    parameters["lm_head.weight"]["exp_avg"][1, 1] += 1
    with pytest.raises(UsageError, match=r"lm_head.weight` \(exp_avg\) differs from .* in 1 values"):
        DeepSpeedUniversal.open(save(tmp_path / "other", parameters), Reading(config=config))


def remove(folder: Path) -> None:
    shutil.rmtree(folder / "zero" / "model.layers.1.mlp.up_proj.weight")


def rename(folder: Path) -> None:
    (folder / "zero" / "model.norm.weight").rename(folder / "zero" / "model.norms.weight")


def drop_state(folder: Path) -> None:
    (folder / "zero" / "model.norm.weight" / "exp_avg_sq.pt").unlink()


def cut(folder: Path) -> None:
    path = folder / "zero" / "model.norm.weight" / "exp_avg.pt"
    path.write_bytes(path.read_bytes()[:-100])


def replaced(tensor: Any) -> Any:
    def change(folder: Path) -> None:
        torch.save({"param": tensor}, folder / "zero" / "model.layers.0.mlp.up_proj.weight" / "fp32.pt")

    return change


def other_step(folder: Path) -> None:
    torch.save(8, folder / "zero" / "model.norm.weight" / "step.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove, r"no parameter for `model.layers.1.mlp.up_proj.weight`"),
        (rename, r"model.norms.weight`: no rule of `llama` names this parameter \(nearest known: `model.norm.weight`"),
        (drop_state, r"exp_avg_sq.pt` is missing"),
        (cut, r"exp_avg.pt` .*cut off"),
        (replaced(torch.zeros(12, 22)), r"up_proj.weight` has shape \[12, 22\], the configuration says \[22, 12\]"),
        (replaced(torch.zeros(12, 22).T), "not stored row after row"),
        (replaced(torch.zeros(22, 12).bfloat16()), "is bfloat16, wanted float32"),
        (replaced("text"), "`param` is not a tensor"),
        (other_step, r"step.pt` says step [78], .* says [78]"),
    ],
)
def test_what_is_wrong_is_named(change: Any, message: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "u", by_hf_names(LLAMA, values_of(LLAMA)))
    reading = Reading(config=config_folder(LLAMA, tmp_path / "c"))
    DeepSpeedUniversal.open(folder, reading)
    change(folder)
    with pytest.raises(UsageError, match=message):
        DeepSpeedUniversal.open(folder, reading)


def test_a_configuration_is_asked_for_and_another_vocabulary_refused(tmp_path: Path) -> None:
    parameters = by_hf_names(LLAMA, values_of(LLAMA))
    folder = save(tmp_path / "u", parameters, universal_checkpoint_info={"original_vocab_size": 36})
    with pytest.raises(UsageError, match="does not say what its model is") as error:
        DeepSpeedUniversal.open(folder, Reading())
    assert "--config" in error.value.hints[0]
    with pytest.raises(UsageError, match=r"says `original_vocab_size` 36, .* says 37"):
        DeepSpeedUniversal.open(folder, Reading(config=config_folder(LLAMA, tmp_path / "c")))


def test_it_is_recognised_by_its_parameters(tmp_path: Path) -> None:
    assert DeepSpeedUniversal.recognise(save(tmp_path / "u", by_hf_names(LLAMA, values_of(LLAMA))))
    (tmp_path / "other" / "zero").mkdir(parents=True)
    assert not DeepSpeedUniversal.recognise(tmp_path / "other") and not DeepSpeedUniversal.recognise(tmp_path)
