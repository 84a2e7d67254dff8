"""Hold one lr: a given one, or the one that the parent ended on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cpt.schedules.length import Length, num_steps
from cpt.schedules.schedule import SCHEDULES, Schedule, warmup_option
from cpt.schedules.shapes import warm


@SCHEDULES.add("constant")
@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """Hold `peak`, or the lr that the parent ended on."""

    warmup: Length = warmup_option("0%")

    lengths: ClassVar[tuple[str, ...]] = ("warmup",)
    early: ClassVar[tuple[str, ...]] = ("warmup",)

    def lr(self, step: int, span: int, start_lr: float) -> float:
        warmup = num_steps(self.warmup, span)
        return warm(step, warmup, self.top(), start_lr) if step < warmup else self.top()

    def corners(self, span: int) -> tuple[int, ...]:
        return (num_steps(self.warmup, span) - 1,)
