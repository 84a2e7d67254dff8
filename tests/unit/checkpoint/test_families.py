"""Families as tables: every tensor once, the same bits back from every format, at random layouts."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.checkpoint import hf_config, layouts, mapping
from cpt.checkpoint.content import Layout
from cpt.checkpoint.formats import Reading, Writing
from tests.checkpoints import MODELS, convert, read_safetensors, values, write_hf


@pytest.mark.parametrize("family", MODELS)
def test_megatron_and_hugging_face_tensors_hold_the_same_values(family: str) -> None:
    """Each value of each logical tensor is in exactly one Megatron tensor, and in one of the Hugging Face file."""
    model = MODELS[family]
    wanted = {n: np.ones(shape[0] * int(np.prod(shape[1:]))) for n, shape in mapping.atom_shapes(model).items()}
    for tensors in (
        [fused.tensor for fused in mapping.megatron_tensors(model, 64).values()],
        mapping.hf_tensors(model).values(),
    ):
        seen = {n: np.zeros((shape[0], int(np.prod(shape[1:])))) for n, shape in mapping.atom_shapes(model).items()}
        for tensor in tensors:
            held = np.zeros(tensor.matrix)
            for f in tensor.fills:
                held[f.row : f.row + f.rows, f.column : f.column + f.columns] += 1
                if f.atom is not None and not f.pad:
                    rows, columns = (f.columns, f.rows) if f.transposed else (f.rows, f.columns)
                    seen[f.atom][f.at_row : f.at_row + rows, f.at_column : f.at_column + columns] += 1
            assert (held == 1).all(), tensor.key
        assert all((seen[n].ravel() == wanted[n]).all() for n in wanted)
    assert model.num_parameters == sum(w.size for w in wanted.values())


@st.composite
def models(draw: st.DrawFn) -> Any:
    model = MODELS[draw(st.sampled_from(sorted(MODELS)))]
    changes: dict[str, Any] = {"tie_embeddings": draw(st.booleans()), "vocab_size": draw(st.integers(50, 70))}
    return dataclasses.replace(model, **changes)


@st.composite
def writings(draw: st.DrawFn, has_experts: bool) -> Writing:
    """A layout that every model of `MODELS` with 3 layers, 4 heads and 2 groups (or 4) can be cut into."""
    pp, vp = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (2, 2)]))
    counts = draw(st.permutations([1, 2] if pp * vp == 2 else [1, 1, 1, 0] if pp * vp == 4 else [3] * (pp == 1)))
    layout = Layout(
        tp=draw(st.sampled_from([1, 2, 4])),
        pp=pp,
        vp=vp,
        ep=draw(st.sampled_from([1, 2, 4])) if has_experts else 1,
        layers=tuple(counts) or None,
    )
    return Writing(
        layout=layout,
        spec=draw(st.sampled_from(layouts.SPECS)),
        vocabulary_multiple=draw(st.sampled_from([None, 1, 16, 128])),
    )


@settings(max_examples=40)
@given(st.data())
def test_any_way_there_and_back_gives_the_same_bits(data: st.DataObject) -> None:
    model = data.draw(models())
    writing = data.draw(writings(bool(model.num_experts)))
    to = data.draw(st.sampled_from(["torch_dist", "megatron", "atom"]))
    dtype = data.draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_hf(folder / "hf", model, dtype)
        there = convert(folder / "hf", folder / "there", to, writing=writing)
        # Once more in another layout, so that what one format wrote another has to read.
        second = data.draw(st.sampled_from(["torch_dist", "megatron", "atom"]))
        other = data.draw(writings(bool(model.num_experts)))
        again = convert(there, folder / "again", second, given=to, writing=other)
        back = convert(again, folder / "back", "hf", given=second)
        assert read_safetensors(back) == read_safetensors(folder / "hf")
        made = dataclasses.replace(hf_config.read_config(back), hf_config=None)
        assert made == dataclasses.replace(hf_config.read_config(folder / "hf"), hf_config=None)


@pytest.mark.parametrize("to", ["torch_dist", "megatron", "atom"])
def test_the_original_config_survives_where_the_format_keeps_it(tmp_path: Path, to: str) -> None:
    write_hf(tmp_path / "hf", MODELS["qwen3"], something_new={"kept": True})
    there = convert(tmp_path / "hf", tmp_path / "there", to)
    back = convert(there, tmp_path / "back", "hf", given=to)
    before, after = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "hf", back))
    if to == "megatron":  # has no place for it: `--config` brings it back
        back = convert(
            there, tmp_path / "with", "hf", given=to, reading=Reading(config=tmp_path / "hf" / "config.json")
        )
        after = json.loads((back / "config.json").read_text())
    assert after == before


@pytest.mark.parametrize("family", MODELS)
def test_values_read_out_of_ranks_are_the_models(tmp_path: Path, family: str) -> None:
    """Not only there and back: each logical tensor as `megatron` files hold it is the Hugging Face one."""
    from cpt.checkpoint import find

    made = write_hf(tmp_path / "hf", MODELS[family])
    spec = Writing(layout=Layout(tp=2, pp=3, ep=2 if MODELS[family].num_experts else 1))
    there = convert(tmp_path / "hf", tmp_path / "there", "megatron", writing=spec)
    content = find.known()["megatron"].open(there, Reading())
    transposed = {n for n, t in mapping.hf_tensors(MODELS[family]).items() if t.fills[0].transposed}
    for name in content.atoms:
        expected = made[name].T if name in transposed else made[name]
        assert np.array_equal(values(content, name, "model"), expected), name
