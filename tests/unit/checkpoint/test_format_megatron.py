"""Megatron's own folders: goldens, every layout there and back, what other readers make of them, and bad input."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpt.base.errors import UsageError
from cpt.checkpoint import find, layouts, mapping
from cpt.checkpoint.arrays import CARRIERS, Files, as_matrix
from cpt.checkpoint.content import Content, Layout
from cpt.checkpoint.formats import Reading, Writing
from cpt.plan.model import ModelConfig
from tests.made_checkpoints import LLAMA, MOE, content, write
from tests.shared import shared_data

NEOX = dataclasses.replace(
    LLAMA,
    family="gpt_neox",
    head_dim=4,
    num_query_groups=4,
    qkv_bias=True,
    linear_bias=True,
    normalization="layernorm",
    activation="gelu",
)
GPT2 = dataclasses.replace(NEOX, family="gpt2", position_embedding="learned", tie_embeddings=True)
QWEN_MOE = dataclasses.replace(
    MOE, family="qwen2_moe", qkv_bias=True, moe_shared_ffn_hidden_size=12, moe_dense_layers=(1,)
)


def opened(folder: Path, **options: Any) -> Content:
    return find.known()["megatron"].open(folder, Reading(**options))


def every(source: Content) -> Iterator[tuple[tuple[str, str, bool], str, bytes]]:
    """((atom, state, whether padding), dtype, bytes) of everything a content holds."""
    files = Files()
    for name, atom in source.atoms.items():
        for pad, states in ((False, atom.states), (True, atom.pad)):
            for state, array in states.items():
                out = np.empty(as_matrix(array.shape), CARRIERS[array.dtype])
                files.read(array, 0, 0, out, array.dtype)
                yield (name, state, pad), array.dtype, out.tobytes()


def assert_same(a: Content, b: Content, *, padding: bool = True) -> None:
    mine, theirs = ({key: (kind, data) for key, kind, data in every(c) if padding or not key[2]} for c in (a, b))
    assert mine.keys() == theirs.keys()
    different = [key for key in mine if mine[key] != theirs[key]]
    assert not different


@pytest.mark.parametrize("name", ["legacy_tp2pp2", "legacy_distopt_dp2", "td_dp_reshardable_dp2"])
def test_goldens_hold_the_truth(name: str) -> None:
    from safetensors.numpy import load_file

    goldens = shared_data("ckpt", "mcore-goldens")
    truth = load_file(goldens / "expected.safetensors")
    found = find.find(goldens / name)
    source = find.known()[found.format].open(found.folder, Reading())
    assert source.optimizer is not None and source.optimizer.step == 7 and len(source.optimizer.groups) == 2
    assert (source.iteration, source.padded_vocab_size, source.model.vocab_size) == (7, 96, 90)
    held = {key: data for key, _, data in every(source)}
    compared = 0
    for key, fused in mapping.megatron_tensors(source.model, 96).items():
        _, _, layer, rest = key.split(".", 3) if key.startswith("decoder.layers.") else ("", "", "", key)
        for state in ("fp32", "exp_avg", "exp_avg_sq"):
            stored = truth[f"decoder.layers.{rest}.{state}" if layer else f"{key}.{state}"]
            whole = (stored[int(layer)] if layer else stored).reshape(fused.tensor.matrix)
            for f in fused.tensor.fills:
                assert f.atom
                array = source.atoms[f.atom].pad[state] if f.pad else source.atoms[f.atom].states[state]
                values = np.frombuffer(held[f.atom, state, f.pad], "<f4").reshape(as_matrix(array.shape))
                part = values[f.at_row : f.at_row + f.rows]
                assert part.tobytes() == whole[f.row : f.row + f.rows].tobytes(), (key, state)
                compared += 1
    assert compared == 159


LAYOUTS = {
    "one rank": (LLAMA, Layout()),
    "tp 2": (LLAMA, Layout(tp=2)),
    "tp and pp": (LLAMA, Layout(tp=2, pp=3)),
    "more ranks than groups": (dataclasses.replace(LLAMA, num_query_groups=1, ffn_hidden_size=24), Layout(tp=4)),
    "uneven": (LLAMA, Layout(pp=2, layers=(1, 2))),
    "virtual": (dataclasses.replace(LLAMA, num_layers=4), Layout(tp=2, pp=2, vp=2)),
    "virtual, uneven": (dataclasses.replace(LLAMA, num_layers=5), Layout(pp=2, vp=2, layers=(1, 2, 0, 2))),
    "tied": (dataclasses.replace(LLAMA, tie_embeddings=True), Layout(tp=2, pp=3)),
    "tied, one stage": (dataclasses.replace(LLAMA, tie_embeddings=True), Layout(tp=2)),
    "biases": (NEOX, Layout(tp=2, pp=3)),
    "learned positions": (GPT2, Layout(tp=2, pp=3)),
    "q and k norms": (dataclasses.replace(LLAMA, family="qwen3", qk_norm=True), Layout(tp=2)),
    "experts": (MOE, Layout(tp=2)),
    "expert ranks": (MOE, Layout(ep=2, pp=3)),
    "expert and tensor ranks": (MOE, Layout(tp=2, ep=4)),
    "shared and dense": (QWEN_MOE, Layout(tp=2, ep=2)),
}


@pytest.mark.parametrize("optimizer", ["plain", "dp_reshardable", "none"])
@pytest.mark.parametrize("spec", ["local", "te"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_there_and_back(tmp_path: Path, name: str, spec: str, optimizer: str) -> None:
    model, layout = LAYOUTS[name]
    source = content(tmp_path / "made", model, optimizer=optimizer != "none")
    layout = dataclasses.replace(layout, bucket_numel=500, dp=2)
    back = opened(write(source, "megatron", tmp_path / "out", Writing(layout=layout, spec=spec, optimizer=optimizer)))
    assert_same(back, source)
    assert back.layout is not None
    assert (back.layout.tp, back.layout.pp, back.layout.vp, back.layout.ep) == (
        layout.tp,
        layout.pp,
        layout.vp,
        layout.ep,
    )
    assert back.layout.layers == (layout.layers if layout.layers else None)
    for field in dataclasses.fields(ModelConfig):
        mine, theirs = getattr(back.model, field.name), getattr(model, field.name)
        assert mine == theirs or field.name in ("hf_config", "ffn_hidden_size"), field.name
    if optimizer != "none":
        assert back.optimizer is not None and source.optimizer is not None
        assert back.optimizer.step == 7 and back.optimizer.form == optimizer


@st.composite
def cases(draw: Any) -> tuple[ModelConfig, Layout, Writing, int]:
    """Any small model and a layout that it can have."""
    family = draw(st.sampled_from(("llama", "qwen2", "qwen3", "gpt_neox", "mixtral", "qwen3_moe")))
    moe, neox = family in ("mixtral", "qwen3_moe"), family == "gpt_neox"
    tp = draw(st.sampled_from((1, 2, 3)))
    ep = draw(st.sampled_from((1, 2))) if moe else 1
    pp = draw(st.integers(1, 3))
    vp = draw(st.integers(1, 2)) if pp > 1 else 1
    groups = draw(st.sampled_from((tp, 2 * tp)))
    heads = groups * draw(st.integers(1, 2))
    groups = heads if neox else groups
    head_dim = draw(st.integers(1, 3))
    layers = draw(st.lists(st.integers(0, 2), min_size=pp * vp, max_size=pp * vp).filter(sum))
    model = dataclasses.replace(
        LLAMA,
        family=family,
        num_layers=sum(layers),
        hidden_size=heads * head_dim if neox else draw(st.integers(1, 9)),
        ffn_hidden_size=tp * draw(st.integers(1, 5)),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        vocab_size=draw(st.integers(1, 40)),
        tie_embeddings=draw(st.booleans()),
        qkv_bias=neox or family == "qwen2",
        linear_bias=neox,
        qk_norm=family in ("qwen3", "qwen3_moe"),
        normalization="layernorm" if neox else "rmsnorm",
        activation="gelu" if neox else "swiglu",
        num_experts=ep * draw(st.integers(1, 2)) if moe else 0,
        moe_ffn_hidden_size=tp * draw(st.integers(1, 3)) if moe else 0,
        moe_topk=1 if moe else 0,
    )
    if family == "mixtral":
        model = dataclasses.replace(model, ffn_hidden_size=model.moe_ffn_hidden_size, moe_topk=2, moe_norm_topk=True)
    layout = Layout(
        tp=tp,
        pp=pp,
        vp=vp,
        ep=ep,
        dp=draw(st.integers(1, 3)),
        layers=None if len(set(layers)) == 1 else tuple(layers),
        bucket_numel=draw(st.one_of(st.none(), st.integers(1, 900))),
    )
    writing = Writing(
        layout=layout,
        spec=draw(st.sampled_from(layouts.SPECS)),
        optimizer=draw(st.sampled_from(("plain", "dp_reshardable"))),
        vocabulary_multiple=draw(st.integers(1, 16)),
    )
    return model, layout, writing, draw(st.integers(0, 5))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), dtype=st.sampled_from(("bfloat16", "float16", "float32")))
def test_any_model_at_any_layout_there_and_back(
    case: tuple[ModelConfig, Layout, Writing, int], dtype: str, tmp_path: Path
) -> None:
    model, layout, writing, pad = case
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    source = content(tmp_path / "made", model, padded=model.vocab_size + pad, dtype=dtype)
    back = opened(write(source, "megatron", out, writing))
    assert_same(back, source, padding=False)
    wanted = layouts.pad_vocabulary(model.vocab_size, writing.vocabulary_multiple or 0, layout.tp)
    assert back.padded_vocab_size == wanted and back.pad_rows == wanted - model.vocab_size
    # Rows of padding are those of the source as far as it has them, and zeros beyond.
    for name, atom in back.atoms.items():
        for state, array in atom.pad.items():
            rows = read(array)
            given_rows = read(source.atoms[name].pad[state])[:wanted] if pad else np.zeros((0, rows.shape[1]))
            both = min(len(rows), len(given_rows))
            assert rows[:both].tobytes() == given_rows[:both].astype(rows.dtype).tobytes()
            assert not rows[both:].any()


def read(array: Any) -> np.ndarray[Any, Any]:
    out = np.empty(as_matrix(array.shape), CARRIERS[array.dtype])
    Files().read(array, 0, 0, out, array.dtype)
    return out


@pytest.mark.parametrize("optimizer", ["plain", "dp_reshardable"])
@pytest.mark.parametrize(
    "layout",
    [Layout(tp=2, pp=4), Layout(pp=2, vp=2, bucket_numel=700), Layout(tp=2), Layout(pp=3, layers=(1, 1, 2))],
    ids=str,
)
@pytest.mark.parametrize("name", ["legacy_tp2pp2", "legacy_distopt_dp2"])
def test_goldens_at_other_layouts_keep_every_bit(name: str, layout: Layout, optimizer: str, tmp_path: Path) -> None:
    source = opened(shared_data("ckpt", "mcore-goldens", name) / "iter_0000007")
    assert source.pad_rows == 6
    folder = write(source, "megatron", tmp_path, Writing(layout=layout, optimizer=optimizer))
    assert folder.name == "iter_0000007"
    back = opened(folder)
    assert_same(back, source)
    assert back.optimizer is not None and source.optimizer is not None
    assert (back.optimizer.step, back.optimizer.groups) == (source.optimizer.step, source.optimizer.groups)
    assert (back.iteration, back.model, back.padded_vocab_size) == (7, source.model, 96)


def test_torch_reads_a_rank_as_megatron_cuts_it(tmp_path: Path) -> None:
    """Against cuts made here with numpy, not by the layout's own description."""
    source = content(tmp_path / "made", LLAMA)
    folder = write(source, "megatron", tmp_path / "out", Writing(layout=Layout(tp=2, pp=3)))
    assert sorted(p.name for p in folder.iterdir()) == [f"mp_rank_{t:02d}_{p:03d}" for t in (0, 1) for p in (0, 1, 2)]
    with torch.serialization.safe_globals([Namespace]):
        first = torch.load(folder / "mp_rank_01_000" / "model_optim_rng.pt", weights_only=True)
        last = torch.load(folder / "mp_rank_01_002" / "model_optim_rng.pt", weights_only=True)

    def bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
        return tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32).numpy()

    def atom(name: str, state: str = "model") -> np.ndarray[Any, Any]:
        made = read(source.atoms[f"model.layers.0.{name}.weight"].states[state])
        return made.view(np.int16 if state == "model" else np.int32)

    gate, up = atom("mlp.gate_proj"), atom("mlp.up_proj")
    layer = {k.removeprefix("decoder.layers.0."): v for k, v in first["model"].items()}
    assert np.array_equal(bits(layer["mlp.linear_fc1.weight"]), np.concatenate([gate[11:], up[11:]]))
    assert np.array_equal(bits(layer["mlp.linear_fc2.weight"]), atom("mlp.down_proj")[:, 11:])
    assert np.array_equal(bits(layer["self_attention.linear_proj.weight"]), atom("self_attn.o_proj")[:, 12:])
    q, k, v = (atom(f"self_attn.{x}_proj") for x in "qkv")
    assert np.array_equal(bits(layer["self_attention.linear_qkv.weight"]), np.concatenate([q[12:], k[6:], v[6:]]))
    assert layer["self_attention.linear_qkv._extra_state"] is None
    assert first["args"].tensor_model_parallel_size == 2 and first["checkpoint_version"] == 3.0
    # Decayed parameters come first, in order of registration; masters in the same order.
    inner, mains = first["optimizer"]["optimizer"], first["optimizer"]["fp32_from_fp16_params"]
    assert [len(g["params"]) for g in inner["param_groups"]] == [5, 2] == [len(m) for m in mains]
    assert np.array_equal(bits(inner["state"][2]["exp_avg"])[:12], atom("self_attn.q_proj", "exp_avg")[12:])
    assert np.array_equal(bits(mains[0][4]), atom("mlp.down_proj", "fp32")[:, 11:])
    assert np.array_equal(bits(mains[1][1])[:, None], atom("post_attention_layernorm", "fp32"))
    steps = [s["step"] for s in inner["state"].values()]
    assert {float(s) for s in steps} == {7.0} and len({s.data_ptr() for s in steps}) == 7
    assert list(last["model"])[-2:] == ["output_layer.weight", "output_layer._extra_state"]
    assert last["model"]["output_layer.weight"].shape == (24, 16)


