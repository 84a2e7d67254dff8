"""Megatron-core's checkpoint format `torch_dist`: write the tensors of many ranks, read any part of any tensor.

    .metadata      pickle: name -> global shape, dtype, chunks; (name, chunk offset) -> (file, byte offset, byte length)
    __R_0.distcp   records back to back: one `torch.save` zip for each chunk, payload uncompressed
    common.pt      `torch.save` of what is not a tensor
    metadata.json  names the format; its presence means that Megatron's part is whole

Writing happens in the calling process (megatron-core's own writer starts processes, which take seconds to import torch
and outlive a killed rank). Reading needs no process group and no Megatron, maps the files, and unpickles safely.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from cpt.base.errors import UsageError
from cpt.base.files import fsync_folder, write_atomic
from cpt.checkpoint import unpickle
from cpt.checkpoint.manifest import FileFacts

if TYPE_CHECKING:
    import torch

METADATA, COMMON, CONFIG = ".metadata", "common.pt", "metadata.json"
_ALIGN = 64


@dataclass(frozen=True)
class Chunk:
    """A block of a tensor that one rank writes. Shape and offset have the tensor's full rank."""

    key: str
    shape: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]
    size: tuple[int, ...]  # of the block
    data: torch.Tensor  # the block's values, in any shape of as many elements


@dataclass(frozen=True)
class Record:
    """Where a chunk (or, with `shape` None, an object) lies."""

    key: str
    shape: tuple[int, ...] | None
    offset: tuple[int, ...]
    size: tuple[int, ...]
    dtype: str
    file: str
    start: int  # [bytes]
    length: int  # [bytes]


class _Summing:
    """A file that counts and sums what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.position, self.crc = file, 0, 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.file.write(view)
        self.crc = zlib.crc32(view, self.crc)
        self.position += len(view)
        return len(view)

    def flush(self) -> None:
        self.file.flush()


def write_records(
    folder: Path, name: str, chunks: Iterable[Chunk], objects: Mapping[str, Any]
) -> tuple[list[Record], dict[str, FileFacts]]:
    """Write one rank's file of chunks and objects, synced to disk; gives what `finish` needs.

    Raises:
        OSError: as the disk says.
    """
    import torch

    records: list[Record] = []
    with open(folder / name, "wb") as file:
        stream: Any = _Summing(file)
        for chunk in chunks:
            stream.write(bytes(-stream.position % _ALIGN))
            start = stream.position
            data = chunk.data.detach().to("cpu").reshape(chunk.size).contiguous()
            if data.untyped_storage().nbytes() != data.numel() * data.itemsize:
                data = data.clone()  # torch.save writes whole storages
            torch.save(data, stream)
            dtype = str(data.dtype).removeprefix("torch.")
            length = stream.position - start
            records.append(Record(chunk.key, chunk.shape, chunk.offset, chunk.size, dtype, name, start, length))
        for key, value in objects.items():
            start = stream.position
            torch.save([value], stream)
            records.append(Record(key, None, (), (), "", name, start, stream.position - start))
        file.flush()
        os.fsync(file.fileno())
    return records, {name: FileFacts(size=stream.position, crc32=f"{stream.crc:08x}")}


def finish(folder: Path, records: Sequence[Record], common: Mapping[str, Any]) -> dict[str, FileFacts]:
    """Write what ties the ranks' files together; gives size and checksum of each file written here.

    Raises:
        AssertionError: the chunks do not cover each tensor exactly once.
    """
    import torch

    data = io.BytesIO()
    torch.save(dict(common), data)
    config = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    contents = {
        METADATA: pickle.dumps(_dcp_metadata(records)),
        COMMON: data.getvalue(),
        CONFIG: json.dumps(config).encode(),
    }
    for name, content in contents.items():
        write_atomic(folder / name, content)
    fsync_folder(folder)
    return {n: FileFacts(size=len(c), crc32=f"{zlib.crc32(c):08x}") for n, c in contents.items()}


def _dcp_metadata(records: Sequence[Record]) -> Any:
    """torch's own description of the chunks, as torch.distributed.checkpoint and megatron-core read it."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    by_key: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: (r.key, r.offset)):
        by_key.setdefault(record.key, []).append(record)
    described: dict[str, Any] = {}
    stored: dict[Any, Any] = {}
    for key, parts in by_key.items():
        shape = parts[0].shape
        if shape is None:
            assert len(parts) == 1, f"object {key} is written twice"
            described[key] = BytesStorageMetadata()
            stored[MetadataIndex(key)] = _StorageInfo(parts[0].file, parts[0].start, parts[0].length)
            continue
        assert_tiles(key, parts)
        described[key] = TensorStorageMetadata(
            properties=TensorProperties(dtype=getattr(torch, parts[0].dtype)),
            size=torch.Size(shape),
            chunks=[ChunkStorageMetadata(torch.Size(r.offset), torch.Size(r.size)) for r in parts],
        )
        for i, r in enumerate(parts):
            stored[MetadataIndex(key, torch.Size(r.offset), i)] = _StorageInfo(r.file, r.start, r.length)
    return Metadata(state_dict_metadata=described, planner_data={}, storage_data=stored, storage_meta=StorageMeta())


