"""What counts as a NaN or a spike and what the rule says about it: pure functions of numbers that all ranks share."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cpt.plan.types import Anomalies

UPDATE, SKIP, WARN, STOP, ROLLBACK = "update", "skip", "warn", "stop", "rollback"


def judge(loss: float, history: Sequence[float], rules: Anomalies) -> tuple[str, str]:
    """What to do with a step whose loss is known and whose update is not applied yet.

    Args:
        loss: mean training loss of the step [nats/token].
        history: losses of the steps before, oldest first; the last `rules.window` count.
        rules: the stage's rules.

    Returns:
        (verdict, reason): update, skip, warn (update all the same), stop or rollback; the reason is empty for update.
    """
    if not math.isfinite(loss):
        return rules.nan, f"the loss is {loss}"
    window = list(history)[-rules.window :]
    # A running mean over a handful of steps says nothing: early losses fall fast.
    if len(window) < min(10, rules.window):
        return UPDATE, ""
    mean = sum(window) / len(window)
    if loss > rules.spike_factor * mean:
        return rules.spike, f"the loss is {loss:.4g}, {loss / mean:.1f} times the mean of the last {len(window)} steps"
    return UPDATE, ""


def judge_grad_norm(grad_norm: float, rules: Anomalies) -> tuple[str, str]:
    """What to do when the global gradient norm is known; the same answers as `judge`."""
    if math.isfinite(grad_norm):
        return UPDATE, ""
    return rules.nan, f"the gradient norm is {grad_norm}"
