"""What passes by is seen: compared with counting every value of every logical tensor."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.checkpoint import find
from cpt.checkpoint.arrays import CARRIERS, Array, Fill, Payload, Place, Segment, convert, itemsize
from cpt.checkpoint.content import Atom, Content, Layout
from cpt.checkpoint.formats import Writing
from cpt.checkpoint.job.look import Facts, Finding, Look, findings, is_rounded
from cpt.checkpoint.writing import write_file
from tests import made_checkpoints
from tests.made_checkpoints import LLAMA


def content_of(values: dict[str, np.ndarray], dtype: str, folder: Path) -> Content:
    """A content of given tensors in one file."""
    file, atoms, at = folder / "values", {}, 0
    with open(file, "wb") as out:
        for name, array in values.items():
            rows, columns = array.shape
            place = Place(str(file), at, columns * itemsize(dtype), 0, rows, 0, columns)
            out.write(array.tobytes())
            at += array.nbytes
            atoms[name] = Atom(
                name=name, shape=array.shape, dtype=dtype, states={"model": Array(dtype, array.shape, (place,))}
            )
    return Content(format="made", path=folder, model=LLAMA, atoms=atoms)


def look_at(content: Content, payload: Payload, values: np.ndarray, block: int) -> Facts:
    """Pass a payload by in blocks of whole rows."""
    look = Look(content)
    flat, columns = values.reshape(-1), values.shape[1]
    step = max(1, block // columns) * columns
    for at in range(0, len(flat), step):
        look(payload, np.ascontiguousarray(flat[at : at + step]))
    return Facts.from_json(look.facts.to_json())


def as_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    return (
        convert(np.ascontiguousarray(values, "<f4"), "float32", dtype) if dtype != "float32" else values.astype("<f4")
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, -np.nan])
def test_every_kind_of_value_that_is_not_finite_is_found_and_no_other(dtype: str, odd: float, tmp_path: Path) -> None:
    values = np.zeros((7, 300), "<f8")
    values[:] = np.random.default_rng(1).standard_normal(values.shape) * 1e4
    values[0, :4] = (0.0, -0.0, 1e-40, 65504.0)
    values[4, 17] = odd
    with np.errstate(over="ignore"):
        bits = values.copy() if dtype == "float64" else as_bits(values.astype("<f4"), dtype)
    content = content_of({"a": bits}, dtype, tmp_path)
    payload = Payload("k", "model", dtype, (Segment(7, 300, (Fill("a", 0, 7, 0, 300),)),))
    for block in (300, 900, 10_000):
        facts = look_at(content, payload, bits, block)
        found = [f for f in findings(facts, content) if f.kind == "nonfinite"]
        assert found == [Finding(kind="nonfinite", atom="a", state="model", count=1, first=(4, 17))]
        assert found[0].tensor == "a"
    bits[4, 17] = bits[0, 0]
    assert findings(look_at(content, payload, bits, 600), content) == []


@settings(max_examples=60)
@given(data=st.data())
def test_fused_transposed_and_shared_out_tensors_give_what_counting_gives(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two tensors in one matrix, one of them stored transposed, cut by rows over several files."""
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    pool = np.array(data.draw(st.sampled_from([[0.0], [2.5], [0.0, 1.0], [1.0, np.nan], [1e-40, 1.0, -0.0]])), "<f4")
    values = {"a": random.choice(pool, (rows, columns)), "b": random.choice(pool, (columns, rows))}
    content = content_of(values, "float32", tmp_path_factory.mktemp("look"))
    matrix = np.concatenate([values["a"], values["b"].T])
    fills = (Fill("a", 0, rows, 0, columns), Fill("b", rows, rows, 0, columns, transposed=True))
    cut = data.draw(st.integers(1, 2 * rows))
    facts = Facts()
    for first, last in ((0, cut), (cut, 2 * rows)):
        if first < last:
            from cpt.checkpoint.arrays import crop

            part = tuple(crop(fills, first, last - first, 0, columns))
            payload = Payload(f"k{first}", "model", "float32", (Segment(last - first, columns, part),))
            block = data.draw(st.integers(1, 40))
            for _ in range(data.draw(st.integers(1, 2))):  # two ranks may hold copies
                facts.add(look_at(content, payload, matrix[first:last], block))
    found = {(f.kind, f.atom): f for f in findings(facts, content)}
    for name, array in values.items():
        wrong = ~np.isfinite(array)
        assert (("nonfinite", name) in found) == bool(wrong.any())
        if wrong.any():
            one = found["nonfinite", name]
            assert one.count == wrong.sum() and one.first == tuple(int(i) for i in np.argwhere(wrong)[0])
        same = array.size > 1 and len(np.unique(array.view("u4"))) == 1
        zero = same and array.view("u4").flat[0] == 0
        assert (("zero", name) in found) == zero
        assert (("constant", name) in found) == (same and not zero)
        tiny = int(((np.abs(array) < 2**-126) & (array != 0)).sum())
        assert (("subnormal", name) in found) == (tiny > 0.01 * array.size)
        if tiny > 0.01 * array.size:
            assert found["subnormal", name].count == tiny


