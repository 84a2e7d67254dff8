"""What is odd about the values of a tensor: NaN, infinity, all zero, all the same, too small for full precision.

`Kind` and `the_one` say it of bits, `Seen` of a tensor of which blocks come by. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

MANY_SUBNORMALS = 0.01  # more of them than this part of all values is reported
_SUSPICIOUS = 0.004  # of the values looked at, above which all are counted
_WINDOW, _EVERY = 1024, 8192  # values looked at, of how many
_SHARE = 1 << 18  # values that stay in a core's cache
_BLOCK = 1 << 17  # the same where copies of them are made
Values = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Kind:
    """Bits of a float dtype, looked at as integers.

    Args:
        carrier, signed: integers of its size.
        infinity: bits of infinity; NaN is above it.
        largest: bits of the largest subnormal value.
    """

    carrier: Any
    signed: Any
    infinity: int
    largest: int

    @property
    def sign(self) -> int:
        """Bits of -0."""
        return self.infinity + self.largest + 1

    def magnitude(self, bits: Values) -> Values:
        """A copy of values without their signs."""
        return bits & self.carrier(self.infinity | self.largest)

    def nonfinite(self, bits: Values) -> Values:
        """Which values are NaN or infinite, of any shape."""
        return self.magnitude(bits) >= self.carrier(self.infinity)

    def subnormal(self, bits: Values) -> Values:
        """Which values are subnormal, of any shape."""
        size = self.magnitude(bits)
        size -= self.carrier(1)  # zero becomes the largest of all
        return size < self.carrier(self.largest)

    def has_nonfinite(self, bits: Values) -> bool:
        """Whether any is NaN or infinite: positive ones are large as signed integers, negative ones as unsigned.

        Args:
            bits: flat, contiguous. Nothing is copied.
        """
        for at in range(0, len(bits), _SHARE):
            part = bits[at : at + _SHARE]
            if int(part.max()) >= (self.infinity | self.sign) or int(part.view(self.signed).max()) >= self.infinity:
                return True
        return False

    def are_normal(self, bits: Values) -> bool:
        """Whether all are finite, full in precision and not zero; of each sign the smallest and the largest tell.

        Args:
            bits: flat, contiguous, few enough to stay in a core's cache. Nothing is copied.
        """
        signed = bits.view(self.signed)
        return bool(
            bits.max() < (self.infinity | self.sign)
            and signed.max() < self.infinity
            and bits.min() > self.largest
            and signed.min() > self.largest - self.sign
        )

    def may_be_subnormal(self, bits: Values) -> bool:
        """Whether more than a few values are subnormal, by looking at short stretches of them.

        Args:
            bits: flat, contiguous.
        """
        whole = len(bits) // _EVERY * _EVERY
        stretches = bits[:whole].reshape(-1, _EVERY)[:, :_WINDOW]
        rest = bits[whole:][:_EVERY]
        step = _SHARE // _WINDOW
        count = int(np.count_nonzero(self.subnormal(rest)))
        for at in range(0, len(stretches), step):
            count += int(np.count_nonzero(self.subnormal(stretches[at : at + step])))
        return count > _SUSPICIOUS * (stretches.size + len(rest))


FLOATS: Mapping[str, Kind] = {
    "float32": Kind(np.uint32, np.int32, 0x7F800000, 0x007FFFFF),
    "bfloat16": Kind(np.uint16, np.int16, 0x7F80, 0x007F),
    "float16": Kind(np.uint16, np.int16, 0x7C00, 0x03FF),
    "float64": Kind(np.uint64, np.int64, 0x7FF0000000000000, 0x000FFFFFFFFFFFFF),
}


def the_one(bits: Values) -> int | None:
    """The bits that all values share; None = they differ.

    Args:
        bits: of at least one value; those at the beginning are looked at first.
    """
    first = bits[(0,) * bits.ndim]
    return None if (bits[0] != first).any() or (bits != first).any() else int(first)


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

    def add(self, values: Values, start: int = 0) -> None:
        """Look at a block of values.

        Args:
            values: in the dtype's carrier, contiguous.
            start: index of its first value in the tensor.
        """
        bits = values.reshape(-1).view(f"u{values.dtype.itemsize}")
        for first in range(0, len(bits), _BLOCK):
            self._block(bits[first : first + _BLOCK], start + first)

    def _block(self, bits: Values, start: int) -> None:
        if not self.numel or self.same == int(bits[0]):
            self.same = the_one(bits)
        else:
            self.same = None
        self.numel += len(bits)
        kind = FLOATS.get(self.dtype)
        if kind is None or kind.are_normal(bits):
            return
        if kind.has_nonfinite(bits):
            odd = np.flatnonzero(kind.nonfinite(bits))
            infinite = int(np.count_nonzero(kind.magnitude(bits[odd]) == kind.infinity))
            self.infinite += infinite
            self.nan += len(odd) - infinite
            at = start + int(odd[0])
            self.first = at if self.first is None else min(self.first, at)
        self.subnormal += int(np.count_nonzero(kind.subnormal(bits)))

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
        minus = FLOATS[self.dtype].sign if self.dtype in FLOATS else 0
        return self.numel > 0 and self.same in (0, minus)

    @property
    def is_constant(self) -> bool:
        """Whether there are several values, all the same, and not zero."""
        return self.numel > 1 and self.same is not None and not self.is_zero

    @property
    def is_finite(self) -> bool:
        """Whether neither NaN nor infinity was seen."""
        return self.nan == self.infinite == 0


def not_finite(seen: Mapping[str, Seen]) -> list[str]:
    """One line for each tensor with NaN or infinite values: how many, and the first index."""
    lines = []
    for name, s in seen.items():
        if not s.is_finite:
            counts = [f"{n:,} {what}" for n, what in ((s.nan, "NaN"), (s.infinite, "infinite")) if n]
            what = f"{' and '.join(counts)} value{'s' * (s.nan + s.infinite > 1)}"
            lines.append(f"`{name}` holds {what}, the first at index {s.first:,}")
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
    return ", ".join(f"`{n}`" for n in names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
