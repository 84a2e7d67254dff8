"""A stop signal on any rank becomes one agreed stop: handlers only raise a flag, the loops exchange it."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """Raised by a signal on this rank. Use `agreed` in every loop that may last."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def install(self) -> None:
        """Take over the stop signals of this process."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._raise)

    def _raise(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number

    def agreed(self) -> bool:
        """Whether any rank was signalled; every rank gets the same answer at the same point. Collective."""
        flag = torch.tensor([0 if self.signal is None else 1], dtype=torch.int32)
        if torch.cuda.is_available():
            flag = flag.cuda()
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
