"""Usage 3: the worked example, the closed form, intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.base.errors import UsageError
from cpt.laws.recommend.allocation import SizedLoss, allocation
from cpt.laws.rows import Floats, points
from tests.unit.laws.recommend.sets import DOMAIN, LAW, theta


def sized(theta_DP: Floats, share: float) -> SizedLoss:
    return lambda n_params_G, tokens_G: LAW.loss(theta_DP, points(n_params=n_params_G, tokens=tokens_G, share=share))[0]


def test_the_worked_example_holds_to_the_last_digit() -> None:
    found = allocation(sized(theta("M")[0], 0.5), flops=1e21)
    assert found.value == pytest.approx(1.81877e10, abs=5.1e4)
    assert found.tokens.value == pytest.approx(9.16372e9, abs=5.1e3)
    assert found.loss.value == pytest.approx(1.652935, abs=5.1e-7)
    assert not found.at_edge and 6 * found.value * found.tokens.value == pytest.approx(1e21)


@settings(max_examples=60)
@given(
    log_flops=st.floats(17, 25),
    alpha=st.floats(0.2, 0.6),
    beta=st.floats(0.2, 0.6),
    eta=st.floats(0.1, 2),
    share=st.floats(0.05, 1),
)
def test_it_agrees_with_the_closed_form(log_flops: float, alpha: float, beta: float, eta: float, share: float) -> None:
    p = DOMAIN | {"alpha": alpha, "beta": beta, "eta": eta}
    flops = 10**log_flops
    g = (alpha * p["A"] / (beta * p["B"] * share**eta)) ** (1 / (alpha + beta))
    n_opt = g * (flops / 6) ** (beta / (alpha + beta))
    found = allocation(sized(LAW.fitted(p)[None], share), flops=flops)
    if 2e4 < n_opt < flops / 6 / 2e5:
        assert found.value == pytest.approx(n_opt, rel=1e-5)
        assert not found.at_edge


def test_the_end_of_the_sizes_is_told() -> None:
    found = allocation(sized(theta("M")[0], 0.5), flops=1e21, largest=1e9)
    assert found.at_edge and found.value == pytest.approx(1e9)
    assert found.reason == "the loss still falls at the end of the sizes that were searched"


def test_intervals_come_from_the_draws() -> None:
    found = allocation(sized(theta("M", draws=101)[0], 0.5), flops=1e21)
    assert found.low < found.value < found.high
    closed = []
    for p in (LAW.natural(t) for t in theta("M", draws=101)[0]):
        g = (p["alpha"] * p["A"] / (p["beta"] * p["B"] * 0.5 ** p["eta"])) ** (1 / (p["alpha"] + p["beta"]))
        closed.append(g * (1e21 / 6) ** (p["beta"] / (p["alpha"] + p["beta"])))
    assert found.draws_D == pytest.approx(np.array(closed), rel=1e-3)
    assert found.to_json()["tokens"]["low"] < 9.16372e9


def test_a_budget_without_sense_is_refused() -> None:
    for flops in (0.0, -1.0, 1e5):
        with pytest.raises(UsageError, match=r"flops|budget"):
            allocation(sized(theta("M")[0], 0.5), flops=flops)
