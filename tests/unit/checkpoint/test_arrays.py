"""Rectangles: cutting, flattening and placing them keeps every value, and a change of dtype rounds as torch does."""

from __future__ import annotations

import itertools
import os
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.base.errors import UsageError
from cpt.checkpoint.arrays import (
    CARRIERS,
    Array,
    Crc,
    Files,
    Fill,
    OutFile,
    Payload,
    Place,
    Segment,
    Tensor,
    convert,
    crop,
    crossing,
    flat_segments,
    part,
    places,
    rectangles,
    row_spans,
    why_not_tiled,
)
from cpt.checkpoint.content import MODEL, Atom, Content
from cpt.checkpoint.crc32 import crc32_of_both
from cpt.checkpoint.writing import blocks, write_file
from cpt.plan.model import ModelConfig

Matrix = np.ndarray[Any, Any]
Cut = tuple[int, int, int, int]  # row, rows, column, columns


def cuts(draw: Any, row: int, rows: int, column: int, columns: int, depth: int) -> Iterator[Cut]:
    """A rectangle cut in two again and again."""
    if depth and rows > 1 and draw(st.booleans()):
        at = draw(st.integers(1, rows - 1))
        yield from cuts(draw, row, at, column, columns, depth - 1)
        yield from cuts(draw, row + at, rows - at, column, columns, depth - 1)
    elif depth and columns > 1 and draw(st.booleans()):
        at = draw(st.integers(1, columns - 1))
        yield from cuts(draw, row, rows, column, at, depth - 1)
        yield from cuts(draw, row, rows, column + at, columns - at, depth - 1)
    else:
        yield row, rows, column, columns


@dataclass
class Drawn:
    """A stored tensor, what its values are, and the logical tensors they are of."""

    tensor: Tensor
    values: Matrix
    atoms: dict[tuple[str, bool], Matrix]


@st.composite
def tensors(draw: Any, most: int = 9, depth: int = 5, *, zeros: bool = True) -> Drawn:
    """Every rectangle is of a logical tensor of its own, from anywhere in it, or zeros."""
    rows, columns = draw(st.integers(1, most)), draw(st.integers(1, most))
    values = np.zeros((rows, columns), np.float32)
    atoms: dict[tuple[str, bool], Matrix] = {}
    fills = []
    at = 1.0
    for i, (row, height, column, width) in enumerate(cuts(draw, 0, rows, 0, columns, depth)):
        if zeros and draw(st.integers(0, 5)) == 0:
            fills.append(Fill(None, row, height, column, width))
            continue
        transposed, pad = draw(st.booleans()), draw(st.booleans())
        down, across = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        inside = (width, height) if transposed else (height, width)
        shape = (down + inside[0] + draw(st.integers(0, 1)), across + inside[1] + draw(st.integers(0, 1)))
        atom = np.arange(at, at + shape[0] * shape[1], dtype=np.float32).reshape(shape)
        at += atom.size
        atoms[f"t{i}", pad] = atom
        piece = atom[down : down + inside[0], across : across + inside[1]]
        values[row : row + height, column : column + width] = piece.T if transposed else piece
        fills.append(Fill(f"t{i}", row, height, column, width, down, across, pad, transposed))
    fills.sort(key=lambda f: f.row)
    return Drawn(Tensor("stored", (rows, columns), tuple(fills)), values, atoms)


def made(
    fills: Iterator[Fill] | tuple[Fill, ...], shape: tuple[int, int], atoms: dict[tuple[str, bool], Matrix]
) -> Matrix:
    """The values that fills describe. Each must be set exactly once."""
    out, times = np.full(shape, -1, np.float32), np.zeros(shape, int)
    for f in fills:
        into = (slice(f.row, f.row + f.rows), slice(f.column, f.column + f.columns))
        assert f.row >= 0 and f.column >= 0 and out[into].shape == (f.rows, f.columns)
        times[into] += 1
        if f.atom is None:
            out[into] = 0
            continue
        rows, columns = (f.columns, f.rows) if f.transposed else (f.rows, f.columns)
        piece = atoms[f.atom, f.pad][f.at_row : f.at_row + rows, f.at_column : f.at_column + columns]
        out[into] = piece.T if f.transposed else piece
    assert (times == 1).all()
    return out


