"""Writes one planned file, block by block: memory is a few blocks, whatever the file's size. No torch."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cpt.base.errors import UsageError
from cpt.checkpoint.arrays import CARRIERS, Array, Crc, Files, OutFile, Payload, itemsize, part_bytes
from cpt.checkpoint.content import MODEL, Content
from cpt.checkpoint.crc32 import crc32, crc32_of_both

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


@dataclass(frozen=True, kw_only=True)
class Mark:
    """How far a file is, and the sums of its first bytes.

    Args:
        size: how many are written [bytes].
        parts: parts of the plan that are whole.
        total: CRC-32 of those.
        inside: what there is of the payload after them [bytes].
        crc: CRC-32 of that.
        sums: CRC-32 of each payload that is whole.
    """

    size: int
    parts: int
    total: int
    inside: int
    crc: int
    sums: tuple[int, ...]

    @property
    def crc32(self) -> int:
        """Of all that is written."""
        return crc32_of_both(self.total, self.crc, self.inside)


class Written:
    """What a file holds so far, and the sums of it."""

    def __init__(self, out: OutFile) -> None:
        self.sha = hashlib.sha256() if out.sha256 else None
        self.size = 0  # [bytes]
        self.parts = 0  # that are whole
        self.sums: list[int] = []  # CRC-32 of payloads that are whole
        self.inside = 0  # of the payload after the whole parts [bytes]
        self._total = self._crc = 0  # CRC-32 of the whole parts, and of the payload after them

    @property
    def mark(self) -> Mark:
        """How far it is."""
        return Mark(
            size=self.size,
            parts=self.parts,
            total=self._total,
            inside=self.inside,
            crc=self._crc,
            sums=tuple(self.sums),
        )

    @classmethod
    def up_to(cls, out: OutFile, mark: Mark) -> Written | None:
        """What a file holds that nobody has touched since its mark; None where the mark does not fit the file, or a
        SHA-256 is wanted, which needs the bytes themselves."""
        whole = out.parts[: mark.parts]
        fits = sum(map(part_bytes, whole)) + mark.inside == mark.size
        if out.sha256 or not fits or len(mark.sums) != sum(isinstance(p, Payload) for p in whole):
            return None
        written = cls(out)
        written.size, written.parts, written.inside = mark.size, mark.parts, mark.inside
        written.sums, written._total, written._crc = [*mark.sums], mark.total, mark.crc
        return written

    def text(self, data: bytes) -> None:
        """Count a part that is no payload."""
        self._total = crc32(data, self._total)
        self.parts += 1
        self._count(memoryview(data))

    def values(self, view: memoryview) -> None:
        """Count bytes of a payload."""
        self._crc = crc32(view, self._crc)
        self.inside += len(view)
        self._count(view)

    def end(self) -> None:
        """The payload is whole."""
        self.sums.append(self._crc)
        self._total = crc32_of_both(self._total, self._crc, self.inside)
        self.parts += 1
        self._crc = self.inside = 0

    def _count(self, view: memoryview) -> None:
        if self.sha is not None:
            self.sha.update(view)
        self.size += len(view)


Begin = Callable[[Payload, int], None]
Watch = Callable[[Payload, np.ndarray[Any, Any]], None]
After = Callable[[Written, Payload | None], None]


def write_file(
    out: OutFile,
    content: Content,
    folder: Path,
    files: Files,
    *,
    block: int = BLOCK,
    begin: Begin | None = None,
    watch: Watch | None = None,
    after: After | None = None,
    there: Written | None = None,
) -> FileSums:
    """Write and sync one file.

    Args:
        begin: called with each payload before its values are read, and how many of them are there; may raise to stop.
        watch: called with each block's values (a flat array of the dtype's carrier) and its payload, before it is
            written: checks of values; may raise to stop.
        after: called with what is written and the payload after each block, and with None before the file is synced:
            progress; may raise to stop.
        there: what an earlier run has written; the file goes on from there.
    """
    path = folder / out.name
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = np.empty(min(block, _IN_CACHE), np.uint8)
    written = there or Written(out)
    with open(path, "r+b" if there else "wb", buffering=0) as file:
        file.truncate(written.size)
        put = _Put(file, written)
        for part in out.parts[written.parts :]:
            if isinstance(part, Crc):
                put.text(written.sums[part.of].to_bytes(4, "little"))
            elif isinstance(part, Payload):
                first = written.inside // itemsize(part.dtype)
                if begin is not None:
                    begin(part, first)
                for values in blocks(part, content, files, buffer, first):
                    if watch is not None:
                        watch(part, values)
                    put.values(values)
                    if after is not None:
                        after(written, part)
                written.end()
            else:
                put.text(part)
        if after is not None:
            after(written, None)
        os.fsync(file.fileno())
    sha = None if written.sha is None else written.sha.hexdigest()
    return FileSums(size=written.size, crc32=written.mark.crc32, payloads=tuple(written.sums), sha256=sha)


def read_again(out: OutFile, folder: Path, mark: Mark, turn: Callable[[], None] = lambda: None) -> Written | None:
    """What a file holds up to a mark; None when it is not what was written, and after a power cut it need not be.

    Args:
        turn: called after every block; may raise to stop.
    """
    written = Written(out)
    buffer = memoryview(bytearray(_IN_CACHE))
    with contextlib.suppress(OSError), open(folder / out.name, "rb", buffering=0) as file:
        for part in out.parts:
            size = min(part_bytes(part), mark.size - written.size)
            if isinstance(part, Payload):
                while left := size - written.inside:
                    if not (read := file.readinto(buffer[:left])):
                        return None
                    written.values(buffer[:read])
                    turn()
                if size == part.nbytes:
                    written.end()
                elif size % itemsize(part.dtype):
                    return None
            elif size == part_bytes(part):
                written.text(file.read(size))
            if written.size == mark.size or size < part_bytes(part):
                break
        return written if (written.size, written.mark.crc32) == (mark.size, mark.crc32) else None
    return None


class _Put:
    """Writes bytes and has them counted."""

    def __init__(self, file: io.FileIO, written: Written) -> None:
        self.file, self.written = file, written
        self.begun = written.size  # bytes on their way to the disk
        file.seek(written.size)

    def text(self, data: bytes) -> None:
        self._write(memoryview(data))
        self.written.text(data)

    def values(self, values: np.ndarray[Any, Any]) -> None:
        view = memoryview(values.view(np.uint8).data)
        self._write(view)
        self.written.values(view)
        if self.written.size - self.begun >= _EARLY:
            _start_writing(self.file.fileno(), self.begun, self.written.size - self.begun)
            self.begun = self.written.size

    def _write(self, view: memoryview) -> None:
        while len(view):
            view = view[self.file.write(view) :]


def blocks(
    payload: Payload, content: Content, files: Files, buffer: np.ndarray[Any, Any], start: int = 0
) -> Iterator[np.ndarray[Any, Any]]:
    """The values of a payload as flat arrays that fit into the buffer; each is valid until the next, and not to be
    written to. They are whole rows of a segment, or parts of one row where it is longer than the buffer.

    Args:
        start: values that are left out. After the end of a block the same blocks follow as without.
    """
    array_of = partial(_array, content, payload.state)
    width = itemsize(payload.dtype)
    room = max(1, len(buffer) // width)
    carrier = CARRIERS[payload.dtype]
    place = buffer[: room * width].view(carrier) if len(buffer) >= width else np.empty(1, carrier)
    try:
        for segment in payload.segments:
            if start and start >= segment.rows * segment.columns:
                start -= segment.rows * segment.columns
                continue
            step = room // max(1, segment.columns)
            first, begun = divmod(start, max(1, segment.columns))
            start = 0
            if begun and step:  # blocks were smaller than a row, and are larger now
                rest = place[: segment.columns - begun]
                files.fill(segment, first, first + 1, array_of, rest[None], payload.dtype, begun)
                first += 1
                yield rest
            while first < segment.rows and step:
                last = min(first + step, segment.rows)
                values = files.lying(segment, first, last, array_of, payload.dtype, room // 4)
                if values is None:
                    values = place[: (last - first) * segment.columns]
                    files.fill(segment, first, last, array_of, values.reshape(last - first, -1), payload.dtype)
                first += len(values) // segment.columns
                yield values
            for row in range(first, segment.rows if not step else 0):
                for column in range(begun if row == first else 0, segment.columns, room):
                    values = place[: min(room, segment.columns - column)]
                    files.fill(segment, row, row + 1, array_of, values[None], payload.dtype, column)
                    yield values
    except UsageError as error:
        raise UsageError(f"`{payload.name}`: {error.message}", *error.hints) from None


def _start_writing(descriptor: int, start: int, length: int) -> None:
    """Send a part of a file to the disk without waiting, so that less is left for the end; where the system can."""
    if _sync_file_range is not None:
        _sync_file_range(descriptor, ctypes.c_int64(start), ctypes.c_int64(length), 2)  # SYNC_FILE_RANGE_WRITE


_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None


def _array(content: Content, state: str, atom: str, pad: bool) -> Array:
    if state == MODEL:
        return content.array(atom, MODEL, pad)
    states = content.atoms[atom].pad if pad else content.atoms[atom].states
    return states[state]
