"""What a schedule is: a pure function from a step to an lr, with its own options. Also the registry of schedules."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from cpt.base.errors import PlanError, UsageError
from cpt.base.registry import Registry, unknown
from cpt.schedules.length import num_steps, parse_length

S = TypeVar("S", bound="Schedule")

SCHEDULES: Registry[type[Schedule]] = Registry("schedule")


def option(default: Any, help: str, unit: str = "") -> Any:
    """A field of an options dataclass with the text that `cpt recipes show` prints."""
    return dataclasses.field(default=default, metadata={"help": help, "unit": unit})


def warmup_option(default: str) -> Any:
    """The option `warmup` with its default."""
    return option(default, "linear rise to the peak, from the parent's lr if it is kept, else from 0", "length")


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """Options of one curve.

    A length is a share of the span (`1%`, `0.01`), a number of steps (`200 steps`) or a number of tokens (`500M`).
    `counter` belongs to every schedule: `run` counts steps from the first stage of a chain, `stage` from the stage's
    own.
    """

    peak: float | None = option(None, "highest lr; without it the lr that the parent ended on (`keep: [lr]`)", "lr")

    lengths: ClassVar[tuple[str, ...]] = ()  # options that are lengths
    early: ClassVar[tuple[str, ...]] = ()  # those that lie at the front: a curve that goes on keeps the first stage's

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in self.lengths:
                parse_length(field.name, value)
            elif field.metadata.get("unit") == "lr" and value is not None:
                object.__setattr__(self, field.name, parse_lr(field.name, value))
        if self.peak == 0:
            raise UsageError("`peak` is 0, wanted an lr above 0")
        self.check()

    def check(self) -> None:
        """Refuse values that cannot be meant.

        Raises:
            UsageError: names the option, what was found and what was wanted.
        """
        end = getattr(self, "end", None)
        if end is not None and self.peak is not None and end > self.peak:
            raise UsageError(f"`end` is {end:g}, wanted at most `peak`, {self.peak:g}")

    @abstractmethod
    def lr(self, step: int, span: int, start_lr: float) -> float:
        """The lr of a step.

        Args:
            step: steps done before this one, from 0.
            span: length of the whole curve [steps].
            start_lr: where a warmup starts from.
        """

    def complete(self: S, start_lr: float) -> S:
        """These options with every level filled in, given the lr that the parent ended on.

        Raises:
            PlanError: there is no peak and no lr of a parent to take it from.
        """
        if self.peak is not None:
            return self
        if start_lr <= 0:
            raise PlanError(
                "`peak` is missing and there is no lr of a parent to take it from",
                "give `peak`, or start from a stage that ends above 0 with `lr` in `keep`",
            )
        return dataclasses.replace(self, peak=start_lr)

    def fits(self, span: int) -> None:  # noqa: B027 (not every curve has parts that must fit)
        """Refuse lengths that do not fit into the span.

        Raises:
            PlanError: the parts are longer than the whole.
        """

    def placed(self, span: int) -> dict[str, int]:
        """Every length in whole steps, so that together they fit into the span."""
        return {name: num_steps(getattr(self, name), span) for name in self.lengths}

    def corners(self, span: int) -> tuple[int, ...]:
        """Steps around which the curve may turn; between two of them it only falls or only rises."""
        return ()

    def anneal_start(self, span: int) -> int | None:
        """Step at which the last decay begins, for curves that hold an lr before it; else None."""
        return None

    def top(self) -> float:
        """The peak of completed options."""
        assert self.peak is not None, "the options were not completed"
        return self.peak


def parse_lr(name: str, value: object) -> float:
    """An lr from a number or its text (YAML reads `3e-5` as text).

    Raises:
        UsageError: not a finite number from 0 up.
    """
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        number = float(value)
    except ValueError:
        raise UsageError(f"`{name}` is `{value}`, wanted an lr such as `3e-5`") from None
    if not math.isfinite(number) or number < 0:
        raise UsageError(f"`{name}` is `{value}`, wanted an lr from 0 up")
    return number


def make(name: object, given: Mapping[str, Any]) -> Schedule:
    """The schedule `name` with options as a person wrote them.

    Raises:
        UsageError: no such schedule, no such option, or a value that the schedule refuses.
    """
    kind = SCHEDULES.get(str(name))
    known = [field.name for field in dataclasses.fields(kind)]
    for key in given:
        if key not in known:
            raise unknown(f"option of the schedule `{name}`:", key, known)
    return kind(**given)
