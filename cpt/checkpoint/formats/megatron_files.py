"""Rank files of Megatron's own folders: their names, and where the tensors in one lie."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt.base.errors import UsageError
from cpt.checkpoint import arrays, layouts, torch_zip, unpickle
from cpt.checkpoint.arrays import Files
from cpt.checkpoint.content import Layout
from cpt.checkpoint.copies import Placed
from cpt.checkpoint.crc32 import crc32
from cpt.checkpoint.layouts import Held
from cpt.checkpoint.torch_zip import Archive
from cpt.checkpoint.unpickle import TensorRecord

FILE, DISTRIBUTED = "model_optim_rng.pt", "distrib_optim.pt"
RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
AXES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
}


def rank_folder(layout: Layout, tp: int, pp: int, ep: int) -> str:
    """Name of a rank's folder."""
    name = f"mp_rank_{tp:02d}"
    name += f"_{pp:03d}" if layout.pp > 1 else ""
    return name + (f"_{ep:03d}" if layout.ep > 1 else "")


def arguments(value: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's arguments in a rank's file, plain ones only."""
    stated = value.get("args")
    given = stated if isinstance(stated, dict) else unpickle.fields(stated)
    return dict(unpickle.plain(given))


def why_not_whole(folder: Path) -> str | None:
    """What shows that ranks of a folder, or files of theirs, are missing or cut off; None when nothing does."""
    ranks = {p.name: p for p in sorted(folder.glob("mp_rank_*")) if RANK.fullmatch(p.name) and p.is_dir()}
    first = next(iter(ranks.values()), None)
    files = Files()
    try:
        for name, path in ranks.items():
            if not (path / FILE).is_file():
                return f"`{name}` holds no `{FILE}`"
            value = _read(files, path / FILE)
            args = arguments(value)
            if args.get("use_distributed_optimizer") and value.get("optimizer") is not None:
                if not (path / DISTRIBUTED).is_file():
                    return f"`{name}` holds no `{DISTRIBUTED}`, which the optimizer's state is in"
                _read(files, path / DISTRIBUTED)
            sizes: dict[str, Any] = {axis: args.get(said) for axis, said in AXES.items()}
            if path == first and all(isinstance(n, int) and n > 0 for n in sizes.values()):
                layout = Layout(**sizes)
                wanted = (rank_folder(layout, *rank) for rank in layouts.ranks(layout))
                if missing := next((w for w in wanted if w not in ranks), None):
                    return f"`{missing}` is missing: `{name}/{FILE}` says {layout}"
    except UsageError as error:
        return error.message.replace(f"`{folder}/", "`")
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError):  # a pickle can say anything
        return f"`{name}` does not hold what Megatron writes"
    finally:
        files.close()
    return None


def _read(files: Files, path: Path) -> Any:
    """What a file that torch saved holds, tensors without their values."""
    data = files.map(os.fspath(path))
    return torch_zip.read(data, 0, len(data), path).value


@dataclass(frozen=True)
class Opened:
    """A file that torch saved, opened."""

    file: str
    archive: Archive

    def start(self, record: TensorRecord, what: str) -> int:
        """Where a tensor's values start in a file [bytes].

        Raises:
            UsageError: they are not one after another, or lie outside their storage.
        """
        size = arrays.itemsize(record.storage.dtype)
        stride, numel = 1, 1
        for length, given in zip(reversed(record.size), reversed(record.stride), strict=True):
            if length > 1 and given != stride:
                raise UsageError(
                    f"`{self.file}`: the values of {what} do not lie one after another, which is not supported"
                )
            stride *= length
            numel *= length
        stored = self.archive.storages.get(record.storage.key)
        if stored is None:
            raise UsageError(f"`{self.file}` is damaged: the values of {what} are not in it")
        start = record.offset * size
        end = start + numel * size
        if record.offset < 0 or end > stored.length:
            raise UsageError(f"`{self.file}` is damaged: {what} needs {end:,} bytes, its storage has {stored.length:,}")
        return stored.start + start

    def places(self, record: TensorRecord, held: Held, what: str) -> list[Placed]:
        """Where the logical tensors of a parameter lie.

        Raises:
            UsageError: it has another shape, or as `start`.
        """
        if tuple(record.size) != held.tensor.shape:
            raise UsageError(
                f"`{self.file}`: {what} has shape {list(record.size)}, the model's tensor has {list(held.tensor.shape)}"
            )
        start = self.start(record, what)
        columns = held.tensor.matrix[1]
        return list(arrays.places(held.tensor.fills, self.file, start, columns, record.storage.dtype))


class Folder:
    """Opens the files of a folder and keeps the checksums that they carry."""

    def __init__(self, path: Path, files: Files) -> None:
        self.path, self.files = path, files
        self.crc32: dict[str, tuple[tuple[int, int, int], ...]] = {}

    def open(self, path: Path) -> Opened:
        """A file that torch saved; its tensors are not read.

        Raises:
            UsageError: it is missing, damaged or no such file.
        """
        file = os.fspath(path)
        data = self.files.map(file)
        archive = torch_zip.read(data, 0, len(data), file)
        self.crc32[file] = tuple(sorted((s.start, s.length, s.crc32) for s in archive.storages.values()))
        return Opened(file, archive)

    def refuse_damaged(self, *files: str) -> None:
        """For values that do not fit: damaged bytes are the better explanation.

        Raises:
            UsageError: some of the files' values are not those that were saved.
        """
        for file in files:
            for start, length, crc in self.crc32.get(file, ()):
                with memoryview(self.files.map(file)) as data, data[start : start + length] as values:
                    found = crc32(values)
                if found != crc:
                    raise UsageError(
                        f"`{file}` is damaged: bytes {start:,} to {start + length:,} have the checksum {found:08x} "
                        f"instead of {crc:08x}",
                        "take another copy of the checkpoint, or an earlier step",
                    )


@dataclass(frozen=True)
class Rank:
    """A rank's file.

    Args:
        chunks: the tensors of the model by name, for each virtual pipeline chunk.
    """

    tp: int
    pp: int
    ep: int
    opened: Opened
    chunks: tuple[Mapping[str, TensorRecord], ...]

    @property
    def file(self) -> str:
        """Path of the file with its model."""
        return self.opened.file

    def __str__(self) -> str:
        return Path(self.file).parent.name


@dataclass(frozen=True)
class Param:
    """A parameter that a rank holds."""

    held: Held
    record: TensorRecord

    @property
    def dtype(self) -> str:
        """Dtype of the model's weight."""
        return self.record.storage.dtype
