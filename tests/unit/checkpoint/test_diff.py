"""Two checkpoints side by side: whatever was changed is found, and nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cpt.checkpoint.formats.hf as hf
from cpt.checkpoint import hf_config
from cpt.checkpoint.arrays import Array, Files, itemsize
from cpt.checkpoint.content import Content, Optimizer
from cpt.checkpoint.diff import Difference, diff
from cpt.checkpoint.formats import Reading
from tests.made_checkpoints import LLAMA, content, write


def compared(a: Content, b: Content, **options: Any) -> Difference:
    return diff(a, b, Files(), **options)


def flip(array: Array, row: int, column: int, bit: int) -> None:
    """Change one bit of a value on disk."""
    (place,) = array.places
    size = itemsize(array.dtype)
    with open(place.file, "r+b") as file:
        file.seek(place.start + row * place.stride + column * size + bit // 8)
        byte = file.read(1)[0] ^ (1 << bit % 8)
        file.seek(-1, 1)
        file.write(bytes([byte]))


def test_equal_checkpoints_in_two_places_have_no_difference(tmp_path: Path) -> None:
    found = compared(content(tmp_path / "a"), content(tmp_path / "b"))
    assert found.is_equal and found.compared == 4 * (3 * 9 + 3) + 4 * 2


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_one_flipped_bit_is_found_at_its_index(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    folder = tmp_path_factory.mktemp("bit")
    random = np.random.default_rng(seed)
    a, b = content(folder / "a"), content(folder / "b")
    name = str(random.choice(list(b.atoms)))
    state = str(random.choice(["model", "fp32", "exp_avg", "exp_avg_sq"]))
    array = b.atoms[name].states[state]
    index = tuple(int(random.integers(n)) for n in array.shape)
    flip(array, index[0], index[1] if len(index) > 1 else 0, int(random.integers(8 * itemsize(array.dtype))))
    (found,) = compared(a, b).tensors
    assert (found.tensor, found.state, found.first, found.count) == (name, state, index, 1)
    assert found.largest > 0 and found.values[0] != found.values[1] and f"{list(index)}" in str(found)
    (back,) = compared(b, a).tensors
    assert back.values == found.values[::-1] and back.largest == found.largest
    assert compared(a, b, weights=True).is_equal == (state != "model")


def test_the_first_index_and_largest_difference_are_of_all_differing_values(tmp_path: Path) -> None:
    a, b = content(tmp_path / "a", dtype="float32"), content(tmp_path / "b", dtype="float32")
    name = "model.layers.1.mlp.down_proj.weight"
    for row, column, bit in ((9, 21, 22), (3, 20, 0), (3, 4, 1)):
        flip(b.atoms[name].states["model"], row, column, bit)
    (found,) = compared(a, b).tensors
    assert found.first == (3, 4) and found.count == 3 and found.numel == 16 * 22
    assert 0.1 < found.largest < 3  # the top bit of a mantissa


def test_signs_of_zero_and_nan_payloads_are_bits_too(tmp_path: Path) -> None:
    a, b = content(tmp_path / "a"), content(tmp_path / "b")
    array = a.atoms["model.norm.weight"].states["exp_avg"]
    for source, values in ((a, [0.0, np.nan, np.nan]), (b, [-0.0, -np.nan, 1.0])):
        (place,) = source.atoms["model.norm.weight"].states["exp_avg"].places
        with open(place.file, "r+b") as file:
            file.seek(place.start)
            file.write(np.array(values, np.float32).tobytes())
    (found,) = compared(a, b).tensors
    assert found.count == 3 and found.first == (0,) and found.largest == np.inf
    assert found.values == ("0 (0x00000000)", "-0 (0x80000000)") and array.shape == (16,)


def test_what_only_one_has_is_said(tmp_path: Path) -> None:
    a, b = content(tmp_path / "a", optimizer=False, padded=None), content(tmp_path / "b")
    found = compared(a, b)
    # Other values: without optimizer state other numbers are drawn.
    said = [what for side, what in found.only if side == 1]
    assert not [what for side, what in found.only if side == 0]
    assert any(w.startswith("exp_avg_sq of `model.embed_tokens.weight` and 29 more") for w in said)
    assert any(w.startswith("model of padding rows of `model.embed_tokens.weight` and 1 more") for w in said)
    assert not compared(a, b, weights=True).only
    fewer = dataclasses.replace(b, atoms={k: v for k, v in b.atoms.items() if k != "lm_head.weight"})
    assert (1, "tensor `lm_head.weight`") in compared(fewer, b, weights=True).only


def test_fields_beside_the_tensors_are_compared(tmp_path: Path) -> None:
    a = content(tmp_path / "a")
    assert a.optimizer is not None
    groups = ({**a.optimizer.groups[0], "lr": 2e-3}, a.optimizer.groups[1])
    b = dataclasses.replace(
        a,
        iteration=8,
        optimizer=Optimizer(step=9, groups=groups),
        model=dataclasses.replace(LLAMA, rope_theta=5e5),
        common={"seen": 5},
        objects={"cpt.plan": {"id": "x"}},
    )
    found = compared(a, b)
    assert found.fields == (
        ("model `rope_theta`", 10000.0, 5e5),
        ("`iteration`", 7, 8),
        ("optimizer `step`", 7, 9),
        ("parameter group 0: `lr`", 1e-3, 2e-3),
    )
    assert found.only == ((1, "`seen`"), (1, "object `cpt.plan`")) and not found.tensors


def test_other_shapes_are_no_crash(tmp_path: Path) -> None:
    a = content(tmp_path / "a")
    b = content(tmp_path / "b", dataclasses.replace(LLAMA, ffn_hidden_size=26))
    found = compared(a, b)
    shapes = [d for d in found.tensors if d.first is None]
    assert len(shapes) == 3 * 3 * 4 and "shape [22, 16] and shape [26, 16]" in str(shapes[0])


def test_another_dtype_is_a_difference_with_the_numbers_compared(tmp_path: Path) -> None:
    a = content(tmp_path / "a")
    atoms = {k: dataclasses.replace(v, dtype="float32") for k, v in a.atoms.items()}
    b = dataclasses.replace(a, atoms=atoms)
    found = compared(a, b, weights=True).tensors
    assert len(found) == 30 and {d.dtypes for d in found} == {("bfloat16", "float32")}
    assert not any(d.count for d in found) and "the same values" in str(found[0])


def test_a_weight_kept_as_its_main_weight_alone_is_the_same_weight(tmp_path: Path) -> None:
    a = content(tmp_path / "a")
    atoms = {
        k: dataclasses.replace(
            v,
            states={s: x for s, x in v.states.items() if s != "model"},
            pad={s: x for s, x in v.pad.items() if s != "model"},
        )
        for k, v in a.atoms.items()
    }
    assert compared(a, dataclasses.replace(a, atoms=atoms)).is_equal


def test_hugging_face_folders_in_one_and_in_many_files_are_equal(tmp_path: Path) -> None:
    from cpt.checkpoint.formats import Writing

    made = content(tmp_path / "made", padded=None, optimizer=False)
    one = write(made, "hf", tmp_path / "one")
    many = write(made, "hf", tmp_path / "many", Writing(file_bytes=3000))
    assert len(list(many.glob("*.safetensors"))) > 5
    a, b = (hf.HuggingFace.open(folder, Reading()) for folder in (one, many))
    assert compared(a, b).is_equal
    assert not compared(a, made, weights=True).tensors


def test_another_sliding_window_is_a_difference(tmp_path: Path) -> None:
    a = content(tmp_path / "a")
    config = hf_config.config_for(dataclasses.replace(a.model, family="mistral"))
    sides = [
        dataclasses.replace(a, model=dataclasses.replace(a.model, hf_config=config | {"sliding_window": window}))
        for window in (16, None)
    ]
    assert compared(*sides).fields == (("model `sliding_window`", 16, "none"),)
    assert compared(sides[0], sides[0]).is_equal
