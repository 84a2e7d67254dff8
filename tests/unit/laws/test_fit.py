"""The fitter and the laws that it was made for: published tables, closed forms, gradients, order, threads."""

from __future__ import annotations

import csv
import os
import subprocess
import sys

import numpy as np
import pytest

from cpt.base.errors import UsageError
from cpt.laws.chinchilla import Chinchilla
from cpt.laws.dcpt import DCPT, L1
from cpt.laws.fit import Fit, fit, huber, refit
from cpt.laws.law import Law
from cpt.laws.rows import Rows, points, rows
from tests.shared import shared_data
from tests.unit.laws.set_m import DOMAIN, GENERAL


def table(name: str, **at_least: float) -> dict[str, np.ndarray]:
    with open(shared_data() / "laws" / name, newline="") as file:
        found = [row for row in csv.DictReader(file) if all(float(row[k]) >= v for k, v in at_least.items())]
    names = [n for n in found[0] if n not in ("size", "run")]
    return {n: np.array([float(row[n]) for row in found]) for n in names}


def r_squared(fitted: Fit) -> float:
    loss_R = fitted.rows.loss_R
    return float(1 - np.sum((loss_R - fitted.predict(fitted.rows)) ** 2) / np.sum((loss_R - loss_R.mean()) ** 2))


def made(truth: dict[str, float], noise: float, seed: int) -> Rows:
    rng = np.random.default_rng(seed)
    mesh = np.meshgrid(np.linspace(0, 1, 9), [5e8, 1.8e9, 4e9], np.geomspace(1e8, 2e10, 20), indexing="ij")
    share, n_params, tokens = (m.ravel() for m in mesh)
    exact = DCPT().loss(DCPT().fitted(truth)[None], points(n_params=n_params, tokens=tokens, share=share))[0][0]
    return rows(exact * np.exp(noise * rng.standard_normal(len(exact))), n_params=n_params, tokens=tokens, share=share)


def test_the_huber_loss_is_a_square_inside_and_a_line_outside() -> None:
    assert huber(np.array([0.0, 0.5, -1.0, 3.0]), 1.0) == pytest.approx([0, 0.125, 0.5, 2.5])


