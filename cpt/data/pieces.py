"""Raw files cut into pieces that are read independently, so that several processes share one file in bounded memory.

    plain JSON lines      a range of bytes; the reader begins after the first line end
    .gz / .zst            lines unpacked by whoever cuts (a compressed stream has one reader)
    Parquet               a row group; one of more than `LARGE_GROUP` bytes is cut into tables
    Arrow                 tables
    text                  a few files; each is one document

A piece gives texts in the order of the file, and the order of pieces is the order of the corpus.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt.base.errors import UsageError

PIECE_BYTES = 4 << 20
LARGE_GROUP = 64 << 20
PACKED = {".gz": "gzip", ".zst": "zstd"}
KINDS = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "lines",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
    ".bin": "megatron",
    ".idx": "megatron",
}


@dataclass(frozen=True)
class Piece:
    """A part of the raw files; picklable.

    `kind`: range (bytes `start` to `stop` of a file of lines), lines (`data`, of which the first is line `start`),
    group (row group `start`), table (`data` is an Arrow stream whose first row is `start`), text (whole files).
    """

    kind: str
    paths: tuple[str, ...]
    start: int = 0
    stop: int = 0
    data: bytes | None = None
    size: int = 0  # about so many bytes of the raw files


def file_kind(path: str) -> tuple[str, str | None]:
    """What a file holds (lines, parquet, arrow, text, megatron) and how it is packed (gzip, zstd, None), by its name.

    Raises:
        UsageError: no known suffix.
    """
    suffixes = [s.lower() for s in Path(path).suffixes]
    packed = PACKED.get(suffixes[-1]) if suffixes else None
    if packed:
        suffixes.pop()
    kind = KINDS.get(suffixes[-1]) if suffixes else None
    if kind is None or (packed and kind not in ("lines", "text")):
        known = "`.jsonl`, `.jsonl.gz`, `.jsonl.zst`, `.parquet`, `.arrow`, `.txt`"
        raise UsageError(f"cannot tell how to read `{path}` by its name", f"known: {known}")
    return kind, packed


def pieces(paths: Sequence[str], text: str, piece_bytes: int = PIECE_BYTES) -> Iterator[Piece]:
    """Cut files into pieces, in order.

    Args:
        paths: absolute files.
        text: column that holds the text.
        piece_bytes: aim for the size of a piece.
    """
    small: list[str] = []
    small_bytes = 0
    for path in paths:
        kind, packed = file_kind(path)
        size = _size(path)
        if small and (kind != "text" or small_bytes + size > piece_bytes):
            yield Piece("text", tuple(small), size=small_bytes)
            small, small_bytes = [], 0
        if kind == "text":
            small.append(path)
            small_bytes += size
        elif kind == "lines" and packed is None:
            for start in range(0, size, piece_bytes):
                stop = min(start + piece_bytes, size)
                yield Piece("range", (path,), start, stop, size=stop - start)
        elif kind == "lines":
            yield from _packed_lines(path, packed, piece_bytes)
        elif kind == "parquet":
            yield from _row_groups(path, text, piece_bytes)
        else:
            yield from _tables(path, _arrow_batches(path, text), text, piece_bytes, size)
    if small:
        yield Piece("text", tuple(small), size=small_bytes)


def texts(piece: Piece, text: str) -> list[str]:
    """The documents of a piece. A null text is an empty document.

    Args:
        piece: from `pieces`.
        text: column that holds the text.

    Raises:
        UsageError: a broken line, row or file, named.
    """
    path = piece.paths[0]
    if piece.kind == "range":
        data = _range(path, piece.start, piece.stop)
        return _lines(data, path, text, lambda: _line_number(path, piece.start))
    if piece.kind == "lines":
        return _lines(piece.data or b"", path, text, lambda: piece.start)
    if piece.kind == "group":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path) as file:
                table = file.read_row_group(piece.start, columns=[text], use_threads=False)
                return _strings(table.column(0), path, text)
        except (pa.ArrowException, OSError) as error:
            raise _broken(path, error, f" in row group {piece.start}") from None
    if piece.kind == "table":
        import pyarrow as pa

        table = pa.ipc.open_stream(piece.data).read_all()
        return _strings(table.column(0), path, text)
    return [_file_text(p) for p in piece.paths]


def records(path: str, text: str) -> Iterator[tuple[str, str]]:
    """Documents of one file as (id, text): the `id` column where there is one, else `<file name>:<number from 0>`."""
    kind, packed = file_kind(path)
    if kind == "lines":
        number = 0
        for line_number, line in enumerate(_open(path, packed), 1):
            if line.strip():
                value = _value(line, path, line_number)
                yield str(value.get("id", f"{Path(path).name}:{number}")), _text(value, path, line_number, text)
                number += 1
        return
    number = 0
    for piece in pieces([path], text):
        for found in texts(piece, text):
            yield f"{Path(path).name}:{number}", found
            number += 1


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError as error:
        raise UsageError(f"cannot read `{path}`: {error.strerror}") from None


def _broken(path: str, error: object, where: str = "") -> UsageError:
    why = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UsageError(f"`{path}` is damaged or not what its name says{where}: {why}")


def _open(path: str, packed: str | None) -> Any:
    """The bytes of a file, unpacked."""
    try:
        if packed == "gzip":
            return gzip.open(path, "rb")
        if packed == "zstd":
            import pyarrow as pa

            return io.BufferedReader(_Unpacked(pa.input_stream(path, compression="zstd")), 1 << 20)
        return open(path, "rb")
    except OSError as error:
        raise UsageError(f"cannot read `{path}`: {error.strerror or error}") from None


class _Unpacked(io.RawIOBase):
    """An Arrow input stream as a raw Python one."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _packed_lines(path: str, packed: str | None, piece_bytes: int) -> Iterator[Piece]:
    rest = b""
    line = 1
    total, read = _size(path), 0
    with _open(path, packed) as file:
        while True:
            try:
                data = file.read(piece_bytes)
            except (OSError, EOFError, zlib.error, ValueError) as error:
                raise _broken(path, error, f" after line {line + rest.count(10)}") from None
            block = rest + data
            cut = len(block) if not data else block.rfind(b"\n") + 1
            rest = block[cut:]
            if cut:
                share = min(total - read, max(1, cut // 4))  # what is unpacked is about four times as long
                yield Piece("lines", (path,), line, data=block[:cut], size=share)
                read += share
                line += block.count(b"\n", 0, cut)
            if not data:
                return


def _range(path: str, start: int, stop: int) -> bytes:
    """The lines that begin in bytes `start` to `stop`."""
    try:
        with open(path, "rb") as file:
            if start:
                file.seek(start - 1)
                file.readline()
            begin = file.tell()
            if begin >= stop:
                return b""
            data = file.read(stop - begin)
            return data if data.endswith(b"\n") else data + file.readline()
    except OSError as error:
        raise UsageError(f"cannot read `{path}`: {error.strerror}") from None


def _line_number(path: str, start: int) -> int:
    """Number of the first line that begins at byte `start` or later."""
    if not start:
        return 1
    number, left = 1, start - 1
    with open(path, "rb") as file:
        while left and (data := file.read(min(left, 1 << 20))):
            number += data.count(b"\n")
            left -= len(data)
        file.readline()
    return number + 1


def _lines(data: bytes, path: str, text: str, first: Any) -> list[str]:
    found = []
    loads = json.loads
    for number, line in enumerate(data.split(b"\n")):
        if not line or line.isspace():
            continue
        try:
            value = loads(line)[text]
            if type(value) is not str:
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            line_number = first() + number
            value = _text(_value(line, path, line_number), path, line_number, text)
        found.append(value)
    return found


def _value(line: bytes, path: str, number: int) -> dict[str, Any]:
    """The JSON object in a line, or the error that names file and line."""
    place = f"`{path}` line {number}"
    try:
        value = json.loads(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
    except UnicodeDecodeError:
        raise UsageError(f"{place} is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        why = getattr(error, "msg", "nested too deeply")
        hint = () if number > 1 or line[:1] != b"[" else ("one JSON object a line is wanted, not one list",)
        raise UsageError(f"{place} is not JSON: {why}", *hint) from None
    if not isinstance(value, dict):
        hint = ("one JSON object a line is wanted, not one list",) if isinstance(value, list) else ()
        raise UsageError(f"{place} is not a JSON object", *hint)
    return value


def _text(value: dict[str, Any], path: str, number: int, text: str) -> str:
    if text not in value:
        raise _no_column(f"`{path}` line {number}", text, value)
    found = value[text]
    if found is not None and not isinstance(found, str):
        raise UsageError(f"`{path}` line {number}: `{text}` is not a text but {type(found).__name__}")
    return found or ""


def _no_column(place: str, text: str, known: Any) -> UsageError:
    from cpt.base.registry import nearest

    names = [str(k) for k in known]
    near = nearest(text, names)
    hint = f"did you mean `{near}`?" if near else "it has " + ", ".join(f"`{n}`" for n in names[:12])
    return UsageError(f"{place} has no column `{text}`", f"{hint} (the key `text` of the source names the column)")


def _row_groups(path: str, text: str, piece_bytes: int) -> Iterator[Piece]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if text not in file.schema_arrow.names:
                raise _no_column(f"`{path}`", text, file.schema_arrow.names)
            meta = file.metadata
            total = max(1, sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)))
            size = _size(path)
            for i in range(meta.num_row_groups):
                group = meta.row_group(i)
                share = size * group.total_byte_size // total
                if group.total_byte_size <= LARGE_GROUP:
                    yield Piece("group", (path,), i, size=share)
                else:
                    rows = max(1, group.num_rows * piece_bytes // group.total_byte_size)
                    batches = file.iter_batches(rows, row_groups=[i], columns=[text], use_threads=False)
                    yield from _tables(path, batches, text, piece_bytes, share)
    except (pa.ArrowException, OSError) as error:
        raise _broken(path, error) from None


def _arrow_batches(path: str, text: str) -> Iterator[Any]:
    import pyarrow as pa

    try:
        with pa.memory_map(path) as source:
            try:
                reader: Any = pa.ipc.open_file(source)
                batches: Any = (reader.get_batch(i) for i in range(reader.num_record_batches))
            except pa.ArrowInvalid:
                source.seek(0)
                reader = pa.ipc.open_stream(source)
                batches = iter(reader)
            if text not in reader.schema.names:
                raise _no_column(f"`{path}`", text, reader.schema.names)
            for batch in batches:
                yield batch.select([text])
    except (pa.ArrowException, OSError) as error:
        raise _broken(path, error) from None


def _tables(path: str, batches: Iterator[Any], text: str, piece_bytes: int, size: int) -> Iterator[Piece]:
    """Record batches of one column as pieces of about `piece_bytes`."""
    import pyarrow as pa

    first = 0
    for batch in batches:
        step = max(1, batch.num_rows * piece_bytes // max(1, batch.get_total_buffer_size()))
        for start in range(0, batch.num_rows, step):
            part = batch.slice(start, step)
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, part.schema) as writer:
                writer.write_batch(part)
            data = sink.getvalue().to_pybytes()
            yield Piece("table", (path,), first, data=data, size=min(size, len(data)))
            size = max(0, size - len(data))
            first += part.num_rows


def _strings(column: Any, path: str, text: str) -> list[str]:
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise UsageError(f"`{path}`: column `{text}` holds {column.type}, not text")
    try:
        return [value or "" for value in column.to_pylist()]
    except UnicodeDecodeError:
        raise UsageError(f"`{path}`: column `{text}` is not UTF-8") from None


def _file_text(path: str) -> str:
    try:
        with _open(path, file_kind(path)[1]) as file:
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"`{path}` is not UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise _broken(path, error) from None
