"""Warmup, then half a cosine down to the end lr."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from cpt.schedules.length import Length, num_steps
from cpt.schedules.schedule import SCHEDULES, Schedule, option, warmup_option
from cpt.schedules.shapes import decay, warm
from cpt.schedules.warmup import progress_to_last, warmup_fits


@SCHEDULES.add("cosine")
@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Fall along half a cosine from `peak` to `end`; the last step has `end` exactly."""

    end: float | None = option(None, "lr of the last step; without it a tenth of the peak", "lr")
    warmup: Length = warmup_option("1%")

    lengths: ClassVar[tuple[str, ...]] = ("warmup",)
    early: ClassVar[tuple[str, ...]] = ("warmup",)

    def complete(self, start_lr: float) -> Cosine:
        done = super().complete(start_lr)
        return done if done.end is not None else dataclasses.replace(done, end=0.1 * done.top())

    def lr(self, step: int, span: int, start_lr: float) -> float:
        assert self.end is not None
        warmup = num_steps(self.warmup, span)
        if step < warmup:
            return warm(step, warmup, self.top(), start_lr)
        return decay("cosine", progress_to_last(step, warmup, span), self.top(), self.end)

    def fits(self, span: int) -> None:
        warmup_fits(num_steps(self.warmup, span), span)

    def corners(self, span: int) -> tuple[int, ...]:
        warmup = num_steps(self.warmup, span)
        return (warmup - 1, warmup)
