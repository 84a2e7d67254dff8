"""The infinite schedule: warmup, cooldown, a constant lr for as long as data arrives, and an anneal on demand.

    1. warmup over N_w steps:    eta_max·(n + 1)/N_w
    2. cooldown over N_cd steps, u its progress from 0 to 1, down to eta_const:
         linear        eta_max + (eta_const - eta_max)·u
         cosine        eta_const + (eta_max - eta_const)·(1 + cos(pi·u))/2
         inverse_sqrt  eta_max + (eta_const - eta_max)·h(u)/h(1) with h(u) = 1/sqrt(1 + 10·u) - 1
    3. constant:                 eta_const
    4. anneal over N_ann steps:  eta_const·(eta_min/eta_const)^((n - N_start)/N_ann)

The constant part has no planned end: extend the run, or start another stage with `counter: run`, and the anneal moves.
A release is a fork: `from: stage@pre_anneal` goes on from the checkpoint just before the anneal.

Source:
    Ibrahim et al. 2024, "Simple and Scalable Strategies to Continually Pre-train LLMs", arXiv:2403.08763;
    Singh et al. 2025, "Beyond Cosine Decay: On the effectiveness of Infinite Learning Rate Schedule for Continual
    Pre-training", arXiv:2503.02844.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from cpt.base.errors import UsageError
from cpt.schedules.length import Length, num_steps, parse_length
from cpt.schedules.schedule import SCHEDULES, Schedule, option, warmup_option
from cpt.schedules.shapes import decay, known_shape, warm
from cpt.schedules.warmup import too_long

COOLDOWNS = ("linear", "cosine", "inverse_sqrt")


@SCHEDULES.add("infinite")
@dataclass(frozen=True, kw_only=True)
class Infinite(Schedule):
    """Warm up, cool down to a constant lr, hold it, and anneal at the end when `anneal` is not 0."""

    constant: float | None = option(None, "lr that is held; without it half the peak (no cooldown: the peak)", "lr")
    end: float | None = option(None, "lr that the anneal goes to; without it a tenth of the peak", "lr")
    warmup: Length = warmup_option("1%")
    cooldown: Length = option("60%", "fall from the peak to the constant lr", "length")
    shape: str = option("cosine", "of the cooldown: linear, cosine or inverse_sqrt")
    anneal: Length = option("0%", "length of the anneal at the end; 0 leaves it to a later stage", "length")

    lengths: ClassVar[tuple[str, ...]] = ("warmup", "cooldown", "anneal")
    early: ClassVar[tuple[str, ...]] = ("warmup", "cooldown")

    def check(self) -> None:
        super().check()
        known_shape("shape", self.shape, COOLDOWNS)
        if self.constant is not None:
            if self.constant == 0:
                raise UsageError("`constant` is 0, wanted an lr above 0")
            if self.peak is not None and self.constant > self.peak:
                raise UsageError(f"`constant` is {self.constant:g}, wanted at most `peak`, {self.peak:g}")
            if self.end is not None and self.end > self.constant:
                raise UsageError(f"`end` is {self.end:g}, wanted at most `constant`, {self.constant:g}")
        units = [parse_length(name, getattr(self, name)) for name in self.lengths]
        if sum(amount for unit, amount in units if unit == "share") > 1 + 1e-9:
            raise UsageError("`warmup`, `cooldown` and `anneal` together are more than the whole span")
        if self.end == 0 and units[2][1] > 0:
            raise UsageError("`end` is 0, which the anneal never reaches; wanted an lr above 0")

    def complete(self, start_lr: float) -> Infinite:
        done = super().complete(start_lr)
        top = done.top()
        cools = parse_length("cooldown", done.cooldown)[1] > 0
        constant = done.constant if done.constant is not None else top * (0.5 if cools else 1.0)
        end = done.end if done.end is not None else min(0.1 * top, constant)
        return dataclasses.replace(done, constant=constant, end=end)

    def parts(self, span: int) -> tuple[int, int, int]:
        """Steps at which the cooldown, the constant part and the anneal begin."""
        warmup, cooldown, anneal = (num_steps(x, span) for x in (self.warmup, self.cooldown, self.anneal))
        start = span - anneal
        # Shares that are rounded up may overlap by a step or two: the later part gives way, the anneal last.
        if anneal and parse_length("anneal", self.anneal)[0] == "share":
            start = max(start, min(warmup, span))
        if anneal and parse_length("cooldown", self.cooldown)[0] == "share":
            cooldown = max(0, min(cooldown, start - warmup))
        return warmup, warmup + cooldown, start

    def lr(self, step: int, span: int, start_lr: float) -> float:
        assert self.constant is not None and self.end is not None
        cooldown, constant, anneal = self.parts(span)
        if step < cooldown:
            return warm(step, cooldown, self.top(), start_lr)
        if step < constant:
            return decay(self.shape, (step - cooldown) / (constant - cooldown), self.top(), self.constant)
        if step < anneal or anneal >= span:
            return self.constant
        return decay("geometric", (step - anneal) / (span - anneal), self.constant, self.end)

    def fits(self, span: int) -> None:
        steps = {name: num_steps(getattr(self, name), span) for name in self.lengths}
        shares = [name for name in self.lengths if parse_length(name, getattr(self, name))[0] == "share"]
        # A cooldown that is a share gives way; shares that are rounded up may overlap by a step each.
        needed = sum(steps.values()) - (steps["cooldown"] if "cooldown" in shares else 0)
        if steps["anneal"] and needed - len(shares) > span:
            raise too_long(steps, span)

    def placed(self, span: int) -> dict[str, int]:
        cooldown, constant, anneal = self.parts(span)
        return {"warmup": cooldown, "cooldown": constant - cooldown, "anneal": span - anneal}

    def corners(self, span: int) -> tuple[int, ...]:
        cooldown, constant, anneal = self.parts(span)
        return (cooldown - 1, cooldown, constant, anneal)

    def anneal_start(self, span: int) -> int | None:
        start = self.parts(span)[2]
        return start if start < span else None
