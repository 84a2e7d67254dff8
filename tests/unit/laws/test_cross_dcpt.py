"""Cross-domain law: a domain that was not fitted is predicted from its probe."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cpt.base.errors import UsageError
from cpt.laws.cross_dcpt import CrossDCPT, learnability
from cpt.laws.fit import fit
from cpt.laws.rows import Floats, Rows, points, rows
from tests.unit.laws.published import assert_slopes

TRUTH = dict(E=1.0, A=420, alpha=0.36, B=300, beta=0.34, eta=0.45, C=0.28, eps=0.08, gamma=0.55, F=0.4, mu=0.8, w2=0.35)
K1 = np.array([1.6, 2.2, 2.8, 1.2, 3.1, 2.0])
K2 = np.array([0.10, 0.30, 0.22, 0.05, 0.40, 0.15])
LAW = CrossDCPT(mean_1=float(np.mean(1 / K1)), mean_2=float(np.mean(K2)))


def grid(domains: range) -> tuple[Floats, Rows]:
    lengths = np.geomspace(1e9, 2e10, 5)
    found = np.array(
        [(d, n, t, r) for d in domains for n in (5e8, 1.8e9, 4e9) for t in lengths for r in (0.1, 0.2, 0.33, 0.5, 1)]
    )
    which = found[:, 0].astype(int)
    at = points(n_params=found[:, 1], tokens=found[:, 2], share=found[:, 3], k1=K1[which], k2=K2[which])
    return found[:, 0], at


def measured(domains: range, noise: float = 0.003) -> Rows:
    domain, at = grid(domains)
    exact = LAW.loss(LAW.fitted(TRUTH)[None], at)[0][0]
    loss = exact * np.exp(noise * np.random.default_rng(0).standard_normal(len(exact)))
    sizes = {"n_params": at.n_params_R, "tokens": at.tokens_R, "share": at.share_R}
    return rows(loss, **sizes, k1=at.k1_R, k2=at.k2_R, domain=domain)


def test_gradients_are_those_of_the_formula() -> None:
    _, at = grid(range(2))
    assert_slopes(LAW, LAW.fitted(TRUTH), at)


def test_two_domains_are_predicted_from_four() -> None:
    found = measured(range(4))
    law, notes = CrossDCPT.for_rows(found, probe_tokens=1e8)
    assert law.probe_tokens == 1e8 and "4 domains determine the term in K only roughly" in notes[-1]
    _, new = grid(range(4, 6))
    exact = LAW.loss(LAW.fitted(TRUTH)[None], new)[0][0]
    off = np.abs(fit(law, found).predict(new) / exact - 1)
    assert off.mean() <= 2e-3 and off.max() <= 5e-3


def test_normalisation_is_kept_with_the_fit_and_changes_no_prediction() -> None:
    found = measured(range(5), noise=0.0)
    law, notes = CrossDCPT.for_rows(found)
    raw, _ = CrossDCPT.for_rows(found, normalise="none")
    assert notes == () and (raw.mean_1, raw.mean_2) == (1, 1)
    assert law.mean_2 == pytest.approx(K2[:5].mean())
    _, at = grid(range(6))
    assert fit(law, found).predict(at) == pytest.approx(fit(raw, found).predict(at), rel=2e-3)


def test_two_domains_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 3 domains, found 2"):
        CrossDCPT.for_rows(measured(range(2)))


def test_columns_that_cannot_be_used_are_refused() -> None:
    found = measured(range(3))
    with pytest.raises(UsageError, match="needs the columns `domain`, `k1` and `k2`"):
        CrossDCPT.for_rows(rows(found.loss_R, n_params=found.n_params_R, tokens=found.tokens_R, share=found.share_R))
    assert found.k2_R is not None
    falling = replace(found, k2_R=np.where(np.arange(len(found)) == 7, -0.1, found.k2_R))
    with pytest.raises(UsageError, match=r"needs `k2` above 0 in every row, line 8 has -0.1"):
        CrossDCPT.for_rows(falling)
    with pytest.raises(UsageError, match="`normalise` of law `cross_dcpt` is `max`"):
        CrossDCPT.for_rows(measured(range(3)), normalise="max")


def test_a_probe_gives_the_loss_before_training_and_its_rate_of_fall() -> None:
    tokens = np.array([0, 1e6, 2e6, 3e6, 5e7])
    assert learnability(tokens, 3.0 - 0.02 * tokens / 1e6, 4e6) == pytest.approx((3.0, 0.02))
    with pytest.raises(UsageError, match="a probe needs the loss at 0 tokens and two more"):
        learnability(tokens, tokens, 1e6)
