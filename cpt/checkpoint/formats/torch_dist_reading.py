"""Where the values of a `torch_dist` folder's tensors lie: chunks, whatever layout wrote them, as parts of atoms."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cpt.base.errors import UsageError
from cpt.checkpoint import arrays, mapping, torch_zip
from cpt.checkpoint.arrays import Array, Files, Place, as_matrix, crop, flat_segments, part, places
from cpt.checkpoint.formats.torch_dist_names import Name
from cpt.checkpoint.mapping import Fused
from cpt.checkpoint.torch_dist import Folder, Record, Tensor
from cpt.plan.model import ModelConfig


class Chunks:
    """Gathers the chunks of the weights and of optimizer state in the shapes of the model.

    Args:
        source: the folder.
        files: to read objects through.

    Attributes:
        crc32: checksums of the records, by file: (start, length, crc32) [bytes].
        places: where values lie, by (atom, whether its padding rows, state); `dtypes` the same for their dtype.
        owners: the stored key of each (state, canonical key, half).
    """

    def __init__(self, source: Folder, files: Files) -> None:
        self.source, self.files, self.folder = source, files, source.path
        self.crc32: dict[str, list[tuple[int, int, int]]] = {}
        self.places: dict[tuple[str, bool, str], list[Place]] = {}
        self.dtypes: dict[tuple[str, bool, str], str] = {}
        self.owners: dict[tuple[str, str, int | None], str] = {}

    def array(self, atom: str, pad: bool, state: str, shape: tuple[int, ...]) -> Array | None:
        """A state of an atom or of its padding rows, of a shape; None = nothing of it was added."""
        key = (atom, pad, state)
        return Array(self.dtypes[key], shape, tuple(self.places[key])) if key in self.places else None

    def add(self, tensor: Tensor, name: Name, model: ModelConfig, expected: Mapping[str, Fused]) -> bool:
        """Take in a stored tensor; False when the model has no such tensor.

        Raises:
            UsageError: its shape is not the model's, or its values are not where they should be.
        """
        lead = name.stacked
        fused = expected.get(name.canonical((0,) * lead))
        if fused is None and lead:  # layers stacked, of which the first has no such tensor
            fused = next((expected[k] for k in self._keys(name, tensor) if k in expected), None)
        if fused is None:
            return False
        whole = fused.tensor.shape
        halves = 1 if name.half is None else 2
        wanted = (whole[0] // halves, *whole[1:])
        stack = [n for n, axis in zip((model.num_layers, model.num_experts), name.axes, strict=True) if axis]
        original = self.source.original_shapes.get(tensor.key, tensor.shape)
        if list(original) != [*stack, *wanted]:
            raise UsageError(
                f"`{self.folder}`: `{tensor.key}` has shape {list(original)}, the model wants {[*stack, *wanted]}"
            )
        keys = list(self._keys(name, tensor))
        for key in keys:
            if key not in expected:
                raise UsageError(f"`{self.folder}`: `{tensor.key}` holds `{key}`, which the model does not have")
            owner = self.owners.setdefault((name.state, key, name.half), tensor.key)
            if owner != tensor.key:
                raise UsageError(f"`{self.folder}` has `{key}` twice: as `{owner}` and as `{tensor.key}`")
        arrays.itemsize(tensor.dtype)
        flat = tensor.key in self.source.original_shapes
        base = whole[0] // halves * (name.half or 0)
        for record in tensor.chunks:
            if math.prod(record.size) == 0:
                continue
            start = self.located(record)
            if flat:
                self._add_flat(record, start, name, expected, original, base)
            else:
                self._add_chunk(record, start, name, expected, base)
        return True

    def _keys(self, name: Name, tensor: Tensor) -> Iterator[str]:
        shape = self.source.original_shapes.get(tensor.key, tensor.shape)
        for index in itertools.product(*(range(n) for n in shape[: name.stacked])):
            yield name.canonical(index)

    def located(self, record: Record) -> int:
        """Where a chunk's values start in its file; notes their checksum."""
        stored = self.source.located(record)
        self.crc32.setdefault(self.file(record), []).append((stored.start, stored.length, stored.crc32))
        return stored.start

    def _add_chunk(self, record: Record, start: int, name: Name, expected: Mapping[str, Fused], base: int) -> None:
        lead = name.stacked
        rows, columns = as_matrix(record.size[lead:])
        row, column = _corner(record.offset[lead:])
        size = arrays.itemsize(record.dtype)
        spans = (range(o, o + n) for o, n in zip(record.offset[:lead], record.size[:lead], strict=True))
        for i, index in enumerate(itertools.product(*spans)):
            fused = self._slice(record, name, index, expected)
            at = start + i * rows * columns * size
            cropped = crop(fused.tensor.fills, base + row, rows, column, columns)
            self._put(name.state, record, places(cropped, self.file(record), at, columns, record.dtype))

    def _add_flat(
        self,
        record: Record,
        start: int,
        name: Name,
        expected: Mapping[str, Fused],
        original: tuple[int, ...],
        base: int,
    ) -> None:
        """A piece of a flattened block: axes count blocks, the last axis is the place inside the block."""
        assert record.shape is not None
        counts = record.shape[:-1]
        block = tuple(n // max(1, c) for n, c in zip(original, counts, strict=False))
        if (
            len(counts) != len(original)
            or tuple(b * c for b, c in zip(block, counts, strict=True)) != tuple(original)
            or math.prod(block) != record.shape[-1]
            or record.size[:-1] != (1,) * len(counts)
        ):
            raise UsageError(
                f"`{self.folder}`: `{record.key}` has shape {list(record.shape)}, which are not flat pieces of "
                f"{list(original)}"
            )
        lead = name.stacked
        rows, columns = as_matrix(block[lead:])
        corner = [b * i for b, i in zip(block, record.offset[:-1], strict=True)]
        row, column = _corner(corner[lead:])
        size = arrays.itemsize(record.dtype)
        first, last = record.offset[-1], record.offset[-1] + record.size[-1]
        spans = (range(o, o + n) for o, n in zip(corner[:lead], block[:lead], strict=True))
        for i, index in enumerate(itertools.product(*spans)):
            begin, end = max(first, i * rows * columns), min(last, (i + 1) * rows * columns)
            if begin >= end:
                continue
            fused = self._slice(record, name, index, expected)
            inner = part(fused.tensor, [(base + row, base + row + rows)], (column, column + columns))
            at = start + (begin - first) * size
            for segment in flat_segments(inner, begin - i * rows * columns, end - i * rows * columns):
                placed = places(segment.fills, self.file(record), at, segment.columns, record.dtype)
                self._put(name.state, record, placed)
                at += segment.rows * segment.columns * size

    def _slice(self, record: Record, name: Name, index: Sequence[int], expected: Mapping[str, Fused]) -> Fused:
        key = name.canonical(index)
        if key not in expected:
            raise UsageError(f"`{self.folder}`: a chunk of `{record.key}` at {list(record.offset)} lies outside it")
        return expected[key]

    def _put(self, state: str, record: Record, placed: Iterator[tuple[str, bool, Place]]) -> None:
        for atom, pad, place in placed:
            key = (atom, pad, state)
            if self.dtypes.setdefault(key, record.dtype) != record.dtype:
                raise UsageError(f"`{self.folder}`: `{record.key}` is {record.dtype}, its other half another dtype")
            self.places.setdefault(key, []).append(place)

    def file(self, record: Record) -> str:
        """Path of the file that a record lies in."""
        return os.path.join(self.folder, record.file)

    def object(self, key: str) -> Any:
        """The value of an object's record."""
        record = self.source.objects[key]
        path = self.file(record)
        value = torch_zip.read(self.files.map(path), record.start, record.length, path).value
        if not isinstance(value, list) or len(value) != 1:
            raise UsageError(f"`{path}`: the object `{key}` is not a list of one")
        return value[0]


def shapes_of(model: ModelConfig, padded: int) -> dict[tuple[str, bool], tuple[int, ...]]:
    """Shape of every logical tensor, and of its padding rows where there are some, by (name, whether padding)."""
    shapes: dict[tuple[str, bool], tuple[int, ...]] = {}
    for name, shape in mapping.atom_shapes(model).items():
        shapes[name, False] = shape
    if padded > model.vocab_size:
        for key, fused in mapping.megatron_tensors(model, padded).items():
            if key in mapping.VOCABULARY:
                for f in fused.tensor.fills:
                    if f.pad and f.atom:
                        shapes[f.atom, True] = (f.rows, f.columns)
    return shapes


def _corner(offset: Sequence[int]) -> tuple[int, int]:
    """(row, column) of a block's first value."""
    return (offset[0] if offset else 0, offset[1] if len(offset) > 1 else 0)
