"""The threshold answer, the T_0 answer beside it, and which of the two decides."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest

from cpt.laws.fit import fit
from cpt.laws.mixing import Mixing
from cpt.laws.recommend.critical import critical
from cpt.laws.recommend.threshold import threshold
from cpt.laws.rows import Floats, points, rows
from tests.shared import shared_data
from tests.unit.laws.recommend.sets import BASE, D, both


def exponential(c: float, t: float, b: float) -> object:
    return lambda share_G, tokens_G: (c + np.exp(t * share_G + b))[None]


def test_the_threshold_of_an_exponential_law_is_its_closed_form() -> None:
    found = threshold(exponential(2.8, -3.7, -1.7), tokens=D, base_general=2.87, eps_g=0.01)  # type: ignore[arg-type]
    assert found.replay == pytest.approx((math.log(0.08) + 1.7) / -3.7, abs=1e-12)
    assert found.decided_by == "tolerance" and not found.at_edge
    assert found.loss_general is not None and found.loss_general.value == pytest.approx(2.88, abs=1e-12)


@pytest.mark.parametrize("two_stage", [True, False])
def test_k1_the_critical_general_share_of_the_python_runs(two_stage: bool) -> None:
    with open(shared_data() / "laws" / "cpt_pile_python_70m.csv", newline="") as file:
        last = [row for row in csv.DictReader(file) if row["step"] == "10000"]
    general = rows([float(r["loss_general"]) for r in last], share=[float(r["r_general"]) for r in last])
    found = fit(Mixing.for_rows(general, two_stage=two_stage)[0], general, scale="linear", delta=0.02)

    def loss(share_G: Floats, tokens_G: Floats) -> Floats:
        return found.law.loss(found.theta_P[None], points(share=share_G))[0]

    answer = threshold(loss, tokens=10000 * 1048576, base_general=2.8733676, eps_g=0.0)
    assert 0.279 <= answer.replay <= 0.290
    assert answer.replay == pytest.approx(0.286225 if two_stage else 0.2831, abs=2e-4)


def test_a_threshold_that_is_never_reached_is_the_end_of_the_shares() -> None:
    found = threshold(both("M")[1], tokens=D, base_general=4.0, eps_g=0.0)
    assert found.value == 1.0 and found.at_edge and found.decided_by == "range"
    none = threshold(both("M")[1], tokens=D, base_general=2.0, eps_g=0.0)
    assert math.isnan(none.value) and none.smallest_rise == pytest.approx(0.285752, abs=1e-6)


def test_the_threshold_takes_the_largest_share_where_the_domain_loss_would_turn_back() -> None:
    """Set T: the trade-off stops at 0.827888, the threshold goes on to the edge of the admissible set."""
    for tolerance, edge in ((0.03, 0.881289), (0.05, 0.928633)):
        found = threshold(both("T")[1], tokens=D, base_general=BASE["T"], tolerance=tolerance, domain=both("T")[0])
        assert found.value == pytest.approx(edge, abs=5.1e-7)
        assert found.loss_domain is not None and found.loss_domain.value > 1.919978


def test_the_smaller_of_the_two_answers_decides() -> None:
    general = both("M", draws=51)[1]
    by_loss = threshold(general, tokens=D, base_general=BASE["M"], tolerance=0.05)
    spread_D = np.linspace(-0.05, 0.05, 51)
    spread_D[0] = 0.0
    early = critical(by_loss, 0.4 + spread_D)
    assert early.answer.value == pytest.approx(0.4) and early.answer.decided_by == "turning"
    assert early.answer.reason.startswith("with more domain data the objective would not begin to fall")
    assert f"share of {by_loss.value:.4f}" in early.answer.reason
    assert early.answer.high <= 0.45 and early.turning.low < 0.4 < early.turning.high
    late = critical(by_loss, 0.95 + spread_D)
    assert late.answer.value == by_loss.value and late.answer.decided_by == "threshold"
    assert late.threshold is by_loss and not late.clipped


def test_a_cmr_law_beyond_0_and_1_is_clipped_and_says_so() -> None:
    by_loss = threshold(both("M")[1], tokens=D, base_general=BASE["M"], tolerance=0.05)
    above = critical(by_loss, np.array([1.7]))
    assert above.clipped and above.turning.value == 1.0 and above.answer.value == by_loss.value
    assert above.answer.notes == ("the CMR law gives 1.700, clipped to 1",)
    below = critical(by_loss, np.array([-0.2]))
    assert below.answer.value == 0.0 and below.answer.at_edge and below.answer.decided_by == "turning"


def test_without_an_admissible_share_there_is_no_critical_ratio() -> None:
    none = threshold(both("M")[1], tokens=D, base_general=2.0, eps_g=0.0)
    found = critical(none, np.array([0.5]))
    assert found.answer.decided_by == "nothing" and math.isnan(found.answer.value)
    assert found.to_json()["value"] is None and found.to_json()["turning"]["value"] == 0.5
