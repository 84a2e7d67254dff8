"""Writes one planned file, block by block: memory is a few blocks, whatever the file's size. No torch."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cpt.base.errors import UsageError
from cpt.checkpoint.arrays import CARRIERS, Array, Crc, Files, OutFile, Payload, itemsize
from cpt.checkpoint.content import MODEL, Content

BLOCK = 64 << 20  # [bytes]


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
    out: OutFile, content: Content, folder: Path, files: Files, *, block: int = BLOCK, watch: Watch | None = None
) -> FileSums:
    """Write and sync one file.

    Args:
        watch: called with each block's values (a flat array of the dtype's carrier) and its payload, before it is
            written: checks of values, progress; may raise to stop.
    """
    path = folder / out.name
    path.parent.mkdir(parents=True, exist_ok=True)
    total, size = 0, 0
    sums: list[int] = []
    buffer = np.empty(block, np.uint8)
    sha = hashlib.sha256() if out.sha256 else None
    with open(path, "wb", buffering=0) as file:

        def put(data: Any) -> None:
            nonlocal total, size
            view = memoryview(data).cast("B")
            total = zlib.crc32(view, total)
            size += len(view)
            if sha is not None:
                sha.update(view)
            while len(view):
                view = view[file.write(view) :]

        for part in out.parts:
            if isinstance(part, Crc):
                put(sums[part.of].to_bytes(4, "little"))
            elif isinstance(part, Payload):
                crc = 0
                for values in blocks(part, content, files, buffer):
                    if watch is not None:
                        watch(part, values)
                    crc = zlib.crc32(values.view(np.uint8), crc)
                    put(values.view(np.uint8))
                sums.append(crc)
            else:
                put(part)
        os.fsync(file.fileno())
    return FileSums(size=size, crc32=total, payloads=tuple(sums), sha256=None if sha is None else sha.hexdigest())


def blocks(payload: Payload, content: Content, files: Files, buffer: np.ndarray[Any, Any]) -> Any:
    """The values of a payload as flat arrays that fit into the buffer; each is valid until the next."""
    array_of = partial(_array, content, payload.state)
    width = itemsize(payload.dtype)
    room = max(1, len(buffer) // width)
    carrier = CARRIERS[payload.dtype]
    for segment in payload.segments:
        if segment.columns > room:  # a row longer than the buffer
            buffer = np.empty(segment.columns * width, np.uint8)
            room = segment.columns
        rows = max(1, room // max(1, segment.columns))
        for first in range(0, segment.rows, rows):
            last = min(first + rows, segment.rows)
            count = (last - first) * segment.columns
            out = buffer[: count * width].view(carrier).reshape(last - first, segment.columns)
            try:
                files.fill(segment, first, last, array_of, out, payload.dtype)
            except UsageError as error:
                raise UsageError(f"`{payload.name}`: {error.message}", *error.hints) from None
            yield out.reshape(-1)


def _array(content: Content, state: str, atom: str, pad: bool) -> Array:
    if state == MODEL:
        return content.array(atom, MODEL, pad)
    states = content.atoms[atom].pad if pad else content.atoms[atom].states
    return states[state]
