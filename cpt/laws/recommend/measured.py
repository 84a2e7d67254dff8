"""The largest admissible share read off measured runs alone, by lines between neighbours: no law, to set beside one."""

from __future__ import annotations

import math

import numpy as np

from cpt.laws.rows import Floats


def measured_ratio(share_R: Floats, general_R: Floats, limit: float, *, log_replay: bool = False) -> float:
    """The largest share of domain data whose interpolated general loss is within the limit; NaN when none is.

    Args:
        share_R: shares of domain data, r_d, each once, in any order [fraction].
        general_R: general losses measured there [nats/token].
        limit: highest general loss allowed [nats/token].
        log_replay: lines over the logarithm of the replay share 1 - r_d, where forgetting falls by its logarithm;
            the piece next to no replay stays a line over the share itself.
    """
    order_R = np.argsort(share_R)[::-1]
    share_R, general_R = np.asarray(share_R, np.float64)[order_R], np.asarray(general_R, np.float64)[order_R]
    within_R = general_R <= limit
    if not within_R.any():
        return math.nan
    first = int(within_R.argmax())
    if first == 0:
        return float(share_R[0])
    part = (limit - general_R[first]) / (general_R[first - 1] - general_R[first])
    replay, less = 1 - share_R[first], 1 - share_R[first - 1]
    if log_replay and less > 0:
        return float(1 - replay * (less / replay) ** part)
    return float(1 - (replay + part * (less - replay)))
