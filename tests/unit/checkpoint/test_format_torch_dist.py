"""`torch_dist` folders as logical tensors: Megatron's and ours, every spelling, any chunks, damaged ones named."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pickle
import re
import zlib
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpt.base.errors import UsageError
from cpt.checkpoint import mapping, megatron_args, torch_dist
from cpt.checkpoint.arrays import CARRIERS, Array, Files, Place, as_matrix, payload
from cpt.checkpoint.content import MAIN, MODEL, OPTIMIZER, Atom, Content, Layout, Optimizer
from cpt.checkpoint.formats import Reading, Writing
from cpt.checkpoint.formats import torch_dist_writing as writing_module
from cpt.checkpoint.formats.torch_dist import TorchDist
from cpt.checkpoint.torch_dist import Chunk, Folder
from cpt.checkpoint.writing import blocks
from cpt.plan.model import ModelConfig
from tests import made_checkpoints
from tests.checkpoints import MODELS
from tests.made_checkpoints import LLAMA, MOE
from tests.shared import shared_data

GOLDENS = ("td_model_tp2pp2", "td_fully_reshardable_dp2", "td_dp_reshardable_dp2", "td_nodistopt_tp2")
NAMES = {MAIN: "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
FORMS = ("fully_reshardable", "plain", "dp_reshardable")


def golden(name: str) -> Content:
    return TorchDist.open(shared_data("ckpt", "mcore-goldens", name, "iter_0000007"), Reading())


def held(content: Content, atom: str, state: str, pad: bool = False) -> bytes:
    """The bits of a state of a logical tensor."""
    array = content.array(atom, state, pad) if state == MODEL else (
        content.atoms[atom].pad if pad else content.atoms[atom].states)[state]  # fmt: skip
    out = np.empty(as_matrix(array.shape), CARRIERS[array.dtype])
    Files().read(array, 0, 0, out, array.dtype)
    return out.tobytes()


def fused(content: Content, key: str, state: str, dtype: str = "float32") -> np.ndarray[Any, Any]:
    """A Megatron tensor of a content, by its canonical name."""
    tensor = mapping.megatron_tensors(content.model, content.padded_vocab_size)[key].tensor
    made = [b.copy() for b in blocks(payload(tensor, state, dtype), content, Files(), np.empty(4096, np.uint8))]
    return np.concatenate(made).reshape(tensor.shape)


def assert_same(one: Content, other: Content, *, optimizer: bool = True) -> None:
    """Every bit of every state, padding included."""
    assert list(one.atoms) == list(other.atoms)
    models = [c.model for c in (one, other)]
    if one.model.num_experts and not one.model.moe_dense_layers:  # no tensor has that size, arguments need not say it
        models = [dataclasses.replace(m, ffn_hidden_size=0) for m in models]
    assert models[0] == models[1] and one.padded_vocab_size == other.padded_vocab_size
    for name, atom in one.atoms.items():
        assert atom.dtype == other.atoms[name].dtype
        for state in (MODEL, *OPTIMIZER) if optimizer else (MODEL,):
            assert held(one, name, state) == held(other, name, state), (name, state)
            if atom.pad:
                assert held(one, name, state, True) == held(other, name, state, True), (name, state, "padding")
    if optimizer:
        assert one.optimizer is not None and other.optimizer is not None
        assert one.optimizer.step == other.optimizer.step and one.iteration == other.iteration


def convert(content: Content, out: Path, writing: Writing | None = None) -> Content:
    return TorchDist.open(made_checkpoints.write(content, "torch_dist", out, writing or Writing()), Reading())


# Megatron's own


@pytest.mark.parametrize("name", GOLDENS)
def test_every_golden_holds_the_truth_bit_by_bit(name: str) -> None:
    from safetensors.numpy import load_file

    truth = load_file(shared_data("ckpt", "mcore-goldens", "expected.safetensors"))
    content = golden(name)
    assert (content.padded_vocab_size, content.model.vocab_size, content.iteration) == (96, 90, 7)
    assert content.has_optimizer == ("model" not in name) and content.left_out == ()
    seen = set()
    for key in mapping.megatron_tensors(content.model, 96):
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", key)
        for state in OPTIMIZER:
            expected = truth[f"decoder.layers.{match[2]}.{state}" if match else f"{key}.{state}"]
            seen.add(f"decoder.layers.{match[2]}.{state}" if match else f"{key}.{state}")
            expected = expected[int(match[1])] if match else expected
            if content.has_optimizer:
                assert fused(content, key, state).tobytes() == expected.tobytes(), (key, state)
            if state == MAIN:
                rounded = fused(content, key, MODEL, "bfloat16")
                bits = expected.view(np.uint32)
                wanted = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
                assert rounded.tobytes() == wanted.tobytes(), key
    assert seen == set(truth)


def test_the_faulty_golden_opens_and_is_not_the_truth() -> None:
    good, bad = golden("td_fully_reshardable_dp2"), golden("bad_fully_reshardable_multibucket")
    assert held(good, "model.norm.weight", MODEL) == held(bad, "model.norm.weight", MODEL)
    wrong = [n for n in good.atoms if held(good, n, MAIN) != held(bad, n, MAIN)]
    assert len(wrong) > 20


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GOLDENS[1:])
def test_a_golden_written_in_any_form_is_the_same_and_named_as_megatron_names_it(
    name: str, form: str, tmp_path: Path
) -> None:
    content = golden(name)
    layout = Layout(tp=2, pp=2, dp=2, bucket_numel=1500) if form == "dp_reshardable" else Layout()
    again = convert(content, tmp_path, Writing(optimizer=form, layout=layout))
    assert_same(content, again)
    assert again.optimizer is not None and content.optimizer is not None
    assert again.optimizer.groups == content.optimizer.groups and again.optimizer.form == form
    assert again.args is not None and content.args is not None
    told = {k: v for k, v in content.args.items() if "parallel" not in k and k in again.args}
    assert {k: again.args[k] for k in told} == told and again.args["consumed_train_samples"] == 28
    ours = Folder(tmp_path / "iter_0000007")
    theirs = {
        "fully_reshardable": "td_fully_reshardable_dp2",
        "plain": "td_nodistopt_tp2",
        "dp_reshardable": "td_dp_reshardable_dp2",
    }
    of = Folder(shared_data("ckpt", "mcore-goldens", theirs[form], "iter_0000007"))
    if form != "dp_reshardable":
        assert set(ours.tensors) == set(of.tensors) and set(ours.objects) == set(of.objects)
        assert all(ours.tensors[k].shape == t.shape and ours.tensors[k].dtype == t.dtype for k, t in of.tensors.items())
    else:
        states = {k for k in ours.objects if not k.startswith("optimizer.")}
        assert states == {k for k in of.objects if not k.startswith("optimizer.")}
        groups = {k for k in ours.objects if k.startswith("optimizer.")}
        assert len(groups) == 4 * 3 and {k.replace("idx_0.", "idx_3.") for k in of.objects} >= {
            k for k in groups if "idx_3." in k
        }


def test_dp_reshardable_at_the_goldens_own_layout_is_megatrons_own_to_the_bit(tmp_path: Path) -> None:
    name = "td_dp_reshardable_dp2"
    content = golden(name)
    assert content.optimizer is not None and content.optimizer.gradients == {"bfloat16": "bfloat16"}
    assert content.args is not None and "grad_reduce_in_bf16" not in content.args, "the keys alone say it"
    convert(content, tmp_path, Writing(optimizer="dp_reshardable", layout=Layout(dp=2, bucket_numel=1500)))
    ours = Folder(tmp_path / "iter_0000007")
    theirs = Folder(shared_data("ckpt", "mcore-goldens", name, "iter_0000007"))
    assert set(ours.tensors) == set(theirs.tensors) and set(ours.objects) == set(theirs.objects)
    for key in theirs:
        if key.startswith("optimizer.") and "bucket_idx" in key:
            ends = theirs.tensors[key].shape
            assert ours.tensors[key].shape == ends, key


@pytest.mark.parametrize(
    ("args", "known", "wanted"),
    [
        ({}, {}, "float32"),
        ({"grad_reduce_in_bf16": True}, {}, "bfloat16"),
        ({"grad_reduce_in_bf16": True, "accumulate_allreduce_grads_in_fp32": True}, {}, "float32"),
        ({"accumulate_allreduce_grads_in_fp32": False}, {}, "bfloat16"),
        ({"grad_reduce_in_bf16": True}, {"bfloat16": "float32"}, "float32"),
        ({"accumulate_allreduce_grads_in_fp32": True}, {"bfloat16": "bfloat16"}, "bfloat16"),
    ],
)
def test_flat_buffers_are_named_after_the_gradients_of_the_source_else_of_the_arguments(
    args: dict[str, Any], known: dict[str, str], wanted: str, tmp_path: Path
) -> None:
    content = made_checkpoints.content(tmp_path / "made", LLAMA)
    assert content.optimizer is not None
    content = dataclasses.replace(
        content,
        args={**(content.args or {}), **args},
        optimizer=dataclasses.replace(content.optimizer, gradients=known),
    )
    form = Writing(optimizer="dp_reshardable", layout=Layout(tp=2, dp=2))
    again = convert(content, tmp_path / "td", form)
    assert again.optimizer is not None and again.optimizer.gradients == {"bfloat16": wanted}
    flat = [k for k in Folder(again.path) if "gbuf_idx" in k]
    assert flat and all(f".dtype_(torch.bfloat16, torch.{wanted})." in k for k in flat)
    as_fp32 = convert(again, tmp_path / "fp32", dataclasses.replace(form, dtype="float32"))
    assert as_fp32.optimizer is not None and as_fp32.optimizer.gradients == {"float32": "float32"}


# Any model, any layout


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    model = MODELS[draw(st.sampled_from(sorted(MODELS)))]
    layers = draw(st.integers(1, 4))
    return dataclasses.replace(
        model,
        num_layers=layers,
        vocab_size=draw(st.sampled_from([45, 61, 64])),
        moe_dense_layers=tuple(i for i in model.moe_dense_layers if i < layers - 1),
    )


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_model_comes_back_from_any_form_layout_and_file_size(data: st.DataObject, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("made")
    model = data.draw(models())
    padded = data.draw(st.sampled_from([model.vocab_size, 64, 96])) if model.vocab_size <= 64 else None
    dtype = data.draw(st.sampled_from(["bfloat16", "float32", "float16"]))
    content = made_checkpoints.content(folder, model, padded=padded, dtype=dtype, seed=data.draw(st.integers(0, 9)))
    form = data.draw(st.sampled_from(FORMS))
    layout = Layout(
        tp=data.draw(st.sampled_from([1, 2])),
        ep=data.draw(st.sampled_from([1, 2])) if model.num_experts else 1,
        bucket_numel=data.draw(st.sampled_from([None, 700])),
        dp=2,
    )
    spec = "cpt" if model.parallel_residual else data.draw(st.sampled_from(["local", "te"]))
    if padded is not None and padded % layout.tp:
        layout = dataclasses.replace(layout, tp=1)
    file_bytes = data.draw(st.sampled_from([1 << 30, 5000]))
    writing = Writing(layout=layout, optimizer=form, spec=spec, file_bytes=file_bytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing_module, "CHUNK", data.draw(st.sampled_from([1 << 26, 1000])))
        again = convert(content, folder / "out", writing)
    assert_same(content, again)


@pytest.mark.parametrize("family", sorted(MODELS))
def test_hugging_face_to_torch_dist_and_back_keeps_every_bit(family: str, tmp_path: Path) -> None:
    from cpt.checkpoint import find

    model = MODELS[family]
    start = made_checkpoints.content(tmp_path / "made", model, padded=None, optimizer=False)
    hugging_face = find.known()["hf"]
    first = hugging_face.open(made_checkpoints.write(start, "hf", tmp_path / "hf"), Reading())
    spec = "cpt" if model.parallel_residual else "local"
    middle = convert(first, tmp_path / "td", Writing(spec=spec, layout=Layout(tp=2)))
    assert (tmp_path / "td" / "release").is_dir() and not middle.has_optimizer
    assert middle.padded_vocab_size == 256 and middle.atoms[next(iter(middle.atoms))].pad_rows == 256 - model.vocab_size
    last = hugging_face.open(made_checkpoints.write(middle, "hf", tmp_path / "again"), Reading())
    for name in first.atoms:
        assert held(first, name, MODEL) == held(start, name, MODEL) == held(last, name, MODEL), name
    pad = next(n for n, a in middle.atoms.items() if a.pad)
    assert not any(held(middle, pad, MODEL, True))


def test_defaults_of_generation_go_along_without_a_tokenizer(tmp_path: Path) -> None:
    folder = made_checkpoints.write(made_checkpoints.content(tmp_path / "made"), "torch_dist", tmp_path / "td")
    (folder / "generation_config.json").write_text("{}")
    assert TorchDist.open(folder, Reading()).files == {"generation_config.json": folder / "generation_config.json"}


def test_without_our_manifest_the_arguments_say_what_the_model_is(tmp_path: Path) -> None:
    content = made_checkpoints.content(tmp_path / "made", MOE)
    folder = made_checkpoints.write(content, "torch_dist", tmp_path / "td")
    (folder / "manifest.json").unlink()
    again = TorchDist.open(folder, Reading())
    assert_same(content, again)
    assert again.layout == Layout() and again.args is not None and again.args["num_experts"] == 4


@pytest.mark.parametrize("form", ["fully_reshardable", "dp_reshardable"])
def test_another_padding_cuts_rows_or_adds_zeros(form: str, tmp_path: Path) -> None:
    model = dataclasses.replace(LLAMA, ffn_hidden_size=20)
    content = made_checkpoints.content(tmp_path / "made", model, padded=48)
    name = "model.embed_tokens.weight"
    more = convert(content, tmp_path / "more", Writing(vocabulary_multiple=16, layout=Layout(tp=4), optimizer=form))
    assert more.padded_vocab_size == 64 and more.atoms[name].pad_rows == 64 - 45
    for state in (MODEL, *OPTIMIZER):
        kept = held(content, name, state, True)
        found = held(more, name, state, True)
        assert found[: len(kept)] == kept and any(kept) and not any(found[len(kept) :])
    less = convert(more, tmp_path / "less", Writing(vocabulary_multiple=1))
    assert less.padded_vocab_size == 45 and not less.atoms[name].pad
    assert held(less, name, "exp_avg") == held(content, name, "exp_avg")


def test_torch_itself_reads_what_is_written(tmp_path: Path) -> None:
    import torch
    from torch.distributed.checkpoint import FileSystemReader, load

    content = made_checkpoints.content(tmp_path / "made", MOE)
    folder = made_checkpoints.write(content, "torch_dist", tmp_path / "td", Writing(file_bytes=4000))
    described = FileSystemReader(folder).read_metadata().state_dict_metadata
    assert len(list(folder.glob("__*.distcp"))) > 5
    there: dict[str, Any] = {k: m for k, m in described.items() if hasattr(m, "size")}
    tensors = {k: torch.zeros(m.size, dtype=m.properties.dtype) for k, m in there.items()}
    load(tensors, storage_reader=FileSystemReader(folder), no_dist=True)
    experts = tensors["optimizer.state.exp_avg.decoder.layers.mlp.experts.experts.linear_fc1.weight"]
    assert experts.shape == (3, 4, 20, 16)
    key = "decoder.layers.2.mlp.experts.experts.3.linear_fc1.weight"
    assert experts[2, 3].numpy().tobytes() == fused(content, key, "exp_avg").tobytes()
    weight = tensors["decoder.layers.self_attention.linear_qkv.weight"][1].view(torch.uint16).numpy()
    qkv = fused(content, "decoder.layers.1.self_attention.linear_qkv.weight", MODEL, "bfloat16")
    assert weight.tobytes() == qkv.tobytes()
    common = torch.load(folder / "common.pt", weights_only=False)
    assert common["args"].num_experts == 4 and common["iteration"] == 7 and common["checkpoint_version"] == 3.0
    assert common["optimizer"]["optimizer"]["param_groups"][1]["wd_mult"] == 0.0
    assert common["optimizer"]["optimizer"]["param_groups"][0]["step"] == 7
    name, record = next((k, r) for k, r in Folder(folder).objects.items() if k.endswith("shard_2.3_3.4"))
    assert name == "decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_2.3_3.4"
    with open(folder / record.file, "rb") as file:
        file.seek(record.start)
        (folder / "one").write_bytes(file.read(record.length))
    assert torch.load(folder / "one", weights_only=True) == [None]


def test_the_step_of_an_ordinary_optimizer_is_a_tensor_that_torch_counts_with(tmp_path: Path) -> None:
    import torch

    content = made_checkpoints.content(tmp_path / "made", LLAMA)
    folder = made_checkpoints.write(content, "torch_dist", tmp_path / "td", Writing(optimizer="plain"))
    common = torch.load(folder / "common.pt", weights_only=False)
    step = common["optimizer"]["optimizer"]["state"]["common_step"]
    assert isinstance(step, torch.Tensor) and step.dim() == 0 and step.item() == 7
    assert "distrib_optim_sharding_type" not in common["content_metadata"]


def test_what_torch_unpickles_of_our_metadata_is_what_it_would_write(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

    content = made_checkpoints.content(tmp_path / "made", LLAMA)
    folder = made_checkpoints.write(content, "torch_dist", tmp_path / "td")
    found = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301 - written above
    assert isinstance(found, Metadata)
    index, info = next(iter(found.storage_data.items()))
    assert isinstance(index, MetadataIndex) and isinstance(info, _StorageInfo)
    about = found.state_dict_metadata[index.fqn]
    assert isinstance(about, TensorStorageMetadata) and index.index is not None
    assert about.chunks[index.index].offsets == index.offset
    import torch

    assert about.properties == type(about.properties).create_from_tensor(torch.empty(1, dtype=torch.bfloat16))


def test_checksums_are_those_of_the_bytes_they_name(tmp_path: Path) -> None:
    content = made_checkpoints.content(tmp_path / "made", LLAMA)
    again = convert(content, tmp_path)
    total = 0
    for file, sums in again.crc32.items():
        data = (again.path / file).read_bytes()
        for start, length, crc in sums:
            assert zlib.crc32(data[start : start + length]) == crc
            total += length
    values = sum(a.nbytes for atom in again.atoms.values() for s in (atom.states, atom.pad) for a in s.values())
    assert total == values


# Other spellings


Stored = dict[str, np.ndarray[Any, Any]]


def save(folder: Path, content: Content, tensors: Stored, cut: Callable[[Any], Any], **common: Any) -> Path:
    """A checkpoint of whole tensors by stored name, cut into chunks, as Megatron would save it."""
    import torch

    folder.mkdir(parents=True)
    chunks = []
    for key, values in tensors.items():
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        if values.dtype == np.uint16:
            tensor = tensor.view(torch.bfloat16)
        for offset, part in cut(tensor):
            chunks.append(Chunk(key, tuple(tensor.shape), offset, tuple(part.shape), part))
    records, _ = torch_dist.write_records(folder, "__0_0.distcp", chunks, {"x._extra_state/shard_0_1": None})
    args = megatron_args.to_args(
        content.model, layout=Layout(), padded_vocab_size=content.padded_vocab_size or 0, dtype="bfloat16", iteration=7
    )
    optimizer = {"optimizer": {"param_groups": [{"lr": 1e-3, "step": 7, "params": [0]}]}}
    torch_dist.finish(
        folder,
        records,
        {"args": Namespace(**args), "iteration": 7, "checkpoint_version": 3.0, "optimizer": optimizer, **common},
    )
    return folder


def in_blocks(seed: int) -> Callable[[Any], Any]:
    """Cuts a tensor along every axis at any place."""
    chance = np.random.default_rng(seed)

    def cut(tensor: Any) -> Any:
        edges = []
        for length in tensor.shape:
            inner = sorted(set(chance.integers(1, length, size=2).tolist())) if length > 1 else []
            edges.append([0, *inner, length])
        for corner in np.ndindex(*(len(e) - 1 for e in edges)):
            low = tuple(e[i] for e, i in zip(edges, corner, strict=True))
            high = tuple(e[i + 1] for e, i in zip(edges, corner, strict=True))
            yield low, tensor[tuple(slice(a, b) for a, b in zip(low, high, strict=True))].contiguous()

    return cut


def canonical(content: Content) -> Stored:
    """All tensors with one key a layer and an expert."""
    made: Stored = {}
    for key in mapping.megatron_tensors(content.model, content.padded_vocab_size):
        made[key] = fused(content, key, MODEL, "bfloat16")
        for state, name in NAMES.items():
            made[f"optimizer.state.{name}.{key}"] = fused(content, key, state)
    return made


def stacked(tensors: Stored) -> Stored:
    """The same with layers, then experts, on leading axes."""
    for pattern in (r"(.*experts\.experts\.)(\d+)\.(.*)", r"(.*decoder\.layers\.)(\d+)\.(.*)"):
        groups: dict[str, list[np.ndarray[Any, Any]]] = {}
        for key, values in tensors.items():
            match = re.fullmatch(pattern, key)
            groups.setdefault(f"{match[1]}{match[3]}" if match else key, []).append(values)
        inner = {k: np.stack(v) if re.search(pattern, "") or len(v) > 1 else v[0] for k, v in groups.items()}
        tensors = inner
    return tensors


def halves(tensors: Stored) -> Stored:
    """Gate and up apart (`singleton_local_shards`)."""
    made: Stored = {}
    for key, values in tensors.items():
        if "linear_fc1.weight" in key:
            for name, half in zip("wv", np.split(values, 2, axis=0), strict=True):
                made[f"{key}_{name}"] = half
        else:
            made[key] = values
    return made


def te_norms(tensors: Stored) -> Stored:
    return {k.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."): v for k, v in tensors.items()}


def local_norms(tensors: Stored) -> Stored:
    return {
        k.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm."): v for k, v in te_norms(tensors).items()
    }


def chained(tensors: Stored) -> Stored:
    return {(f"chained_{int('experts' in k)}.{k}" if k.startswith("optimizer.") else k): v for k, v in tensors.items()}


def ordinary(tensors: Stored) -> Stored:
    return {k.replace("optimizer.state.param.", "optimizer.state.fp32_param."): v for k, v in tensors.items()}


@pytest.mark.parametrize("model", [LLAMA, MOE, dataclasses.replace(LLAMA, tie_embeddings=True)])
@pytest.mark.parametrize(
    "spell",
    [
        stacked,
        lambda t: t,
        halves,
        lambda t: stacked(te_norms(t)),
        local_norms,
        lambda t: chained(stacked(t)),
        lambda t: ordinary(halves(te_norms(t))),
    ],
    ids=["stacked", "a key a layer", "gate and up apart", "te norms", "local norms", "chained", "ordinary, apart"],
)
def test_every_spelling_in_any_blocks_is_read(model: ModelConfig, spell: Any, tmp_path: Path) -> None:
    content = made_checkpoints.content(tmp_path / "made", model)
    folder = save(tmp_path / "td", content, spell(canonical(content)), in_blocks(1))
    assert_same(content, TorchDist.open(folder, Reading()))


def flat_pieces(folder: Path, content: Content, tensors: Stored, tp: int, seed: int) -> Path:
    """Old form: optimizer state of each tensor rank's block flattened and cut anywhere, on an axis of its own."""
    import torch

    chance = np.random.default_rng(seed)
    plain = {k: v for k, v in tensors.items() if not k.startswith("optimizer.")}
    save(folder, content, plain, in_blocks(seed), content_metadata=None)
    source = Folder(folder)
    records = [r for t in source.tensors.values() for r in t.chunks]
    chunks, originals = [], {}
    expected = mapping.megatron_tensors(content.model, content.padded_vocab_size)
    for key, values in tensors.items():
        if key in plain:
            continue
        name = key.split(".", 3)[3]
        whole = expected[name if name in expected else name.replace("layers.", "layers.0.", 1)]
        lead = values.ndim - len(whole.tensor.shape)
        counts = [1] * values.ndim
        counts[:lead] = values.shape[:lead]
        how = whole.tp
        axis = {"rows": lead, "halves": lead, "columns": lead + 1}.get(how)
        if axis is not None:
            counts[axis] = tp * (2 if how == "halves" else 1)
        block = [n // c for n, c in zip(values.shape, counts, strict=True)]
        numel = math.prod(block)
        originals[key] = {"nd_reformulated_orig_global_shape": values.shape}
        for corner in np.ndindex(*counts):
            inside = values[tuple(slice(i * b, (i + 1) * b) for i, b in zip(corner, block, strict=True))].reshape(-1)
            edges = [0, *sorted(set(chance.integers(1, numel, size=3).tolist())), numel]
            for low, high in itertools.pairwise(edges):
                part = torch.from_numpy(inside[low:high].copy())
                chunks.append(Chunk(key, (*counts, numel), (*corner, low), (*[1] * len(counts), high - low), part))
    more, _ = torch_dist.write_records(folder, "__1_0.distcp", chunks, {})
    value = pickle.loads(torch_dist.metadata(records + more))  # noqa: S301 - written above
    value.mcore_data = originals
    (folder / ".metadata").write_bytes(pickle.dumps(value))
    return folder


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("model", [LLAMA, dataclasses.replace(MOE, num_layers=2)])
def test_flattened_state_of_old_versions_is_read(model: ModelConfig, tp: int, tmp_path: Path) -> None:
    content = made_checkpoints.content(tmp_path / "made", model)
    tensors = {k: v for k, v in canonical(content).items()}
    if not model.num_experts:
        tensors = stacked(tensors)
    folder = flat_pieces(tmp_path / "old", content, ordinary(tensors), tp, seed=tp)
    assert any(len(t.shape) == 4 for t in Folder(folder).tensors.values()) or model.num_experts
    again = TorchDist.open(folder, Reading())
    assert_same(content, again)
    assert again.optimizer is not None and again.optimizer.form == "fully_sharded_model_space"


# Bad input


def edited(folder: Path, edit: Callable[[Any], None]) -> Path:
    """A folder whose `.metadata` was changed."""
    value = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301 - written by the test
    edit(value)
    (folder / ".metadata").write_bytes(pickle.dumps(value))
    (folder / "manifest.json").unlink(missing_ok=True)
    return folder


KEY = "decoder.layers.mlp.linear_fc2.weight"


def drop_chunk(value: Any) -> None:
    value.state_dict_metadata[KEY].chunks.pop()


def repeat_chunk(value: Any) -> None:
    chunks = value.state_dict_metadata[KEY].chunks
    chunks[-1] = chunks[0]


def move_chunk(value: Any) -> None:
    """A chunk that begins one row early: what is before it is there twice, its own last row not at all."""
    import torch

    about = value.state_dict_metadata[KEY]
    index, info = next((i, s) for i, s in value.storage_data.items() if i.fqn == KEY and i.offset[1] > 0)
    del value.storage_data[index]
    moved = torch.Size((index.offset[0], index.offset[1] - 1, index.offset[2]))
    value.storage_data[dataclasses.replace(index, offset=moved)] = info
    for i, chunk in enumerate(about.chunks):
        if chunk.offsets == index.offset:
            about.chunks[i] = dataclasses.replace(chunk, offsets=moved)


def lose_record(value: Any) -> None:
    index = next(i for i in value.storage_data if i.fqn == KEY)
    del value.storage_data[index]


def lose_tensor(value: Any) -> None:
    del value.state_dict_metadata[KEY]


def lose_moment(value: Any) -> None:
    del value.state_dict_metadata[f"optimizer.state.exp_avg.{KEY}"]


def rename(value: Any) -> None:
    value.state_dict_metadata["decoder.layers.mlp.linear_fc9.weight"] = value.state_dict_metadata.pop(KEY)
    for index in [i for i in value.storage_data if i.fqn == KEY]:
        info = value.storage_data.pop(index)
        value.storage_data[dataclasses.replace(index, fqn="decoder.layers.mlp.linear_fc9.weight")] = info


def another_dtype(value: Any) -> None:
    import torch

    about = value.state_dict_metadata[KEY]
    about.properties = dataclasses.replace(about.properties, dtype=torch.float16)


def lead_outside(value: Any) -> None:
    index = next(i for i in value.storage_data if i.fqn == KEY)
    value.storage_data[index] = dataclasses.replace(value.storage_data[index], relative_path="../x.distcp")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (drop_chunk, r"linear_fc2\.weight.* values are there"),
        (repeat_chunk, r"linear_fc2\.weight.* there"),
        (move_chunk, r"linear_fc2\.weight.* there twice"),
        (lose_record, r"does not say where `decoder\.layers\.mlp\.linear_fc2\.weight` at \[\d"),
        (lose_tensor, r"has no tensor `decoder\.layers\.0\.mlp\.linear_fc2\.weight` \(nearest known: `decoder"),
        (lose_moment, r"has no tensor `optimizer\.state\.exp_avg\.decoder\.layers\.0\.mlp\.linear_fc2"),
        (rename, r"`decoder\.layers\.mlp\.linear_fc9\.weight` is no tensor of a `llama` model.*linear_fc1|2\.weight"),
        (another_dtype, r"linear_fc2\.weight` has .* bytes of bfloat16, wanted are .* of float16"),
        (lead_outside, r"lies outside the checkpoint"),
    ],
)
def test_chunks_that_are_missing_double_or_wrong_are_refused_by_name(edit: Any, words: str, tmp_path: Path) -> None:
    content = made_checkpoints.content(tmp_path / "made", LLAMA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing_module, "CHUNK", 200)
        folder = made_checkpoints.write(content, "torch_dist", tmp_path / "td")
    edited(folder, lambda value: None)
    assert_same(content, TorchDist.open(folder, Reading()))
    edited(folder, edit)
    with pytest.raises(UsageError, match=words) as raised:
        TorchDist.open(folder, Reading())
    assert "\n" not in raised.value.message and str(folder) in raised.value.message


