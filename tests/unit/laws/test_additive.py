"""Additive law over corpora: ranks of unseen mixtures, closed forms, sizes and tokens."""

from __future__ import annotations

import numpy as np
import pytest

from cpt.base.errors import UsageError
from cpt.laws.additive import Additive
from cpt.laws.fit import fit
from cpt.laws.rows import Floats, Rows, points, rows
from tests.unit.laws.published import assert_slopes

NAMES = ("a", "b", "c")
VALUES = {"E": 1.2, "C_a": 0.9, "C_b": 0.5, "C_c": 0.2, "gamma_a": 0.4, "gamma_b": 0.7, "gamma_c": 0.9}
SIZES = {"A": 400.0, "alpha": 0.34, "B": 300.0, "beta": 0.3}
JOINT = {
    **{"CA_a": 3e6, "CA_b": 6e6, "CA_c": 1e7, "gA": 0.4, "alpha": 0.34},
    **{"CB_a": 2e6, "CB_b": 8e6, "CB_c": 3e6, "gB": 0.4, "beta": 0.3},
}


def grid(count: int, seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    sizes, lengths = rng.choice([1e8, 4e8, 1e9], count), rng.choice([1e9, 5e9, 2e10], count)
    return points(shares=rng.dirichlet(np.ones(3), count), corpora=NAMES, n_params=sizes, tokens=lengths)


def measured(at: Rows, loss_R: Floats) -> Rows:
    return rows(loss_R, shares=at.shares_RK, corpora=NAMES, n_params=at.n_params_R, tokens=at.tokens_R)


@pytest.mark.parametrize(
    ("law", "values"),
    [
        (Additive(corpora=NAMES), VALUES),
        (Additive(corpora=NAMES, has_n=True, has_d=True), VALUES | SIZES),
        (Additive(corpora=NAMES, has_d=True), VALUES | SIZES),
        (Additive(corpora=NAMES, has_n=True, has_d=True, joint=True), VALUES | JOINT),
    ],
)
def test_gradients_are_those_of_the_formula(law: Additive, values: dict[str, float]) -> None:
    assert_slopes(law, law.fitted(values), grid(8))


def test_the_law_gives_the_loss_of_its_formula() -> None:
    law = Additive(corpora=NAMES, has_n=True, has_d=True)
    at = points(shares=np.array([[0.5, 0.5, 0.0]]), n_params=1e9, tokens=1e10)
    learnt = 0.9 * 0.5**0.4 + 0.5 * 0.5**0.7 + 0.2 * 1e-4**0.9  # a share of 0 is read as 1e-4
    wanted = 1.2 + 1 / learnt + 400 / 1e9**0.34 + 300 / 1e10**0.3
    assert law.loss(law.fitted(VALUES | SIZES)[None], at)[0][0] == pytest.approx([wanted])
    assert len(law.parameters) == 5 + 2 * 3
    assert len(Additive(corpora=NAMES, has_n=True, has_d=True, joint=True).parameters) == 5 + 4 * 3
    assert len(Additive(corpora=NAMES).parameters) == 1 + 2 * 3


@pytest.mark.parametrize("joint", [False, True])
def test_made_data_give_the_law_back(joint: bool) -> None:
    law = Additive(corpora=NAMES, has_n=True, has_d=True, joint=joint)
    at = grid(160, seed=2)
    exact = law.loss(law.fitted(VALUES | (JOINT if joint else SIZES))[None], at)[0][0]
    noisy = measured(at, exact * np.exp(2e-3 * np.random.default_rng(3).standard_normal(160)))
    found, _ = Additive.for_rows(noisy, joint=joint)
    off = np.abs(fit(found, noisy).predict(at) / exact - 1)
    assert off.mean() <= 1e-3 and off.max() <= 8e-3


def test_without_sizes_or_with_few_rows_it_says_so() -> None:
    at = grid(12)
    law, notes = Additive.for_rows(rows(np.ones(12), shares=at.shares_RK, corpora=NAMES))
    assert not law.has_n and not law.has_d and len(notes) == 2  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="over 3 corpora needs 14 rows, found 12"):
        Additive.for_rows(measured(at, np.ones(12)))
    with pytest.raises(UsageError, match="the joint form"):
        Additive.for_rows(rows(np.ones(12), shares=at.shares_RK, corpora=NAMES), joint=True)
    with pytest.raises(UsageError, match="needs the shares of all corpora"):
        Additive.for_rows(rows(np.ones(12), share=np.linspace(0, 1, 12)))
