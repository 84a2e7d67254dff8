"""Repeated data: effective tokens, published constants against real runs, the limit of 40 epochs."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from cpt.base.errors import UsageError
from cpt.laws.fit import fit
from cpt.laws.repeated import PUBLISHED, Repeated, effective_tokens
from cpt.laws.rows import Rows, points, rows
from tests.unit.laws.published import assert_slopes, columns


def grid() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    found = np.array([(n, u, e * u) for n in (1e8, 5e8, 2e9) for u in (1e8, 1e9, 1e10) for e in (0.5, 1, 2, 8, 30)])
    return found[:, 0], found[:, 1], found[:, 2]


def asked() -> Rows:
    n_params, unique, tokens = grid()
    return points(n_params=n_params, tokens=tokens, unique_tokens=unique)


@pytest.mark.parametrize(
    "law", [Repeated(), Repeated(tied=False), Repeated(excess=False), Repeated(tied=False, excess=False)]
)
def test_gradients_are_those_of_the_formula(law: Repeated) -> None:
    theta = law.fitted(PUBLISHED | {"beta": 0.31})
    assert_slopes(law, theta, asked(), rel=1e-4)


def test_tokens_seen_once_are_worth_themselves_and_repeats_less() -> None:
    assert effective_tokens(1e9, np.array([5e8, 1e9])) == pytest.approx([5e8, 1e9])
    assert effective_tokens(1e9, 4e9) == pytest.approx(1e9 + 1e9 * 15.387756 * (1 - np.exp(-3 / 15.387756)))
    worth = effective_tokens(1e9, np.arange(1, 41) * 1e9)
    assert np.all(np.diff(worth) > 0) and np.all(np.diff(worth, 2) < 0)
    assert worth[-1] < 16.387756e9


def test_more_than_40_epochs_are_refused() -> None:
    with pytest.raises(UsageError, match="up to 40 epochs over the same data, asked for 41"):
        effective_tokens(1e9, 41e9)
    with pytest.raises(UsageError, match="up to 40 epochs"):
        law = Repeated()
        law.loss(law.fitted(PUBLISHED)[None], points(n_params=1e8, tokens=50e9, unique_tokens=1e9))
    n_params, unique, tokens = grid()
    with pytest.raises(UsageError, match=r"3 rows are beyond \(line 13 has 60"):
        tokens[[12, 20, 40]] = 60 * unique[[12, 20, 40]]
        Repeated.for_rows(rows(np.ones(45), n_params=n_params, tokens=tokens, unique_tokens=unique))


def test_published_constants_rank_real_runs() -> None:
    table = columns("data_constrained_c4.csv")
    which = (table["unique_tokens"] >= 4e9) & (table["n_params"] >= 44e6)
    at = points(
        n_params=table["n_params"][which], tokens=table["tokens"][which], unique_tokens=table["unique_tokens"][which]
    )
    law = Repeated()
    predicted = law.loss(law.fitted(PUBLISHED)[None], at)[0][0]
    measured = table["loss"][which]
    assert which.sum() == 61
    assert spearmanr(predicted, measured)[0] >= 0.95
    assert np.mean(predicted - measured) == pytest.approx(-0.25, abs=0.05)


def test_made_data_give_the_law_back() -> None:
    law, at = Repeated(), asked()
    exact = law.loss(law.fitted(PUBLISHED)[None], at)[0][0]
    noisy = exact * np.exp(2e-3 * np.random.default_rng(0).standard_normal(len(exact)))
    found = rows(noisy, n_params=at.n_params_R, tokens=at.tokens_R, unique_tokens=at.unique_tokens_R)
    fitted = fit(Repeated.for_rows(found)[0], found)
    assert fitted.predict(at) == pytest.approx(exact, rel=5e-3)
    assert fitted.params["R_D"] == pytest.approx(15.4, rel=0.3)


def test_rows_that_repeat_nothing_cannot_show_what_repeats_are_worth() -> None:
    n_params, unique, _ = grid()
    with pytest.raises(UsageError, match=r"none was seen more than 1.5 times"):
        Repeated.for_rows(rows(np.ones(45), n_params=n_params, tokens=unique, unique_tokens=unique))
    with pytest.raises(UsageError, match="unique_domain_tokens"):
        Repeated.for_rows(rows(np.ones(45), n_params=n_params, tokens=unique))
