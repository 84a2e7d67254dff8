"""Usage 2: the worked examples, caps, the smallest share, epochs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cpt.base.errors import UsageError
from cpt.laws.recommend.limited import limited
from cpt.laws.recommend.tradeoff import tradeoff
from cpt.laws.repeated import R_DATA
from tests.unit.laws.recommend.sets import BASE, DOMAIN, D, both, loss, theta


@pytest.mark.parametrize(
    ("name", "domain_tokens", "ratio", "domain"),
    [
        ("M", 1e9, 0.710297, 1.813701),
        ("T", 1e9, 0.259389, 2.072841),
        ("T", 5e9, 0.438733, 1.933881),
        ("T", 2e10, 0.663633, 1.829880),
    ],
)
def test_the_worked_examples_hold_to_the_last_digit(
    name: str, domain_tokens: float, ratio: float, domain: float
) -> None:
    found = limited(*both(name), domain_tokens=domain_tokens)
    assert found.value == pytest.approx(ratio, abs=5.1e-7)
    assert found.loss_domain is not None and found.loss_domain.value == pytest.approx(domain, abs=5.1e-7)
    assert found.decided_by == "minimum" and not found.at_edge
    assert found.domain_tokens == pytest.approx(domain_tokens) and found.epochs == pytest.approx(1)
    assert found.tokens == pytest.approx(domain_tokens / ratio, rel=4e-6)


def test_the_total_of_the_worked_example() -> None:
    assert limited(*both("M"), domain_tokens=1e9).tokens == pytest.approx(1.40786e9, abs=5.1e3)


def test_with_plenty_of_domain_data_no_general_data_are_added() -> None:
    found = limited(*both("M"), domain_tokens=5e9)
    assert found.value == 1.0 and found.at_edge and found.decided_by == "range" and found.replay_tokens == 0
    assert found.reason == "general data only dilute the domain data here; the run is domain data alone"


def test_an_interior_answer_solves_the_published_equation_and_does_not_depend_on_the_size() -> None:
    domain_DP, _ = theta("M")
    for n_params in (1e8, 1.8e9, 7e10):
        r, p = limited(loss(domain_DP, n_params), domain_tokens=1e9).value, DOMAIN
        left = (p["eta"] + p["beta"]) * p["B"] * r ** (p["eta"] + p["beta"] - 1) / 1e9 ** p["beta"]
        assert left == pytest.approx(p["gamma"] * p["C"] / (r + p["eps"]) ** (p["gamma"] + 1), rel=1e-9)


def test_a_budget_is_spent_with_all_domain_data_in_it() -> None:
    """Set M would like 1.408e9 tokens for 1e9 of domain data."""
    found = limited(*both("M"), domain_tokens=1e9, max_tokens=1.2e9)
    assert found.value == 1 / 1.2 and found.tokens == pytest.approx(1.2e9) and found.decided_by == "minimum"
    assert found.reason == "the longest run that is allowed, with all the domain data in it"
    free = limited(*both("M"), domain_tokens=1e9, max_tokens=5e9)
    assert free.value == pytest.approx(0.710297, abs=5.1e-7) and not free.notes


def test_domain_data_are_left_unread_where_the_law_says_that_they_hurt() -> None:
    """In the trap set a large share of domain data is worse for the domain than a smaller one."""
    found = limited(*both("T"), domain_tokens=1e9, max_tokens=2e9)
    free = tradeoff(*both("T"), tokens=2e9, base_general=9.0, eps_g=0.0)
    assert found.value == pytest.approx(free.value, abs=1e-9) and found.value < 0.5
    assert found.notes == ("the cap on tokens ends the run after 0.84 passes over the domain data",)


def test_with_more_domain_data_than_budget_the_budget_ends_the_run() -> None:
    found = limited(*both("M"), domain_tokens=5e10, max_tokens=1e10)
    assert found.value == 1.0 and found.tokens == pytest.approx(1e10) and found.epochs == pytest.approx(0.2)
    assert found.notes == ("the cap on tokens ends the run after 0.20 passes over the domain data",)


def test_the_smallest_observed_share_is_respected() -> None:
    found = limited(*both("T"), domain_tokens=1e9, low=0.4)
    assert found.value == 0.4 and found.at_edge and found.decided_by == "range"
    assert found.reason.endswith("down to 0.4, the smallest share that was searched")


def test_epochs_count_as_the_repeated_data_law_says() -> None:
    found = limited(*both("M"), domain_tokens=1e9, max_epochs=4)
    worth = 1e9 * (1 + R_DATA * (1 - np.exp(-3 / R_DATA)))
    alone = limited(*both("M"), domain_tokens=worth)
    assert found.value == pytest.approx(alone.value, abs=1e-9)
    assert found.loss_domain is not None and alone.loss_domain is not None
    assert found.loss_domain.value == pytest.approx(alone.loss_domain.value, abs=1e-12)
    assert found.epochs == pytest.approx(4) and found.domain_tokens == pytest.approx(4e9)
    assert found.loss_domain.value < 1.813701  # four passes are worth more than one


def test_more_epochs_than_the_law_holds_for_are_refused() -> None:
    with pytest.raises(UsageError, match="holds up to 40 epochs"):
        limited(*both("M"), domain_tokens=1e9, max_epochs=50)


def test_a_tolerance_limits_the_share_here_too() -> None:
    found = limited(*both("M"), domain_tokens=5e9, base_general=BASE["M"], tolerance=0.03)
    assert found.decided_by == "tolerance" and found.limit is not None
    assert found.loss_general is not None and found.loss_general.value == pytest.approx(found.limit, abs=1e-9)
    nothing = limited(*both("M"), domain_tokens=5e9, base_general=1.9, tolerance=0.01)
    assert nothing.decided_by == "nothing" and nothing.smallest_rise is not None and nothing.smallest_rise > 0.019


def test_a_tolerance_without_a_general_loss_is_refused() -> None:
    with pytest.raises(UsageError, match="needs the general loss"):
        limited(both("M")[0], domain_tokens=1e9, tolerance=0.01, base_general=2.0)
    with pytest.raises(UsageError, match="`domain_tokens` is -1"):
        limited(both("M")[0], domain_tokens=-1)


@settings(max_examples=40)
@given(domain_tokens=st.floats(1e7, 1e11), more=st.floats(1.1, 10))
@example(domain_tokens=1e7, more=1.75)  # the curve rises from the smallest share, dips once and rises again
def test_more_domain_data_never_lower_the_share_nor_raise_the_loss(domain_tokens: float, more: float) -> None:
    for name in ("M", "T"):
        few, many = (limited(*both(name), domain_tokens=d) for d in (domain_tokens, domain_tokens * more))
        assert many.value >= few.value - 1e-9
        assert few.loss_domain is not None and many.loss_domain is not None
        assert many.loss_domain.value < few.loss_domain.value


def test_intervals_come_from_the_draws() -> None:
    found = limited(*both("T", draws=101), domain_tokens=1e9)
    assert found.low < found.value < found.high and len(found.draws_D) == 101
    assert found.tokens == pytest.approx(1e9 / found.value) and found.tokens < D