def test_two_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    content = made_checkpoints.content(tmp_path / "made", MOE)
    tensors = stacked(canonical(content))
    norm = "decoder.layers.mlp.linear_fc1.layer_norm_weight"
    tensors["decoder.layers.pre_mlp_layernorm.weight"] = tensors[norm]
    folder = save(tmp_path / "td", content, tensors, in_blocks(0))
    with pytest.raises(UsageError, match=f"twice: as `{norm}` and as `decoder.layers.pre_mlp_layernorm.weight`"):
        TorchDist.open(folder, Reading())


def test_folders_that_are_not_whole_say_which(tmp_path: Path) -> None:
    content = made_checkpoints.content(tmp_path / "made", LLAMA)

    def fresh(name: str) -> Path:
        folder = made_checkpoints.write(content, "torch_dist", tmp_path / name)
        (folder / "manifest.json").unlink()
        assert TorchDist.recognise(folder)
        return folder

    folder = fresh("unfinished")
    (folder / "metadata.json").unlink()
    assert TorchDist.recognise(folder)
    with pytest.raises(UsageError, match=r"is an unfinished save \(no `metadata.json`"):
        TorchDist.open(folder, Reading())

    folder = fresh("common")
    (folder / "common.pt").unlink()
    with pytest.raises(UsageError, match=r"common\.pt` is missing: the save never finished"):
        TorchDist.open(folder, Reading())

    folder = fresh("zarr")
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(UsageError, match="`sharded_backend: zarr`, only `torch_dist` is read"):
        TorchDist.open(folder, Reading())

    folder = fresh("cut")
    data = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(data[: len(data) // 2])
    with pytest.raises(UsageError, match=r"__0_0.distcp` has [\d,]+ bytes, `.+` needs [\d,]+: the file was cut off"):
        TorchDist.open(folder, Reading())

    folder = fresh("lost")
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(UsageError, match=r"__0_0.distcp` is missing"):
        TorchDist.open(folder, Reading())

    whole = made_checkpoints.write(content, "torch_dist", tmp_path / "ours")
    (whole / "common.pt").write_bytes(b"")
    with pytest.raises(UsageError, match=r"is not whole: `common\.pt` has 0 bytes"):
        TorchDist.open(whole, Reading())


def test_a_plain_torch_checkpoint_is_told_apart_from_an_unfinished_one(tmp_path: Path) -> None:
    import torch
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint import save as save_plainly

    save_plainly({"layer.w": torch.zeros(3)}, storage_writer=FileSystemWriter(tmp_path / "x"), no_dist=True)
    assert TorchDist.recognise(tmp_path / "x") and not TorchDist.recognise(tmp_path)
    with pytest.raises(UsageError, match="was saved by plain torch, not by Megatron"):
        TorchDist.open(tmp_path / "x", Reading())


def test_arguments_that_contradict_the_tensors_are_refused(tmp_path: Path) -> None:
    content = made_checkpoints.content(tmp_path / "made", LLAMA)
    tensors = stacked(canonical(content))
    other = dataclasses.replace(content, model=dataclasses.replace(LLAMA, ffn_hidden_size=24))
    folder = save(tmp_path / "td", other, tensors, in_blocks(0))
    with pytest.raises(UsageError, match=r"has shape \[3, 44, 16\], the model wants \[3, 48, 16\]") as raised:
        TorchDist.open(folder, Reading())
    assert "linear_fc1" in raised.value.message
    fewer = dataclasses.replace(content, model=dataclasses.replace(LLAMA, num_layers=2))
    with pytest.raises(UsageError, match=r"has shape \[3, 16\]|\[3, "):
        TorchDist.open(save(tmp_path / "fewer", fewer, tensors, in_blocks(0)), Reading())
    larger = dataclasses.replace(content, model=dataclasses.replace(LLAMA, vocab_size=50), padded_vocab_size=52)
    with pytest.raises(UsageError, match=r"word_embeddings.weight` has 48 rows, the vocabulary has 50"):
        TorchDist.open(save(tmp_path / "larger", larger, tensors, in_blocks(0)), Reading())


def test_what_cannot_be_kept_is_named(tmp_path: Path) -> None:
    content = made_checkpoints.content(tmp_path / "made", LLAMA)
    tensors = stacked(canonical(content)) | {
        "cpt.rng.rank_00000": np.zeros(5, np.uint8),
        "rng_state": np.zeros(3, np.uint8),
    }
    kept = {"opt_param_scheduler": {"num_steps": 12, "max_lr": 0.5}, "num_floating_point_operations_so_far": 10**20}
    folder = save(tmp_path / "td", content, tensors, in_blocks(0), **kept, something=Files())
    again = TorchDist.open(folder, Reading())
    assert again.common == kept
    assert any("random states of 2 ranks" in line for line in again.left_out)
    assert any("`something` of `common.pt`" in line for line in again.left_out)
    third = convert(again, tmp_path / "again")
    assert third.common == kept and third.left_out == ()
    assert not TorchDist.open(folder, Reading(optimizer=False)).has_optimizer


def test_a_vocabulary_of_unknown_size_stays_unknown_until_it_is_said(tmp_path: Path) -> None:
    content = made_checkpoints.content(tmp_path / "made", LLAMA, padded=48)
    folder = made_checkpoints.write(content, "torch_dist", tmp_path / "td")
    opened = TorchDist.open(folder, Reading())
    assert opened.args is not None and opened.args["vocab_size"] == 45
    silent = dataclasses.replace(
        opened,
        args={**opened.args, "vocab_size": None},
        model=dataclasses.replace(LLAMA, vocab_size=48),
        atoms=made_checkpoints.content(tmp_path / "more", dataclasses.replace(LLAMA, vocab_size=48), padded=None).atoms,
    )
    again = convert(silent, tmp_path / "again")
    assert again.args is not None and again.args["vocab_size"] is None
    assert not megatron_args.knows_vocab_size(again.args, again.model)
    (again.path / "manifest.json").unlink()
    assert TorchDist.open(again.path, Reading()).model.vocab_size == 48
    told = TorchDist.open(again.path, Reading(vocab_size=45))
    assert told.model.vocab_size == 45 and told.atoms["lm_head.weight"].pad_rows == 3


def test_an_optimizer_that_is_not_there_cannot_be_written(tmp_path: Path) -> None:
    content = made_checkpoints.content(tmp_path / "made", LLAMA, optimizer=False)
    with pytest.raises(UsageError, match="holds no optimizer state"):
        TorchDist.plan(content, Writing(optimizer="fully_reshardable"))
    whole = made_checkpoints.content(tmp_path / "whole", LLAMA)
    output = TorchDist.plan(whole, Writing(optimizer="none"))
    assert output.dropped == ("the optimizer's state, as asked",)
    atoms = dict(whole.atoms)
    states = {k: v for k, v in atoms["model.norm.weight"].states.items() if k != "exp_avg_sq"}
    atoms["model.norm.weight"] = dataclasses.replace(atoms["model.norm.weight"], states=states)
    with pytest.raises(UsageError, match=r"no `exp_avg_sq` of `model\.norm\.weight`"):
        TorchDist.plan(dataclasses.replace(whole, atoms=atoms), Writing())


def test_parallel_residual_is_refused_for_megatrons_own_layers_and_written_for_ours(tmp_path: Path) -> None:
    model = dataclasses.replace(MODELS["gpt_neox"], parallel_residual=True)
    content = made_checkpoints.content(tmp_path / "made", model, padded=None, optimizer=False)
    with pytest.raises(UsageError, match="use_parallel_residual"):
        TorchDist.plan(content, Writing())
    assert convert(content, tmp_path / "td", Writing(spec="cpt")).model == model


# Files


def large(layers: int, hidden: int, vocabulary: int) -> Content:
    """A content of which no value exists."""
    model = dataclasses.replace(
        LLAMA, num_layers=layers, hidden_size=hidden, ffn_hidden_size=3 * hidden, head_dim=hidden // 4,
        vocab_size=vocabulary,
    )  # fmt: skip
    atoms = {}
    for name, shape in mapping.atom_shapes(model).items():
        rows, columns = as_matrix(shape)
        states = {
            s: Array(d, shape, (Place("none", 0, columns, 0, rows, 0, columns),))
            for s, d in ((MODEL, "bfloat16"), *((s, "float32") for s in OPTIMIZER))
        }
        atoms[name] = Atom(name=name, shape=shape, dtype="bfloat16", states=states)
    return Content(format="made", path=Path("none"), model=model, atoms=atoms, optimizer=Optimizer(step=1), iteration=1)


@pytest.mark.parametrize("content", [large(2, 1024, 1000), large(16, 4096, 100_000), large(1, 8192, 300_000)])
def test_files_are_few_and_enough_and_chunks_are_small(content: Content) -> None:
    output = TorchDist.plan(content, Writing())
    assert output.nbytes > 2e8
    assert 4 <= len(output.files) <= output.nbytes / (2 << 30) + 5
    sizes = [f.nbytes for f in output.files]
    assert max(sizes) <= (2 << 30) + (65 << 20)
    assert min(sizes[:-1]) > 0.8 * max(sizes), "workers share them evenly"
    assert max(p.nbytes for f in output.files for p in f.payloads) <= 64 << 20
    assert [f.name for f in output.files] == [f"__{i}_0.distcp" for i in range(len(output.files))]
    assert output.step_folder == "iter_0000001" and output.manifest == "manifest.json"


def test_a_small_model_is_one_file_and_the_last_small_file_is_the_manifest(tmp_path: Path) -> None:
    content = made_checkpoints.content(tmp_path / "made", LLAMA)
    output = TorchDist.plan(content, Writing())
    assert len(output.files) == 1
    from cpt.checkpoint.writing import FileSums

    small = output.finish({"__0_0.distcp": FileSums(size=1, crc32=2, payloads=())})
    assert list(small) == [".metadata", "common.pt", "metadata.json", "manifest.json"]
    manifest = json.loads(small["manifest.json"])
    assert set(manifest["files"]) == {"__0_0.distcp", ".metadata", "common.pt", "metadata.json"}
    assert manifest["optimizer"]["step"] == 7 and manifest["layout"]["tp"] == 1 and manifest["precision"] == "bf16"
    assert small == TorchDist.plan(content, Writing()).finish({"__0_0.distcp": FileSums(size=1, crc32=2, payloads=())})


@pytest.mark.parametrize(
    ("said", "layers"),
    [
        ({}, None),
        ({"decoder_first_pipeline_num_layers": 1}, (1, 3)),
        ({"decoder_last_pipeline_num_layers": 1}, (3, 1)),
        ({"pipeline_model_parallel_layout": "Et*3|tL"}, (3, 1)),
        ({"pipeline_model_parallel_layout": "Et|(t|)*2tL", "virtual_pipeline_model_parallel_size": 2}, (1, 1, 1, 1)),
        ({"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}, (2, 2)),
    ],
)
def test_arguments_say_how_the_pipeline_was_divided(said: dict[str, Any], layers: Any) -> None:
    model = dataclasses.replace(LLAMA, num_layers=4)
    args = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "data_parallel_size": 3, **said}
    vp = said.get("virtual_pipeline_model_parallel_size", 1)
    assert megatron_args.to_layout(args, model, "x") == Layout(tp=2, pp=2, dp=3, vp=vp, layers=layers)
    wrong = args | {"pipeline_model_parallel_layout": "Et|tL"}
    with pytest.raises(UsageError, match="arguments of `x`: the pipeline layout"):
        megatron_args.to_layout(wrong, model, "x")


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(tp=2, pp=2, vp=2, dp=3), Layout(pp=2, layers=(1, 3)), Layout(pp=2, vp=2, layers=(2, 1, 1, 0))],
)
def test_a_layout_written_into_arguments_is_read_again(layout: Layout) -> None:
    model = dataclasses.replace(LLAMA, num_layers=4)
    args = megatron_args.to_args(model, layout=layout, padded_vocab_size=48, dtype="bfloat16")
    assert megatron_args.to_layout(args, model, "x") == layout
