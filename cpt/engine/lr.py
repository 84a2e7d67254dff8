"""Checks that the optimizer works with the planned lr."""

from __future__ import annotations

import math
from typing import Any

from cpt.base.errors import StageFailed


def check_lr(optimizer: Any, planned: float, step: int) -> None:
    """Compare the optimizer's lr with the planned one; done at the first step of every stage and attempt.

    Raises:
        StageFailed: they differ, so something but the plan has set the lr.
    """
    for group in optimizer.param_groups:
        wanted = planned * group.get("lr_mult", 1.0)
        if not math.isclose(group["lr"], wanted, rel_tol=1e-12, abs_tol=0.0):
            raise StageFailed(f"the optimizer's lr at step {step} is {group['lr']!r}, the plan says {wanted!r}")