@given(tensors(), st.data())
@settings(max_examples=150)
def test_cropped_fills_are_the_rectangle_s_values(drawn: Drawn, data: Any) -> None:
    rows, columns = drawn.values.shape
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    height, width = data.draw(st.integers(1, rows - row)), data.draw(st.integers(1, columns - column))
    cropped = crop(drawn.tensor.fills, row, height, column, width)
    wanted = drawn.values[row : row + height, column : column + width]
    assert np.array_equal(made(cropped, (height, width), drawn.atoms), wanted)


@given(tensors(), st.data())
@settings(max_examples=100)
def test_parts_are_the_rows_asked_for_one_after_another(drawn: Drawn, data: Any) -> None:
    rows, columns = drawn.values.shape
    ends = sorted(data.draw(st.sets(st.integers(0, rows), min_size=2, max_size=4)))
    intervals = list(itertools.pairwise(ends))[::2]
    interval = data.draw(st.none() | st.just((columns // 2, columns)))
    taken = part(drawn.tensor, intervals, interval)
    left, right = interval or (0, columns)
    wanted = np.concatenate([drawn.values[a:b, left:right] for a, b in intervals])
    assert taken.shape == wanted.shape
    assert np.array_equal(made(taken.fills, taken.matrix, drawn.atoms), wanted)


@given(tensors(), st.data())
@settings(max_examples=150)
def test_flat_segments_are_a_stretch_of_the_flattened_tensor(drawn: Drawn, data: Any) -> None:
    size = drawn.values.size
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    segments = list(flat_segments(drawn.tensor, start, stop))
    assert len(segments) <= 3
    found = [made(s.fills, (s.rows, s.columns), drawn.atoms).reshape(-1) for s in segments]
    assert np.array_equal(np.concatenate([np.empty(0, np.float32), *found]), drawn.values.reshape(-1)[start:stop])


@given(tensors(zeros=False), st.integers(0, 40))
@settings(max_examples=150)
def test_what_fills_wrote_is_found_again_at_its_places(drawn: Drawn, before: int) -> None:
    with tempfile.TemporaryDirectory() as folder, Files() as files:
        file = Path(folder) / "file"
        file.write_bytes(b"\7" * before + drawn.values.tobytes())
        for name, pad, place in places(drawn.tensor.fills, file, before, drawn.values.shape[1], "float32"):
            inside = drawn.atoms[name, pad][place.row : place.row + place.rows, place.column :][:, : place.columns]
            assert np.array_equal(files.view(place, "float32"), inside)


NO_MODEL = ModelConfig(
    family="llama",
    num_layers=1,
    hidden_size=1,
    ffn_hidden_size=1,
    num_attention_heads=1,
    num_query_groups=1,
    head_dim=1,
    vocab_size=1,
    max_position_embeddings=1,
    norm_eps=1e-5,
)


@st.composite
def on_disk(draw: Any) -> tuple[list[tuple[Drawn, Segment]], dict[tuple[str, bool], list[Cut]], int]:
    """Segments, how each logical tensor is cut into places, and the size of a block [bytes]."""
    drawn = [draw(tensors(12, 6)) for _ in range(draw(st.integers(1, 3)))]
    for i, d in enumerate(drawn):  # names of their own
        d.atoms = {(f"{i}.{name}", pad): values for (name, pad), values in d.atoms.items()}
        fills = tuple(replace(f, atom=f.atom and f"{i}.{f.atom}") for f in d.tensor.fills)
        d.tensor = replace(d.tensor, fills=fills)
    layout = {
        key: list(cuts(draw, 0, values.shape[0], 0, values.shape[1], draw(st.integers(0, 5))))
        for d in drawn
        for key, values in d.atoms.items()
    }
    segments = [(d, Segment(*d.values.shape, d.tensor.fills)) for d in drawn]
    return segments, layout, draw(st.sampled_from((1, 4, 12, 32, 100, 1 << 20)))


@given(on_disk(), st.sampled_from(("float32", "bfloat16")))
@settings(max_examples=200)
def test_a_file_holds_every_value_whatever_the_places_and_the_block(drawn: Any, dtype: str) -> None:
    segments, layout, block = drawn
    with tempfile.TemporaryDirectory() as temporary, Files() as files:
        folder = Path(temporary)
        content = stored(folder, {k: v for d, _ in segments for k, v in d.atoms.items()}, layout)
        payload = Payload("all", MODEL, dtype, tuple(s for _, s in segments))
        out = OutFile("sub/out", (b"head", payload, b"between", Crc(0), payload), sha256=True)
        sums = write_file(out, content, folder, files, block=block)
        values = np.concatenate([d.values.reshape(-1) for d, _ in segments])
        wanted = convert(values, "float32", dtype).tobytes()
        data = (folder / "sub/out").read_bytes()
        crc = zlib.crc32(wanted)
        assert data == b"head" + wanted + b"between" + crc.to_bytes(4, "little") + wanted
        assert (sums.size, sums.crc32, sums.payloads) == (len(data), zlib.crc32(data), (crc, crc))
        assert out.nbytes == len(data)
        for found in blocks(payload, content, files, np.empty(block, np.uint8)):
            assert found.nbytes <= max(block, found.itemsize) and found.ndim == 1


def stored(folder: Path, atoms: dict[tuple[str, bool], Matrix], layout: dict[tuple[str, bool], list[Cut]]) -> Content:
    """Logical tensors in a file, each as places of its own layout, every other one as stored columns."""
    at, arrays = 0, {}
    with open(folder / "source", "wb") as file:
        for key, values in atoms.items():
            found = []
            for i, (row, rows, column, columns) in enumerate(layout[key]):
                piece = values[row : row + rows, column : column + columns]
                kept = piece.T if i % 2 else piece
                found.append(Place(file.name, at, kept.shape[1] * 4, row, rows, column, columns, bool(i % 2)))
                at += file.write(kept.tobytes())
            arrays[key] = Array("float32", values.shape, tuple(found))
            assert why_not_tiled(arrays[key]) is None
    names = {name for name, _ in arrays}
    held = {
        name: Atom(
            name=name,
            shape=(1,),
            dtype="float32",
            states={MODEL: arrays[name, False]} if (name, False) in arrays else {},
            pad={MODEL: arrays[name, True]} if (name, True) in arrays else {},
        )
        for name in names
    }
    return Content(format="hf", path=folder, model=NO_MODEL, atoms=held)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)), max_size=40), st.integers(0, 30), st.integers(1, 9))
