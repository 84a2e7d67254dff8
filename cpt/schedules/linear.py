"""A straight line down to the end lr, after an optional warmup. From a kept lr with `end: 0` it is a plain anneal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cpt.schedules.length import Length, num_steps
from cpt.schedules.schedule import SCHEDULES, Schedule, option, warmup_option
from cpt.schedules.shapes import decay, warm
from cpt.schedules.warmup import progress_to_last, warmup_fits


@SCHEDULES.add("linear")
@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """Fall in a straight line from `peak` to `end`; the last step has `end` exactly."""

    end: float = option(0.0, "lr of the last step", "lr")
    warmup: Length = warmup_option("0%")

    lengths: ClassVar[tuple[str, ...]] = ("warmup",)
    early: ClassVar[tuple[str, ...]] = ("warmup",)

    def lr(self, step: int, span: int, start_lr: float) -> float:
        warmup = num_steps(self.warmup, span)
        if step < warmup:
            return warm(step, warmup, self.top(), start_lr)
        return decay("linear", progress_to_last(step, warmup, span), self.top(), self.end)

    def fits(self, span: int) -> None:
        warmup_fits(num_steps(self.warmup, span), span)

    def corners(self, span: int) -> tuple[int, ...]:
        warmup = num_steps(self.warmup, span)
        return (warmup - 1, warmup)
