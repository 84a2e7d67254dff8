"""Headers of the `.safetensors` files of a Hugging Face folder: which tensor lies where, checked before reading.

A file is 8 bytes of header length (little endian), the header as JSON, then the tensors' bytes. No torch.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from cpt.base.errors import UsageError
from cpt.base.files import read_json

INDEX = "model.safetensors.index.json"
_MOST = 100 * 2**20  # no sane header is longer [bytes]


@dataclass(frozen=True)
class Place:
    """Where a tensor lies."""

    file: Path
    dtype: str  # as safetensors spells it: F32, BF16, ...
    shape: tuple[int, ...]
    start: int  # of the first value [bytes from the start of the file]
    nbytes: int


def read_headers(folder: str | os.PathLike[str]) -> dict[str, Place]:
    """Every tensor of the folder's files by name.

    Raises:
        UsageError: a file is missing, cut short or no safetensors; a tensor is in two files or not where it should be.
    """
    folder = Path(folder)
    index = folder / INDEX
    claimed: dict[str, str] = {}
    if index.is_file():
        try:
            claimed = dict(read_json(index)["weight_map"])
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"`{index}` is not an index of safetensors files") from None
        files = sorted({folder / Path(name).name for name in claimed.values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UsageError(f"`{folder}` has no `.safetensors` files")
    places: dict[str, Place] = {}
    for file in files:
        for name, place in read_header(file).items():
            if name in places:
                raise UsageError(f"tensor `{name}` is both in `{places[name].file}` and in `{file}`")
            places[name] = place
    for name, file_name in claimed.items():
        if name not in places or places[name].file.name != Path(file_name).name:
            raise UsageError(f"`{index}` says that `{name}` is in `{file_name}`, but it is not there")
    return places


def read_header(path: Path) -> dict[str, Place]:
    """Every tensor of one file by name.

    Raises:
        UsageError: it is missing, cut short or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 0 < length <= min(_MOST, size - 8):
                raise UsageError(f"`{path}` is cut short or no safetensors file")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise UsageError(f"`{path}` is missing") from None
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
            places[name] = Place(
                path, str(facts["dtype"]), tuple(int(n) for n in facts["shape"]), 8 + length + start, stop - start
            )
    except (TypeError, KeyError, AttributeError, IndexError, ValueError):
        raise UsageError(f"`{path}` is no safetensors file: its header is not understood") from None
    if lost:
        some = ", ".join(f"`{n}`" for n in lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        raise UsageError(f"`{path}` has {size:,} bytes, its header wants {8 + length + end:,}: lost are {some}")
    return places
