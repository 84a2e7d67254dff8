"""Resamples of whole runs, the same runs for every loss, so that draws of two losses belong together.

A resample that cannot determine the law (a ratio or a size is missing) is drawn again and counted. Rows are drawn one
by one only where every run has a single row: the bootstrap by run is then the same thing.

Array suffixes: B resamples, U runs, R rows, D draws (row 0 the fit), P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cpt.laws.fit import Fit, refit
from cpt.laws.result import Bootstrap
from cpt.laws.rows import Floats, Ints
from cpt.laws.terms import determined

Options = Mapping[str, Mapping[str, object]]  # of the law, by target

FEW_RUNS = 12  # below, intervals are rough
FEW_RESAMPLES = 10  # so few different resamples say nothing about the spread
_EXTRA_STARTS = 3  # of each resample, beside the optimum
_LARGE = 10_000  # rows x parameters; larger tables start from the optimum alone
_ABSURD, _LEAST_SPAN = 3.0, 0.1  # a draw may miss a row by 3 times the range of losses, or 30 % of the highest
_RUNAWAY = ("mixing",)
_TRIES = 100  # draws per resample before the runs are called too few


def draws(fits: Mapping[str, Fit], options: Options, count: int, seed: int) -> tuple[dict[str, Floats], Bootstrap]:
    """Parameters of every resample, by target.

    Args:
        fits: on all rows, by target.
        options: of the law by target, as the fits were made with.
        count: how many resamples are wanted.

    Returns:
        theta_DP by target: the fit, then the resamples (none when the runs are too few for any); what was resampled.
    """
    times_BU, runs, redrawn = resamples(fits, options, count, seed)
    by_row = all(fit.rows.num_runs == len(fit.rows) for fit in fits.values())
    told = Bootstrap("row" if by_row else "run", len(runs), len(times_BU), redrawn)
    thetas: dict[str, Floats] = {}
    for name, fit in fits.items():
        found = [fit.theta_P[None]]
        if len(times_BU):
            place = {run: u for u, run in enumerate(runs.tolist())}
            unit_R = np.array([place[run] for run in fit.rows.run_R.tolist()])
            extra = _EXTRA_STARTS if len(fit.rows) * len(fit.theta_P) <= _LARGE else 0
            weight_BR = times_BU[:, unit_R] * fit.rows.weight_R
            found.append(refit(fit, weight_BR, extra_starts=extra, seed=seed)[0])
        thetas[name] = np.concatenate(found)
    sane_D = np.ones(len(times_BU) + 1, np.bool_)
    for name, fit in fits.items():
        if fit.law.name in _RUNAWAY:
            np.logical_and(sane_D, _sane(fit, thetas[name]), out=sane_D)
    sane_D[0] = True
    absurd = int(np.sum(~sane_D))
    return {name: theta_DP[sane_D] for name, theta_DP in thetas.items()}, replace(
        told, resamples=told.resamples - absurd, absurd=absurd
    )


def _sane(fit: Fit, theta_DP: Floats) -> NDArray[np.bool_]:
    """Draws that predict every measured row, drawn or not, somewhere near the measured losses.

    An exponential law of a resample without the outermost ratios may rise by powers of ten there. Other laws keep
    such draws, which are well determined elsewhere.
    """
    loss_R = fit.rows.loss_R
    margin = _ABSURD * max(float(np.ptp(loss_R)), _LEAST_SPAN * float(loss_R.max()))
    with np.errstate(all="ignore"):
        loss_DR = fit.law.loss(theta_DP, fit.rows)[0]
    near_DR = np.isfinite(loss_DR) & (np.abs(loss_DR - loss_R) <= margin)
    found: NDArray[np.bool_] = np.asarray(near_DR.all(1), np.bool_)
    return found


def resamples(fits: Mapping[str, Fit], options: Options, count: int, seed: int) -> tuple[Floats, Ints, int]:
    """times_BU each run is drawn in each resample, the runs' numbers, how many were drawn again.

    Runs are taken in the order in which the sorted rows hold them, so that neither the file's order nor the runs'
    names change a draw.
    """
    listed = np.concatenate([fit.rows.run_R for fit in fits.values()])
    runs, first = np.unique(listed, return_index=True)
    runs = runs[np.argsort(first, kind="stable")]
    rng = np.random.default_rng(seed)
    kept: list[Ints] = []
    redrawn = 0
    while len(kept) < count and redrawn < _TRIES * count:
        times_U = np.bincount(rng.integers(len(runs), size=len(runs)), minlength=len(runs))
        drawn = runs[times_U > 0]
        if all(
            determined(f.law, f.rows.take(np.isin(f.rows.run_R, drawn)), options.get(name, {}))
            for name, f in fits.items()
        ):
            kept.append(times_U)
        else:
            redrawn += 1
    found_BU = np.array(kept, np.float64).reshape(len(kept), len(runs))
    if len(kept) < count or len(np.unique(found_BU, axis=0)) < min(FEW_RESAMPLES, count):
        return found_BU[:0], runs, redrawn
    return found_BU, runs, redrawn


def standard_errors(fit: Fit, theta_DP: Floats) -> dict[str, float]:
    """Standard deviation over the resamples of each parameter as people write it, by name."""
    names = [p.name for p in fit.law.parameters]
    if len(theta_DP) < 3:
        return dict.fromkeys(names, float("nan"))
    return {name: float(np.std(natural_DP, ddof=1)) for name, natural_DP in natural(fit, theta_DP[1:]).items()}


def natural(fit: Fit, theta_DP: Floats) -> dict[str, Floats]:
    """Draws of each parameter as people write it, by name."""
    return {
        p.name: np.exp(column_D) if p.log else column_D
        for p, column_D in zip(fit.law.parameters, theta_DP.T, strict=True)
    }
