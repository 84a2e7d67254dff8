"""What counts as a NaN or a spike and what the rule says about it: pure functions of numbers that all ranks share."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

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
        return rules.spike, f"the loss is {loss:.4g}, {loss / mean:.3g} times the mean of the last {len(window)} steps"
    return UPDATE, ""


def roll_back(step: int, checkpoints: Collection[int], left_out: Collection[int], window: int) -> tuple[int, int]:
    """Where to go back to after a spike, and from where on samples are left out.

    A loss is known before its own update, so that what led to a spike are updates before it: with the samples of the
    spike alone left out the next step would have the same weights and spike as well. Therefore back to a checkpoint
    that has not seen at least the last update, and without the samples of the last `window` updates. Where that was
    not enough, the next spike undoes at least one update more.

    Args:
        step: whose loss is the spike, counted from 0.
        checkpoints: steps of the stage's whole checkpoints.
        left_out: steps without an update, from rollbacks before.
        window: updates to leave out, at most [steps].

    Returns:
        (step of the checkpoint, 0 = the stage's start; first step whose samples are left out).
    """
    made = [s for s in range(step) if s not in left_out]
    last = made[-1] if made else 0
    back = max((c for c in checkpoints if c <= last), default=0)
    return back, next((s for s in made[-window:] if s >= back), step)


def judge_grad_norm(grad_norm: float, rules: Anomalies) -> tuple[str, str]:
    """What to do when the global gradient norm is known; the same answers as `judge`."""
    if math.isfinite(grad_norm):
        return UPDATE, ""
    return rules.nan, f"the gradient norm is {grad_norm}"
