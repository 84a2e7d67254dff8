"""Which parameters the rows can tell apart, from the Jacobian at the optimum.

Array suffixes: R rows, P parameters.
"""

from __future__ import annotations

import numpy as np

from cpt.laws.fit import Fit
from cpt.laws.result import Identified

CORRELATED = 0.99
SINGULAR = 1e12  # a condition number above is rounding, and is reported as this


def identified(fitted: Fit) -> Identified:
    """Condition number of the Jacobian with columns of length 1, and pairs of parameters with |correlation| > 0.99.

    Rounded to what is meant, so that the last digits of a library change nothing.
    """
    law, rows = fitted.law, fitted.rows
    loss_R, slope_RP = (a[0] for a in law.loss(fitted.theta_P[None], rows))
    if fitted.scale == "log":
        slope_RP = slope_RP / loss_R[:, None]
    slope_RP = slope_RP * np.sqrt(rows.weight_R)[:, None]
    length_P = np.sqrt(np.sum(slope_RP**2, axis=0))
    moves_P = length_P > 0
    scaled_RP = slope_RP[:, moves_P] / length_P[moves_P]
    names = [p.name for p, moves in zip(law.parameters, moves_P, strict=True) if moves]
    singular, turn_PP = np.linalg.svd(scaled_RP, full_matrices=False)[1:]
    all_move = len(names) == len(law.parameters)
    condition = float(singular[0] / max(singular[-1], singular[0] / SINGULAR)) if all_move else SINGULAR
    inverse_P = 1 / np.maximum(singular, 1e-12 * singular[0])
    spread_PP = (turn_PP.T * inverse_P**2) @ turn_PP
    deviation_P = np.sqrt(np.diag(spread_PP))
    correlation_PP = spread_PP / np.outer(deviation_P, deviation_P)
    pairs = [
        (names[i], names[j], round(float(correlation_PP[i, j]), 4))
        for i in range(len(names))
        for j in range(i + 1, len(names))
        if abs(correlation_PP[i, j]) > CORRELATED
    ]
    return Identified(float(f"{condition:.3g}"), tuple(sorted(pairs, key=lambda p: (-abs(p[2]), p[0], p[1]))))
