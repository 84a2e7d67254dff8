"""Forms side by side: the choice by held-out error, its words, and Akaike's criterion."""

from __future__ import annotations

import numpy as np
import pytest

from cpt.base.errors import UsageError
from cpt.laws.chinchilla import Chinchilla
from cpt.laws.compare import Checked, aicc, candidates, compare
from cpt.laws.fit import Fit, fit
from cpt.laws.result import Comparison, Errors, Fold, HeldOut
from cpt.laws.rows import rows
from cpt.laws.table import Table
from tests.unit.laws.tables import set_m


def a_fit(noise: float, rows_: int = 40) -> Fit:
    tokens = np.geomspace(1e8, 1e11, rows_)
    z = np.random.default_rng(0).standard_normal(rows_)
    return fit(Chinchilla(has_n=False), rows((1.5 + 500 / tokens**0.3) * np.exp(noise * z), tokens=tokens))


def compared(chosen: str | None, errors: dict[str, float], noise: dict[str, float] | None = None) -> Comparison:
    """Laws with these held-out errors; a law without one is refused."""

    def checked(name: str) -> Checked:
        if name not in errors:
            raise UsageError("too few ratios")
        error = errors[name]
        by = {"ratio": Errors(3, error, error, 0.9)} if np.isfinite(error) else {}
        held = HeldOut((), by, error, error, error, error)
        return {"domain": (a_fit((noise or {}).get(name, 0.01)), held)}

    return compare(set_m(tokens=(1e9, 2e9)), chosen, checked)


def test_the_lowest_held_out_error_wins_and_the_words_give_figures() -> None:
    found = compared(None, {"dcpt": 0.004, "l1": 0.006})
    assert (found.chosen, found.best) == ("dcpt", "dcpt")
    assert [f.law for f in found.forms[:2]] == ["dcpt", "l1"]
    assert found.why == "`dcpt` predicts left-out rows best: 0.4 % mean error, `l1` 0.6 %"


def test_equal_errors_are_decided_by_aicc() -> None:
    found = compared(None, {"dcpt": 0.00400, "l1": 0.00410}, {"dcpt": 0.02, "l1": 0.005})
    assert (found.chosen, found.best) == ("l1", "dcpt")
    assert "`l1` has the lower AICc" in found.why


def test_a_law_that_was_asked_for_stays_and_the_words_say_which_is_better() -> None:
    found = compared("l1", {"dcpt": 0.004, "l1": 0.006})
    assert (found.chosen, found.best) == ("l1", "dcpt")
    assert found.why.endswith("`l1` was asked for and misses them by 0.6 %")


def test_a_law_that_cannot_be_fitted_stays_in_the_list_with_the_reason() -> None:
    found = compared("l1", {"l1": 0.006})
    refused = {f.law: f.refused for f in found.forms if f.refused}
    assert refused["dcpt"] == "too few ratios" and found.forms[0].law == "l1"
    assert found.why == "`l1` is the only law that these rows allow"


def test_a_law_that_fits_one_loss_of_two_is_no_choice() -> None:
    good, better = HeldOut((), {}, 0.006, 0.006, 0.006, 0.006), HeldOut((), {}, 0.002, 0.002, 0.002, 0.002)

    def checked(name: str) -> Checked:
        if name == "cmr":
            return {"domain": (a_fit(0.01), better)}
        return {"domain": (a_fit(0.01), good), "general": (a_fit(0.01), good)}

    found = compare(set_m(tokens=(1e9, 2e9)), None, checked)
    assert found.chosen != "cmr" and {f.law: f.refused for f in found.forms}["cmr"].startswith(
        "the losses on `general`"
    )
    assert compare(set_m(tokens=(1e9, 2e9)), "cmr", checked).chosen == "cmr"


def test_errors_are_compared_on_the_folds_that_all_laws_have() -> None:
    folds = [
        Fold("ratio", "r_domain 0.5", 0.5, Errors(4, 0.01, 0.01, 0.9)),
        Fold("tokens", "from 1", 1.0, Errors(4, 0.5, 0.5, 0)),
    ]
    nan = float("nan")

    def checked(name: str) -> Checked:
        if name not in ("dcpt", "l1"):
            raise UsageError("no")
        own = tuple(folds if name == "dcpt" else folds[:1])
        held = HeldOut(own, {f.by: f.law for f in own}, float(np.mean([f.law.mean for f in own])), nan, nan, nan)
        return {"domain": (a_fit(0.01), held)}

    found = compare(set_m(tokens=(1e9, 2e9)), None, checked)
    assert {f.law: f.error for f in found.forms if not f.refused} == {"dcpt": 0.01, "l1": 0.01}


def test_no_law_at_all_is_refused_with_all_reasons() -> None:
    with pytest.raises(UsageError, match="no law can be fitted") as caught:
        compared(None, {})
    assert "too few ratios" in caught.value.message and caught.value.more


def test_without_held_out_errors_aicc_decides() -> None:
    nan = float("nan")
    found = compared(None, {"dcpt": nan, "l1": nan}, {"dcpt": 0.02, "l1": 0.005})
    assert found.chosen == "l1" and "AICc alone" in found.why


def test_aicc_is_that_of_laplace_residuals() -> None:
    found = a_fit(0.01)
    spread = np.mean(np.abs(found.residuals_R))
    n, p = 40, 3
    likelihood = -n * np.log(2 * spread) - np.sum(np.abs(found.residuals_R)) / spread
    assert aicc(found) == pytest.approx(-2 * likelihood + 2 * p + 2 * p * (p + 1) / (n - p - 1))


def test_candidates_follow_the_columns() -> None:
    assert "dcpt" in candidates(set_m()) and "chinchilla" not in candidates(set_m())
    plain = Table.of({"n_params": [1e9, 2e9], "tokens": [1e9, 2e9], "loss": [3.0, 2.0]})
    assert candidates(plain) == ("chinchilla",)
    repeated = Table.of({"n_params": [1e9, 2e9], "tokens": [1e9, 2e9], "unique_tokens": [1e9, 1e9], "loss": [3.0, 2.0]})
    assert "chinchilla" in candidates(repeated) and "dcpt" not in candidates(repeated)
    several = Table.of({"w_a": [0.2, 0.5], "w_b": [0.3, 0.1], "w_c": [0.5, 0.4], "loss_a": [3.0, 2.0]})
    assert "dcpt" not in candidates(several)


def test_the_folds_that_all_laws_share_are_named() -> None:
    errors = Errors(1, 0.01, 0.01, 0.9)
    ratio, tokens = Fold("ratio", "r_domain 0.5", 0.5, errors), Fold("tokens", "from 1B tokens", 1e9, errors)
    both, one = HeldOut((ratio, tokens), {}, 0.01, 0.01, 0.01, 0.01), HeldOut((ratio,), {}, 0.01, 0.01, 0.01, 0.01)

    def checked(name: str) -> Checked:
        return {"domain": (a_fit(0.01), one if name == "l1" else both)}

    found = compare(set_m(tokens=(1e9, 2e9)), "dcpt", checked)
    assert found.over == ("ratio",)
