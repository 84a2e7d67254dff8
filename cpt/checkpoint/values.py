"""What is odd about the values of a tensor: NaN, infinity, all zero, all the same, too small for full precision.

Looked at block by block while the values pass by anyway. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

MANY_SUBNORMALS = 0.01  # more of them than this part of all values is reported
_BLOCK = 1 << 16  # values looked at together: what stays in a core's cache
# Of each float dtype: carrier, bits without the sign, the first bits that are not finite, the first normal ones.
_FLOATS: Mapping[str, tuple[Any, int, int, int]] = {
    "float32": (np.uint32, 0x7FFFFFFF, 0x7F800000, 0x00800000),
    "bfloat16": (np.uint16, 0x7FFF, 0x7F80, 0x0080),
    "float16": (np.uint16, 0x7FFF, 0x7C00, 0x0400),
    "float64": (np.uint64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000, 0x0010000000000000),
}


@dataclass
class Seen:
    """What was seen of one tensor; `add` and `join` change it.

    Args:
        numel: values seen.
        nan, infinite, subnormal: how many of them.
        first: index of the first NaN or infinity, row after row; None = none.
        same: bits that all values share; None = they differ, or none was seen.
    """

    dtype: str
    numel: int = 0
    nan: int = 0
    infinite: int = 0
    subnormal: int = 0
    first: int | None = None
    same: int | None = None

    def add(self, values: np.ndarray[Any, Any], start: int = 0) -> None:
        """Look at a block of values.

        Args:
            values: in the dtype's carrier, contiguous.
            start: index of its first value in the tensor.
        """
        bits = values.reshape(-1).view(f"u{values.dtype.itemsize}")
        for first in range(0, len(bits), _BLOCK):
            self._block(bits[first : first + _BLOCK], start + first)

    def _block(self, bits: np.ndarray[Any, Any], start: int) -> None:
        one = int(bits[0])
        if (self.same == one or not self.numel) and bool((bits == bits[0]).all()):
            self.same = one
        else:
            self.same = None
        self.numel += len(bits)
        if self.dtype not in _FLOATS:
            return
        kind, magnitude, infinity, normal = _FLOATS[self.dtype]
        size = bits & kind(magnitude)
        if int(size.max()) >= infinity:
            odd = np.flatnonzero(size >= kind(infinity))
            infinite = int((size[odd] == kind(infinity)).sum())
            self.infinite += infinite
            self.nan += len(odd) - infinite
            at = start + int(odd[0])
            self.first = at if self.first is None else min(self.first, at)
        size -= kind(1)  # zero becomes the largest
        self.subnormal += int(np.count_nonzero(size < kind(normal - 1)))

    def join(self, other: Seen) -> None:
        """Take in what was seen of other values of the same tensor."""
        if other.numel:
            self.same = other.same if self.numel == 0 or self.same == other.same else None
        self.numel += other.numel
        self.nan += other.nan
        self.infinite += other.infinite
        self.subnormal += other.subnormal
        if other.first is not None:
            self.first = other.first if self.first is None else min(self.first, other.first)

    @property
    def is_zero(self) -> bool:
        """Whether all values are 0 or all are -0."""
        sign = _FLOATS[self.dtype][1] + 1 if self.dtype in _FLOATS else 0
        return self.numel > 0 and self.same in (0, sign)

    @property
    def is_constant(self) -> bool:
        """Whether there are several values, all the same, and not zero."""
        return self.numel > 1 and self.same is not None and not self.is_zero

    @property
    def is_finite(self) -> bool:
        return self.nan == self.infinite == 0


def not_finite(seen: Mapping[str, Seen]) -> list[str]:
    """One line for each tensor with NaN or infinite values: how many, and the first index."""
    lines = []
    for name, s in seen.items():
        if not s.is_finite:
            counts = [f"{n:,} {what}" for n, what in ((s.nan, "NaN"), (s.infinite, "infinite")) if n]
            lines.append(f"`{name}` holds {' and '.join(counts)} values, the first at index {s.first:,}")
    return lines


def odd(seen: Mapping[str, Seen]) -> list[str]:
    """One line for each kind of oddity that can be meant: all zero, all the same, many subnormal values."""
    kinds = {
        "all values are zero in": [n for n, s in seen.items() if s.is_zero],
        "all values are the same in": [n for n, s in seen.items() if s.is_constant],
        f"more than {MANY_SUBNORMALS:.0%} of the values are subnormal in": [
            n for n, s in seen.items() if s.subnormal > MANY_SUBNORMALS * s.numel
        ],
    }
    return [f"{what} {some(names)}" for what, names in kinds.items() if names]


def some(names: Iterable[str], most: int = 3) -> str:
    """The first few of many names."""
    names = list(names)
    return ", ".join(f"`{n}`" for n in names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