@pytest.mark.parametrize("share", [0.002, 0.02, 0.5])
@pytest.mark.parametrize("where", ["together", "scattered"])
def test_many_subnormal_values_of_a_large_tensor_are_counted(share: float, where: str, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    values = random.standard_normal((900, 1111)).astype("<f4")
    count = int(share * values.size)
    at = np.arange(count) + 333_333 if where == "together" else random.choice(values.size, count, replace=False)
    values.reshape(-1)[at] = 1e-40
    content = content_of({"a": values}, "float32", tmp_path)
    payload = Payload("k", "model", "float32", (Segment(900, 1111, (Fill("a", 0, 900, 0, 1111),)),))
    found = findings(look_at(content, payload, values, 100_000), content)
    assert [f.kind for f in found] == (["subnormal"] if share > 0.01 else [])
    assert all(f.count == count for f in found if where == "scattered")


def test_whole_numbers_are_not_taken_for_infinite(tmp_path: Path) -> None:
    values = np.full((3, 4), 0x7F800000, CARRIERS["int32"])
    values[1, 1] = 5
    content = content_of({"a": values}, "int32", tmp_path)
    payload = Payload("k", "model", "int32", (Segment(3, 4, (Fill("a", 0, 3, 0, 4),)),))
    assert findings(look_at(content, payload, values, 4), content) == []


@pytest.mark.parametrize("name", ["hf", "atom", "torch_dist", "megatron"])
def test_findings_do_not_depend_on_the_format(name: str, tmp_path: Path) -> None:
    """A constant, a zero and a spoilt tensor are found under the logical names, whatever they are fused with."""
    given = made_checkpoints.content(tmp_path / "made", optimizer=False)
    for atom, value in (("model.layers.1.self_attn.k_proj.weight", 0), ("model.layers.2.mlp.up_proj.weight", 0x4000)):
        place = given.atoms[atom].states["model"].places[0]
        with open(place.file, "rb+") as file:
            file.seek(place.start)
            file.write(np.full(math.prod(given.atoms[atom].shape), value, "<u2").tobytes())
    spoilt = given.atoms["model.layers.0.self_attn.q_proj.weight"]  # [24, 16]
    with open(spoilt.states["model"].places[0].file, "rb+") as file:
        file.seek(spoilt.states["model"].places[0].start + 2 * (16 * 13 + 2))
        file.write(b"\x80\xff")
    layout = Layout(tp=2, pp=3) if name == "megatron" else Layout()
    output = find.writable()[name].plan(given, Writing(layout=layout, vocabulary_multiple=12))
    from cpt.checkpoint.arrays import Files

    facts = Facts()
    for out in output.files:
        look = Look(given)
        write_file(out, given, tmp_path / "out", Files(), block=100, watch=look)
        facts.add(look.facts)
    assert [(f.kind, f.atom, f.count, f.first) for f in findings(facts, given)] == [
        ("nonfinite", "model.layers.0.self_attn.q_proj.weight", 1, (13, 2)),
        ("zero", "model.layers.1.self_attn.k_proj.weight", 192, ()),
        ("constant", "model.layers.2.mlp.up_proj.weight", 352, ()),
    ]


def test_a_weight_that_is_kept_as_its_main_weight_is_not_rounded_by_writing_it(tmp_path: Path) -> None:
    given = made_checkpoints.content(tmp_path / "made")
    name, atom = next(iter(given.atoms.items()))
    alone = replace(given, atoms={name: replace(atom, states={"fp32": atom.states["fp32"]}, pad={})})
    rows, columns = atom.shape
    segment = (Segment(rows, columns, (Fill(name, 0, rows, 0, columns),)),)
    assert not is_rounded(Payload(name, "model", "bfloat16", segment), alone)
    assert is_rounded(Payload(name, "model", "float16", segment), alone)
    assert is_rounded(Payload(name, "model", "float16", segment), given)
