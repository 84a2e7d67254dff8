"""Writes one planned file, block by block: memory is a few blocks, whatever the file's size. No torch."""

from __future__ import annotations

import ctypes
import hashlib
import io
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from cpt.base.errors import UsageError
from cpt.checkpoint.arrays import CARRIERS, Array, Crc, Files, OutFile, Payload, itemsize
from cpt.checkpoint.content import MODEL, Content

BLOCK = 64 << 20  # the most values in hand at a time [bytes]
_IN_CACHE = 1 << 20  # of them, as many as stay in a core's cache: more is slower [bytes]
_EARLY = 8 << 20  # written bytes that are sent to the disk before the end [bytes]


@dataclass(frozen=True, kw_only=True)
class FileSums:
    """A file as it was written.

    Args:
        crc32: of all its bytes.
        payloads: CRC-32 of each payload, in order.
        sha256: of all its bytes, hexadecimal, if the plan asked for it.
    """

    size: int
    crc32: int
    payloads: tuple[int, ...] = ()
    sha256: str | None = None


Watch = Callable[[Payload, np.ndarray[Any, Any]], None]


def write_file(
    out: OutFile,
    content: Content,
    folder: Path,
    files: Files,
    *,
    block: int = BLOCK,
    begin: Callable[[Payload], None] | None = None,
    watch: Watch | None = None,
) -> FileSums:
    """Write and sync one file.

    Args:
        begin: called with each payload before its values are read; may raise to stop.
        watch: called with each block's values (a flat array of the dtype's carrier) and its payload, before it is
            written: checks of values, progress; may raise to stop.
    """
    path = folder / out.name
    path.parent.mkdir(parents=True, exist_ok=True)
    sums: list[int] = []
    buffer = np.empty(min(block, _IN_CACHE), np.uint8)
    with open(path, "wb", buffering=0) as file:
        put = _Put(file, with_sha256=out.sha256)
        for part in out.parts:
            if isinstance(part, Crc):
                put.text(sums[part.of].to_bytes(4, "little"))
            elif isinstance(part, Payload):
                put.crc = 0
                if begin is not None:
                    begin(part)
                for values in blocks(part, content, files, buffer):
                    if watch is not None:
                        watch(part, values)
                    put.values(values)
                sums.append(put.crc)
                put.total = crc32_of_both(put.total, put.crc, part.nbytes)
            else:
                put.text(part)
        os.fsync(file.fileno())
    sha = None if put.sha is None else put.sha.hexdigest()
    return FileSums(size=put.size, crc32=put.total, payloads=tuple(sums), sha256=sha)


class _Put:
    """Writes bytes and sums them up.

    Args:
        with_sha256: whether `sha` is made.
    """

    def __init__(self, file: io.FileIO, *, with_sha256: bool) -> None:
        self.file = file
        self.sha = hashlib.sha256() if with_sha256 else None
        self.size = self.begun = 0  # bytes written; and on their way to the disk
        self.total = self.crc = 0  # of the file but its current payload; of that

    def text(self, data: bytes) -> None:
        self.total = zlib.crc32(data, self.total)
        self._write(memoryview(data))

    def values(self, values: np.ndarray[Any, Any]) -> None:
        view = memoryview(values.view(np.uint8).data)
        self.crc = zlib.crc32(view, self.crc)
        self._write(view)

    def _write(self, view: memoryview) -> None:
        if self.sha is not None:
            self.sha.update(view)
        self.size += len(view)
        while len(view):
            view = view[self.file.write(view) :]
        if self.size - self.begun >= _EARLY:
            _start_writing(self.file.fileno(), self.begun, self.size - self.begun)
            self.begun = self.size


def blocks(
    payload: Payload, content: Content, files: Files, buffer: np.ndarray[Any, Any]
) -> Iterator[np.ndarray[Any, Any]]:
    """The values of a payload as flat arrays that fit into the buffer; each is valid until the next, and not to be
    written to. They are whole rows of a segment, or parts of one row where it is longer than the buffer."""
    array_of = partial(_array, content, payload.state)
    width = itemsize(payload.dtype)
    room = max(1, len(buffer) // width)
    carrier = CARRIERS[payload.dtype]
    place = buffer[: room * width].view(carrier) if len(buffer) >= width else np.empty(1, carrier)
    try:
        for segment in payload.segments:
            step = room // max(1, segment.columns)
            first = 0
            while first < segment.rows and step:
                last = min(first + step, segment.rows)
                values = files.lying(segment, first, last, array_of, payload.dtype, room // 4)
                if values is None:
                    values = place[: (last - first) * segment.columns]
                    files.fill(segment, first, last, array_of, values.reshape(last - first, -1), payload.dtype)
                first += len(values) // segment.columns
                yield values
            for first in range(0, segment.rows if not step else 0):
                for column in range(0, segment.columns, room):
                    values = place[: min(room, segment.columns - column)]
                    files.fill(segment, first, first + 1, array_of, values[None], payload.dtype, column)
                    yield values
    except UsageError as error:
        raise UsageError(f"`{payload.name}`: {error.message}", *error.hints) from None


def _start_writing(descriptor: int, start: int, length: int) -> None:
    """Send a part of a file to the disk without waiting, so that less is left for the end; where the system can."""
    if _sync_file_range is not None:
        _sync_file_range(descriptor, ctypes.c_int64(start), ctypes.c_int64(length), 2)  # SYNC_FILE_RANGE_WRITE


_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None


def crc32_of_both(first: int, second: int, length: int) -> int:
    """CRC-32 of two stretches of bytes, one after the other.

    Args:
        first, second: CRC-32 of each.
        length: of the second [bytes].

    Source:
        A CRC is linear over GF(2): adding `length` zero bytes multiplies it by x^(8·length) modulo the polynomial.
    """
    return _times(_power(8 * length), first) ^ second


_POLYNOMIAL = 0xEDB88320  # of CRC-32; the highest bit is x^0


def _times(a: int, b: int) -> int:
    product = 0
    bit = 1 << 31
    while bit:
        if a & bit:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
        bit >>= 1
    return product


@lru_cache(maxsize=1024)
def _power(exponent: int) -> int:
    """x to a power."""
    result, square = 1 << 31, 1 << 30  # x^0, x^1
    while exponent:
        if exponent & 1:
            result = _times(result, square)
        square = _times(square, square)
        exponent >>= 1
    return result


def _array(content: Content, state: str, atom: str, pad: bool) -> Array:
    if state == MODEL:
        return content.array(atom, MODEL, pad)
    states = content.atoms[atom].pad if pad else content.atoms[atom].states
    return states[state]