def test_weights_in_another_dtype_are_the_main_weights_rounded(tmp_path: Path) -> None:
    source = content(tmp_path / "made", LLAMA)
    back = opened(write(source, "megatron", tmp_path / "out", Writing(dtype="float32", layout=Layout(tp=2))))
    for name, atom in back.atoms.items():
        assert atom.dtype == "float32"
        assert read(atom.states["model"]).tobytes() == read(source.atoms[name].states["fp32"]).tobytes()
    weights = dataclasses.replace(source, optimizer=None)
    back = opened(write(weights, "megatron", tmp_path / "weights", Writing(dtype="float32", optimizer="none")))
    assert back.optimizer is None
    for name, atom in back.atoms.items():
        widened = read(source.atoms[name].states["model"]).astype("<u4") << 16
        assert read(atom.states["model"]).tobytes() == widened.tobytes()


def test_everything_beside_the_tensors_is_kept(tmp_path: Path) -> None:
    source = dataclasses.replace(
        content(tmp_path / "made", LLAMA),
        common={"opt_param_scheduler": {"max_lr": 0.1, "lr_decay_style": "cosine"}, "consumed_train_samples": 56},
        objects={"cpt.stage": {"name": "web", "tokens": 5}},
        args={"lr": 0.1, "decoder_first_pipeline_num_layers": 2, "attention_backend": "auto"},
        files={"config.json": tmp_path, "tokenizer.json": tmp_path},
    )
    writing = Writing(layout=Layout(pp=3))
    plan = find.writable()["megatron"].plan(source, writing)
    assert plan.step_folder == "iter_0000007"
    assert "tokenizer.json" in plan.dropped[-1] and not any("rng_state" in line for line in plan.dropped)
    back = opened(write(source, "megatron", tmp_path / "out", writing))
    assert dict(back.common) == dict(source.common)
    assert dict(back.objects) == dict(source.objects)
    assert back.args is not None
    assert back.args["lr"] == 0.1 and back.args["decoder_first_pipeline_num_layers"] is None
    assert back.args["consumed_train_samples"] == 56


