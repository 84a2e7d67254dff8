"""Usage 1: the worked examples, the trap of two turning losses, tolerances, intervals."""

from __future__ import annotations

import csv
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.base.errors import UsageError
from cpt.laws.recommend.answer import Loss
from cpt.laws.recommend.measured import measured_ratio
from cpt.laws.recommend.tradeoff import tradeoff
from cpt.laws.rows import Floats
from tests.shared import shared_data
from tests.unit.laws.recommend.sets import BASE, DOMAIN, GENERAL, LAW, D, both, loss


@pytest.mark.parametrize(
    ("name", "tolerance", "ratio", "domain", "decided_by"),
    [
        ("M", 0.01, 0.511577, 1.757652, "tolerance"),
        ("M", 0.03, 0.726071, 1.714250, "tolerance"),
        ("M", 0.05, 0.823355, 1.701120, "tolerance"),
        ("T", 0.01, 0.773081, None, "tolerance"),
        ("T", 0.03, 0.827888, 1.919978, "minimum"),
        ("T", 0.05, 0.827888, 1.919978, "minimum"),
    ],
)
def test_the_worked_examples_hold_to_the_last_digit(
    name: str, tolerance: float, ratio: float, domain: float | None, decided_by: str
) -> None:
    found = tradeoff(*both(name), tokens=D, base_general=BASE[name], tolerance=tolerance)
    assert found.value == pytest.approx(ratio, abs=5.1e-7)
    assert found.decided_by == decided_by and not found.at_edge
    if domain is not None:
        assert found.loss_domain is not None and found.loss_domain.value == pytest.approx(domain, abs=5.1e-7)
    assert found.replay_tokens == pytest.approx((1 - ratio) * D, abs=2e4)
    assert found.domain_tokens + found.replay_tokens == pytest.approx(D)


def test_an_absolute_tolerance_says_the_same_as_a_relative_one() -> None:
    relative = tradeoff(*both("M"), tokens=D, base_general=BASE["M"], tolerance=0.03)
    absolute = tradeoff(*both("M"), tokens=D, base_general=BASE["M"], eps_g=0.03 * BASE["M"])
    assert absolute.value == pytest.approx(relative.value, abs=1e-12)
    assert absolute.limit == pytest.approx(2.36488)


def test_a_minimum_is_where_the_derivative_is_zero() -> None:
    """The analytic derivative of the D-CPT law of set T, eleven digits."""
    found = tradeoff(*both("T"), tokens=D, base_general=BASE["T"], tolerance=0.05)
    r, p = found.value, DOMAIN | {"B": 900}
    rise = p["eta"] * p["B"] * r ** (p["eta"] - 1) / D ** p["beta"]
    assert rise == pytest.approx(p["gamma"] * p["C"] / (r + p["eps"]) ** (p["gamma"] + 1), rel=1e-10)


def test_at_the_tolerance_the_general_loss_is_within_its_limit() -> None:
    domain, general = both("M")
    found = tradeoff(domain, general, tokens=D, base_general=BASE["M"], tolerance=0.03)
    assert found.limit is not None

    def at(ratio: float) -> float:
        return float(general(np.array([1 - ratio]), np.array([D]))[0, 0])

    assert at(found.value) <= found.limit < at(found.value + 1e-12)


def test_without_an_admissible_share_the_smallest_rise_is_told() -> None:
    found = tradeoff(*both("M"), tokens=D, base_general=2.2, tolerance=0.01)
    assert math.isnan(found.value) and found.decided_by == "nothing"
    assert found.smallest_rise == pytest.approx(2.285752 - 2.2, abs=1e-6)
    assert "no share keeps the general loss at or below 2.2220" in found.reason
    assert "0.0858 nats" in found.reason and "share of 0.000" in found.reason
    assert json.loads(json.dumps(found.to_json()))["value"] is None


def test_an_admissible_sliver_between_grid_points_is_found() -> None:
    """A general loss that dips below its limit on 2e-5 of the range only."""

    def general(share_G: Floats, tokens_G: Floats) -> Floats:
        return (2.0 + (share_G - 0.41234) ** 2)[None]

    found = tradeoff(both("M")[0], general, tokens=D, base_general=2.0, eps_g=1e-10)
    assert found.value == pytest.approx(1 - 0.41234 + 1e-5, abs=1e-8)
    assert found.decided_by == "tolerance"


