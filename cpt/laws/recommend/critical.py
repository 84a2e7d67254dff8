"""Critical mixture ratio: the threshold answer and the T_0 answer beside each other, and which one decides.

A ratio is admissible when the general loss ends within its limit, and feasible when besides the weighted objective
has begun to fall by the end of the run (T_0 <= T_max). The critical ratio is the largest one that is both.

Source:
    Gu et al. 2024, CMR scaling law, arXiv:2407.17467.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cpt.laws.recommend.answer import Ratio
from cpt.laws.result import Estimate
from cpt.laws.rows import Floats


@dataclass(frozen=True)
class Critical:
    """Both answers and the one that holds.

    Args:
        answer: the critical ratio; its `decided_by` is `threshold` or `turning`.
        threshold: largest share with the general loss within its limit.
        turning: share at which T_0 is the end of the run, clipped to 0..1.
        clipped: the law gave a share outside 0..1.
    """

    answer: Ratio
    threshold: Ratio
    turning: Estimate
    clipped: bool

    def to_json(self) -> dict[str, Any]:
        """One JSON object: the answer, and the two beside it."""
        turning = {"value": self.turning.value, "low": self.turning.low, "high": self.turning.high}
        return self.answer.to_json() | {
            "threshold": self.threshold.to_json(),
            "turning": turning,
            "clipped": self.clipped,
        }


def critical(threshold: Ratio, turning_D: Floats) -> Critical:
    """The largest feasible share of domain data.

    Args:
        threshold: of `recommend.threshold.threshold`, with as many draws.
        turning_D: share with T_0 = T_max of each draw, from the ratio law or from the CMR law at T_max.
    """
    clipped_D = np.clip(turning_D, 0.0, 1.0)
    turning = Estimate.of(clipped_D)
    clipped = bool(clipped_D[0] != turning_D[0])
    both_D = np.minimum(threshold.draws_D, clipped_D)
    by_threshold = not threshold.value > turning.value  # also when nothing is admissible
    spread = Estimate.of(both_D)
    notes = threshold.notes
    if clipped:
        notes += (f"the CMR law gives {turning_D[0]:.3f}, clipped to {clipped_D[0]:.0f}",)
    if by_threshold:
        reason = f"{threshold.reason}; there the objective has begun to fall before the end of the run"
    else:
        reason = (
            "with more domain data the objective would not begin to fall before the end of the run; "
            f"the general loss alone would allow a share of {threshold.value:.4f}"
        )
    answer = replace(
        threshold,
        usage="cmr",
        value=threshold.value if by_threshold else turning.value,
        low=spread.low,
        high=spread.high,
        decided_by="nothing" if threshold.decided_by == "nothing" else "threshold" if by_threshold else "turning",
        at_edge=bool(spread.value in (0.0, 1.0)),
        reason=threshold.reason if threshold.decided_by == "nothing" else reason,
        notes=notes,
        draws_D=both_D,
    )
    return Critical(answer, threshold, turning, clipped)