# --- bad input ---


def edit(file: Path, change: Any) -> None:
    """Rewrite a file after a change, with torch as Megatron does."""
    value = torch.load(file, weights_only=False)
    change(value)
    torch.save(value, file)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tied model at tp 2 × pp 3 with an ordinary optimizer."""
    source = content(tmp_path / "made", dataclasses.replace(LLAMA, tie_embeddings=True))
    return write(source, "megatron", tmp_path / "out", Writing(layout=Layout(tp=2, pp=3)))


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """One rank with the distributed optimizer."""
    source = content(tmp_path / "made", LLAMA)
    return write(source, "megatron", tmp_path / "out", Writing(optimizer="dp_reshardable"))


def refused(folder: Path, *said: str, **options: Any) -> None:
    with pytest.raises(UsageError) as caught:
        opened(folder, **options)
    text = " ".join([caught.value.message, *caught.value.hints, *(e.message for e in caught.value.more)])
    for part in said:
        assert part in text, text


def test_missing_ranks_are_named(folder: Path) -> None:
    shutil.rmtree(folder / "mp_rank_01_002")
    refused(folder, "tp 2 × pp 3 (6 ranks)", "there: `mp_rank_00_000`", "missing: `mp_rank_01_002`")
    for p in (0, 1):
        shutil.rmtree(folder / f"mp_rank_01_{p:03d}")
    refused(folder, "claim tp 2 × pp 3", "the folders are those of tp 1 × pp 3", "missing: `mp_rank_01_000`")


def test_a_rank_too_many_is_named(folder: Path) -> None:
    shutil.copytree(folder / "mp_rank_01_002", folder / "mp_rank_02_002")
    refused(folder, "of another layout: `mp_rank_02_002`")


def test_an_empty_rank_folder_is_an_unfinished_save(folder: Path) -> None:
    (folder / "mp_rank_01_001" / "model_optim_rng.pt").unlink()
    refused(folder, "mp_rank_01_001/model_optim_rng.pt` is missing")


def test_one_number_more_is_pipeline_or_expert_rank_as_the_arguments_say(tmp_path: Path) -> None:
    source = content(tmp_path / "made", MOE)
    for name, layout in (("pipeline", Layout(pp=3)), ("experts", Layout(ep=4))):
        made = write(source, "megatron", tmp_path / name, Writing(layout=layout))
        assert sorted(p.name for p in made.iterdir())[1] == "mp_rank_00_001"
        back = opened(made)
        assert back.layout is not None and (back.layout.pp, back.layout.ep) == (layout.pp, layout.ep)
        assert_same(back, source)


def test_ranks_of_different_saves_are_refused(folder: Path) -> None:
    edit(folder / "mp_rank_00_001" / "model_optim_rng.pt", lambda v: v.update(iteration=9))
    refused(folder, "made of several saves", "`iteration` is 7 in `mp_rank_00_000`, 9 in `mp_rank_00_001`")


@pytest.mark.parametrize(
    ("version", "said"), [(0, "`checkpoint_version` 0"), (1.0, "before 2.0 queries, keys and values")]
)
def test_old_orders_of_queries_keys_and_values_are_refused(folder: Path, version: float, said: str) -> None:
    edit(folder / "mp_rank_00_000" / "model_optim_rng.pt", lambda v: v.update(checkpoint_version=version))
    refused(folder, said)


def test_interleaved_rotary_layout_is_refused(folder: Path) -> None:
    edit(folder / "mp_rank_00_000" / "model_optim_rng.pt", lambda v: setattr(v["args"], "rotary_interleaved", True))
    refused(folder, "`rotary_interleaved: True`")


NORM = "decoder.layers.0.input_layernorm.weight"


@pytest.mark.parametrize("what", ["model", "exp_avg", "fp32"])
def test_copies_that_differ_are_refused_and_the_first_is_taken_on_request(folder: Path, what: str) -> None:
    before = dict(((k, s), data) for (k, s, _), _, data in every(opened(folder)))

    def change(value: Any) -> None:
        if what == "model":
            value["model"][NORM][3] += 1
        elif what == "exp_avg":
            value["optimizer"]["optimizer"]["state"][4][what][3] += 1
        else:
            value["optimizer"]["fp32_from_fp16_params"][1][0][3] += 1

    edit(folder / "mp_rank_01_001" / "model_optim_rng.pt", change)
    refused(folder, f"({what}) differ: 1 values of mp_rank_00_001 and mp_rank_01_001", "the largest difference is")
    taken = opened(folder, first_replica=True)
    assert dict(((k, s), data) for (k, s, _), _, data in every(taken)) == before
    assert any(what in line for line in taken.left_out)


def test_tied_copies_that_differ_are_refused(folder: Path) -> None:
    edit(folder / "mp_rank_01_002" / "model_optim_rng.pt", lambda v: v["model"]["output_layer.weight"][5].mul_(2))
    refused(folder, "`embedding.word_embeddings.weight` (model) differ: 16 values of mp_rank_01_000 and mp_rank_01_002")


def test_what_a_rank_holds_is_checked_by_name_and_shape(folder: Path) -> None:
    file = folder / "mp_rank_00_001" / "model_optim_rng.pt"
    kept = file.read_bytes()
    edit(file, lambda v: v["model"].update({"decoder.layers.0.mlp.linear_fc9.weight": torch.zeros(3)}))
    refused(folder, "`decoder.layers.0.mlp.linear_fc9.weight` is no tensor of a `llama` model", "nearest known")
    file.write_bytes(kept)
    edit(file, lambda v: v["model"].pop(NORM))
    refused(folder, f"mp_rank_00_001/model_optim_rng.pt` has no tensor `{NORM}`")
    file.write_bytes(kept)
    edit(file, lambda v: v["model"].update({NORM: torch.zeros(17, dtype=torch.bfloat16)}))
    refused(folder, f"`{NORM}` has shape [17], the arguments give [16] on one of 2 tensor ranks")
    file.write_bytes(kept)
    edit(file, lambda v: v["model"].update({"decoder.layers.1.input_layernorm.weight": torch.zeros(16)}))
    refused(folder, "the ranks hold 4 layers (1, 2, 1)", "say 3 (`num_layers`)")


def test_arguments_that_contradict_the_tensors_are_refused(folder: Path) -> None:
    first = folder / "mp_rank_00_000" / "model_optim_rng.pt"
    kept = first.read_bytes()
    edit(first, lambda v: setattr(v["args"], "padded_vocab_size", 64))
    refused(folder, "has 24 rows on 2 tensor ranks, so 48; the arguments say 64 (`padded_vocab_size`)")
    first.write_bytes(kept)
    edit(first, lambda v: setattr(v["args"], "tensor_model_parallel_size", 4))
    refused(folder, "claim tp 4 × pp 3", "the folders are those of tp 2 × pp 3")


def test_groups_that_do_not_divide_the_parameters_are_refused(folder: Path) -> None:
    edit(
        folder / "mp_rank_00_000" / "model_optim_rng.pt",
        lambda v: v["optimizer"]["optimizer"]["param_groups"][0]["params"].pop(),
    )
    refused(folder, "the optimizer's groups have 4, 2 parameters, the model's 7 do not divide like that")


def test_moments_of_sixteen_bits_are_refused(folder: Path) -> None:
    def change(value: Any) -> None:
        state = value["optimizer"]["optimizer"]["state"][0]
        state["exp_avg"] = state["exp_avg"].bfloat16()

    edit(folder / "mp_rank_00_000" / "model_optim_rng.pt", change)
    refused(folder, "exp_avg of `embedding.word_embeddings.weight` is bfloat16", "`exp_avg_dtype` other than fp32")
    assert opened(folder, optimizer=False).optimizer is None


def test_counts_of_updates_that_differ_are_refused(folder: Path) -> None:
    edit(
        folder / "mp_rank_01_001" / "model_optim_rng.pt",
        lambda v: v["optimizer"]["optimizer"]["state"][0].update(step=torch.tensor(8.0)),
    )
    refused(folder, "do not say one count of updates, but 7, 8")


def test_a_missing_file_of_the_distributed_optimizer_is_named(flat: Path) -> None:
    (flat / "mp_rank_00" / "distrib_optim.pt").unlink()
    refused(flat, "mp_rank_00/distrib_optim.pt` is missing", "`--optimizer none`")
    assert opened(flat, optimizer=False).optimizer is None


def test_distributed_state_of_other_weights_is_refused(flat: Path) -> None:
    edit(
        flat / "mp_rank_00" / "distrib_optim.pt",
        lambda v: next(iter(v[0].values()))["param"].copy_(next(iter(v[0].values()))["param"].roll(1)),
    )
    refused(flat, "with no bucket size the fp32 weights match the model's weights")


def test_distributed_state_in_old_forms_is_refused(flat: Path) -> None:
    file = flat / "mp_rank_00" / "distrib_optim.pt"
    kept = file.read_bytes()
    edit(file, lambda v: v.pop("buckets_coalesced"))
    refused(flat, "before February 2024 (no `buckets_coalesced`)")
    file.write_bytes(kept)
    edit(file, lambda v: next(iter(v[0].values())).update(param=torch.zeros(4096, dtype=torch.int16)))
    refused(flat, "`store_param_remainders`")


def test_models_of_before_megatron_core_are_refused(folder: Path) -> None:
    def change(value: Any) -> None:
        value["model"] = {"language_model": {"encoder": {"layers.0.weight": torch.zeros(3)}}}

    edit(folder / "mp_rank_00_000" / "model_optim_rng.pt", change)
    refused(folder, "before megatron-core (`language_model…`)")


def test_a_file_that_was_cut_off_is_named(folder: Path) -> None:
    file = folder / "mp_rank_01_000" / "model_optim_rng.pt"
    file.write_bytes(file.read_bytes()[:-3000])
    refused(folder, "mp_rank_01_000/model_optim_rng.pt` is damaged or was cut off")


class Hostile:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("hostile",))


def test_no_code_of_a_file_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    file = folder / "mp_rank_00_000" / "model_optim_rng.pt"
    value = torch.load(file, weights_only=False)
    value["rng_state"] = Hostile()
    torch.save(value, file)
    assert opened(folder).optimizer is not None
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Hostile()))
        archive.writestr("archive/version", "3\n")
    refused(folder, "does not hold a Megatron checkpoint")
    assert not (tmp_path / "hostile").exists()


def test_parallel_residual_is_refused_by_name(tmp_path: Path) -> None:
    source = content(tmp_path / "made", dataclasses.replace(NEOX, parallel_residual=True))
    with pytest.raises(UsageError, match="use_parallel_residual"):
        find.writable()["megatron"].plan(source, Writing())


def test_what_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    megatron, source = find.writable()["megatron"], content(tmp_path / "made", MOE)
    with pytest.raises(UsageError, match="no optimizer form `fully_reshardable`"):
        megatron.plan(source, Writing(optimizer="fully_reshardable"))
    with pytest.raises(UsageError, match="no optimizer state"):
        megatron.plan(content(tmp_path / "weights", MOE, optimizer=False), Writing(optimizer="plain"))
    with pytest.raises(UsageError, match="tp 5 does not divide 4 attention heads"):
        megatron.plan(source, Writing(layout=Layout(tp=5)))
    with pytest.raises(UsageError, match="experts with tensor ranks of their own"):
        megatron.plan(source, Writing(layout=Layout(tp=2, etp=1, ep=2)))
    with pytest.raises(UsageError, match="no layer spec `mamba`"):
        megatron.plan(source, Writing(spec="mamba"))


def tp2pp2(tmp_path: Path) -> Path:
    """A folder that Megatron itself wrote."""
    made = tmp_path / "iter_0000007"
    shutil.copytree(shared_data("ckpt", "mcore-goldens") / "legacy_tp2pp2" / "iter_0000007", made)
    for path in (made, *made.rglob("*")):
        path.chmod(0o755)
    return made


@pytest.mark.parametrize("stage", ["000", "001"])
def test_a_rank_file_copied_over_another_is_refused(stage: str, tmp_path: Path) -> None:
    made = tp2pp2(tmp_path)
    shutil.copy(made / f"mp_rank_00_{stage}" / "model_optim_rng.pt", made / f"mp_rank_01_{stage}")
    refused(made, f"`mp_rank_00_{stage}` and `mp_rank_01_{stage}` hold the same values in all", "was copied over")


def test_expert_ranks_copied_over_one_another_are_refused_and_their_shared_parts_are_not(tmp_path: Path) -> None:
    made = write(
        content(tmp_path / "made", MOE, optimizer=False), "megatron", tmp_path / "out", Writing(layout=Layout(ep=2))
    )
    opened(made)
    shutil.copy(made / "mp_rank_00_000" / "model_optim_rng.pt", made / "mp_rank_00_001")
    refused(made, "`mp_rank_00_000` and `mp_rank_00_001` hold the same values")


def swap(made: Path, a: str, b: str) -> None:
    (made / a).rename(made / "away")
    (made / b).rename(made / a)
    (made / "away").rename(made / b)


@pytest.mark.parametrize(
    ("a", "b", "numbers"),
    [("mp_rank_00_000", "mp_rank_01_000", "1 0"), ("mp_rank_01_001", "mp_rank_01_002", "4 3")],
)
def test_rank_files_that_changed_places_are_told_by_the_rank_that_saved_them(
    a: str, b: str, numbers: str, tmp_path: Path
) -> None:
    made = write(
        content(tmp_path / "made", LLAMA, padded=96, optimizer=False), "megatron", tmp_path / "out",
        Writing(layout=Layout(tp=2, pp=3)),
    )  # fmt: skip
    opened(made)
    swap(made, a, b)
    low, high = numbers.split()
    refused(made, f"was saved by rank {low} ", f"by rank {high}, which comes before it", "have changed places")


def test_rank_files_that_changed_places_are_told_by_padding_rows_that_were_never_trained(tmp_path: Path) -> None:
    made = tp2pp2(tmp_path)
    swap(made, "mp_rank_00_000", "mp_rank_01_000")
    refused(made, "`mp_rank_00_000` ends with 6 rows of zeros in `embedding.word_embeddings.weight`", "changed places")


def test_a_damaged_file_is_named_before_buckets_are_guessed(flat: Path) -> None:
    file = flat / "mp_rank_00" / "model_optim_rng.pt"
    start, *_ = opened(flat).crc32[os.fspath(file)][3]
    data = bytearray(file.read_bytes())
    data[start + 1] ^= 8
    file.write_bytes(data)
    refused(flat, f"`{file}` is damaged: bytes {start:,} to", "another copy")


@pytest.mark.parametrize("name", ["torch_dist", "megatron"])
def test_the_arguments_keep_dtypes_as_dtypes(name: str, tmp_path: Path) -> None:
    goldens = shared_data("ckpt", "mcore-goldens")
    source = opened(goldens / "legacy_tp2pp2" / "iter_0000007")
    through = find.known()["atom"].open(write(source, "atom", tmp_path / "atom"), Reading())
    made = write(through, name, tmp_path / "out")
    file = made / ("common.pt" if name == "torch_dist" else "mp_rank_00/model_optim_rng.pt")
    args = torch.load(file, weights_only=False)["args"]
    assert args.params_dtype is torch.bfloat16
