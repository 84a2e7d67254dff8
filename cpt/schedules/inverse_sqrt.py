"""Warmup, then a fall with the inverse square root of the step. Needs no planned end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from cpt.schedules.length import Length, num_steps
from cpt.schedules.schedule import SCHEDULES, Schedule, option, warmup_option
from cpt.schedules.shapes import warm


@SCHEDULES.add("inverse_sqrt")
@dataclass(frozen=True, kw_only=True)
class InverseSqrt(Schedule):
    """`peak`·sqrt(N_w / n) from step N_w on, never below `end`; N_w is the warmup, at least one step.

    Source:
        NVIDIA/Megatron-LM `megatron/core/optimizer_param_scheduler.py`, style `inverse-square-root`.
    """

    end: float = option(0.0, "the lr never falls below this", "lr")
    warmup: Length = warmup_option("1%")

    lengths: ClassVar[tuple[str, ...]] = ("warmup",)
    early: ClassVar[tuple[str, ...]] = ("warmup",)

    def lr(self, step: int, span: int, start_lr: float) -> float:
        warmup = num_steps(self.warmup, span)
        if step < warmup:
            return warm(step, warmup, self.top(), start_lr)
        return max(self.end, self.top() * math.sqrt(max(warmup, 1) / max(step, 1)))

    def corners(self, span: int) -> tuple[int, ...]:
        warmup = num_steps(self.warmup, span)
        return (warmup - 1, warmup)
