"""Warmup followed by a decay that ends exactly on the last step."""

from __future__ import annotations

from cpt.base.errors import PlanError


def progress_to_last(step: int, warmup: int, span: int) -> float:
    """Progress of a decay that starts at step `warmup` and is complete at the last step, `span` - 1.

    Dividing by the end step instead of (end - warmup), as a public scheduler does, would never reach the end lr.
    """
    length = span - 1 - warmup
    return 1.0 if length <= 0 else (step - warmup) / length


def warmup_fits(warmup: int, span: int) -> None:
    """Refuse a warmup that is longer than the curve."""
    if warmup > span:
        raise PlanError(f"`warmup` is {warmup:,} steps, longer than the {span:,} steps of the curve")
