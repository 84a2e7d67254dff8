"""Every warning of the specification is raised where it is due and nowhere else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from cpt.laws import cautions
from cpt.laws.analyse import analyse
from cpt.laws.result import Analysis, Bootstrap, Errors, Estimate, Warn
from cpt.laws.settings import Settings
from cpt.laws.table import Table
from tests.unit.laws.tables import BASE_GENERAL, columns

USUAL = Settings(tolerance=0.03, base_losses={"general": BASE_GENERAL}, n_params=1.8e9, tokens=1e10, bootstrap=0)
USUAL = dataclasses.replace(USUAL, compare=False)


def analysed(given: Mapping[str, Any] | None = None, **changes: Any) -> Analysis:
    return analyse(Table.of(given or columns(noise=0.0)), "dcpt", dataclasses.replace(USUAL, **changes))


@pytest.fixture(scope="module")
def clean() -> Analysis:
    return analysed()


def again(found: Analysis, **changes: Any) -> list[Warn]:
    """The warnings of an analysis with some of its parts replaced."""
    given: dict[str, Any] = dict(
        law=found.law,
        table=found.table,
        fits=found.fits,
        settings=found.settings,
        bootstrap=found.bootstrap,
        recommendation=found.recommendation,
    )
    return list(cautions.cautions(**(given | changes)))


def changed(found: Analysis, name: str, **changes: Any) -> dict[str, Any]:
    return {**found.fits, name: dataclasses.replace(found.fits[name], **changes)}


def kinds(warnings: list[Warn] | tuple[Warn, ...]) -> set[str]:
    return {w.kind for w in warnings}


def test_a_clean_table_gives_no_warning_but_of_exact_fits(clean: Analysis) -> None:
    assert kinds(clean.warnings) <= {"outliers", "held_out"}
    assert clean.unfit == () and clean.verdict == "fit"


@pytest.mark.parametrize(
    ("asked", "strong", "says"),
    [
        (dict(n_params=8e9), False, "the model size lies 2 times beyond what was measured"),
        (dict(n_params=2e10), True, "5 times beyond what was measured: the prediction extrapolates far"),
        (dict(tokens=1e11), False, "the token count lies 5 times beyond"),
        (dict(tokens=2e11), True, "10 times beyond"),
    ],
)
def test_extrapolation_is_told_and_strongly_above_4_times_the_size_or_8_times_the_tokens(
    asked: dict[str, float], strong: bool, says: str
) -> None:
    warned = [w for w in analysed(**asked, eps_g=2.0, tolerance=None).warnings if w.kind == "extrapolation"]
    assert [w.strong for w in warned] == [strong] and says in warned[0].text


def test_a_ratio_outside_the_measured_ones_is_an_extrapolation() -> None:
    found = analysed(columns(noise=0.0, ratios=(0.0, 0.1, 0.2, 0.3, 0.4)))
    assert any(w.kind == "extrapolation" and "the ratio lies outside" in w.text for w in found.warnings)


def test_a_ratio_below_the_turning_point_is_told(clean: Analysis) -> None:
    assert clean.recommendation is not None
    small = dataclasses.replace(clean.recommendation, ratio=Estimate(1e-4))
    (warned,) = [w for w in again(clean, recommendation=small) if w.kind == "below_turning_point"]
    assert warned.target == "domain" and "r_domain 0.0001 lies below" in warned.text
    large = dataclasses.replace(clean.recommendation, ratio=Estimate(1 - 1e-5))
    assert any(w.target == "general" for w in again(clean, recommendation=large) if w.kind == "below_turning_point")


def test_a_general_loss_that_rises_and_falls_is_told_and_cmr_is_offered() -> None:
    given = columns(noise=0.0, sizes=(1.8e9,))
    for i, (share, tokens) in enumerate(zip(given["r_domain"], given["tokens"], strict=True)):
        k = np.log(tokens / 1e9) / np.log(20)
        given["loss_general"][i] = 2.2 + share * 0.3 * (k + 0.15) * np.exp(-2 * k) * (1 if share > 0.4 else -0.1)
    found = analysed(given, base_losses={"general": 2.2})
    (warned,) = [w for w in found.warnings if w.kind == "rise_and_fall"]
    assert warned.strong and warned.target == "general"
    assert "rises and then falls in 3 of 6 runs" in warned.text and "`law=cmr` can" in warned.text


def test_parameters_on_bounds_are_named(clean: Analysis) -> None:
    fit = dataclasses.replace(clean.fits["domain"].fit, at_bound=("eta", "gamma"))
    (warned,) = [w for w in again(clean, fits=changed(clean, "domain", fit=fit)) if w.kind == "bound"]
    assert warned.text.startswith("`eta`, `gamma` lie on their bounds") and "`law=l1`" in warned.text


def test_a_wide_interval_is_told(clean: Analysis) -> None:
    assert clean.recommendation is not None
    for width, wide in ((0.19, False), (0.21, True)):
        answer = dataclasses.replace(clean.recommendation, ratio=Estimate(0.7, 0.6, 0.6 + width))
        assert ("wide_interval" in kinds(again(clean, recommendation=answer))) is wide


@pytest.mark.parametrize(("ratio", "told"), [(1.0, True), (0.0, True), (0.5, False)])
def test_a_ratio_at_the_edge_of_those_that_were_run_is_told(clean: Analysis, ratio: float, told: bool) -> None:
    assert clean.recommendation is not None
    answer = dataclasses.replace(clean.recommendation, ratio=Estimate(ratio))
    assert ("edge" in kinds(again(clean, recommendation=answer))) is told


@pytest.mark.parametrize(("times", "told"), [(2.9, False), (3.1, True)])
def test_an_error_at_left_out_ratios_above_three_times_the_own_is_told(
    clean: Analysis, times: float, told: bool
) -> None:
    """The own error counts by the rows that remain beside the constants, as a fit of few rows is closer to its own."""
    fit = clean.fits["domain"]
    own = Errors(10, 0.01, 0.02, 0.9)
    free = np.sqrt(len(fit.rows) / (len(fit.rows) - len(fit.params)))
    held = dataclasses.replace(fit.heldout, law_within=times * 0.01 * free, by={}, error=1.0)
    fits = changed(clean, "domain", heldout=held, own=own)
    assert any(w.kind == "held_out" and w.target == "domain" for w in again(clean, fits=fits)) is told


@pytest.mark.parametrize(("times", "told"), [(5, False), (12, True)])
def test_tokens_beyond_those_of_the_fit_may_be_missed_by_more(clean: Analysis, times: float, told: bool) -> None:
    own, far = Errors(10, 0.01, 0.02, 0.9), Errors(10, times * 0.01, 0.5, 0.9)
    held = dataclasses.replace(clean.fits["domain"].heldout, law_within=0.01, by={"tokens": far})
    fits = changed(clean, "domain", heldout=held, own=own)
    assert any("last third of tokens" in w.text for w in again(clean, fits=fits) if w.kind == "held_out") is told


def forgetting(exponent: float = 0.35, noise: float = 0.002) -> dict[str, list[Any]]:
    """Three runs of each of five ratios, whose general loss rises with tokens."""
    rng = np.random.default_rng(0)
    found: dict[str, list[Any]] = {k: [] for k in ("run", "tokens", "r_domain", "loss_domain", "loss_general")}
    for r in (0.1, 0.3, 0.5, 0.7, 0.9):
        for k in range(3):
            for d in (1e9, 2e9, 3e9, 4e9):
                domain = 1.5 + 0.5 * np.exp(-3 * r) + 0.3 * (1e9 / d) ** 0.3 * (1 - 0.6 * r)
                general = 2.3 + 0.35 * r**3 * (d / 1e9) ** exponent
                noisy = np.exp(noise * rng.standard_normal(2)) * [domain, general]
                for key, value in zip(found, (f"{r}-{k}", d, r, *noisy.tolist()), strict=True):
                    found[key].append(value)
    return found


FORGOT = Settings(tolerance=0.03, base_losses={"general": 2.3}, tokens=4e9, bootstrap=0, compare=False)


def test_a_general_loss_that_rises_with_tokens_beside_the_answer_makes_the_law_unfit() -> None:
    found = analyse(Table.of(forgetting()), "dcpt", FORGOT)
    (warned,) = [w for w in found.warnings if w.kind == "rises_with_tokens"]
    assert warned.strong and warned.target == "general"
    assert "r_general 0.1: +0.1" in warned.text and "r_general 0.5: +0.0" in warned.text
    assert (
        "r_general 0.9" not in warned.text
        and "`law=cmr` can follow" in warned.text
        and "tokens==4000000000" in warned.text
    )
    (why,) = found.unfit
    assert "rises with tokens beside the answer" in why and "r_general 0.3 and" in why and "of 0.069 allowed" in why
    assert found.verdict == "unfit"


def test_a_law_asked_far_from_the_ratios_that_rise_stays_fit_and_warned() -> None:
    given = forgetting()
    given["loss_general"] = [
        loss if r == 0.9 else 2.3 + 0.1 * r + 0.01 * (1e9 / d) ** 0.3
        for loss, r, d in zip(given["loss_general"], given["r_domain"], given["tokens"], strict=True)
    ]
    asked = dataclasses.replace(FORGOT, tolerance=0.02)
    found = analyse(Table.of(given), "dcpt", asked)
    assert any(w.kind == "rises_with_tokens" for w in found.warnings)
    assert not any("rises with tokens" in why for why in found.unfit)


def test_a_law_with_nothing_left_out_is_unfit(clean: Analysis) -> None:
    nan = float("nan")
    held = dataclasses.replace(clean.fits["domain"].heldout, folds=(), by={}, error=nan, law_within=nan)
    (why,) = cautions.unfit(changed(clean, "domain", heldout=held))
    assert why == "the domain loss: nothing could be left out, so its error on new runs is not known"


@pytest.mark.parametrize(("agreeing", "told"), [(4, True), (5, False)])
def test_fewer_than_five_agreeing_restarts_are_told(clean: Analysis, agreeing: int, told: bool) -> None:
    fit = dataclasses.replace(clean.fits["general"].fit, agreeing=agreeing, num_starts=60)
    assert ("restarts" in kinds(again(clean, fits=changed(clean, "general", fit=fit)))) is told


@pytest.mark.parametrize(
    ("extra", "settings"),
    [
        ({"schedule": "cosine"}, {}),
        ({"lr": "falls"}, {}),
        ({}, {"decaying_lr": True}),
    ],
)
def test_checkpoints_of_a_decaying_lr_are_told(
    clean: Analysis, extra: dict[str, str], settings: dict[str, Any]
) -> None:
    given = columns(noise=0.0)
    count = len(given["tokens"])
    if "schedule" in extra:
        given["schedule"] = ["cosine"] * count
    if "lr" in extra:
        given["lr"] = [3e-5 * (1 - t / 4e10) for t in given["tokens"]]
    told = again(clean, table=Table.of(given), settings=dataclasses.replace(USUAL, **settings))
    assert "decaying_lr" in kinds(told)


def test_a_steady_lr_after_warm_up_and_tables_of_last_checkpoints_are_not(clean: Analysis) -> None:
    given = columns(noise=0.0)
    given["lr"] = [3e-5 * min(1, t / 2e9) for t in given["tokens"]]
    given["schedule"] = ["constant"] * len(given["lr"])
    assert "decaying_lr" not in kinds(again(clean, table=Table.of(given)))
    last = columns(noise=0.0, tokens=(1e10,))
    last["schedule"] = ["cosine"] * len(last["tokens"])
    assert "decaying_lr" not in kinds(again(clean, table=Table.of(last)))


@pytest.mark.parametrize(("column", "what"), [("eval_id", "validation sets"), ("tokenizer", "tokenizers")])
def test_mixed_validation_sets_and_tokenizers_are_told(clean: Analysis, column: str, what: str) -> None:
    given = columns(noise=0.0)
    count = len(given["tokens"])
    same, mixed = [["v1"] * count, ["v1"] * (count - 1) + ["v2"]]
    assert kinds(again(clean, table=Table.of(given | {column: same}))) <= {"outliers", "held_out"}
    (warned,) = [w for w in again(clean, table=Table.of(given | {column: mixed})) if w.kind == f"mixed_{column}"]
    assert warned.strong and f"2 {what} (`v1`, `v2`)" in warned.text


def test_a_missing_base_loss_is_told(clean: Analysis) -> None:
    assert "base_missing" in kinds(again(clean, fits=changed(clean, "general", base=None)))


def test_few_runs_make_rough_intervals_and_fewer_none(clean: Analysis) -> None:
    for units, resamples, kind in ((11, 200, "few_runs"), (12, 200, None), (4, 0, "no_intervals")):
        told = kinds(again(clean, bootstrap=Bootstrap("run", units, resamples, 0)))
        assert told & {"few_runs", "no_intervals"} == ({kind} if kind else set())


def test_warnings_of_the_table_are_passed_on_and_strong_ones_come_first(clean: Analysis) -> None:
    table = dataclasses.replace(clean.table, warnings=("row 3 is odd",), eval_id=("a", "b"))
    told = again(clean, table=table)
    assert told[0].kind == "mixed_eval_id" and Warn("table", "row 3 is odd") in told


def test_a_law_that_loses_to_a_line_between_neighbours_is_unfit(clean: Analysis) -> None:
    held = clean.fits["domain"].heldout
    assert cautions.unfit(clean.fits) == ()
    for name, worse in (("interpolation", 0.9), ("nearest", 1.1)):
        values = {"law_within": 0.01, "interpolation": 0.02, "nearest": 0.03} | {name: worse * 0.01}
        found = cautions.unfit(changed(clean, "domain", heldout=dataclasses.replace(held, **values)))
        assert len(found) == (worse < 1)
    nan = float("nan")
    losing = dataclasses.replace(held, law_within=0.02, interpolation=nan, nearest=0.01)
    assert "the nearest mixture" in cautions.unfit(changed(clean, "domain", heldout=losing))[0]
    unknown = dataclasses.replace(held, law_within=nan, interpolation=nan, nearest=nan)
    assert cautions.unfit(changed(clean, "domain", heldout=unknown)) == ()


def a_kink(share: float) -> float:
    return 2.5 - 0.2 * share + 0.8 * abs(share - 0.5)


def test_a_law_whose_form_the_losses_do_not_have_is_unfit() -> None:
    given = columns(noise=0.0, ratios=np.linspace(0, 1, 9).tolist(), sizes=(1.8e9,))
    given["loss_domain"] = [a_kink(r) for r in given["r_domain"]]
    bend: Callable[[float], float] = a_kink
    assert bend(0.5) < bend(0.0)
    found = analysed(given)
    assert found.verdict == "unfit" and "the domain loss at left-out ratios" in found.unfit[0]
