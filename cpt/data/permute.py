"""A keyed random order of 0..n-1 in constant memory: a Feistel network on the smallest even-bit domain that holds n.

Values that fall outside 0..n-1 are sent through the network again (cycle walking), which keeps it a bijection; the
domain is less than 4 n, so a value needs fewer than four rounds trips on average.

Source:
    Luby and Rackoff 1988 (Feistel bijections); Black and Rogaway 2002, "Ciphers with arbitrary finite domains" (cycle
    walking). The round function is the mixer of splitmix64 (Steele et al. 2014).
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

_ROUNDS = 6
_A = np.uint64(0xBF58476D1CE4E5B9)
_B = np.uint64(0x94D049BB133111EB)


class Permutation:
    """A bijection of 0..n-1.

    Args:
        n: how many values.
        key: anything; equal keys give equal orders on every machine.
    """

    def __init__(self, n: int, *key: object) -> None:
        assert n > 0, "a permutation of nothing"
        self.n = n
        self.half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
        self.mask = np.uint64((1 << int(self.half)) - 1)
        text = "/".join(map(str, key)).encode()
        digest = hashlib.blake2b(text, digest_size=8 * _ROUNDS).digest()
        self.keys = np.frombuffer(digest, "<u8").astype(np.uint64)

    def __call__(self, ranks: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The values at these ranks.

        Shapes:
            ranks [k] int → [k] int64
        """
        values = self._network(np.asarray(ranks, np.uint64))
        outside = np.flatnonzero(values >= np.uint64(self.n))
        while len(outside):
            walked = self._network(values[outside])
            values[outside] = walked
            outside = outside[walked >= np.uint64(self.n)]
        return values.astype(np.int64)

    def _network(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        left, right = values >> self.half, values & self.mask
        with np.errstate(over="ignore"):
            for key in self.keys:
                mixed = right + key
                mixed = (mixed ^ (mixed >> np.uint64(30))) * _A
                mixed = (mixed ^ (mixed >> np.uint64(27))) * _B
                left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & self.mask)
        return (left << self.half) | right
