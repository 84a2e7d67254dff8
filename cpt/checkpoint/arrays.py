"""Logical tensors as rectangles of bytes in files, and outputs as rectangles of logical tensors. No torch.

Every conversion only slices, joins, stacks, pads and transposes. So a format says, as data, where each rectangle of a
logical tensor lies (`Place`), and a new file says which rectangles it is made of (`Fill`); `Files.fill` joins the two,
block by block, and nothing ever holds a whole tensor. All tensors count as matrices here: rows are axis 0, columns
all other axes together; a vector is one column.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np

from cpt.base.errors import UsageError
from cpt.base.files import why_unreadable

# numpy has no bfloat16: its bits travel as unsigned integers.
CARRIERS: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float64": np.dtype("<f8"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("u1"),
}
Matrix = np.ndarray[tuple[int, int], np.dtype[Any]]
ArrayOf = Callable[[str, bool], "Array"]


def itemsize(dtype: str) -> int:
    """Bytes of a value.

    Raises:
        UsageError: complex, quantised and other dtypes are not converted.
    """
    if dtype not in CARRIERS:
        raise UsageError(f"dtype `{dtype}` is not supported (known: {', '.join(CARRIERS)})")
    return CARRIERS[dtype].itemsize


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a tensor of this shape; a scalar is one by one."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def rectangles(first: int, last: int, columns: int, most: int) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """(row, column, shape) of blocks that cover rows `first` to `last` of a matrix, row after row.

    Args:
        most: values in a block; blocks are whole rows where one fits.
    """
    width = max(1, min(columns, most))
    step = max(1, most // width)
    for row in range(first, last, step):
        for column in range(0, columns, width):
            yield row, column, (min(step, last - row), min(width, columns - column))


def row_spans(shape: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """(first, last) rows of parts of a tensor's matrix, each of about `most` values, at least one row."""
    rows, columns = as_matrix(shape)
    step = max(1, most // max(1, columns))
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


@dataclass(frozen=True, slots=True)
class Place:
    """A rectangle of a logical tensor and where it lies on disk.

    Args:
        start: of its first value [bytes from the start of the file].
        stride: from one stored row to the next [bytes].
        transposed: stored rows are the rectangle's columns.
    """

    file: str
    start: int
    stride: int
    row: int
    rows: int
    column: int
    columns: int
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Array:
    """One state of a logical tensor: places tile it exactly once."""

    dtype: str
    shape: tuple[int, ...]
    places: tuple[Place, ...]

    @property
    def nbytes(self) -> int:
        """Size of all values [bytes]."""
        return math.prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class Mean(Array):
    """A weighted sum of arrays of its shape, formed in fp64 when it is read and rounded once to its dtype.

    Args:
        of: (weight, array); `places` is empty.
    """

    of: tuple[tuple[float, Array], ...] = ()


@dataclass(frozen=True, slots=True)
class Fill:
    """A rectangle of a stored matrix and the logical tensor's rectangle that it is, which starts at (`at_row`,
    `at_column`). `atom` None: zeros. `pad`: the rectangle is of the atom's padding rows of the vocabulary.
    `transposed`: stored rows are the atom's columns."""

    atom: str | None
    row: int
    rows: int
    column: int
    columns: int
    at_row: int = 0
    at_column: int = 0
    pad: bool = False
    transposed: bool = False


Box = TypeVar("Box", Fill, Place)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as a format stores it, in terms of logical tensors; fills tile it, in order of rows."""

    key: str
    shape: tuple[int, ...]
    fills: tuple[Fill, ...]

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of its shape."""
        return as_matrix(self.shape)

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Segment:
    """A matrix of an output, written row after row."""

    rows: int
    columns: int
    fills: tuple[Fill, ...]


@dataclass(frozen=True, slots=True)
class Payload:
    """Values of an output file: segments one after another, all of one state (`model`, `fp32`, `exp_avg`, ...)."""

    name: str  # for progress and messages
    state: str
    dtype: str
    segments: tuple[Segment, ...]

    @property
    def nbytes(self) -> int:
        """Size in the file [bytes]."""
        return sum(s.rows * s.columns for s in self.segments) * itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class Crc:
    """Four bytes of an output file: the CRC-32 (little endian) of its `of`-th payload."""

    of: int


@dataclass(frozen=True, slots=True)
class OutFile:
    """A file to write: literal bytes, payloads, and checksums of payloads that come before them.

    Args:
        name: relative to the output folder, may hold `/`.
        sha256: whether the whole file's SHA-256 is wanted.
    """

    name: str
    parts: tuple[bytes | Payload | Crc, ...]
    sha256: bool = False

    @property
    def payloads(self) -> tuple[Payload, ...]:
        """Its parts that are values, in order."""
        return tuple(p for p in self.parts if isinstance(p, Payload))

    @property
    def nbytes(self) -> int:
        """Size of the file [bytes]."""
        return sum(map(part_bytes, self.parts))


def part_bytes(part: bytes | Payload | Crc) -> int:
    """Size of a part of an output file [bytes]."""
    return part.nbytes if isinstance(part, Payload) else 4 if isinstance(part, Crc) else len(part)


def whole(name: str, shape: Sequence[int]) -> Tensor:
    """A stored tensor that is one logical tensor."""
    rows, columns = as_matrix(shape)
    return Tensor(name, tuple(shape), (Fill(name, 0, rows, 0, columns),))


def payload(tensor: Tensor, state: str, dtype: str) -> Payload:
    """A stored tensor as an output."""
    rows, columns = tensor.matrix
    return Payload(tensor.key, state, dtype, (Segment(rows, columns, tensor.fills),))


def crop(fills: Iterable[Fill], row: int, rows: int, column: int, columns: int) -> Iterator[Fill]:
    """The parts of fills inside a rectangle, placed relative to it."""
    for f in crossing(fills, row, row + rows):
        top, bottom = max(f.row, row), min(f.row + f.rows, row + rows)
        left, right = max(f.column, column), min(f.column + f.columns, column + columns)
        if top >= bottom or left >= right:
            continue
        down, across = top - f.row, left - f.column
        if f.transposed:
            down, across = across, down
        yield Fill(
            f.atom,
            top - row,
            bottom - top,
            left - column,
            right - left,
            f.at_row + down,
            f.at_column + across,
            f.pad,
            f.transposed,
        )


class _ByRows(Generic[Box]):
    """Finds those of many rectangles that cross some rows. Holds the tuple, so that its `id` stays its own."""

    def __init__(self, boxes: tuple[Box, ...]) -> None:
        self.given: tuple[Box, ...] = boxes
        self.boxes: list[Box] = sorted(boxes, key=lambda b: b.row)  # stable
        self.tops: list[int] = [b.row for b in self.boxes]
        self.bottoms: list[int] = list(itertools.accumulate((b.row + b.rows for b in self.boxes), max))

    def crossing(self, first: int, last: int) -> list[Box]:
        return self.boxes[bisect_right(self.bottoms, first) : bisect_left(self.tops, last)]


_FEW = 8  # rectangles that are quicker looked at one by one
_INDEXES: dict[int, _ByRows[Any]] = {}  # of tuples that were asked about lately, by id
_MOST_INDEXES = 64


def crossing(boxes: Iterable[Box], first: int, last: int) -> Iterable[Box]:
    """Rectangles (fills, places) that may cross rows `first` to `last`: of many in a tuple, only those that do."""
    if not isinstance(boxes, tuple) or len(boxes) <= _FEW:
        return boxes
    index = _INDEXES.get(id(boxes))
    if index is None or index.given is not boxes:
        if len(_INDEXES) >= _MOST_INDEXES:
            del _INDEXES[next(iter(_INDEXES))]
        index = _INDEXES[id(boxes)] = _ByRows(boxes)
    found: list[Box] = index.crossing(first, last)
    return found


def part(tensor: Tensor, rows: Sequence[tuple[int, int]], columns: tuple[int, int] | None = None) -> Tensor:
    """Intervals of a tensor's rows one after another, and an interval of its columns, as a tensor of its own."""
    width = tensor.matrix[1]
    left, right = columns or (0, width)
    fills: list[Fill] = []
    at = 0
    for start, stop in rows:
        for f in crop(tensor.fills, start, stop - start, left, right - left):
            fills.append(replace(f, row=f.row + at))
        at += stop - start
    shape = (at, *tensor.shape[1:]) if columns is None else (at, right - left)
    return Tensor(tensor.key, shape, tuple(fills))


def flat_segments(tensor: Tensor, start: int, stop: int) -> Iterator[Segment]:
    """Values `start` to `stop` of a flattened tensor, as at most three matrices."""
    _, columns = tensor.matrix
    while start < stop:
        row, column = divmod(start, columns)
        if column == 0 and stop - start >= columns:
            rows, width = (stop - start) // columns, columns
        else:
            rows, width = 1, min(columns - column, stop - start)
        yield Segment(rows, width, tuple(crop(tensor.fills, row, rows, column, width)))
        start += rows * width


def places(
    fills: Iterable[Fill], file: str | os.PathLike[str], start: int, columns: int, dtype: str
) -> Iterator[tuple[str, bool, Place]]:
    """(atom, whether its padding rows, place) of each fill of a matrix that lies in a file, row after row.

    Args:
        start: of the matrix [bytes].
        columns: of the matrix.
    """
    size = itemsize(dtype)
    for f in fills:
        if f.atom is None:
            continue
        rows, width = (f.columns, f.rows) if f.transposed else (f.rows, f.columns)
        first = start + (f.row * columns + f.column) * size
        yield (
            f.atom,
            f.pad,
            Place(os.fspath(file), first, columns * size, f.at_row, rows, f.at_column, width, f.transposed),
        )


def why_not_tiled(array: Array) -> str | None:
    """What is wrong with an array's places: None when they cover each value exactly once."""
    rows, columns = as_matrix(array.shape)
    if sum(p.rows * p.columns for p in array.places) != rows * columns:
        held = sum(p.rows * p.columns for p in array.places)
        return f"{held:,} of {rows * columns:,} values are there"
    seen: set[tuple[int, int, int, int]] = set()
    for p in array.places:
        if p.row < 0 or p.column < 0 or p.row + p.rows > rows or p.column + p.columns > columns:
            return "a part lies outside its shape"
        box = (p.row, p.column, p.rows, p.columns)
        if box in seen:
            return f"rows {p.row} to {p.row + p.rows} are there twice"
        seen.add(box)
    ordered = sorted(array.places, key=lambda p: (p.row, p.column))
    open_boxes: list[Place] = []
    for p in ordered:
        open_boxes = [o for o in open_boxes if o.row + o.rows > p.row]
        if any(o.column < p.column + p.columns and p.column < o.column + o.columns for o in open_boxes):
            return f"row {p.row} is there twice"
        open_boxes.append(p)
    return None


def convert(values: Matrix, given: str, wanted: str) -> Matrix:
    """Values in another dtype: to bfloat16 and float16 rounded to nearest, ties to even.

    Raises:
        UsageError: a finite value is too large for float16.
    """
    if given == wanted:
        return values
    if given == "bfloat16":
        widened = values.astype(np.uint32)
        widened <<= 16
        return convert(widened.view(np.float32), "float32", wanted)
    if wanted == "bfloat16":
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = bits >> 16
        rounded &= 1
        rounded += 0x7FFF
        rounded += bits
        rounded >>= 16
        nan = np.isnan(bits.view(np.float32))
        if nan.any():  # the largest ones became zeros
            rounded[nan] = (bits[nan] >> 16) | 0x40
        return rounded.astype(np.uint16)
    with np.errstate(over="ignore"):
        converted = values.astype(CARRIERS[wanted])
    if wanted == "float16" and bool((np.isinf(converted) & ~np.isinf(values)).any()):
        raise UsageError("a value is too large for float16", "convert to bf16 or fp32")
    return converted


def changed_by_rounding(values: Matrix, given: str, wanted: str) -> int:
    """How many values are other ones in another dtype. NaN stays NaN, whatever its bits."""
    if itemsize(given) < itemsize(wanted) or given == wanted:
        return 0
    if (given, wanted) == ("float32", "bfloat16"):
        bits = values.view(np.uint32)
        cut = (bits & 0xFFFF) != 0
        return int(np.count_nonzero(cut & ((bits & 0x7FFFFFFF) <= 0x7F800000)))
    kind = "float32" if given == "bfloat16" else given  # whose values numpy can compare
    before = convert(values, given, kind)
    after = convert(convert(values, given, wanted), wanted, kind)
    return int(np.count_nonzero((after != before) & ~((after != after) & (before != before))))


_MOST_MAPS = 256  # each holds a file open, and systems allow 1,024 and more


class Files:
    """Opens files as memory maps and reads rectangles out of them.

    Args:
        count_rounded: whether `rounded` is kept: values that reading in another dtype has changed.
    """

    def __init__(self, count_rounded: bool = False) -> None:
        self._maps: dict[str, mmap.mmap | bytes] = {}
        self.count_rounded = count_rounded
        self.rounded = 0

    def map(self, file: str) -> mmap.mmap | bytes:
        """A whole file's bytes, mapped.

        Raises:
            UsageError: it cannot be opened.
        """
        if file not in self._maps:
            try:
                with open(file, "rb") as f:
                    size = os.fstat(f.fileno()).st_size
                    if len(self._maps) >= _MOST_MAPS:
                        del self._maps[next(iter(self._maps))]
                    self._maps[file] = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
            except OSError as error:
                raise UsageError(f"`{file}` {why_unreadable(error)}") from None
        return self._maps[file]

    def part(self, file: str, start: int, end: int) -> tuple[mmap.mmap | bytes, int]:
        """A whole file's bytes, mapped, and `start`, where the bytes from `start` to `end` begin in them.

        Raises:
            UsageError: the file ends before them.
        """
        data = self.map(file)
        if start < 0 or end > len(data):
            raise UsageError(f"`{file}` has {len(data):,} bytes, {end:,} are needed: the file was cut off")
        return data, start

    def view(self, place: Place, dtype: str) -> Matrix:
        """The values of a place, [rows, columns], not copied.

        Raises:
            UsageError: the file ends before them.
        """
        size = itemsize(dtype)
        rows, columns = (place.columns, place.rows) if place.transposed else (place.rows, place.columns)
        end = place.start + (rows - 1) * place.stride + columns * size
        data, _ = self.part(place.file, place.start, end if rows and columns else place.start)
        view = np.ndarray((rows, columns), CARRIERS[dtype], data, place.start, (place.stride, size))
        return view.T if place.transposed else view

    def read(self, array: Array, row: int, column: int, out: Matrix, dtype: str) -> None:
        """Copy the rectangle at (row, column) of an array into `out`, in `dtype`."""
        rows, columns = out.shape
        if isinstance(array, Mean):
            total = np.zeros(out.shape, np.float64)
            for weight, one in array.of:
                part = np.empty(out.shape, np.float64)
                self.read(one, row, column, part, "float64")
                part *= weight
                total += part
            mean = convert(total, "float64", array.dtype)
            if self.count_rounded:
                self.rounded += changed_by_rounding(mean, array.dtype, dtype)
            out[...] = convert(mean, array.dtype, dtype)
            return
        found = 0
        for p in crossing(array.places, row, row + rows):
            top, bottom = max(p.row, row), min(p.row + p.rows, row + rows)
            left, right = max(p.column, column), min(p.column + p.columns, column + columns)
            if top >= bottom or left >= right:
                continue
            view = self.view(p, array.dtype)[top - p.row : bottom - p.row, left - p.column : right - p.column]
            if self.count_rounded and array.dtype != dtype:
                self.rounded += changed_by_rounding(view, array.dtype, dtype)
            out[top - row : bottom - row, left - column : right - column] = convert(view, array.dtype, dtype)
            found += (bottom - top) * (right - left)
        # What is not there would be whatever the buffer held before.
        assert found == rows * columns, f"{found} of {rows * columns} values at [{row}, {column}] of {array.shape}"

    def fill(
        self, segment: Segment, first: int, last: int, array_of: ArrayOf, out: Matrix, dtype: str, column: int = 0
    ) -> None:
        """Make rows `first` to `last` of a segment, from a column on as many as `out` has.

        Args:
            array_of: gives the `Array` of (atom, whether its padding rows), in the state that is wanted.
        """
        for f in crop(segment.fills, first, last - first, column, out.shape[1]):
            into = out[f.row : f.row + f.rows, f.column : f.column + f.columns]
            if f.atom is None:
                into[...] = 0
                continue
            array = array_of(f.atom, f.pad)
            self.read(array, f.at_row, f.at_column, into.T if f.transposed else into, dtype)

    def lying(
        self, segment: Segment, first: int, last: int, array_of: ArrayOf, dtype: str, least: int
    ) -> np.ndarray[Any, Any] | None:
        """Rows of a segment from `first` on, before `last`, that lie in a file just as they are wanted, not copied.

        Args:
            least: values that make it worth it; fewer are given only up to `last`.

        Returns:
            A flat array of whole rows; None if there is nothing like that.
        """
        width = segment.columns
        fill = next((f for f in crossing(segment.fills, first, first + 1) if f.row <= first < f.row + f.rows), None)
        if fill is None or fill.atom is None or fill.transposed or (fill.column, fill.columns) != (0, width):
            return None
        array = array_of(fill.atom, fill.pad)
        if array.dtype != dtype:
            return None
        row, column = fill.at_row + first - fill.row, fill.at_column
        for p in crossing(array.places, row, row + 1):
            if not p.row <= row < p.row + p.rows or not p.column <= column < p.column + p.columns:
                continue
            rows = min(last - first, fill.row + fill.rows - first, p.row + p.rows - row)
            is_dense = rows == 1 or p.stride == width * itemsize(dtype)
            is_wide = column + width <= p.column + p.columns
            if p.transposed or not is_dense or not is_wide or (rows * width < least and rows < last - first):
                return None
            view = self.view(p, dtype)[row - p.row : row - p.row + rows, column - p.column :][:, :width]
            return view.reshape(-1)
        return None

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the maps."""
        self._maps.clear()
