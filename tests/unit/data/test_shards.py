"""Our shards are Megatron's indexed datasets, in both directions."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from cpt.base.errors import UsageError
from cpt.data import shards
from cpt.data.shards import Shard, ShardWriter, token_dtype


def write(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> None:
    writer = ShardWriter(prefix, np.dtype(dtype))
    for document in documents:
        writer.add(np.array(document), np.array([len(document)]))
    writer.finish()


DOCUMENTS = [[5, 6, 7], [], [1], [65499, 0, 2, 3]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_what_we_write_megatron_reads(tmp_path: Path, dtype: type) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    write(tmp_path / "v1.2_train", DOCUMENTS, dtype)
    dataset = indexed.IndexedDataset(str(tmp_path / "v1.2_train"))
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert dataset.index.dtype == dtype


def test_what_megatron_writes_we_read(tmp_path: Path) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    prefix = str(tmp_path / "their.data_text_document")
    builder = indexed.IndexedDatasetBuilder(prefix + ".bin", dtype=np.int32)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5]), [2, 3])  # two sequences, one document
    builder.add_document(torch.tensor([9]), [1])
    builder.finalize(prefix + ".idx")
    shard = Shard(prefix)
    assert [shard.read(i).tolist() for i in range(len(shard))] == [[1, 2, 3, 4, 5], [9]]
    assert shard.tokens == 6 and shard.read(0, 1, 4).tolist() == [2, 3, 4]


def test_many_documents_pass_through_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_CHUNK", 7)
    lengths = np.arange(50) % 5
    writer = ShardWriter(tmp_path / "x", np.dtype(np.uint16))
    writer.add(np.arange(lengths.sum()), lengths)
    writer.finish()
    shard = Shard(tmp_path / "x")
    assert np.array_equal(shard.lengths, lengths)
    assert np.concatenate([shard.read(i) for i in range(50)]).tolist() == list(range(lengths.sum()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def test_equal_documents_hash_equally_however_they_were_added(tmp_path: Path) -> None:
    one, two = ShardWriter(tmp_path / "1", np.dtype(np.uint16)), ShardWriter(tmp_path / "2", np.dtype(np.uint16))
    one.add(np.array([1, 2, 3]), np.array([1, 2]))
    two.add(np.array([1]), np.array([1]))
    two.add(np.array([2, 3]), np.array([2]))
    three = ShardWriter(tmp_path / "3", np.dtype(np.uint16))
    three.add(np.array([1, 2, 3]), np.array([2, 1]))
    hashes = one.finish(), two.finish(), three.finish()
    assert hashes[0] == hashes[1] != hashes[2]


def test_ids_are_stored_as_megatron_would() -> None:
    assert token_dtype(65499) == np.uint16 and token_dtype(65500) == np.int32


@pytest.mark.parametrize("damage", ["magic", "short index", "short data", "missing"])
def test_a_damaged_shard_is_one_clear_error(tmp_path: Path, damage: str) -> None:
    write(tmp_path / "x", DOCUMENTS)
    index, data = tmp_path / "x.idx", tmp_path / "x.bin"
    if damage == "magic":
        index.write_bytes(b"PK" + index.read_bytes()[2:])
    elif damage == "short index":
        index.write_bytes(index.read_bytes()[:-9])
    elif damage == "short data":
        data.write_bytes(data.read_bytes()[:-1])
    else:
        index.unlink()
    with pytest.raises(UsageError, match=r"x\.(idx|bin)"):
        Shard(tmp_path / "x").read(0)


def test_an_index_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.idx").write_bytes(shards.MAGIC + struct.pack("<QBQQ", 1, 8, 2**50, 2**50) + b"\0" * 100)
    with pytest.raises(UsageError, match="damaged"):
        len(Shard(tmp_path / "x"))
