"""How far a question lies from what was measured.

Array suffixes: R rows, F features (log N, log D and the share, or all shares but the last; what is constant in the
rows and in the question is left out).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from scipy import optimize

from cpt.laws.result import plain
from cpt.laws.rows import Floats, Rows

STRONG = {"n_params": 4.0, "tokens": 8.0}  # factors beyond which a prediction is a guess
_WORDS = {"n_params": "model size", "tokens": "tokens", "ratio": "ratio"}


@dataclass(frozen=True)
class Distance:
    """Where a question lies.

    Args:
        inside: within the convex hull of the rows in (log N, log D, shares).
        factors: by `n_params`, `tokens`, `ratio`: 1 within the measured range; for N and D how many times beyond its
            end; for a share 1 plus what lies beyond, as a part of the range.
        strong: what is extrapolated more than 4 times (N) or 8 times (D).
        reason: the same in a sentence.
    """

    inside: bool
    factors: Mapping[str, float] = field(default_factory=dict)
    strong: tuple[str, ...] = ()
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """One JSON object; a factor without bound is null."""
        answer: dict[str, Any] = plain(asdict(self))
        return answer


def distance(
    rows: Rows,
    *,
    n_params: float | None = None,
    tokens: float | None = None,
    share: float | None = None,
    shares: Floats | None = None,
) -> Distance:
    """Distance of one question from the rows a law was fitted on.

    Args:
        rows: measured.
        n_params: model size asked about [count].
        tokens: tokens asked about [tokens].
        share: of the corpus that the rows' loss is measured on, or
        shares: of all corpora in the order of the rows [fraction].
    """
    columns: list[tuple[str, Floats, float]] = []
    factors: dict[str, float] = {}
    what = "the ratio"
    for name, column_R, asked in (("n_params", rows.n_params_R, n_params), ("tokens", rows.tokens_R, tokens)):
        if column_R is not None and asked is not None:
            factors[name] = _times(column_R, asked)
            columns.append((name, np.log(column_R), math.log(asked)))
    if shares is not None and rows.shares_RK is not None:
        shares = np.asarray(shares, np.float64)
        parts = [_beyond(column_R, h) for column_R, h in zip(rows.shares_RK.T, shares, strict=True)]
        worst = int(np.argmax(parts))
        factors["ratio"] = parts[worst]
        what = f"the share of `{rows.corpora[worst]}`" if rows.corpora else what
        columns += [("ratio", rows.shares_RK[:, k], float(shares[k])) for k in range(len(shares) - 1)]
    elif share is not None and rows.share_R is not None:
        factors["ratio"] = _beyond(rows.share_R, share)
        columns.append(("ratio", rows.share_R, share))
    beyond = [name for name, factor in factors.items() if factor > 1]
    inside = not beyond and _in_hull(columns)
    strong = tuple(name for name in beyond if factors[name] > STRONG.get(name, math.inf))
    return Distance(inside, factors, strong, _reason(inside, factors, beyond, what))


def _times(column_R: Floats, asked: float) -> float:
    """How many times beyond the measured range, 1 within."""
    low, high = float(column_R.min()), float(column_R.max())
    factor = max(asked / high, low / asked)
    return factor if factor > 1 + 1e-9 else 1.0


def _beyond(column_R: Floats, asked: float) -> float:
    """1 plus what lies beyond the measured range of shares, as a part of that range."""
    low, high = float(column_R.min()), float(column_R.max())
    excess = max(asked - high, low - asked)
    if excess <= 1e-9:
        return 1.0
    return float(1 + excess / (high - low)) if high > low else math.inf


def _in_hull(columns: list[tuple[str, Floats, float]]) -> bool:
    """Whether weights exist, none negative, that make the question of the rows: a linear programme."""
    scaled = [((c - c.mean()) / (np.ptp(c) or 1), (q - c.mean()) / (np.ptp(c) or 1)) for _, c, q in columns]
    if not scaled:
        return True
    rows_RF = np.unique(np.stack([c for c, _ in scaled], axis=1), axis=0)
    asked_F = np.array([q for _, q in scaled])
    corner_F = np.abs(rows_RF - asked_F).max(axis=1).min()
    if corner_F < 1e-9:
        return True
    # The least weight on a free miss in each feature; 0 when the rows reach the question by themselves.
    count, size = rows_RF.shape
    free = np.eye(size)
    equal = np.block([[rows_RF.T, free, -free], [np.ones((1, count)), np.zeros((1, 2 * size))]])
    cost = np.concatenate([np.zeros(count), np.ones(2 * size)])
    found = optimize.linprog(cost, A_eq=equal, b_eq=np.append(asked_F, 1.0), bounds=(0, None), method="highs")
    return bool(found.status == 0 and found.fun < 1e-7)


def _reason(inside: bool, factors: Mapping[str, float], beyond: list[str], what: str) -> str:
    if inside:
        return "inside the measured points"
    if not beyond:
        return "within each measured range, but in a corner where no runs are"
    parts = []
    for name in beyond:
        factor = factors[name]
        if name == "ratio":
            share = "no other was measured" if math.isinf(factor) else f"by {factor - 1:.0%} of their range"
            parts.append(f"{what} outside the measured ones ({share})")
        else:
            parts.append(f"{_WORDS[name]} {factor:.3g} times beyond the measured range")
    return ", ".join(parts)
