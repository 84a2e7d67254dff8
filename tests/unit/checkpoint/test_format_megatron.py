"""Megatron's own folders: goldens, every layout there and back, what other readers make of them, and bad input."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpt.checkpoint import find, mapping
from cpt.checkpoint.arrays import CARRIERS, Files, as_matrix
from cpt.checkpoint.content import Content, Layout
from cpt.checkpoint.formats import Reading, Writing
from cpt.plan.types import ModelConfig
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
    "tp over groups": (LLAMA, Layout(tp=2, pp=3)),
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
