"""What a law must beat: the loss at the nearest ratio that was run, and a line between the two ratios around.

Both look only along the ratio: at the same model size, at the same token count (between two checkpoints of a run the
loss is read off a line in log tokens). With several corpora there is no line, and the nearest mixture is the one whose
shares differ least in sum.

Array suffixes: R rows of the table, L rows that were left out, K corpora.
"""

from __future__ import annotations

import numpy as np

from cpt.laws.rows import Floats, Rows

Curve = tuple[Floats, Floats]  # log tokens, rising, and the loss there


def by_ratio(known: Rows, asked: Rows) -> tuple[Floats, Floats]:
    """nearest_L, interpolated_L [nats/token]; NaN where no run of that size reaches that token count.

    Interpolation needs two corpora and a ratio on each side.
    """
    nearest_L, line_L = np.full(len(asked), np.nan), np.full(len(asked), np.nan)
    curves = _curves(known)
    sizes_L, mixtures_L = _sizes(asked), _mixtures(asked)
    for row in range(len(asked)):
        tokens = None if asked.tokens_R is None else float(asked.tokens_R[row])
        mixture = mixtures_L[row]
        found = [(m, _read(curve, tokens)) for (n, m), curve in curves.items() if n == sizes_L[row]]
        at = sorted((m, loss) for m, loss in found if np.isfinite(loss))
        if not at:
            continue
        nearest_L[row] = min(at, key=lambda p: (_apart(p[0], mixture), p[0]))[1]
        if len(mixture) == 1:
            line_L[row] = _between([(m[0], loss) for m, loss in at], mixture[0])
    return nearest_L, line_L


def _between(at: list[tuple[float, float]], share: float) -> float:
    """The loss on a line between the two ratios around; NaN at the ends."""
    below, above = [p for p in at if p[0] <= share], [p for p in at if p[0] >= share]
    if not below or not above:
        return float("nan")
    (r0, loss0), (r1, loss1) = below[-1], above[0]
    return loss0 if r1 == r0 else loss0 + (share - r0) / (r1 - r0) * (loss1 - loss0)


def _apart(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    return round(sum(abs(a - b) for a, b in zip(one, other, strict=True)), 9)


def _sizes(rows: Rows) -> list[float]:
    return [0.0] * len(rows) if rows.n_params_R is None else rows.n_params_R.tolist()


def _mixtures(rows: Rows) -> list[tuple[float, ...]]:
    """The share of the measured corpus; of several corpora all shares."""
    if rows.shares_RK is not None and rows.shares_RK.shape[1] > 2:
        return [tuple(shares) for shares in rows.shares_RK.tolist()]
    assert rows.share_R is not None
    return [(share,) for share in rows.share_R.tolist()]


def _curves(known: Rows) -> dict[tuple[float, tuple[float, ...]], Curve]:
    """By size and mixture; without tokens one mean loss."""
    log_R = np.zeros(len(known)) if known.tokens_R is None else np.log(known.tokens_R)
    where: dict[tuple[float, tuple[float, ...]], list[int]] = {}
    for row, key in enumerate(zip(_sizes(known), _mixtures(known), strict=True)):
        where.setdefault(key, []).append(row)
    curves = {}
    for key, at in sorted(where.items()):
        log_T, place_R = np.unique(log_R[at], return_inverse=True)
        curves[key] = (log_T, np.bincount(place_R, weights=known.loss_R[at]) / np.bincount(place_R))
    return curves


def _read(curve: Curve, tokens: float | None) -> float:
    log_T, loss_T = curve
    if tokens is None:
        return float(loss_T[0])
    at = float(np.log(tokens))
    slack = 1e-6
    if at < log_T[0] - slack or at > log_T[-1] + slack:
        return float("nan")
    return float(np.interp(at, log_T, loss_T))
