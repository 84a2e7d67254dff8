"""The stability-gap detector on curves whose gap is known."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.base.errors import UsageError
from cpt.evaluate import find_gap


def test_a_planted_gap_is_measured():
    gap = find_gap([0, 10, 20, 40, 80], [5.0, 4.0, 3.0, 5.0, 6.0], stderr=0.1)
    assert gap.is_gap and gap.depth == 2.0 and gap.relative == 0.4
    assert (gap.lowest_tokens, gap.recovery_tokens, gap.until) == (20, 40, 80)
    assert gap.area == pytest.approx(0.5 * 10 * 1 + 10 * 1.5 + 0.5 * 20 * 2)


def test_a_crossing_between_two_points_ends_the_area_there():
    gap = find_gap([0, 10, 20], [0.0, -1.0, 1.0])
    assert gap.area == pytest.approx(0.5 * 10 * 1 + 0.5 * 5 * 1)


def test_a_gap_that_never_closes_says_until_when():
    gap = find_gap([0, 500_000, 2_000_000], [-2.0, -3.0, -2.5], stderr=0.01)
    assert gap.is_gap and gap.recovery_tokens is None
    assert gap.text() == "1.000 deep, not recovered by 2.00M tokens"


def test_noise_is_not_a_gap():
    gap = find_gap([0, 1, 2, 3], [2.0, 1.9, 2.05, 1.95], stderr=0.06)
    assert not gap.is_gap and gap.depth == pytest.approx(0.1)
    assert gap.text() == "none above the noise"


def test_a_curve_that_only_rises_has_no_gap():
    gap = find_gap([0, 1, 2], [1.0, 2.0, 3.0])
    assert (gap.is_gap, gap.depth, gap.area, gap.recovery_tokens) == (False, 0.0, 0.0, None)


def test_recovery_counts_only_after_the_lowest_point():
    gap = find_gap([0, 1, 2, 3, 4], [1.0, 0.5, 1.0, 0.2, 0.9])
    assert gap.lowest_tokens == 3 and gap.recovery_tokens is None


@pytest.mark.parametrize(
    ("tokens", "scores"), [([], []), ([0, 1], [1.0]), ([0, 2, 1], [1.0, 1.0, 1.0]), ([0, 0], [1, 2])]
)
def test_a_curve_that_is_none_is_refused(tokens, scores):
    with pytest.raises(UsageError):
        find_gap(tokens, scores)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=20), st.floats(-100, 100))
def test_a_gap_does_not_depend_on_the_level(scores, shift):
    tokens = list(range(0, 10 * len(scores), 10))
    one, other = find_gap(tokens, scores), find_gap(tokens, [s + shift for s in scores])
    assert one.depth >= 0 and one.area >= 0
    assert one.depth == pytest.approx(other.depth, abs=1e-9) and one.area == pytest.approx(other.area, abs=1e-6)
