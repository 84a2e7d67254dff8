"""Whether a stage is tried again by itself, after an attempt that did not end it: pure rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cpt.base.errors import DONE, GUARD, SAVED

END, REPEAT = "end", "repeat"
_WANTED = "`launcher.time` must be a minute longer than the start, one step and `launcher.warn` together"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How an attempt ended.

    Args:
        code: 0, 75, 4, or a failure.
        is_fault: it failed for a fault of the machine, which another attempt may not meet.
        is_asked: somebody asked for the stop.
        is_at_limit: it ended when the time limit of its batch job was near or over.
        began_at: steps at which the attempts so far went on, oldest first, this one last.
        step: where the next one would go on.
    """

    code: int
    is_fault: bool = False
    is_asked: bool = False
    is_at_limit: bool = False
    began_at: Sequence[int] = (0,)
    step: int = 0

    @property
    def without_gain(self) -> int:
        """Attempts in a row, this one last, that gained no step."""
        count = 0
        for began in reversed(self.began_at):
            if began < self.step:
                break
            count += 1
        return count


def decide(ended: Ended, *, retries: int, max_attempts: int | None, has_steps: bool) -> tuple[str, str]:
    """(`repeat` or `end`, why the end is final; empty where the attempt's own end says it).

    A stop at a time limit is repeated while steps are gained: the next attempt would have no more time. A stop from
    outside before that (preemption) and a fault of the machine are repeated also without, some times.

    Args:
        retries: how often in a row an attempt without a step gained is repeated; 0 = no fault is, a stop once.
        has_steps: the stage counts steps; one that does not is repeated like one that met a fault.
    """
    if ended.code in (DONE, GUARD) or ended.is_asked:
        return END, ""
    if ended.code != SAVED and not ended.is_fault:
        return END, ""
    if not retries and ended.code != SAVED:
        return END, ""
    attempts = len(ended.began_at)
    if max_attempts is not None and attempts >= max_attempts:
        return END, f"not tried again: {attempts} attempts were made (`launcher.max_attempts`)"
    if ended.without_gain and ended.is_at_limit and ended.code == SAVED and has_steps:
        return END, f"not tried again: its time limit came before a step was gained; {_WANTED}"
    if ended.without_gain > max(1, retries):
        near = f"; the last ended near its time limit: {_WANTED}" if ended.is_at_limit else ""
        return END, f"not tried again: {ended.without_gain} attempts without a step gained (`launcher.retries`){near}"
    return REPEAT, ""
