"""Megatron's indexed dataset, the pair `<name>.bin` (token ids) and `<name>.idx` (where each document lies).

Layout of `.idx`, little endian: 9 bytes `MMIDIDX\\0\\0` · version 1 (u64) · dtype code (u8) · sequences (u64) ·
documents + 1 (u64) · length of each sequence [tokens] (i32) · start of each sequence [bytes] (i64) · first sequence of
each document, and their number at the end (i64).

Files written here are read by `megatron.core.datasets.indexed_dataset.IndexedDataset`, and the other way round.
"""

from __future__ import annotations

import hashlib
import os
import struct
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cpt.base.errors import UsageError

MAGIC = b"MMIDIDX\x00\x00"
HEADER_BYTES = len(MAGIC) + 8 + 1 + 8 + 8
DTYPES: dict[int, type] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
CODES = {np.dtype(kind): code for code, kind in DTYPES.items()}
_CHUNK = 1 << 20  # documents handled at a time while an index is written


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type that Megatron stores ids of such a vocabulary in: two bytes where they are enough."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class ShardWriter:
    """Writes one `.bin/.idx` pair in a stream; memory does not grow with the corpus.

    The pair is complete only after `finish`. Whole-or-absent is the caller's part: write into a temporary folder and
    rename it.

    Args:
        prefix: path without the suffix.
        dtype: of the token ids.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: np.dtype[Any]) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        self.documents = 0
        self.tokens = 0
        self._hashes = hashlib.sha256(), hashlib.sha256()  # of ids and of lengths
        self._bin = open(self._path(".bin"), "wb")  # noqa: SIM115
        self._lengths_path = self._path(".lengths")
        self._lengths = open(self._lengths_path, "w+b")  # noqa: SIM115

    def _path(self, suffix: str) -> Path:
        return self.prefix.with_name(self.prefix.name + suffix)

    def add(self, tokens: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]) -> None:
        """Append documents.

        Args:
            tokens: ids of all of them, one after the other.
            lengths: tokens of each; they sum to `len(tokens)`.
        """
        data = np.ascontiguousarray(tokens, self.dtype)
        sizes = np.ascontiguousarray(lengths, np.int32)
        assert int(sizes.sum(dtype=np.int64)) == len(data), "lengths do not sum to the tokens"
        for file, part, hasher in zip((self._bin, self._lengths), (data, sizes), self._hashes, strict=True):
            file.write(part.data)
            hasher.update(part.data)
        self.documents += len(sizes)
        self.tokens += len(data)

    def finish(self) -> str:
        """Write the index, make both files durable, and give a hash over ids and lengths."""
        with self._bin, self._lengths, open(self._path(".idx"), "wb") as index:
            index.write(_head(self.dtype, self.documents))
            start = 0
            for sizes in self._chunks():
                index.write(sizes.data)
            for sizes in self._chunks():
                ends = np.cumsum(sizes, dtype=np.int64)
                index.write((start + (ends - sizes) * self.dtype.itemsize).data)
                start += int(ends[-1]) * self.dtype.itemsize
            _write_documents(index, self.documents)
            for file in (self._bin, index):
                file.flush()
                os.fsync(file.fileno())
        self._lengths_path.unlink()
        return hashlib.sha256(b"".join(h.digest() for h in self._hashes)).hexdigest()

    def _chunks(self) -> Any:
        self._lengths.flush()
        self._lengths.seek(0)
        while data := self._lengths.read(4 * _CHUNK):
            yield np.frombuffer(data, np.int32)

    def close(self) -> None:
        """Let go of the files of an unfinished pair."""
        self._bin.close()
        self._lengths.close()


def write_index(path: Path, dtype: np.dtype[Any], lengths: np.ndarray[Any, Any], starts: np.ndarray[Any, Any]) -> None:
    """Write an index over documents that lie anywhere in a `.bin` file.

    Args:
        path: of the `.idx` file.
        dtype: of the token ids.
        lengths: of each document [tokens].
        starts: of each document [bytes].
    """
    with open(path, "wb") as index:
        index.write(_head(dtype, len(lengths)))
        index.write(np.ascontiguousarray(lengths, "<i4").data)
        index.write(np.ascontiguousarray(starts, "<i8").data)
        _write_documents(index, len(lengths))
        index.flush()
        os.fsync(index.fileno())


def _head(dtype: np.dtype[Any], documents: int) -> bytes:
    return MAGIC + struct.pack("<QBQQ", 1, CODES[np.dtype(dtype)], documents, documents + 1)


def _write_documents(index: BinaryIO, documents: int) -> None:
    """One sequence a document."""
    for first in range(0, documents + 1, _CHUNK):
        index.write(np.arange(first, min(first + _CHUNK, documents + 1), dtype=np.int64).data)


class Shard:
    """One `.bin/.idx` pair, mapped into memory on first use.

    Args:
        prefix: path without the suffix.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = Path(prefix)

    @cached_property
    def _index(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.dtype[Any]]:
        """Start [bytes] and length [tokens] of each document, and the type of the ids."""
        path = self._path(".idx")
        try:
            raw = np.memmap(path, mode="r")
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read the index `{path}`: {error}") from None
        head = bytes(raw[:HEADER_BYTES])
        if len(head) < HEADER_BYTES or not head.startswith(MAGIC):
            raise UsageError(f"`{path}` is not the index of a Megatron dataset")
        version, code, sequences, ends = struct.unpack("<QBQQ", head[len(MAGIC) :])
        size = HEADER_BYTES + sequences * 12 + ends * 8
        if version != 1 or code not in DTYPES or ends < 1 or len(raw) < size:
            raise UsageError(f"`{path}` is damaged: {len(raw)} bytes where its head promises {size}")
        dtype = np.dtype(DTYPES[code])
        lengths = np.frombuffer(raw, "<i4", sequences, HEADER_BYTES)
        starts = np.frombuffer(raw, "<i8", sequences, HEADER_BYTES + 4 * sequences)
        firsts = np.frombuffer(raw, "<i8", ends, HEADER_BYTES + 12 * sequences)
        if ends - 1 != sequences:
            lengths, starts = _join(path, starts, lengths, firsts, dtype.itemsize)
        return starts, lengths, dtype

    def _path(self, suffix: str) -> Path:
        return self.prefix.with_name(self.prefix.name + suffix)

    @property
    def starts(self) -> np.ndarray[Any, Any]:
        """Where each document begins in the `.bin` file [bytes]."""
        return self._index[0]

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """Length of each document [tokens]."""
        return self._index[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the token ids."""
        return self._index[2]

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths.sum(dtype=np.int64))

    @cached_property
    def _ids(self) -> np.ndarray[Any, Any]:
        """All ids of the file."""
        path = self._path(".bin")
        try:
            empty = path.stat().st_size == 0
            raw = np.empty(0, np.uint8) if empty else np.memmap(path, mode="r")
        except OSError as error:
            raise UsageError(f"cannot read `{path}`: {error.strerror}") from None
        size = self.dtype.itemsize
        if len(self):
            last = len(self) - 1 - int(self.starts[::-1].argmax())
            if len(raw) < int(self.starts[last]) + int(self.lengths[last]) * size:
                raise UsageError(f"`{path}` is shorter than its index says")
        return np.frombuffer(raw, self.dtype, len(raw) // size)

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        """Tokens `start` to `stop` of a document, as a read-only view."""
        length = int(self.lengths[document])
        stop = length if stop is None else stop
        assert 0 <= start <= stop <= length, f"tokens {start} to {stop} of a document of {length}"
        begin = int(self.starts[document]) // self.dtype.itemsize
        return self._ids[begin + start : begin + stop]

    def fill(
        self,
        out: np.ndarray[Any, Any],
        documents: np.ndarray[Any, Any],
        starts: np.ndarray[Any, Any],
        stops: np.ndarray[Any, Any],
    ) -> None:
        """Copy tokens `starts` to `stops` of documents into `out`, one after the other.

        Shapes:
            out [sum of stops - starts]; documents, starts, stops [pieces] int64
        """
        ids = self._ids
        first = self.starts[documents] // self.dtype.itemsize
        place = 0
        for begin, end in zip((first + starts).tolist(), (first + stops).tolist(), strict=True):
            out[place : place + end - begin] = ids[begin:end]
            place += end - begin


def _join(
    path: Path, starts: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], firsts: np.ndarray[Any, Any], itemsize: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Length and start of documents that hold several sequences each (`--split-sentences` of Megatron's own tool)."""
    wide = lengths.astype(np.int64)
    inside = np.ones(max(len(lengths) - 1, 0), bool)
    inside[firsts[1:-1] - 1] = False  # between two documents a gap is all right
    if len(lengths) > 1 and np.any((starts[1:] != starts[:-1] + wide[:-1] * itemsize) & inside):
        raise UsageError(f"`{path}` holds documents whose sequences do not lie one after the other")
    totals = np.concatenate([[0], np.cumsum(wide)])
    counts = totals[firsts[1:]] - totals[firsts[:-1]]
    begins = (
        starts[np.minimum(firsts[:-1], max(len(starts) - 1, 0))] if len(starts) else np.zeros(len(counts), np.int64)
    )
    return counts, begins
