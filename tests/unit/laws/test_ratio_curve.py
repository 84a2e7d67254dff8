"""A CMR law as a smooth curve: the ratio law through the token laws, without the single points' own scatter."""

from __future__ import annotations

import numpy as np
import pytest

from cpt.laws.cmr import UNIT, Cmr
from cpt.laws.ratio_curve import ratio_curve
from cpt.laws.rows import points

RATIOS = (0.125, 0.25, 0.5, 0.75)  # of domain data


def law(side: str) -> tuple[Cmr, np.ndarray]:
    """Token laws whose constants follow 0.3·R^0.5, but for one that lies 0.05 off."""
    shares = RATIOS if side == "domain" else tuple(sorted(1 - r for r in RATIOS))
    found = Cmr(side=side, ratios=shares, base=2.0)
    theta = []
    for share in shares:
        ratio = share if side == "domain" else 1 - share
        constant = 0.3 * ratio**0.5 + (0.05 if ratio == 0.25 else 0.0)
        theta += [-0.1, 0.3, constant] if side == "domain" else [0.1, 0.3, -0.05, 0.4, constant]
    return found, np.array([theta])


@pytest.mark.parametrize("side", ["domain", "general"])
def test_the_curve_is_the_ratio_law_also_at_measured_ratios(side: str) -> None:
    found, theta_DP = law(side)
    curve = ratio_curve(found, theta_DP)
    share_G = np.linspace(0.2, 0.8, 601)
    loss_G = curve(share_G, np.full(601, 30 * UNIT))[0]
    assert np.abs(np.diff(loss_G, 2)).max() < 1e-5  # smooth
    between = np.array([0.3, 0.6])
    asked = found.loss(theta_DP, points(tokens=30 * UNIT, share=between, base=2.0))[0]
    assert curve(between, np.full(2, 30 * UNIT)) == pytest.approx(asked, abs=1e-8)
    own = 0.25 if side == "domain" else 0.75
    at = found.loss(theta_DP, points(tokens=30 * UNIT, share=np.array([own]), base=2.0))[0]
    assert abs(at - curve(np.array([own]), np.array([30 * UNIT]))).max() > 0.005  # the token law keeps its scatter


def test_the_share_is_that_of_the_measured_corpus() -> None:
    for side, sign in (("domain", 1), ("general", -1)):
        found, theta_DP = law(side)
        low, high = ratio_curve(found, theta_DP)(np.array([0.3, 0.7]), np.array([30 * UNIT] * 2))[0]
        assert sign * (high - low) > 0  # both laws rise with R here


def test_each_length_has_its_own_curve() -> None:
    found, theta_DP = law("domain")
    curve = ratio_curve(found, theta_DP)
    mixed = curve(np.array([0.3, 0.3]), np.array([10, 100]) * UNIT)[0]
    alone = [curve(np.array([0.3]), np.array([t * UNIT]))[0, 0] for t in (10, 100)]
    assert mixed == pytest.approx(alone) and mixed[1] < mixed[0]
