"""WSD: warmup, stable, decay. The decay starts at (end - decay length), so that a longer stage only moves it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from cpt.base.errors import UsageError
from cpt.schedules.length import Length, num_steps, parse_length
from cpt.schedules.schedule import SCHEDULES, Schedule, option, warmup_option
from cpt.schedules.shapes import decay, known_shape, warm
from cpt.schedules.warmup import too_long

SHAPES = ("linear", "cosine", "exponential", "minus_sqrt", "geometric")


@SCHEDULES.add("wsd")
@dataclass(frozen=True, kw_only=True)
class Wsd(Schedule):
    """Rise to `peak`, hold it, then decay towards `end` over the last `decay`.

    At progress rho = (n - decay start) / decay length the lr is end + (peak - end)·c(rho), with c linear 1 - rho,
    cosine (1 + cos(pi·rho))/2, exponential 2·0.5^rho - 1, minus_sqrt 1 - sqrt(rho); `geometric` is peak·(end/peak)^rho.

    Source:
        NVIDIA/Megatron-LM `megatron/core/optimizer_param_scheduler.py` (the first four).
    """

    end: float | None = option(None, "lr that the decay goes to; without it a tenth of the peak", "lr")
    warmup: Length = warmup_option("1%")
    decay: Length = option("10%", "length of the last part, over which the lr falls", "length")
    shape: str = option("minus_sqrt", "linear, cosine, exponential, minus_sqrt or geometric")

    lengths: ClassVar[tuple[str, ...]] = ("warmup", "decay")
    early: ClassVar[tuple[str, ...]] = ("warmup",)

    def check(self) -> None:
        super().check()
        known_shape("shape", self.shape, SHAPES)
        if self.shape == "geometric" and self.end == 0:
            raise UsageError("`end` is 0, which a `geometric` decay never reaches; wanted an lr above 0")
        units = [parse_length(name, getattr(self, name)) for name in self.lengths]
        if sum(amount for unit, amount in units if unit == "share") > 1 + 1e-9:
            raise UsageError(f"`warmup` {self.warmup} and `decay` {self.decay} are more than the whole span")

    def complete(self, start_lr: float) -> Wsd:
        done = super().complete(start_lr)
        return done if done.end is not None else dataclasses.replace(done, end=0.1 * done.top())

    def parts(self, span: int) -> tuple[int, int]:
        """Last step of the warmup plus one, and the step at which the decay begins."""
        warmup, length = num_steps(self.warmup, span), num_steps(self.decay, span)
        start = span - length
        # Two shares that are rounded up may overlap by one step: the warmup keeps it.
        if parse_length("decay", self.decay)[0] == "share":
            start = max(start, min(warmup, span))
        return warmup, start

    def lr(self, step: int, span: int, start_lr: float) -> float:
        assert self.end is not None
        warmup, start = self.parts(span)
        if step < warmup:
            return warm(step, warmup, self.top(), start_lr)
        if step < start:
            return self.top()
        return decay(self.shape, (step - start) / max(1, span - start), self.top(), self.end)

    def fits(self, span: int) -> None:
        warmup, start = self.parts(span)
        if warmup > start:
            raise too_long({"warmup": warmup, "decay": span - start}, span)

    def placed(self, span: int) -> dict[str, int]:
        warmup, start = self.parts(span)
        return {"warmup": warmup, "decay": span - start}

    def corners(self, span: int) -> tuple[int, ...]:
        warmup, start = self.parts(span)
        return (warmup - 1, warmup, start)

    def anneal_start(self, span: int) -> int | None:
        start = self.parts(span)[1]
        return start if start < span else None
