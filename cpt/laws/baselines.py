"""What a law must beat: the loss at the nearest ratio that was run, and a line between the two ratios around.

Both look only along the ratio: at the same model size, at the same token count (between two checkpoints of a run the
loss is read off a line in log tokens).

Array suffixes: R rows of the table, L rows that were left out.
"""

from __future__ import annotations

import numpy as np

from cpt.laws.rows import Floats, Rows


def by_ratio(known: Rows, asked: Rows) -> tuple[Floats, Floats]:
    """nearest_L, interpolated_L [nats/token]; NaN where no run of that size reaches that token count.

    Interpolation needs a ratio on each side.
    """
    assert known.share_R is not None and asked.share_R is not None
    nearest_L, line_L = np.full(len(asked), np.nan), np.full(len(asked), np.nan)
    curves = _curves(known)
    for row in range(len(asked)):
        size = 0.0 if asked.n_params_R is None else float(asked.n_params_R[row])
        share = float(asked.share_R[row])
        tokens = None if asked.tokens_R is None else float(asked.tokens_R[row])
        found = [(r, _read(curve, tokens)) for (n, r), curve in curves.items() if n == size]
        at = sorted((r, loss) for r, loss in found if np.isfinite(loss))
        if not at:
            continue
        nearest_L[row] = min(at, key=lambda p: (abs(p[0] - share), p[0]))[1]
        below, above = [p for p in at if p[0] <= share], [p for p in at if p[0] >= share]
        if below and above:
            (r0, loss0), (r1, loss1) = below[-1], above[0]
            part = 0.0 if r1 == r0 else (share - r0) / (r1 - r0)
            line_L[row] = loss0 + part * (loss1 - loss0)
    return nearest_L, line_L


def _curves(known: Rows) -> dict[tuple[float, float], tuple[Floats, Floats]]:
    """(size, ratio) to (log tokens, mean loss there), tokens rising; without tokens one mean loss."""
    assert known.share_R is not None
    size_R = np.zeros(len(known)) if known.n_params_R is None else known.n_params_R
    log_R = np.zeros(len(known)) if known.tokens_R is None else np.log(known.tokens_R)
    curves = {}
    for size, share in sorted(set(zip(size_R.tolist(), known.share_R.tolist(), strict=True))):
        at = (size_R == size) & (known.share_R == share)
        log_T, place_R = np.unique(log_R[at], return_inverse=True)
        sums_T = np.bincount(place_R, weights=known.loss_R[at])
        curves[size, share] = (log_T, sums_T / np.bincount(place_R))
    return curves


def _read(curve: tuple[Floats, Floats], tokens: float | None) -> float:
    log_T, loss_T = curve
    if tokens is None:
        return float(loss_T[0])
    at = float(np.log(tokens))
    slack = 1e-6
    if at < log_T[0] - slack or at > log_T[-1] + slack:
        return float("nan")
    return float(np.interp(at, log_T, loss_T))
