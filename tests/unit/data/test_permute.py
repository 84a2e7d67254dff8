"""The keyed order of documents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.data.permute import Permutation


@given(st.integers(1, 5000), st.integers(0, 2**63))
@settings(max_examples=100)
def test_every_value_comes_exactly_once(n: int, key: int) -> None:
    assert np.array_equal(np.sort(Permutation(n, key)(np.arange(n))), np.arange(n))


def test_the_order_does_not_depend_on_how_it_is_asked_for() -> None:
    order = Permutation(1000, 1, "content", 0)
    whole = order(np.arange(1000))
    assert [int(order(np.array([r]))[0]) for r in range(0, 1000, 37)] == whole[::37].tolist()


def test_the_order_is_pinned_for_all_machines_and_versions() -> None:
    assert Permutation(10, 1234, "hash", 0)(np.arange(10)).tolist() == [0, 3, 4, 5, 2, 7, 9, 8, 1, 6]


def test_other_keys_give_other_orders() -> None:
    orders = {tuple(Permutation(50, seed, "a", epoch)(np.arange(50))) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@pytest.mark.parametrize("n", [2, 3, 7, 24, 100])
def test_first_places_are_uniform_over_keys(n: int) -> None:
    trials = 200 * n
    first = np.array([int(Permutation(n, key, "uniform")(np.array([0]))[0]) for key in range(trials)])
    counts = np.bincount(first, minlength=n)
    chi = float(((counts - trials / n) ** 2 / (trials / n)).sum())
    assert chi < n - 1 + 5 * np.sqrt(2 * max(n - 1, 1)), chi


def test_neighbours_do_not_stay_neighbours() -> None:
    n = 20_000
    order = Permutation(n, 3, "far")(np.arange(n))
    assert (np.abs(np.diff(order)) < 5).mean() < 0.002
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.03


def test_a_trillion_documents_need_no_memory() -> None:
    order = Permutation(10**12, "large")(np.arange(1000) + 5 * 10**11)
    assert len(set(order.tolist())) == 1000 and order.max() < 10**12 and order.min() >= 0