def assert_tiles(key: str, parts: Sequence[Record]) -> None:
    """The chunks have one shape and dtype, lie inside it, do not overlap and add up to the whole."""
    shape = parts[0].shape
    assert shape is not None
    assert len({(r.shape, r.dtype) for r in parts}) == 1, f"ranks disagree about {key}"
    for r in parts:
        inside = all(o >= 0 and o + n <= whole for o, n, whole in zip(r.offset, r.size, shape, strict=True))
        assert inside, f"{key}: a chunk lies outside {shape}"
    assert len({r.offset for r in parts}) == len(parts), f"{key}: a chunk is written twice"
    covered = sum(math.prod(r.size) for r in parts)
    assert covered == math.prod(shape), f"{key}: chunks hold {covered} of {math.prod(shape)} elements"


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint: shape, dtype name and where its chunks lie."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Record, ...]


class Folder:
    """Reads a `torch_dist` checkpoint: any tensor, any block of it, without reading the rest.

    Raises:
        UsageError: the folder is not such a checkpoint, or is unfinished or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._maps: dict[str, mmap.mmap] = {}
        self.tensors = self._read_metadata()

    def __contains__(self, key: object) -> bool:
        return key in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def common(self) -> dict[str, Any]:
        """What `common.pt` holds; tensors in it are records without values, unknown classes inert."""
        path = self.path / COMMON
        try:
            with open(path, "rb") as file:
                value = unpickle.load_zip(file, path)
        except FileNotFoundError:
            raise UsageError(f"`{path}` is missing: the save never finished or the copy is incomplete") from None
        if not isinstance(value, dict):
            raise UsageError(f"`{path}` does not hold a Megatron checkpoint's common part")
        return value

    def read(self, key: str, offset: Sequence[int] | None = None, size: Sequence[int] | None = None) -> torch.Tensor:
        """A block of a tensor, copied; the whole tensor by default. Parts outside the stored shape are zero."""
        import torch

        stored = self.tensors[key]
        size = tuple(stored.shape if size is None else size)
        out = torch.zeros(size, dtype=getattr(torch, stored.dtype))
        self.read_into(out, key, offset)
        return out

    def read_into(self, out: torch.Tensor, key: str, offset: Sequence[int] | None = None) -> None:
        """Copy the block of a tensor that starts at `offset` into `out`, whose shape says how large the block is.

        `out` may lack leading axes of length one, and may have another dtype. What lies outside the stored shape is
        left as it is.
        """
        stored = self.tensors[key]
        rank = len(stored.shape)
        begin = tuple(offset) if offset is not None else (0,) * rank
        view = out.view((1,) * (rank - out.dim()) + tuple(out.shape))
        for chunk in stored.chunks:
            low = [max(a, b) for a, b in zip(begin, chunk.offset, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(begin, view.shape, chunk.offset, chunk.size, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            values = self._chunk(chunk)
            here = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, begin, strict=True))
            there = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, chunk.offset, strict=True))
            view[here].copy_(values[there])

    def raw_object(self, key: str) -> bytes | None:
        """Bytes of an object's record, not interpreted; None when there is no such object."""
        record = self.objects.get(key)
        return None if record is None else bytes(self._map(record.file)[record.start : record.start + record.length])

    def _read_metadata(self) -> dict[str, Tensor]:
        path = self.path / METADATA
        if not path.is_file():
            raise UsageError(f"`{self.path}` is not a Megatron `torch_dist` checkpoint (no `{METADATA}`)")
        if not (self.path / CONFIG).is_file():
            raise UsageError(f"`{self.path}` is an unfinished save (no `{CONFIG}`)")
        with open(path, "rb") as file:
            value = unpickle.load(file, path)
        try:
            described = value.state_dict_metadata
            stored: dict[str, list[tuple[tuple[int, ...], Any]]] = {}
            for index, info in value.storage_data.items():
                stored.setdefault(index.fqn, []).append((tuple(getattr(index, "offset", None) or ()), info))
            self.objects: dict[str, Record] = {}
            tensors = {}
            for key, about in described.items():
                if not hasattr(about, "chunks"):
                    if key in stored:
                        info = stored[key][0][1]
                        self.objects[key] = Record(
                            key, None, (), (), "", info.relative_path, int(info.offset), int(info.length)
                        )
                    continue
                tensors[key] = self._tensor(key, about, dict(stored[key]))
            return tensors
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"`{path}` is not the metadata of a distributed checkpoint: {error}") from None

    def _tensor(self, key: str, about: Any, stored: dict[tuple[int, ...], Any]) -> Tensor:
        shape = tuple(int(n) for n in about.size)
        properties = about.properties
        # Newer torch pickles the properties as a tuple, older ones as fields.
        dtype = getattr(properties, "dtype", None)
        if dtype is None:
            dtype = next(v for v in _flat(properties) if isinstance(v, unpickle.Dtype))
        chunks = []
        for part in about.chunks:
            offset, size = tuple(int(n) for n in part.offsets), tuple(int(n) for n in part.sizes)
            info = stored[offset]
            name = str(info.relative_path)
            if Path(name).name != name:
                raise ValueError(f"`{name}` lies outside the checkpoint")
            chunks.append(Record(key, shape, offset, size, str(dtype), name, int(info.offset), int(info.length)))
        return Tensor(key, shape, str(dtype), tuple(chunks))

    def _map(self, name: str) -> mmap.mmap:
        if name not in self._maps:
            path = self.path / name
            try:
                with open(path, "rb") as file:
                    self._maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise UsageError(f"`{path}` cannot be read: {error}") from None
        return self._maps[name]

    def _chunk(self, record: Record) -> torch.Tensor:
        """The values of a chunk, mapped where possible: nothing is read before it is used."""
        import torch

        data = self._map(record.file)
        where = f"{self.path / record.file}"
        end = record.start + record.length
        if end > len(data):
            raise UsageError(
                f"`{where}` has {len(data):,} bytes, `{record.key}` needs {end:,}: the file was cut off",
                "use an older checkpoint; `cpt ckpt list` shows which are whole",
            )
        view = memoryview(data)[record.start : end]
        start, length = _payload(view, where)
        dtype = getattr(torch, record.dtype)
        numel = math.prod(record.size)
        if numel == 0:
            return torch.empty(record.size, dtype=dtype)
        if length != numel * dtype.itemsize:
            raise UsageError(f"`{where}`: `{record.key}` has {length:,} bytes instead of {numel * dtype.itemsize:,}")
        # Read-only memory: torch warns unless it is told; nothing here writes to it.
        flat = _from_readonly(view[start : start + length], dtype)
        return flat.view(record.size)

    def close(self) -> None:
        """Let go of the mapped files."""
        self._maps.clear()


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, unpickle.Inert):
        yield from _flat(value.args)
        yield from _flat(list(vars(value).values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _from_readonly(view: memoryview, dtype: torch.dtype) -> torch.Tensor:
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.frombuffer(view, dtype=dtype)


class _View(io.RawIOBase):
    """A seekable file over a memoryview, without copying it."""

    def __init__(self, view: memoryview) -> None:
        self.view, self.at = view, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = max(0, offset + (0, self.at, len(self.view))[whence])
        return self.at

    def tell(self) -> int:
        return self.at

    def read(self, size: int = -1) -> bytes:
        end = len(self.view) if size is None or size < 0 else self.at + size
        data = bytes(self.view[self.at : end])
        self.at += len(data)
        return data


def _payload(record: memoryview, where: str) -> tuple[int, int]:
    """Start and length of the values inside a `torch.save` record of one plainly stored tensor [bytes]."""
    try:
        archive = zipfile.ZipFile(_View(record))
        names = archive.namelist()
        tensor = unpickle.load(io.BytesIO(archive.read(next(n for n in names if n.endswith("data.pkl")))), where)
        if not isinstance(tensor, unpickle.TensorRecord) or not tensor.is_contiguous:
            raise UsageError(f"`{where}` holds a record that is not one plain tensor")
        info = archive.getinfo(next(n for n in names if n.endswith(f"data/{tensor.storage.key}")))
        if any(n.endswith("byteorder") and archive.read(n) != b"little" for n in names):
            raise UsageError(f"`{where}` was written on a big-endian machine, which is not supported")
        if info.compress_type != zipfile.ZIP_STORED:
            raise UsageError(f"`{where}` holds compressed records, which are not supported")
        name_length, extra_length = struct.unpack("<HH", record[info.header_offset + 26 : info.header_offset + 30])
        return info.header_offset + 30 + name_length + extra_length, info.file_size
    except (zipfile.BadZipFile, StopIteration, struct.error, OSError, EOFError) as error:
        raise UsageError(f"`{where}` is damaged: {error or type(error).__name__}") from None
