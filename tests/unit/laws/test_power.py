"""a·x^s + b solved by a search over s alone."""

from __future__ import annotations

import numpy as np
import pytest

from cpt.laws.power import box_cox, fit_power


@pytest.mark.parametrize("s", [-1.7, -0.2, 0.3, 2.5])
def test_a_curve_is_found_again(s: float) -> None:
    x = np.array([0.1, 0.25, 0.5, 0.75, 1.0])
    a_B, s_B, b_B = fit_power(x, np.stack([2 * x**s + 1, -0.3 * x**s + 5]))
    assert a_B == pytest.approx([2, -0.3], rel=1e-6)
    assert s_B == pytest.approx([s, s], rel=1e-6)
    assert b_B == pytest.approx([1, 5], rel=1e-6)


def test_a_logarithm_is_followed_by_a_tiny_exponent() -> None:
    x = np.array([1.0, 2.0, 5.0, 10.0])
    a_B, s_B, b_B = fit_power(x, 3 - 0.5 * np.log(x))
    assert abs(s_B[0]) < 1e-4
    assert a_B * 7.0**s_B + b_B == pytest.approx(3 - 0.5 * np.log(7.0), abs=1e-4)


def test_the_least_squares_solution_is_not_beaten_nearby() -> None:
    rng = np.random.default_rng(0)
    x, y = np.linspace(0.1, 1, 8), rng.normal(size=8)
    a, s, b = (v[0] for v in fit_power(x, y))

    def misfit(exponent: float) -> float:
        design = np.stack([x**exponent, np.ones(8)], 1)
        return float(np.linalg.lstsq(design, y, rcond=None)[1][0])

    assert np.sum((a * x**s + b - y) ** 2) <= min(misfit(e) for e in np.linspace(-8, 8, 1000)) + 1e-9


def test_slopes_by_the_exponent_are_right_on_both_sides_of_zero() -> None:
    log_x = np.log(np.array([0.2, 0.9, 3.0, 40.0]))
    for s in (-1.0, -2e-4, 0.0, 1e-4, 0.7):
        _, slope, bend = box_cox(log_x, np.array(s))
        up, down = box_cox(log_x, np.array(s + 1e-4)), box_cox(log_x, np.array(s - 1e-4))
        assert slope == pytest.approx((up[0] - down[0]) / 2e-4, rel=1e-5)
        assert bend == pytest.approx((up[1] - down[1]) / 2e-4, rel=1e-5)