@pytest.mark.parametrize(
    "law", [Chinchilla(), Chinchilla(has_n=False), DCPT(), DCPT(has_n=False), DCPT(has_d=False), L1()]
)
def test_gradients_are_those_of_the_formula(law: Law) -> None:
    rng = np.random.default_rng(1)
    at = points(n_params=np.geomspace(1e7, 1e10, 7), tokens=np.geomspace(1e8, 1e11, 7), share=np.linspace(0, 1, 7))
    theta_P = np.array([0.3 + 0.4 * rng.random() for _ in law.parameters])
    _, gradient_BRP = law.loss(theta_P[None], at)
    for p in range(len(theta_P)):
        step = np.zeros_like(theta_P)
        step[p] = 1e-6
        high, low = law.loss((theta_P + step)[None], at)[0][0], law.loss((theta_P - step)[None], at)[0][0]
        assert gradient_BRP[0, :, p] == pytest.approx((high - low) / 2e-6, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize(
    ("truth", "share", "loss"),
    [
        (DOMAIN, [0, 0.25, 0.5, 1], [2.418796, 1.874794, 1.760831, 1.683420]),
        (GENERAL, [1, 0.75, 0.5, 0], [2.285752, 2.296045, 2.317466, 2.768018]),
    ],
)
def test_the_law_gives_the_worked_losses(truth: dict[str, float], share: list[float], loss: list[float]) -> None:
    law = DCPT()
    found = law.loss(law.fitted(truth)[None], points(n_params=1.8e9, tokens=1e10, share=np.array(share)))[0][0]
    assert found == pytest.approx(loss, abs=5e-7)


def test_c1_c2_the_chinchilla_table_is_fitted_to_the_optimum() -> None:
    columns = table("chinchilla_245.csv")
    keep = columns["top5_loss"] == 0
    of = {n: columns[n][keep] for n in ("n_params", "tokens", "loss")}
    fitted = fit(Chinchilla(), rows(of["loss"], n_params=of["n_params"], tokens=of["tokens"]))
    assert fitted.objective <= 1.01829e-3
    assert fitted.params["E"] == pytest.approx(1.8172, abs=1e-3)
    assert fitted.params["A"] == pytest.approx(477.8, rel=0.01)
    assert fitted.params["B"] == pytest.approx(2143, rel=0.02)
    assert (fitted.params["alpha"], fitted.params["beta"]) == pytest.approx((0.3473, 0.3672), abs=1e-3)
    assert fitted.agreeing >= 5 and not fitted.at_bound


@pytest.mark.parametrize(
    ("target", "from_step", "objective", "r2"),
    [("domain", 0, 4.69e-5, 0.9964), ("general", 0, 3.98e-5, 0.957), ("general", 3000, 6.1e-6, 0.9966)],
)
def test_k3_continual_pretraining_on_python(target: str, from_step: int, objective: float, r2: float) -> None:
    columns = table("cpt_pile_python_70m.csv", step=from_step)
    found = rows(columns[f"loss_{target}"], tokens=columns["tokens"], share=columns[f"r_{target}"])
    law, notes = DCPT.for_rows(found)
    fitted = fit(law, found)
    assert any("one model size" in note for note in notes)
    assert fitted.objective <= objective
    assert r_squared(fitted) == pytest.approx(r2, abs=6e-4)


@pytest.mark.parametrize(("target", "objective", "r2"), [("domain", 4.82e-4, 0.990), ("general", 1.89e-4, 0.994)])
def test_m1_two_corpora_of_two_sizes(target: str, objective: float, r2: float) -> None:
    columns = table("mix2_github_pilecc.csv")
    sizes = {"n_params": columns["n_params"], "tokens": columns["tokens"]}
    fitted = fit(DCPT(), rows(columns[f"loss_{target}"], **sizes, share=columns[f"r_{target}"]))
    assert fitted.objective <= objective
    assert r_squared(fitted) >= r2
    assert "eta" in fitted.at_bound


@pytest.mark.parametrize("truth", [DOMAIN, GENERAL])
def test_made_data_give_the_law_back(truth: dict[str, float]) -> None:
    fitted = fit(DCPT(), made(truth, noise=0.005, seed=3))
    exact = made(truth, noise=0.0, seed=3)
    off = np.abs(fitted.predict(exact) / exact.loss_R - 1)
    assert off.mean() <= 1e-3 and off.max() <= 1e-2


def test_the_order_of_the_rows_changes_nothing() -> None:
    found = made(DOMAIN, noise=0.005, seed=4).take(np.arange(0, 540, 7))
    shuffled = found.take(np.random.default_rng(0).permutation(len(found)))
    a, b = fit(DCPT(), found), fit(DCPT(), shuffled)
    assert np.array_equal(a.theta_P, b.theta_P) and a.objective == b.objective


def test_the_number_of_threads_changes_nothing() -> None:
    code = (
        "from tests.unit.laws.test_fit import *\n"
        "fitted = fit(DCPT(), made(DOMAIN, noise=0.005, seed=4).take(np.arange(0, 540, 7)))\n"
        "weights = np.random.default_rng(0).integers(0, 3, (20, len(fitted.rows))).astype(float)\n"
        "print(fitted.theta_P.tobytes().hex(), refit(fitted, weights)[0].tobytes().hex())"
    )
    seen = set()
    for threads in ("1", "2"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        seen.add(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout)
    assert len(seen) == 1


def test_resamples_are_fitted_as_well_as_alone() -> None:
    found = made(DOMAIN, noise=0.005, seed=5).take(np.arange(0, 540, 5)).in_order()
    fitted = fit(DCPT(), found)
    weight_BR = np.random.default_rng(1).multinomial(len(found), np.full(len(found), 1 / len(found)), 6).astype(float)
    _, objective_B = refit(fitted, weight_BR)
    for weight_R, objective in zip(weight_BR, objective_B, strict=True):
        drawn = np.repeat(np.arange(len(found)), weight_R.astype(int))
        assert objective <= fit(DCPT(), found.take(drawn)).objective * (1 + 5e-3)


def test_parameters_on_a_bound_are_named() -> None:
    at = points(n_params=1e9, tokens=np.geomspace(1e8, 1e10, 30), share=np.tile([0.1, 0.4, 0.7, 0.9, 1.0], 6))
    exact = L1().loss(L1().fitted(dict(E=1, A=1e-4, alpha=0.3, B=300, beta=0.3, C=0.3, eps=0.1, gamma=0.5))[None], at)[
        0
    ]
    fitted = fit(DCPT(has_n=False), rows(exact[0], tokens=at.tokens_R, share=at.share_R))
    assert "eta" in fitted.at_bound


@pytest.mark.parametrize(
    ("share", "message"),
    [([0.5] * 20, "one ratio is too few"), (np.tile([0.2, 0.5, 0.8], 7), "3 distinct ratios are too few")],
)
def test_too_few_ratios_are_refused(share: list[float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DCPT.for_rows(rows(np.ones(len(share)), share=share, tokens=np.arange(1, 1 + len(share)) * 1e9))


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(UsageError, match="8 rows are too few for the law `dcpt` with 7 parameters, which needs 10"):
        share, tokens = np.tile([0.1, 0.4, 0.7, 1.0], 2), np.repeat([1e9, 2e9], 4)
        DCPT.for_rows(rows(np.ones(8), share=share, tokens=tokens))
