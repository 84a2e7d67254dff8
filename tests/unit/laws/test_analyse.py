"""A whole analysis: what a table can say, what it cannot, the answer, and that the order of rows changes nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from cpt.base.errors import UsageError
from cpt.laws import table
from cpt.laws.analyse import analyse
from cpt.laws.result import Analysis
from cpt.laws.settings import Settings
from cpt.laws.table import Table
from tests.shared import shared_data
from tests.unit.laws.tables import BASE_GENERAL, SIZES, columns, reordered, set_m

QUICK = Settings(bootstrap=0, compare=False)
BASE = {"general": BASE_GENERAL}


def quick(given: dict[str, Any] | None = None, law: str = "dcpt", **settings: Any) -> Analysis:
    return analyse(Table.of(given or columns(noise=0.0)), law, dataclasses.replace(QUICK, **settings))


def kinds(found: Analysis) -> set[str]:
    return {w.kind for w in found.warnings}


@pytest.fixture(scope="module")
def two_corpora() -> tuple[Analysis, float]:
    """The 88-row table with everything switched on, and the seconds of processor time it took."""
    read = table.read(shared_data("laws", "mix2_github_pilecc.csv"))
    start = time.process_time()
    settings = Settings(tolerance=0.05, base_losses={"general": 3.3})
    return analyse(read, "dcpt", settings), time.process_time() - start


def test_the_88_row_table_takes_less_than_40_seconds_with_200_resamples_of_both_losses(
    two_corpora: tuple[Analysis, float],
) -> None:
    found, seconds = two_corpora
    assert found.bootstrap is not None and found.bootstrap.resamples == 200 and found.bootstrap.by == "run"
    assert found.bootstrap.redrawn > 0
    assert seconds < 40


def test_m1_objectives_and_fits_and_the_answer_without_outliers_beside(two_corpora: tuple[Analysis, float]) -> None:
    found, _ = two_corpora
    assert found.fits["domain"].fit.objective <= 4.82e-4 and found.fits["domain"].own.r2 >= 0.990
    assert found.fits["general"].fit.objective <= 1.89e-4 and found.fits["general"].own.r2 >= 0.994
    assert {"bound", "two_sizes", "outliers", "few_runs"} <= kinds(found)
    for fit in found.fits.values():
        assert fit.without_outliers is not None
        assert fit.without_outliers.objective < fit.fit.objective
    answer = found.recommendation
    assert answer is not None and answer.ratio is not None and answer.without_outliers is not None
    assert answer.without_outliers != answer.ratio.value
    assert answer.ratio.low < answer.ratio.value < answer.ratio.high


def test_forms_are_compared_and_the_choice_is_explained(two_corpora: tuple[Analysis, float]) -> None:
    comparison = two_corpora[0].comparison
    assert comparison is not None and comparison.chosen == "dcpt"
    assert {"dcpt", "l1"} <= {form.law for form in comparison.forms if not form.refused}
    assert "left-out rows" in comparison.why
    errors = [form.error for form in comparison.forms if not form.refused]
    assert errors == sorted(errors)


def test_all_of_it_goes_into_json_without_a_nan(two_corpora: tuple[Analysis, float]) -> None:
    found = two_corpora[0].to_json()
    wanted = ["law", "rows", "objective", "params", "intervals", "heldout", "outliers", "warnings", "recommendation"]
    assert set(wanted) <= set(found)
    text = json.dumps(found, allow_nan=False)
    again = json.loads(text)
    assert again["rows"] == {"domain": 88, "general": 88}
    assert again["params"]["domain"]["E"] == pytest.approx(two_corpora[0].fits["domain"].fit.params["E"])
    assert again["intervals"]["general"]["alpha"][0] < again["intervals"]["general"]["alpha"][1]
    assert again["recommendation"]["ratio"]["low"] < again["recommendation"]["ratio"]["high"]
    assert again["without_outliers"]["domain"]["params"]["E"] > 0


def without_lines(found: Analysis) -> dict[str, Any]:
    said = found.to_json()
    for far in said["outliers"].values():
        for one in far:
            del one["line"]
    return said


def test_the_order_of_rows_changes_nothing_at_all() -> None:
    settings = Settings(tolerance=0.03, base_losses=BASE, bootstrap=12, n_params=1.8e9, tokens=1e10)
    given = columns(noise=0.004, tokens=(1e9, 4e9, 1e10))
    given["loss_domain"][11] *= 1.06
    one, other = (analyse(Table.of(c), "dcpt", settings) for c in (given, reordered(given)))
    assert one.fits["domain"].outliers
    assert json.dumps(without_lines(one)) == json.dumps(without_lines(other))
    for name in one.fits:
        assert np.array_equal(one.fits[name].theta_DP, other.fits[name].theta_DP)


def test_the_number_of_threads_changes_nothing_at_all() -> None:
    code = (
        "from tests.unit.laws.tables import columns, BASE_GENERAL\n"
        "from cpt.laws.analyse import analyse\nfrom cpt.laws.settings import Settings\n"
        "from cpt.laws.table import Table\nimport json\n"
        "s = Settings(tolerance=0.03, base_losses={'general': BASE_GENERAL}, bootstrap=12, compare=False)\n"
        "print(json.dumps(analyse(Table.of(columns(tokens=(1e9, 4e9, 1e10))), 'dcpt', s).to_json()))"
    )
    said = []
    for threads in ("1", "4"):
        environment = os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        said.append(done.stdout)
    assert said[0] == said[1] and '"ratio"' in said[0]


# What a table determines.


def test_one_size_drops_its_term_says_so_and_refuses_other_sizes() -> None:
    given = columns(noise=0.0, sizes=(1.8e9,))
    found = quick(given)
    assert "A" not in found.fits["domain"].params and "alpha" not in found.fits["domain"].params
    assert any(w.kind == "not_determined" and "nothing can be said about other sizes" in w.text for w in found.warnings)
    with pytest.raises(UsageError, match="one model size says nothing about others"):
        quick(given, n_params=7e9)


def test_a_size_as_people_write_it_is_the_one_of_the_table() -> None:
    given = columns(noise=0.0, sizes=(1_803_456_000,))
    assert quick(given, n_params=1.8e9).fits["domain"].params.keys() == quick(given).fits["domain"].params.keys()


def test_two_sizes_are_fitted_with_a_warning_and_refuse_other_sizes_without_force() -> None:
    given = columns(noise=0.001, sizes=(5e8, 4e9))
    found = quick(given, bootstrap=12, n_params=2e9)
    assert "two_sizes" in kinds(found) and "alpha" in found.fits["domain"].params
    assert np.isfinite(found.fits["domain"].params["alpha"].low)
    with pytest.raises(UsageError, match="two model sizes say nothing about others") as caught:
        quick(given, n_params=7e9)
    assert "--force" in caught.value.hints[0]
    forced = quick(given, n_params=7e9, tolerance=0.03, base_losses={"general": 2.2}, force=True)
    assert "extrapolation" in kinds(forced)


def test_three_sizes_answer_for_others_with_a_warning() -> None:
    found = quick(n_params=8e9, tolerance=0.03, base_losses={"general": 2.2})
    assert "extrapolation" in kinds(found) and "two_sizes" not in kinds(found)


def test_one_token_count_drops_its_term() -> None:
    found = quick(columns(noise=0.0, tokens=(1e10,)))
    assert "B" not in found.fits["domain"].params and "eta" not in found.fits["domain"].params
    assert any("one token count" in w.text for w in found.warnings)


@pytest.mark.parametrize(("ratios", "hint"), [((0.2, 0.5, 0.8), "mixing"), ((0.2, 0.8), "other ratios")])
def test_fewer_than_four_ratios_are_refused(ratios: tuple[float, ...], hint: str) -> None:
    with pytest.raises(UsageError, match="distinct ratios are too few") as caught:
        quick(columns(ratios=ratios))
    assert any(hint in h for h in caught.value.hints)


def test_fewer_rows_than_parameters_and_three_are_refused() -> None:
    given = columns(noise=0.0, ratios=(0.0, 0.5, 0.75, 1.0), sizes=(1e9, 2e9), tokens=(1e9, 2e9))
    eleven = {k: v[:11] + v[12:16] for k, v in given.items()}
    keep = [0, 2, 4, 6, 8, 9, 11, 13, 15, 1, 10]
    few = {k: [v[i] for i in keep] for k, v in given.items()}
    assert len(eleven["tokens"]) == 15
    with pytest.raises(UsageError, match="11 rows are too few for the law `dcpt` with 9 parameters, which needs 12"):
        quick(few)


# The three usages through settings (set M).


def test_usage_1_through_a_fitted_table() -> None:
    found = quick(tolerance=0.03, base_losses=BASE, n_params=1.8e9, tokens=1e10).recommendation
    assert found is not None and found.ratio is not None and found.usage == "tradeoff"
    assert found.ratio.value == pytest.approx(0.726071, abs=2e-3)
    assert found.losses["domain"].value == pytest.approx(1.714250, abs=1e-3)
    assert found.losses["general"].value == pytest.approx(found.limits["general"], abs=1e-6)
    assert found.mixture["general"].value == pytest.approx(1 - found.ratio.value)
    assert found.replay is not None and found.replay.value == pytest.approx(1 - found.ratio.value)
    assert found.more["replay_tokens"] == pytest.approx(1e10 * found.replay.value)
    assert found.inside and set(found.factors.values()) == {1.0}
    assert "3 %" in found.asked and "1.80B parameters" in found.asked


def test_usage_2_through_a_fitted_table() -> None:
    found = quick(domain_tokens=1e9, n_params=1.8e9).recommendation
    assert found is not None and found.ratio is not None and found.tokens is not None
    assert found.usage == "limited"
    assert found.ratio.value == pytest.approx(0.710297, abs=5e-3)
    assert found.tokens.value == pytest.approx(1.40786e9, rel=0.01)


def test_usage_3_through_a_fitted_table() -> None:
    found = quick(compute=1e21, ratio=0.5).recommendation
    assert found is not None and found.n_params is not None and found.tokens is not None
    assert found.n_params == pytest.approx(1.81877e10, rel=0.05)
    assert found.tokens.value == pytest.approx(9.16372e9, rel=0.05)
    assert found.losses["domain"].value == pytest.approx(1.652935, abs=2e-3)
    with pytest.raises(UsageError, match="split at a fixed ratio"):
        quick(compute=1e21)


def test_the_interval_of_the_ratio_is_that_of_paired_draws() -> None:
    settings = dict(tolerance=0.03, base_losses=BASE, n_params=1.8e9, tokens=1e10, bootstrap=40)
    found = quick(columns(noise=0.003), **settings).recommendation
    assert found is not None and found.ratio is not None
    assert len(found.ratio_D) == 41 and found.ratio_D[0] == found.ratio.value
    low, high = np.quantile(found.ratio_D[1:], [0.025, 0.975])
    assert (found.ratio.low, found.ratio.high) == (low, high)
    assert 0 < high - low < 0.2


def test_only_one_loss_is_fitted_alone_and_usage_1_refused() -> None:
    given = columns(noise=0.0)
    domain = {k: v for k, v in given.items() if k != "loss_general"}
    general = {k: v for k, v in given.items() if k != "loss_domain"}
    assert list(quick(domain).fits) == ["domain"] and quick(domain).recommendation is None
    with pytest.raises(UsageError, match="`loss_general` is not in the table"):
        quick(domain, tolerance=0.03)
    found = quick(general, tolerance=0.03, base_losses=BASE, n_params=1.8e9, tokens=1e10).recommendation
    assert found is not None and found.usage == "threshold" and found.ratio is not None
    assert found.ratio.value == pytest.approx(0.726071, abs=2e-3)


def test_a_tolerance_without_the_loss_before_training_is_refused() -> None:
    with pytest.raises(UsageError, match="general loss before training is missing"):
        quick(tolerance=0.03)


def test_base_losses_come_from_rows_of_no_training_and_by_size() -> None:
    given = columns(noise=0.0)
    for n in SIZES[:2]:
        for name, value in zip(given, (n, 0.0, 0.5, 2.6, BASE_GENERAL if n == 1.8e9 else 2.5), strict=True):
            given[name].append(value)
    found = quick(given, tolerance=0.03, n_params=1.8e9, tokens=1e10).recommendation
    assert found is not None and found.ratio is not None and found.base == {"domain": 2.6, "general": BASE_GENERAL}
    assert found.ratio.value == pytest.approx(0.726071, abs=2e-3)
    with pytest.raises(UsageError, match=r"not known for a model of 4\.00B parameters"):
        quick(given, tolerance=0.03, n_params=4e9, tokens=1e10)


def test_where_no_ratio_is_admissible_the_smallest_rise_is_told() -> None:
    found = quick(eps_g=0.001, base_losses={"general": 2.0}, n_params=1.8e9, tokens=1e10)
    assert found.recommendation is None and "the smallest rise is" in found.no_recommendation


def test_nothing_asked_is_said() -> None:
    assert "`tolerance=3%`" in quick().no_recommendation


def test_an_unknown_law_gets_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="unknown law `dcptt`") as caught:
        quick(law="dcptt")
    assert "`dcpt`" in caught.value.hints[0]


def test_k4_the_python_runs_are_told_to_rise_and_fall_and_cmr_follows_them() -> None:
    read = table.read(shared_data("laws", "cpt_pile_python_70m.csv"))
    base = {"general": 2.8733676, "domain": 1.8381195}
    asked = dict(base_losses=base, eps_g=0.02)
    found = analyse(read, "dcpt", dataclasses.replace(QUICK, **asked))
    (warned,) = [w for w in found.warnings if w.kind == "rise_and_fall"]
    assert warned.strong and "2 of 4 runs (r_general 0.125, peak at step" in warned.text and "`law=cmr`" in warned.text
    other = analyse(read, "cmr", dataclasses.replace(QUICK, **asked))
    assert [w.strong for w in other.warnings if w.kind == "rise_and_fall"] == [False]
    assert other.fits["general"].own.mean < 0.4 * found.fits["general"].own.mean
    answer = other.recommendation
    assert answer is not None and answer.ratio is not None and answer.usage == "cmr"
    assert answer.decided_by == "threshold" and answer.ratio.value == pytest.approx(0.79, abs=0.02)
    assert answer.more["threshold"] == answer.ratio.value <= answer.more["turning"].value
    json.dumps(other.to_json(), allow_nan=False)


def test_three_ratios_at_one_size_and_length_are_left_to_the_mixing_law() -> None:
    given = columns(noise=0.0, ratios=(0.2, 0.5, 0.8), sizes=(1.8e9,), tokens=(1e10,))
    found = quick(given, "auto")
    assert found.law == "mixing" and found.comparison is not None
    assert {f.law for f in found.comparison.forms if f.refused} >= {"dcpt", "l1"}
    with pytest.raises(UsageError, match="no law can be fitted"):
        quick(columns(ratios=(0.2, 0.8), sizes=(1.8e9,), tokens=(1e10,)), "auto")


def test_several_corpora_get_the_best_mixture_with_its_interval() -> None:
    read = table.read(shared_data("laws", "mix5_pile.csv"), where="n_params < 2e7 and step == 30000")
    settings = dataclasses.replace(QUICK, goal={"internet": 1.0, "prose": 1.0}, bootstrap=12)
    found = analyse(read, "mixing", settings).recommendation
    assert found is not None and found.usage == "mixture" and found.ratio is None
    assert sum(e.value for e in found.mixture.values()) == pytest.approx(1)
    assert all(e.low <= e.value + 1e-3 and e.value - 1e-3 <= e.high for e in found.mixture.values())
    assert "convex" in " ".join(found.notes)
    with pytest.raises(UsageError, match="two corpora"):
        analyse(read, "mixing", dataclasses.replace(QUICK, tolerance=0.03))


def test_auto_takes_the_form_that_made_the_rows() -> None:
    """Rows without eta: the form with fewer parameters is as good on left-out rows and wins by AICc."""
    given = columns(noise=0.0)
    rng = np.random.default_rng(5)
    for i, (n, d, r) in enumerate(zip(given["n_params"], given["tokens"], given["r_domain"], strict=True)):
        tail = 420 / n**0.36 + 300 / d**0.34
        z = 0.003 * rng.standard_normal(2)
        given["loss_domain"][i] = (1.1 + tail + 0.28 / (r + 0.08) ** 0.55) * np.exp(z[0])
        given["loss_general"][i] = (1.7 + tail + 0.12 / (1 - r + 0.05) ** 0.6) * np.exp(z[1])
    found = quick(given, "auto")
    assert found.law == "l1" and found.comparison is not None and found.comparison.chosen == "l1"


def test_a_row_that_lacks_one_loss_counts_for_the_other() -> None:
    given = columns(noise=0.0)
    given["loss_domain"][5] = None  # type: ignore[call-overload]
    found = quick(given)
    assert {name: len(f.rows) for name, f in found.fits.items()} == {"domain": 107, "general": 108}


def test_law_fitting_loads_no_torch() -> None:
    code = "import cpt.laws.analyse, sys; assert not {'torch', 'hydra', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_answer_of_a_noisy_table_is_near_the_truth() -> None:
    found = analyse(
        set_m(), "dcpt", dataclasses.replace(QUICK, tolerance=0.03, base_losses=BASE, n_params=1.8e9, tokens=1e10)
    )
    assert found.recommendation is not None and found.recommendation.ratio is not None
    assert found.recommendation.ratio.value == pytest.approx(0.726071, abs=0.02)
