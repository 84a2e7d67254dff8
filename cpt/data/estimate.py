"""How large a source probably is, from the sizes of its files and the beginning of the first and the last one."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt.base.errors import UsageError
from cpt.data import readers
from cpt.data.pieces import file_kind, pieces, texts
from cpt.plan.types import Source, SourceFacts, Tokenizer

_LOOK = 1 << 17  # bytes of a file that are looked at
_ENCODE = 1 << 15  # characters that are encoded to learn the bytes of a token
_BYTES_PER_TOKEN = 4.0  # without a tokenizer, of a common vocabulary


@dataclass(frozen=True)
class Look:
    """What the beginning of a file shows. `share`: bytes of the file that it was taken from."""

    texts: Sequence[str]
    share: float


def estimate(source: Source, tokenizer: Tokenizer | None = None) -> SourceFacts:
    """Size of a source, marked as an estimate.

    Raises:
        UsageError: no file has any bytes; a file that cannot be read, or whose first documents are broken.
    """
    reader = readers.reader(source)
    if reader.wants_paths and readers.is_megatron(source.paths):
        return _megatron(source)
    if reader.wants_paths:
        size, documents, sample = _size(source)
    else:
        (size, documents), sample = reader.size(source), []
    held_out = 0.0 if source.valid_paths else source.valid
    tokens = int(size / _bytes_per_token(sample, tokenizer)) + documents
    return SourceFacts(
        tokens=int(tokens * (1 - held_out)),
        documents=max(1, int(documents * (1 - held_out))),
        bytes=int(size * (1 - held_out)),
        valid_tokens=int(tokens * held_out),
    )


def _size(source: Source) -> tuple[int, int, list[str]]:
    """Bytes of text and documents of all files, and some texts."""
    if not source.paths:
        return 0, 0, []
    sizes = {path: readers.stat_file(path)[1] for path in source.paths}
    filled = [path for path, size in sizes.items() if size]
    if not filled:
        raise UsageError(f"`{source.paths[0]}` is empty" if len(sizes) == 1 else f"all {len(sizes)} files are empty")
    total = sum(sizes.values())
    looks = [_look(path, source.text) for path in {filled[0]: 0, filled[-1]: 0}]
    sample = [text for look in looks for text in look.texts]
    share = sum(look.share for look in looks)
    if not share or (share >= total and not any(text.strip() for text in sample)):
        return 0, 0, []
    read = sum(len(text.encode("utf-8", "replace")) for text in sample)
    return int(total * read / share), max(1, round(total * len(sample) / share)), sample


def _look(path: str, text: str) -> Look:
    kind, packed = file_kind(path)
    size = Path(path).stat().st_size
    if kind == "parquet":
        return _look_parquet(path, text, size)
    if kind == "text":
        return Look(_first(path, text), size) if size < 64 * _LOOK else Look(["x" * size], size)
    if kind == "arrow":
        return _look_arrow(path, text, size)
    with open(path, "rb") as file:
        head = file.read(_LOOK)
    data = {"gzip": _gunzip, "zstd": _unzstd}[packed](head) if packed else head
    lines = data if len(head) == size else data[: data.rfind(b"\n") + 1]
    found = [value for value in (_text(line, text) for line in lines.splitlines()) if value is not None]
    if not found:  # one very long line, or a broken one: the reader finds out
        return Look(_first(path, text), size)
    return Look(found, len(head) * len(lines) / max(1, len(data)))


def _first(path: str, text: str) -> Sequence[str]:
    """Texts of the first piece of a file, as the reader finds them; none in a file without documents."""
    piece = next(pieces([path], text), None)
    return texts(piece, text) if piece is not None else []


def _text(line: bytes, text: str) -> str | None:
    try:
        value = json.loads(line)[text]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return value if isinstance(value, str) else None


def _gunzip(head: bytes) -> bytes:
    found = b""
    try:
        while head:  # a file may be several put together
            member = zlib.decompressobj(31)
            found += member.decompress(head)
            head = member.unused_data
    except zlib.error:
        pass
    return found


def _unzstd(head: bytes) -> bytes:
    import pyarrow as pa

    found = b""
    try:
        with pa.CompressedInputStream(pa.BufferReader(head), "zstd") as stream:
            while data := stream.read(1 << 16):
                found += data
    except (OSError, pa.ArrowException):
        pass  # the head ends within a block
    return found


def _look_parquet(path: str, text: str, size: int) -> Look:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if text not in file.schema_arrow.names or not file.metadata.num_rows:
                return Look(_first(path, text), size)
            batch: Any = next(file.iter_batches(256, columns=[text], use_threads=False))
            found = [value or "" for value in batch.column(0).to_pylist()]
            return Look(found, size * len(found) / file.metadata.num_rows)
    except (pa.ArrowException, OSError, StopIteration) as error:
        raise UsageError(f"`{path}` is damaged or not what its name says: {str(error).splitlines()[0]}") from None


def _look_arrow(path: str, text: str, size: int) -> Look:
    import pyarrow as pa

    try:
        with pa.memory_map(path) as source:
            try:
                reader: Any = pa.ipc.open_file(source)
                batch, share = reader.get_batch(0), size / reader.num_record_batches
                found = [value or "" for value in batch.column(text)[:2000].to_pylist()]
                return Look(found, share * len(found) / max(1, batch.num_rows))
            except pa.ArrowInvalid:
                source.seek(0)
            found = []
            for batch in pa.ipc.open_stream(source):
                found += [value or "" for value in batch.column(text).to_pylist()]
                if source.tell() > _LOOK:
                    break
            return Look(found, source.tell())
    except (pa.ArrowException, OSError, KeyError, StopIteration, ZeroDivisionError):
        return Look(_first(path, text), size)


def _megatron(source: Source) -> SourceFacts:
    """Size of existing Megatron data: known but for the held-out share."""
    from cpt.data.shards import Shard

    shard = Shard(readers.pair(source.paths[0])[0].removesuffix(".bin"))
    kept = 1 - (0.0 if source.valid_paths else source.valid)
    return SourceFacts(
        tokens=int(shard.tokens * kept),
        documents=int(len(shard) * kept),
        bytes=int(shard.tokens * kept * _BYTES_PER_TOKEN),
        valid_tokens=int(shard.tokens * (1 - kept)),
    )


def _bytes_per_token(sample: Sequence[str], tokenizer: Tokenizer | None) -> float:
    if tokenizer is not None and tokenizer.path is not None:
        from cpt.data.tokenizer import load, vocab_size

        if sample:
            text = "\n".join(sample)[:_ENCODE]
            ids = load(tokenizer.path).encode(text, add_special_tokens=False).ids
            return max(1, len(text.encode("utf-8", "replace"))) / max(1, len(ids))
        size: int | None = vocab_size(tokenizer.path)
    else:
        size = tokenizer.vocab_size if tokenizer else None
    return _BYTES_PER_TOKEN if size is None or size > 16_384 else 3.2 if size > 2048 else 2.0
