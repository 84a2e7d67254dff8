"""Rows far off a fit are named and fitted without; what the rows cannot tell apart is said."""

from __future__ import annotations

import numpy as np
import pytest

from cpt.laws import identify, outliers, table
from cpt.laws.chinchilla import Chinchilla
from cpt.laws.dcpt import DCPT
from cpt.laws.fit import Fit, fit
from cpt.laws.rows import rows
from cpt.laws.table import Table
from tests.shared import shared_data
from tests.unit.laws.tables import columns, set_m


def fitted(of: Table, target: str, law: type = DCPT) -> Fit:
    found = of.rows(target)
    return fit(law.for_rows(found)[0], found)


def test_c5_the_five_points_that_move_b_sixfold_are_flagged_and_both_fits_kept() -> None:
    of = table.read(shared_data("laws", "chinchilla_245.csv"))
    found = fitted(of, "loss", Chinchilla)
    assert found.objective == pytest.approx(1.82601e-3, rel=1e-4)
    assert found.params["E"] == pytest.approx(1.8913, abs=1e-3)
    assert found.params["alpha"] == pytest.approx(0.3493, abs=1e-3)
    assert found.params["beta"] == pytest.approx(0.4531, abs=1e-3)
    far = outliers.outliers(found, {}, "loss")
    first_row = int(of.line.min())
    assert sorted(o.line - first_row for o in far) == [0, 1, 2, 3, 244]
    without = outliers.without(found, far, 0)
    assert len(without.rows) == 240
    assert without.params["E"] == pytest.approx(1.828, abs=1e-3)
    assert without.params["B"] == pytest.approx(2408, rel=0.01)


@pytest.mark.parametrize(
    ("target", "expected"),
    [("domain", {(0.25, 10000), (0.625, 14000)}), ("general", {(0.75, 10000)})],
)
def test_m1_the_blemished_rows_are_flagged(target: str, expected: set[tuple[float, int]]) -> None:
    of = table.read(shared_data("laws", "mix2_github_pilecc.csv"))
    found = fitted(of, target)
    step = dict(zip(of.line.tolist(), of.step.tolist(), strict=True))
    far = outliers.outliers(found, {}, target)
    at = {(float(found.rows.share_R[o.row]), int(step[o.line])) for o in far}
    assert at == expected
    assert {found.rows.n_params_R[o.row] for o in far} == {85056000.0} or all("85.1M" in o.what for o in far)


def test_the_rule_is_five_robust_spreads() -> None:
    """Residuals 1..9 have the median 5: the limit is 5 x 1.4826 x 5."""
    assert outliers.spread_of(np.arange(-9.0, 10.0)[np.arange(-9, 10) != 0]) == pytest.approx(1.4826 * 5)
    clean = columns(noise=0.001)
    clean["loss_domain"][17] *= 1.05
    found = fitted(Table.of(clean), "domain")
    spread = outliers.spread_of(found.residuals_R)
    far = outliers.outliers(found, {}, "domain")
    assert [o.times > 5 for o in far] == [True] * len(far)
    flagged = {o.row for o in far}
    assert flagged == set(np.flatnonzero(np.abs(found.residuals_R) > 5 * spread).tolist())
    assert far[0].residual == pytest.approx(-np.log(1.05), abs=0.005)
    assert "r_domain" in far[0].what and "parameters" in far[0].what and "tokens" in far[0].what


def test_an_exact_fit_has_no_outliers() -> None:
    tokens = np.geomspace(1e9, 1e11, 12)
    of = rows(1.5 + 500 / tokens**0.3, tokens=tokens)
    found = fit(Chinchilla(has_n=False), of)
    assert len(outliers.outliers(found, {}, "loss")) <= 1


def test_two_sizes_leave_size_terms_undetermined() -> None:
    found = identify.identified(fitted(set_m(sizes=(5e8, 4e9)), "domain"))
    pairs = {frozenset(p[:2]) for p in found.pairs}
    assert frozenset(("A", "alpha")) in pairs and frozenset(("E", "alpha")) in pairs
    assert found.condition > 1e6


def test_more_sizes_determine_them_better() -> None:
    two = identify.identified(fitted(set_m(sizes=(5e8, 4e9)), "domain"))
    many = identify.identified(fitted(set_m(sizes=(2e7, 1e8, 5e8, 4e9, 2e10)), "domain"))
    assert many.condition < 0.01 * two.condition
    assert frozenset(("E", "alpha")) not in {frozenset(p[:2]) for p in many.pairs}


def test_correlations_are_those_of_the_inverse_of_the_normal_matrix() -> None:
    tokens = np.geomspace(1e8, 1e11, 20)
    noisy = (1.5 + 500 / tokens**0.3) * np.exp(0.01 * np.random.default_rng(0).standard_normal(20))
    found = fit(Chinchilla(has_n=False), rows(noisy, tokens=tokens))
    loss, slope = (a[0] for a in found.law.loss(found.theta_P[None], found.rows))
    slope = slope / loss[:, None]
    spread = np.linalg.inv(slope.T @ slope)
    correlation = spread / np.sqrt(np.outer(np.diag(spread), np.diag(spread)))
    told = {p[:2]: p[2] for p in identify.identified(found).pairs}
    for (i, one), (j, other) in [((0, "E"), (2, "beta")), ((1, "B"), (2, "beta"))]:
        if abs(correlation[i, j]) > 0.99:
            assert told[one, other] == pytest.approx(correlation[i, j], abs=1e-3)
    assert ("B", "beta") in told
