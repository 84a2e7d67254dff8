"""Reads pickles of checkpoints without running any of their code.

`.metadata`, `common.pt` and the records of `.distcp` files are pickles. A pickle can name any function to be called;
this reader knows a closed list of harmless ones, and makes every other class an `Inert` record that only keeps fields.
"""

from __future__ import annotations

import collections
import pickle
from collections.abc import Callable
from typing import IO, Any, ClassVar

from cpt.base.errors import UsageError


def _of_what_is_there(kind: Callable[..., Any]) -> Callable[..., Any]:
    """A constructor that only takes what the pickle holds itself: `list(range(10**12))` would fill the memory."""

    def make(*args: Any) -> Any:
        held = (list, tuple, dict, set, frozenset, str, bytes, bytearray)
        if args and not isinstance(args[0], held):
            raise pickle.UnpicklingError(f"a collection of a {type(args[0]).__name__}")
        return kind(*args)

    return make


_SCALARS: dict[tuple[str, str], Any] = {
    ("builtins", name): value
    for name, value in {
        "set": _of_what_is_there(set),
        "frozenset": _of_what_is_there(frozenset),
        "list": _of_what_is_there(list),
        "dict": dict,
        "tuple": _of_what_is_there(tuple),
        "int": int,
        "float": float,
        "bool": bool,
        "str": str,
        "bytes": _of_what_is_there(bytes),
        "bytearray": _of_what_is_there(bytearray),
        "complex": complex,
        "slice": slice,
        "range": range,
    }.items()
}
_KNOWN: dict[tuple[str, str], Any] = {
    **_SCALARS,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "deque"): _of_what_is_there(collections.deque),
    ("torch", "Size"): _of_what_is_there(tuple),
}
_FLOATS = {"float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "complex128"}
_DTYPES = _FLOATS | {"bool", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64"}


class Inert:
    """What a pickle says about an object of a class that is not rebuilt: its class, arguments and fields."""

    module: ClassVar[str] = ""
    name: ClassVar[str] = ""
    args: tuple[Any, ...]

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        made = super().__new__(cls)
        made.args = args
        made.__dict__.update(kwargs)
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.__dict__.update({str(k): v for k, v in part.items()})
        self.__dict__.setdefault("state", parts)

    # A pickle may append to or set items of any object: keep nothing, fail on nothing.
    def append(self, value: Any) -> None: ...
    def extend(self, values: Any) -> None: ...
    def __setitem__(self, key: Any, value: Any) -> None: ...

    def __repr__(self) -> str:
        return f"<{self.module}.{self.name}>"


def fields(record: Any) -> dict[str, Any]:
    """Fields of an object that was not rebuilt, such as a Namespace."""
    own = vars(record) if isinstance(record, Inert) else {}
    return {k: v for k, v in own.items() if k not in ("args", "state")}


def plain(value: Any) -> Any:
    """A value with what JSON can say of it: dtypes as their names; entries that are of other kinds are left out.

    Raises:
        TypeError: the value itself is of another kind.
    """
    if isinstance(value, str):
        return value if isinstance(value, Dtype) else str(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if isinstance(k, str) and is_plain(v)}
    if isinstance(value, list | tuple) and all(is_plain(v) for v in value):
        return [plain(v) for v in value]
    raise TypeError(f"{type(value).__name__} is not a plain value")


def is_plain(value: Any) -> bool:
    """Whether JSON can say a value, a mapping's entries aside."""
    if isinstance(value, list | tuple):
        return all(is_plain(v) for v in value)
    return value is None or isinstance(value, str | bool | int | float | dict)


class Dtype(str):
    """Name of a torch dtype, such as `bfloat16`."""


class Storage:
    """A tensor's storage inside a torch zip: dtype, member name and number of elements."""

    def __init__(self, dtype: str, key: str, numel: int) -> None:
        self.dtype, self.key, self.numel = dtype, key, numel


class TensorRecord:
    """What a torch zip says about a tensor; its values lie in the member `data/<storage.key>`."""

    def __init__(self, storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride

    @property
    def is_contiguous(self) -> bool:
        """Whether the values are the storage's, in order, from its start."""
        expected, numel = [], 1
        for length in reversed(self.size):
            expected.append(numel)
            numel *= length
        ordered = all(
            length == 1 or a == b for length, a, b in zip(self.size, self.stride, reversed(expected), strict=True)
        )
        return self.offset == 0 and ordered and self.storage.numel == numel


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    if not isinstance(storage, Storage):
        return Inert(storage, offset, size, stride)
    return TensorRecord(storage, int(offset), tuple(size), tuple(stride))


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    return data


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, *rest: Any) -> Any:
    """A tensor that had attributes of its own: the tensor without them."""
    if function is _rebuild_tensor or function is _rebuild_parameter:
        return function(*arguments)
    return Inert(function, kind, arguments, *rest)


STORAGE_DTYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == "torch":
            if name in _DTYPES:
                return Dtype(name)
            if name in STORAGE_DTYPES:
                return Dtype(STORAGE_DTYPES[name])
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return _rebuild_tensor
        if module == "torch._utils" and name.startswith("_rebuild_parameter"):
            return _rebuild_parameter
        if module == "torch._tensor" and name == "_rebuild_from_type_v2":
            return _rebuild_from_type
        return type(name.rsplit(".", 1)[-1] or "Inert", (Inert,), {"module": module, "name": name})

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], Dtype):
            return Storage(str(pid[1]), str(pid[2]), int(pid[4]))
        return Inert(pid)


def load(file: IO[bytes], what: object) -> Any:
    """The value of a pickle; classes outside the closed list become `Inert`.

    Args:
        what: name of the file, for messages.

    Raises:
        UsageError: the bytes are not a whole pickle.
    """
    try:
        return _Reader(file).load()
    except Exception as error:  # a damaged pickle can fail in any way
        is_empty = isinstance(error, EOFError) and file.seekable() and file.tell() == 0
        raise UsageError(
            f"`{what}` is empty" if is_empty else f"`{what}` is damaged or not a checkpoint file: its pickle is broken"
        ) from None
