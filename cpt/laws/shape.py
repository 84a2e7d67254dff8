"""Shapes that decide whether a law may be used: losses that rise and then fall, and where a curve turns over the ratio.

Array suffixes: R rows, G points, D draws.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cpt.laws.law import Law
from cpt.laws.outliers import describe, spread_of
from cpt.laws.result import RiseFall
from cpt.laws.rows import Floats, Rows, points

_LEAST_ROWS = 4  # a run with fewer checkpoints has no shape
_NOISE = 3.0  # spreads of the run's own jitter that a rise or a fall must exceed


def rises(
    rows: Rows, base_R: Floats | None, steps: Mapping[int, float], names: dict[int, str], target: str
) -> tuple[RiseFall, ...]:
    """Runs whose measured loss rose, above the base model's where that is known, and fell again later.

    Read off a running median of three, so that a single spike is no rise. A loss that was above the base model's from
    the first measurement and only fell since is none either: a law that falls with tokens can follow it.

    Args:
        base_R: loss of the base model of each row [nats/token].
        steps: step of each row by line, where the table has steps.
        names: labels of the runs by number.
        target: name of the loss.
    """
    if rows.tokens_R is None:
        return ()
    found = []
    for run in np.unique(rows.run_R):
        where = np.flatnonzero(rows.run_R == run)
        where = where[np.argsort(rows.tokens_R[where], kind="stable")]
        if len(where) < _LEAST_ROWS:
            continue
        loss_R = rows.loss_R[where]
        smooth_R = running_median(loss_R)
        noise = _NOISE * spread_of(loss_R - smooth_R) if np.any(loss_R != smooth_R) else 0.0
        noise = max(noise / np.sqrt(len(where)), 1e-4 * float(loss_R.mean()))
        peak = int(np.argmax(smooth_R))
        before = float(smooth_R[0])
        if base_R is not None and np.isfinite(base_R[where[0]]):
            before = max(before, float(base_R[where[0]]))
        if smooth_R[peak] - before <= noise or smooth_R[peak] - smooth_R[-1] <= noise:
            continue
        line = int(rows.line_R[where[peak]])
        found.append(
            RiseFall(
                run=int(run),
                what=describe(rows.take(where[-1:]), 0, names, target),
                share=float("nan") if rows.share_R is None else float(rows.share_R[where[0]]),
                peak_tokens=float(rows.tokens_R[where[peak]]),
                peak_step=steps.get(line),
                peak_loss=float(loss_R[peak]),
                last_loss=float(loss_R[-1]),
            )
        )
    return tuple(sorted(found, key=lambda f: (f.share, f.what)))


def running_median(value_R: Floats) -> Floats:
    """Median of each value and its two neighbours; the ends as they are."""
    if len(value_R) < 3:
        return value_R.copy()
    middle = np.median(np.stack([value_R[:-2], value_R[1:-1], value_R[2:]]), axis=0)
    return np.concatenate([value_R[:1], middle, value_R[-1:]])


def lowest_valid_share(
    law: Law,
    theta_P: Floats,
    n_params: float | None,
    tokens: float | None,
    base: float | None = None,
    probe: Mapping[str, float] | None = None,
) -> float:
    """r_i: below this share of the measured corpus the fitted loss rises with the share, which no training does.

    With eta < 1 the D-CPT law always has such an interval at 0. 0 when the loss falls from the start; 1 when it never
    falls.
    """
    share_G = np.concatenate([[0.0], np.geomspace(1e-8, 1, 1601)])
    k1, k2 = (probe or {}).get("k1"), (probe or {}).get("k2")
    asked = points(n_params=n_params, tokens=tokens, share=share_G, base=base, k1=k1, k2=k2)
    loss_G = law.loss(theta_P[None], asked)[0][0]
    falls_G = np.diff(loss_G) < 0
    if falls_G[0] or not np.any(np.diff(loss_G) > 1e-12 * loss_G[0]):
        return 0.0
    return float(share_G[int(np.argmax(falls_G))]) if falls_G.any() else 1.0
