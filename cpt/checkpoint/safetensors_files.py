"""Headers of the `.safetensors` files of a Hugging Face folder: which tensor lies where, checked before reading.

A file is 8 bytes of header length (little endian), the header as JSON, then the tensors' bytes. No torch.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from cpt.base.errors import UsageError
from cpt.base.files import read_json, why_unreadable

INDEX = "model.safetensors.index.json"
_NUMBERED = re.compile(r"(.*-)(\d+)-of-(\d+)(\.safetensors)")
_MOST_AXES = 8
_MOST = 100 * 2**20  # no sane header is longer [bytes]


@dataclass(frozen=True)
class Place:
    """Where a tensor lies."""

    file: Path
    dtype: str  # as safetensors spells it: F32, BF16, ...
    shape: tuple[int, ...]
    start: int  # of the first value [bytes from the start of the file]
    nbytes: int


def has_weights(folder: Path) -> bool:
    """Whether a folder has safetensors files at all."""
    return (folder / INDEX).is_file() or next(folder.glob("*.safetensors"), None) is not None


def named_in(index: Path) -> dict[str, str]:
    """The file of each tensor as an index says.

    Raises:
        UsageError: it is no index, or names a file outside its folder.
    """
    try:
        claimed = {str(name): str(file) for name, file in read_json(index)["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"`{index}` is not an index of weight files") from None
    for name, file in claimed.items():
        if Path(file).name != file or file in ("", ".", "..") or "\0" in file:
            raise UsageError(f"`{index}` says that `{name}` is in `{file}`, which is not the name of a file beside it")
    return claimed


def read_headers(folder: str | os.PathLike[str]) -> dict[str, Place]:
    """Every tensor of the folder's files by name.

    Raises:
        UsageError: a file is missing, cut short or no safetensors; a tensor is in two files or not where it should be.
    """
    folder = Path(folder)
    index = folder / INDEX
    claimed: dict[str, str] = {}
    if index.is_file():
        claimed = named_in(index)
        files = [folder / name for name in sorted(set(claimed.values()))]
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    else:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UsageError(f"`{folder}` has no `.safetensors` files")
        _check_numbers(files)
    places: dict[str, Place] = {}
    for file in files:
        for name, place in read_header(file).items():
            if name in places:
                raise UsageError(f"tensor `{name}` is both in `{places[name].file}` and in `{file}`")
            places[name] = place
    for name, file_name in claimed.items():
        if name not in places or places[name].file.name != file_name:
            raise UsageError(f"`{index}` says that `{name}` is in `{file_name}`, but it is not there")
    return places


def _check_numbers(files: list[Path]) -> None:
    """Of files that are numbered (`-00001-of-00003`) none may be missing."""
    numbered = [m for m in (_NUMBERED.fullmatch(f.name) for f in files) if m]
    for match in numbered:
        start, total, end = match[1], match[3], match[4]
        for i in range(1, int(total) + 1):
            wanted = f"{start}{i:0{len(match[2])}d}-of-{total}{end}"
            if not (files[0].parent / wanted).is_file():
                raise UsageError(f"`{files[0].parent / wanted}` is missing, but `{match[0]}` is there")


def read_header(path: Path) -> dict[str, Place]:
    """Every tensor of one file by name.

    Raises:
        UsageError: it is missing, cut short or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if head == b"version " and size < 1024:
                hint = "`git lfs pull` in that folder fetches the file"
                raise UsageError(f"`{path}` is a pointer of Git LFS, not the file itself", hint)
            if not size:
                raise UsageError(f"`{path}` is empty")
            if size < 8 or not 0 < length <= min(_MOST, size - 8):
                raise UsageError(f"`{path}` is cut short or no safetensors file")
            header = json.loads(file.read(length))
    except OSError as error:
        raise UsageError(f"`{path}` {why_unreadable(error)}") from None
    except (ValueError, UnicodeDecodeError):
        raise UsageError(f"`{path}` is no safetensors file: its header is not JSON") from None
    places, lost, end = {}, [], 0
    try:
        for name, facts in header.items():
            if name == "__metadata__":
                continue
            start, stop = (int(n) for n in facts["data_offsets"])
            end = max(end, stop)
            if 8 + length + stop > size:
                lost.append(name)
            shape = tuple(int(n) for n in facts["shape"][: _MOST_AXES + 1])
            if len(shape) > _MOST_AXES:
                raise ValueError
            places[name] = Place(path, str(facts["dtype"]), shape, 8 + length + start, stop - start)
    except (TypeError, KeyError, AttributeError, IndexError, ValueError):
        raise UsageError(f"`{path}` is no safetensors file: its header is not understood") from None
    if lost:
        some = ", ".join(f"`{n}`" for n in lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        raise UsageError(f"`{path}` has {size:,} bytes, its header wants {8 + length + end:,}: lost are {some}")
    at = 8 + length
    for name, place in sorted(places.items(), key=lambda p: (p[1].start, p[1].nbytes)):
        if place.start != at or place.nbytes < 0:
            raise UsageError(f"`{path}` is no safetensors file: `{name}` does not follow the tensor before it")
        at += place.nbytes
    if at != size:
        raise UsageError(f"`{path}` has {size:,} bytes, its header describes {at:,}")
    return places