def test_the_better_of_two_admissible_islands_wins() -> None:
    """Admissible near 0.2 and near 0.8; the domain loss is lower at 0.2 or at 0.8."""

    def general(share_G: Floats, tokens_G: Floats) -> Floats:
        return (2.0 + 4 * ((share_G - 0.2) * (share_G - 0.8)) ** 2)[None]

    def valley(low: float) -> object:
        return lambda share_G, tokens_G: (1.5 + (share_G - low) ** 2)[None]

    left = tradeoff(valley(0.3), general, tokens=D, base_general=2.0, eps_g=0.001)  # type: ignore[arg-type]
    right = tradeoff(valley(0.7), general, tokens=D, base_general=2.0, eps_g=0.001)  # type: ignore[arg-type]
    assert left.value == pytest.approx(0.2286, abs=1e-3) and left.decided_by == "tolerance"
    assert right.value == pytest.approx(1 - left.value, abs=1e-9)


def test_the_false_dip_of_the_law_next_to_no_replay_is_no_way_to_stay_within_a_tolerance() -> None:
    """With eta < 1 the law says that a trace of replay raises the general loss; without any it seems to be lower."""
    theta_P = LAW.fitted(GENERAL | {"eta": 0.05, "B": 600.0, "C": 0.05})
    general = loss(theta_P[None])
    at = general(np.array([0.0, 1e-3, 0.02, 1.0]), np.full(4, D))[0]
    assert at[0] < at[3] < at[2] < at[1]  # without any replay the law promises the lowest loss of all
    limit = (at[0] + at[3]) / 2
    found = tradeoff(both("M")[0], general, tokens=D, base_general=limit, eps_g=0.0)
    assert found.decided_by == "nothing"


def test_more_tolerance_never_lowers_the_share() -> None:
    for name in ("M", "T"):
        found = [
            tradeoff(*both(name), tokens=D, base_general=BASE[name], tolerance=t).value
            for t in np.linspace(0.0, 0.3, 40)
        ]
        assert all(b >= a - 1e-9 for a, b in itertools.pairwise(found))


positive = st.floats(0.05, 2.0)


@settings(max_examples=60)
@given(
    e=positive,
    c=st.floats(0.01, 1.0),
    eps=st.floats(0.001, 1.0),
    gamma=st.floats(0.05, 2.0),
    eta=st.floats(0.05, 3.0),
    b=st.floats(10, 3000),
    tolerances=st.lists(st.floats(0, 0.5), min_size=2, max_size=2),
)
def test_for_any_law_the_answer_is_admissible_and_no_admissible_share_is_better(
    e: float, c: float, eps: float, gamma: float, eta: float, b: float, tolerances: list[float]
) -> None:
    values = {"E": e, "C": c, "eps": eps, "gamma": gamma, "eta": eta, "B": b, "A": 400, "alpha": 0.35, "beta": 0.33}
    domain, general = loss(LAW.fitted(values | {"eta": eta / 2})[None]), loss(LAW.fitted(values)[None])
    base = float(general(np.array([1.0]), np.array([D]))[0, 0])
    share_G = np.linspace(0.02, 0.98, 301)
    domain_G, general_G = domain(share_G, np.full(301, D))[0], general(1 - share_G, np.full(301, D))[0]
    near_G = np.geomspace(1e-9, 1, 500)
    near = [np.diff(of(near_G, np.full(500, D))[0]) < 0 for of in (domain, general)]
    low, high = (near_G[int(f.argmax())] if f.any() else 0.0 for f in near)  # below these shares the laws are false
    falls = bool(near[1].all())
    before = -1.0
    for tolerance in sorted(tolerances):
        found = tradeoff(domain, general, tokens=D, base_general=base, tolerance=tolerance)
        assert found.limit is not None and found.loss_domain is not None and found.loss_general is not None
        ok_G = general_G <= found.limit
        if found.decided_by == "nothing":
            assert not ok_G[1 - share_G > high].any()
            continue
        assert found.loss_general.value <= found.limit + 1e-12
        away_G = ok_G & (share_G > low) & (1 - share_G > high)
        assert not away_G.any() or found.loss_domain.value <= domain_G[away_G].min() + 1e-9
        if falls and np.all(np.diff(domain_G) < 0):
            assert found.value >= before - 1e-9
        before = found.value


