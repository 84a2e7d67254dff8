"""torch's own file format without torch: torch reads what is written, and what torch writes is found."""

from __future__ import annotations

import argparse
import io
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.base.errors import UsageError
from cpt.checkpoint import torch_zip, unpickle
from cpt.checkpoint.arrays import Array, Files, OutFile, Payload, Place, Segment, whole
from cpt.checkpoint.content import Atom, Content
from cpt.checkpoint.writing import write_file
from cpt.plan.model import ModelConfig

MODEL = ModelConfig(
    family="llama",
    num_layers=1,
    hidden_size=3,
    ffn_hidden_size=5,
    num_attention_heads=1,
    num_query_groups=1,
    head_dim=2,
    vocab_size=7,
    max_position_embeddings=8,
    norm_eps=1e-5,
)
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.int64: "int64"}


def content(folder: Path, tensors: list[torch.Tensor]) -> tuple[Content, list[Payload]]:
    """Tensors as atoms that lie in one raw file, and payloads of them."""
    raw, atoms, payloads = b"", {}, []
    for i, tensor in enumerate(tensors):
        dtype, name, shape = NAMES[tensor.dtype], str(i), tuple(tensor.shape)
        rows, columns = whole(name, shape).matrix
        place = Place(str(folder / "raw"), len(raw), columns * tensor.itemsize, 0, rows, 0, columns)
        atoms[name] = Atom(name=name, shape=shape, dtype=dtype, states={"model": Array(dtype, shape, (place,))})
        payloads.append(Payload(name, "model", dtype, (Segment(rows, columns, whole(name, shape).fills),)))
        raw += tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    (folder / "raw").write_bytes(raw)
    return Content(format="raw", path=folder, model=MODEL, atoms=atoms), payloads


@given(
    st.lists(st.tuples(st.sampled_from(list(NAMES)), st.lists(st.integers(1, 9), min_size=1, max_size=3)), max_size=5),
    st.integers(0, 70),
)
@settings(max_examples=40)
def test_torch_reads_what_is_written(tmp_path_factory: Any, kinds: list[Any], before: int) -> None:
    folder = tmp_path_factory.mktemp("zip")
    tensors = [(torch.randn(shape) * 100).to(dtype) for dtype, shape in kinds]
    made, payloads = content(folder, tensors)
    refs = {str(i): torch_zip.Ref(i, tuple(t.shape), NAMES[t.dtype]) for i, t in enumerate(tensors)}
    value = {"tensors": OrderedDict(refs), "args": argparse.Namespace(tp=2, name="x"), "list": [1, 2.5, None, True]}
    literal = b"\0" * before
    parts = torch_zip.parts(value, payloads)
    write_file(OutFile("out", (literal, *parts)), made, folder, Files(), block=64)
    data = (folder / "out").read_bytes()
    with torch.serialization.safe_globals([argparse.Namespace]):
        back = torch.load(io.BytesIO(data[before:]), weights_only=True)
    assert back["args"] == value["args"] and back["list"] == value["list"]
    for i, tensor in enumerate(tensors):
        assert torch.equal(back["tensors"][str(i)], tensor)
    archive = torch_zip.read(data, before, len(data) - before, "out")
    for i, tensor in enumerate(tensors):
        record = archive.value["tensors"][str(i)]
        assert isinstance(record, unpickle.TensorRecord) and record.size == tuple(tensor.shape)
        stored = archive.storages[record.storage.key]
        assert (stored.start - before) % 64 == 0
        values = data[stored.start : stored.start + stored.length]
        assert values == tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_what_torch_writes_is_found(tmp_path: Path) -> None:
    value = {"a": torch.arange(12.0).reshape(3, 4), "b": [torch.ones(2, dtype=torch.bfloat16)], "dtype": torch.float16}
    torch.save(value, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    archive = torch_zip.read(data, 0, len(data), "x.pt")
    record = archive.value["a"]
    stored = archive.storages[record.storage.key]
    assert np.array_equal(np.frombuffer(data, "<f4", 12, stored.start), np.arange(12.0))
    assert archive.value["dtype"] == "float16" and record.is_contiguous


def test_bad_files_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(100.0)}, tmp_path / "x.pt")
    good = (tmp_path / "x.pt").read_bytes()
    for bad in (good[:-1], good[:50], b"", b"no zip" * 20, good[: good.rfind(b"PK\5\6")], b"\x80\x02" + good):
        with pytest.raises(UsageError, match=r"x\.pt"):
            torch_zip.read(bad, 0, len(bad), "x.pt")
    with pytest.raises(UsageError, match=r"x\.pt.*cut off"):
        torch_zip.read(good, 0, len(good) + 1, "x.pt")
    flipped = bytearray(good)
    flipped[good.index(b"ctorch._utils") + 3] ^= 1
    with pytest.raises(UsageError, match="checksum"):
        torch_zip.read(bytes(flipped), 0, len(flipped), "x.pt")


@given(st.data())
@settings(max_examples=150)
def test_damage_never_shows_a_traceback(data: Any) -> None:
    out = io.BytesIO()
    torch.save({"a": torch.arange(10.0), "b": argparse.Namespace(x=1)}, out)
    damaged = bytearray(out.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(damaged))) :]
    try:
        archive = torch_zip.read(bytes(damaged), 0, len(damaged), "x")
    except UsageError:
        return
    for stored in archive.storages.values():
        assert stored.start >= 0 and stored.start + stored.length <= len(damaged)


def test_members_beyond_4_gib_are_described_with_64_bits() -> None:
    """Written by hand to a sparse file: torch must find a small tensor behind a large one."""
    large = Payload("large", "model", "float32", (Segment(1 << 20, 1 << 10, ()),))
    small = Payload("small", "model", "float32", (Segment(1, 3, ()),))
    parts = torch_zip.parts(
        {"small": torch_zip.Ref(1, (3,), "float32"), "n": torch_zip.Ref(0, (1 << 20, 1 << 10), "float32")},
        [large, small],
    )
    at, pieces = 0, []
    for part in parts:
        if isinstance(part, Payload):
            if part is small:
                pieces.append((at, struct.pack("<3f", 1, 2, 3)))
            at += part.nbytes
        else:
            content = part if isinstance(part, bytes) else bytes(4)
            pieces.append((at, content))
            at += len(content)

    class Sparse:
        """Bytes that are zero but for the pieces."""

        def __len__(self) -> int:
            return at

        def __getitem__(self, cut: slice) -> bytes:
            found = bytearray(cut.stop - cut.start)
            for start, content in pieces:
                low, high = max(start, cut.start), min(start + len(content), cut.stop)
                if low < high:
                    found[low - cut.start : high - cut.start] = content[low - start : high - start]
            return bytes(found)

    sparse = Sparse()
    archive = torch_zip.read(sparse, 0, at, "x")
    stored = archive.storages["1"]
    assert stored.start > 1 << 32 and sparse[stored.start : stored.start + 12] == struct.pack("<3f", 1, 2, 3)
    assert archive.storages["0"].length == 1 << 32
