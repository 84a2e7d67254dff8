"""Warmup followed by a decay that ends exactly on the last step."""

from __future__ import annotations

from collections.abc import Mapping

from cpt.base.errors import PlanError


def progress_to_last(step: int, warmup: int, span: int) -> float:
    """Progress of a decay that starts at step `warmup` and is complete at the last step, `span` - 1.

    Dividing by the end step instead of (end - warmup), as a public scheduler does, would never reach the end lr.
    """
    length = span - 1 - warmup
    return 1.0 if length <= 0 else (step - warmup) / length


def too_long(parts: Mapping[str, int], span: int) -> PlanError:
    """The error for parts of a curve that together are longer than it [steps]."""
    named = " + ".join(f"`{name}` {steps:,}" for name, steps in parts.items() if steps)
    return PlanError(f"{named} steps are more than the {span:,} steps of the curve")


def warmup_fits(warmup: int, span: int) -> None:
    """Refuse a warmup that is longer than the curve."""
    if warmup > span:
        raise PlanError(f"`warmup` is {warmup:,} steps, longer than the {span:,} steps of the curve")