@settings(max_examples=200)
def test_rectangles_that_cross_rows_are_found_among_many(rows: list[tuple[int, int]], first: int, count: int) -> None:
    boxes = tuple(Fill("a", row, height, 0, 1, at_row=i) for i, (row, height) in enumerate(rows))
    found = [b for b in crossing(boxes, first, first + count) if b.row < first + count and b.row + b.rows > first]
    wanted = [b for b in boxes if b.row < first + count and b.row + b.rows > first]
    assert sorted(found, key=lambda b: b.at_row) == wanted


@given(st.data())
@settings(max_examples=100)
def test_places_that_do_not_tile_are_told(data: Any) -> None:
    rows, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    found = [Place("f", 0, 4, *cut) for cut in cuts(data.draw, 0, rows, 0, columns, 5)]
    array = Array("float32", (rows, columns), tuple(found))
    assert why_not_tiled(array) is None
    i = data.draw(st.integers(0, len(found) - 1))
    without = found[:i] + found[i + 1 :]
    assert why_not_tiled(replace(array, places=tuple(without))) is not None
    if without:  # as many values as wanted, but another one twice
        moved = replace(without[0], row=without[0].row + rows)
        assert why_not_tiled(replace(array, places=(*found[:i], moved, *found[i + 1 :]))) is not None
    assert why_not_tiled(replace(array, places=(*found, found[i]))) is not None


@given(st.integers(0, 20), st.integers(1, 20), st.integers(1, 500))
def test_blocks_cover_a_matrix_once_row_after_row_and_are_small(rows: int, columns: int, most: int) -> None:
    covered = np.zeros((rows, columns), int)
    firsts = []
    for first, last in row_spans((rows, columns), most):
        assert last - first == 1 or (last - first) * columns <= most
        for row, column, (down, across) in rectangles(first, last, columns, most):
            assert 0 < down * across <= most and row + down <= last and column + across <= columns
            covered[row : row + down, column : column + across] += 1
            firsts.append((row, column))
    assert (covered == 1).all() and firsts == sorted(firsts)


