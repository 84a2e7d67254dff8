"""The one fitter of all laws: a sum of Huber losses on log residuals, minimised from many starts at once.

    starts of the law ─▶ Levenberg-Marquardt on all as one batch, in rounds that fewer and fewer go on from
    ─▶ L-BFGS-B from the best, in case something is left ─▶ how many of the last round agree

Always the sum, never the mean, and scaled up before it reaches a quasi-Newton method: with the mean that stops far too
early (Besiroglu et al. 2024, arXiv:2404.10102). Resamples are solved as one batch from the optimum.

Array suffixes: B parameter vectors, P parameters, R rows. Sums over rows have a fixed order, whatever the number of
threads: nothing here reaches a threaded matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from cpt.base.errors import UsageError
from cpt.laws.law import Law
from cpt.laws.rows import Floats, Rows

DELTA = 1e-3  # of the Huber loss; a residual of 0.1 % in log loss
AGREE = 1e-4  # starts that end within this of the best objective, relatively, have found the same optimum
ON_BOUND = 1e-6  # distance from a bound that counts as on it, relative to the range
_SCALE = 1e6  # of the objective before it reaches L-BFGS-B
_BATCH = 4_000_000  # numbers in one gradient array
_FLOOR = 1e-300
_SAME = 2e-3  # two optima closer than this, relative to the bounds, are one
_ROUNDS = ((60, 20), (300, 8), (4000, 8))  # iterations, and how many starts go on after them


@dataclass(frozen=True, eq=False, kw_only=True)
class Fit:
    """A fitted law.

    Args:
        theta_P: the parameters in fitting space.
        objective: sum over rows of weight · Huber(residual).
        rows: what it was fitted on, sorted.
        delta: where the Huber loss becomes linear.
        scale: `log`: residuals of the log loss; `linear`: of the loss itself [nats/token].
        agreeing: starts of the last round that found this optimum.
        at_bound: parameters that lie on a bound.
        scores: objectives that the starts ended with, best first.
    """

    law: Law
    theta_P: Floats
    objective: float
    rows: Rows
    delta: float
    scale: str
    agreeing: int
    num_starts: int
    at_bound: tuple[str, ...]
    scores: tuple[float, ...]

    @property
    def params(self) -> dict[str, float]:
        """Parameters as people write them."""
        return self.law.natural(self.theta_P)

    def predict(self, rows: Rows) -> Floats:
        """Predicted losses [nats/token], one a row."""
        return self.law.loss(self.theta_P[None], rows)[0][0]

    @property
    def residuals_R(self) -> Floats:
        """Prediction minus measurement, in the scale of the fit."""
        return _residuals(self.law, self.theta_P[None], self.rows, self.scale)[0][0]


def fit(
    law: Law,
    rows: Rows,
    *,
    delta: float = DELTA,
    scale: str = "log",
    num_starts: int = 60,
    seed: int = 0,
    starts_SP: Floats | None = None,
) -> Fit:
    """The law's best parameters for the rows.

    Args:
        starts_SP: where to start instead of where the law says, in fitting space.

    Raises:
        UsageError: no start converges.
    """
    rows = rows.in_order()
    if starts_SP is None:
        starts_SP = law.starts(rows, np.random.default_rng(seed), num_starts)
    low_P, high_P = law.bounds
    theta_BP = np.clip(starts_SP, low_P, high_P)
    weight_BR = np.broadcast_to(rows.weight_R, (len(theta_BP), len(rows)))
    for iterations, keep in _ROUNDS:
        theta_BP, score_B = descend(law, rows, theta_BP, weight_BR[: len(theta_BP)], delta, scale, iterations)
        best = np.argsort(score_B, kind="stable")[:keep]
        theta_BP, score_B = theta_BP[best], score_B[best]
    if not np.isfinite(score_B[0]):
        raise UsageError(f"the law `{law.name}` does not converge on these {len(rows)} rows from any start")
    theta_P, score = _polish(law, rows, theta_BP[0], float(score_B[0]), delta, scale)
    near = (theta_P - low_P < ON_BOUND * (high_P - low_P)) | (high_P - theta_P < ON_BOUND * (high_P - low_P))
    return Fit(
        law=law,
        theta_P=theta_P,
        objective=score,
        rows=rows,
        delta=delta,
        scale=scale,
        agreeing=max(1, int(np.sum(score_B <= score * (1 + AGREE) + 1e-15))),
        num_starts=len(starts_SP),
        at_bound=tuple(p.name for p, on in zip(law.parameters, near, strict=True) if on),
        scores=tuple(float(s) for s in score_B),
    )


def refit(
    fitted: Fit, weight_BR: Floats, *, rows: Rows | None = None, extra_starts: int = 3, seed: int = 0
) -> tuple[Floats, Floats]:
    """The best parameters for many weightings of the rows (resamples, folds), from the optimum and some other starts.

    The other starts are drawn once and first go down on the unweighted rows; those that arrive at the optimum itself
    need not be tried again for every weighting.

    Args:
        weight_BR: weights of the rows of `fitted.rows`, one set of weights a line.
        rows: other rows than those of the fit, in the order of `weight_BR`.

    Returns:
        theta_BP in fitting space, objective_B.
    """
    law, rows = fitted.law, fitted.rows if rows is None else rows
    starts_SP = np.concatenate([fitted.theta_P[None], _other_optima(fitted, rows, extra_starts, seed)])
    count, each = len(weight_BR), len(starts_SP)
    theta_BP = np.tile(starts_SP, (count, 1))
    weights = np.repeat(weight_BR, each, axis=0)
    theta_BP, score_B = descend(law, rows, theta_BP, weights, fitted.delta, fitted.scale, 60)
    best_B = np.argmin(score_B.reshape(count, each), axis=1) + each * np.arange(count)
    return descend(law, rows, theta_BP[best_B], weight_BR, fitted.delta, fitted.scale, 300)


def _other_optima(fitted: Fit, rows: Rows, count: int, seed: int) -> Floats:
    """Where other starts end on the rows as they are, but for those that end where the fit is."""
    law = fitted.law
    low_P, high_P = law.bounds
    if not count:
        return np.empty((0, len(low_P)))
    starts_SP = np.clip(law.starts(rows, np.random.default_rng(seed), count)[:count], low_P, high_P)
    weight_SR = np.broadcast_to(rows.weight_R, (len(starts_SP), len(rows)))
    theta_SP, score_S = descend(law, rows, starts_SP, weight_SR, fitted.delta, fitted.scale, 300)
    off_S = np.max(np.abs(theta_SP - fitted.theta_P) / (high_P - low_P), axis=1)
    return theta_SP[np.isfinite(score_S) & (off_S > _SAME)]


def huber(residual: Floats, delta: float) -> Floats:
    """x²/2 up to delta, then delta·(|x| − delta/2)."""
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * residual * residual, delta * (size - 0.5 * delta))


def descend(
    law: Law, rows: Rows, theta_BP: Floats, weight_BR: Floats, delta: float, scale: str, iterations: int
) -> tuple[Floats, Floats]:
    """Levenberg-Marquardt on reweighted least squares within the bounds, for many problems side by side.

    Returns:
        theta_BP, objective_B; infinite where a start led nowhere.
    """
    size = max(1, _BATCH // max(1, len(rows) * theta_BP.shape[1]))
    parts = [
        _descend(law, rows, theta_BP[i : i + size], weight_BR[i : i + size], delta, scale, iterations)
        for i in range(0, len(theta_BP), size)
    ]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def _descend(
    law: Law, rows: Rows, theta_BP: Floats, weight_BR: Floats, delta: float, scale: str, iterations: int
) -> tuple[Floats, Floats]:
    low_P, high_P = law.bounds
    theta_BP = theta_BP.copy()
    residual_BR, gradient_BRP = _residuals(law, theta_BP, rows, scale)
    score_B = _score(residual_BR, weight_BR, delta)
    damping_B = np.full(len(theta_BP), 1e-3)
    still_B = np.zeros(len(theta_BP), np.int64)  # small gains in a row
    live = np.flatnonzero(np.isfinite(score_B))
    residual_BR, gradient_BRP = residual_BR[live], gradient_BRP[live]
    for _ in range(iterations):
        if not len(live):
            break
        theta = theta_BP[live]
        trial = _step(theta, residual_BR, gradient_BRP, weight_BR[live], delta, damping_B[live], low_P, high_P)
        new_residual_BR, new_gradient_BRP = _residuals(law, trial, rows, scale)
        new_score = _score(new_residual_BR, weight_BR[live], delta)
        old_score = score_B[live]
        better = new_score < old_score
        gain = np.where(better, (old_score - new_score) / np.maximum(old_score, _FLOOR), 0.0)
        theta_BP[live[better]] = trial[better]
        score_B[live[better]] = new_score[better]
        residual_BR[better], gradient_BRP[better] = new_residual_BR[better], new_gradient_BRP[better]
        damping_B[live] = np.where(better, np.maximum(damping_B[live] / 4, 1e-12), damping_B[live] * 6)
        still_B[live] = np.where(better & (gain > 1e-9), 0, still_B[live] + better)
        going = (still_B[live] < 4) & (damping_B[live] < 1e10) & (score_B[live] > 0)
        live, residual_BR, gradient_BRP = live[going], residual_BR[going], gradient_BRP[going]
    return theta_BP, score_B


def _step(
    theta_BP: Floats,
    residual_BR: Floats,
    gradient_BRP: Floats,
    weight_BR: Floats,
    delta: float,
    damping_B: Floats,
    low_P: Floats,
    high_P: Floats,
) -> Floats:
    """The next parameters of a damped Gauss-Newton step; a parameter that a bound holds back stays."""
    pull_BR = weight_BR * np.minimum(1.0, delta / np.maximum(np.abs(residual_BR), _FLOOR))
    weighted_BRP = gradient_BRP * pull_BR[:, :, None]
    slope_BP = np.einsum("brp,br->bp", weighted_BRP, residual_BR)
    curve_BPP = np.einsum("brp,brq->bpq", weighted_BRP, gradient_BRP)
    held_BP = ((theta_BP <= low_P) & (slope_BP > 0)) | ((theta_BP >= high_P) & (slope_BP < 0))
    diagonal_BP = np.einsum("bpp->bp", curve_BPP).copy()
    floor_B1 = 1e-12 * diagonal_BP.max(axis=1, keepdims=True) + _FLOOR
    free_BP = ~held_BP
    curve_BPP = curve_BPP * free_BP[:, :, None] * free_BP[:, None, :]
    added_BP = np.where(held_BP, 1.0, damping_B[:, None] * np.maximum(diagonal_BP, floor_B1))
    at = np.arange(theta_BP.shape[1])
    curve_BPP[:, at, at] += added_BP
    wanted = -np.where(held_BP, 0.0, slope_BP)[:, :, None]
    try:
        move_BP = np.linalg.solve(curve_BPP, wanted)[:, :, 0]
    except np.linalg.LinAlgError:
        curve_BPP[:, at, at] += floor_B1 + 1e-9 * diagonal_BP
        move_BP = np.stack([np.linalg.lstsq(c, w, rcond=None)[0][:, 0] for c, w in zip(curve_BPP, wanted, strict=True)])
    return np.clip(theta_BP + np.nan_to_num(move_BP), low_P, high_P)


def _residuals(law: Law, theta_BP: Floats, rows: Rows, scale: str) -> tuple[Floats, Floats]:
    """residual_BR and its derivatives_BRP, in the scale of the fit."""
    with np.errstate(all="ignore"):
        loss_BR, gradient_BRP = law.loss(theta_BP, rows)
        if scale == "linear":
            return loss_BR - rows.loss_R, gradient_BRP
        residual_BR = np.log(loss_BR) - np.log(rows.loss_R)
        return residual_BR, gradient_BRP / loss_BR[:, :, None]


def _score(residual_BR: Floats, weight_BR: Floats, delta: float) -> Floats:
    with np.errstate(all="ignore"):
        score_B = np.einsum("br,br->b", weight_BR, huber(residual_BR, delta))
    return np.where(np.isfinite(score_B), score_B, np.inf)


def _polish(law: Law, rows: Rows, theta_P: Floats, score: float, delta: float, scale: str) -> tuple[Floats, float]:
    """What L-BFGS-B still finds below the best point."""
    weight_BR = rows.weight_R[None]

    def scaled(theta: NDArray[np.float64]) -> tuple[float, Floats]:
        residual_BR, gradient_BRP = _residuals(law, theta[None], rows, scale)
        value = _score(residual_BR, weight_BR, delta)[0]
        pull_R = weight_BR[0] * np.clip(residual_BR[0], -delta, delta)
        slope_P = np.einsum("rp,r->p", gradient_BRP[0], pull_R)
        return (value * _SCALE, slope_P * _SCALE) if np.isfinite(value) else (1e300, np.zeros_like(theta))

    options = {"maxcor": 40, "maxiter": 2000, "maxfun": 20000, "ftol": 1e-14, "gtol": 1e-10}
    bounds = list(zip(*law.bounds, strict=True))
    found = minimize(scaled, theta_P, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    value = float(found.fun) / _SCALE
    return (found.x, value) if value < score else (theta_P, score)
