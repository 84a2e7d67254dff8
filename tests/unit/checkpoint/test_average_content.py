"""Averages of checkpoints of any formats: values against numpy in fp64, whatever format is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpt.base.errors import UsageError
from cpt.checkpoint import average, find
from cpt.checkpoint.arrays import CARRIERS, Files, as_matrix, convert
from cpt.checkpoint.content import Content
from cpt.checkpoint.formats import Reading, Writing
from cpt.checkpoint.job import averaging, planning
from cpt.checkpoint.job import convert as conversion
from cpt.checkpoint.job.planning import Plan
from cpt.checkpoint.job.record import dropped
from tests.made_checkpoints import LLAMA, content, write

SHARES = (0.5, 0.3, 0.2)


def values(source: Content, name: str, state: str, dtype: str = "float64", pad: bool = False) -> np.ndarray[Any, Any]:
    array = source.array(name, state, pad)
    out = np.empty(as_matrix(array.shape), CARRIERS[dtype])
    Files().read(array, 0, 0, out, dtype)
    return out


def opened(folder: Path) -> Content:
    name = find.recognise(folder)
    assert name is not None
    return find.known()[name].open(folder, Reading())


def expected(members: list[Content], name: str, state: str, dtype: str, pad: bool = False) -> np.ndarray[Any, Any]:
    """In fp64, summed from the smallest weight on, rounded to fp32 and then to the dtype."""
    total = np.zeros(1)
    for weight, member in sorted(zip(SHARES, members, strict=True), key=lambda p: p[0]):
        total = total + weight * values(member, name, state, pad=pad)
    return convert(convert(total, "float64", "float32"), "float32", dtype)


@pytest.mark.parametrize("to", ["hf", "atom", "torch_dist"])
def test_unrounded_weights_are_averaged_and_rounded_once(tmp_path: Path, to: str) -> None:
    members = [content(tmp_path / f"{i}", seed=i) for i in range(3)]
    mean = average.content(list(zip(members, SHARES, strict=True)), Files())
    assert mean.optimizer is None and len(mean.left_out) == 3 and mean.padded_vocab_size == 48
    made = opened(write(mean, to, tmp_path / "out"))
    for name, atom in made.atoms.items():
        assert atom.dtype == "bfloat16" and set(atom.states) == {"model"}
        assert np.array_equal(values(made, name, "model", "bfloat16"), expected(members, name, "fp32", "bfloat16")), (
            name
        )
    if to != "hf":
        pad = values(made, "lm_head.weight", "model", "bfloat16", pad=True)
        assert np.array_equal(pad, expected(members, "lm_head.weight", "fp32", "bfloat16", pad=True))


def test_members_of_different_formats_are_averaged(tmp_path: Path) -> None:
    made = [content(tmp_path / f"{i}", seed=i, dtype="float32", optimizer=i > 0) for i in range(3)]
    members = [opened(write(c, f, tmp_path / f)) for c, f in zip(made, ("hf", "atom", "torch_dist"), strict=True)]
    assert len({c.format for c in members}) == 3
    mean = average.content(list(zip(members, SHARES, strict=True)), Files())
    out = opened(write(mean, "hf", tmp_path / "out"))
    for name in out.atoms:
        assert np.array_equal(values(out, name, "model", "float32"), expected(made, name, "model", "float32")), name


def test_blocks_change_nothing(tmp_path: Path) -> None:
    from cpt.checkpoint.writing import write_file

    members = [content(tmp_path / f"{i}", seed=i) for i in range(2)]
    mean = average.content([(members[0], 1.0), (members[1], 2.0)], Files())
    for block in (64, 1 << 20):
        (out,) = find.writable()["hf"].plan(mean, Writing()).files
        write_file(out, mean, tmp_path / f"b{block}", Files(), block=block)
    a, b = ((tmp_path / f"b{block}" / "model.safetensors").read_bytes() for block in (64, 1 << 20))
    assert a == b and len(a) > 10_000


def test_the_order_of_the_members_changes_nothing_and_a_weight_of_zero_leaves_one_out(tmp_path: Path) -> None:
    members = [content(tmp_path / f"{i}", seed=i) for i in range(3)]
    pairs = list(zip(members, SHARES, strict=True))
    name = "model.layers.1.mlp.up_proj.weight"
    first = values(average.content(pairs, Files()), name, "model", "float32")
    assert np.array_equal(values(average.content(pairs[::-1], Files()), name, "model", "float32"), first)
    alone = average.content([(members[0], 0.0), (members[2], 4.0)], Files())
    assert np.array_equal(values(alone, name, "model", "float32"), values(members[2], name, "fp32", "float32"))
    assert alone.path == members[2].path


@pytest.mark.parametrize("weights", [(0.0, 0.0), (1.0, -0.5), (float("nan"), 1.0), (float("inf"), 1.0)])
def test_weights_that_give_no_average_are_refused(tmp_path: Path, weights: tuple[float, float]) -> None:
    members = [content(tmp_path / f"{i}", seed=i) for i in range(2)]
    with pytest.raises(UsageError, match="weight"):
        average.content(list(zip(members, weights, strict=True)), Files())


def test_other_models_are_refused_with_the_field(tmp_path: Path) -> None:
    a = content(tmp_path / "a")
    b = content(tmp_path / "b", dataclasses.replace(LLAMA, ffn_hidden_size=26))
    with pytest.raises(UsageError, match="`ffn_hidden_size` is 22 and 26"):
        average.content([(a, 1.0), (b, 1.0)], Files())


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    members = [content(tmp_path / f"{i}", seed=i) for i in range(2)]
    for c in members:
        (c.path / "tokenizer.json").write_text(f'{{"of": "{c.path.name}"}}')
    with pytest.raises(UsageError, match="different tokenizers"):
        average.content([(c, 1.0) for c in members], Files())


def test_main_weights_that_are_not_the_weights_are_never_averaged(tmp_path: Path) -> None:
    members = [content(tmp_path / f"{i}", seed=i) for i in range(2)]
    (place,) = members[1].atoms["model.norm.weight"].states["fp32"].places
    with open(place.file, "r+b") as file:
        file.seek(place.start)
        file.write(bytes(64))
    with pytest.raises(UsageError, match="main weights are not the model's weights in 1 of"):
        average.content([(c, 1.0) for c in members], Files())


def averaged(tmp_path: Path, out: str, dtype: str | None = None) -> Plan:
    """The plan of an average of two Hugging Face folders `0` and `1`, which are made where they are not there."""
    folders = [tmp_path / "0", tmp_path / "1"]
    for i, folder in enumerate(folders):
        if not folder.exists():
            made = content(tmp_path / f"made{i}", seed=i, dtype="float32", padded=None, optimizer=False)
            write(made, "hf", folder)
    return averaging.plan([(f, 1.0) for f in folders], tmp_path / out, None, Writing(dtype=dtype))


@pytest.mark.parametrize("wrong", [(0,), (1,), (0, 1)])
def test_the_member_that_holds_nan_is_named_and_nothing_is_left(tmp_path: Path, wrong: tuple[int, ...]) -> None:
    averaged(tmp_path, "out")
    for i in wrong:
        with open(tmp_path / f"{i}" / "model.safetensors", "r+b") as file:
            file.seek(-4, 2)
            file.write(np.float32("nan").tobytes())
    with pytest.raises(UsageError) as error:
        conversion.convert(averaged(tmp_path, "out"))
    names = " and ".join(f"`{tmp_path / str(i)}`" for i in wrong)
    verb = "holds" if len(wrong) == 1 else "hold"
    assert error.value.message.startswith(f"{names} {verb} values that are not finite; `lm_head.weight`: 1 value is")
    assert not error.value.hints and not list(tmp_path.glob("out*"))


def test_means_that_another_dtype_changes_are_counted(tmp_path: Path) -> None:
    report = conversion.convert(averaged(tmp_path, "out", dtype="bfloat16"))
    plain = conversion.convert(averaged(tmp_path, "plain"))
    before, after = opened(tmp_path / "plain"), opened(tmp_path / "out")
    changed = sum(int(np.count_nonzero(values(before, n, "model") != values(after, n, "model"))) for n in before.atoms)
    assert report.rounded == changed > 1_000 and plain.rounded == 0


def test_what_is_dropped_is_no_file_of_weights_and_another_average_is_told_apart(tmp_path: Path) -> None:
    plan = averaged(tmp_path, "out")
    assert dropped(plan) == ()
    (tmp_path / "0" / "README.md").write_text("x")
    plan = averaged(tmp_path, "out")
    assert dropped(plan) == ("`README.md`: not of the model or its tokenizer",)
    conversion.convert(plan)
    members = [(tmp_path / "0", 1.0), (tmp_path / "1", 3.0)]
    with pytest.raises(UsageError) as error:
        conversion.convert(averaging.plan(members, tmp_path / "out", None, Writing()))
    assert error.value.hints[0] == "that one is an average of other checkpoints, or with other weights"
    with pytest.raises(UsageError) as error:
        conversion.convert(planning.plan(planning.Request(source=tmp_path / "0", out=tmp_path / "out", to="hf")))
    assert error.value.hints[0] == "that one is an average"
