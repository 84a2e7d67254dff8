"""Resamples: of whole runs, paired between losses, able to determine the law, independent of names and order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cpt.laws import bootstrap, table
from cpt.laws.analyse import analyse
from cpt.laws.dcpt import DCPT
from cpt.laws.fit import Fit, fit
from cpt.laws.result import Estimate
from cpt.laws.settings import Settings
from cpt.laws.table import Table
from tests.shared import shared_data
from tests.unit.laws.tables import columns, reordered, set_m


def fits(of: Table) -> dict[str, Fit]:
    found = {}
    for target in of.losses:
        rows = of.rows(target)
        found[target] = fit(DCPT.for_rows(rows)[0], rows, num_starts=8)
    return found


@pytest.fixture(scope="module")
def four_ratios() -> Table:
    return set_m(ratios=(0.0, 0.25, 0.5, 1.0), sizes=(5e8, 4e9))


def test_c4_standard_errors_and_intervals_are_the_published_ones() -> None:
    read = table.read(shared_data("laws", "chinchilla_245.csv"), where="top5_loss==0")
    found = analyse(read, "chinchilla", Settings(compare=False)).fits["loss"]
    published = {"A": 124.5, "B": 1293, "E": 0.0257, "alpha": 0.0154, "beta": 0.0206}
    for name, error in published.items():
        assert found.standard_errors[name] == pytest.approx(error, rel=0.4 if name in "AB" else 0.25), name
    intervals = {"E": (1.769, 1.871), "alpha": (0.317, 0.373), "beta": (0.331, 0.415)}
    for name, (low, high) in intervals.items():
        assert found.params[name].low == pytest.approx(low, abs=0.5 * published[name])
        assert found.params[name].high == pytest.approx(high, abs=0.5 * published[name])
    draws = bootstrap.natural(found.fit, found.theta_DP)
    part = draws["beta"] / (draws["alpha"] + draws["beta"])
    assert part[0] == pytest.approx(0.513, abs=0.002)
    assert np.std(part[1:]) == pytest.approx(0.020, rel=0.25)


def test_a_table_with_one_row_a_run_is_drawn_row_by_row() -> None:
    rows = set_m(tokens=(1e9, 1e10))
    each_row = Table.of(columns(tokens=(1e9, 1e10)) | {"run": [f"r{i}" for i in range(len(rows))]})
    assert bootstrap.draws(fits(rows), {}, 4, 0)[1].by == "run"
    told = bootstrap.draws(fits(each_row), {}, 4, 0)[1]
    assert (told.by, told.units, told.resamples) == ("row", len(rows), 4)


def test_checkpoints_of_a_run_and_both_losses_of_it_are_drawn_together(monkeypatch: pytest.MonkeyPatch) -> None:
    of = set_m()
    given = fits(of)
    seen = []
    monkeypatch.setattr(
        bootstrap, "refit", lambda f, w, **_: (seen.append((f.rows, w)), (np.tile(f.theta_P, (len(w), 1)), None))[1]
    )
    bootstrap.draws(given, {}, 20, 0)
    times = []
    for rows, weight_BR in seen:
        for run in np.unique(rows.run_R):
            assert np.ptp(weight_BR[:, rows.run_R == run], axis=1).max() == 0
        times.append({int(run): weight_BR[:, rows.run_R == run][:, 0].tolist() for run in np.unique(rows.run_R)})
    assert len(times) == 2 and times[0] == times[1]
    assert any(len(set(drawn)) > 1 for drawn in times[0].values())


def test_resamples_that_cannot_determine_the_law_are_drawn_again_and_counted(four_ratios: Table) -> None:
    given = fits(four_ratios)
    times_BU, runs, redrawn = bootstrap.resamples(given, {}, 50, 0)
    assert len(times_BU) == 50 and len(runs) == 8 and redrawn > 5
    rows = given["domain"].rows
    for times_U in times_BU:
        at = np.isin(rows.run_R, runs[times_U > 0])
        assert len(np.unique(rows.share_R[at])) == 4 and len(np.unique(rows.n_params_R[at])) == 2


def test_runs_that_allow_hardly_any_other_resample_give_no_intervals() -> None:
    of = set_m(ratios=(0.0, 0.25, 0.5, 1.0), sizes=(1.8e9,))
    thetas, told = bootstrap.draws(fits(of), {}, 50, 0)
    assert told.resamples == 0 and told.units == 4
    assert len(thetas["domain"]) == 1
    assert np.isnan(Estimate.of(thetas["domain"][:, 0]).low)


def test_draws_depend_neither_on_the_order_of_rows_nor_on_the_names_of_runs(four_ratios: Table) -> None:
    given = columns(ratios=(0.0, 0.25, 0.5, 1.0), sizes=(5e8, 4e9))
    runs = list(zip(given["n_params"], given["r_domain"], strict=True))
    given["run"] = [f"{(7 * sorted(set(runs)).index(run)) % 11}th" for run in runs]
    first, _ = bootstrap.draws(fits(four_ratios), {}, 15, 0)
    other, _ = bootstrap.draws(fits(Table.of(reordered(given))), {}, 15, 0)
    assert np.array_equal(first["domain"], other["domain"])
    assert np.array_equal(first["general"], other["general"])


def test_another_seed_draws_others(four_ratios: Table) -> None:
    given = fits(four_ratios)
    one, other = (bootstrap.resamples(given, {}, 20, seed)[0] for seed in (0, 1))
    assert not np.array_equal(one, other)


def test_an_estimate_is_the_fit_with_percentiles_of_the_draws() -> None:
    found = Estimate.of(np.concatenate([[5.0], np.arange(201.0), [np.nan]]))
    assert (found.value, found.low, found.high, found.width) == pytest.approx((5.0, 5.0, 195.0, 190.0))


def test_mixing_draws_that_run_away_are_left_out_of_both_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resample without the outermost ratios may predict any loss there."""
    share = np.repeat([0.0, 0.25, 0.5, 0.75, 1.0], 3)
    of = Table.of(
        {
            "run": [f"{i}" for i in range(15)],
            "r_domain": share.tolist(),
            "loss_domain": (1.8 + np.exp(-2 * share)).tolist(),
            "loss_general": (2.2 + 0.1 * np.exp(1.5 * share)).tolist(),
        }
    )
    refit = bootstrap.refit

    def away(found: Fit, *args: Any, **options: Any) -> tuple[Any, Any]:
        theta_BP, objective_B = refit(found, *args, **options)
        if found.rows.loss_R.max() < 2.9 and found.rows.loss_R.min() > 2.0:
            theta_BP[4, 1] = -60.0
            theta_BP[4, 2] = 40.0
        return theta_BP, objective_B

    monkeypatch.setattr(bootstrap, "refit", away)
    found = analyse(of, "mixing", Settings(tolerance=0.1, base_losses={"general": 2.2}, bootstrap=30, compare=False))
    assert found.bootstrap is not None
    assert (found.bootstrap.absurd, found.bootstrap.resamples) == (1, 29)
    assert {len(one.theta_DP) for one in found.fits.values()} == {30}
    assert found.recommendation is not None and found.recommendation.losses["general"].high < 3
