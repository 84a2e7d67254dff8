"""Re-warm and re-decay: the lr of a finished model rises again, then falls along half a cosine.

With N_w = ceil(w·N) warmup steps of N:

    n < N_w:   eta(n) = eta_start + (eta_max - eta_start)·(n + 1)/N_w
    n >= N_w:  eta(n) = eta_min + (eta_max - eta_min)/2 · (1 + cos(pi·(n - N_w)/(N - 1 - N_w)))

so that eta(N - 1) = eta_min exactly.

Source:
    Gupta et al. 2023, "Continual Pre-Training of LLMs: How to (re)warm your model?", arXiv:2308.04014;
    Ibrahim et al. 2024, "Simple and Scalable Strategies to Continually Pre-train LLMs", arXiv:2403.08763.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from cpt.base.errors import UsageError
from cpt.schedules.length import Length, num_steps
from cpt.schedules.schedule import SCHEDULES, Schedule, option
from cpt.schedules.shapes import decay, warm
from cpt.schedules.warmup import progress_to_last, warmup_fits


@SCHEDULES.add("rewarm")
@dataclass(frozen=True, kw_only=True)
class Rewarm(Schedule):
    """Rise from `start` to `peak`, then fall along half a cosine to `end`, which the last step has exactly."""

    end: float | None = option(None, "lr of the last step; without it a tenth of the peak", "lr")
    warmup: Length = option("1%", "length of the rise", "length")
    start: str | int = option(0, "where the rise starts: `0`, or `parent` for the lr it ended on (`keep: [lr]`)")

    lengths: ClassVar[tuple[str, ...]] = ("warmup",)
    early: ClassVar[tuple[str, ...]] = ("warmup",)

    def check(self) -> None:
        super().check()
        if isinstance(self.start, bool) or str(self.start) not in ("0", "0.0", "parent"):
            raise UsageError(f"`start` is `{self.start}`, wanted `0` or `parent`")

    @property
    def from_parent(self) -> bool:
        """True when the rise starts from the lr that the parent ended on."""
        return self.start == "parent"

    def complete(self, start_lr: float) -> Rewarm:
        done = super().complete(start_lr)
        return done if done.end is not None else dataclasses.replace(done, end=0.1 * done.top())

    def lr(self, step: int, span: int, start_lr: float) -> float:
        assert self.end is not None
        warmup = num_steps(self.warmup, span)
        if step < warmup:
            return warm(step, warmup, self.top(), start_lr if self.from_parent else 0.0)
        return decay("cosine", progress_to_last(step, warmup, span), self.top(), self.end)

    def fits(self, span: int) -> None:
        warmup_fits(num_steps(self.warmup, span), span)

    def corners(self, span: int) -> tuple[int, ...]:
        warmup = num_steps(self.warmup, span)
        return (warmup - 1, warmup)
