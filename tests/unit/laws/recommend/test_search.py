"""Facts of the D-CPT form near share 0, and the search that does not trust it there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from cpt.laws.recommend.search import best_share, grid, without_rise
from cpt.laws.rows import Floats
from cpt.laws.shape import lowest_valid_share
from tests.unit.laws.recommend.sets import DOMAIN, GENERAL, LAW, D, N, loss


def slope(values: dict[str, float], r: float) -> float:
    """dL/dr of the D-CPT law."""
    rise = values["eta"] * values["B"] * r ** (values["eta"] - 1) / D ** values["beta"]
    return float(rise - values["gamma"] * values["C"] / (r + values["eps"]) ** (values["gamma"] + 1))


def turning(values: dict[str, float]) -> float:
    """The first root of the derivative, r_i."""
    shares = np.geomspace(1e-12, 1, 4000)
    falls = np.array([slope(values, r) < 0 for r in shares])
    assert falls.any() and not falls[0]
    first = int(falls.argmax())
    return float(optimize.brentq(lambda r: slope(values, r), shares[first - 1], shares[first], xtol=1e-15))


@pytest.mark.parametrize("values", [DOMAIN, GENERAL, DOMAIN | {"B": 900}, GENERAL | {"B": 700}])
def test_with_eta_below_1_the_law_rises_up_to_r_i_and_both_searches_find_it(values: dict[str, float]) -> None:
    found = turning(values)
    theta_P = LAW.fitted(values)
    assert lowest_valid_share(LAW, theta_P, N, D) == pytest.approx(found, rel=0.02)
    share_G = grid(0.0, 1.0)
    flat_DG, r_i_D = without_rise(loss(theta_P[None])(share_G, np.full_like(share_G, D)), share_G)
    assert r_i_D[0] == pytest.approx(found, rel=0.4)
    below = share_G < r_i_D[0]
    assert np.ptp(flat_DG[0, below]) == 0 and flat_DG[0, 0] >= flat_DG[0, ~below].max()


@settings(max_examples=80)
@given(
    eta=st.floats(1.0, 4.0),
    b=st.floats(1, 3000),
    c=st.floats(0.01, 2),
    eps=st.floats(0.001, 1),
    gamma=st.floats(0.05, 2),
)
def test_with_eta_of_1_or_more_the_sufficient_condition_makes_the_law_fall_everywhere(
    eta: float, b: float, c: float, eps: float, gamma: float
) -> None:
    values = DOMAIN | {"eta": eta, "B": b, "C": c, "eps": eps, "gamma": gamma}
    if gamma * c > eta * b * (1 + eps) ** (gamma + 1) / D ** values["beta"]:
        assert all(slope(values, r) < 0 for r in np.linspace(0, 1, 201))
        assert lowest_valid_share(LAW, LAW.fitted(values), N, D) == 0.0


def test_a_law_that_falls_from_the_start_is_left_as_it_is() -> None:
    share_G = grid(0.0, 1.0)
    loss_DG = np.stack([2 - share_G, 2 - share_G**2])
    flat_DG, r_i_D = without_rise(loss_DG, share_G)
    assert np.array_equal(flat_DG, loss_DG) and np.array_equal(r_i_D, [0.0, 0.0])


def test_the_grid_is_finest_next_to_0_and_1_and_keeps_its_ends() -> None:
    share_G = grid(0.0, 1.0)
    assert share_G[0] == 0 and share_G[-1] == 1 and np.all(np.diff(share_G) > 0)
    assert share_G[1] < 1e-6 and 1 - share_G[-2] < 1e-6
    part_G = grid(0.25, 0.75)
    assert part_G[0] == 0.25 and part_G[-1] == 0.75


def test_of_several_minima_the_lowest_is_found_in_every_draw() -> None:
    low_D1 = np.array([[0.81], [0.22], [0.5]])

    def wavy(share_G: Floats) -> Floats:
        away = share_G - low_D1
        return away**2 + 0.05 * (1 - np.cos(40 * away))

    found = best_share(wavy, None, np.inf, 0.0, 1.0)
    assert found.share_D == pytest.approx(low_D1[:, 0], abs=1e-5) and found.share_D[0] == pytest.approx(0.81, abs=1e-10)
    assert found.decided_by == "minimum" and found.admissible_D.all()


def test_the_answer_is_the_same_to_the_last_bit_whatever_other_draws_there_are() -> None:
    theta_P = LAW.fitted(DOMAIN | {"B": 900})

    def along(theta_DP: Floats) -> object:
        return lambda share_G: loss(theta_DP)(share_G, np.full_like(share_G, D))

    alone = best_share(along(theta_P[None]), None, np.inf, 0.0, 1.0)  # type: ignore[arg-type]
    among = best_share(along(np.stack([theta_P, theta_P + 0.01, theta_P - 0.02])), None, np.inf, 0.0, 1.0)  # type: ignore[arg-type]
    assert alone.share_D[0] == among.share_D[0]


def test_where_a_draw_gives_no_number_it_is_neither_chosen_nor_admissible() -> None:
    def objective(share_G: Floats) -> Floats:
        return np.stack([2 - share_G, np.where(share_G > 0.6, np.nan, 2 - share_G), np.full_like(share_G, np.inf)])

    def general(share_G: Floats) -> Floats:
        return np.stack([1 + share_G, 1 + share_G, np.where(share_G > 0.3, np.nan, 1.0)])

    with np.errstate(all="raise"):
        found = best_share(objective, general, 1.8, 0.0, 1.0)
    assert found.share_D[0] == pytest.approx(0.8, abs=1e-12) and found.decided_by == "tolerance"
    assert 0.59 < found.share_D[1] <= 0.6 and found.share_D[2] <= 0.3 and found.admissible_D.all()