def test_intervals_hold_the_fit_and_narrow_with_the_draws() -> None:
    domain, general = both("M", draws=201)
    found = tradeoff(domain, general, tokens=D, base_general=BASE["M"], tolerance=0.05)
    assert found.low <= found.value <= found.high and len(found.draws_D) == 201
    assert found.draws_D[0] == found.value
    assert found.loss_domain is not None and found.loss_domain.low < found.loss_domain.value < found.loss_domain.high
    missing = int(np.sum(general(np.array([1.0]), np.array([D]))[1:, 0] > found.limit))
    assert 0 < missing < 100
    assert found.notes == (
        f"in {missing} of 200 bootstrap draws no share meets the tolerance; "
        "they count with the share whose general loss is lowest",
    )
    assert math.isnan(tradeoff(*both("M"), tokens=D, base_general=BASE["M"], tolerance=0.05).low)


def one(of: Loss, draw: int) -> Loss:
    return lambda share_G, tokens_G: of(share_G, tokens_G)[draw : draw + 1]


def test_each_draw_is_searched_as_well_as_the_fit() -> None:
    """The interpolated answer of a draw against the refined one of the same law fitted alone."""
    for name in ("M", "T"):
        domain, general = both(name, draws=12)
        together = tradeoff(domain, general, tokens=D, base_general=BASE[name] + 0.1, tolerance=0.02)
        for draw in range(1, 12):
            alone = tradeoff(
                one(domain, draw), one(general, draw), tokens=D, base_general=BASE[name] + 0.1, tolerance=0.02
            )
            if alone.decided_by != "nothing":
                assert together.draws_D[draw] == pytest.approx(alone.value, abs=2e-5)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"base_general": 2.3, "tolerance": -0.01}, "`tolerance` is -0.01; it must be 0 or more"),
        ({"base_general": 2.3, "eps_g": -1.0}, "`eps_g` is -1; it must be 0 or more"),
        ({"base_general": None, "tolerance": 0.01}, "the general loss before training is missing"),
        ({"base_general": 2.3}, "how far may the general loss rise"),
        ({"base_general": 2.3, "tolerance": 0.1, "eps_g": 0.1}, "`tolerance` and `eps_g` both say"),
        ({"base_general": -1.0, "tolerance": 0.1}, "`base_general` is -1; a loss must be above 0"),
    ],
)
def test_a_question_without_sense_is_refused(given_: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tradeoff(*both("M"), tokens=D, **given_)  # type: ignore[arg-type]


def table(name: str) -> dict[str, np.ndarray]:
    with open(shared_data() / "laws" / name, newline="") as file:
        found = list(csv.DictReader(file))
    return {n: np.array([float(row[n]) for row in found]) for n in found[0] if n not in ("model", "domain", "shift")}


def test_u1_the_published_rows_cross_the_limit_where_the_paper_says() -> None:
    columns = table("tables_dcpt_usage1.csv")
    limit = 2.8602 * 1.03
    assert limit == pytest.approx(2.946006, abs=1e-9)
    assert measured_ratio(columns["r_domain"], columns["loss_general"], limit) == pytest.approx(0.92445, abs=5e-6)


def test_f1_a_quarter_of_replay_keeps_the_published_forgetting_within_0_16_nats() -> None:
    columns = table("tables_replay_german.csv")
    rises = dict(zip(columns["replay_percent"], columns["loss_old"] - 2.17, strict=True))
    assert rises == pytest.approx({0: 1.39, 1: 0.66, 5: 0.40, 10: 0.29, 25: 0.16, 50: 0.07}, abs=1e-9)
    ratio = measured_ratio(columns["r_domain"], columns["loss_old"], 2.17 + 0.16, log_replay=True)
    assert 1 - ratio == pytest.approx(0.25, abs=0.01)
    assert measured_ratio(columns["r_domain"], columns["loss_old"], 2.17 + 0.2, log_replay=True) == pytest.approx(
        1 - 0.1 * 2.5 ** (0.09 / 0.13)
    )
    assert math.isnan(measured_ratio(columns["r_domain"], columns["loss_old"], 2.2))
    assert measured_ratio(columns["r_domain"], columns["loss_old"], 3.6) == 1.0
