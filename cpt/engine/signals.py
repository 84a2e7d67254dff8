"""A stop asked for on any rank becomes one agreed stop: handlers only raise a flag, the loops exchange it.

A stop is asked for by a signal, by the time at which the queue ends the job, or by a file (`watch`).
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
WATCH_SECONDS = 2.0
_NONE, _WATCH, _TIME, _SIGNAL = 0, 1, 2, 100  # what the ranks exchange; a signal's number is added to the last


class StopFlag:
    """Raised on this rank. Use `agreed` in every loop that may last.

    Args:
        stop_at: stop at this time [unix seconds]; None = no limit.
        watch: gives True when a stop is asked for; called on rank 0 alone, at most every two seconds.
        clock: gives the time [unix seconds].
    """

    def __init__(
        self,
        stop_at: float | None = None,
        watch: Callable[[], bool] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.signal: int | None = None
        self.reason = ""  # why all ranks stop, once they have agreed to
        self.stop_at, self.watch, self.clock = stop_at, watch, clock
        self._asked = False
        self._last_watch = float("-inf")

    def install(self) -> None:
        """Take over the stop signals of this process."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._raise)

    def _raise(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number

    def agreed(self) -> bool:
        """Whether a stop was asked for on any rank; all get the same answer at the same point. Collective."""
        flag = torch.tensor([self._here()], dtype=torch.int32)
        if torch.cuda.is_available():
            flag = flag.cuda()
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        code = int(flag.item())
        self.reason = _text(code)
        return code != _NONE

    def _here(self) -> int:
        """What this rank knows, as a number; of two reasons the larger one is told."""
        if self.signal is not None:
            return _SIGNAL + self.signal
        if self.stop_at is not None and self.clock() >= self.stop_at:
            return _TIME
        if self.watch is not None and not self._asked and dist.get_rank() == 0:
            now = time.monotonic()
            if now - self._last_watch >= WATCH_SECONDS:
                self._last_watch = now
                self._asked = self.watch()
        return _WATCH if self._asked else _NONE


def _text(code: int) -> str:
    if code >= _SIGNAL:
        return f"signal {signal.Signals(code - _SIGNAL).name}"
    return {_NONE: "", _WATCH: "asked", _TIME: "time limit"}[code]
