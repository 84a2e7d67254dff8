"""Gathers where the ranks' parts of each logical tensor lie; parts that several ranks have must be equal. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from cpt.base.errors import UsageError
from cpt.checkpoint.arrays import CARRIERS, Array, Files, Place, convert
from cpt.checkpoint.layouts import Held

_BLOCK = 1 << 18  # values compared at a time
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
Placed = tuple[str, bool, Place]  # (logical tensor, whether its padding rows, where)


class Parts:
    """What ranks hold, by state and logical tensor.

    Args:
        first_replica: take the first of copies that differ; what was overridden is in `overridden`.
    """

    def __init__(self, files: Files, *, first_replica: bool = False) -> None:
        self._files, self._first_replica = files, first_replica
        self._places: dict[tuple[str, str, bool], list[Place]] = {}
        self._dtypes: dict[tuple[str, str, bool], str] = {}
        self._copies: dict[tuple[str, str, int | None], tuple[str, str, list[Placed]]] = {}
        self.overridden: list[str] = []

    def add(self, rank: str, held: Held, tp: int, state: str, dtype: str, placed: Iterable[Placed]) -> None:
        """A state of a rank's parameter.

        Args:
            rank: for messages.
            tp: the tensor rank that the parameter is cut for.

        Raises:
            UsageError: another rank has the same part with other values or of another dtype.
        """
        placed = list(placed)
        part = (state, held.key, None if held.copied else tp)
        if part in self._copies:
            self._compare(rank, held, state, dtype, placed, self._copies[part])
            return
        self._copies[part] = (rank, dtype, placed)
        for atom, pad, place in placed:
            key = (state, atom, pad)
            if self._dtypes.setdefault(key, dtype) != dtype:
                raise UsageError(f"{rank}: `{held.name}` ({state}) is {dtype}, on other ranks {self._dtypes[key]}")
            self._places.setdefault(key, []).append(place)

    def states(self, atom: str, *, pad: bool = False) -> list[str]:
        """States of a logical tensor that are there."""
        return [s for s, a, p in self._places if (a, p) == (atom, pad)]

    def array(self, state: str, atom: str, shape: tuple[int, ...], *, pad: bool = False) -> Array | None:
        """A state of a logical tensor; None if it is not there. Whether its places tile it is not checked."""
        found = self._places.get((state, atom, pad))
        return None if found is None else Array(self._dtypes[state, atom, pad], shape, tuple(found))

    def _compare(
        self, rank: str, held: Held, state: str, dtype: str, placed: list[Placed], first: tuple[str, str, list[Placed]]
    ) -> None:
        other, other_dtype, other_placed = first
        if dtype != other_dtype:
            raise UsageError(f"`{held.name}` ({state}) is {other_dtype} on {other}, {dtype} on {rank}")
        count, largest = differences(self._files, dtype, other_placed, placed)
        if count == 0:
            return
        found = (
            f"copies of `{held.key}` ({state}) differ: {count:,} values of {other} and {rank}, "
            f"the largest difference is {largest:.3g}"
        )
        if not self._first_replica:
            raise UsageError(found, f"`--replicas first` takes those of {other}")
        self.overridden.append(f"{found}; those of {other} were taken")


def differences(files: Files, dtype: str, first: Iterable[Placed], second: Iterable[Placed]) -> tuple[int, float]:
    """Number of values whose bits differ between two copies of the same rectangles, and the largest difference."""
    arrays: dict[tuple[str, bool], list[Place]] = {}
    for atom, pad, place in first:
        arrays.setdefault((atom, pad), []).append(place)
    count, largest = 0, 0.0
    bits = _BITS[CARRIERS[dtype].itemsize]
    for atom, pad, place in second:
        array = Array(dtype, (), tuple(arrays.get((atom, pad), ())))
        values = files.view(place, dtype)
        for row, rows in _steps(place.rows, max(1, _BLOCK // max(1, place.columns))):
            for column, columns in _steps(place.columns, _BLOCK):
                ours = np.empty((rows, columns), CARRIERS[dtype])
                files.read(array, place.row + row, place.column + column, ours, dtype)
                theirs = np.ascontiguousarray(values[row : row + rows, column : column + columns])
                unequal = ours.view(bits) != theirs.view(bits)
                if unequal.any():
                    count += int(unequal.sum())
                    with np.errstate(invalid="ignore", over="ignore"):
                        a, b = (convert(v, dtype, "float64")[unequal] for v in (ours, theirs))
                        largest = max(largest, float(np.nanmax(np.abs(a - b), initial=0.0)))
    return count, largest


def _steps(length: int, step: int) -> Iterator[tuple[int, int]]:
    """(start, length) of pieces of an interval."""
    for start in range(0, length, step):
        yield start, min(step, length - start)
