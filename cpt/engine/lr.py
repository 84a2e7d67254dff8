"""Puts the planned lr on the optimizer and checks that it is there."""

from __future__ import annotations

import math
from typing import Any

from cpt.base.errors import StageFailed


def set_lr(optimizer: Any, lr: float) -> None:
    """Give every parameter group the lr of the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)


def check_lr(optimizer: Any, planned: float, step: int) -> None:
    """Compare the optimizer's lr with the planned one; done at the first step of every stage and attempt.

    Raises:
        StageFailed: they differ, so something but the plan has set the lr.
    """
    for group in optimizer.param_groups:
        found = group["lr"] / (group.get("lr_mult", 1.0) or 1.0)
        if not math.isclose(found, planned, rel_tol=1e-12, abs_tol=0.0):
            raise StageFailed(f"the optimizer's lr at step {step} is {found!r}, the plan says {planned!r}")
