"""The share with the lowest objective among those whose general loss is within its limit.

Nothing is assumed monotone: every local minimum and every edge of the admissible set is a candidate. All draws are
searched on one grid, between whose points edges are interpolated linearly and minima by a parabola (errors near
1e-6); the fit itself (row 0) is then refined by root finding and golden section to the last digit.

Array suffixes: D draws, G grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from cpt.laws.rows import Floats

Along = Callable[[Floats], Floats]  # share_G of the domain -> loss_DG
Bools = NDArray[np.bool_]

_CELLS = 500
_HUGE = 1e30  # instead of infinity, so that differences stay numbers
_AT_ONCE = 400_000  # values per call, so that thousands of draws fit in memory


@dataclass(frozen=True)
class Found:
    """Where the search ended.

    Args:
        share_D: chosen share of each draw; where nothing is admissible, the share with the least general loss.
        admissible_D: whether any share of the draw is within the limit.
        decided_by: for the fit: `minimum`, `tolerance`, `range` or `nothing`.
    """

    share_D: Floats
    admissible_D: Bools
    decided_by: str


def grid(low: float, high: float) -> Floats:
    """Shares to try: even steps, and ever finer ones towards 0 and 1, where losses are steepest."""
    fine = np.geomspace(1e-7, 1e-2, 41)
    points = np.concatenate([np.linspace(low, high, _CELLS + 1), fine, 1 - fine])
    return np.unique(points[(points >= low) & (points <= high)])


def ask(along: Along, share_G: Floats) -> Floats:
    """loss_DG on a grid, so many points at once that memory stays small; huge where a law gives none."""
    first_D1 = along(share_G[:1])
    step = max(1, _AT_ONCE // len(first_D1))
    parts = [first_D1] + [along(share_G[i : i + step]) for i in range(1, len(share_G), step)]
    loss_DG = np.concatenate(parts, axis=1)
    return np.nan_to_num(loss_DG, nan=_HUGE, posinf=_HUGE, neginf=_HUGE)


def without_rise(loss_DG: Floats, share_G: Floats) -> tuple[Floats, Floats]:
    """Losses with the rise next to share 0 made flat, and where that rise ends.

    Data of a corpus cannot raise its own loss. Where a law says so next to share 0 (the D-CPT form with eta < 1
    always does), its values below the turning point r_i are too low and would attract a search.

    Args:
        share_G: shares of the corpus the loss is measured on, rising.

    Returns:
        loss_DG, and r_i for each draw (the first share where no rise was found).
    """
    falls_DG = loss_DG[:, 1:] < loss_DG[:, :-1]
    peak_D = np.where(falls_DG.any(axis=1), falls_DG.argmax(axis=1), 0)
    top_D1 = np.take_along_axis(loss_DG, peak_D[:, None], axis=1)
    flat_DG = np.where(np.arange(len(share_G)) < peak_D[:, None], top_D1, loss_DG)
    return flat_DG, share_G[peak_D]


def best_share(
    objective: Along,
    general: Along | None,
    limit: float,
    low: float,
    high: float,
    kink: float | None = None,
    *,
    same_tokens: bool = True,
) -> Found:
    """The share of each draw with the lowest objective within the limit on the general loss.

    Args:
        objective: what to make small, by share of domain data.
        general: general loss by share of **domain** data; None for no limit.
        limit: highest general loss that is allowed [nats/token].
        low, high: ends of the search.
        kink: a share at which the objective may have a corner, where neither parabolas nor derivatives help.
        same_tokens: whether all runs are equally long. Where smaller shares make longer runs, a rise of the
            objective next to the smallest share is their length, not a fault of the law, and stays.
    """
    share_G = grid(low, high)
    if kink is not None and low < kink < high:
        share_G = np.unique(np.append(share_G, kink))
    objective_DG = ask(objective, share_G)
    floor_D = np.zeros(len(objective_DG))
    if same_tokens:
        objective_DG, floor_D = without_rise(objective_DG, share_G)
    if general is None:
        general_DG, ceiling_D = np.zeros_like(objective_DG), np.full(len(objective_DG), np.inf)
        limit = 0.0
    else:
        backwards_DG, floor_general_D = without_rise(ask(general, share_G)[:, ::-1], 1 - share_G[::-1])
        general_DG, ceiling_D = backwards_DG[:, ::-1], 1 - floor_general_D
    share_D = _interpolated(share_G, objective_DG, general_DG, limit)
    admissible_D: Bools = np.any(general_DG <= limit, axis=1)

    def objective_at(share: float) -> float:
        return float(objective(np.array([max(share, floor_D[0])]))[0, 0])

    def general_at(share: float) -> float:
        if general is None:
            return -np.inf
        return float(general(np.array([min(share, ceiling_D[0])]))[0, 0])

    nearest = int(np.argmin(np.abs(share_G - share_D[0])))
    around = share_G[[max(nearest - 2, 0), nearest, min(nearest + 2, len(share_G) - 1)]]
    share, decided_by = _refined(objective_at, general_at, limit, share_D[0], around)
    if kink is not None and around[0] < kink < around[2] and abs(share - kink) > 1e-12:
        within = decided_by != "nothing" and general_at(kink) <= limit
        share, decided_by = (
            (kink, "minimum") if within and objective_at(kink) <= objective_at(share) else (share, decided_by)
        )
    if decided_by != "nothing" and share in (low, high):
        decided_by = "range"
    share_D[0] = share
    admissible_D[0] = decided_by != "nothing"
    return Found(share_D, admissible_D, decided_by)


def _interpolated(share_G: Floats, objective_DG: Floats, general_DG: Floats, limit: float) -> Floats:
    """The best share of each draw, interpolated between the points of the grid."""
    ok_DG = general_DG <= limit
    point_DG, at_point_DG = _minima(share_G, objective_DG, general_DG, limit)
    with np.errstate(invalid="ignore", divide="ignore"):
        part_DG = (limit - general_DG[:, :-1]) / np.diff(general_DG, axis=1)
    edges_DG = ok_DG[:, :-1] != ok_DG[:, 1:]
    part_DG = np.where(edges_DG, part_DG, 0.0)
    edge_DG = share_G[:-1] + part_DG * np.diff(share_G)
    at_edge_DG = objective_DG[:, :-1] + part_DG * np.diff(objective_DG, axis=1)
    candidate_DG = np.concatenate([point_DG, edge_DG], axis=1)
    value_DG = np.concatenate(
        [np.where(ok_DG, at_point_DG, np.inf), np.where(edges_DG, at_edge_DG, np.inf)],
        axis=1,
    )
    best_D = value_DG.argmin(axis=1)
    share_D = np.take_along_axis(candidate_DG, best_D[:, None], axis=1)[:, 0]
    least_D = share_G[general_DG.argmin(axis=1)]
    return np.where(ok_DG.any(axis=1), share_D, least_D)


def _minima(share_G: Floats, objective_DG: Floats, general_DG: Floats, limit: float) -> tuple[Floats, Floats]:
    """Each point of the grid, moved to the vertex of the parabola through its neighbours where it is a minimum."""
    at_DG, value_DG = np.broadcast_to(share_G, objective_DG.shape).copy(), objective_DG.copy()
    left_G, right_G = share_G[1:-1] - share_G[:-2], share_G[2:] - share_G[1:-1]
    before_DG = (objective_DG[:, 1:-1] - objective_DG[:, :-2]) / left_G
    after_DG = (objective_DG[:, 2:] - objective_DG[:, 1:-1]) / right_G
    bent_DG = (before_DG <= 0) & (after_DG >= 0) & (after_DG > before_DG)
    curve_DG = np.where(bent_DG, (after_DG - before_DG) / (left_G + right_G), 1.0)
    slope_DG = (before_DG * right_G + after_DG * left_G) / (left_G + right_G)
    step_DG = np.where(bent_DG, np.clip(-slope_DG / (2 * curve_DG), -left_G, right_G), 0.0)
    with np.errstate(invalid="ignore"):
        tilt_DG = np.where(step_DG < 0, np.diff(general_DG)[:, :-1] / left_G, np.diff(general_DG)[:, 1:] / right_G)
        step_DG = np.where(general_DG[:, 1:-1] + tilt_DG * step_DG > limit, 0.0, step_DG)
    at_DG[:, 1:-1] += step_DG
    value_DG[:, 1:-1] += slope_DG * step_DG + curve_DG * step_DG**2 * bent_DG
    return at_DG, np.where(at_DG == share_G, objective_DG, value_DG)


def _refined(
    objective: Callable[[float], float],
    general: Callable[[float], float],
    limit: float,
    start: float,
    around: Floats,
) -> tuple[float, str]:
    """The fit's own share to the last digit, searched a few cells to each side of the interpolated one.

    Args:
        around: lower end, an inner point and upper end of those cells.
    """
    inside = next((s for s in (start, *around) if general(s) <= limit), None)
    if inside is None:
        found = optimize.minimize_scalar(general, bounds=(around[0], around[2]), method="bounded", options=_EXACT)
        inside = min((float(found.x), *around), key=general)
        if general(inside) > limit:
            return float(inside), "nothing"
    ends, bound = [], []
    for end in (around[0], around[2]):
        ok = general(end) <= limit
        bound.append(not ok)
        ends.append(float(end) if ok else _edge(general, limit, float(inside), float(end)))
    share = _lowest(objective, ends[0], ends[1])
    if share in ends and bound[ends.index(share)]:
        return share, "tolerance"
    return share, "minimum"


_EXACT = {"xatol": 1e-11, "maxiter": 200}


def _edge(general: Callable[[float], float], limit: float, inside: float, outside: float) -> float:
    """Last share on the way from inside to outside that is within the limit, by bisection."""
    while True:
        middle = (inside + outside) / 2
        if middle in (inside, outside):
            return inside
        if general(middle) <= limit:
            inside = middle
        else:
            outside = middle


def _lowest(objective: Callable[[float], float], low: float, high: float) -> float:
    """The lowest point of a short interval, its ends included."""
    if high - low < 1e-13:
        return low
    found = float(optimize.minimize_scalar(objective, bounds=(low, high), method="bounded", options=_EXACT).x)
    lowest = min((low, high, found), key=objective)
    return _stationary(objective, lowest, low, high) if lowest == found else lowest


def _stationary(objective: Callable[[float], float], near: float, low: float, high: float) -> float:
    """The root of the derivative next to a minimum: values alone tell it to eight digits only."""
    step = min(1e-3, near - low, high - near) / 4
    if step < 1e-5:
        return near

    def slope(x: float) -> float:
        inner = objective(x + step) - objective(x - step)
        return 8 * inner - (objective(x + 2 * step) - objective(x - 2 * step))

    ends = (near - step, near + step)
    if slope(ends[0]) >= 0 or slope(ends[1]) <= 0:
        return near
    root = float(optimize.brentq(slope, *ends, xtol=1e-13))
    return root if objective(root) <= objective(near) + 1e-14 * abs(objective(near)) else near
