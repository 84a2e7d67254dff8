"""Some documents of a source, up to a number of bytes, without reading all of a large one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cpt.base.errors import UsageError
from cpt.data import pieces, readers, split
from cpt.plan.types import Source

READ = 8  # times the budget is read at most, to choose among
PIECE_BYTES = 1 << 18


def documents(source: Source, num_bytes: int, cache: str | Path) -> list[str]:
    """Documents chosen by their hash among what was read of a source, the last one cut at the budget.

    Files are read in turns, a piece of each, so that several of them count; parts of plain JSON lines and of Parquet
    come from everywhere in the file.

    Args:
        num_bytes: budget [UTF-8 bytes].

    Raises:
        UsageError: no text, or files that hold tokens.
    """
    paths = readers.files(source, cache)
    if readers.is_megatron(paths):
        raise UsageError(f"source `{source.name}` holds tokens of another tokenizer, and text is wanted")
    read, size = [], 0
    for piece in _in_turns(paths, source.text):
        for text in pieces.texts(piece, source.text):
            if text:
                text, data = split.utf8(text)
                read.append((split.document_hash(data), text, len(data)))
                size += len(data)
        if size >= READ * num_bytes:
            break
    if not size:
        raise UsageError(f"source `{source.name}` has no text")
    found, left = [], num_bytes
    for _, text, length in sorted(read):
        if length > left:
            text = text.encode()[:left].decode("utf-8", "ignore")
        if text:
            found.append(text)
        left -= length
        if left <= 0:
            break
    return found


def _in_turns(paths: tuple[str, ...], text: str) -> Iterator[pieces.Piece]:
    waiting = [_scattered(path, text) for path in sorted(paths, key=lambda p: split.document_hash(p.encode()))]
    while waiting:
        for pieces_of_file in list(waiting):
            piece = next(pieces_of_file, None)
            if piece is None:
                waiting.remove(pieces_of_file)
            else:
                yield piece


def _scattered(path: str, text: str) -> Iterator[pieces.Piece]:
    """The pieces of a file; in mixed order where they can be read one without the other."""
    kind, packed = pieces.file_kind(path)
    found = pieces.pieces([path], text, PIECE_BYTES)
    if kind == "lines" and packed is None:
        yield from sorted(found, key=lambda p: split.document_hash(str(p.start).encode()))
    else:
        yield from found
