"""Rows that a fit misses by far more than the usual. They are named and fitted without, never dropped silently."""

from __future__ import annotations

import numpy as np

from cpt.base.units import show_count
from cpt.laws.fit import Fit, fit
from cpt.laws.result import Outlier
from cpt.laws.rows import Floats, Rows

TIMES = 5.0  # of the robust spread 1.4826 · median |residual|
_STARTS = 20


def outliers(fitted: Fit, names: dict[int, str], target: str) -> tuple[Outlier, ...]:
    """The rows with |residual| > 5 · 1.4826 · median |residual|, farthest first.

    Args:
        names: labels of the runs by number.
        target: name of the loss.
    """
    residual_R = fitted.residuals_R
    spread = spread_of(residual_R)
    found = [
        Outlier(
            row=int(row),
            line=int(fitted.rows.line_R[row]),
            what=describe(fitted.rows, int(row), names, target),
            residual=float(residual_R[row]),
            times=float(abs(residual_R[row]) / spread),
        )
        for row in np.flatnonzero(np.abs(residual_R) > TIMES * spread)
        if spread > 0
    ]
    return tuple(sorted(found, key=lambda o: (-o.times, o.row)))


def spread_of(residual_R: Floats) -> float:
    """Robust spread: 1.4826 · median |residual|, the standard deviation where residuals are normal."""
    return float(1.4826 * np.median(np.abs(residual_R)))


def without(fitted: Fit, rows: tuple[Outlier, ...], seed: int) -> Fit:
    """The same law on the other rows, from the optimum and some of the law's own starts."""
    keep_R = np.ones(len(fitted.rows), bool)
    keep_R[[o.row for o in rows]] = False
    others = fitted.rows.take(keep_R)
    starts_SP = fitted.law.starts(others, np.random.default_rng(seed), _STARTS)
    starts_SP = np.concatenate([fitted.theta_P[None], starts_SP])
    return fit(fitted.law, others, delta=fitted.delta, scale=fitted.scale, seed=seed, starts_SP=starts_SP)


def describe(rows: Rows, row: int, names: dict[int, str], target: str) -> str:
    """A row for people: run, size, ratio, tokens."""
    parts = []
    label = names.get(int(rows.run_R[row]), "")
    if label:
        parts.append(f"run `{label}`")
    if rows.n_params_R is not None:
        parts.append(f"{show_count(rows.n_params_R[row])} parameters")
    if rows.share_R is not None:
        parts.append(f"{ratio_name(target)} {rows.share_R[row]:.4g}")
    if rows.tokens_R is not None:
        parts.append(f"{show_count(rows.tokens_R[row])} tokens")
    return ", ".join(parts) or f"row {int(rows.line_R[row])}"


def ratio_name(target: str) -> str:
    """What the share of the corpus that `target` is measured on is called."""
    return f"r_{target}" if target in ("domain", "general") else f"share of `{target}`"


def loss_name(target: str) -> str:
    """What the loss of a corpus is called in a sentence."""
    return "the loss" if target == "loss" else f"the {target} loss"
