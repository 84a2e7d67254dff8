"""Held-out error: what is left out, how it is fitted, and what a law must beat."""

from __future__ import annotations

import numpy as np
import pytest

from cpt.laws import heldout, table
from cpt.laws.baselines import by_ratio
from cpt.laws.dcpt import DCPT, L1
from cpt.laws.fit import Fit, fit
from cpt.laws.rows import Rows, points, rows
from cpt.laws.table import Table
from tests.shared import shared_data
from tests.unit.laws.tables import RATIOS, SIZES, TOKENS, columns, set_m


def fitted(of: Table, target: str, law: type[DCPT] = DCPT) -> Fit:
    found = of.rows(target)
    return fit(law.for_rows(found)[0], found, num_starts=30)


@pytest.fixture(scope="module")
def clean() -> Fit:
    return fitted(set_m(noise=0.0), "domain")


@pytest.mark.parametrize(("target", "most"), [("domain", 0.012), ("general", 0.0035)])
def test_m2_the_worst_left_out_ratio_of_two_corpora_is_predicted(target: str, most: float) -> None:
    found = fitted(table.read(shared_data("laws", "mix2_github_pilecc.csv")), target)
    held = heldout.held_out(found, target)
    worst = {fold.value: fold.law.mean for fold in held.folds if fold.by == "ratio"}
    assert len(worst) == 4 and max(worst.values()) <= most
    assert held.law_within < held.interpolation < held.nearest
    assert held.missing == ("two model sizes: the largest cannot be left out, the error at other sizes is not known",)


def test_each_ratio_the_largest_size_and_the_last_third_of_tokens_are_left_out(clean: Fit) -> None:
    held = heldout.held_out(clean, "domain", extra_starts=4)
    left = [(fold.by, fold.value) for fold in held.folds]
    assert left[:6] == [("ratio", r) for r in RATIOS]
    assert left[6] == ("size", SIZES[-1])
    assert left[7][0] == "tokens" and left[7][1] == pytest.approx(TOKENS[4])
    counts = [fold.law.count for fold in held.folds]
    assert counts == [18] * 6 + [36, 36]
    assert held.folds[2].left_out == "r_domain 0.25" and held.folds[6].left_out == "from 4.00B parameters"
    assert held.error == pytest.approx(np.mean([held.by[kind].mean for kind in ("ratio", "size", "tokens")]))


def test_a_law_that_made_the_rows_predicts_what_it_has_not_seen(clean: Fit) -> None:
    held = heldout.held_out(clean, "domain")
    assert held.error < 2e-3
    assert held.law_within < 0.1 * held.interpolation < held.nearest
    assert held.by["ratio"].r2 > 0.99


def test_left_out_rows_weigh_nothing_in_the_fit_that_predicts_them(clean: Fit) -> None:
    spoilt = clean.rows
    at = spoilt.share_R == 0.25
    changed = rows(
        np.where(at, spoilt.loss_R * 1.3, spoilt.loss_R),
        n_params=spoilt.n_params_R,
        tokens=spoilt.tokens_R,
        share=spoilt.share_R,
    )
    start = fit(clean.law, changed, starts_SP=clean.theta_P[None])
    held = heldout.held_out(start, "domain", extra_starts=6)
    fold = next(f for f in held.folds if f.value == 0.25)
    assert fold.law.mean == pytest.approx(0.3 / 1.3, abs=0.01)


def test_laws_are_compared_on_the_same_folds() -> None:
    of = set_m()
    one, other = (heldout.held_out(fitted(of, "domain", law), "domain", extra_starts=2) for law in (DCPT, L1))
    assert [(f.by, f.left_out, f.law.count) for f in one.folds] == [
        (f.by, f.left_out, f.law.count) for f in other.folds
    ]


def test_many_ratios_are_left_out_in_ten_parts() -> None:
    share = np.linspace(0, 1, 23)
    folds, _ = heldout.parts(rows(2 - share, share=share), "domain")
    assert len(folds) == 10
    assert np.array_equal(sum(part.out_R.astype(int) for part in folds), np.ones(23, int))


def test_where_sizes_have_a_row_each_the_largest_ones_go_together() -> None:
    sizes = np.geomspace(1e7, 1e10, 100)
    folds, _ = heldout.parts(rows(np.linspace(3, 2, 100), n_params=sizes), "loss")
    assert [(part.by, int(part.out_R.sum())) for part in folds] == [("size", 5)]


def test_what_cannot_be_left_out_is_said() -> None:
    few = rows([3.0, 2.9, 2.8, 2.7], n_params=[1e9] * 4, tokens=[1e9, 2e9] * 2, share=[0, 0, 1, 1])
    folds, missing = heldout.parts(few, "domain")
    assert [part.by for part in folds] == ["run"] * 4
    assert len(missing) == 3 and "2 ratios" in missing[0] and "one model size" in missing[1]


def measured() -> Rows:
    """At one size, losses linear in r and in log tokens."""
    share, tokens = (a.ravel() for a in np.meshgrid([0.0, 0.5, 1.0], [1e9, 4e9]))
    return rows(3 - share - 0.1 * np.log(tokens / 1e9), n_params=np.full(6, 1e9), tokens=tokens, share=share)


def test_baselines_are_the_nearest_ratio_and_a_line_between_neighbours() -> None:
    asked = points(n_params=1e9, tokens=np.array([1e9, 2e9, 1e9]), share=np.array([0.3, 0.25, 0.9]))
    nearest, line = by_ratio(measured(), asked)
    half = 0.1 * np.log(2)
    assert nearest == pytest.approx([2.5, 3 - half, 2.0])
    assert line == pytest.approx([2.7, 2.75 - half, 2.1])


def test_baselines_say_nothing_of_other_sizes_or_longer_runs_and_draw_no_line_beyond_the_ratios() -> None:
    known = measured().take(measured().share_R > 0)
    asked = points(
        n_params=np.array([2e9, 1e9, 1e9]), tokens=np.array([1e9, 9e9, 1e9]), share=np.array([0.5, 0.5, 0.1])
    )
    nearest, line = by_ratio(known, asked)
    assert np.isnan(nearest).tolist() == [True, True, False] and np.isnan(line).all()


def test_of_several_corpora_the_nearest_mixture_is_taken_and_no_line() -> None:
    known = rows([3.0, 2.0], shares=[[1, 0, 0], [0, 0.5, 0.5]], corpora=("a", "b", "c"))
    asked = points(shares=np.array([[0.2, 0.4, 0.4], [0.6, 0.4, 0.0]]), corpora=("a", "b", "c"))
    nearest, line = by_ratio(known, asked)
    assert nearest.tolist() == [2.0, 3.0] and np.isnan(line).all()


def test_errors_are_relative_and_r2_is_around_the_mean() -> None:
    found = heldout.errors(np.array([1.1, 2.0, 2.7]), np.array([1.0, 2.0, 3.0]))
    assert (found.count, found.largest) == (3, pytest.approx(0.1))
    assert found.mean == pytest.approx(0.2 / 3) and found.r2 == pytest.approx(1 - 0.1 / 2)


def test_a_single_token_count_has_no_last_third() -> None:
    _, missing = heldout.parts(Table.of(columns(tokens=(1e9,))).rows("domain"), "domain")
    assert missing == ("fewer than three token counts: the last third cannot be left out",)
