"""Runs whose loss goes on rising with tokens: ordinary forgetting, which a law that falls with tokens cannot follow.

The trend is the median of the slopes between all pairs of checkpoints of a run (Theil-Sen), in log tokens, over the
runs of one ratio and size together, so that neither a spike nor the jump of the first steps makes one.

Array suffixes: R rows, U rows of one ratio.
"""

from __future__ import annotations

import numpy as np

from cpt.laws.outliers import ratio_name, spread_of
from cpt.laws.result import Growth
from cpt.laws.rows import Floats, Ints, Rows

_LEAST_ROWS = 3  # of a run, to have a trend
_NOISE = 4.0  # standard errors, of few rows, that a rise must exceed
_LEAST_RISE = 1e-3  # smaller rises matter to nobody [fraction of the loss]


def growing(rows: Rows, predicted_R: Floats, target: str) -> tuple[Growth, ...]:
    """Ratios whose loss rises over the measured tokens by more than noise, those with the largest rise first.

    Args:
        predicted_R: what the law predicts for the rows [nats/token].
        target: name of the loss.
    """
    if rows.tokens_R is None:
        return ()
    x_R = np.log(rows.tokens_R)
    groups = []
    for at in _groups(rows):
        unit_U = _units(rows.run_R[at])
        if (slope := _slope(x_R[at], rows.loss_R[at], unit_U)) is None:
            continue
        left_U = _centred(rows.loss_R[at], unit_U) - slope * _centred(x_R[at], unit_U)
        groups.append((at, unit_U, slope, left_U))
    if not groups:
        return ()
    taken = sum(1 + len(np.unique(unit_U)) for _, unit_U, _, _ in groups)
    count = sum(len(at) for at, _, _, _ in groups)
    spread = spread_of(np.concatenate([left_U for *_, left_U in groups])) * np.sqrt(count / max(count - taken, 1))
    found = []
    for at, unit_U, slope, _ in groups:
        length = float(np.ptp(x_R[at]))
        error = spread / np.sqrt(np.sum(_centred(x_R[at], unit_U) ** 2))
        rise = slope * length
        if rise <= max(_NOISE * error * length, _LEAST_RISE * float(rows.loss_R[at].mean())):
            continue
        law = _slope(x_R[at], predicted_R[at], unit_U)
        share = float("nan") if rows.share_R is None else float(rows.share_R[at[0]])
        found.append(
            Growth(
                what="" if np.isnan(share) else f"{ratio_name(target)} {share:.4g}",
                share=share,
                n_params=None if rows.n_params_R is None else float(rows.n_params_R[at[0]]),
                runs=tuple(int(run) for run in np.unique(rows.run_R[at])),
                rise=rise,
                predicted=0.0 if law is None else law * length,
                first_tokens=float(rows.tokens_R[at].min()),
                last_tokens=float(rows.tokens_R[at].max()),
            )
        )
    return tuple(sorted(found, key=lambda g: (-g.rise, g.what, g.n_params or 0.0)))


def _groups(rows: Rows) -> list[Ints]:
    """Rows of one mixture, size and domain."""
    columns = [c for c in (rows.n_params_R, rows.share_R, rows.domain_R) if c is not None]
    columns += [] if rows.shares_RK is None else list(rows.shares_RK.T)
    if not columns:
        return [np.arange(len(rows))]
    _, place_R = np.unique(np.stack([np.asarray(c, np.float64) for c in columns], 1), axis=0, return_inverse=True)
    place_R = place_R.reshape(-1)
    return [np.flatnonzero(place_R == k) for k in range(int(place_R.max()) + 1)]


def _units(run_U: Ints) -> Ints:
    """What rows are compared within: their run; runs of a single row are compared with each other."""
    _, place_U, count = np.unique(run_U, return_inverse=True, return_counts=True)
    place_U = place_U.reshape(-1)
    found: Ints = np.where(count[place_U] > 1, place_U, -1)
    return found


def _slope(x_U: Floats, loss_U: Floats, unit_U: Ints) -> float | None:
    """Median slope over all pairs of rows of one unit; None with too few rows."""
    slopes = []
    for unit in np.unique(unit_U):
        at = np.flatnonzero(unit_U == unit)
        if len(np.unique(x_U[at])) < _LEAST_ROWS:
            continue
        one, other = np.triu_indices(len(at), 1)
        apart = x_U[at][other] - x_U[at][one]
        there = apart != 0
        slopes.append((loss_U[at][other] - loss_U[at][one])[there] / apart[there])
    return float(np.median(np.concatenate(slopes))) if slopes else None


def _centred(value_U: Floats, unit_U: Ints) -> Floats:
    """Values less the median of their unit."""
    found = np.empty_like(value_U)
    for unit in np.unique(unit_U):
        at = unit_U == unit
        found[at] = value_U[at] - np.median(value_U[at])
    return found