def test_what_is_wrong_with_places_is_said() -> None:
    def why(*cut: Cut) -> str | None:
        return why_not_tiled(Array("float32", (3, 2), tuple(Place("f", 0, 4, *c) for c in cut)))

    assert why((0, 2, 0, 2), (2, 1, 0, 2)) is None
    assert why((0, 2, 0, 2)) == "4 of 6 values are there"
    assert why((0, 2, 0, 2), (1, 2, 0, 1)) == "row 1 is there twice"
    assert why((0, 1, 0, 2), (0, 1, 0, 2), (2, 1, 0, 2)) == "rows 0 to 1 are there twice"
    assert why((0, 2, 0, 2), (2, 1, 1, 2)) == "a part lies outside its shape"


def test_a_place_behind_the_end_of_its_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(10))
    with Files() as files, pytest.raises(UsageError, match=r"`.*short` has 10 bytes, 12 are needed"):
        files.view(Place(str(tmp_path / "short"), 0, 4, 0, 3, 0, 1), "float32")


# Dtypes


def rounded(values: Matrix) -> Matrix:
    """fp32 as torch rounds it to bfloat16, as bits."""
    import torch

    return torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def test_every_bfloat16_goes_to_fp32_and_comes_back() -> None:
    import torch

    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = convert(bits, "bfloat16", "float32")
    wanted = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    assert np.array_equal(wide.view(np.uint32), wanted.view(np.uint32))
    back = convert(wide, "float32", "bfloat16")
    quiet = np.where(np.isnan(wide), bits | 0x40, bits)  # a signalling NaN becomes a quiet one
    assert np.array_equal(back, quiet)


# The lowest 16 bits decide about rounding: all of their corners, below every upper half.
LOW = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)


def test_every_upper_half_rounds_to_bfloat16_as_torch_does() -> None:
    bits = ((np.arange(1 << 16, dtype=np.uint32) << 16)[:, None] | LOW).reshape(-1)
    same_rounding(bits.view(np.float32))


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_any_fp32_rounds_to_bfloat16_as_torch_does(bits: list[int]) -> None:
    same_rounding(np.array(bits, np.uint32).view(np.float32))


def same_rounding(values: Matrix) -> None:
    found, nan = convert(values, "float32", "bfloat16"), np.isnan(values)
    assert np.array_equal(found[~nan], rounded(values[~nan]))
    assert ((found[nan] & 0x7FFF) > 0x7F80).all()
    assert np.array_equal(found[nan] >> 15, values[nan].view(np.uint32) >> 31)  # NaN keeps its sign


def test_rounding_does_not_depend_on_strides() -> None:
    values = np.random.default_rng(0).standard_normal((14, 10)).astype(np.float32)
    values[3, 4] = np.nan
    for view in (values.T, values[::2, 1:7], values[:, 3]):
        assert np.array_equal(
            convert(view, "float32", "bfloat16"), convert(np.ascontiguousarray(view), "float32", "bfloat16")
        )


@pytest.mark.parametrize("name", sorted(CARRIERS))
def test_the_same_dtype_keeps_the_bits(name: str) -> None:
    bits = np.frombuffer(os.urandom(64), CARRIERS[name])
    assert convert(bits, name, name) is bits


@pytest.mark.parametrize("given_as", ["float32", "bfloat16"])
def test_fp16_takes_what_fits_and_refuses_what_does_not(given_as: str) -> None:
    values = np.array([65504.0, -1.5, np.inf, -np.inf, np.nan, 6e-8, 0.0, -0.0], np.float32)
    values = convert(convert(values, "float32", given_as), given_as, "float32") if given_as == "float32" else values[1:]
    found = convert(convert(values, "float32", given_as), given_as, "float16")
    assert np.array_equal(np.isnan(found), np.isnan(values)) and np.isinf(found).sum() == 2
    with pytest.raises(UsageError, match="too large for float16"):
        convert(convert(np.array([1e5], np.float32), "float32", given_as), given_as, "float16")


@given(st.binary(max_size=50), st.binary(max_size=5000))
def test_checksums_of_two_parts_join(first: bytes, second: bytes) -> None:
    assert crc32_of_both(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


def test_checksums_join_in_any_order_beyond_4_gigabytes() -> None:
    crc, size = zlib.crc32(bytes(1 << 20)), 1 << 20
    while size < 8 << 30:  # zeros
        crc, size = crc32_of_both(crc, crc, size), 2 * size
    one = zlib.crc32(b"x")
    left = crc32_of_both(crc32_of_both(one, crc, size), one, 1)
    assert left == crc32_of_both(one, crc32_of_both(crc, one, 1), size + 1)
    assert left != crc32_of_both(crc32_of_both(one, crc, size - (4 << 30)), one, 1)
