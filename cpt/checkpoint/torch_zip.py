"""Files as `torch.save` writes them, without torch: where each tensor lies in one, and the parts of a new one.

A zip of stored (never compressed) members below one root folder:

    data.pkl     the saved value; tensors refer to storages by number
    byteorder    `little`
    data/0 ...   the storages, each starting at a multiple of 64 bytes
    version      `3`

Storages follow one another in a stream, so their checksums come after them (a data descriptor each, as torch writes).
"""

from __future__ import annotations

import functools
import io
import math
import pickle
import struct
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpt.base.errors import UsageError
from cpt.checkpoint import unpickle
from cpt.checkpoint.arrays import Crc, Payload, itemsize
from cpt.checkpoint.crc32 import crc32

_LOCAL, _CENTRAL, _DESCRIPTOR, _END = b"PK\3\4", b"PK\1\2", b"PK\7\10", b"PK\5\6"
_END64, _LOCATOR64 = b"PK\6\6", b"PK\6\7"
_MOST = 0xFFFFFFFF
_DATE = 0x0021  # 1 January 1980
_SUMS_FOLLOW = 0x8


@dataclass(frozen=True, slots=True)
class Stored:
    """A member's bytes.

    Args:
        start: [bytes from the start of the file the archive lies in].
        crc32: as the archive says.
    """

    start: int
    length: int
    crc32: int


