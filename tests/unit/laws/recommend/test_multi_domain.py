"""The best mixture of several corpora: closed forms, caps, limits, certificates, laws that are not convex."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.base.errors import UsageError
from cpt.laws.additive import Additive
from cpt.laws.dcpt import DCPT
from cpt.laws.law import Law
from cpt.laws.mixing import Mixing
from cpt.laws.recommend.convexity import smallest_share, why_not_convex
from cpt.laws.recommend.multi_domain import mixture
from cpt.laws.recommend.programme import SharesLoss
from cpt.laws.rows import Floats, points

CORPORA = ("web", "code", "math")


def of(law: Law, theta_DP: Floats) -> SharesLoss:
    return lambda shares_GK, draws: law.loss(theta_DP[draws], points(shares=shares_GK, corpora=CORPORA))[0]


def mixing(*slopes: float, c: float = 1.5) -> SharesLoss:
    return of(Mixing(corpora=CORPORA), np.array([[c, *slopes]]))


LOSSES = {"web": mixing(-2.0, 0.3, 0.3), "code": mixing(0.4, -2.5, 0.1), "math": mixing(0.2, -0.3, -1.8)}
EQUAL = {"web": 1.0, "code": 1.0, "math": 1.0}


def brute(losses: dict[str, SharesLoss], goal: dict[str, float], step: float = 0.005) -> float:
    side = np.arange(0, 1 + step / 2, step)
    a, b = (m.ravel() for m in np.meshgrid(side, side))
    shares = np.stack([a, b, 1 - a - b], axis=1)[a + b <= 1 + 1e-12]
    total = sum(w * losses[t](np.maximum(shares, 0), slice(0, 1))[0] for t, w in goal.items())
    return float(np.min(total))


def test_the_best_mixture_of_a_convex_law_is_proven_best() -> None:
    found = mixture(LOSSES, CORPORA, goal=EQUAL, convex=True)
    assert sum(e.value for e in found.shares.values()) == pytest.approx(1, abs=1e-14)
    assert found.gap < 1e-8 and found.decided_by == "minimum" and found.at_edge == ()
    assert found.guarantee.startswith("the losses are convex in the shares: no allowed mixture is better by more than")
    assert found.objective.value <= brute(LOSSES, EQUAL) + 1e-12
    assert found.objective.value == pytest.approx(brute(LOSSES, EQUAL), abs=1e-4)


def test_two_corpora_that_mirror_each_other_are_split_in_half() -> None:
    losses = {"web": mixing(-2.0, 0.0, 5.0), "code": mixing(0.0, -2.0, 5.0)}
    found = mixture(losses, CORPORA, goal={"web": 1.0, "code": 1.0}, convex=True)
    assert [e.value for e in found.shares.values()] == pytest.approx([0.5, 0.5, 0.0], abs=1e-6)
    assert found.at_edge == ("math",)


def test_a_goal_of_one_loss_takes_its_own_corpus_alone() -> None:
    found = mixture(LOSSES, CORPORA, goal={"code": 1.0}, convex=True)
    assert found.shares["code"].value == pytest.approx(1, abs=1e-9)
    assert set(found.at_edge) == {"web", "math"} and found.losses["code"].value == pytest.approx(1.5 + math.exp(-2.5))


def test_caps_on_tokens_and_epochs_are_kept() -> None:
    found = mixture(LOSSES, CORPORA, goal={"code": 1.0}, tokens=1e9, caps={"code": 2e8}, convex=True)
    assert found.shares["code"].value == pytest.approx(0.2, abs=1e-12) and found.decided_by == "caps"
    assert found.tokens["code"] == pytest.approx(2e8) and found.at_edge[0] == "code" and found.gap < 1e-8
    assert found.shares["math"].value == pytest.approx(0.8, abs=1e-9)  # the next best for the loss on code
    twice = mixture(
        LOSSES, CORPORA, goal={"code": 1.0}, tokens=1e9, unique_tokens={"code": 2e8}, max_epochs=2, convex=True
    )
    assert twice.shares["code"].value == pytest.approx(0.4, abs=1e-12) and twice.epochs == pytest.approx({"code": 2})


def test_a_limit_on_another_loss_is_kept_and_proven() -> None:
    """The loss on the web may be 2.2 at most: t.h <= log 0.7, a plane that cuts the simplex."""
    found = mixture(LOSSES, CORPORA, goal={"code": 1.0}, limits={"web": 2.2}, convex=True)
    assert found.losses["web"].value == pytest.approx(2.2, abs=1e-6) and found.decided_by == "limits"
    web = (0.3 - math.log(0.7)) / 2.3
    assert found.shares["web"].value == pytest.approx(web, abs=1e-6)
    assert found.shares["code"].value == pytest.approx(1 - web, abs=1e-6) and found.gap < 1e-6


def test_limits_that_no_mixture_meets_tell_by_how_much() -> None:
    """Web and code alone decide; the least worst excess is where both are exceeded alike."""
    losses = {"web": mixing(-1.0, 0.0, 3.0), "code": mixing(0.0, -1.0, 3.0)}
    found = mixture(losses, CORPORA, goal={"web": 1.0}, limits={"web": 2.0, "code": 2.0}, convex=True)
    assert found.decided_by == "nothing" and found.smallest_excess == pytest.approx(math.exp(-0.5) - 0.5, abs=1e-6)
    assert [e.value for e in found.shares.values()] == pytest.approx([0.5, 0.5, 0.0], abs=1e-5)
    assert "exceeded by at least 0.1065 nats" in found.reason and math.isnan(found.gap)
    assert json.loads(json.dumps(found.to_json()))["gap"] is None


def test_a_law_that_is_not_convex_says_that_it_is_the_best_of_many_starts() -> None:
    """Exponents above 1: the middle is the worst place."""
    law = Additive(corpora=CORPORA)
    theta_P = law.fitted(
        {"E": 1.0, "C_web": 2.0, "C_code": 2.1, "C_math": 1.9, "gamma_web": 2.5, "gamma_code": 2.5, "gamma_math": 2.5}
    )
    losses = {"all": of(law, theta_P[None])}
    assert "gamma is above 1" in why_not_convex(law, theta_P)
    found = mixture(losses, CORPORA, goal={"all": 1.0}, smallest=smallest_share(law))
    assert [e.value for e in found.shares.values()] == [0.0, 1.0, 0.0]
    assert "not convex" in found.guarantee and "of 20 starts" in found.guarantee and not found.convex
    assert found.objective.value <= brute(losses, {"all": 1.0}) + 1e-12


@settings(max_examples=25)
@given(
    slopes=st.lists(st.lists(st.floats(-3, 1), min_size=3, max_size=3), min_size=2, max_size=2),
    gammas=st.lists(st.floats(0.1, 1.0), min_size=3, max_size=3),
    most=st.lists(st.floats(0.2, 1.0), min_size=3, max_size=3).filter(lambda m: sum(m) > 1.05),
)
def test_no_mixture_on_a_grid_beats_one_that_is_proven(
    slopes: list[list[float]], gammas: list[float], most: list[float]
) -> None:
    law = Additive(corpora=CORPORA)
    names = {f"gamma_{c}": g for c, g in zip(CORPORA, gammas, strict=True)}
    theta_P = law.fitted({"E": 1.0, "C_web": 0.5, "C_code": 1.0, "C_math": 0.7} | names)
    assert why_not_convex(law, theta_P) == ""
    losses = {"a": mixing(*slopes[0]), "b": mixing(*slopes[1]), "c": of(law, theta_P[None])}
    goal = {"a": 1.0, "b": 0.5, "c": 0.7}
    caps = {c: m * 1e9 for c, m in zip(CORPORA, most, strict=True)}
    found = mixture(losses, CORPORA, goal=goal, tokens=1e9, caps=caps, smallest=1e-4, convex=True)
    assert found.gap < 1e-5
    rng = np.random.default_rng(0)
    tries = rng.dirichlet(np.ones(3), 4000)
    tries = tries[np.all((tries <= most) & (tries >= 1e-4), axis=1)]
    total = sum(w * losses[t](tries, slice(0, 1))[0] for t, w in goal.items())
    assert not len(tries) or found.objective.value <= np.min(total) + 1e-9


def test_intervals_come_from_the_draws() -> None:
    rng = np.random.default_rng(3)
    law = Mixing(corpora=CORPORA)
    centre = np.array([[1.5, -2.0, 0.3, 0.3], [1.5, 0.4, -2.5, 0.1], [1.5, 0.2, -0.3, -1.8]])
    draws = [np.concatenate([t[None], t + 0.1 * rng.standard_normal((30, 4))]) for t in centre]
    losses = {name: of(law, theta_DP) for name, theta_DP in zip(CORPORA, draws, strict=True)}
    found = mixture(losses, CORPORA, goal=EQUAL, convex=True, draws=31)
    for estimate in found.shares.values():
        assert estimate.low < estimate.value < estimate.high
    assert found.draws_DK.shape == (31, 3) and found.draws_DK.sum(axis=1) == pytest.approx(np.ones(31), abs=1e-12)
    alone = mixture({n: of(law, d[7:8]) for n, d in zip(CORPORA, draws, strict=True)}, CORPORA, goal=EQUAL, convex=True)
    assert found.draws_DK[7] == pytest.approx([e.value for e in alone.shares.values()], abs=1e-4)


def test_which_laws_are_convex() -> None:
    joint = Additive(corpora=CORPORA, has_d=True, joint=True)
    values = {p.name: 0.5 for p in joint.parameters}
    assert why_not_convex(joint, joint.fitted(values)) == "gB below 1"
    assert why_not_convex(joint, joint.fitted(values | {"gB": 1.2})) == ""
    assert why_not_convex(Mixing(corpora=CORPORA), np.zeros(4)) == ""
    assert why_not_convex(DCPT(), np.zeros(9)) == "nothing is known of the law `dcpt`"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"goal": {"wbe": 1.0}}, "unknown loss `wbe`"),
        ({"goal": EQUAL, "limits": {"cod": 2.0}}, "unknown loss `cod`"),
        ({"goal": EQUAL, "tokens": 1e9, "caps": {"wab": 1e9}}, "unknown corpus `wab`"),
        ({"goal": {"web": -1.0}}, "the weight of `web` is -1"),
        ({"goal": {"web": 0.0}}, "no loss has a weight"),
        ({"goal": EQUAL, "caps": {"web": 1e9}}, "caps on corpora need the length of the run"),
        ({"goal": EQUAL, "tokens": 1e9, "caps": dict.fromkeys(CORPORA, 1e8)}, "the caps leave 3e\\+08 tokens"),
        ({"goal": EQUAL, "tokens": 1e9, "caps": {"web": -1}}, "the tokens of `web` are -1"),
    ],
)
def test_a_question_without_sense_is_refused(asked: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mixture(LOSSES, CORPORA, **asked)  # type: ignore[arg-type]
