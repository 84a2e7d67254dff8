"""CMR: token laws, ratio law, T_0, the critical-ratio law and which ratios are feasible."""

from __future__ import annotations

import numpy as np
import pytest

from cpt.base.errors import UsageError
from cpt.laws.cmr import UNIT, Cmr, TokenLaw
from cpt.laws.fit import fit
from cpt.laws.heldout import held_out
from cpt.laws.power import fit_power
from cpt.laws.rows import Rows, points, rows
from cpt.laws.turning import CriticalLaw, critical_law, peak, turning, turning_point
from tests.unit.laws.published import assert_slopes, columns

DOMAIN = TokenLaw(np.array([[-0.60]]), np.array([[0.20]]), np.zeros(1))
GENERAL = TokenLaw(np.array([[0.30, -0.14]]), np.array([[0.35, 0.50]]), np.zeros(1))
BASE = {"domain": 1.8381195, "general": 2.8733676}


def python_70m(target: str) -> Rows:
    table = columns("cpt_pile_python_70m.csv")
    base = np.full(len(table["step"]), BASE[target])
    return rows(table[f"loss_{target}"], tokens=table["tokens"], share=table[f"r_{target}"], base=base)


def made(side: str, ratios: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)) -> tuple[Cmr, np.ndarray, Rows]:
    """A table whose losses rise further and later at higher domain shares."""
    shares = ratios if side == "domain" else tuple(sorted(round(1 - r, 9) for r in ratios))
    law = Cmr(side=side, ratios=shares, base=BASE[side])
    blocks = []
    for share in shares:
        r = share if side == "domain" else 1 - share
        blocks += [-0.3 * r**0.3, 0.2, 0.0] if side == "domain" else [0.30 * r, 0.35, -0.14 * r**0.8, 0.50, 0.0]
    theta = np.array(blocks)
    share, tokens = (m.ravel() for m in np.meshgrid(shares, np.geomspace(1, 100, 12) * UNIT, indexing="ij"))
    loss = law.loss(theta[None], points(share=share, tokens=tokens))[0][0]
    return law, theta, rows(loss, share=share, tokens=tokens, base=np.full(len(loss), BASE[side]))


@pytest.mark.parametrize(("weight", "units"), [(100, 14.178356), (1000, 14.850233), (7000, 14.915112)])
def test_the_objective_begins_to_fall_where_the_worked_example_says(weight: float, units: float) -> None:
    assert turning_point(DOMAIN, GENERAL, weight) == pytest.approx([units], abs=1e-6)


def test_the_peak_of_the_general_loss_is_the_limit_for_a_large_weight() -> None:
    assert peak(GENERAL) == pytest.approx([14.925941], abs=5e-7)
    assert turning_point(DOMAIN, GENERAL, 1e9) == pytest.approx(peak(GENERAL), rel=1e-6)


def test_an_objective_that_only_falls_or_only_rises_has_no_turning_point() -> None:
    falls = TokenLaw(np.array([[-0.3, -0.1]]), np.array([[0.35, 0.5]]), np.zeros(1))
    rises = TokenLaw(np.array([[0.3, 0.1]]), np.array([[0.35, 0.5]]), np.zeros(1))
    assert turning_point(DOMAIN, falls)[0] == 0
    assert turning_point(DOMAIN, rises)[0] == np.inf


@pytest.mark.parametrize(("model", "ratio"), [("460M", 0.2976), ("940M", 0.3489)])
def test_g2_published_parameters_give_the_published_critical_ratios(model: str, ratio: float) -> None:
    table = columns("tables_cmr.csv")
    values = {
        name: float(table["value"][(table["model"] == model) & (table["quantity"] == name)][0])
        for name in ("alpha", "s", "beta")
    }
    found, clipped = CriticalLaw(**values).ratio(100 * 0.2e9)
    assert found == pytest.approx(ratio, abs=5e-5)
    assert not clipped


@pytest.mark.parametrize(("units", "clipped"), [(1.0, 0.0), (1e6, 1.0)])
def test_a_critical_ratio_outside_0_to_1_is_clipped_and_said_so(units: float, clipped: float) -> None:
    assert CriticalLaw(0.22524761, 0.26944345, -0.48139982).ratio(units * UNIT) == (clipped, True)


@pytest.mark.parametrize("model", ["460M", "940M"])
def test_g1_the_ratio_law_predicts_a_quarter_from_larger_ratios(model: str) -> None:
    table = columns("tables_cmr.csv")
    which = (table["model"] == model) & (table["quantity"] == "observed_loss")
    ratio, loss = table["r_domain"][which].astype(float), table["value"][which]
    ratio[np.abs(ratio - 1 / 3) < 1e-3] = 1 / 3
    larger = ratio > 0.3
    a, s, b = (v[0] for v in fit_power(ratio[larger], loss[larger]))
    assert a * 0.25**s + b == pytest.approx(loss[~larger][0], rel=2e-4)


