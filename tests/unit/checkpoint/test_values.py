"""Odd values: counts against numpy, whatever the blocks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.checkpoint.arrays import CARRIERS, convert
from cpt.checkpoint.values import Seen, not_finite, odd

FLOATS = ("float32", "bfloat16", "float16", "float64")


@pytest.mark.parametrize("dtype", FLOATS)
@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(1, 2000), max_size=4))
@settings(max_examples=25)
def test_counts_are_those_of_numpy_however_the_values_are_cut(dtype: str, seed: int, cuts: list[int]) -> None:
    random = np.random.default_rng(seed)
    values = random.integers(0, 256, 2000 * CARRIERS[dtype].itemsize, dtype=np.uint8).view(CARRIERS[dtype])
    wide = convert(values, dtype, "float32") if dtype == "bfloat16" else values
    with np.errstate(invalid="ignore"):
        small = np.finfo(np.float32 if dtype == "bfloat16" else values.dtype).tiny
        expected = (
            int(np.isnan(wide).sum()),
            int(np.isinf(wide).sum()),
            int(((wide != 0) & (np.abs(wide) < small)).sum()),
        )
    whole = Seen(dtype)
    edges = sorted({0, *cuts, 2000})
    for start, stop in itertools.pairwise(edges):
        one = Seen(dtype)
        one.add(values[start:stop], start)
        whole.join(one)
    found = np.flatnonzero(~np.isfinite(wide))
    assert (whole.nan, whole.infinite, whole.subnormal) == expected and whole.numel == 2000
    assert whole.first == (int(found[0]) if len(found) else None)
    assert not whole.is_constant and not whole.is_zero


@pytest.mark.parametrize("size", [1, 70_000, 200_000])
def test_zero_and_constant_tensors_are_told_apart(size: int) -> None:
    seen = {}
    for name, value in (("zero", 0.0), ("minus", -0.0), ("one", 1.0)):
        seen[name] = Seen("float32")
        seen[name].add(np.full(size, value, np.float32))
    seen["last"] = Seen("float32")
    last = np.ones(size, np.float32)
    last[-1] = 2
    seen["last"].add(last)
    seen["whole"] = Seen("int64")
    seen["whole"].add(np.zeros(size, np.int64))
    assert [n for n, s in seen.items() if s.is_zero] == ["zero", "minus", "whole"]
    assert [n for n, s in seen.items() if s.is_constant] == (["one"] if size > 1 else [])
    assert odd(seen)[0] == "all values are zero in `zero`, `minus`, `whole`"


def test_what_is_not_finite_is_said_with_its_place() -> None:
    values = np.ones(100_000, np.float32)
    values[70_000:70_002] = np.nan, -np.inf
    seen = Seen("float32")
    seen.add(values)
    assert not_finite({"w": seen, "v": Seen("float32")}) == [
        "`w` holds 1 NaN and 1 infinite values, the first at index 70,000"
    ]
