"""Forgetting with replay: closed form, published sweep, the share for a tolerance."""

from __future__ import annotations

import numpy as np
import pytest

from cpt.base.errors import UsageError
from cpt.laws.fit import fit
from cpt.laws.replay import Replay
from cpt.laws.rows import points, rows
from tests.unit.laws.published import assert_slopes, columns

TRUTH = {"A": 60.0, "B": 300.0, "alpha": 0.5, "beta": 0.25}


def sweep() -> tuple[np.ndarray, np.ndarray]:
    table = columns("tables_replay_german.csv")
    return table["replay_percent"] / 100, table["loss_old"] - 2.17


def test_gradients_are_those_of_the_formula() -> None:
    at = points(n_params=np.geomspace(1e7, 1e10, 6), tokens=np.geomspace(1e8, 1e10, 6), share=np.linspace(0, 0.9, 6),
                base=2.5)  # fmt: skip
    assert_slopes(Replay(), Replay().fitted(TRUTH), at)
    small = {"A": 1.4, "B": 100.0, "alpha": 0.4}
    assert_slopes(Replay(has_n=False, has_d=False), Replay(has_n=False, has_d=False).fitted(small), at)


def test_the_law_gives_the_loss_of_its_formula() -> None:
    at = points(n_params=1e9, tokens=1e10, share=0.05, base=2.5)
    wanted = 2.5 + 60 * (0.95e10) ** 0.25 / ((1 + 300 * 0.05) * 1e9) ** 0.5
    assert Replay().loss(Replay().fitted(TRUTH)[None], at)[0][0] == pytest.approx([wanted])


def test_made_data_give_the_law_back() -> None:
    grid = np.array([(n, d, p) for n in (5e7, 3e8, 1e9) for d in (1e9, 4e9, 1e10) for p in (0, 0.001, 0.01, 0.05)])
    n_params, tokens, share = grid.T
    at = points(n_params=n_params, tokens=tokens, share=share, base=2.5)
    exact = Replay().loss(Replay().fitted(TRUTH)[None], at)[0][0]
    noisy = exact * np.exp(1e-3 * np.random.default_rng(0).standard_normal(len(exact)))
    found = rows(noisy, n_params=n_params, tokens=tokens, share=share, base=np.full(len(exact), 2.5))
    law, notes = Replay.for_rows(found)
    fitted = fit(law, found)
    assert notes == ()
    assert fitted.predict(at) == pytest.approx(exact, rel=2e-3)
    assert fitted.params["alpha"] == pytest.approx(0.5, rel=0.1)


def test_the_law_follows_the_published_sweep() -> None:
    share, rise = sweep()
    found = rows(2.17 + rise, share=share, base=np.full(6, 2.17))
    law, notes = Replay.for_rows(found)
    fitted = fit(law, found)
    assert len(notes) == 2
    assert fitted.predict(found) - 2.17 == pytest.approx(rise, abs=0.07)
    assert law.replay_for(fitted.theta_P, 0.16) == pytest.approx(0.25, abs=0.1)  # type: ignore[attr-defined]


def test_the_replay_share_for_a_tolerance_meets_it() -> None:
    law, theta = Replay(), Replay().fitted(TRUTH)
    share = law.replay_for(theta, 0.1, n_params=1e9, domain_tokens=1e10)
    at = points(n_params=1e9, tokens=1e10 / (1 - share), share=share, base=2.5)
    assert law.loss(theta[None], at)[0][0] == pytest.approx([2.6], abs=1e-9)
    assert law.replay_for(theta, 50.0, n_params=1e9, domain_tokens=1e10) == 0


def test_tables_that_cannot_determine_it_are_refused() -> None:
    with pytest.raises(UsageError, match="needs the general loss before training"):
        Replay.for_rows(rows(np.ones(5), share=np.linspace(0, 0.5, 5)))
    with pytest.raises(UsageError, match="three different replay shares"):
        Replay.for_rows(rows(np.ones(5), share=[0, 0, 0.1, 0.1, 0.1], base=np.ones(5)))
