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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from cpt.base import pulse
from cpt.base.errors import UsageError
from cpt.base.files import fsync_folder, why_unreadable, write_atomic
from cpt.checkpoint import torch_zip, unpickle
from cpt.checkpoint.arrays import CARRIERS, convert, itemsize
from cpt.checkpoint.crc32 import crc32
from cpt.checkpoint.manifest import FileFacts
from cpt.checkpoint.unpickle import Dtype

if TYPE_CHECKING:
    import torch

METADATA, COMMON, CONFIG = ".metadata", "common.pt", "metadata.json"
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
COMMON_OBJECT = "common_state/shard_0_1"  # what newer versions of megatron-core (0.19) have instead of `common.pt`
_ALIGN = 64
_ORIGINAL = "nd_reformulated_orig_global_shape"  # of tensors that were saved as flat pieces (megatron-core to 0.14)


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
    """A file that counts and sums what is written to it, and remembers why it could not be."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.position, self.crc = file, 0, 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            self.file.write(view)
        except OSError as error:
            self.error = error
            raise
        self.crc = crc32(view, self.crc)
        self.position += len(view)
        return len(view)

    def flush(self) -> None:
        self.file.flush()


def _save(value: Any, stream: Any) -> None:
    """Append a file as torch.save writes it.

    Raises:
        OSError: as the disk says; torch closes its zip after a write that failed, and complains about that instead.
    """
    import torch

    try:
        torch.save(value, stream)
    except RuntimeError:
        if stream.error is not None:
            raise stream.error from None
        raise


def write_records(
    folder: Path, name: str, chunks: Iterable[Chunk], objects: Mapping[str, Any]
) -> tuple[list[Record], dict[str, FileFacts]]:
    """Write one rank's file of chunks and objects, synced to disk; gives what `finish` needs.

    Raises:
        OSError: as the disk says.
    """
    records: list[Record] = []
    with open(folder / name, "wb") as file:
        stream: Any = _Summing(file)
        for chunk in chunks:
            stream.write(bytes(-stream.position % _ALIGN))
            start = stream.position
            data = chunk.data.detach().to("cpu").reshape(chunk.size).contiguous()
            if data.untyped_storage().nbytes() != data.numel() * data.itemsize:
                data = data.clone()  # torch.save writes whole storages
            _save(data, stream)
            pulse.current.tick()
            dtype = str(data.dtype).removeprefix("torch.")
            length = stream.position - start
            records.append(Record(chunk.key, chunk.shape, chunk.offset, chunk.size, dtype, name, start, length))
        for key, value in objects.items():
            start = stream.position
            _save([value], stream)
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
    contents = {
        METADATA: metadata(records),
        COMMON: data.getvalue(),
        CONFIG: json.dumps(BACKEND).encode(),
    }
    for name, content in contents.items():
        write_atomic(folder / name, content)
    fsync_folder(folder)
    return {n: FileFacts(size=len(c), crc32=f"{crc32(c):08x}") for n, c in contents.items()}


def metadata(records: Sequence[Record]) -> bytes:
    """torch's own description of the chunks, as torch.distributed.checkpoint and megatron-core read it.

    Raises:
        AssertionError: the chunks do not cover each tensor exactly once.

    Source: torch 2.13, `distributed/checkpoint/metadata.py` (fields) and `filesystem.py` (`_StorageInfo`).
    """
    by_key: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: (r.key, r.offset)):
        by_key.setdefault(record.key, []).append(record)
    described: dict[str, Any] = {}
    stored: dict[Any, Any] = {}
    for key, parts in by_key.items():
        shape = parts[0].shape
        if shape is None:
            assert len(parts) == 1, f"object {key} is written twice"
            described[key] = _dcp("BytesStorageMetadata")
            stored[_dcp("MetadataIndex", fqn=key, index=None)] = _stored(parts[0])
            continue
        assert_tiles(key, parts)
        properties = (Dtype(parts[0].dtype), _STRIDED, False, _CONTIGUOUS, False)
        offsets = [_size(r.offset) for r in parts]
        chunks = [
            _dcp("ChunkStorageMetadata", offsets=o, sizes=_size(r.size)) for o, r in zip(offsets, parts, strict=True)
        ]
        described[key] = _dcp(
            "TensorStorageMetadata",
            properties=torch_zip.Made(_DCP, "TensorProperties", state=properties),
            size=_size(shape),
            chunks=chunks,
        )
        for i, (offset, r) in enumerate(zip(offsets, parts, strict=True)):
            stored[_dcp("MetadataIndex", fqn=key, index=i, offset=offset)] = _stored(r)
    value = _dcp(
        "Metadata",
        state_dict_metadata=described,
        planner_data={},
        storage_data=stored,
        storage_meta=_dcp("StorageMeta", checkpoint_id=None, save_id=None, load_id=None, modules=[]),
        version=None,
    )
    return torch_zip.pickled(value)


_DCP = "torch.distributed.checkpoint.metadata"
_STRIDED = torch_zip.Made("torch.serialization", "_get_layout", ("torch.strided",))
_CONTIGUOUS = torch_zip.Made(_DCP, "_MEM_FORMAT_ENCODING", (0,))


def _dcp(name: str, **fields: Any) -> torch_zip.Made:
    return torch_zip.Made(_DCP, name, state=fields or None)


def _size(shape: Sequence[int]) -> torch_zip.Made:
    return torch_zip.Made("torch", "Size", (tuple(shape),))


def _stored(r: Record) -> torch_zip.Made:
    where = {"relative_path": r.file, "offset": r.start, "length": r.length}
    return torch_zip.Made("torch.distributed.checkpoint.filesystem", "_StorageInfo", state=where)


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


class _Misfit(ValueError):
    """The metadata say what cannot be; the message is for a person."""


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
        """What `common.pt`, or the object in its stead, holds; tensors of one value as numbers, other ones as records
        without values, unknown classes inert.

        Raises:
            UsageError: it is missing or damaged.
        """
        path, record = self.path / COMMON, self.objects.get(COMMON_OBJECT)
        if path.is_file():
            record = None
        elif record is None:
            raise UsageError(f"`{path}` is missing: the save never finished or the copy is incomplete")
        else:
            path = self.path / record.file
        data = self._map(path.name)
        archive = torch_zip.read(data, *((record.start, record.length) if record else (0, len(data))), path)
        value = archive.value[0] if record and isinstance(archive.value, list) and archive.value else archive.value
        if not isinstance(value, dict):
            raise UsageError(f"`{path}` does not hold a Megatron checkpoint's common part")
        return dict(_numbers(value, data, archive.storages))

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
        pulse.current.tick()
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

    def _read_metadata(self) -> dict[str, Tensor]:
        path = self.path / METADATA
        if not path.is_file():
            raise UsageError(f"`{self.path}` is not a Megatron `torch_dist` checkpoint (no `{METADATA}`)")
        with open(path, "rb") as file:
            value = unpickle.load(file, path)
        self.original_shapes: dict[str, tuple[int, ...]] = {}
        self.objects: dict[str, Record] = {}
        try:
            described = value.state_dict_metadata
            self._check_backend(described)
            stored: dict[str, dict[tuple[int, ...], Any]] = {}
            for index, info in value.storage_data.items():
                stored.setdefault(index.fqn, {})[tuple(getattr(index, "offset", None) or ())] = info
            for key, about in (getattr(value, "mcore_data", None) or {}).items():
                if _ORIGINAL in about:
                    self.original_shapes[key] = tuple(int(n) for n in about[_ORIGINAL])
            tensors = {}
            for key, about in described.items():
                if hasattr(about, "chunks"):
                    tensors[key] = self._tensor(key, about, stored.get(key, {}))
                elif key in stored:
                    info = next(iter(stored[key].values()))
                    name = _inside(info.relative_path)
                    self.objects[key] = Record(key, None, (), (), "", name, int(info.offset), int(info.length))
            return tensors
        except (AttributeError, KeyError, TypeError, ValueError, StopIteration) as error:
            said = f": {error}" if isinstance(error, _Misfit) else ""
            raise UsageError(f"`{path}` is damaged or not the metadata of a distributed checkpoint{said}") from None

    def _check_backend(self, described: Mapping[str, Any]) -> None:
        """That the save finished, and as Megatron's `torch_dist`.

        Raises:
            UsageError: not; says which.
        """
        path = self.path / CONFIG
        if not path.is_file():
            if any("/shard_" in key or key.endswith("word_embeddings.weight") for key in described):
                raise UsageError(
                    f"`{self.path}` is an unfinished save (no `{CONFIG}`, which Megatron writes last)",
                    "use the newest whole checkpoint before it",
                )
            raise UsageError(f"`{self.path}` was saved by plain torch, not by Megatron (no `{CONFIG}`)")
        try:
            backend = json.loads(path.read_bytes()).get("sharded_backend")
        except (OSError, ValueError, AttributeError):
            raise UsageError(f"`{path}` is damaged") from None
        if backend != BACKEND["sharded_backend"]:
            raise UsageError(f"`{path}` says `sharded_backend: {backend}`, only `torch_dist` is read")

    def _tensor(self, key: str, about: Any, stored: Mapping[tuple[int, ...], Any]) -> Tensor:
        shape = tuple(int(n) for n in about.size)
        properties = about.properties
        # Newer torch pickles the properties as a tuple, older ones as fields.
        dtype = getattr(properties, "dtype", None)
        if dtype is None:
            dtype = next(v for v in _flat(properties) if isinstance(v, unpickle.Dtype))
        chunks = []
        for part in about.chunks:
            offset, size = tuple(int(n) for n in part.offsets), tuple(int(n) for n in part.sizes)
            if offset not in stored:
                raise UsageError(f"`{self.path / METADATA}` does not say where `{key}` at {list(offset)} lies")
            if len(offset) != len(shape) or len(size) != len(shape) or min((*offset, *size, *shape), default=0) < 0:
                raise _Misfit(f"a chunk of `{key}` does not fit its shape")
            info = stored[offset]
            name = _inside(info.relative_path)
            chunks.append(Record(key, shape, offset, size, str(dtype), name, int(info.offset), int(info.length)))
        return Tensor(key, shape, str(dtype), tuple(chunks))

    def _map(self, name: str) -> mmap.mmap:
        if name not in self._maps:
            path = self.path / name
            try:
                with open(path, "rb") as file:
                    if not os.fstat(file.fileno()).st_size:
                        raise UsageError(f"`{path}` is empty")
                    self._maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise UsageError(f"`{path}` {why_unreadable(error)}") from None
        return self._maps[name]

    def located(self, record: Record) -> torch_zip.Stored:
        """Where the values of a chunk lie in its file.

        Raises:
            UsageError: the file is cut off or damaged, or the record is not this chunk.
        """
        data = self._map(record.file)
        where = f"{self.path / record.file}"
        end = record.start + record.length
        if record.start < 0 or record.length < 0 or end > len(data):
            raise UsageError(
                f"`{where}` has {len(data):,} bytes, `{record.key}` needs {end:,}: the file was cut off",
                "use an older checkpoint; `cpt ckpt list` shows which are whole",
            )
        archive = torch_zip.read(data, record.start, record.length, where)
        value = archive.value
        if not isinstance(value, unpickle.TensorRecord) or not value.is_contiguous:
            raise UsageError(f"`{where}`: the record of `{record.key}` is not one plain tensor")
        stored = archive.storages.get(value.storage.key)
        needed = math.prod(record.size) * itemsize(record.dtype)
        if stored is None or stored.length != needed or value.storage.dtype != record.dtype:
            found = f"{stored.length:,} bytes of" if stored else "no"
            raise UsageError(
                f"`{where}`: `{record.key}` has {found} {value.storage.dtype}, wanted are {needed:,} of {record.dtype}"
            )
        return stored

    def _chunk(self, record: Record) -> torch.Tensor:
        """The values of a chunk, mapped where possible: nothing is read before it is used."""
        import torch

        dtype = getattr(torch, record.dtype)
        stored = self.located(record)
        if not stored.length:
            return torch.empty(record.size, dtype=dtype)
        # Read-only memory: torch warns unless it is told; nothing here writes to it.
        view = memoryview(self._map(record.file))[stored.start : stored.start + stored.length]
        return _from_readonly(view, dtype).view(record.size)

    def close(self) -> None:
        """Let go of the mapped files."""
        self._maps.clear()


def _inside(name: Any) -> str:
    """The name of a file of the checkpoint.

    Raises:
        ValueError: it leads elsewhere.
    """
    if Path(str(name)).name != str(name):
        raise _Misfit(f"`{name}` lies outside the checkpoint")
    return str(name)


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


def _numbers(value: Any, data: mmap.mmap, storages: Mapping[str, torch_zip.Stored]) -> Any:
    """A value with its tensors of one number as that number."""
    if isinstance(value, unpickle.TensorRecord):
        stored = storages.get(value.storage.key)
        if stored is None or value.storage.dtype not in CARRIERS or math.prod(value.size) != 1:
            return value
        held = np.frombuffer(data, CARRIERS[value.storage.dtype], 1, stored.start)
        return convert(held.reshape(1, 1), value.storage.dtype, "float64").item()
    if isinstance(value, dict):
        return {k: _numbers(v, data, storages) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_numbers(v, data, storages) for v in value)
    return value
