"""CRC-32 as zlib's and zip files', by the fastest code at hand. No torch."""

from __future__ import annotations

from functools import lru_cache

try:  # carry-less multiplication: many times zlib's rate
    from isal.isal_zlib import crc32
except ImportError:  # no wheel for this machine
    from zlib import crc32

__all__ = ["crc32", "crc32_of_both"]


def crc32_of_both(first: int, second: int, length: int) -> int:
    """CRC-32 of two stretches of bytes, one after the other.

    Args:
        first, second: CRC-32 of each.
        length: of the second [bytes].

    Source:
        A CRC is linear over GF(2): adding `length` zero bytes multiplies it by x^(8·length) modulo the polynomial.
    """
    return _times(_power(8 * length), first) ^ second


_POLYNOMIAL = 0xEDB88320  # of CRC-32; the highest bit is x^0


def _times(a: int, b: int) -> int:
    product = 0
    bit = 1 << 31
    while bit:
        if a & bit:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
        bit >>= 1
    return product


@lru_cache(maxsize=1024)
def _power(exponent: int) -> int:
    """x to a power."""
    result, square = 1 << 31, 1 << 30  # x^0, x^1
    while exponent:
        if exponent & 1:
            result = _times(result, square)
        square = _times(square, square)
        exponent >>= 1
    return result
