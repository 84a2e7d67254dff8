"""Exponential mixture law: published fits of two, five and seventeen corpora."""

from __future__ import annotations

import numpy as np
import pytest

from cpt.base.errors import UsageError
from cpt.laws.fit import fit
from cpt.laws.mixing import Mixing
from cpt.laws.power import fit_power
from cpt.laws.rows import Rows, points, rows
from tests.unit.laws.published import assert_slopes, columns, shares

BASE_GENERAL = 2.8733676  # nats/token before continual pretraining


def python_70m(target: str) -> Rows:
    table = columns("cpt_pile_python_70m.csv")
    last = table["step"] == 10000
    return rows(table[f"loss_{target}"][last], share=table[f"r_{target}"][last], tokens=table["tokens"][last])


def test_gradients_are_those_of_the_formula() -> None:
    share_RK = np.random.default_rng(0).dirichlet(np.ones(3), 6)
    at = points(shares=share_RK, corpora=("a", "b", "c"))
    assert_slopes(Mixing(corpora=("a", "b", "c")), np.array([1.4, -0.5, 0.3, -2.0]), at)
    two = points(share=np.linspace(0, 1, 6))
    assert_slopes(Mixing(), np.array([1.4, -0.5, 0.3]), two)
    assert_slopes(Mixing(two_stage=True, c=1.2), np.array([-0.5, 0.3]), two)


def test_k1_the_critical_general_share_of_real_continual_pretraining() -> None:
    found = python_70m("general")
    joint = fit(Mixing(), found)
    assert joint.law.share_at(joint.theta_P[None], BASE_GENERAL) == pytest.approx(0.2831, abs=2e-4)  # type: ignore[attr-defined]
    law, notes = Mixing.for_rows(found, two_stage=True)
    staged = fit(law, found, delta=0.02, scale="linear")
    assert law.share_at(staged.theta_P[None], BASE_GENERAL) == pytest.approx(0.286225, abs=2e-4)  # type: ignore[attr-defined]
    assert "two-stage" in notes[0]
    a, s, b = (v[0] for v in fit_power(found.share_R, found.loss_R))
    assert ((BASE_GENERAL - b) / a) ** (1 / s) == pytest.approx(0.283, abs=0.001)


@pytest.mark.parametrize(
    ("target", "c", "t", "b"), [("general", 2.810, -3.740, -1.694), ("domain", None, -0.7915, -1.0039)]
)
def test_k2_the_two_stage_procedure_gives_the_published_parameters(
    target: str, c: float | None, t: float, b: float
) -> None:
    found = python_70m(target)
    law, _ = Mixing.for_rows(found, two_stage=True)
    staged = fit(law, found, delta=0.02, scale="linear")
    assert staged.params["t"] == pytest.approx(t, rel=5e-3)
    assert staged.params["b"] == pytest.approx(b, rel=5e-3)
    assert c is None or law.c == pytest.approx(c, rel=5e-3)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("target", "mean"),
    [
        ("academic", 5.683e-4),
        ("prose", 1.2334e-4),
        ("dialogue", 5.5134e-4),
        ("symbolic", 1.4282e-4),
        ("internet", 8.166e-5),
    ],
)
def test_x1_five_corpora(target: str, mean: float) -> None:
    table = columns("mix5_pile.csv")
    which = (table["size"] == "70M") & (table["step"] == 30000)
    share_RK, names = shares(table, which)
    found = rows(table[f"loss_{target}"][which], shares=share_RK, corpora=names)
    law, _ = Mixing.for_rows(found)
    fitted = fit(law, found, delta=0.05, scale="linear")
    assert len(found) == 26
    assert fitted.objective / 26 == pytest.approx(mean, rel=1e-3)


def test_a_known_mixture_of_four_corpora_is_found_again() -> None:
    rng = np.random.default_rng(1)
    names, truth = ("a", "b", "c", "d"), np.array([2.0, -3.0, -1.0, 0.2, -0.5])
    share_RK = rng.dirichlet(np.ones(4), 40)
    exact = Mixing(corpora=names).loss(truth[None], points(shares=share_RK))[0][0]
    found = rows(exact * np.exp(1e-3 * rng.standard_normal(40)), shares=share_RK, corpora=names)
    fitted = fit(Mixing.for_rows(found)[0], found)
    assert fitted.predict(points(shares=share_RK)) == pytest.approx(exact, rel=1e-3)


def test_only_one_size_and_length_are_fitted() -> None:
    share = np.array([0.1, 0.4, 0.7, 1.0])
    with pytest.raises(UsageError, match="one size and one token count, found 2 values of `tokens`"):
        Mixing.for_rows(rows(np.ones(4), share=share, tokens=[1e9, 1e9, 2e9, 2e9]))


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_mixtures_are_refused(count: int) -> None:
    with pytest.raises(UsageError, match=f"needs at least 3 different mixtures, found {count}"):
        Mixing.for_rows(rows(np.ones(6), share=np.resize(np.linspace(0.2, 0.8, count), 6)))


def test_too_few_rows_for_several_corpora_are_refused() -> None:
    share_RK = np.random.default_rng(0).dirichlet(np.ones(4), 7)
    with pytest.raises(UsageError, match="over 4 corpora needs 8 rows, found 7"):
        Mixing.for_rows(rows(np.ones(7), shares=share_RK, corpora=("a", "b", "c", "d")))