@pytest.mark.parametrize("side", ["domain", "general"])
def test_gradients_are_those_of_the_formula_at_and_between_measured_ratios(side: str) -> None:
    law, theta, _ = made(side)
    theta = theta + 0.02 * np.random.default_rng(0).normal(size=len(theta))  # off any exact ratio law
    own = points(share=np.array([law.ratios[0], law.ratios[2]]), tokens=np.array([2e9, 9e9]))
    assert_slopes(law, theta, own)
    between = points(share=np.array([0.31, 0.5, 0.73]), tokens=np.array([2e9, 9e9, 5e9]))
    assert_slopes(law, theta, between, rel=1e-3)


@pytest.mark.parametrize("side", ["domain", "general"])
def test_token_laws_are_found_again(side: str) -> None:
    _, _, table = made(side)
    law, _ = Cmr.for_rows(table)
    fitted = fit(law, table, scale="linear")
    assert law.side == side  # type: ignore[attr-defined]
    assert fitted.predict(table) == pytest.approx(table.loss_R, abs=1e-4)


def test_the_critical_ratio_of_made_runs_is_where_the_turning_point_is_the_end() -> None:
    (domain, theta_d, _), (general, theta_g, _) = made("domain"), made("general")
    laws_d, laws_g = domain.token_laws(theta_d[None]), general.token_laws(theta_g[None])
    times = [float(turning_point(laws_d[r], laws_g[r])[0]) for r in sorted(laws_d)]
    assert times == sorted(times) and times[0] > 0 and times[-1] < np.inf
    found = turning(domain, theta_d[None], general, theta_g[None], tokens=times[2] * UNIT)
    assert found.ratios == (0.2, 0.4, 0.6, 0.8)
    assert found.share_D == pytest.approx([0.6], abs=0.01)
    assert found.feasible(times[2] * UNIT * 1.001) == (0.2, 0.4, 0.6)
    assert found.law is not None and found.how == "the CMR law"


def test_too_few_turning_points_give_no_critical_law() -> None:
    ratios = np.array([0.2, 0.4, 0.6, 0.8])
    assert critical_law(np.array([0.0, 0.0, 5.0, 9.0]), ratios) is None
    assert critical_law(np.array([0.0, 3.0, 5.0, np.inf]), ratios) is None


def test_real_runs_are_followed_through_rise_and_fall() -> None:
    fits = {}
    for target in ("domain", "general"):
        table = python_70m(target)
        law, _ = Cmr.for_rows(table)
        assert law.side == target  # type: ignore[attr-defined]
        fits[target] = fit(law, table, scale="linear")
        off = np.abs(fits[target].predict(fits[target].rows) / fits[target].rows.loss_R - 1)
        assert off.mean() <= 2e-3
    general: Cmr = fits["general"].law  # type: ignore[assignment]
    found = turning(fits["domain"].law, fits["domain"].theta_P[None], general, fits["general"].theta_P[None], 1.05e10)  # type: ignore[arg-type]
    peaks = dict(zip(found.ratios, found.units_DK[0] * UNIT / 1048576, strict=True))  # in steps
    assert 2500 <= peaks[0.75] <= 6500 and 2500 <= peaks[0.875] <= 6500
    alpha, s, beta = (v[0] for v in general.ratio_law(fits["general"].theta_P[None], 1.048576e10))
    assert 1 - ((BASE["general"] - beta) / alpha) ** (1 / s) == pytest.approx(0.283, abs=0.004)


def test_a_ratio_that_is_left_out_is_predicted_from_the_others() -> None:
    _, _, table = made("domain")
    fitted = fit(Cmr.for_rows(table)[0], table)
    folds = [fold for fold in held_out(fitted, "domain").folds if fold.by == "ratio"]
    assert len(folds) == 4
    assert max(fold.law.largest for fold in folds) <= 5e-3
    shifted = table.loss_R + 0.2 * (np.abs(table.share_R - 0.4) < 1e-9)  # one run that no neighbour can foretell
    other = rows(shifted, share=table.share_R, tokens=table.tokens_R, base=table.base_R)
    bad = held_out(fit(Cmr.for_rows(other, side="domain")[0], other), "domain")
    assert max(fold.law.largest for fold in bad.folds if fold.by == "ratio") >= 0.05


def test_tables_that_cannot_determine_it_are_refused() -> None:
    _, _, table = made("general")
    columns_ = {"share": table.share_R, "tokens": table.tokens_R}
    with pytest.raises(UsageError, match="needs the losses before training"):
        Cmr.for_rows(rows(table.loss_R, **columns_))
    with pytest.raises(UsageError, match="one model size, found 2"):
        Cmr.for_rows(rows(table.loss_R, **columns_, base=table.base_R, n_params=np.resize([1e8, 2e8], len(table))))
    two = table.take(np.isin(table.share_R, [0.2, 0.4]))
    with pytest.raises(UsageError, match="three different ratios between 0 and 1, found 2"):
        Cmr.for_rows(two)
    with pytest.raises(UsageError, match="needs 6 checkpoints of different length for every ratio"):
        Cmr.for_rows(table.take(table.tokens_R > 4e9))