@dataclass(frozen=True)
class Archive:
    """A file as torch.save wrote it: its value (tensors are `unpickle.TensorRecord`) and the storages by key."""

    value: Any
    storages: Mapping[str, Stored]


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor in a value that is to be written: payload number `index` of its archive, [shape], in order.

    Args:
        offset: values of the payload that come before it, where several tensors share one.
    """

    index: int
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0


def read(data: Any, start: int, length: int, what: object) -> Archive:
    """What the archive in `data[start : start + length]` holds; no storage is read.

    Args:
        data: a file's bytes, usually mapped.
        what: name of the file, for messages.

    Raises:
        UsageError: it is no such archive, damaged, or of a kind that is not read (compressed, big endian).
    """
    if not len(data):
        raise UsageError(f"`{what}` is empty")
    if start < 0 or length < 22 or start + length > len(data):
        raise UsageError(f"`{what}` was cut off: {len(data):,} bytes are there, {start + length:,} are needed")
    if data[start : start + 4] != _LOCAL:
        raise UsageError(f"`{what}` is not a file that torch 1.6 or newer saved")
    try:
        members = _members(data, start, length)
    except (struct.error, ValueError, IndexError, UnicodeDecodeError) as error:
        raise UsageError(f"`{what}` is damaged or was cut off: {error}") from None
    pickled = next((name for name in members if name.endswith("/data.pkl") or name == "data.pkl"), None)
    if pickled is None:
        raise UsageError(f"`{what}` is not a file that torch saved: it has no `data.pkl`")
    root = pickled.removesuffix("data.pkl")
    order = members.get(f"{root}byteorder")
    if order is not None and bytes(data[order.start : order.start + order.length]) != b"little":
        raise UsageError(f"`{what}` was written on a big-endian machine, which is not supported")
    found = members[pickled]
    text = bytes(data[found.start : found.start + found.length])
    if crc32(text) != found.crc32:
        raise UsageError(f"`{what}` is damaged: the checksum of `{pickled}` is wrong")
    value = unpickle.load(io.BytesIO(text), what)
    prefix = f"{root}data/"
    storages = {name.removeprefix(prefix): m for name, m in members.items() if name.startswith(prefix)}
    return Archive(value, storages)


def _members(data: Any, start: int, length: int) -> dict[str, Stored]:
    """Every member by name.

    Raises:
        ValueError, struct.error: the directory is damaged.
    """
    tail_start = max(start, start + length - 66_000)
    tail = bytes(data[tail_start : start + length])
    end = tail.rfind(_END)
    if end < 0 or end + 22 + int.from_bytes(tail[end + 20 : end + 22], "little") != len(tail):
        raise ValueError("its directory is missing")
    count, size, offset = struct.unpack("<HII", tail[end + 10 : end + 20])
    if count == 0xFFFF or _MOST in (size, offset):
        locator = tail.rfind(_LOCATOR64, 0, end)
        if locator < 0:
            raise ValueError("its directory is missing")
        at = start + struct.unpack("<Q", tail[locator + 8 : locator + 16])[0]
        record = bytes(data[at : at + 56])
        if record[:4] != _END64:
            raise ValueError("its directory is missing")
        count, size, offset = struct.unpack("<QQQ", record[32:56])
    if offset + size > length:
        raise ValueError("its directory lies outside it")
    directory = bytes(data[start + offset : start + offset + size])
    members: dict[str, Stored] = {}
    at = 0
    for _ in range(count):
        if directory[at : at + 4] != _CENTRAL:
            raise ValueError("its directory is broken")
        flags, method = struct.unpack("<HH", directory[at + 8 : at + 12])
        crc, packed, plain, name_length, extra_length, comment_length = struct.unpack(
            "<IIIHHH", directory[at + 16 : at + 34]
        )
        (header,) = struct.unpack("<I", directory[at + 42 : at + 46])
        name = directory[at + 46 : at + 46 + name_length].decode()
        extra = directory[at + 46 + name_length : at + 46 + name_length + extra_length]
        packed, plain, header = _wide(extra, packed, plain, header)
        if method != 0 or packed != plain:
            raise ValueError(f"`{name}` is compressed, which is not supported")
        if flags & 1:
            raise ValueError(f"`{name}` is encrypted, which is not supported")
        if name in members:
            raise ValueError(f"`{name}` is in it twice")
        local = bytes(data[start + header : start + header + 30])
        if local[:4] != _LOCAL:
            raise ValueError(f"`{name}` is not where the directory says")
        local_name, local_extra = struct.unpack("<HH", local[26:30])
        first = header + 30 + local_name + local_extra
        if first + plain > offset:
            raise ValueError(f"`{name}` does not lie inside it")
        members[name] = Stored(start + first, plain, crc)
        at += 46 + name_length + extra_length + comment_length
    return members


def _wide(extra: bytes, packed: int, plain: int, header: int) -> tuple[int, int, int]:
    """Sizes and place of a member, those of 64 bits taken from its extra field."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack("<HH", extra[at : at + 4])
        if kind == 1:
            wide = list(struct.unpack(f"<{length // 8}Q", extra[at + 4 : at + 4 + length // 8 * 8]))
            plain = wide.pop(0) if plain == _MOST else plain
            packed = wide.pop(0) if packed == _MOST else packed
            header = wide.pop(0) if header == _MOST else header
        at += 4 + length
    return packed, plain, header


def parts(
    value: Any, payloads: Sequence[Payload | bytes], *, first: int = 0, align: int = 64, root: str = "archive"
) -> tuple[bytes | Payload | Crc, ...]:
    """A file as torch.save writes it: `torch.load(..., weights_only=True)` and `read` understand it.

    Args:
        value: of plain Python values, OrderedDict and Namespace; tensors in it are `Ref`, dtypes `unpickle.Dtype`.
        payloads: the storages, by the number that `Ref.index` names; small ones may be given as bytes.
        first: number of payloads (not of bytes) that come before this archive in the same file.
        align: storages start at multiples of this, counted from the archive's start [bytes].
    """
    made: list[bytes | Payload | Crc] = []
    directory: list[bytes | Crc] = []
    at = 0

    def member(name: str, content: bytes | Payload, crc: int | Crc) -> None:
        nonlocal at
        encoded = f"{root}/{name}".encode()
        size = content.nbytes if isinstance(content, Payload) else len(content)
        flags = _SUMS_FOLLOW if isinstance(content, Payload) else 0
        is_wide = size >= _MOST
        local_size = 0 if flags else size
        wide = struct.pack("<HHQQ", 1, 16, size, size) if is_wide else b""
        if is_wide:
            local_size = _MOST
        pad = -(at + 30 + len(encoded) + len(wide) + 4) % align
        extra = wide + b"FB" + struct.pack("<H", pad) + bytes(pad)
        local_crc = crc if isinstance(crc, int) else 0
        head = _LOCAL + struct.pack(
            "<HHHHHIIIHH", 45 if is_wide else 20, flags, 0, 0, _DATE, local_crc, local_size, local_size,
            len(encoded), len(extra),
        )  # fmt: skip
        made.append(head + encoded + extra)
        made.append(content)
        header, at = at, at + len(head) + len(encoded) + len(extra) + size
        if flags:
            sizes = struct.pack("<QQ", size, size) if is_wide else struct.pack("<II", size, size)
            made.extend([_DESCRIPTOR, crc if isinstance(crc, Crc) else crc.to_bytes(4, "little"), sizes])
            at += 8 + len(sizes)
        far = b""
        if is_wide:
            far += struct.pack("<QQ", size, size)
        if header >= _MOST:
            far += struct.pack("<Q", header)
        if far:
            far = struct.pack("<HH", 1, len(far)) + far
        short, place = (_MOST if is_wide else size), min(header, _MOST)
        version = 45 if far else 20
        directory.append(_CENTRAL + struct.pack("<HHHHHH", version, version, flags, 0, 0, _DATE))
        directory.append(crc if isinstance(crc, Crc) else crc.to_bytes(4, "little"))
        directory.append(
            struct.pack("<IIHHHHHII", short, short, len(encoded), len(far), 0, 0, 0, 0, place) + encoded + far
        )

    for name, content in (("data.pkl", pickled(value, payloads)), ("byteorder", b"little")):
        member(name, content, crc32(content))
    for i, payload in enumerate(payloads):
        if isinstance(payload, bytes):
            member(f"data/{i}", payload, crc32(payload))
        else:
            member(f"data/{i}", payload, Crc(first))
            first += 1
    member("version", b"3\n", crc32(b"3\n"))

    count, size = len(payloads) + 3, sum(4 if isinstance(part, Crc) else len(part) for part in directory)
    made.extend(directory)
    if count >= 0xFFFF or at >= _MOST or size >= _MOST:
        made.append(_END64 + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, at))
        made.append(_LOCATOR64 + struct.pack("<IQI", 0, at + size, 1))
    short_count = min(count, 0xFFFF)
    made.append(_END + struct.pack("<HHHHIIH", 0, 0, short_count, short_count, min(size, _MOST), min(at, _MOST), 0))
    return tuple(_joined(made))


def _joined(made: Sequence[bytes | Payload | Crc]) -> list[bytes | Payload | Crc]:
    """The same parts with neighbouring literal bytes in one."""
    joined: list[bytes | Payload | Crc] = []
    for part in made:
        if isinstance(part, bytes) and joined and isinstance(joined[-1], bytes):
            joined[-1] = joined[-1] + part
        elif part != b"":
            joined.append(part)
    return joined


def pickled(value: Any, payloads: Sequence[Payload | bytes] = ()) -> bytes:
    """The pickle of a value as torch writes it (protocol 2)."""
    out = io.BytesIO()
    _Pickler(out, payloads).dump(value)
    return out.getvalue()


@dataclass(frozen=True, slots=True)
class _Global:
    module: str
    name: str


_named = functools.cache(_Global)  # one object for each name, so that a pickle names it once


@dataclass(frozen=True, eq=False, slots=True)
class Made:
    """A value of a class that is not imported here, or what a function of that name gives.

    Args:
        args: of the call; None = an object of the class with this state.
        state: fields, or whatever the class's `__setstate__` takes; None = nothing.
    """

    module: str
    name: str
    args: tuple[Any, ...] | None = None
    state: Any = None


_STORAGES = {dtype: name for name, dtype in unpickle.STORAGE_DTYPES.items() if name != "UntypedStorage"}


_PurePickler: Any = pickle._Pickler  # in Python, so that what a name is can be overridden


class _Pickler(_PurePickler):
    """Names torch's functions without importing torch."""

    def __init__(self, file: io.BytesIO, payloads: Sequence[Payload | bytes]) -> None:
        super().__init__(file, protocol=2)
        self._payloads = payloads

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, _Global):
            if id(obj) in self.memo:
                self.write(self.get(self.memo[id(obj)][0]))
            else:
                self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
                self.memoize(obj)
        elif isinstance(obj, Made):
            self.save(_named(obj.module, obj.name))
            self.save(obj.args or ())
            self.write(pickle.NEWOBJ if obj.args is None else pickle.REDUCE)
            if obj.state is not None:
                self.save(obj.state)
                self.write(pickle.BUILD)
        elif isinstance(obj, unpickle.Dtype):
            self.save(_named("torch", str(obj)))
        elif isinstance(obj, Ref):
            self._tensor(obj)
        else:
            super().save(obj, save_persistent_id)

    def _tensor(self, ref: Ref) -> None:
        payload = self._payloads[ref.index]
        if isinstance(payload, bytes):
            numel = len(payload) // itemsize(ref.dtype)
        else:
            numel = sum(s.rows * s.columns for s in payload.segments)
            assert payload.dtype == ref.dtype, f"{payload.name}: {payload.dtype} is not {ref.dtype}"
        assert ref.offset + math.prod(ref.shape) <= numel, ref
        stride, step = [], 1
        for n in reversed(ref.shape):
            stride.append(step)
            step *= n
        self.save(_named("torch._utils", "_rebuild_tensor_v2"))
        self.write(pickle.MARK)
        self.save(("storage", _named("torch", _STORAGES[ref.dtype]), str(ref.index), "cpu", numel))
        self.write(pickle.BINPERSID)
        arguments: tuple[Any, ...] = (ref.offset, tuple(ref.shape), tuple(reversed(stride)), False, OrderedDict())
        for argument in arguments:
            self.save(argument)
        self.write(pickle.TUPLE + pickle.REDUCE)
